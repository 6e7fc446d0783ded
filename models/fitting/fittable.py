"""What of a loaded reward model can be fitted to preferences, and how it becomes a checkpoint again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from models.base import LoadOptions


@dataclass(frozen=True, eq=False)
class Fittable:
    """``module`` holds every parameter that may change; ``head`` are beginnings of the names of the head's.

    ``save`` writes a checkpoint into a folder and tells how it is loaded.
    """

    module: nn.Module
    head: tuple[str, ...]
    save: Callable[[Path], LoadOptions]
    frozen: tuple[str, ...] = ()
    """Beginnings of names that stay as they are whatever is trained."""


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> str:
    """Write a safetensors file; its path as text, as settings take it."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
    return str(file)
