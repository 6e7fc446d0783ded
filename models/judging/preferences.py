"""Preferences of groups made of many answers: win rates, by category too, ranks, and the best and worst of a group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from models.judging.answers import FlexAnswer

Vote = tuple[int, int, float | None]
"""(first, second, preference for the first in [0, 1]); None where the comparison failed."""


def win_rates(votes: Iterable[Vote], count: int) -> list[float | None]:
    """Mean preference for each of ``count`` candidates over its answered comparisons; None for one without any.

    Pref-GRPO's reward (arXiv 2508.20751, section 3), in which a failed comparison counts for nobody; there it counts
    as a tie. Raises ValueError for an index out of range, a candidate against itself, or a preference outside [0, 1].
    """
    wins: list[list[float]] = [[] for _ in range(count)]
    for first, second, preference in votes:
        if first == second or not (0 <= first < count and 0 <= second < count):
            raise ValueError(f"candidates 0 to {count - 1} cannot be compared as {first} with {second}")
        if preference is None:
            continue
        if not 0.0 <= preference <= 1.0:
            raise ValueError(f"a preference is in [0, 1], not {preference}")
        wins[first].append(preference)
        wins[second].append(1.0 - preference)
    return [math.fsum(won) / len(won) if won else None for won in wins]


@dataclass(frozen=True)
class FlexRates:
    """Win rates of one group: overall, by category in order of appearance, and the weighted mean over categories.

    None for a candidate without an answered comparison; the mean is over the categories in which it has one.
    """

    overall: list[float | None]
    dimension_mean: list[float | None]
    by_category: Mapping[str, list[float | None]]


def flex_rates(
    comparisons: Sequence[tuple[int, int, FlexAnswer]], count: int, category_weights: Sequence[float] = ()
) -> FlexRates:
    """Win rates of UnifiedReward-Flex's verdicts; a category's weight goes by its place of first appearance, else 1.

    Overall and dimensions are blended where advantages are made. Raises ValueError as :func:`win_rates`, and for a
    negative weight.
    """
    if any(not weight >= 0 for weight in category_weights):
        raise ValueError(f"weights of categories are not negative: {list(category_weights)}")
    votes: dict[str, list[Vote]] = {}
    for first, second, answer in comparisons:
        for category in answer.categories:
            votes.setdefault(category.name, []).append((first, second, category.preference))
    by_category = {name: win_rates(cast, count) for name, cast in votes.items()}
    weights = [*category_weights[: len(votes)], *[1.0] * (len(votes) - len(category_weights))]
    columns = list(by_category.values())
    means = [_weighted_mean([column[i] for column in columns], weights) for i in range(count)]
    overall = win_rates([(first, second, answer.preference) for first, second, answer in comparisons], count)
    return FlexRates(overall, means, by_category)


def _weighted_mean(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    total = math.fsum(weight for _, weight in known)
    return math.fsum(value * weight for value, weight in known) / total if total > 0 else None


def rank_rewards(scores: Sequence[float]) -> list[float]:
    """Rank of each score in its group over the group's size: 0 for the lowest, (n - 1) / n for the highest.

    Equal scores share the mean of their ranks. Raises ValueError for a score that is not finite.
    """
    if not all(math.isfinite(score) for score in scores):
        raise ValueError("scores that are ranked are finite")
    return [
        (sum(other < score for other in scores) + (sum(other == score for other in scores) - 1) / 2) / len(scores)
        for score in scores
    ]


def best_and_worst(chosen: Sequence[float], rejected: Sequence[float]) -> tuple[int, int] | None:
    """Index of the first largest of ``chosen`` and the first smallest of ``rejected``: a pair to train on (DPO).

    None where that would not be better than this, or where there is nothing to choose from.
    """
    if not chosen or not rejected:
        return None
    best = max(range(len(chosen)), key=lambda i: chosen[i])
    worst = min(range(len(rejected)), key=lambda i: rejected[i])
    return (best, worst) if chosen[best] > rejected[worst] else None
