"""What the answers to one question say together: votes of written ones, P(yes) of scored ones. Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from models.base import SampleError
from models.judge import Answer, AnswerError, WordScores
from models.judging.answers import FlexAnswer, PairAnswer, PointAnswer, Status, YesNoAnswer

LOW_MASS = 0.5
"""Under this probability of yes and no together the judge rather wanted to say something else: a warning."""
CATEGORY_OUTPUTS = ("semantic_alignment", "image_quality", "aesthetics")
"""UnifiedReward-Flex's first three categories, by their place; the judge words their names anew each time."""


@dataclass(frozen=True)
class Reading:
    """What one written answer says: ``value`` (a preference or a score) exactly when ``status`` is "ok"."""

    value: float | None
    status: Status
    outputs: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What all answers to one question say: ``value``, further numbers, and what is no number."""

    value: float
    outputs: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


Reader: TypeAlias = Callable[[Answer], Reading]


def pair_reader(parse: Callable[..., PairAnswer]) -> Reader:
    """Reads preferences with one of the parsers of :mod:`models.judging.pairs`; further arguments are bound before."""

    def read(answer: Answer) -> Reading:
        found = parse(answer.text, finished=answer.finished)
        details = {"reasons": found.reasons} if found.reasons else {}
        return Reading(found.preference, found.status, found.dimensions, details)

    return read


def point_reader(parse: Callable[..., PointAnswer]) -> Reader:
    """Reads scores with one of the parsers of :mod:`models.judging.points`."""

    def read(answer: Answer) -> Reading:
        found = parse(answer.text, finished=answer.finished)
        return Reading(found.score, found.status, found.outputs)

    return read


def flex_reader(parse: Callable[..., FlexAnswer]) -> Reader:
    """Reads UnifiedReward-Flex's verdicts; a category that names no winner has no output."""

    def read(answer: Answer) -> Reading:
        found = parse(answer.text, finished=answer.finished)
        named = zip(CATEGORY_OUTPUTS, found.categories, strict=False)
        outputs = {name: category.preference for name, category in named if category.preference is not None}
        categories = [{"name": category.name, "preference": category.preference} for category in found.categories]
        return Reading(found.preference, found.status, outputs, {"reasons": found.reasons, "categories": categories})

    return read


def yes_no_reader(parse: Callable[..., YesNoAnswer], *, yes_is_first: bool) -> Reader:
    """Reads yes or no in words; yes prefers the first candidate where ``yes_is_first``, else the second."""

    def read(answer: Answer) -> Reading:
        found = parse(answer.text, finished=answer.finished)
        if found.probability is None:
            return Reading(None, found.status)
        return Reading(found.probability if yes_is_first else 1.0 - found.probability, found.status)

    return read


def vote(answers: Sequence[Answer], read: Reader) -> Verdict | AnswerError:
    """The mean over the answers that can be read; an error where these are fewer than half.

    An output is the mean over those answers that give it. ``details``: ``texts`` and ``statuses`` of all answers, and
    what the reader found beside numbers, a list with an entry for each of them.
    """
    readings = [read(answer) for answer in answers]
    texts = [answer.text for answer in answers]
    readable = [(reading.value, reading) for reading in readings if reading.value is not None]
    if not readable or 2 * len(readable) < len(readings):
        return _unreadable([reading.status for reading in readings], texts)
    outputs = {
        name: _mean([reading.outputs[name] for _, reading in readable if name in reading.outputs])
        for name in dict.fromkeys(name for _, reading in readable for name in reading.outputs)
    }
    details: dict[str, Any] = {"texts": texts, "statuses": [reading.status for reading in readings]}
    for name in dict.fromkeys(name for reading in readings for name in reading.details):
        details[name] = [reading.details.get(name) for reading in readings]
    return Verdict(_mean([value for value, _ in readable]), outputs, details)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _unreadable(statuses: Sequence[Status], texts: Sequence[str]) -> AnswerError:
    failures = Counter(status for status in statuses if status != "ok")
    if not failures:
        return AnswerError("empty", "the judge gave no answer")
    status = failures.most_common(1)[0][0]
    if len(statuses) == 1:
        return AnswerError(status, f"the judge's answer has no verdict: it is {status}", texts)
    counted = ", ".join(f"{count} {name}" for name, count in failures.most_common())
    return AnswerError(
        status, f"{failures.total()} of {len(statuses)} answers of the judge have no verdict: {counted}", texts
    )


def weigh(scores: WordScores) -> Verdict | AnswerError:
    """P(first word) / (P(first) + P(second)) from natural log-probabilities; the output ``mass`` is their sum.

    Stable where both are tiny. :class:`AnswerError` "unparseable" where neither word is listed, and "out_of_range" for
    what is no log-probability.
    """
    first, second = scores.log_probs
    if not (first <= 1e-4 and second <= 1e-4):
        return AnswerError("out_of_range", "the judge's log-probabilities are no log-probabilities")
    high, low = max(first, second), min(first, second)
    if high == -math.inf:
        return AnswerError("unparseable", "the judge gives no probability to either of the words that it is asked for")
    share = 1.0 / (1.0 + math.exp(low - high))  # of the likelier word
    mass = min(1.0, math.exp(high) + math.exp(low))
    warnings = ("low_answer_mass",) if mass < LOW_MASS else ()
    return Verdict(share if first >= second else 1.0 - share, {"mass": mass}, {"statuses": ["ok"]}, warnings)


def combine(verdicts: Sequence[Verdict | SampleError], names: Sequence[str]) -> Verdict | SampleError:
    """One verdict of the answers to several questions, the criteria ``names``: the mean, with an output for each.

    ``mass`` is the smallest. A criterion that failed fails them all: the mean of the others is another number.
    """
    failed = next((verdict for verdict in verdicts if isinstance(verdict, SampleError)), None)
    if failed is not None:
        return failed
    found = [verdict for verdict in verdicts if isinstance(verdict, Verdict)]
    if len(found) == 1 and names == ("",):
        return found[0]
    outputs = {name: verdict.value for name, verdict in zip(names, found, strict=True)}
    outputs |= {"mass": min(verdict.outputs["mass"] for verdict in found)}
    warnings = tuple(dict.fromkeys(warning for verdict in found for warning in verdict.warnings))
    details = {"statuses": [status for verdict in found for status in verdict.details["statuses"]]}
    return Verdict(_mean([verdict.value for verdict in found]), outputs, details, warnings)
