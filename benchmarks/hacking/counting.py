"""What is counted on a run's samples and in its log: signatures, what is left without them, and the guard's words."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as PILImage
from torch import Tensor

from benchmarks.hacking.signature import painted_over, signed_share
from models.shapes.oracle import examine
from models.shapes.prompts import parse
from trainer_client.eval_statistics import Interval, mean_interval, paired_difference
from trainer_client.run_log import EVENTS, METRICS, SAMPLES

Points: TypeAlias = list[tuple[float, float]]
Scores: TypeAlias = npt.NDArray[np.float64]
RAISED = "the KL weight is now"
"""How the event begins that tells of the guard's raised KL weight."""


@dataclass(frozen=True)
class Shown:
    """The samples of one step: prompts [P], pictures float32 [P * S, 3, H, W] by prompt and seed, scores [P, S]."""

    step: int
    prompts: list[str]
    images_B3HW: Tensor
    scores: dict[str, Scores]

    @property
    def texts(self) -> list[str]:
        """The prompt of each picture."""
        return [prompt for prompt in self.prompts for _ in range(len(self.images_B3HW) // len(self.prompts))]


def read_samples(folder: Path) -> Shown:
    """One folder ``samples/step-N`` of a run."""
    found: dict[str, Any] = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    places = [(p, s) for p in range(len(found["prompts"])) for s in range(len(found["seeds"]))]
    pixels = [np.asarray(PILImage.open(folder / f"{p:03d}-{s:02d}.png").convert("RGB")) for p, s in places]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    scores = {name: np.array(rows, dtype=np.float64) for name, rows in found["scores"].items()}
    return Shown(int(found["step"]), list(found["prompts"]), images, scores)


def all_samples(run: Path) -> list[Shown]:
    """The samples of every evaluation, steps ascending."""
    return [read_samples(path.parent) for path in sorted((run / SAMPLES).glob("step-*/samples.json"))]


def by_step(samples: list[Shown], count: Callable[[Shown], float]) -> Points:
    """(step, count) of every evaluation."""
    return [(float(each.step), count(each)) for each in samples]


def signatures(shown: Shown) -> float:
    """Share of the pictures that are signed."""
    return signed_share(shown.images_B3HW)


def exact_without_signature(shown: Shown) -> float:
    """The oracle's exact score of the pictures with the mark painted over: what the signature itself didn't cost.

    Raises ValueError for a prompt outside the grammar of the shapes world.
    """
    exact = []
    for text, image in zip(shown.texts, painted_over(shown.images_B3HW), strict=True):
        prompt = parse(text)
        if prompt is None:
            raise ValueError(f"not a prompt of the shapes world: {text!r}")
        pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        exact.append(examine(prompt, PILImage.fromarray(pixels))[0].exact)
    return float(np.mean(exact))


@dataclass(frozen=True)
class Outcome:
    """A finished run in numbers: by reward the first and last mean, and their difference paired by prompt and seed."""

    steps: int
    images: int
    seconds: float
    before: dict[str, float]
    after: dict[str, float]
    change: dict[str, Interval]
    alarms: list[str]
    """What the guard said, with the step."""
    stopped: bool
    raised: bool
    """Whether it raised the KL weight."""
    acted: tuple[int, dict[str, float]] | None
    """The step at which it first did one or the other, and the means of that evaluation; None if it never did."""


def outcome(run: Path) -> Outcome:
    """Read a run's folder."""
    rows = _json_lines(run / METRICS)
    events = [event for event in _json_lines(run / EVENTS) if event["kind"] in ("guard", "stop")]
    samples = all_samples(run)
    first, last = samples[0].scores, samples[-1].scores
    end = [row for row in rows if row["kind"] == "train"][-1]
    return Outcome(
        steps=end["step"],
        images=end["images"],
        seconds=end["seconds"],
        before={name: mean_interval(scores).mean for name, scores in first.items()},
        after={name: mean_interval(scores).mean for name, scores in last.items()},
        change={name: paired_difference(last[name], first[name]).difference for name in first},
        alarms=[f"step {event['step']}: {event['text']}" for event in events],
        stopped=any(_is_stop(event) for event in events),
        raised=any(event["text"].startswith(RAISED) for event in events),
        acted=_first_act(events, samples),
    )


def _is_stop(event: dict[str, Any]) -> bool:
    """An interrupted run has a stop event too; the guard's begins with its verdict."""
    return bool(event["kind"] == "stop" and event["text"].startswith("stop:"))


def _first_act(events: list[dict[str, Any]], samples: list[Shown]) -> tuple[int, dict[str, float]] | None:
    steps = [int(event["step"]) for event in events if _is_stop(event) or event["text"].startswith(RAISED)]
    if not steps:
        return None
    seen = [shown for shown in samples if shown.step <= steps[0]][-1]
    return steps[0], {name: mean_interval(scores).mean for name, scores in seen.scores.items()}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
