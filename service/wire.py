"""The three ways a request travels, chosen by Content-Type, and what they have in common afterwards.

    application/json               the schema, images as base64
    multipart/form-data            one item: fields model[=weight] and images (files) may repeat, prompt, and optionally
                                   metadata (JSON), pairs (JSON or a word), deadline_ms, explain, both_orders
    application/vnd.safetensors    the schema as the metadata string ``request``, with tensor names in place of base64;
                                   one uint8 [H, W, 3] tensor per image

Nothing here decodes an image: :class:`Incoming` hands out raw sources, and pool threads decode them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from service import tensors
from service.errors import (
    BadRequest,
    BodyTimeout,
    ClientDisconnected,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    UnsupportedMediaType,
)
from service.settings import LimitSettings
from service.telemetry import Telemetry

JSON = "application/json"
MULTIPART = "multipart/form-data"
SAFETENSORS = "application/vnd.safetensors"

Body = TypeVar("Body", bound=BaseModel)
ImageSource = str | bytes | NDArray[Any]
"""Where the pixels come from: base64 text, the bytes of an image file, or a tensor."""


class ByteBudget:
    """Bounds the bytes of all requests being read or answered; belongs to one event loop."""

    def __init__(self, limit: int, telemetry: Telemetry) -> None:
        self.limit = limit
        self.used = 0
        self.reading: set[asyncio.Timeout] = set()
        self._gauge = telemetry.inflight_bytes

    def check(self, count: int) -> None:
        """Raise Overloaded if ``count`` more bytes would not fit."""
        if self.used + count > self.limit:
            raise Overloaded("the requests in flight hold as many bytes as this service allows", retry_after_s=1)

    @contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """A function that takes bytes of the budget or raises Overloaded; all are given back at the end."""
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            self.check(count)
            taken += count
            self._add(count)

        try:
            yield take
        finally:
            self._add(-taken)

    def _add(self, count: int) -> None:
        self.used += count
        self._gauge.set(self.used)

    def stop_reading(self) -> None:
        """End the uploads under way: they are not admitted yet, and the process ends."""
        for timeout in self.reading:
            timeout.reschedule(asyncio.get_running_loop().time())


@dataclass(eq=False)
class Incoming:
    """A request's message before validation: the schema as JSON text or an object, and the images that it names."""

    content_type: str
    message: bytes | str | dict[str, Any]
    images: dict[str, NDArray[Any] | bytes] = field(default_factory=dict)

    def parse(self, schema: type[Body]) -> Body:
        """The validated message; raises BadRequest for bad JSON and InvalidRequest with ``errors`` for a bad schema."""
        try:
            if isinstance(self.message, dict):
                return schema.model_validate(self.message)
            return schema.model_validate_json(self.message)
        except ValidationError as error:
            # never echo the input: it may be megabytes of image
            found = error.errors(include_input=False, include_url=False, include_context=False)
            if any(entry["type"] == "json_invalid" for entry in found):
                raise BadRequest("the body is not valid JSON", code="invalid_json") from error
            entries = [{"loc": _short(e["loc"]), "msg": e["msg"][:200], "type": e["type"]} for e in found[:20]]
            first = f"{'.'.join(str(part) for part in entries[0]['loc'])}: {entries[0]['msg']}"
            raise InvalidRequest(f"the request does not fit its schema: {first}"[:400], errors=entries) from error

    def source(self, name: str) -> ImageSource:
        """What an image string of the schema stands for; an unknown tensor name raises InvalidRequest."""
        if self.content_type == JSON:
            return name
        if name not in self.images:
            raise InvalidRequest("an item names a tensor that the body does not hold", code="unknown_tensor")
        return self.images[name]


def _short(location: tuple[int | str, ...]) -> list[int | str]:
    """Where an error is: the caller's own names, cut, because they may be megabytes too."""
    return [part if isinstance(part, int) else part[:64] for part in location[:8]]


@asynccontextmanager
async def receive(
    request: Request, limits: LimitSettings, budget: ByteBudget, check_open: Callable[[], None]
) -> AsyncIterator[Incoming]:
    """Read a request's body within the limits; its bytes count as in flight until the context ends.

    ``check_open`` raises when the service takes no requests: it is asked before the body is read, and when reading ends
    before the body has.
    """
    check_open()
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in (JSON, MULTIPART, SAFETENSORS):
        raise UnsupportedMediaType(f"Content-Type must be {JSON}, {MULTIPART} or {SAFETENSORS}")
    budget.check(_declared_length(request, limits.body_bytes))  # refused before it is read, where it tells its length
    with budget.hold() as take:
        body = await _read(request, limits, budget, take, check_open)
        if content_type == JSON:
            incoming = Incoming(content_type, bytes(body))
        elif content_type == SAFETENSORS:
            incoming = _safetensors(body, limits)
        else:
            incoming = await _multipart(request, body, limits)
        del body
        yield incoming


async def _read(
    request: Request,
    limits: LimitSettings,
    budget: ByteBudget,
    take: Callable[[int], None],
    check_open: Callable[[], None],
) -> bytearray:
    """The body. What has come counts, not what was promised: a silent client holds nothing."""
    body = bytearray()
    timeout = asyncio.timeout(limits.body_timeout_s)
    budget.reading.add(timeout)
    try:
        async with timeout:
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise PayloadTooLarge(f"the body is over {limits.body_bytes} bytes")
                take(len(chunk))
    except TimeoutError as error:
        check_open()  # a drain ends uploads in the same way
        raise BodyTimeout(f"the body did not come within {limits.body_timeout_s:g} s") from error
    except ClientDisconnect as error:
        raise ClientDisconnected("the client left while it was sending") from error
    finally:
        budget.reading.discard(timeout)
    return body


def _declared_length(request: Request, limit: int) -> int:
    text = request.headers.get("content-length", "0")
    if not text.isascii() or not text.isdigit():
        raise BadRequest("Content-Length is not a number")
    if int(text) > limit:
        raise PayloadTooLarge(f"the body is over {limit} bytes")
    return int(text)


def _safetensors(body: bytearray, limits: LimitSettings) -> Incoming:
    arrays, metadata = tensors.parse(body, limits.safetensors_header_bytes)
    if "request" not in metadata:
        raise BadRequest("the safetensors metadata has no key 'request'", code="malformed_safetensors")
    return Incoming(SAFETENSORS, metadata["request"], dict(arrays))


async def _multipart(request: Request, body: bytearray, limits: LimitSettings) -> Incoming:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield bytes(body)

    parser = MultiPartParser(
        request.headers, stream(), max_files=limits.images_per_item, max_fields=128, max_part_size=limits.body_bytes
    )
    parser.spool_max_size = limits.body_bytes  # the body is in memory already: nothing goes to disk
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, KeyError) as error:
        raise BadRequest("the multipart body cannot be read", code="malformed_multipart") from error
    fields: dict[str, list[str]] = {}
    images: dict[str, NDArray[Any] | bytes] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name != "images":
                raise InvalidRequest("files belong in the field 'images'", code="unknown_field")
            images[f"image{len(images)}"] = await value.read()
        else:
            fields.setdefault(name, []).append(value)
    return Incoming(MULTIPART, _form_message(fields, list(images), request.url.path), images)


def _form_message(fields: dict[str, list[str]], images: list[str], path: str) -> dict[str, Any]:
    """The schema's form of a multipart request."""
    known = {"model", "prompt", "metadata", "pairs", "deadline_ms", "explain", "both_orders"}
    if unknown := sorted(set(fields) - known):
        raise InvalidRequest(f"unknown form fields; known are {', '.join(sorted(known))} and images",
                             code="unknown_field", fields=[name[:64] for name in unknown[:8]])  # fmt: skip
    if repeated := [name for name, values in fields.items() if name != "model" and len(values) > 1]:
        raise InvalidRequest(f"the form field {repeated[0]!r} may not repeat", code="repeated_field")
    item: dict[str, Any] = {"images": images}
    message: dict[str, Any] = {"items": [item]}
    for name in ("prompt", "metadata", "pairs"):
        if name in fields:
            item[name] = _json_field(name, fields[name][0])
    for name in ("deadline_ms", "explain", "both_orders"):
        if name in fields:
            message[name] = fields[name][0]
    models = [_model_and_weight(entry) for entry in fields.get("model", [])]
    if len({name for name, _ in models}) != len(models):
        raise InvalidRequest("a model is given twice", code="repeated_field")
    if path.endswith("/compare"):
        if len(models) == 1:
            message["model"] = models[0][0]
    else:
        message["models"] = dict(models)
    return message


def _json_field(name: str, text: str) -> Any:
    if name == "prompt" or (name == "pairs" and text in ("all", "adaptive")):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the form field {name!r} is not JSON", code="invalid_json") from error


def _model_and_weight(text: str) -> tuple[str, str | float]:
    name, equals, weight = text.partition("=")
    return (name, weight) if equals else (name, 1.0)


def json_response(content: BaseModel) -> Response:
    """A JSON answer; NaN cannot occur in it."""
    return Response(content.model_dump_json(), media_type=JSON)
