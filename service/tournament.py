"""Tournaments of a group: which pairs to ask, both orders -> preference, preferences -> strengths with error bars.

Pure functions; nothing here knows of models or HTTP. Notation: a *comparison* is one ordered question (candidate
``first`` is shown first); a *preference* ``P[i][j]`` is the probability that candidate i is preferred to candidate j,
with ``P[i][j] + P[j][i] = 1`` and None where nobody asked or nobody answered.

Strengths are in logits: sigmoid(strength_i - strength_j) is the preference that they explain. They say something only
within a connected component of judged pairs, and sum to zero in each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, log_expit

Pair = tuple[int, int]
Matrix = list[list[float | None]]
Floats = NDArray[np.float64]

PRIOR_STD = 10.0
"""Standard deviation, in logits, of the Gaussian prior on strengths. A perfectly separated group would have infinite
strengths without one. At 10 it adds 0.01 to the information of a strength, where one even comparison adds 0.25."""


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
class BradleyTerry:
    """A fit: per candidate ``strength`` and its standard error ``stderr`` in logits, None for one never judged.

    ``components`` lists the groups of candidates whose strengths can be compared, each in ascending order.
    """

    strength: list[float | None]
    stderr: list[float | None]
    components: list[list[int]]


@dataclass(frozen=True)
class CompareResult:
    """All that ``POST /compare`` says of one item's N candidates.

    ``probabilities``: N x N preferences. ``win_rate``: mean preference over the judged opponents. ``strength`` in
    logits, sum zero in each of ``components``; ``strength_stderr`` is None for pointwise models. ``ranking``: indices,
    best first, those without a strength last.
    """

    probabilities: Matrix
    win_rate: list[float | None]
    strength: list[float | None]
    strength_stderr: list[float | None]
    ranking: list[int]
    components: list[list[int]]
    comparisons: list[JudgedComparison]


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


def compare_by_judge(comparisons: Sequence[JudgedComparison], count: int) -> CompareResult:
    """The tournament of a pairwise model from its comparisons of ``count`` candidates, in any order.

    A pair judged in both orders has their mean; a pair of which one order failed has the other alone. Every answered
    comparison counts as one judgement in the fit. Raises :class:`PairError` for an impossible or repeated comparison
    and ValueError for a probability outside [0, 1].
    """
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
    preferences: dict[Pair, float] = {}
    weights = np.zeros((count, count))
    for i, j in answers:
        weights[[i, j], [j, i]] += 1
        if (j, i) not in preferences:
            both = (j, i) in answers
            preferences[i, j] = preference_from_orders(answers[i, j], answers[j, i]) if both else answers[i, j]
    probabilities = probability_matrix(preferences, count)
    fit = bradley_terry(probabilities, weights)
    return CompareResult(
        probabilities=probabilities,
        win_rate=win_rate(probabilities),
        strength=fit.strength,
        strength_stderr=fit.stderr,
        ranking=ranking(fit.strength),
        components=fit.components,
        comparisons=list(comparisons),
    )


def bradley_terry(
    probabilities: Matrix, weights: Floats | None = None, *, prior_std: float = PRIOR_STD
) -> BradleyTerry:
    """Fit strengths to N x N preferences, fractional and missing ones included.

    Maximises sum_{i<j} w_ij [P_ij log sigmoid(d_ij) + P_ji log sigmoid(-d_ij)] - sum_i strength_i^2 / (2 prior_std^2)
    with d_ij = strength_i - strength_j (Bradley and Terry 1952; Hunter 2004), under sum zero in each component.
    ``weights`` [N, N], symmetric and not negative, is how many independent judgements each preference stands for
    (default 1); weight 0 is the same as None. The standard errors are the square roots of the diagonal of the inverse
    observed information (prior included) on the sum-zero subspace: they are as right as those weights are.
    A candidate that was never judged has no strength and is in no component. Raises ValueError for a matrix that is
    not one of preferences, and RuntimeError if the optimiser fails, which a strictly concave likelihood rules out.
    """
    preference, weight = _check_matrix(probabilities, weights)
    if not (prior_std > 0 and math.isfinite(prior_std)):
        raise ValueError(f"the prior's standard deviation is positive and finite, not {prior_std}")
    count = len(preference)
    strength: list[float | None] = [None] * count
    stderr: list[float | None] = [None] * count
    components: list[list[int]] = []
    number, labels = connected_components(weight > 0, directed=False) if count else (0, np.zeros(0))
    for label in range(number):
        members = np.flatnonzero(labels == label)
        if len(members) == 1:
            continue
        block = np.ix_(members, members)
        values, errors = _fit_component(preference[block], weight[block], prior_std**-2)
        components.append(members.tolist())
        for member, value, error in zip(members.tolist(), values.tolist(), errors.tolist(), strict=True):
            strength[member], stderr[member] = value, error
    return BradleyTerry(strength, stderr, components)


def negative_log_posterior(strength: Floats, preference: Floats, weight: Floats, precision: float) -> float:
    """What :func:`bradley_terry` minimises; ``strength`` [n], ``preference`` and ``weight`` [n, n], 0 if unjudged."""
    difference = strength[:, None] - strength[None, :]
    likelihood = (weight * preference * log_expit(difference)).sum()  # (i, j) and (j, i) are the two halves of a pair
    return float(precision * (strength**2).sum() / 2 - likelihood)


def _gradient(strength: Floats, preference: Floats, weight: Floats, precision: float) -> Floats:
    surprise = weight * (preference - expit(strength[:, None] - strength[None, :]))
    return np.asarray(precision * strength - surprise.sum(axis=1))


def _hessian(strength: Floats, preference: Floats, weight: Floats, precision: float) -> Floats:
    """The observed information: the Laplacian of the graph with edge weights w p (1 - p), and the prior's precision."""
    difference = strength[:, None] - strength[None, :]
    edges = weight * expit(difference) * expit(-difference)
    return np.asarray(np.diag(edges.sum(axis=1) + precision) - edges)


def _fit_component(preference: Floats, weight: Floats, precision: float) -> tuple[Floats, Floats]:
    """Strengths [n] with sum zero and their standard errors [n] of one connected component."""
    count = len(preference)
    data = (preference, weight, precision)
    options = {"gtol": 1e-9 * max(1.0, float(weight.max()))}
    fit = minimize(
        negative_log_posterior, np.zeros(count), data, "trust-exact", _gradient, hess=_hessian, options=options
    )
    # One more Newton step: the optimiser stops at a gradient that is small beside the largest weight, not the smallest.
    strength = fit.x - np.linalg.solve(_hessian(fit.x, *data), _gradient(fit.x, *data))
    strength -= strength.mean()
    slope = float(np.abs(_gradient(strength, *data)).max())
    if not slope <= 1e-6 * max(1.0, float(weight.max())):
        raise RuntimeError(f"the Bradley-Terry fit of {count} candidates did not converge: gradient {slope:.2e}")
    # All strengths moved together change no preference. Along that direction, 1/sqrt(n), the gauge fixes them: put a
    # 1 there to invert the information, and take it away again.
    along = np.full((count, count), 1.0 / count)
    information = _hessian(strength, *data) - precision * along
    covariance = np.linalg.inv(information + along) - along
    return strength, np.sqrt(np.clip(np.diag(covariance), 0.0, None))


def _check_matrix(probabilities: Matrix, weights: Floats | None) -> tuple[Floats, Floats]:
    """Preferences and weights as arrays [N, N], both 0 where nothing was judged."""
    count = len(probabilities)
    if any(len(row) != count for row in probabilities):
        raise ValueError(
            f"preferences are a square matrix; {count} rows have {sorted({*map(len, probabilities)})} values"
        )
    preference = np.array(probabilities, dtype=np.float64).reshape(count, count)  # None becomes nan
    judged = ~np.isnan(preference)
    if (judged != judged.T).any() or judged.diagonal().any():
        raise ValueError("a preference and its reverse are both given or both None, and the diagonal is None")
    preference = np.where(judged, preference, 0.0)
    if ((preference < 0) | (preference > 1)).any() or (np.abs(preference + preference.T - judged) > 1e-6).any():
        raise ValueError("preferences are in [0, 1], and a preference and its reverse sum to 1")
    weight = np.ones((count, count)) if weights is None else np.asarray(weights, dtype=np.float64)
    if weight.shape != (count, count) or not np.isfinite(weight).all() or (weight < 0).any():
        raise ValueError(f"weights are {count} x {count}, finite and not negative")
    if (weight != weight.T).any():
        raise ValueError("weights are symmetric")
    return preference, np.where(judged, weight, 0.0)


def _check_probability(probability: float) -> float:
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"a probability is in [0, 1], not {probability}")
    return probability
