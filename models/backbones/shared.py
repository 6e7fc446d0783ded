"""Towers that live once in a process: rewards on the same checkpoint hold the same module, in any order of loading."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from models.backbones import clip_hf
from models.backbones.clip import ARCHITECTURES, ClipArchitecture, ClipSize, ClipTowers, empty_clip, size_of
from models.base import LoadOptions, WeightsError, WeightSource
from models.weights import fit, hash_tensors, load_checkpoint, obtain

NESTED = ("state_dict",)
"""Keys under which published CLIP checkpoints nest their tensors."""

Key = tuple[tuple[tuple[str, int, int], ...], torch.dtype, str, ClipArchitecture]


@dataclass(frozen=True, eq=False)
class LoadedClip:
    """Towers with the sha256 of the tensors that they were made of; ``name`` is the architecture's."""

    towers: ClipTowers
    weights_hash: str
    name: str


_loaded: WeakValueDictionary[Key, LoadedClip] = WeakValueDictionary()
_locks: dict[Key, Lock] = {}
_guard = Lock()


def shared_clip(source: WeightSource, options: LoadOptions, architecture: ClipArchitecture, model: str) -> LoadedClip:
    """The towers of ``source`` (as the options override it): those that the process holds already, or loaded now.

    Equal are towers from the same unchanged files, of one dtype, device and architecture. They live as long as a model
    holds them. Thread-safe: two models that load at once wait for one load. Raises :class:`WeightsError`.
    """
    path = obtain(source, options, model)
    key = (_state_of(path), options.dtype, str(options.device), architecture)
    with _guard:
        lock = _locks.setdefault(key, Lock())
    with lock:
        found = _loaded.get(key)
        if found is None:
            found = load_clip(path, architecture, model, options.dtype, options.device)
            _loaded[key] = found
        return found


def load_clip(
    path: Path, architecture: ClipArchitecture, model: str, dtype: torch.dtype, device: torch.device
) -> LoadedClip:
    """Towers of one checkpoint file or folder, in open_clip's or Hugging Face's names; sizes come from the shapes."""
    tensors = load_checkpoint(path, NESTED)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in clip_hf.LEGACY_BUFFERS}
    ours, config = _in_open_clips_names(tensors, architecture, model)
    towers = ClipTowers.from_config(config, tensors=ours, dtype=dtype, device=device)
    return LoadedClip(towers, hash_tensors(tensors), architecture.name)


def _in_open_clips_names(
    tensors: dict[str, Tensor], architecture: ClipArchitecture, model: str
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Checked tensors and the configuration that they fill; errors speak the names of the file."""
    hugging_face = clip_hf.is_hugging_face(tensors)
    ours = clip_hf.to_open_clip(tensors) if hugging_face else tensors
    size = size_of(ours, model)
    _refuse_another_architecture(size, architecture, model)
    config = architecture.config(size)
    expected = empty_clip(config).state_dict()
    fit(clip_hf.from_open_clip(expected) if hugging_face else expected, tensors, model)
    return ours, config


def _refuse_another_architecture(size: ClipSize, architecture: ClipArchitecture, model: str) -> None:
    """The tensors of another architecture would load where their widths allow it, and score nonsense."""
    for other in ARCHITECTURES.values():
        if other != architecture and size == other.published:
            raise WeightsError(f"{model} wants weights of {architecture.name}; these are of {other.name}")
    published = architecture.published
    for tower, (width, layers), (its_width, its_layers) in (
        ("image", (size.vision_width, size.vision_layers), (published.vision_width, published.vision_layers)),
        ("text", (size.text_width, size.text_layers), (published.text_width, published.text_layers)),
    ):
        # A file that lost its last layers would load as a smaller model.
        if width == its_width and layers != its_layers:
            raise WeightsError(
                f"the weights are not those of {model}: the {tower} tower has {layers} layers, not {its_layers}"
            )
    for width, head_width in (
        (size.vision_width, architecture.vision_head_width),
        (size.text_width, architecture.text_head_width),
    ):
        if width == 0 or width % head_width:
            raise WeightsError(
                f"the weights are not those of {model}: {width} channels do not split into heads of {head_width}"
            )


def _state_of(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Which files a source is, and in which state: a file that was replaced is another one."""
    path = path.resolve()
    files = sorted(entry for entry in path.iterdir() if entry.is_file()) if path.is_dir() else [path]
    return tuple((str(file), stat.st_mtime_ns, stat.st_size) for file in files for stat in (file.stat(),))
