"""How well scores and rankings agree with people's: pairs of a ranking, pair accuracy, inversions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def pairs_of_ranking(ranking: Sequence[float]) -> list[tuple[int, int]]:
    """(better, worse) for every two candidates of different rank, in the order of the candidates; lower is better.

    ImageReward's training pairs (Xu et al. 2023, arXiv:2304.05977): equal ranks hold no preference.
    """
    return [
        (i, j) if ranking[i] < ranking[j] else (j, i)
        for i, j in itertools.combinations(range(len(ranking)), 2)
        if ranking[i] != ranking[j]
    ]


def pair_accuracy(scores: Sequence[float], ranking: Sequence[float]) -> float:
    """Share of the pairs of a ranking (lower is better) whose better one has the higher score, in [0, 1].

    Equal scores do not tell which is better and count as wrong, as in ImageReward's and HPSv2's evaluation. Raises
    ValueError for different lengths and for a ranking without any pair.
    """
    pairs = pairs_of_ranking(ranking)
    if len(scores) != len(ranking) or not pairs:
        raise ValueError(f"{len(scores)} scores and {len(ranking)} ranks with {len(pairs)} pairs have no accuracy")
    return sum(scores[better] > scores[worse] for better, worse in pairs) / len(pairs)


def inversion_score(predicted: Sequence[int], truth: Sequence[int]) -> float:
    """1 - inversions / (n (n - 1) / 2) of two rankings without ties: 1 for equal ones, 0 for reversed ones.

    HPDv2's measure (arXiv:2306.09341); Kendall's tau is 2 x - 1. Raises ValueError for different lengths, fewer than
    two candidates, or ties.
    """
    count = len(truth)
    if len(predicted) != count or count < 2 or len(set(predicted)) < count or len(set(truth)) < count:
        raise ValueError("inversions are of two rankings of the same two or more candidates, without ties")
    inverted = sum(
        (predicted[i] - predicted[j]) * (truth[i] - truth[j]) < 0 for i, j in itertools.combinations(range(count), 2)
    )
    return 1 - inverted / (count * (count - 1) / 2)
