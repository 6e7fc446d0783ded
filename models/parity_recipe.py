"""Synthetic checkpoints: every tensor a pure function of (name, shape, seed), bit for bit on every platform.

The recipe is that of tests/fixtures/pointwise/RECIPE.md, written from its text; its self-test vectors are a test here.
The weights mean nothing. They prove that a checkpoint of the published structure is read and that the same numbers
come out as from the reference implementation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

_EMBEDDINGS = (
    "word_embeddings",
    "position_embedding",
    "token_type_embeddings",
    "token_embedding",
    "positional_embedding",
    "class_embedding",
    "cls_token",
    "pos_embed",
    "embed_tokens",
)
_EMBEDDING_SCALE = 0.5
_SMALL_SCALE = 0.02
_VARIANCE_SCALE = 0.1
_LOGIT_SCALE = 4.6052


def fill(name: str, shape: Sequence[int], seed: int, dtype: str = "float32") -> Tensor:
    """The tensor ``name`` of ``shape``: float32, or int64 0..n-1 along the last axis for position ids."""
    leaf = name.rsplit(".", 1)[-1]
    if dtype.startswith("int") or leaf == "position_ids":
        return torch.arange(shape[-1]).expand(tuple(shape)).clone()
    if leaf == "logit_scale":
        return torch.full(tuple(shape), _LOGIT_SCALE)
    noise = _unit_noise(name, math.prod(shape), seed)
    if any(mark in name for mark in _EMBEDDINGS):
        noise *= np.float32(_EMBEDDING_SCALE)
    elif leaf == "running_var":
        noise = np.float32(1) + np.float32(_VARIANCE_SCALE) * np.abs(noise)
    elif len(shape) <= 1:
        noise *= np.float32(_SMALL_SCALE)
        if leaf == "weight":
            noise += np.float32(1)
    else:
        # nn.Linear and convolutions are stored (out, in, ...), bare projections (in, out)
        fan_in = math.prod(shape[1:]) if leaf.endswith("weight") else shape[0]
        noise *= np.float32(1 / math.sqrt(fan_in))
    return torch.from_numpy(noise).reshape(tuple(shape))


def build(manifest: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """All tensors of a manifest (``entries`` of name, shape, dtype), in its order."""
    return {e["name"]: fill(e["name"], e["shape"], seed, e["dtype"]) for e in manifest["entries"]}


def write_checkpoint(tensors: Mapping[str, Tensor], file: Path, *, nested: str | None = None) -> Path:
    """Save tensors as published: safetensors by the suffix, else torch.save, flat or under the key ``nested``."""
    if file.suffix == ".safetensors":
        save_file(dict(tensors), file)
    else:
        torch.save({nested: dict(tensors)} if nested else dict(tensors), file)
    return file


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hex sha256 over names and little-endian bytes of (name, tensor) pairs in the order given."""
    hasher = hashlib.sha256()
    for name, tensor in tensors:
        hasher.update(name.encode())
        hasher.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _unit_noise(name: str, count: int, seed: int) -> NDArray[np.float32]:
    """``count`` values of mean 0 and variance 1, uniform in [-sqrt(3), sqrt(3)).

    Philox's raw words are stable over versions of numpy; each gives two numbers of 24 bits, the low half first.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
    words = np.random.Philox(key=key).random_raw((count + 1) // 2)
    halves = np.asarray(words, dtype="<u8").view("<u4")[:count]
    signed = (halves >> np.uint32(8)).astype(np.int32) - np.int32(1 << 23)
    return signed.astype(np.float32) * np.float32(2.0**-23) * np.float32(math.sqrt(3))
