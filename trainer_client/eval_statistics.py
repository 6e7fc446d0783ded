"""Statistics of evaluations: means with intervals, differences of two policies, wins. Pure functions.

Scores are [P, S]: P prompts by S seeds. Prompts are the unit: the seeds of a prompt are averaged first, for they are
no independent witnesses of how the policy does on prompts. Failed samples (``ok`` False) may hold NaN and are left
out; any other value that is not finite raises ValueError. What cannot be known is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from trainer_client.guard_metrics import Change, mean_above

Array: TypeAlias = Any
"""What numpy makes an array of: nested lists, arrays, tensors on the CPU."""
Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean over ``prompts`` prompts with the ends of its confidence interval; NaN for what is unknown.

    ``low`` and ``high`` are NaN for fewer than two prompts. ``samples`` entered it, and ``failed`` had no score.
    """

    mean: float
    low: float
    high: float
    prompts: int
    samples: int
    failed: int


@dataclass(frozen=True)
class PairedDifference:
    """How much higher the first policy scores: ``difference``, with the two-sided ``p_value`` of the paired t-test.

    ``improved``, ``tied`` and ``worse`` are shares of the prompts that both have scores of; they add up to 1.
    """

    difference: Interval
    p_value: float
    improved: float
    tied: float
    worse: float


@dataclass(frozen=True)
class Wins:
    """On how many prompts the first policy's image of one seed scores higher, the same, or lower."""

    won: int
    tied: int
    lost: int


@dataclass(frozen=True)
class WinRate:
    """Which of two policies a judge prefers, in [0, 1]: above 0.5 it is the first.

    ``win_rate``: share of images preferred, a tie counts half; ``p_value`` of the two-sided t-test against 0.5.
    ``probability``: the mean of the judge's probabilities.
    """

    win_rate: Interval
    p_value: float
    probability: Interval


def masked_scores(scores_PS: Array, ok_PS: Array | None = None) -> Floats:
    """float64 [P, S], NaN where not ``ok``; without ``ok`` NaN itself says that a sample failed.

    Raises ValueError for other shapes, and for a value that is neither finite nor masked.
    """
    scores = np.asarray(scores_PS, dtype=np.float64)
    ok = ~np.isnan(scores) if ok_PS is None else np.asarray(ok_PS, dtype=bool)
    if scores.ndim != 2 or scores.shape != ok.shape:
        raise ValueError(f"scores {scores.shape} and ok {ok.shape} are not both [prompts, seeds]")
    if not np.isfinite(scores[ok]).all():
        raise ValueError("a score is not finite and not marked as failed")
    return np.where(ok, scores, np.nan)


def prompt_means(scores_PS: Array, ok_PS: Array | None = None) -> Floats:
    """Means [P] over the seeds of each prompt; NaN for a prompt of which every sample failed."""
    scores = masked_scores(scores_PS, ok_PS)
    count_P = (~np.isnan(scores)).sum(axis=1)
    return np.where(count_P > 0, np.nansum(scores, axis=1) / np.maximum(count_P, 1), np.nan)


def mean_interval(scores_PS: Array, ok_PS: Array | None = None, *, level: float = 0.95) -> Interval:
    """The mean over prompts of their means over seeds, with Student's t interval of confidence ``level``.

    mean +- t_{P - 1}((1 + level) / 2) std / sqrt(P), over the P prompts that have a score.
    """
    return _interval(masked_scores(scores_PS, ok_PS), level)


def paired_difference(
    scores_PS: Array,
    against_PS: Array,
    ok_PS: Array | None = None,
    against_ok_PS: Array | None = None,
    *,
    level: float = 0.95,
) -> PairedDifference:
    """``scores`` minus ``against``, paired by prompt and seed: a pair counts when both samples have a score."""
    differences_PS = _differences(scores_PS, against_PS, ok_PS, against_ok_PS)
    means = prompt_means(differences_PS)
    known = means[~np.isnan(means)]
    improved, tied, worse = (_share(known, chosen) for chosen in (known > 0, known == 0, known < 0))
    return PairedDifference(
        _interval(differences_PS, level), two_sided_p(mean_above(known.tolist(), 0.0)), improved, tied, worse
    )


def seed_wins(
    scores_PS: Array, against_PS: Array, ok_PS: Array | None = None, against_ok_PS: Array | None = None
) -> list[Wins]:
    """For each of the S seeds, how many prompts the first policy wins; pairs as in :func:`paired_difference`."""
    differences_PS = _differences(scores_PS, against_PS, ok_PS, against_ok_PS)
    return [Wins(int((seed > 0).sum()), int((seed == 0).sum()), int((seed < 0).sum())) for seed in differences_PS.T]


def win_rate(probabilities_PS: Array, ok_PS: Array | None = None, *, level: float = 0.95) -> WinRate:
    """Of a judge's probabilities [P, S] that the first policy's image is preferred to the other's.

    Raises ValueError for one outside [0, 1].
    """
    probabilities = masked_scores(probabilities_PS, ok_PS)
    known = probabilities[~np.isnan(probabilities)]
    if ((known < 0) | (known > 1)).any():
        raise ValueError("probabilities lie in [0, 1]")
    wins = np.where(np.isnan(probabilities), np.nan, (np.sign(probabilities - 0.5) + 1) / 2)
    change = mean_above(prompt_means(wins).tolist(), 0.5)
    return WinRate(_interval(wins, level), two_sided_p(change), _interval(probabilities, level))


def two_sided_p(change: Change) -> float:
    """The p-value of the two-sided t-test against no change: 1 where nothing changed at all, NaN when unknown."""
    return min(1.0, 2 * min(change.p_rise, change.p_fall)) if not math.isnan(change.mean) else math.nan


def rows_by_tag(tags: Sequence[str]) -> dict[str, list[int]]:
    """Which prompts carry each tag, in the order of its first appearance; prompts without one are left out."""
    rows: dict[str, list[int]] = {}
    for row, tag in enumerate(tags):
        if tag:
            rows.setdefault(tag, []).append(row)
    return rows


def finite_or_none(value: Any) -> Any:
    """The same nested mappings and lists with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite_or_none(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _differences(scores_PS: Array, against_PS: Array, ok_PS: Array | None, against_ok_PS: Array | None) -> Floats:
    first, second = masked_scores(scores_PS, ok_PS), masked_scores(against_PS, against_ok_PS)
    if first.shape != second.shape:
        raise ValueError(f"scores of {first.shape} and {second.shape} cannot be paired")
    difference: Floats = first - second
    return difference


def _interval(scores: Floats, level: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"a confidence level lies in (0, 1), not {level}")
    means = prompt_means(scores)
    known = means[~np.isnan(means)]
    samples = int((~np.isnan(scores)).sum())
    mean = float(known.mean()) if len(known) else math.nan
    change = mean_above(known.tolist(), 0.0)
    half = float(stdtrit(change.degrees, (1 + level) / 2)) * change.standard_error
    return Interval(mean, mean - half, mean + half, len(known), samples, scores.size - samples)


def _share(values: Floats, chosen: npt.NDArray[np.bool_]) -> float:
    return float(chosen.sum() / len(values)) if len(values) else math.nan
