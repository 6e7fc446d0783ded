"""What the guard measures: pure functions on rewards and images of groups, and the tests that it decides by.

Rows that failed (``ok`` False) may hold NaN and are left out; a value that is not finite elsewhere raises: an error is
never a number. What cannot be measured is NaN. Everything is computed in float64.

A p-value is that of a one-sided test: small values speak for the change it is named after.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from scipy.special import stdtr
from torch import Tensor

from trainer_client.advantages import group_statistics

LEAST_RANKED = 3
"""Samples that a group needs for its rank correlation: of two samples it is a coin."""


@dataclass(frozen=True)
class TrainingMetrics:
    """One training step. NaN where nothing could be measured; None where the caller does not measure it.

    ``reward_mean`` over the samples that are ok. ``group_std``: mean over groups of the unbiased standard deviation,
    in units of the reward. ``zero_std_ratio``: share of groups whose rewards are all equal. ``failed_ratio``: share of
    samples without a reward. ``diversity``: mean over groups of :func:`group_diversity`, in [0, 1]. ``drift``: from
    the reference policy, at least 0, as the algorithm reports it (KL, or mean squared velocity difference).
    """

    reward_mean: float
    group_std: float
    zero_std_ratio: float
    failed_ratio: float
    diversity: float | None = None
    drift: float | None = None

    def __post_init__(self) -> None:
        if self.drift is not None and self.drift < 0:
            raise ValueError(f"a drift is at least 0, not {self.drift}")


def training_metrics(
    rewards_B: Tensor,
    group_B: Tensor,
    *,
    ok_B: Tensor | None = None,
    images_BCHW: Tensor | None = None,
    drift: float | None = None,
) -> TrainingMetrics:
    """The metrics of one batch: rewards [B], ``group_B`` says which rows share a prompt.

    Groups with fewer than two samples that are ok have no spread and are left out. ``images_BCHW`` as in
    :func:`group_diversity`. Raises ValueError for shapes that don't fit and rewards neither finite nor masked.
    """
    if rewards_B.ndim != 1:
        raise ValueError(f"rewards are [B], not {tuple(rewards_B.shape)}")
    ok = torch.ones_like(group_B, dtype=torch.bool) if ok_B is None else ok_B.bool()
    found = group_statistics(rewards_B, group_B, ok_B=ok, ddof=1)
    std_G = found.std_G[found.size_G >= 2]
    diversity = None
    if images_BCHW is not None:
        diversity = group_diversity(images_BCHW, group_B, ok_B=ok).mean().item()
    return TrainingMetrics(
        reward_mean=rewards_B[ok].double().mean().item(),
        group_std=std_G.mean().item(),
        zero_std_ratio=(std_G == 0).double().mean().item(),
        failed_ratio=(~ok).double().mean().item(),
        diversity=diversity,
        drift=drift,
    )


def group_diversity(images_BCHW: Tensor, group_B: Tensor, *, ok_B: Tensor | None = None, size: int = 16) -> Tensor:
    """Mean pairwise distance of the images of each group: float64 [G] in [0, 1], groups by ascending id.

    The distance is the root mean square of the differences of pixels, after averaging to at most ``size`` x ``size``
    areas. Images are uint8 or floats in [0, 1]. Groups with fewer than two images that are ok are left out. It sees
    images that become alike in layout and colour, which needs no network; it does not see texture below an area.
    Raises ValueError for other dtypes and shapes, and for values outside [0, 1] that are not masked.
    """
    ok = torch.ones_like(group_B, dtype=torch.bool) if ok_B is None else ok_B.bool()
    if images_BCHW.ndim != 4 or not len(images_BCHW) == len(group_B) == len(ok):
        raise ValueError(f"images {tuple(images_BCHW.shape)}, groups {len(group_B)} and ok {len(ok)} don't fit")
    if images_BCHW.dtype != torch.uint8 and not images_BCHW.is_floating_point():
        raise ValueError(f"images are uint8 or float in [0, 1], not {images_BCHW.dtype}")
    pixels = images_BCHW[ok].double()
    if images_BCHW.dtype == torch.uint8:
        pixels = pixels / 255
    # Written so that NaN, which compares as false, is refused too.
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise ValueError("float images lie in [0, 1]")
    areas = (min(size, pixels.shape[2]), min(size, pixels.shape[3]))
    small_BD = F.adaptive_avg_pool2d(pixels, areas).flatten(1) if len(pixels) else pixels.flatten(1)
    kept_B = group_B[ok]
    found = []
    for group in torch.unique(kept_B):
        members = small_BD[kept_B == group]
        if len(members) >= 2:
            # pdist subtracts before it squares: equal images are at distance 0 exactly.
            found.append(F.pdist(members).mean() / math.sqrt(members.shape[1]))
    return torch.stack(found) if found else small_BD.new_zeros(0)


def rank_correlations(first_GN: Tensor, second_GN: Tensor, ok_GN: Tensor | None = None) -> Tensor:
    """Kendall's tau-b of two rewards within each group: float64 [G] in [-1, 1].

    tau_b = sum_{i<j} sign(a_i - a_j) sign(b_i - b_j) / sqrt(pairs untied in a * pairs untied in b) (Kendall 1945). NaN
    for a group with fewer than three samples that are ok, or in which one of the rewards is constant. Raises
    ValueError for unequal shapes and for values neither finite nor masked.
    """
    ok = torch.ones_like(first_GN, dtype=torch.bool) if ok_GN is None else ok_GN.bool()
    a, b = masked(first_GN, ok), masked(second_GN, ok)
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"rewards {tuple(a.shape)} and {tuple(b.shape)} are not both [G, N]")
    both = ok[:, :, None] & ok[:, None, :]
    sign_a = torch.where(both, a[:, :, None] - a[:, None, :], 0.0).sign()
    sign_b = torch.where(both, b[:, :, None] - b[:, None, :], 0.0).sign()
    untied = sign_a.abs().sum((1, 2)) * sign_b.abs().sum((1, 2))
    known = (ok.sum(1) >= LEAST_RANKED) & (untied > 0)
    return torch.where(known, (sign_a * sign_b).sum((1, 2)) / untied.clamp(min=1).sqrt(), torch.nan)


def group_rank_correlations(
    first_B: Tensor, second_B: Tensor, group_B: Tensor, *, ok_B: Tensor | None = None
) -> Tensor:
    """:func:`rank_correlations` of a training batch: float64 [G], groups of any size in any order, by ascending id."""
    if not first_B.shape == second_B.shape == group_B.shape or first_B.ndim != 1:
        raise ValueError(f"rewards {tuple(first_B.shape)}, {tuple(second_B.shape)} and groups don't fit")
    ok = torch.ones_like(group_B, dtype=torch.bool) if ok_B is None else ok_B.bool()
    member_GB = group_B == torch.unique(group_B)[:, None]
    found = [rank_correlations(first_B[member][None], second_B[member][None], ok[member][None]) for member in member_GB]
    return torch.cat(found) if found else first_B.new_zeros(0, dtype=torch.float64)


def masked(values: Tensor, ok: Tensor) -> Tensor:
    """float64 on the CPU, NaN where not ``ok``. Raises ValueError for another value that is not finite."""
    if values.shape != ok.shape:
        raise ValueError(f"values {tuple(values.shape)} and ok {tuple(ok.shape)} don't fit")
    if not bool((values.isfinite() | ~ok).all()):
        raise ValueError("a reward is not finite and not marked as failed")
    return torch.where(ok, values.detach().double(), torch.nan).cpu()


@dataclass(frozen=True)
class Change:
    """A mean change, its standard error, and over how many independent prompts or steps it was taken.

    ``degrees`` of freedom of Student's t. ``mean`` and ``standard_error`` are NaN for fewer than two.
    """

    mean: float
    standard_error: float
    count: int
    degrees: float

    @property
    def p_rise(self) -> float:
        """Of the one-sided t-test against "the mean did not rise"; NaN when unknown."""
        return _p_above(self.mean, self.standard_error, self.degrees)

    @property
    def p_fall(self) -> float:
        """Of the one-sided t-test against "the mean did not fall"; NaN when unknown."""
        return _p_above(-self.mean, self.standard_error, self.degrees)


def paired_change(before_PS: Tensor, after_PS: Tensor) -> Change:
    """How scores [prompts, seeds] (NaN: failed) changed, paired by prompt and seed.

    A pair counts when both are known. Differences are averaged within a prompt first, for seeds of one prompt are no
    independent witnesses: t = mean / (std / sqrt(P)) over the P prompts that have a pair, P - 1 degrees of freedom.
    Raises ValueError for unequal shapes.
    """
    if before_PS.shape != after_PS.shape or before_PS.ndim != 2:
        raise ValueError(f"scores of {tuple(before_PS.shape)} and {tuple(after_PS.shape)} cannot be paired")
    return mean_above((after_PS - before_PS).nanmean(1).tolist(), 0.0)


def mean_above(values: Sequence[float], limit: float) -> Change:
    """Mean of independent ``values`` (NaN: left out) minus ``limit``: one-sample t-test."""
    known = [value for value in values if not math.isnan(value)]
    if len(known) < 2:
        return Change(math.nan, math.nan, len(known), math.nan)
    mean = statistics.fmean(known)
    error = math.sqrt(_variance(known, mean) / len(known))
    return Change(mean - limit, error, len(known), len(known) - 1)


def fall_beyond(baseline: Sequence[float], recent: Sequence[float], limit: float) -> Change:
    """By how much ``recent`` lies above (1 - limit) of the baseline; ``p_fall`` says it fell by more than ``limit``.

    Welch's t-test of mean(recent) against (1 - limit) mean(baseline): unequal variances, Satterthwaite's degrees of
    freedom. ``limit`` is a share in (0, 1). NaN for fewer than two values on a side.
    """
    count = min(len(baseline), len(recent))
    if count < 2:
        return Change(math.nan, math.nan, count, math.nan)
    kept = 1 - limit
    mean, before = statistics.fmean(recent), statistics.fmean(baseline)
    difference = mean - kept * before
    parts = [
        (_variance(recent, mean) / len(recent), len(recent) - 1),
        (kept**2 * _variance(baseline, before) / len(baseline), len(baseline) - 1),
    ]
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / degrees for part, degrees in parts)
    degrees = variance**2 / spread if spread > 0 else float(count - 1)
    return Change(difference, math.sqrt(variance), count, degrees)


def pooled_std(before_PS: Tensor, after_PS: Tensor) -> float:
    """Root of the mean variance of two evaluations over their samples: the unit of Cohen's d. NaN when unknown."""
    known = [values[~values.isnan()] for values in (before_PS, after_PS)]
    if min(len(values) for values in known) < 2:
        return math.nan
    return math.sqrt(statistics.fmean(values.var().item() for values in known))


def _variance(values: Sequence[float], mean: float) -> float:
    # The standard library's is exact in rational numbers, and a hundred times slower.
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def with_wobble(change: Change, jumps: Sequence[float], errors: Sequence[float]) -> Change:
    """The change, with the noise that all prompts of an evaluation share in its standard error.

    ``jumps`` are the mean's changes from each evaluation to the next, ``errors`` their standard errors over prompts.
    What is noise in the jumps shows in their bends, the differences of successive ones: a steady trend has none. The
    variance of a jump is (1.4826 x the median size of the bends)^2 / 2, which one sudden fall leaves alone; that is so
    where the mean walks at random, and 1.5 times too much where it wobbles independently about a line: the careful
    side. The prompts explain the median of ``errors``^2 of it, and the rest is shared: it adds to the change's
    own variance, with Satterthwaite's degrees of freedom, in which each bend counts as one.
    Fewer than two jumps change nothing.
    """
    bends = [abs(after - before) for before, after in pairwise(jumps)]
    if not bends:
        return change
    jump_variance = (1.4826 * statistics.median(bends)) ** 2 / 2
    shared = max(0.0, jump_variance - statistics.median(error**2 for error in errors))
    parts = [(change.standard_error**2, change.degrees), (shared, float(len(bends)))]
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / degrees for part, degrees in parts)
    degrees = variance**2 / spread if spread > 0 else change.degrees
    return replace(change, standard_error=math.sqrt(variance), degrees=degrees)


def _p_above(mean: float, standard_error: float, degrees: float) -> float:
    if math.isnan(mean):
        return math.nan
    if standard_error == 0:
        return 0.0 if mean > 0 else 1.0
    return float(stdtr(degrees, -mean / standard_error))
