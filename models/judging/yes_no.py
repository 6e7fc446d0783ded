"""Yes or no, in words or as token probabilities: RewardDance (arXiv 2509.08826) and OneReward (arXiv 2508.21066)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Literal

from models.judging.answers import YesNoAnswer, no_verdict

_WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_OPENING = re.compile(r"[\s*_`\"'“‘(\[]*+(yes|no)\b(\s*+(?:/|and|or)\s*+(?:yes|no)\b)?", re.IGNORECASE)


def parse_yes_no(text: str, verdict: Literal["first", "last"] = "first", *, finished: bool = True) -> YesNoAnswer:
    """The judge's word: 1 for yes, 0 for no.

    ``verdict`` is the format that the judge was trained in: "first", the text opens with it and reasons follow;
    "last", it closes the reasons, alone or in a last line that holds no other.
    """
    if verdict == "first":
        opening = _OPENING.match(text)
        if opening is None:
            return YesNoAnswer(None, no_verdict(text, finished=finished))
        if opening[2] is not None:
            return YesNoAnswer(None, "contradictory")
        return YesNoAnswer(float(opening[1].lower() == "yes"), "ok")
    if not finished:
        return YesNoAnswer(None, "truncated")
    lines = text.strip().splitlines()
    words = {word.lower() for word in _WORD.findall(lines[-1])} if lines else set()
    if len(words) != 1:
        return YesNoAnswer(None, "contradictory" if words else no_verdict(text))
    return YesNoAnswer(float(words == {"yes"}), "ok")


def yes_probability(log_probs: Iterable[tuple[str, float]]) -> YesNoAnswer:
    """P(yes) / (P(yes) + P(no)) over the (token, natural log-probability) pairs of the first answer token.

    Spellings that differ in case and surrounding blanks are summed. A word that is not listed counts as 0: a server
    that lists the 20 likeliest tokens leaves out only what is smaller. "unparseable" where neither is listed, and
    "out_of_range" for what is no log-probability.
    """
    mass = {"yes": 0.0, "no": 0.0}
    for token, log_prob in log_probs:
        word = token.strip().lower()
        if word not in mass:
            continue
        if not log_prob <= 1e-6:
            return YesNoAnswer(None, "out_of_range", 0.0)
        mass[word] += math.exp(log_prob)
    total = mass["yes"] + mass["no"]
    if total == 0:
        return YesNoAnswer(None, "unparseable", 0.0)
    return YesNoAnswer(mass["yes"] / total, "ok", total)
