"""Items -> request bodies, and the two containers that come back: JSON and safetensors.

A safetensors body holds one tensor per image and, under the metadata key ``request``, the JSON of the request with
tensor names in place of images. It is written here and not by the safetensors library, which would join all images
into one more copy: an attempt that is repeated needs a new header (its deadline moved) over the same pixels.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from trainer_client._images import ImageLike, iterate_images, to_base64_png, to_float32, to_uint8
from trainer_client.errors import ProtocolError
from trainer_client.items import Candidate, Context, Item, build

Wire: TypeAlias = Literal["safetensors", "json"]
JSON = "application/json"
SAFETENSORS = "application/vnd.safetensors"
_CHUNK = 256 * 1024
"""Bytes handed to the socket at once: httpcore copies what a partial write left, which is quadratic in large bodies."""
_DTYPES = {"uint8": "U8", "float32": "F32"}
Place = Callable[[str, ImageLike], str]
"""Puts an image under a name into the body and gives the string that stands for it in the JSON."""


@dataclass(frozen=True, eq=False)
class Body:
    """A request body whose JSON part gets the remaining time at each attempt; ``tensors`` is None on the JSON wire."""

    request: Mapping[str, Any]
    tensors: Mapping[str, npt.NDArray[Any]] | None

    @property
    def content_type(self) -> str:
        return JSON if self.tensors is None else SAFETENSORS

    def render(self, deadline_ms: int | None) -> Content:
        """The bytes of one attempt."""
        text = json.dumps({**self.request, "deadline_ms": deadline_ms}, allow_nan=False)
        if self.tensors is None:
            return Content([memoryview(text.encode())])
        header: dict[str, Any] = {"__metadata__": {"request": text}}
        offset = 0
        for name, array in self.tensors.items():
            header[name] = {
                "dtype": _DTYPES[array.dtype.name],
                "shape": list(array.shape),
                "data_offsets": [offset, offset + array.nbytes],
            }
            offset += array.nbytes
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)  # the format aligns its data to 8 bytes
        data = [array.reshape(-1).data.cast("B") for array in self.tensors.values()]
        return Content([memoryview(len(head).to_bytes(8, "little") + head), *data])


class Content:
    """The bytes of one attempt, in chunks for httpx's sync and async streams; ``sent`` counts what was taken."""

    def __init__(self, parts: Sequence[memoryview]) -> None:
        self._parts = parts
        self.length = sum(part.nbytes for part in parts)
        self.sent = 0

    def chunks(self) -> Iterator[bytes]:
        for part in self._parts:
            for start in range(0, part.nbytes, _CHUNK):
                chunk = bytes(part[start : start + _CHUNK])
                yield chunk
                self.sent += len(chunk)

    async def async_chunks(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks():
            yield chunk


def encode(
    items: Sequence[Item],
    request: Mapping[str, Any],
    *,
    wire: Wire,
    per_item: Sequence[Mapping[str, Any]] | None = None,
    floats: bool = False,
) -> Body:
    """The body of a request about ``items``; ``per_item`` holds further fields of each item.

    Images travel as uint8 [H, W, 3], or with ``floats`` as float32 [3, H, W] (safetensors only).
    Raises TypeError or ValueError for items that cannot be sent.
    """
    tensors: dict[str, npt.NDArray[Any]] = {}

    def place_tensor(name: str, image: ImageLike) -> str:
        tensors[name] = to_float32(image) if floats else to_uint8(image)
        return name

    def place_png(name: str, image: ImageLike) -> str:
        return to_base64_png(to_uint8(image))

    place: Place = place_png if wire == "json" else place_tensor
    encoded = [
        {**_encode_item(f"item{i}", item, place), **(per_item[i] if per_item else {})} for i, item in enumerate(items)
    ]
    body = Body({**request, "items": encoded}, None if wire == "json" else tensors)
    body.render(None)  # metadata that is no JSON is the caller's mistake: say so now, not between two attempts
    return body


def _encode_item(name: str, item: Item, place: Place) -> dict[str, Any]:
    encoded: dict[str, Any] = {"prompt": item.prompt}
    if item.images is not None:
        encoded["images"] = [place(f"{name}.image{k}", image) for k, image in enumerate(iterate_images(item.images))]
    else:
        encoded["candidates"] = [
            _encode_candidate(f"{name}.candidate{k}", build(Candidate, candidate), place)
            for k, candidate in enumerate(item.candidates or ())
        ]
    if item.metadata:
        encoded["metadata"] = dict(item.metadata)
    if item.context is not None:
        encoded["context"] = _encode_context(f"{name}.context", build(Context, item.context), place)
    if item.reference is not None:
        given = item.reference
        reference = build(Candidate, given) if isinstance(given, Candidate | Mapping) else Candidate(image=given)
        encoded["reference"] = _encode_candidate(f"{name}.reference", reference, place)
    return encoded


def _encode_candidate(name: str, candidate: Candidate, place: Place) -> dict[str, Any]:
    if candidate.text is not None:
        return {"text": candidate.text}
    if candidate.image is not None:
        return {"image": place(f"{name}.image", candidate.image)}
    frames = [place(f"{name}.frame{k}", frame) for k, frame in enumerate(iterate_images(candidate.frames))]
    return {"frames": frames, "fps": candidate.fps}


def _encode_context(name: str, context: Context, place: Place) -> dict[str, Any]:
    texts = {"question": context.question, "task": context.task, "criterion": context.criterion}
    encoded: dict[str, Any] = {key: text for key, text in texts.items() if text is not None}
    if context.image is not None:
        encoded["image"] = place(f"{name}.image", context.image)
    if context.mask is not None:
        encoded["mask"] = place(f"{name}.mask", context.mask)
    if context.frames is not None:
        encoded["frames"] = [place(f"{name}.frame{k}", f) for k, f in enumerate(iterate_images(context.frames))]
    return encoded


def decode_json(content: bytes | str) -> Any:
    """Strict JSON (no NaN, no Infinity); raises :class:`ProtocolError`."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"the service's answer of {len(content)} bytes is not JSON: {exc}") from exc


def decode_safetensors(content: bytes) -> tuple[Any, dict[str, npt.NDArray[np.float32]]]:
    """The JSON under the metadata key ``response``, and the tensors, all of them float32 and writable.

    Raises :class:`ProtocolError`.
    """
    try:
        tensors = load_safetensors(content)
    except (SafetensorError, KeyError, ValueError) as exc:
        raise ProtocolError(f"the service's answer of {len(content)} bytes is not safetensors: {exc}") from exc
    # The library has checked the header by now, but gives no metadata of a file in memory.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    text = header.get("__metadata__", {}).get("response")
    if text is None:
        raise ProtocolError("the service's safetensors answer has no metadata key 'response'")
    for name, array in tensors.items():
        if array.dtype != np.float32:
            raise ProtocolError(f"the service sent tensor {name!r} as {array.dtype}, not float32")
    return decode_json(text), {name: np.require(array, requirements=["C", "W"]) for name, array in tensors.items()}
