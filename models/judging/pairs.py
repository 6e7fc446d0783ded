"""Which of two candidates a judge's text calls better: UnifiedReward and UnifiedReward-Think. Pure functions.

A *mention* is "Image 1 is better", "Image 2 is better than Image 1" or "equally good". It is a conclusion where the
sentence ends there or says so ("In conclusion, ...", "... overall"), and else a remark ("better in colour"). After a
negation or a condition in its clause, and in a question, it says nothing. Letters may be of either case. A free text
that generation cut off (``finished`` False) is "truncated": its conclusion comes last. A closed tag needs no more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from models.judging.answers import PairAnswer, Status, no_verdict
from models.judging.points import AXES, MARKUP, last_match, number_at

SUM_TOLERANCE = 0.011
"""Shares of two images are asked to sum to 1; two decimals each may round apart by 0.01."""

_DOUBT = re.compile(
    r"\b(?:not|no|never|neither|nor|whether|if|unless|hardly|cannot)\b|n['’]t\b|\bor\s*+\Z", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.!?;\n<>]")
_CLAUSE_END = re.compile(r"[,:]|\b(?:so|but|and|while|then|therefore|thus|hence)\b", re.IGNORECASE)
_CONCLUDES = re.compile(
    r"\b(?:overall\s*+,|(?:in|to)\s++(?:conclusion|conclude|summary)\b|(?:conclusion|verdict)[\s*_]*+:)", re.IGNORECASE
)
_SENTENCE = re.compile(r"[^.!?;\n<]{0,200}+")
_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_THINK = re.compile(r"</?think>", re.IGNORECASE)
_OVERALL = re.compile(r"overall\s++judge?ment", re.IGNORECASE)


@dataclass(frozen=True)
class _Mention:
    preference: float
    place: int
    conclusion: bool
    doubtful: bool


@lru_cache(maxsize=32)
def _patterns(noun: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What names a winner or a tie, and how a conclusion may go on."""
    name = r"\s?+".join(re.escape(word) for word in noun.split())
    verdict = re.compile(rf"\b{name}\s?+([12])\s++is\s++better\b|\bequally\s++good\b", re.IGNORECASE)
    rest = re.compile(
        rf"(?:\s++than\s++(?:the\s++)?(?:{name}\s?+[12]|other))?(?:\s++overall\b)?[\s*_`\"'’”)\]]*+(?:[.!;<]|\n|\Z)",
        re.IGNORECASE,
    )
    return verdict, rest


def _mentions(text: str, noun: str) -> list[_Mention]:
    verdict, rest = _patterns(noun)
    found = []
    for match in verdict.finditer(text):
        before = _SENTENCE_END.split(text[max(0, match.start() - 200) : match.start()])[-1]
        clause = _CLAUSE_END.split(before)[-1]
        after = _SENTENCE.match(text, match.end())
        asked = after is not None and text[after.end() : after.end() + 1] == "?"
        preference = 0.5 if match[1] is None else 1.0 if match[1] == "1" else 0.0
        conclusion = rest.match(text, match.end()) is not None or _CONCLUDES.search(before) is not None
        found.append(_Mention(preference, match.start(), conclusion, asked or _DOUBT.search(clause) is not None))
    return found


def _agreed(mentions: Sequence[_Mention]) -> tuple[float | None, Status]:
    preferences = {mention.preference for mention in mentions}
    if len(preferences) == 1:
        return preferences.pop(), "ok"
    return None, "contradictory" if preferences else "unparseable"


def parse_pair(text: str, *, noun: str = "Image", finished: bool = True) -> PairAnswer:
    """The conclusion of a free text: "Image 1 is better." and the like; ``noun`` is "Video", "Answer" ... elsewhere.

    Conclusions outvote the remarks before them; a remark after the last one must agree with it, and all conclusions
    with each other. A text with remarks alone says what they agree on. ``<answer>tie</answer>`` is a conclusion too.
    """
    if not finished:
        return PairAnswer(None, "truncated")
    mentions = [mention for mention in _mentions(text, noun) if not mention.doubtful]
    answers, _ = _answers(text)
    mentions += [_Mention(0.5, place, True, False) for place, answer in answers if _is_tie(answer)]
    conclusions = [mention for mention in mentions if mention.conclusion]
    last = max((mention.place for mention in conclusions), default=-1)
    preference, status = _agreed([mention for mention in mentions if mention.conclusion or mention.place > last])
    return PairAnswer(preference, no_verdict(text) if status == "unparseable" else status)


def _answers(text: str) -> tuple[list[tuple[int, str]], bool]:
    """Place and content of every closed answer tag, and whether one is left open; in one pass, unlike a lazy regex."""
    answers: list[tuple[int, str]] = []
    start: int | None = None
    for tag in _ANSWER_TAG.finditer(text):
        if not tag[1]:
            start = tag.end() if start is None else start
        elif start is not None:
            answers.append((start, text[start : tag.start()]))
            start = None
    return answers, start is not None


def _is_tie(answer: str) -> bool:
    return re.fullmatch(r"[\s\S]{0,80}\b(?:tied?|draw)[\s.!]*", answer, re.IGNORECASE) is not None


def parse_understanding_pair(text: str, *, noun: str = "Answer", finished: bool = True) -> PairAnswer:
    """The verdict after the last "Overall Judgment", which sums up those of single factors; or of the whole text."""
    found = last_match(_OVERALL, text)
    if found is None:
        return parse_pair(text, noun=noun, finished=finished)
    return parse_pair(text[found.end() :], noun=noun, finished=finished)


def parse_think(text: str, *, noun: str = "Image", finished: bool = True) -> PairAnswer:
    """UnifiedReward-Think: ``<think>reasons</think><answer>Image 1 is better</answer>``.

    Only the answer after the reasons counts: one inside them is an example. Several answers must agree, and an answer
    that mentions both winners is contradictory. ``reasons`` is the text of the think block, "" without one.
    """
    tags = [(tag, tag[0][1] != "/") for tag in _THINK.finditer(text)]
    last = max((i for i, (_, opens) in enumerate(tags) if not opens), default=None)
    if last is not None:
        # Some chat templates open the block themselves, outside the text.
        reasons = text[tags[0][0].end() if tags[0][1] else 0 : tags[last][0].start()].strip()
        rest = text[tags[last][0].end() :]
    else:
        reasons, rest = "", text
    answers, left_open = _answers(rest)
    if any(opens for _, opens in tags[0 if last is None else last + 1 :]):
        whole = rest.rstrip().lower().endswith("</answer>")
        return PairAnswer(None, "unparseable" if whole and finished else "truncated", reasons=reasons)
    if not answers:
        cut = left_open or (last is not None and not rest.strip())
        return PairAnswer(None, "truncated" if cut else no_verdict(rest, finished=finished), reasons=reasons)
    said = {_tagged(answer, noun) for _, answer in answers}
    return PairAnswer(*(said.pop() if len(said) == 1 else (None, "contradictory")), reasons=reasons)


def _tagged(answer: str, noun: str) -> tuple[float | None, Status]:
    mentions = _mentions(answer, noun)
    if not mentions and _is_tie(answer):
        return 0.5, "ok"
    preference, status = _agreed(mentions)
    if preference is None:
        return None, status if status == "contradictory" else no_verdict(answer)
    return (None, "unparseable") if any(mention.doubtful for mention in mentions) else (preference, "ok")


def parse_pair_scores(text: str, axes: Sequence[str] = AXES, *, finished: bool = True) -> PairAnswer:
    """UnifiedReward 2.0's shares: "<Axis> Score: Image 1: x Image 2: y", x + y = 1, for each of ``axes``.

    ``dimensions`` are the shares of image 1 by axis (rounding of the sum taken out), and the preference is their mean:
    how to combine them is not published. Shares that do not sum to 1 are "contradictory".
    """
    if not finished:
        return PairAnswer(None, "truncated")
    dimensions: dict[str, float] = {}
    for axis in axes:
        label = re.compile(rf"\b{re.escape(axis)}\s++score{MARKUP}:{MARKUP}", re.IGNORECASE)
        places = [found.end() for found in label.finditer(text)]
        if not places:
            continue
        first, status, place = _share(text, places[-1], "1")
        if first is None:
            return PairAnswer(None, status)
        second, status, _ = _share(text, place, "2")
        if second is None:
            return PairAnswer(None, status)
        if abs(first + second - 1) > SUM_TOLERANCE:
            return PairAnswer(None, "contradictory")
        dimensions[axis] = first / (first + second)
    if len(dimensions) < len(axes):
        return PairAnswer(None, "incomplete" if dimensions else no_verdict(text))
    return PairAnswer(math.fsum(dimensions.values()) / len(dimensions), "ok", dimensions)


def _share(text: str, place: int, number: str) -> tuple[float | None, Status, int]:
    label = re.compile(rf"[\s*_`,;.-]*+image\s?+{number}{MARKUP}:", re.IGNORECASE).match(text, place)
    if label is None:
        return None, "incomplete", place
    return number_at(text, label.end(), 0.0, 1.0)
