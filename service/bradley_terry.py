"""Preferences -> Bradley-Terry strengths with error bars, with or without a term for the place of a candidate.

Strengths are in logits: sigmoid(strength_i - strength_j) is the preference that they explain. They say something only
within a connected component of judged pairs, and sum to zero in each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, log_expit

Matrix = list[list[float | None]]
Floats = NDArray[np.float64]

PRIOR_STD = 10.0
"""Standard deviation, in logits, of the Gaussian prior on strengths. A perfectly separated group would have infinite
strengths without one. At 10 it adds 0.01 to the information of a strength, where one even comparison adds 0.25."""

POSITION_PRIOR_STD = 1.0
"""Standard deviation, in logits, of the prior on the position term: a few comparisons in one order cannot tell it from
strengths, and then it stays small. Against the comparisons of a group it is as weak as four even ones."""


@dataclass(frozen=True)
class BradleyTerry:
    """A fit: per candidate ``strength`` and its standard error ``stderr`` in logits, None for one never judged.

    ``components`` lists the groups of candidates whose strengths can be compared, each in ascending order.
    """

    strength: list[float | None]
    stderr: list[float | None]
    components: list[list[int]]


@dataclass(frozen=True)
class PositionFit:
    """A fit with a position term: ``position`` logits in favour of the first candidate, and its standard error."""

    fit: BradleyTerry
    position: float | None
    position_stderr: float | None


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
    _check_prior(prior_std)
    components = _components(weight)
    strength, stderr = np.full(len(preference), np.nan), np.full(len(preference), np.nan)
    for members in components:
        block = np.ix_(members, members)
        judged_once = np.triu(weight[block])
        strength[members], covariance = _fit(preference[block], judged_once, [range(len(members))], prior_std, None)
        stderr[members] = np.sqrt(np.clip(np.diag(covariance), 0.0, None))
    return BradleyTerry(_with_none(strength), _with_none(stderr), components)


def bradley_terry_with_position(
    probabilities: Matrix, *, prior_std: float = PRIOR_STD, position_std: float = POSITION_PRIOR_STD
) -> PositionFit:
    """Fit strengths and one position term to N x N ordered comparisons, None where nobody asked or answered.

    ``probabilities[i][j]`` is P(first preferred) when i is shown first and j second, explained by
    sigmoid(strength_i - strength_j + position): the home advantage of Davidson and Beaver 1977. [i][j] and [j][i] are
    two judgements and need not sum to one. The position term is shared by all components and has a Gaussian prior of
    ``position_std`` logits; everything else is as in :func:`bradley_terry`. No comparison, no position: None. Raises
    ValueError for a matrix that is not square, has a diagonal or values outside [0, 1].
    """
    preference, weight = _check_ordered(probabilities)
    _check_prior(prior_std)
    _check_prior(position_std)
    count = len(preference)
    components = _components(weight + weight.T)
    strength, stderr = np.full(count, np.nan), np.full(count, np.nan)
    if not components:
        return PositionFit(BradleyTerry(_with_none(strength), _with_none(stderr), []), None, None)
    members = [member for part in components for member in part]
    block = np.ix_(members, members)
    place = {member: i for i, member in enumerate(members)}
    groups = [range(place[part[0]], place[part[0]] + len(part)) for part in components]
    values, covariance = _fit(preference[block], weight[block], groups, prior_std, position_std)
    strength[members] = values[:-1]
    stderr[members] = np.sqrt(np.clip(np.diag(covariance)[:-1], 0.0, None))
    fit = BradleyTerry(_with_none(strength), _with_none(stderr), components)
    return PositionFit(fit, float(values[-1]), math.sqrt(covariance[-1, -1]))


def negative_log_posterior(values: Floats, preference: Floats, weight: Floats, precision: Floats) -> float:
    """What the fits minimise.

    ``values`` is strengths [n], or strengths and a position term [n + 1], ``precision`` that of their priors.
    ``preference`` [n, n] is P(i preferred) when i is first, ``weight`` [n, n] how often that was judged, 0 if never: a
    pair whose orders are one judgement stands in one triangle.
    """
    difference = _differences(values, len(preference))
    likelihood = weight * (preference * log_expit(difference) + (1 - preference) * log_expit(-difference))
    return float((precision * values**2).sum() / 2 - likelihood.sum())


def _differences(values: Floats, count: int) -> Floats:
    strength, position = values[:count], float(values[count:].sum())
    return np.asarray(strength[:, None] - strength[None, :] + position)


def _gradient(values: Floats, preference: Floats, weight: Floats, precision: Floats) -> Floats:
    count = len(preference)
    surprise = weight * (preference - expit(_differences(values, count)))
    of_likelihood = np.concatenate([surprise.sum(axis=1) - surprise.sum(axis=0), [surprise.sum()]])
    return np.asarray(precision * values - of_likelihood[: len(values)])


def _hessian(values: Floats, preference: Floats, weight: Floats, precision: Floats) -> Floats:
    return information(values, weight, precision)


def information(values: Floats, weight: Floats, precision: Floats) -> Floats:
    """The observed information of what :func:`negative_log_posterior` takes, [n, n] or [n + 1, n + 1].

    Of strengths it is the Laplacian of the graph whose edges are w p (1 - p); the priors are in it.
    """
    count = len(weight)
    difference = _differences(values, count)
    edges = weight * expit(difference) * expit(-difference)
    found = np.zeros((count + 1, count + 1))
    found[:count, :count] = np.diag(edges.sum(axis=0) + edges.sum(axis=1)) - edges - edges.T
    found[:count, count] = found[count, :count] = edges.sum(axis=1) - edges.sum(axis=0)
    found[count, count] = edges.sum()
    return found[: len(values), : len(values)] + np.diag(precision)


def _fit(
    preference: Floats, weight: Floats, groups: list[range], prior_std: float, position_std: float | None
) -> tuple[Floats, Floats]:
    """Strengths, with sum zero in each of ``groups``, then the position term if it has a prior; their covariance."""
    count = len(preference)
    precision = np.full(count, prior_std**-2)
    if position_std is not None:
        precision = np.append(precision, position_std**-2)
    data = (preference, weight, precision)
    start = np.zeros(len(precision))
    options = {"gtol": 1e-9 * max(1.0, float(weight.max()))}
    fit = minimize(negative_log_posterior, start, data, "trust-exact", _gradient, hess=_hessian, options=options)
    # One more Newton step: the optimiser stops at a gradient that is small beside the largest weight, not the smallest.
    values = fit.x - np.linalg.solve(_hessian(fit.x, *data), _gradient(fit.x, *data))
    for group in groups:
        values[group] -= values[group].mean()
    slope = float(np.abs(_gradient(values, *data)).max())
    if not slope <= 1e-6 * max(1.0, float(weight.max())):
        raise RuntimeError(f"the Bradley-Terry fit of {count} candidates did not converge: gradient {slope:.2e}")
    # All strengths of a group moved together change no preference. Along that direction, 1/sqrt(n), the gauge fixes
    # them: put a 1 there to invert the information, and take it away again.
    along = np.zeros((len(values), len(values)))
    for group in groups:
        along[np.ix_(group, group)] = 1.0 / len(group)
    without_gauge = _hessian(values, *data) - prior_std**-2 * along
    return values, np.asarray(np.linalg.inv(without_gauge + along) - along)


def _components(weight: Floats) -> list[list[int]]:
    """Groups of at least two candidates that comparisons connect, in the order of their smallest member."""
    if not len(weight):
        return []
    number, labels = connected_components(weight > 0, directed=False)
    groups = [np.flatnonzero(labels == label).tolist() for label in range(number)]
    return sorted(group for group in groups if len(group) > 1)


def _with_none(values: Floats) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _check_prior(std: float) -> None:
    if not (std > 0 and math.isfinite(std)):
        raise ValueError(f"the prior's standard deviation is positive and finite, not {std}")


def _square(probabilities: Matrix) -> Floats:
    count = len(probabilities)
    if any(len(row) != count for row in probabilities):
        raise ValueError(
            f"preferences are a square matrix; {count} rows have {sorted({*map(len, probabilities)})} values"
        )
    return np.array(probabilities, dtype=np.float64).reshape(count, count)  # None becomes nan


def _check_ordered(probabilities: Matrix) -> tuple[Floats, Floats]:
    """Probabilities [N, N] of the first candidate and 1 where there is one, both 0 where nothing was judged."""
    preference = _square(probabilities)
    judged = ~np.isnan(preference)
    if judged.diagonal().any():
        raise ValueError("a candidate is not compared with itself: the diagonal is None")
    preference = np.where(judged, preference, 0.0)
    if ((preference < 0) | (preference > 1)).any():
        raise ValueError("preferences are in [0, 1]")
    return preference, judged.astype(np.float64)


def _check_matrix(probabilities: Matrix, weights: Floats | None) -> tuple[Floats, Floats]:
    """Preferences and weights as arrays [N, N], both 0 where nothing was judged."""
    preference = _square(probabilities)
    count = len(preference)
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
