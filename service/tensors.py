"""Safetensors bodies: a strict zero-copy reader for untrusted bytes, and a writer.

The library's own in-memory reader copies every tensor and hides the metadata; this one gives views of the body. The
layout (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header, then the data,
without gaps or overlaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from service.errors import BadRequest, PayloadTooLarge

_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("<u1"), "F32": np.dtype("<f4")}
MAX_DIMS = 8


def parse(body: bytes | bytearray, max_header_bytes: int) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Tensors by name (read-only views of ``body``; dtypes U8 and F32) and the metadata strings.

    Raises BadRequest (``malformed_safetensors``, ``unsupported_tensor_dtype``) and PayloadTooLarge.
    """
    if len(body) < 8:
        raise _malformed("shorter than its length field")
    length = int.from_bytes(body[:8], "little")
    if length > max_header_bytes:
        raise PayloadTooLarge(f"the safetensors header is over {max_header_bytes} bytes", code="header_too_large")
    if length > len(body) - 8:
        raise _malformed("the header is longer than the body")
    header = _header(bytes(body[8 : 8 + length]))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _malformed("__metadata__ is not a mapping of strings")
    data = memoryview(body).toreadonly()[8 + length :]
    spans: list[tuple[int, int]] = []
    tensors = {name: _tensor(name, entry, data, spans) for name, entry in header.items()}
    _check_layout(spans, len(data))
    return tensors, cast(dict[str, str], metadata)


def _header(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _malformed("the header is not JSON") from error
    if not isinstance(header, dict):
        raise _malformed("the header is not a JSON object")
    return header


def _tensor(name: str, entry: Any, data: memoryview, spans: list[tuple[int, int]]) -> NDArray[Any]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _malformed("a tensor's entry is not {dtype, shape, data_offsets}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise BadRequest("tensors are U8 or F32", code="unsupported_tensor_dtype")
    dtype = _DTYPES[entry["dtype"]]
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or len(shape) > MAX_DIMS or not _naturals(offsets) or len(offsets) != 2:
        raise _malformed("shape and data_offsets are not lists of natural numbers")
    begin, end = offsets
    if not begin <= end <= len(data):
        raise _malformed("a tensor lies outside the body")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise _malformed("a tensor's size is not that of its shape")
    spans.append((begin, end))
    return np.frombuffer(data[begin:end], dtype).reshape(shape)


def _check_layout(spans: list[tuple[int, int]], size: int) -> None:
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise _malformed("tensors overlap or leave a gap")
        position = end
    if position != size:
        raise _malformed("the body does not end with its last tensor")


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)


def _malformed(why: str) -> BadRequest:
    return BadRequest(f"not a safetensors body: {why}", code="malformed_safetensors")


def serialize(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file."""
    return save(dict(tensors), dict(metadata))
