"""How well a reward model's scores agree with the truth: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

TIE = 1e-6
"""Truths closer than this are equal: such a pair has no right order."""


def pairwise_outcomes(scores: Sequence[float], truth: Sequence[float]) -> list[bool]:
    """For each pair of one group whose truths differ, whether the scores order it in the same way (a tie does not).

    Raises ValueError where the lengths differ.
    """
    if len(scores) != len(truth):
        raise ValueError(f"{len(scores)} scores and {len(truth)} truths")
    outcomes = []
    for i, j in combinations(range(len(scores)), 2):
        difference = truth[i] - truth[j]
        if abs(difference) > TIE:
            outcomes.append((scores[i] - scores[j]) * difference > 0)
    return outcomes


def bootstrap_interval(groups: Sequence[Sequence[bool]], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the share of true outcomes when whole groups are drawn again: pairs of a group share images.

    Raises ValueError where there is no outcome at all.
    """
    counts = np.array([(sum(outcomes), len(outcomes)) for outcomes in groups if outcomes], np.float64)
    if not len(counts):
        raise ValueError("no pair has a right order")
    chosen = np.random.default_rng(seed).integers(0, len(counts), (draws, len(counts)))
    right, total = counts[chosen].sum(axis=1).T
    low, high = np.percentile(right / total, (2.5, 97.5)).tolist()
    return low, high
