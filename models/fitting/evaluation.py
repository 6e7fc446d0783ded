"""How well a reward model or a judge agrees with people, as the papers measure it, with intervals; NumPy only.

A *pair* has a ``label`` in [0, 1], how far people prefer its first image (0.5 is a tie), and a ``margin``, whose sign
is the model's verdict: a score difference, or a judge's probability minus one half. A ``prompt`` index groups pairs
that are not independent: intervals are drawn over prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]

TIE_THRESHOLDS = tuple(round(0.1 * i, 1) for i in range(11))
"""The thresholds on the probability gap that Pick-a-Pic's evaluation tries (arXiv:2305.01569, section 4)."""


@dataclass(frozen=True, eq=False)
class JudgedPairs:
    """Pairs of people and model, all arrays [N]: margin (sign is the verdict), probability of the first in [0, 1],
    label in [0, 1], prompt index, weight > 0. Raises ValueError for other shapes and values."""

    margin: Floats
    probability: Floats
    label: Floats
    prompt: Ints
    weight: Floats

    def __post_init__(self) -> None:
        shapes = {getattr(self, each.name).shape for each in fields(self)}
        if len(shapes) > 1 or len(next(iter(shapes))) != 1:
            raise ValueError(f"pairs are arrays of one length, not {sorted(shapes)}")
        if not np.isfinite(self.margin).all():
            raise ValueError("margins are finite numbers")
        for name in ("probability", "label"):
            values = getattr(self, name)
            if not ((values >= 0) & (values <= 1)).all():
                raise ValueError(f"a {name} is in [0, 1]")
        if not ((self.weight > 0) & np.isfinite(self.weight)).all():
            raise ValueError("weights are positive and finite")

    def __len__(self) -> int:
        return len(self.margin)

    def where(self, chosen: NDArray[np.bool_]) -> JudgedPairs:
        """The pairs of a mask [N]."""
        return JudgedPairs(*(getattr(self, each.name)[chosen] for each in fields(self)))

    @property
    def untied(self) -> JudgedPairs:
        """The pairs that people decided."""
        return self.where(self.label != 0.5)


@dataclass(frozen=True)
class Estimate:
    """A mean over ``count`` things with its 95 % bootstrap interval; None where nothing, or one prompt, was there."""

    value: float | None
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class ReliabilityBin:
    """Pairs whose verdict has a probability in [low, high): their number, total weight, mean probability, and how often
    people agree; the last bin holds 1 too."""

    low: float
    high: float
    count: int
    weight: float
    confidence: float
    agreement: float


@dataclass(frozen=True)
class PositionBias:
    """``bias``: mean probability of the image shown first, minus one half, in [-.5, .5]; ``flips``: share of the pairs
    whose verdict is the other image when the order is turned."""

    bias: Estimate
    flips: Estimate


# ------------------------------------------------------------------------------------------------ agreement of pairs


def right_of_untied(pairs: JudgedPairs) -> Floats:
    """1 where the model's verdict is people's, else 0, [N]; equal scores tell nothing and are wrong.

    The pooled accuracy of ImageReward's test (arXiv:2304.05977) and of HPSv3's, mean(mu_1 > mu_2) (arXiv:2508.03789),
    and GenAI-Bench's "diff" are its mean. Raises ValueError for a tie of people's.
    """
    if (pairs.label == 0.5).any():
        raise ValueError("pairs that people tied have no right verdict")
    return np.asarray(np.sign(pairs.margin) == np.sign(pairs.label - 0.5), dtype=np.float64)


def credit_with_ties(pairs: JudgedPairs, threshold: float, half: float = 0.5) -> Floats:
    """1 where verdicts of three (first, second, tie) are equal, ``half`` where exactly one is a tie, else 0, [N].

    The model ties where |p - (1 - p)| <= threshold, in [0, 1]. ``half`` 0.5 is Pick-a-Pic's rule (arXiv:2305.01569),
    0 counts equal verdicts alone, as GenAI-Bench's "tau" does.
    """
    verdict = np.where(np.abs(2 * pairs.probability - 1) <= threshold, 0.0, np.sign(pairs.margin))
    truth = np.sign(pairs.label - 0.5)
    one_tie = (verdict == 0) != (truth == 0)
    return np.where(verdict == truth, 1.0, np.where(one_tie, half, 0.0))


def best_tie_threshold(pairs: JudgedPairs, thresholds: Sequence[float] = TIE_THRESHOLDS, half: float = 0.5) -> float:
    """The threshold of the highest weighted mean credit, the smallest of equals; for pairs that are not tested on.

    Raises ValueError for no pairs.
    """
    if not len(pairs):
        raise ValueError("a threshold is tuned on at least one pair")
    means = np.array([np.average(credit_with_ties(pairs, t, half), weights=pairs.weight) for t in thresholds])
    # Equal credits summed in another order differ in the last digits.
    return thresholds[int(np.argmax(means >= means.max() - 1e-9))]


# -------------------------------------------------------------------------------------------- agreement of rankings


def ranking_agreement(scores: Floats, ranks: Floats) -> float:
    """1 - inversions / (n (n - 1) / 2) of scores [n] (higher better) and ranks [n] (lower better), in [0, 1].

    HPDv2's measure of one prompt (arXiv:2306.09341). A tie of people's is no inversion; a tie of scores between images
    of different rank is half of one, what breaking it by chance gives. Without ties it is
    :func:`models.fitting.agreement.inversion_score`. Raises ValueError for other than two or more of each.
    """
    if scores.shape != ranks.shape or scores.ndim != 1 or len(scores) < 2:
        raise ValueError(f"scores {scores.shape} and ranks {ranks.shape} are of the same two or more images")
    first, second = np.triu_indices(len(scores), 1)
    better, model = np.sign(ranks[second] - ranks[first]), np.sign(scores[first] - scores[second])
    inverted = np.where(better == 0, 0.0, np.where(model == 0, 0.5, better != model))
    return float(1 - inverted.mean())


def kendall_tau_b(scores: Floats, ranks: Floats) -> float | None:
    """Kendall's tau-b of scores [n] (higher better) and ranks [n] (lower better), in [-1, 1].

    None where all scores, or all ranks, are equal: there is no order to agree with.
    """
    if len(set(scores.tolist())) < 2 or len(set(ranks.tolist())) < 2:
        return None
    return float(kendalltau(scores, -ranks, variant="b").statistic)


# ------------------------------------------------------------------------------------------------------ intervals


def weighted_mean(
    values: Floats, prompt: Ints, weight: Floats | None = None, *, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of ``values`` [N] with the percentile interval of a bootstrap over prompts (Efron and Tibshirani 1993).

    Values of one prompt are drawn together, since they are not independent. One prompt alone has no interval.
    """
    if not len(values):
        return Estimate(None, None, None, 0)
    weight = np.ones(len(values)) if weight is None else weight
    mean = float(np.average(values, weights=weight))
    _, place = np.unique(prompt, return_inverse=True)
    sums, masses = np.bincount(place, values * weight), np.bincount(place, weight)
    prompts = len(sums)
    if prompts < 2:
        return Estimate(mean, None, None, len(values))
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        drawn = rng.integers(0, prompts, prompts)
        means[i] = sums[drawn].sum() / masses[drawn].sum()
    low, high = np.percentile(means, (2.5, 97.5))
    return Estimate(mean, float(low), float(high), len(values))


# ------------------------------------------------------------------------------------------- calibration and order


def reliability(pairs: JudgedPairs, bins: int = 10) -> list[ReliabilityBin]:
    """``bins`` equal bins of the verdict's probability, max(p, 1 - p) in [0.5, 1], empty ones left out.

    Agreement is the label in the verdict's direction (1/2 for a tie of people's, or for p = 1/2); which image is named
    first changes nothing. Guo et al. 2017 (arXiv:1706.04599), weighted.
    """
    confidence = np.maximum(pairs.probability, 1 - pairs.probability)
    agreement = np.where(pairs.probability > 0.5, pairs.label, 1 - pairs.label)
    agreement = np.where(pairs.probability == 0.5, 0.5, agreement)
    edges = np.linspace(0.5, 1.0, bins + 1)
    place = np.minimum(np.searchsorted(edges, confidence, side="right") - 1, bins - 1)
    table = []
    for number in np.unique(place).tolist():
        inside = place == number
        weight = pairs.weight[inside]
        table.append(
            ReliabilityBin(
                low=float(edges[number]),
                high=float(edges[number + 1]),
                count=int(inside.sum()),
                weight=float(weight.sum()),
                confidence=float(np.average(confidence[inside], weights=weight)),
                agreement=float(np.average(agreement[inside], weights=weight)),
            )
        )
    return table


def expected_calibration_error(pairs: JudgedPairs, bins: int = 10) -> float:
    """Mean |confidence - agreement| over the bins of :func:`reliability`, by their weight; in [0, 1].

    Raises ValueError for no pairs.
    """
    if not len(pairs):
        raise ValueError("no pairs have no calibration")
    table = reliability(pairs, bins)
    gaps = [abs(row.confidence - row.agreement) for row in table]
    return float(np.average(gaps, weights=[row.weight for row in table]))


def position_bias(first_shown: Floats, second_shown: Floats, prompt: Ints, *, seed: int = 0) -> PositionBias:
    """What the order of showing does to a judge; all [N], one entry a pair judged in both orders.

    Both arrays are the probability of the *same* image i: ``first_shown`` with i shown first, ``second_shown`` with i
    shown second. An unbiased judge has equal ones.
    """
    if first_shown.shape != second_shown.shape or first_shown.shape != prompt.shape:
        raise ValueError(f"orders {first_shown.shape} and {second_shown.shape} of {prompt.shape} prompts")
    bias = (first_shown + (1 - second_shown)) / 2 - 0.5
    flips = ((first_shown - 0.5) * (second_shown - 0.5) < 0).astype(np.float64)
    return PositionBias(weighted_mean(bias, prompt, seed=seed), weighted_mean(flips, prompt, seed=seed))


def by_prompt(
    measure: Callable[[Floats, Floats], float | None], scores: Sequence[Floats], ranks: Sequence[Floats], seed: int = 0
) -> tuple[Estimate, int]:
    """Mean over prompts of a measure of (scores, ranks), and how many prompts have none (None)."""
    found = [measure(each, truth) for each, truth in zip(scores, ranks, strict=True)]
    values = np.array([value for value in found if value is not None], dtype=np.float64)
    return weighted_mean(values, np.arange(len(values)), seed=seed), len(found) - len(values)
