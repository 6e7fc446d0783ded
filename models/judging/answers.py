"""What a judge's answer says, and how well it could be read.

An answer has its value exactly when its status is "ok". Nothing stands in for a value that is not there: published
programs score an answer that they cannot read as 0, as a tie, or as a win of the first image.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Status: TypeAlias = Literal[
    "ok", "empty", "unparseable", "contradictory", "out_of_range", "incomplete", "truncated", "refused"
]
"""``empty``: no text. ``unparseable``: no verdict of the form asked for. ``contradictory``: several that differ.
``out_of_range``: a number outside its scale. ``incomplete``: some of the numbers or fields. ``truncated``: it ends
before the verdict, or was cut off where it may have gone on. ``refused``: the judge declines."""

_REFUSAL = re.compile(
    r"\W*(?:(?:i['’]?m|i am)\s+(?:\w+\s+)?sorry\b|sorry\b|i\s+apologi[sz]e\b|as\s+an\s+ai\b"
    r"|(?:unfortunately,?\s+)?(?:i|we)\s+(?:can\s?not|can['’]?t|could\s?n[o'’]t|wo\s?n['’]t|will\s+not"
    r"|(?:am|are)\s+(?:unable|not\s+able))\b)",
    re.IGNORECASE,
)


def _check(value: float | None, status: Status, low: float, high: float) -> None:
    if (value is None) == (status == "ok"):
        raise ValueError(f"an answer that is {status!r} cannot have the value {value}")
    if value is not None and not low <= value <= high:
        raise ValueError(f"{value} is not in [{low}, {high}]")


@dataclass(frozen=True)
class PointAnswer:
    """A score of one candidate, on the judge's own scale, and its parts in ``outputs`` where the judge gives several.

    Raises ValueError for a score without the status "ok", for "ok" without one, and for one that is not finite.
    """

    score: float | None
    status: Status
    outputs: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.score, self.status, -math.inf, math.inf)
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(f"a score is finite, not {self.score}")


@dataclass(frozen=True)
class PairAnswer:
    """``preference``: 1 first candidate better, 0 second, 0.5 said to be equal, or between where a judge gives shares.

    ``dimensions`` are preferences of single aspects, ``reasons`` the judge's thoughts where its form sets them apart.
    Raises ValueError for a preference without the status "ok", for "ok" without one, and for one outside [0, 1].
    """

    preference: float | None
    status: Status
    dimensions: Mapping[str, float] = field(default_factory=dict)
    reasons: str = ""

    def __post_init__(self) -> None:
        _check(self.preference, self.status, 0.0, 1.0)


@dataclass(frozen=True)
class Category:
    """One category of UnifiedReward-Flex; ``preference`` as in :class:`PairAnswer`, None where it names no winner."""

    name: str
    preference: float | None


@dataclass(frozen=True)
class FlexAnswer:
    """Overall verdict of UnifiedReward-Flex and its first categories; ``preference`` as in :class:`PairAnswer`.

    The categories were read also where the overall verdict could not be.
    """

    preference: float | None
    status: Status
    categories: tuple[Category, ...] = ()
    reasons: str = ""

    def __post_init__(self) -> None:
        _check(self.preference, self.status, 0.0, 1.0)


@dataclass(frozen=True)
class YesNoAnswer:
    """``probability`` of yes, in [0, 1]: 1 or 0 from words, P(yes) / (P(yes) + P(no)) from token probabilities.

    ``mass`` is P(yes) + P(no): little of it says that the judge wanted to say something else.
    """

    probability: float | None
    status: Status
    mass: float = 1.0

    def __post_init__(self) -> None:
        _check(self.probability, self.status, 0.0, 1.0)


def no_verdict(text: str, *, finished: bool = True) -> Status:
    """The status of a text in which no verdict was found; ``finished`` is False where generation hit its budget."""
    if not finished:
        return "truncated"
    if not text.strip():
        return "empty"
    return "refused" if _REFUSAL.match(text) else "unparseable"
