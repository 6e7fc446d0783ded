"""Weights as tensors and as a hash, without ever unpickling code."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.base import LoadOptions, WeightsError, WeightSource
from models.sources import HubSource, UrlSource, locate, looks_like_hub, parse, place, setting, shards, shown

HASH_PREFIX = "sha256:"
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_ZIP = b"PK\x03\x04"
_LFS_POINTER = b"version https://git-lfs"
_HTML = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)
_WANTED_GLOBAL = re.compile(r"GLOBAL ([\w.<>]+)")


def obtain(source: WeightSource, options: LoadOptions, model: str = "") -> Path:
    """The local file or folder of ``source`` as ``options`` override it: where it lies, else fetched from the hub.

    ``model`` is the model's name for messages. Raises :class:`WeightsError` naming what is missing, the setting and
    how to place it by hand, and for a file that has another sha256 than the options say; files of an https source are
    fetched by ``reward-service fetch`` alone.
    """
    path = _obtain(source, options, model)
    if options.sha256 is not None and source.role == "weights":
        verify_sha256(path, options.sha256)
    return path


def _obtain(source: WeightSource, options: LoadOptions, model: str) -> Path:
    text = options.source(source)
    found = locate(text, options.weights_dir, source.files)
    if found is not None:
        return found
    parsed, named = parse(text), setting(source.role, model)
    if isinstance(parsed, HubSource):
        from models.hub import download, remote_files

        remote = remote_files(parsed, options.weights_dir, source.files, named)
        return download(parsed, options.weights_dir, remote, named)
    if isinstance(parsed, UrlSource):
        raise WeightsError(
            f"the weights {shown(text)} are not here: fetch them with `reward-service fetch {model or 'NAME'}`, put "
            f"the file at {place(parsed, options.weights_dir)} by hand, or give the path of the file in {named}"
        )
    wanted = f" (a folder with {', '.join(source.files)})" if source.files else ""
    hint = f", or hf:{text} for the hub's" if looks_like_hub(text) else ""
    raise WeightsError(f"{named}: no weights at {parsed.path}{wanted}; give the path of the file or folder{hint}")


def load_checkpoint(path: str | Path, nested: Sequence[str] = ()) -> dict[str, Tensor]:
    """Tensors of a checkpoint by name, on the CPU and mapped into memory where the format allows it.

    ``path`` is a .safetensors file, a torch file (.pt, .pth, .bin, .ckpt), the index of a sharded one, or a folder with
    one of them. In torch files the tensors may be nested under one of the keys ``nested``, tried in this order, or lie
    flat; entries that are not tensors (epoch, arguments) are left out. Raises :class:`WeightsError` for a missing or
    damaged file, a git-lfs pointer, a web page saved in place of the file, a pickle that wants code, and tensors that
    are not plain: sparse, quantised, without data or larger than the file's own numbers (repeated by strides).
    """
    path = checkpoint_file(Path(path))
    if path.name.endswith(".index.json"):
        tensors: dict[str, Tensor] = {}
        for shard in shards(path):
            tensors |= load_checkpoint(path.with_name(shard), nested)
        return tensors
    _refuse_what_is_no_checkpoint(path)
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _select(_load_torch(path), nested, path)
    raise WeightsError(f"{path} has no known suffix of weights: .safetensors, {', '.join(TORCH_SUFFIXES)}")


def checkpoint_file(path: Path) -> Path:
    """``path`` itself if it is a file, else the one checkpoint, or index of shards, in the folder.

    Raises :class:`WeightsError` where there is none, or several to choose from.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(f"no weights at {path}: neither a file nor a folder")
    indices = [path / name for name in _INDICES if (path / name).is_file()]
    if indices:
        return indices[0]
    present = sorted(entry for entry in path.iterdir() if entry.is_file())
    for suffixes in ((".safetensors",), TORCH_SUFFIXES):
        found = [entry for entry in present if entry.suffix in suffixes]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(entry.name for entry in found)
            raise WeightsError(f"the folder {path} holds several checkpoints ({names}): give the path of one")
    raise WeightsError(f"the folder {path} holds no checkpoint (.safetensors, {', '.join(TORCH_SUFFIXES)})")


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


def _refuse_what_is_no_checkpoint(path: Path) -> None:
    """A clone without git-lfs and a browser's "save page" leave files that look like weights by their names only."""
    head = _read_head(path)
    if not head:
        raise WeightsError(f"the weights at {path} are damaged: the file is empty; fetch or copy it again")
    if head.startswith(_LFS_POINTER):
        raise WeightsError(
            f"{path} is a git-lfs pointer and not the weights: run `git lfs pull` in its clone, or fetch the file"
        )
    if _HTML.match(head):
        raise WeightsError(f"{path} is a web page and not the weights: download the file itself, not its page")


def _read_head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as exc:
        raise WeightsError(f"the weights at {path} cannot be read: {exc.strerror or 'input/output error'}") from exc


def _load_torch(path: Path) -> Any:
    """The content of a torch file, unpickled without code."""
    # Files from before torch 1.6 are no zip archives; they cannot be mapped.
    mmap = _read_head(path).startswith(_ZIP)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as exc:  # whatever bytes make the unpickler raise: KeyError, EOFError, OSError ...
        raise WeightsError(_why_refused(path, str(exc))) from exc


def _why_refused(path: Path, reason: str) -> str:
    remedy = "get or convert it to .safetensors, which holds tensors alone"
    wanted = _WANTED_GLOBAL.search(reason)  # a printable word: other names do not match
    if wanted:
        return (
            f"the weights at {path} are refused: the pickle wants the code {wanted.group(1)}, and a pickle that may "
            f"call code can do anything on this machine; {remedy}"
        )
    if "TorchScript" in reason:
        return f"the weights at {path} are refused: a TorchScript archive is a program and not only tensors; {remedy}"
    return f"the weights at {path} are damaged or not a torch file: fetch or copy the file again, or {remedy}"


def _select(content: Any, nested: Sequence[str], path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file's content, from the first of the keys ``nested`` that holds some, or flat."""
    if not isinstance(content, Mapping):
        raise WeightsError(f"the weights at {path} are not tensors by name but a {type(content).__name__}")
    for mapping in (*(content[key] for key in nested if isinstance(content.get(key), Mapping)), content):
        tensors = {str(name): value for name, value in mapping.items() if isinstance(value, Tensor)}
        if tensors:
            _refuse_what_is_not_plain(tensors, path)
            return tensors
    keys = ", ".join(repr(key) for key in list(content)[:5])
    where = "at the top" + (f" or under {', '.join(nested)}" if nested else "")
    raise WeightsError(f"the weights at {path} hold no tensors {where}; its keys: {keys or 'none'}")


def _refuse_what_is_not_plain(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A torch file may hold tensors that no model can be filled with, or a few bytes that unfold to terabytes."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "quantised" if tensor.is_quantized else "without data" if tensor.is_meta else "sparse"
            raise WeightsError(f"the weights at {path} are of no use: {_some([name])} is {kind}; save plain tensors")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise WeightsError(f"the weights at {path} are refused: {_some([name])} repeats its numbers; save it whole")


def fit(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], model: str, ignore: Sequence[str] = ()) -> None:
    """Check that ``tensors`` have the names and shapes of ``expected`` (a module's ``state_dict()``).

    Where a floating-point tensor is expected any of 16 bits and more will do; integers and float8, of which a quantised
    copy of a model is made, would score nonsense without their scales. Names that match a glob of ``ignore`` may be
    missing and may be there without being known. Raises :class:`WeightsError` naming missing, unknown, misshapen and
    mistyped tensors.
    """

    def names(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
        return [n for n in first if n not in second and not any(fnmatchcase(n, pattern) for pattern in ignore)]

    misshapen = [
        f"{name} {list(tensors[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    mistyped = [
        f"{name} {tensors[name].dtype} instead of {tensor.dtype}"
        for name, tensor in expected.items()
        if name in tensors and tensor.is_floating_point() and not _is_wide_float(tensors[name].dtype)
    ]
    found = (
        ("missing", names(expected, tensors)),
        ("unknown", names(tensors, expected)),
        ("misshapen", misshapen),
        ("mistyped", mistyped),
    )
    problems = [f"{len(entries)} {kind} ({_some(entries)})" for kind, entries in found if entries]
    if problems:
        raise WeightsError(f"the weights are not those of {model}: {'; '.join(problems)}")


def _is_wide_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize >= 2


def _some(entries: Sequence[str]) -> str:
    """A few of them; names of somebody else's file may hold anything, such as sequences that steer a terminal."""
    shown = [entry if entry.isprintable() else ascii(entry) for entry in entries[:3]]
    return ", ".join(shown) + (", ..." if len(entries) > 3 else "")


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
        hasher.update(f"{len(path.name)}:{path.name}|".encode() + bytes.fromhex(file_sha256(path)))
    return HASH_PREFIX + hasher.hexdigest()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes; :class:`WeightsError` where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise WeightsError(f"the weights at {path} cannot be read: {exc.strerror or 'input/output error'}") from exc


def verify_sha256(path: Path, expected: str) -> None:
    """Check that the file at ``path``, or the one checkpoint in the folder, has the sha256 ``expected`` (hex).

    Raises :class:`WeightsError` naming both hashes, and for sharded weights, which have no one hash.
    """
    file = checkpoint_file(path)
    if file.name.endswith(".index.json"):
        raise WeightsError(f"the weights at {path} are sharded: one sha256 cannot vouch for all their files")
    found = file_sha256(file)
    if found != expected.removeprefix(HASH_PREFIX).lower():
        raise WeightsError(f"the file {file} is not the expected one: sha256 {found}, expected {expected}")
