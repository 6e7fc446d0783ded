"""Tournaments of a group: which pairs to ask, both orders -> preference, comparisons -> the whole result.

Pure functions; nothing here knows of models or HTTP. Notation: a *comparison* is one ordered question (candidate
``first`` is shown first); a *preference* ``P[i][j]`` is the probability that candidate i is preferred to candidate j,
with ``P[i][j] + P[j][i] = 1`` and None where nobody asked or nobody answered. ``service.bradley_terry`` has the fit
of strengths, ``service.adaptive`` a schedule that asks few of the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit

from service.bradley_terry import (
    PRIOR_STD,
    BradleyTerry,
    Matrix,
    bradley_terry,
    bradley_terry_with_position,
    negative_log_posterior,
)

Pair = tuple[int, int]

__all__ = [
    "PRIOR_STD", "BradleyTerry", "CompareResult", "DuplicatePair", "JudgedComparison", "Matrix", "Pair", "PairError",
    "PairOutOfRange", "PairWithItself", "all_pairs", "bradley_terry", "compare_by_judge", "compare_by_scores",
    "negative_log_posterior", "preference_from_orders", "probability_matrix", "ranking", "strengths_from_scores",
    "validate_pairs", "win_rate",
]  # fmt: skip


class PairError(ValueError):
    """A list of pairs that cannot be asked; the caller's mistake. ``code`` is stable."""

    code = "invalid_pair"


class PairOutOfRange(PairError):
    """A pair names a candidate that is not in the group."""

    code = "pair_out_of_range"


class PairWithItself(PairError):
    """A pair compares a candidate with itself."""

    code = "pair_with_itself"


class DuplicatePair(PairError):
    """A pair is given twice; (j, i) is the same pair as (i, j)."""

    code = "duplicate_pair"


@dataclass(frozen=True)
class JudgedComparison:
    """One answered, or failed, comparison.

    ``probability`` is that of ``first`` being preferred to ``second``, in [0, 1]; None when it failed, and then
    ``code`` says why. ``text`` is the judge's answer where it gave one.
    """

    first: int
    second: int
    probability: float | None
    code: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class CompareResult:
    """All that ``POST /compare`` says of one item's N candidates.

    ``probabilities``: N x N preferences. ``win_rate``: mean preference over the judged opponents. ``strength`` in
    logits, sum zero in each of ``components``; ``strength_stderr`` is None for pointwise models. ``ranking``: indices,
    best first, those without a strength last. ``position``: by how many logits the judge favours what it sees first,
    and its standard error; None where it was not fitted.
    """

    probabilities: Matrix
    win_rate: list[float | None]
    strength: list[float | None]
    strength_stderr: list[float | None]
    ranking: list[int]
    components: list[list[int]]
    comparisons: list[JudgedComparison]
    position: float | None = None
    position_stderr: float | None = None


def all_pairs(count: int) -> list[Pair]:
    """The count * (count - 1) / 2 unordered pairs (i, j), i < j."""
    return [(i, j) for i in range(count) for j in range(i + 1, count)]


def validate_pairs(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """The pairs, in the given order, if each names two different candidates of ``count`` and none comes twice.

    Raises :class:`PairOutOfRange`, :class:`PairWithItself` or :class:`DuplicatePair`, naming the pair and its place.
    """
    places: dict[frozenset[int], int] = {}
    for place, (i, j) in enumerate(pairs):
        if not (0 <= i < count and 0 <= j < count):
            raise PairOutOfRange(f"pairs[{place}] is [{i}, {j}], but the candidates are 0 to {count - 1}")
        if i == j:
            raise PairWithItself(f"pairs[{place}] compares candidate {i} with itself")
        earlier = places.setdefault(frozenset((i, j)), place)
        if earlier != place:
            raise DuplicatePair(
                f"pairs[{place}] is [{i}, {j}], the same pair as pairs[{earlier}]; order does not matter"
            )
    return list(pairs)


def preference_from_orders(p_ij: float, p_ji: float) -> float:
    """P(i preferred to j) from both orders: the mean of ``p_ij`` and ``1 - p_ji``, so that a position bias cancels.

    ``p_ij`` is P(first preferred) when i is shown first, ``p_ji`` when j is; both in [0, 1], or ValueError.
    """
    for probability in (p_ij, p_ji):
        _check_probability(probability)
    return (p_ij + (1.0 - p_ji)) / 2


def probability_matrix(preferences: Mapping[Pair, float], count: int) -> Matrix:
    """N x N preferences from {(i, j): P(i preferred to j)}: P[j][i] = 1 - P[i][j], None where nothing is given."""
    validate_pairs(list(preferences), count)
    matrix: Matrix = [[None] * count for _ in range(count)]
    for (i, j), probability in preferences.items():
        _check_probability(probability)
        matrix[i][j] = probability
        matrix[j][i] = 1.0 - probability
    return matrix


def win_rate(probabilities: Matrix) -> list[float | None]:
    """Mean preference of each candidate over the opponents it was judged against; None where there was none."""
    judged = [[value for value in row if value is not None] for row in probabilities]
    return [math.fsum(row) / len(row) if row else None for row in judged]


def ranking(strength: Sequence[float | None]) -> list[int]:
    """Indices by falling strength; equal strengths keep their order, candidates without one come last."""
    return sorted(range(len(strength)), key=lambda i: math.inf if (s := strength[i]) is None else -s)


def strengths_from_scores(scores: Sequence[float | None], temperature: float) -> list[float | None]:
    """Bradley-Terry strengths of a pointwise model, in closed form: (score - mean) / temperature.

    Its preferences are exactly sigmoid((s_i - s_j) / temperature), so these are the strengths that a fit without prior
    to all pairs would find. None for candidates without a score. Raises ValueError for a score that is not finite or a
    temperature that is not positive.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"the temperature is positive and finite, not {temperature}")
    known = [score for score in scores if score is not None]
    if not all(math.isfinite(score) for score in known):
        raise ValueError("scores are finite numbers, or None")
    if not known:
        return [None] * len(scores)
    mean = math.fsum(score / len(known) for score in known)
    strengths = [None if score is None else (score - mean) / temperature for score in scores]
    if not all(strength is None or math.isfinite(strength) for strength in strengths):
        raise ValueError(f"scores over the temperature {temperature} are too large for a float")
    return strengths


def compare_by_scores(
    scores: Sequence[float | None], temperature: float, pairs: Sequence[Pair] | None = None
) -> CompareResult:
    """The tournament of a pointwise model; ``pairs`` (default: all) are those whose preferences are told.

    Strengths and ranking come from the scores, whatever the pairs. The standard errors are None: a score is
    deterministic, so there is no sampling error to state, and a number derived from the comparisons would invent one.
    """
    strength = strengths_from_scores(scores, temperature)
    asked = all_pairs(len(scores)) if pairs is None else validate_pairs(pairs, len(scores))
    comparisons = [JudgedComparison(i, j, *_score_preference(strength[i], strength[j])) for i, j in asked]
    preferences = {(c.first, c.second): c.probability for c in comparisons if c.probability is not None}
    probabilities = probability_matrix(preferences, len(scores))
    return CompareResult(
        probabilities=probabilities,
        win_rate=win_rate(probabilities),
        strength=strength,
        strength_stderr=[None] * len(scores),
        ranking=ranking(strength),
        components=[known] if (known := [i for i, value in enumerate(strength) if value is not None]) else [],
        comparisons=comparisons,
    )


def _score_preference(strength_i: float | None, strength_j: float | None) -> tuple[float | None, str | None]:
    if strength_i is None or strength_j is None:
        return None, "score_missing"
    return float(expit(strength_i - strength_j)), None


def compare_by_judge(comparisons: Sequence[JudgedComparison], count: int, *, position: bool = False) -> CompareResult:
    """The tournament of a pairwise model from its comparisons of ``count`` candidates, in any order.

    A pair judged in both orders has their mean; a pair of which one order failed has the other alone. Every answered
    comparison counts as one judgement in the fit. With ``position`` the fit has a term for the place in which a
    candidate is shown, and the preference of a pair that was judged in one order only is what the judge would have said
    without it: for tournaments in which most pairs are asked in one order. Raises :class:`PairError` for an impossible
    or repeated comparison and ValueError for a probability outside [0, 1].
    """
    answers = _answers(comparisons, count)
    ordered: Matrix = [[answers.get((i, j)) for j in range(count)] for i in range(count)]
    if position:
        with_position = bradley_terry_with_position(ordered)
        fit, bias, bias_stderr = with_position.fit, with_position.position, with_position.position_stderr
        probabilities = _preferences(answers, count, bias or 0.0)
    else:
        probabilities = _preferences(answers, count, 0.0)
        judged = np.array([[(i, j) in answers for j in range(count)] for i in range(count)], dtype=np.float64)
        judged = judged.reshape(count, count)
        fit, bias, bias_stderr = bradley_terry(probabilities, judged + judged.T), None, None
    return CompareResult(
        probabilities=probabilities,
        win_rate=win_rate(probabilities),
        strength=fit.strength,
        strength_stderr=fit.stderr,
        ranking=ranking(fit.strength),
        components=fit.components,
        comparisons=list(comparisons),
        position=bias,
        position_stderr=bias_stderr,
    )


def _answers(comparisons: Sequence[JudgedComparison], count: int) -> dict[Pair, float]:
    """{(first, second): probability} of those that were answered."""
    answers: dict[Pair, float] = {}
    asked: set[Pair] = set()
    for comparison in comparisons:
        order = (comparison.first, comparison.second)
        validate_pairs([order], count)
        if order in asked:
            raise DuplicatePair(f"the comparison of {order[0]} with {order[1]} is given twice")
        asked.add(order)
        if comparison.probability is not None:
            answers[order] = _check_probability(comparison.probability)
    return answers


def _preferences(answers: Mapping[Pair, float], count: int, position: float) -> Matrix:
    """Both orders averaged; what was judged in one order only is freed of ``position`` logits for the first place."""
    preferences: dict[Pair, float] = {}
    for i, j in answers:
        if (j, i) in preferences:
            continue
        if (j, i) in answers:
            preferences[i, j] = preference_from_orders(answers[i, j], answers[j, i])
        else:
            preferences[i, j] = float(expit(logit(answers[i, j]) - position)) if position else answers[i, j]
    return probability_matrix(preferences, count)


def _check_probability(probability: float) -> float:
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"a probability is in [0, 1], not {probability}")
    return probability
