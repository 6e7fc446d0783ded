"""What a trainer asks about: an item is one prompt with its candidates, the group of GRPO."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias, TypeVar

from PIL import Image

from trainer_client._images import ImageLike, iterate_images


@dataclass(frozen=True, eq=False, repr=False)
class Candidate:
    """What is judged: an ``image``, a video (``frames`` at ``fps`` frames a second) or a ``text``; exactly one."""

    image: ImageLike | None = None
    frames: Sequence[ImageLike] | None = None
    fps: float | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("image", "frames", "text") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a candidate is one of image, frames or text; given: {', '.join(given) or 'none'}")
        if (self.fps is None) != (self.frames is None):
            raise ValueError("frames and fps belong together")

    def __repr__(self) -> str:
        if self.frames is not None:
            return f"Candidate({len(self.frames)} frames, fps={self.fps})"
        return "Candidate(image)" if self.text is None else f"Candidate(text={self.text!r})"


@dataclass(frozen=True, eq=False, repr=False)
class Context:
    """What the candidates were made from, where the task has it; the mask is white where it applies."""

    image: ImageLike | None = None
    frames: Sequence[ImageLike] | None = None
    mask: ImageLike | None = None
    question: str | None = None
    task: str | None = None
    criterion: str | None = None

    def __repr__(self) -> str:
        return f"Context({', '.join(f.name for f in fields(self) if getattr(self, f.name) is not None)})"


@dataclass(frozen=True, eq=False, repr=False)
class Item:
    """One prompt with its K candidates.

    ``images`` (a sequence of images, or one array or tensor [K, ...]) is the short form of ``candidates``; give one of
    them. ``metadata`` is what a reward model asks for beside the prompt (GenEval's objects, the text that OCR should
    find) and must be JSON. ``reference`` is what the candidates are compared against where a model needs one.
    """

    prompt: str
    images: Sequence[ImageLike] | ImageLike | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    context: Context | Mapping[str, Any] | None = None
    reference: Candidate | Mapping[str, Any] | ImageLike | None = None
    candidates: Sequence[Candidate | Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise TypeError(f"a prompt is a string, not {type(self.prompt).__name__}")
        if (self.images is None) == (self.candidates is None):
            raise ValueError("an item has either images or candidates")
        if self.images is not None:
            iterate_images(self.images)  # refuses a lone image
        if len(self) == 0:
            raise ValueError("an item has at least one candidate")

    def __len__(self) -> int:
        """The number of candidates."""
        given: Any = self.images if self.images is not None else self.candidates
        return len(given)

    def __repr__(self) -> str:
        kind = "images" if self.images is not None else "candidates"
        return f"Item({self.prompt!r}, {len(self)} {kind})"


ItemLike: TypeAlias = Item | Mapping[str, Any]
"""An :class:`Item`, or a mapping with its fields."""
Part = TypeVar("Part", Item, Candidate, Context)


def build(kind: type[Part], value: Part | Mapping[str, Any]) -> Part:
    """``value`` itself, or a mapping made into ``kind``; an unknown field raises ValueError naming it."""
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"expected {kind.__name__} or a mapping with its fields, not {type(value).__name__}")
    known = [f.name for f in fields(kind)]
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {unknown[0]!r}; it has {', '.join(known)}")
    return kind(**value)


def build_items(items: ItemLike | Sequence[ItemLike]) -> list[Item]:
    """At least one item; a lone item counts as a list of one."""
    listed = [items] if isinstance(items, Item | Mapping) else list(items)
    if not listed:
        raise ValueError("at least one item is needed")
    return [build(Item, item) for item in listed]


def pixel_bytes(items: Sequence[Item]) -> int:
    """Bytes of all images of ``items`` as uint8 [H, W, 3], counted without touching a pixel."""
    return 3 * sum(_pixels(image) for item in items for image in _images(item))


def _images(item: Item) -> Iterator[ImageLike]:
    if item.images is not None:
        yield from iterate_images(item.images)
    for candidate in item.candidates or ():
        yield from _images_of(build(Candidate, candidate))
    if item.context is not None:
        context = build(Context, item.context)
        yield from (image for image in (context.image, context.mask) if image is not None)
        yield from iterate_images(context.frames or ())
    if isinstance(item.reference, Candidate | Mapping):
        yield from _images_of(build(Candidate, item.reference))
    elif item.reference is not None:
        yield item.reference


def _images_of(candidate: Candidate) -> Iterator[ImageLike]:
    if candidate.image is not None:
        yield candidate.image
    yield from iterate_images(candidate.frames or ())


def _pixels(image: ImageLike) -> int:
    if isinstance(image, Image.Image):
        return image.width * image.height
    shape: tuple[int, ...] = tuple(getattr(image, "shape", ()))
    # one axis of three, where there is one, holds the channels
    channels = next((n for n in (shape[-1], shape[0]) if n in (1, 3)), 1) if len(shape) == 3 else 1
    return math.prod(shape) // channels
