"""Weights as tensors and as a hash, without ever unpickling code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.base import WeightsError

HASH_PREFIX = "sha256:"


def load_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name, on the CPU and mapped into memory (pages are read when they are used).

    Raises :class:`WeightsError` naming the file when it is missing, not readable or not a safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no weights at {path}: not a file. Give the path of a .safetensors file")
    try:
        return load_file(path, device="cpu")
    except SafetensorError as exc:
        raise WeightsError(
            f"the weights at {path} are damaged or not in the safetensors format: fetch or build the file again"
        ) from exc
    except OSError as exc:
        raise WeightsError(f"the weights at {path} cannot be read: {exc.strerror or 'input/output error'}") from exc


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """``"sha256:<hex>"`` over names, dtypes, shapes and bytes, in the order of the names.

    Strides, device and the order of the mapping do not count; a dtype does (bfloat16 included).
    """
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        # Every field is terminated or of a length fixed by those before it: no two mappings hash the same text.
        header = f"{len(name)}:{name}|{tensor.dtype}|{tuple(tensor.shape)}|"
        hasher.update(header.encode())
        # numpy has no bfloat16; the same memory seen as bytes needs no conversion.
        hasher.update(tensor.flatten().view(torch.uint8).numpy().data)
    return HASH_PREFIX + hasher.hexdigest()


def hash_files(*paths: Path) -> str:
    """``"sha256:<hex>"`` over names and contents of weight files that are not tensors to us (ONNX), sorted by name.

    Raises :class:`WeightsError` for a missing file.
    """
    hasher = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256")
        except OSError as exc:
            raise WeightsError(f"the weights at {path} cannot be read: {exc.strerror or 'input/output error'}") from exc
        hasher.update(f"{len(path.name)}:{path.name}|".encode() + content.digest())
    return HASH_PREFIX + hasher.hexdigest()
