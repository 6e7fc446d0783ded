"""Items of a request -> makers: closures that decode one sample each on a pool thread. Counts are checked here."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image as PILImage

from models.base import Candidate, Context, InputError, Sample, SampleError
from models.judge import Comparison
from service.engine.request import Made, Maker
from service.errors import InvalidRequest
from service.images import DecodedImage, ImageLimits, decode_base64, decode_image, from_array, from_pixels
from service.schemas import CandidateIn, ContextIn, ItemIn
from service.settings import LimitSettings
from service.wire import ImageSource, Incoming

T = TypeVar("T")
Decoded = tuple[Candidate, tuple[str, ...]]
"""A candidate, and what the caller should know about its image."""


def image_limits(limits: LimitSettings) -> ImageLimits:
    return ImageLimits(limits.image_bytes, limits.image_pixels, limits.image_min_side, limits.image_max_side)


def check(items: Sequence[ItemIn], limits: LimitSettings) -> None:
    """Raise InvalidRequest for a request that asks for more than the limits allow."""
    if len(items) > limits.items:
        raise InvalidRequest(f"a request has at most {limits.items} items, not {len(items)}", code="too_many_items")
    total = 0
    for item in items:
        images = _images(item)
        if images > limits.images_per_item:
            raise InvalidRequest(
                f"an item has at most {limits.images_per_item} images, not {images}", code="too_many_images"
            )
        total += images
        if max(map(len, _videos(item)), default=0) > limits.frames_per_video:
            raise InvalidRequest(f"a video has at most {limits.frames_per_video} frames", code="too_many_frames")
        if max(map(len, _texts(item))) > limits.prompt_chars:
            raise InvalidRequest(f"a text is over {limits.prompt_chars} characters", code="prompt_too_long")
        if item.metadata and len(json.dumps(item.metadata)) > limits.metadata_bytes:
            raise InvalidRequest(f"metadata is over {limits.metadata_bytes} bytes", code="metadata_too_large")
    if total > limits.images_per_request:
        raise InvalidRequest(
            f"a request has at most {limits.images_per_request} images, not {total}", code="too_many_images"
        )


def _everything(item: ItemIn) -> list[CandidateIn]:
    return [*item.all_candidates(), *([item.reference] if item.reference is not None else [])]


def _images(item: ItemIn) -> int:
    """Images of the candidates, the reference and the context; a text counts as one."""
    images = sum(len(candidate.frames or [None]) for candidate in _everything(item))
    if item.context is not None:
        context = item.context
        images += len(context.frames or []) + (context.image is not None) + (context.mask is not None)
    return images


def _videos(item: ItemIn) -> list[list[str]]:
    context = item.context.frames if item.context is not None else None
    return [frames for frames in (*(candidate.frames for candidate in _everything(item)), context) if frames]


def _texts(item: ItemIn) -> list[str]:
    texts = [item.prompt, *(candidate.text or "" for candidate in _everything(item))]
    if item.context is not None:
        texts += [item.context.question or "", item.context.task or "", item.context.criterion or ""]
    return texts


def makers(incoming: Incoming, items: Sequence[ItemIn], limits: ImageLimits, *, with_context: bool) -> list[Maker]:
    """One maker per candidate, in order. Unknown tensor names raise InvalidRequest now, bad images raise later."""
    return [maker for item in items for maker in _item_makers(incoming, item, limits, with_context=with_context)]


@dataclass(frozen=True, eq=False)
class Group:
    """One item for a judge. Each of its candidates is decoded once, whatever the number of comparisons; ``reference``
    stands after them, under the index ``count``."""

    prompt: str
    candidates: list[Once[tuple[Candidate, tuple[str, ...]]]]
    context: Once[Context] | None
    metadata: Mapping[str, Any]
    count: int

    @property
    def has_reference(self) -> bool:
        return len(self.candidates) > self.count

    def maker(self, first: int, second: int) -> Maker:
        """Makes one comparison; raises InputError ("identical_candidates") where both show the same."""

        def make() -> Made:
            (one, _), (other, _) = self.candidates[first](), self.candidates[second]()
            if one.digest == other.digest:
                raise InputError(
                    "the two candidates are identical: there is no better one", code="identical_candidates"
                )
            context = self.context() if self.context is not None else None
            return Made(Comparison(self.prompt, one, other, context, self.metadata))

        return make

    def sample_maker(self, index: int) -> Maker:
        """Makes one candidate alone, for a pointwise model."""

        def make() -> Made:
            candidate, warnings = self.candidates[index]()
            context = self.context() if self.context is not None else None
            return Made(Sample(self.prompt, candidate, context, self.metadata), warnings)

        return make

    def warnings(self, index: int) -> tuple[str, ...]:
        """What the caller should know of a candidate's image, once it is decoded."""
        decoded = self.candidates[index].result
        return () if decoded is None else decoded[1]

    def unreadable(self, index: int) -> SampleError | None:
        """Why a candidate could not be decoded; None for one that could, or was not asked for."""
        error = self.candidates[index].error
        return error if isinstance(error, SampleError) else None


def groups(incoming: Incoming, items: Sequence[ItemIn], limits: ImageLimits) -> list[Group]:
    """The items as judges need them. Unknown tensor names raise InvalidRequest now, bad images later."""
    return [_group(incoming, item, limits) for item in items]


def _group(incoming: Incoming, item: ItemIn, limits: ImageLimits) -> Group:
    listed = item.all_candidates()
    both = [*listed, *([item.reference] if item.reference is not None else [])]
    context = None if item.context is None else Once(context_maker(incoming, item.context, limits))
    candidates = [Once(_candidate(incoming, candidate, limits)) for candidate in both]
    return Group(item.prompt, candidates, context, item.metadata, len(listed))


def _item_makers(incoming: Incoming, item: ItemIn, limits: ImageLimits, *, with_context: bool) -> list[Maker]:
    context = Once(context_maker(incoming, item.context, limits)) if with_context and item.context is not None else None

    def maker(candidate: Callable[[], Decoded]) -> Maker:
        def make() -> Made:
            made, warnings = candidate()
            return Made(Sample(item.prompt, made, context() if context else None, item.metadata), warnings)

        return make

    return [maker(_candidate(incoming, candidate, limits)) for candidate in item.all_candidates()]


def _candidate(incoming: Incoming, candidate: CandidateIn, limits: ImageLimits) -> Callable[[], Decoded]:
    if candidate.text is not None:
        text = candidate.text
        return lambda: (Candidate(text=text), ())
    if candidate.image is not None:
        source = incoming.source(candidate.image)

        def image() -> Decoded:
            decoded = decode(source, limits)
            return Candidate(image=decoded.image, digest=decoded.digest), decoded.warnings

        return image
    sources = [incoming.source(frame) for frame in candidate.frames or []]

    def video() -> Decoded:
        frames = tuple(decode(source, limits).image for source in sources)
        return Candidate(frames=frames, fps=candidate.fps), ()

    return video


def reference_maker(incoming: Incoming, reference: CandidateIn, limits: ImageLimits) -> Callable[[], Candidate]:
    """Decodes the reference of a gradient request, whose image may come as float32 pixels in [0, 1]."""
    source = None if reference.image is None else incoming.source(reference.image)
    decoder = _candidate(incoming, reference, limits)

    def make() -> Candidate:
        if isinstance(source, np.ndarray) and source.dtype == np.float32:
            decoded = from_pixels(source, limits)
            return Candidate(image=decoded.image, digest=decoded.digest)
        return decoder()[0]

    return make


def context_maker(incoming: Incoming, context: ContextIn, limits: ImageLimits) -> Callable[[], Context]:
    """Decodes a context; unknown tensor names raise InvalidRequest now, bad images later."""
    image = None if context.image is None else incoming.source(context.image)
    mask = None if context.mask is None else incoming.source(context.mask)
    frames = [incoming.source(frame) for frame in context.frames or []]

    def make() -> Context:
        def picture(source: ImageSource | None) -> PILImage.Image | None:
            return None if source is None else decode(source, limits).image

        return Context(
            image=picture(image),
            frames=tuple(decode(frame, limits).image for frame in frames),
            mask=picture(mask),
            question=context.question,
            task=context.task,
            criterion=context.criterion,
        )

    return make


class Once(Generic[T]):
    """Calls a function once, whichever thread comes first, and gives everyone its result or its exception."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._result: list[T] = []
        self._error: Exception | None = None

    @property
    def result(self) -> T | None:
        """What the function gave; None before it did."""
        return self._result[0] if self._result else None

    @property
    def error(self) -> Exception | None:
        """What the function raised, if it was called and did."""
        return self._error

    def __call__(self) -> T:
        with self._lock:
            if self._error is not None:
                raise self._error.with_traceback(None)
            if not self._result:
                try:
                    self._result.append(self._function())
                except Exception as error:
                    self._error = error
                    raise
            return self._result[0]


def decode(source: ImageSource, limits: ImageLimits) -> DecodedImage:
    """Base64 text, file bytes or a uint8 tensor -> a validated RGB image; raises service.images.ImageError."""
    if isinstance(source, str):
        return decode_base64(source, limits)
    if isinstance(source, np.ndarray):
        return from_array(source, limits)
    return decode_image(source, limits)
