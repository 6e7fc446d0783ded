"""Images and request bodies for tests."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from PIL import Image

SAFETENSORS = "application/vnd.safetensors"
JPEG_MODEL = "jpeg-incompressibility"
INNER_TEXT = "inner exception text that no client may see"


def grey(level: int, side: int = 32) -> NDArray[np.uint8]:
    """An even image, whose brightness names it."""
    return np.full((side, side, 3), level, np.uint8)


def noise(seed: int, height: int = 32, width: int = 32) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(pixels: NDArray[np.uint8], format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def b64(pixels: NDArray[np.uint8]) -> str:
    return base64.b64encode(encoded(pixels)).decode()


def item(prompt: str, *images: NDArray[np.uint8], **extra: Any) -> dict[str, Any]:
    return {"prompt": prompt, "images": [b64(image) for image in images], **extra}


def score_body(model: str, *items: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {"models": {model: 1.0}, "items": list(items), **extra}


def tensor_body(request: Mapping[str, Any] | str, tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """A safetensors body made by the reference library."""
    text = request if isinstance(request, str) else json.dumps(request)
    return safetensors.numpy.save(dict(tensors), {"request": text})


def raw_safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors body with any header (JSON of it, or its bytes) and any length field."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data
