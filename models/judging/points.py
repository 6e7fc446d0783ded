"""Scores of one candidate from a judge's text: UnifiedReward and judges of the same kind. Pure functions of the text.

They forgive markup, case and missing spaces, and nothing about the value: "10" of 5 is not 1, "3-4" is not 3.
Where a label comes twice its last value counts, as in UnifiedReward's own scripts: a judge may correct itself. A text
that generation cut off (``finished`` False) is "truncated" whatever it holds: the last value may be half a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from models.judging.answers import PointAnswer, Status, no_verdict
from models.judging.json_text import find_object, is_cut_off

AXES = ("alignment", "coherence", "style")
"""UnifiedReward 1.5 and 2.0 on images; on videos "physics" takes the place of "coherence"."""
VIDEO_AXES = ("alignment", "physics", "style")

# Possessive: a megabyte of blanks between label and colon is read once.
MARKUP = r"[\s*_`]*+"
_NUMBER = re.compile(
    r"[\s*_`\"'\[(]*+([+-]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+))(?![0-9])"
    r"(?:\s*+(?:/|out\s+of)\s*+([0-9]+(?:\.[0-9]+)?))?",
    re.IGNORECASE,
)
# What makes another number, or a range, of the one before it.
_GOES_ON = re.compile(r"[^\W_]|[.,][0-9]|\s*+[-–~]\s*+[0-9.]|\s*+to\s+[0-9.]", re.IGNORECASE)
_FINAL_SCORE = re.compile(rf"\bfinal\s++score{MARKUP}:", re.IGNORECASE)
_SCORE_TAG = re.compile(r"<score>", re.IGNORECASE)
_RUBRIC_SCORE = re.compile(rf"\bscore{MARKUP}:", re.IGNORECASE)


def number_at(text: str, place: int, low: float, high: float) -> tuple[float | None, Status, int]:
    """The number that starts at ``place`` (after markup), its status, and where it ends.

    "unparseable" for no number and for a range, "out_of_range" outside [low, high] or on another scale ("4/10").
    """
    found = _NUMBER.match(text, place)
    if found is None or _GOES_ON.match(text, found.end()):
        return None, "unparseable", place
    value, scale = float(found[1]), found[2]
    if not low <= value <= high or (scale is not None and float(scale) != high):
        return None, "out_of_range", found.end()
    return value, "ok", found.end()


def parse_final_score(text: str, *, low: float = 1.0, high: float = 5.0, finished: bool = True) -> PointAnswer:
    """The number after the last "Final Score:" (UnifiedReward, generation and understanding)."""
    return _after_last(_FINAL_SCORE, text, low, high, finished)


def parse_score_tag(text: str, *, low: float = 1.0, high: float = 5.0, finished: bool = True) -> PointAnswer:
    """The number after the last ``<Score>``, as general vision-language models are asked for it."""
    return _after_last(_SCORE_TAG, text, low, high, finished)


def _after_last(label: re.Pattern[str], text: str, low: float, high: float, finished: bool) -> PointAnswer:
    found = last_match(label, text)
    if found is None or not finished:
        return PointAnswer(None, no_verdict(text, finished=finished))
    value, status, _ = number_at(text, found.end(), low, high)
    return PointAnswer(value, status)


def last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last place where ``pattern`` matches."""
    found = list(pattern.finditer(text))
    return found[-1] if found else None


def parse_axis_scores(text: str, axes: Sequence[str] = AXES, *, finished: bool = True) -> PointAnswer:
    """A line "<Axis> Score (1-5): x" for each of ``axes`` (UnifiedReward 1.5 and 2.0); the score is their mean.

    All or nothing: an axis without a score makes the answer "incomplete".
    """
    outputs: dict[str, float] = {}
    failures: list[Status] = []
    for axis in axes:
        label = re.compile(rf"\b{re.escape(axis)}\s++score{MARKUP}(?:\([^()\n]{{0,20}}\){MARKUP})?:", re.IGNORECASE)
        found = last_match(label, text)
        if found is None:
            continue
        value, status, _ = number_at(text, found.end(), 1.0, 5.0)
        if value is None:
            failures.append(status)
        else:
            outputs[axis] = value
    return _all_or_nothing(outputs, failures, axes, text, finished)


def _all_or_nothing(
    outputs: Mapping[str, float], failures: Sequence[Status], names: Sequence[str], text: str, finished: bool
) -> PointAnswer:
    if not finished or not (outputs or failures):
        return PointAnswer(None, no_verdict(text, finished=finished))
    if failures:
        return PointAnswer(None, failures[0])
    if len(outputs) < len(names):
        return PointAnswer(None, "incomplete")
    return PointAnswer(math.fsum(outputs.values()) / len(outputs), "ok", outputs)


def parse_score_list(
    text: str, names: Sequence[str], *, low: float = 0.0, high: float = 25.0, finished: bool = True
) -> PointAnswer:
    """A JSON object whose ``score`` lists one number for each of ``names`` (UnifiedReward's edit judges: 0 to 25).

    Numbers may be written as strings. The score is the mean; fewer numbers make it "incomplete", more "unparseable".
    """
    document = find_object(text)
    if document is None:
        return PointAnswer(None, "truncated" if is_cut_off(text) else no_verdict(text, finished=finished))
    listed = document.get("score")
    if not isinstance(listed, list) or len(listed) > len(names):
        return PointAnswer(None, "unparseable" if "score" in document else "incomplete")
    if len(listed) < len(names):
        return PointAnswer(None, "incomplete")
    outputs: dict[str, float] = {}
    for name, entry in zip(names, listed, strict=True):
        value = _number(entry)
        if value is None:
            return PointAnswer(None, "unparseable")
        if not low <= value <= high:
            return PointAnswer(None, "out_of_range")
        outputs[name] = value
    return PointAnswer(math.fsum(outputs.values()) / len(outputs), "ok", outputs)


def _number(entry: object) -> float | None:
    if isinstance(entry, bool) or not isinstance(entry, int | float | str):
        return None
    found = _NUMBER.fullmatch(str(entry).strip()) if isinstance(entry, str) else None
    if isinstance(entry, str):
        return float(found[1]) if found is not None and found[2] is None else None
    return float(entry) if abs(entry) < 1e300 else math.inf


def parse_rubric(
    text: str, dimensions: Mapping[str, str], *, low: float = 1.0, high: float = 4.0, finished: bool = True
) -> PointAnswer:
    """A part "<Heading> ... Score: x" for each of ``dimensions`` (name -> heading); "N/A" leaves a dimension out.

    The score is the mean of the others. A dimension without a score makes the answer "incomplete", and so does a text
    in which none applies.
    """
    starts = {name: text.lower().find(heading.lower()) for name, heading in dimensions.items()}
    outputs: dict[str, float] = {}
    failures: list[Status] = []
    left_out: list[str] = []
    for name, start in starts.items():
        end = min((other for other in starts.values() if other > start >= 0), default=len(text))
        found = _RUBRIC_SCORE.search(text, start, end) if start >= 0 else None
        if found is None:
            continue
        if re.match(rf"{MARKUP}n/a\b", text[found.end() : found.end() + 20], re.IGNORECASE):
            left_out.append(name)
            continue
        value, status, _ = number_at(text, found.end(), low, high)
        if value is None:
            failures.append(status)
        else:
            outputs[name] = value
    if finished and left_out and not outputs and not failures:
        return PointAnswer(None, "incomplete")
    return _all_or_nothing(outputs, failures, [name for name in dimensions if name not in left_out], text, finished)
