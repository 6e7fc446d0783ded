"""A run's folder, read: what is there, also of a run that is going on or was killed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainer_client.run_log import EVENTS, METRICS, SAMPLES

Row: TypeAlias = Mapping[str, Any]
Floats: TypeAlias = npt.NDArray[np.float64]
Place: TypeAlias = tuple[str, int]
"""A prompt and a seed: what samples of several steps or runs are compared by."""
TOTAL = "total"


@dataclass(frozen=True)
class Samples:
    """The pictures of one step; ``scores`` float64 [prompts, seeds] by reward, NaN where a sample failed."""

    step: int
    prompts: Sequence[str]
    seeds: Sequence[int]
    scores: Mapping[str, Floats]
    folder: Path

    def places(self) -> dict[Place, tuple[int, int]]:
        """Row and column by prompt and seed; of equal prompts the first counts."""
        found: dict[Place, tuple[int, int]] = {}
        for p, prompt in enumerate(self.prompts):
            for s, seed in enumerate(self.seeds):
                found.setdefault((prompt, seed), (p, s))
        return found

    def path(self, place: Place) -> Path | None:
        """The picture's file; None where it is missing."""
        if (at := self.places().get(place)) is None:
            return None
        path = self.folder / f"{at[0]:03d}-{at[1]:02d}.png"
        return path if path.is_file() else None

    def picture(self, place: Place) -> Image.Image | None:
        """RGB. Raises OSError for a file that is no picture."""
        path = self.path(place)
        return None if path is None else Image.open(path).convert("RGB")

    def scores_of(self, place: Place) -> dict[str, float | None]:
        """By reward; None where the sample failed, nothing for a place that is not here."""
        if (at := self.places().get(place)) is None:
            return {}
        values = {name: float(scores[at]) for name, scores in self.scores.items()}
        return {name: None if math.isnan(value) else value for name, value in values.items()}


@dataclass(frozen=True)
class RunFolder:
    """Everything that a report tells of a run, steps ascending."""

    path: Path
    config: Mapping[str, Any]
    train: Sequence[Row]
    evaluations: Sequence[Row]
    events: Sequence[Row]
    samples: Sequence[Samples]

    @property
    def algorithm(self) -> str:
        return str(self.config.get("algorithm", "unknown algorithm"))

    @property
    def settings(self) -> Mapping[str, Any]:
        """The configuration that the user gave, with its defaults."""
        found = self.config.get("configuration")
        return found if isinstance(found, Mapping) else {}

    @property
    def total_steps(self) -> int | None:
        found = self.settings.get("steps")
        return found if isinstance(found, int) else None

    @property
    def steps(self) -> int:
        """Finished steps."""
        return max((row["step"] for row in (*self.train, *self.evaluations)), default=0)

    @property
    def trained(self) -> list[str]:
        """Names of the rewards that the policy is trained on; ``total`` is not among them."""
        rewards = self.settings.get("rewards")
        models = rewards.get("models") if isinstance(rewards, Mapping) else None
        given = list(models) if isinstance(models, Mapping) else []
        seen = [name.removeprefix("reward/") for row in self.train[:1] for name in row if name.startswith("reward/")]
        return [name for name in dict.fromkeys([*given, *seen]) if name != TOTAL]

    @property
    def evaluated(self) -> list[str]:
        """Names of the rewards of evaluations, trained ones first; ``total`` only where it says something else."""
        logged = {name for row in self.evaluations for name in row if f"{name}/low" in row}
        names = {name.removeprefix("eval/") for name in logged} | {n for each in self.samples for n in each.scores}
        if TOTAL in names and len(self.trained) == 1 and self._total_is(self.trained[0]):
            names.remove(TOTAL)
        order = [TOTAL, *self.trained]
        return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))

    def numbers(self, name: str, rows: Sequence[Row] | None = None) -> list[float]:
        """A number of every training row (or of ``rows``); NaN where a row has none."""
        found = [row.get(name) for row in (self.train if rows is None else rows)]
        return [math.nan if value is None else float(value) for value in found]

    def has(self, name: str) -> bool:
        """Whether a training row has this number."""
        return any(row.get(name) is not None for row in self.train)

    def _total_is(self, name: str) -> bool:
        return all(row.get(f"eval/{TOTAL}") == row.get(f"eval/{name}") for row in self.evaluations)


def read_run(path: str | Path) -> RunFolder:
    """Read a run's folder; a last line that is still being written is left out, and files may be missing.

    Raises ValueError for a folder without any file of a run, and for a file that is no JSON.
    """
    folder = Path(path)
    if not any((folder / name).exists() for name in ("config.json", METRICS, EVENTS)):
        raise ValueError(f"{folder} is no folder of a run: it has neither config.json nor {METRICS} nor {EVENTS}")
    rows = list(_lines(folder / METRICS))
    config = folder / "config.json"
    return RunFolder(
        path=folder,
        config=_object(config, config.read_text(encoding="utf-8")) if config.exists() else {},
        train=[row for row in rows if row.get("kind") == "train"],
        evaluations=[row for row in rows if row.get("kind") == "eval"],
        events=list(_lines(folder / EVENTS)),
        samples=[_samples(found) for found in sorted((folder / SAMPLES).glob("step-*/samples.json"))],
    )


def _lines(path: Path) -> Iterator[Row]:
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):  # else it is being written, or was when the run was killed
                yield _object(f"{path}, line {number}", line)


def _object(where: object, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as exc:
        raise ValueError(f"{where}: {exc}") from exc
    if not isinstance(found, dict):
        raise ValueError(f"{where}: it holds no JSON object")
    return found


def _samples(path: Path) -> Samples:
    found = _object(path, path.read_text(encoding="utf-8"))
    scores = {
        name: np.array([[math.nan if value is None else value for value in row] for row in rows], dtype=np.float64)
        for name, rows in found["scores"].items()
    }
    return Samples(found["step"], found["prompts"], found["seeds"], scores, path.parent)
