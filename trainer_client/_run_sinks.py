"""Where numbers and pictures of a run go besides its own files: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

PICTURED = 8
"""Prompts of a grid, at most."""


class Sink(Protocol):
    """Takes what is logged of one run; ``close`` is called once."""

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def pictures(self, step: int, pixels_PSHW3: npt.NDArray[np.uint8]) -> None: ...

    def close(self, failed: bool) -> None: ...


def grid(pixels_PSHW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """One picture [P' H, S W, 3]: a row a prompt, at most PICTURED of them, a column a seed."""
    shown = pixels_PSHW3[:PICTURED]
    prompts, seeds, height, width, _ = shown.shape
    return np.ascontiguousarray(shown.transpose(0, 2, 1, 3, 4)).reshape(prompts * height, seeds * width, 3)


def tensorboard_is_installed() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


class TensorBoardSink:
    """Event files in ``folder``; what earlier ones say of steps after ``resume_step`` is purged."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        # Imported here: it takes a second, and only the main rank of a run that wants it needs it.
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_step is None else resume_step + 1
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def pictures(self, step: int, pixels_PSHW3: npt.NDArray[np.uint8]) -> None:
        self._writer.add_image("samples", grid(pixels_PSHW3), step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandbSink:
    """One run of W&B, whose id is kept in ``folder``, so that a resumed run goes on in the same curves.

    W&B keeps the first value that it was sent for a step. Raises ValueError where the package is not installed.
    """

    def __init__(self, folder: Path, project: str, name: str) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(f"logging to the W&B project {project!r} needs the package wandb: pip install wandb")
        self._wandb: Any = importlib.import_module("wandb")
        kept = folder / "wandb-id"
        known = kept.read_text().strip() if kept.exists() else None
        self._run = self._wandb.init(project=project, name=name, dir=str(folder), id=known, resume="allow")
        kept.write_text(self._run.id)

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def pictures(self, step: int, pixels_PSHW3: npt.NDArray[np.uint8]) -> None:
        self._run.log({"samples": self._wandb.Image(grid(pixels_PSHW3))}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
