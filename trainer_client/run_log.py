"""What a run writes down while it trains: JSON lines, events, pictures, TensorBoard, W&B, and a bar on the terminal.

The files of a run's folder (the report reads them, see :mod:`trainer_client.report`)::

    metrics.jsonl                   one object a line: step, kind "train" or "eval", seconds, images, and the numbers
    events.jsonl                    step, time (ISO 8601, UTC), kind, text
    samples/step-00000000/          PPP-SS.png by prompt and seed, samples.json with prompts, seeds and scores
    tensorboard/                    scalars and grids of samples

``docs/metrics.md`` defines every number. Lines are flushed one by one, so a killed run loses at most a torn last line,
which :func:`trainer_client.run_state.rewind_log` drops.
"""

from __future__ import annotations

import json
import math
import shutil
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console
from torch import Tensor

from trainer_client import distributed
from trainer_client._images import to_uint8
from trainer_client._run_progress import RunProgress
from trainer_client._run_sinks import Sink, TensorBoardSink, WandbSink, tensorboard_is_installed
from trainer_client.run_state import rewind_log

EventKind: TypeAlias = Literal["start", "resume", "guard", "checkpoint", "stop", "failure", "finish", "warning"]
"""``stop``: the guard ended the run; ``failure``: an error or an interruption did."""
Number: TypeAlias = float | int | None
"""None, NaN and infinities are written as null."""
Scores: TypeAlias = Tensor | Sequence[Sequence[Number]]
"""[prompts, seeds]; None or NaN where a sample failed."""

METRICS, EVENTS, SAMPLES = "metrics.jsonl", "events.jsonl", "samples"
_RESERVED = frozenset({"step", "kind", "seconds", "images"})


class RunLog:
    """The log of one run. Ranks other than the main one may call everything, and nothing happens there.

    ``resume_step`` is the step of the checkpoint that the run goes on from: rows, events and samples after it are
    dropped, for the run writes them again (-1 drops all: a run that was killed before its first checkpoint). Without
    it the folder must hold no log yet. ``name`` is shown before the bar and names the run in W&B; the folder's name
    when empty. ``progress=False`` hides the bar and the lines of the steps, not the events. ``console`` is standard
    error unless given.

    Raises FileExistsError for a folder that has a log where ``resume_step`` is None; ValueError where W&B is asked for
    and is not installed, or where ``total_steps`` < 1.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        total_steps: int,
        resume_step: int | None = None,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        progress: bool = True,
        name: str = "",
        console: Console | None = None,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"a run has at least one step, not {total_steps}")
        self.folder = Path(folder)
        self._metrics: IO[str] | None = None
        self._events: IO[str] | None = None
        self._sinks: list[Sink] = []
        self._main = distributed.is_main()
        if not self._main:
            return
        title = name or self.folder.resolve().name
        _prepare(self.folder, resume_step)
        # First what may refuse, then what must be closed again.
        if wandb_project:
            self._sinks.append(WandbSink(self.folder, wandb_project, title))
        if tensorboard and tensorboard_is_installed():
            self._sinks.append(TensorBoardSink(self.folder / "tensorboard", resume_step))
        self._metrics = (self.folder / METRICS).open("a", encoding="utf-8")
        self._events = (self.folder / EVENTS).open("a", encoding="utf-8")
        self._progress = RunProgress(title, total_steps, resume_step or 0, show=progress, console=console)
        if tensorboard and not tensorboard_is_installed():
            self._progress.say("no TensorBoard log: the package tensorboard is not installed")

    def train(self, step: int, numbers: Mapping[str, Number], *, seconds: float, images: int) -> None:
        """One training step that is done: ``seconds`` of training and ``images`` sampled so far, over all resumes.

        Raises ValueError for a number called step, kind, seconds or images.
        """
        if self._main:
            self._row("train", step, numbers, seconds, images)
            self._progress.train(step, numbers, seconds=seconds, images=images)

    def evaluation(self, step: int, numbers: Mapping[str, Number], *, seconds: float, images: int) -> None:
        """One evaluation of the policy after ``step`` steps (0: before training). Raises as :meth:`train`."""
        if self._main:
            self._row("eval", step, numbers, seconds, images)
            self._progress.evaluation(step, numbers)

    def samples(
        self,
        step: int,
        prompts: Sequence[str],
        seeds: Sequence[int],
        images_PS3HW: Tensor | npt.NDArray[Any],
        scores: Mapping[str, Scores],
    ) -> None:
        """Pictures of ``prompts`` x ``seeds``, uint8 or float in [0, 1], with the scores [P, S] of each reward.

        The step's folder appears whole or not at all, and replaces an older one. Raises ValueError for shapes that do
        not fit.
        """
        if not self._main:
            return
        count = (len(prompts), len(seeds))
        if images_PS3HW.ndim != 5 or tuple(images_PS3HW.shape[:3]) != (*count, 3):
            raise ValueError(f"images are [{count[0]}, {count[1]}, 3, H, W], not {list(images_PS3HW.shape)}")
        known = {name: _score_rows(name, values, count) for name, values in scores.items()}
        pixels = np.stack([[to_uint8(_rows_first(image)) for image in images_3HW] for images_3HW in images_PS3HW])
        about = {"step": step, "prompts": list(prompts), "seeds": [int(seed) for seed in seeds], "scores": known}
        _write_samples(self.folder / SAMPLES / f"step-{step:08d}", about, pixels)
        for sink in self._sinks:
            sink.pictures(step, pixels)

    def event(self, step: int, kind: EventKind, text: str) -> None:
        """Something that happened, in words; it is also printed above the bar."""
        if self._main:
            time = datetime.now(UTC).isoformat(timespec="seconds")
            _append(self._events, {"step": step, "time": time, "kind": kind, "text": text})
            self._progress.event(step, kind, text)

    def close(self, *, failed: bool = False) -> None:
        """End the bar and close the files; nothing may be logged afterwards. Again: nothing. ``failed`` tells W&B."""
        if not self._main:
            return
        self._progress.close()
        for file in (self._metrics, self._events):
            if file is not None:
                file.close()
        for sink in self._sinks:
            sink.close(failed)
        self._sinks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def _row(self, kind: str, step: int, numbers: Mapping[str, Number], seconds: float, images: int) -> None:
        if taken := sorted(_RESERVED & numbers.keys()):
            raise ValueError(f"a number cannot be called {taken[0]!r}: each row has one")
        plain = {name: _plain(value) for name, value in numbers.items()}
        fixed = {"step": step, "kind": kind, "seconds": float(seconds), "images": int(images)}
        _append(self._metrics, {**fixed, **plain})
        known = {name: float(value) for name, value in plain.items() if value is not None}
        for sink in self._sinks:
            sink.scalars(step, {**known, "progress/seconds": float(seconds), "progress/images": float(images)})


def _prepare(folder: Path, resume_step: int | None) -> None:
    logs = [folder / METRICS, folder / EVENTS]
    if resume_step is None:
        if found := [path for path in logs if path.exists() and path.stat().st_size]:
            raise FileExistsError(f"{found[0]} holds the log of a run: resume it, or take another folder")
    else:
        for path in logs:
            rewind_log(path, resume_step)
        for path in (folder / SAMPLES).glob("step-*"):
            if int(path.name.removeprefix("step-")) > resume_step:
                shutil.rmtree(path)
    folder.mkdir(parents=True, exist_ok=True)


def _append(file: IO[str] | None, row: Mapping[str, Any]) -> None:
    if file is None or file.closed:
        raise ValueError("the log is closed")
    # ASCII: a text may hold U+2028 and the like, which readers of lines take for ends of lines.
    file.write(json.dumps(row, allow_nan=False) + "\n")
    file.flush()


def _plain(value: Number) -> Number:
    if value is None or isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _score_rows(name: str, values: Scores, count: tuple[int, int]) -> list[list[Number]]:
    rows = values.tolist() if isinstance(values, Tensor) else values
    if len(rows) != count[0] or any(len(row) != count[1] for row in rows):
        raise ValueError(f"scores of {name} are not {count[0]} prompts x {count[1]} seeds")
    return [[_plain(value) for value in row] for row in rows]


def _rows_first(image_3HW: Tensor | npt.NDArray[Any]) -> Tensor | npt.NDArray[Any]:
    # A numpy image whose width is 1 or 3 would be taken for [H, W, 3].
    return image_3HW.transpose(1, 2, 0) if isinstance(image_3HW, np.ndarray) else image_3HW


def _write_samples(folder: Path, about: Mapping[str, Any], pixels_PSHW3: npt.NDArray[np.uint8]) -> None:
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for p, row in enumerate(pixels_PSHW3):
        for s, pixels in enumerate(row):
            Image.fromarray(pixels).save(partial / f"{p:03d}-{s:02d}.png")
    (partial / "samples.json").write_text(json.dumps(about, allow_nan=False, ensure_ascii=False), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)


def write_trace(out: Path, step: int, error: Exception) -> Path:
    """Add the error's trace to the run's failures; returns the file, which each rank has for itself."""
    rank = distributed.rank()
    file = out / (f"failures-rank{rank}.txt" if rank else "failures.txt")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(f"step {step}, {datetime.now(UTC).isoformat(timespec='seconds')}\n")
        stream.writelines(traceback.format_exception(error))
        stream.write("\n")
    return file
