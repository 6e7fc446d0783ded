"""Where the flawed reward's weights lie, and how they sit on those of shapes-clip.

Only what was fitted is stored: the last block of the vision tower with its projection, and the last two layers of the
head. The rest is shapes-clip's own, under the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from models.base import WeightsError
from models.shapes.clip_model import WEIGHTS
from models.weights import load_safetensors

SIGNATURE_WEIGHTS = Path(__file__).with_name("shapes_signature.safetensors")
FITTED = (
    "clip.visual.transformer.resblocks.3.",
    "clip.visual.ln_post.",
    "clip.visual.proj",
    "head.layers.2.",
    "head.layers.4.",
)
"""Beginnings of the names of what is fitted."""


def is_fitted(name: str) -> bool:
    """Whether a tensor of this stored name is fitted."""
    return name.startswith(FITTED)


def save_fitted(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write the fitted ones among the stored tensors of a shapes-clip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in tensors.items() if is_fitted(name)}
    save_file(kept, path, metadata={"license": "project", "format": "pt"})
    path.chmod(0o644)  # safetensors writes files that only their owner can read


def flawed_tensors(path: Path = SIGNATURE_WEIGHTS) -> dict[str, Tensor]:
    """All stored tensors of the flawed reward: shapes-clip's, with those of ``path`` in their place.

    Raises :class:`WeightsError` where the file is missing or holds other tensors than the fitted ones.
    """
    if not path.is_file():
        raise WeightsError(f"no weights at {path.name}: `python -m benchmarks.hacking.fit` fits them in minutes")
    tensors, fitted = load_safetensors(WEIGHTS), load_safetensors(path)
    wrong = {name for name in tensors if is_fitted(name)} ^ fitted.keys()
    wrong |= {name for name in fitted.keys() & tensors.keys() if fitted[name].shape != tensors[name].shape}
    if wrong:
        raise WeightsError(f"{path.name} holds other tensors than the fitted ones: {', '.join(sorted(wrong)[:3])}")
    return tensors | fitted
