"""UnifiedReward-Flex: a JSON object with categories, each with its winner, and an overall winner."""

from __future__ import annotations

import re

from models.judging.answers import Category, FlexAnswer, no_verdict
from models.judging.json_text import find_object, is_cut_off

CATEGORIES = 3
"""Semantic alignment, image quality and aesthetics come first; a fourth is the judge's own and is not read."""
NAMELESS = "category"
"""The name of a category without one."""

_NAMED = re.compile(r"\b(?:image|video)\s?+([12])\b", re.IGNORECASE)
_EITHER = re.compile(r"[12]\s*+(?:/|or|and|&)\s*+(?:(?:image|video)\s?+)?[12]|\b(?:not|neither|nor)\b", re.IGNORECASE)
_TIE = re.compile(r"\b(?:tied?|draw|equal|equally good)\b", re.IGNORECASE)


def winner(said: object) -> float | None:
    """1 for a text that names image 1 alone, 0 for image 2, 0.5 for a tie; None for all else.

    "Image 1/2" is the template's placeholder and names nobody.
    """
    if not isinstance(said, str) or _EITHER.search(said):
        return None
    named = set(_NAMED.findall(said))
    if len(named) == 1:
        return 1.0 if named == {"1"} else 0.0
    return 0.5 if not named and _TIE.search(said) else None


def parse_flex(text: str, *, finished: bool = True) -> FlexAnswer:
    """The verdicts of the answer's JSON object, with or without text or a code fence around it."""
    document = find_object(text)
    if document is None:
        return FlexAnswer(None, "truncated" if is_cut_off(text) else no_verdict(text, finished=finished))
    reason = document.get("reason")
    reasons = reason if isinstance(reason, str) else ""
    categories = _categories(document.get("categories"))
    if "winner" not in document:
        return FlexAnswer(None, "incomplete", categories, reasons)
    overall = winner(document["winner"])
    return FlexAnswer(overall, "unparseable" if overall is None else "ok", categories, reasons)


def _categories(listed: object) -> tuple[Category, ...]:
    entries = listed[:CATEGORIES] if isinstance(listed, list) else []
    return tuple(
        Category(_name(entry.get("name")), winner(entry.get("cat_winner")))
        if isinstance(entry, dict)
        else Category(NAMELESS, None)
        for entry in entries
    )


def _name(name: object) -> str:
    return (name.strip() if isinstance(name, str) else "") or NAMELESS
