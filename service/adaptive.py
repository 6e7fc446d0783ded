"""Adaptive tournaments: few rounds of the comparisons that tell most about the ranking, instead of all pairs.

The first round is a connected graph in which each candidate is shown first as often as second. Every later round fits
Bradley-Terry strengths with a position term to all answers, and picks greedily what is expected to settle most: pairs
whose difference is uncertain, whose order is in doubt and whose answer is not known beforehand. After each pick the
covariance is updated as if it had been answered, so that a round does not ask the same thing twice.

Most pairs are asked in one order: the place in which a candidate is shown costs one parameter of the fit
(``compare_by_judge(..., position=True)``) where the other order would cost a second comparison of every pair.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, ndtr

from service.bradley_terry import (
    POSITION_PRIOR_STD,
    PRIOR_STD,
    Floats,
    Matrix,
    bradley_terry_with_position,
    information,
)
from service.tournament import JudgedComparison, Pair, validate_pairs

COMPARISONS_PER_BIT, GRADED_PER_BIT = 1.2, 0.95
"""The default budget is this times N log2 N: what sorting N candidates by comparisons takes, and a fifth for noise
where answers are verdicts. A graded answer also says how far apart two candidates are."""
VERDICT = 0.02
"""A probability that is nearer than this to 0 or 1 says who is better and no more."""
FIRST_ROUND = 2
"""How often each candidate is shown first, and how often second, in the first round."""
ROWS = 8
"""Comparisons of a judge's forward, which is padded to them: budgets of as many candidates or more fill them."""
GIVEN_UP_AFTER = 4
"""A candidate with so many failed comparisons and no answered one is not asked about again."""


def default_budget(count: int, *, graded: bool = False) -> int:
    """Comparisons of an adaptive tournament of ``count`` candidates: O(N log N), at most both orders of all pairs.

    ``graded`` answers need fewer than verdicts do.
    """
    per_bit = GRADED_PER_BIT if graded else COMPARISONS_PER_BIT
    wanted = math.ceil(per_bit * count * math.log2(max(count, 2)))
    return min(count * (count - 1), ROWS * round(wanted / ROWS) if count >= ROWS else wanted)


def are_graded(judged: Sequence[JudgedComparison]) -> bool:
    """Whether most answers are more than a verdict."""
    answers = [each.probability for each in judged if each.probability is not None]
    return 2 * sum(VERDICT < answer < 1 - VERDICT for answer in answers) > len(answers)


@dataclass(frozen=True)
class _State:
    """What the answers say: strengths and position [N + 1], their covariance, and which orders were asked [N, N]."""

    values: Floats
    covariance: Floats
    asked: Floats


class Adaptive:
    """A schedule of one item's comparisons, in rounds.

    Ask what :meth:`next_pairs` returns, all at once, and call it again with everything judged so far, failures
    included, until it returns nothing. It keeps no state: the same answers give the same next round.

    ``count`` candidates; ``budget`` comparisons in all, failed ones included (default: at most :func:`default_budget`,
    and that of graded answers where the first round's are; with count * (count - 1) all pairs are asked in both
    orders). Raises ValueError for fewer than two candidates or a budget
    that cannot connect them.
    """

    def __init__(self, count: int, *, seed: int = 0, budget: int | None = None) -> None:
        if count < 2:
            raise ValueError(f"a tournament has at least 2 candidates, not {count}")
        self.count = count
        self.seed = seed
        self.budget = default_budget(count) if budget is None else min(budget, count * (count - 1))
        self._by_default = budget is None
        if self.budget < count - 1:
            raise ValueError(f"{self.budget} comparisons cannot connect {count} candidates")

    def next_pairs(self, judged: Sequence[JudgedComparison]) -> list[Pair]:
        """The next round's ordered comparisons (first, second), by their first candidate; none when all is done.

        ``judged``: every comparison asked so far. None of them is asked again, but the reverse of one may be. Raises
        :class:`service.tournament.PairError` for a comparison that is impossible.
        """
        left = self._left(judged)
        if left <= 0:
            return []
        if self.budget == self.count * (self.count - 1):
            asked = {(each.first, each.second) for each in judged}
            every = [(i, j) for i in range(self.count) for j in range(self.count) if i != j]
            return [pair for pair in every if pair not in asked]
        chooser = random.Random(f"{self.seed}/{len(judged)}")
        if not judged:
            return sorted(_circulant(self.count, min(left, FIRST_ROUND * self.count), chooser))
        return sorted(_pick(_state(judged, self.count), _live(judged, self.count), self._round(left), chooser))

    def _left(self, judged: Sequence[JudgedComparison]) -> int:
        whole = self.budget == self.count * (self.count - 1)
        if whole or not (self._by_default and are_graded(judged)):
            return self.budget - len(judged)
        left = default_budget(self.count, graded=True) - len(judged)
        # What is less than half a round is not worth another one.
        return left if 2 * left >= self.count else 0

    def _round(self, left: int) -> int:
        """N comparisons, or all that are left where fewer than half as many would be for the round after."""
        return self.count if 2 * left >= 3 * self.count else left


def _circulant(count: int, size: int, chooser: random.Random) -> list[Pair]:
    """A ring through all candidates in random order, then chords of random lengths, until ``size`` pairs."""
    order = list(range(count))
    chooser.shuffle(order)
    steps = list(range(2, (count + 1) // 2))
    chooser.shuffle(steps)
    pairs = [(order[i], order[(i + step) % count]) for step in [1, *steps] for i in range(count)]
    return pairs[:size]


def _live(judged: Sequence[JudgedComparison], count: int) -> list[int]:
    answered, failed = [0] * count, [0] * count
    for each in judged:
        tally = failed if each.probability is None else answered
        tally[each.first] += 1
        tally[each.second] += 1
    return [i for i in range(count) if answered[i] or failed[i] < GIVEN_UP_AFTER]


def _state(judged: Sequence[JudgedComparison], count: int) -> _State:
    ordered: Matrix = [[None] * count for _ in range(count)]
    asked, weight = np.zeros((count, count)), np.zeros((count, count))
    for each in judged:
        validate_pairs([(each.first, each.second)], count)
        ordered[each.first][each.second] = each.probability
        asked[each.first, each.second] = 1
        weight[each.first, each.second] = each.probability is not None
    found = bradley_terry_with_position(ordered)
    values = np.array([*(value or 0.0 for value in found.fit.strength), found.position or 0.0])
    precision = np.array([*[PRIOR_STD**-2] * count, POSITION_PRIOR_STD**-2])
    covariance = np.asarray(np.linalg.inv(information(values, weight, precision)), dtype=np.float64)
    return _State(values, covariance, asked)


def _gains(state: _State, covariance: Floats) -> Floats:
    """Of each ordered comparison [N, N]: how much it is expected to settle, 0 where it was asked already."""
    count = len(state.asked)
    difference = state.values[:count, None] - state.values[None, :count]
    C = covariance[:count, :count]
    to_position = covariance[:count, count]
    variance = np.diag(C)[:, None] + np.diag(C)[None, :] - 2 * C
    of_answer = variance + 2 * (to_position[:, None] - to_position[None, :]) + covariance[count, count]
    p = expit(difference + state.values[count])
    settled = np.log1p(p * (1 - p) * of_answer)
    doubt = ndtr(-np.abs(difference) / np.sqrt(np.maximum(variance, 1e-12)))
    return np.where((state.asked > 0) | np.eye(count, dtype=bool), 0.0, settled * doubt)


def _pick(state: _State, live: Sequence[int], size: int, chooser: random.Random) -> list[Pair]:
    """Greedy: the comparison of the largest gain, then the next as if that one were answered."""
    count = len(state.asked)
    covariance = state.covariance.copy()
    asked = state.asked.copy()
    dead = np.ones(count, dtype=bool)
    dead[list(live)] = False
    asked[dead, :] = asked[:, dead] = 1
    tie = np.array([[chooser.random() for _ in range(count)] for _ in range(count)])
    pairs: list[Pair] = []
    for _ in range(size):
        now = _State(state.values, covariance, asked)
        gains = _gains(now, covariance) * (1 + 1e-9 * tie)
        first, second = (int(i) for i in np.unravel_index(gains.argmax(), gains.shape))
        if gains[first, second] <= 0:
            break
        pairs.append((first, second))
        asked[first, second] = 1
        direction = np.zeros(count + 1)
        direction[[first, second, count]] = 1, -1, 1
        p = float(expit(state.values @ direction))
        towards = covariance @ direction
        weight = p * (1 - p)
        covariance -= np.outer(towards, towards) * weight / (1 + weight * float(direction @ towards))
    return pairs
