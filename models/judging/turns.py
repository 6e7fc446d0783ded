"""Filled templates and pictures -> the parts of a turn, in the order in which a judge was trained to see them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import Tensor

from models.base import Candidate, Context
from models.judge import Part, Turn
from models.judging.templates import MissingField, Template, TemplateError

MARKER = "<image>"
"""Where LLaVA's templates have a picture; a marker inside a value that is filled in is text."""


def lay_out(template: Template, pictures: Sequence[Part], **values: str) -> tuple[Part, ...]:
    """The filled template with ``pictures`` in the places of its markers, or all before the text where it has none.

    Raises :class:`MissingField` and ``UnknownField`` as :meth:`Template.fill`, and :class:`TemplateError` where the
    template has another number of markers than there are pictures.
    """
    filled = template.fill(**values)
    pieces = template.text.split(MARKER)
    if len(pieces) == 1:
        return (*pictures, filled)
    if len(pieces) != len(pictures) + 1:
        raise TemplateError(
            f"the template {template.name} has {len(pieces) - 1} {MARKER} markers for {len(pictures)} pictures"
        )
    texts = [_fill_piece(template, piece, values) for piece in pieces]
    mixed = [part for pair in zip(texts, (*pictures, ""), strict=True) for part in pair]
    return tuple(part for part in mixed if not (isinstance(part, str) and part == ""))


def _fill_piece(template: Template, piece: str, values: dict[str, str]) -> str:
    fields = frozenset(field for field in template.fields if f"{{{field}}}" in piece)
    return replace(template, text=piece, fields=fields).fill(**{field: values[field] for field in fields})


def marked(template: Template) -> Template:
    """The template of one picture in LLaVA's form: a marker and a line break come first."""
    if MARKER in template.text:
        return template
    return replace(template, text=f"{MARKER}\n{template.text}")


def with_pixels(turn: Turn, candidate: Candidate, pixels: Tensor) -> Turn:
    """The turn with ``pixels`` (float32 [3, H, W]) in the place of that very ``candidate``."""
    return replace(turn, parts=tuple(pixels if part is candidate else part for part in turn.parts))


class ContextPictures:
    """Candidates made of what a context holds, one for each context: what is prepared of it is prepared once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: WeakKeyDictionary[Context, dict[str, Candidate]] = WeakKeyDictionary()

    def image(self, context: Context | None, model: str) -> Candidate:
        """``context.image``, or :class:`MissingField` naming ``model``."""
        if context is None or context.image is None:
            raise MissingField(f"{model} needs an image in the item's context (context.image)")
        image = context.image
        return self._once(context, "image", lambda: Candidate(image=image))

    def frames(self, context: Context | None, model: str) -> Candidate:
        """``context.frames`` as a video, or :class:`MissingField` naming ``model``."""
        if context is None or not context.frames:
            raise MissingField(f"{model} needs a video in the item's context (context.frames)")
        frames = context.frames
        return self._once(context, "frames", lambda: Candidate(frames=frames))

    def mask(self, context: Context) -> Candidate | None:
        """``context.mask`` as an RGB image, where there is one."""
        if context.mask is None:
            return None
        mask = context.mask
        return self._once(context, "mask", lambda: Candidate(image=mask.convert("RGB")))

    def _once(self, context: Context, name: str, make: Callable[[], Candidate]) -> Candidate:
        # Made under the lock: a candidate is named by the hash of its pixels, which is worth doing once.
        with self._lock:
            made = self._known.setdefault(context, {})
            if name not in made:
                made[name] = make()
            return made[name]
