"""Rewards of groups -> advantages: group statistics, several rewards, win rates.

Rewards are [B], or [B, T] with statistics of each column by itself; ``group_B`` says which rows share a prompt (any
integers, in any order, groups of any size). ``ok_B`` is False where a sample failed: such a row may hold NaN, is left
out of every statistic, and its advantage is exactly 0. A reward that is not finite elsewhere raises: an error is never
a number. Everything is computed in float64, and returned so.

A group whose rewards are all equal says nothing about its samples: its advantages are exactly 0. "Equal" allows for
rounding (``resolution``): dividing rounding errors by their own standard deviation makes advantages near 1 out of
nothing, which is what published implementations do with eight rewards of 0.333 in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Scale: TypeAlias = Literal["group", "batch"]
"""Whose standard deviation divides: each group's own, or that of all rows of the batch."""


@dataclass(frozen=True)
class Spread:
    """How a standard deviation becomes a divisor.

    ``ddof`` is 0 (population) or 1 (unbiased; a group of one has no spread then, and its advantage is 0). ``eps`` is
    added to it, or with ``floor`` the least that it can be.
    """

    ddof: Literal[0, 1] = 0
    eps: float = 1e-4
    floor: bool = False

    def divisor(self, std: Tensor) -> Tensor:
        """std + eps, or max(std, eps)."""
        return std.clamp(min=self.eps) if self.floor else std + self.eps


FLOW_GRPO = Spread()
"""Flow-GRPO (arXiv 2505.05470) and DiffusionNFT: population std + 1e-4."""
PREF_GRPO = Spread(ddof=1, eps=1e-8)
"""Pref-GRPO (arXiv 2508.20751): unbiased std + 1e-8."""
FLOW_FACTORY = Spread(eps=1e-6, floor=True)
"""Flow-Factory: population std, at least 1e-6."""


@dataclass(frozen=True)
class GroupStatistics:
    """Statistics of the groups that have at least one row that is ok, by ascending id.

    ``group_G`` ids; ``size_G`` rows that are ok; ``mean_G``, ``std_G`` [G] or [G, T] float64, ``std_G`` exactly 0 for
    constant groups.
    """

    group_G: Tensor
    size_G: Tensor
    mean_G: Tensor
    std_G: Tensor

    @property
    def zero_std_ratio(self) -> float:
        """Share of groups (and columns) without any spread, which teach nothing; NaN for no groups."""
        return (self.std_G == 0).double().mean().item()


def group_advantages(
    rewards_B: Tensor,
    group_B: Tensor,
    *,
    ok_B: Tensor | None = None,
    scale: Scale = "group",
    spread: Spread = FLOW_GRPO,
    resolution: float | None = None,
) -> Tensor:
    """(r - mean of its group) / divisor(std of its group or of the batch): float64 of the shape of ``rewards_B``.

    GRPO's advantage (Shao et al. 2024, arXiv 2402.03300), with the batch's std as Flow-GRPO does by default. Rewards
    of a group that differ by at most ``resolution`` count as equal (None: by 4 units in the last place of the dtype of
    ``rewards_B``). Raises ValueError for shapes that don't fit and for rewards that are neither finite nor masked.
    """
    values, ok = _checked(rewards_B, group_B, ok_B)
    if resolution is None:
        resolution_B = 4 * torch.finfo(_float_dtype(rewards_B)).eps * values.abs()
    else:
        resolution_B = torch.full_like(values, resolution)
    return _normalised(values, group_B, ok, scale, spread, resolution_B)


def group_statistics(
    rewards_B: Tensor, group_B: Tensor, *, ok_B: Tensor | None = None, ddof: Literal[0, 1] = 0
) -> GroupStatistics:
    """Mean and standard deviation of each group that has a row that is ok. Raises as :func:`group_advantages`."""
    values, ok = _checked(rewards_B, group_B, ok_B)
    resolution_B = 4 * torch.finfo(_float_dtype(rewards_B)).eps * values.abs()
    ids_G, member_GB = _members(group_B, ok)
    mean_G, deviation_GB = _deviations(values, member_GB, resolution_B)
    std_G = _std(deviation_GB, member_GB, ddof)
    return GroupStatistics(ids_G, member_GB.sum(1), mean_G, std_G)


def mean_of_top(rewards_B: Tensor, group_B: Tensor, percent: float, *, ok_B: Tensor | None = None) -> float:
    """Mean over groups of the mean reward of each group's best ``percent`` (0 to 100]: what best-of-n would get.

    A group's best are its rewards (of all columns) at or above its (100 - percent)th percentile, linearly
    interpolated. NaN when no row is ok. Raises ValueError for another percentage, and as :func:`group_advantages`.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"a share of a group is in (0, 100] percent, not {percent}")
    values, ok = _checked(rewards_B, group_B, ok_B)
    means = []
    for member in _members(group_B, ok)[1]:
        inside = values[member]
        means.append(inside[inside >= inside.quantile(1 - percent / 100)].mean())
    return torch.stack(means).mean().item() if means else math.nan


def check_group_sizes(group_B: Tensor, size: int) -> None:
    """Raises ValueError unless every group has ``size`` rows: a sampler that lost or doubled one is not seen else."""
    ids_G, counts_G = torch.unique(group_B, return_counts=True)
    wrong = {int(i): int(n) for i, n in zip(ids_G, counts_G, strict=True) if n != size}
    if wrong:
        raise ValueError(f"groups of {size} rows are expected; by group: {wrong}")


def weighted_sum(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], ok: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Total reward sum_k w_k r_k, float64 [B], and where it is known: a sample that failed one reward has no total.

    Totals of failed samples are NaN. They are no more exact than the rewards were: where rewards may cancel, tell
    :func:`group_advantages` the ``resolution``. Raises ValueError when names or shapes differ.
    """
    rewards, ok_B = _aligned(rewards, weights, ok)
    total = sum((weights[name] * rewards[name].double() for name in weights), torch.zeros((), dtype=torch.float64))
    return torch.where(_like_rows(ok_B, total), total, torch.nan), ok_B


def combined_advantages(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group_B: Tensor,
    *,
    ok: Mapping[str, Tensor] | None = None,
    scale: Scale = "group",
    spread: Spread = FLOW_FACTORY,
    standardise: bool = True,
) -> Tensor:
    """Every reward normalised by itself, then the weighted sum of the advantages: float64 [B].

    With ``standardise`` the sum is normalised once more, over the whole batch: GDPO (Flow-Factory's and Pref-GRPO's
    ``gdpo``); without, Pref-GRPO's default. A reward's scale then has no say in its weight. A sample that failed one
    reward is left out of the statistics of all. Raises ValueError as :func:`group_advantages`.
    """
    rewards, ok_B = _aligned(rewards, weights, ok)
    terms = [
        weights[name] * group_advantages(rewards[name], group_B, ok_B=ok_B, scale=scale, spread=spread)
        for name in weights
    ]
    return standardised(terms, ok_B, spread) if standardise else torch.stack(terms).sum(0)


def standardised(terms: list[Tensor], ok_B: Tensor | None = None, spread: Spread = FLOW_FACTORY) -> Tensor:
    """The sum of ``terms`` (each [B]) minus its mean over the batch, by divisor(its std): float64 [B].

    The sum counts as constant when it varies by less than rounding of the terms can explain. Raises ValueError as
    :func:`group_advantages`.
    """
    stacked = torch.stack([term.double() for term in terms])
    one_group = torch.zeros(stacked.shape[1], dtype=torch.long, device=stacked.device)
    values, ok = _checked(stacked.sum(0), one_group, ok_B)
    resolution_B = 4 * torch.finfo(torch.float64).eps * stacked.abs().sum(0).nan_to_num()
    return _normalised(values, one_group, ok, "batch", spread, resolution_B)


def blended(
    first_B: Tensor, second_B: Tensor, weight_first: float, weight_second: float, blend_B: Tensor | None = None
) -> Tensor:
    """(w_1 a_1 + w_2 a_2) / (w_1 + w_2) where ``blend_B`` is True (None: everywhere), else a_1.

    For a judge that gives an overall verdict and scores of dimensions (UnifiedReward-Flex). A second weight of 0 or
    less leaves ``first_B``. Raises ValueError when the weights don't have a positive sum.
    """
    if weight_second <= 0:
        return first_B
    if weight_first + weight_second <= 0:
        raise ValueError(f"weights {weight_first} and {weight_second} have no positive sum")
    both = (weight_first * first_B + weight_second * second_B) / (weight_first + weight_second)
    return both if blend_B is None else torch.where(blend_B, both, first_B)


def win_rates(probability_NN: Tensor, *, decimals: int | None = None) -> tuple[Tensor, Tensor]:
    """Pref-GRPO's reward (arXiv 2508.20751): how often each of N candidates beats the others of its group.

    ``probability_NN[i, j]`` is the probability that i is preferred to j (1 won, 0 lost, 0.5 tied), NaN where the pair
    was not judged or the judgement failed; the diagonal is not read. The rate is the mean over the judged opponents,
    float64 [N]; ``ok_N`` is False, and the rate NaN, for a candidate with no judged opponent. ``decimals`` rounds, as
    the reference does (3). Raises ValueError for another shape, values outside [0, 1], or P(i, j) + P(j, i) other
    than 1 (within 1e-3), and when only one of the two is known.
    """
    count = len(probability_NN)
    if probability_NN.shape != (count, count):
        raise ValueError(f"preferences are [N, N], not {tuple(probability_NN.shape)}")
    wins = probability_NN.double().masked_fill(
        torch.eye(count, dtype=torch.bool, device=probability_NN.device), torch.nan
    )
    judged = ~wins.isnan()
    both_ways = (wins + wins.T - 1).abs() <= 1e-3
    if not bool((both_ways | ~(judged | judged.T)).all()):
        raise ValueError("P(i, j) and P(j, i) must add up to 1 wherever one of them is known")
    if not bool(((wins >= 0) & (wins <= 1) | ~judged).all()):
        raise ValueError("preferences are probabilities in [0, 1]")
    rate = wins.nan_to_num().sum(1) / judged.sum(1)
    return rate if decimals is None else rate.round(decimals=decimals), judged.any(1)


def best_of_group(rewards_B: Tensor, group_B: Tensor, *, ok_B: Tensor | None = None) -> Tensor:
    """1 for each sample with its group's largest reward, else 0: Flow-GRPO's SFT baseline. float64 [B]."""
    values, ok = _checked(rewards_B, group_B, ok_B)
    _, member_GB = _members(group_B, ok)
    top_G, _ = _extremes(values, member_GB)
    inside = member_GB if values.ndim == 1 else member_GB[..., None]
    return (inside & (values == top_G[:, None])).any(0).double()


def best_and_worst(rewards_B: Tensor, group_B: Tensor, *, ok_B: Tensor | None = None) -> Tensor:
    """+1 for each group's first largest reward, -1 for its first smallest, else 0: Flow-DPO's pairs. float64 [B].

    A group of equal rewards holds no preference and gives no pair. Rewards are [B] here; [B, T] raises ValueError.
    """
    values, ok = _checked(rewards_B, group_B, ok_B)
    if values.ndim != 1:
        raise ValueError(f"pairs are made of rewards [B], not {tuple(values.shape)}")
    _, member_GB = _members(group_B, ok)
    sign_B = torch.zeros_like(values)
    for rows in (member.nonzero()[:, 0] for member in member_GB):
        best, worst = rows[values[rows].argmax()], rows[values[rows].argmin()]
        if values[best] > values[worst]:
            sign_B[best], sign_B[worst] = 1.0, -1.0
    return sign_B


def _float_dtype(values: Tensor) -> torch.dtype:
    return values.dtype if values.is_floating_point() else torch.float64


def _checked(rewards_B: Tensor, group_B: Tensor, ok_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """float64 rewards with zeros where they failed, and which did not."""
    ok = torch.ones_like(group_B, dtype=torch.bool) if ok_B is None else ok_B.bool()
    if rewards_B.ndim not in (1, 2) or not len(rewards_B) == len(group_B) == len(ok) or group_B.ndim != 1:
        raise ValueError(
            f"rewards {tuple(rewards_B.shape)}, groups {tuple(group_B.shape)} and ok {tuple(ok.shape)} don't fit"
        )
    rows = _like_rows(ok, rewards_B)
    if not bool((rewards_B.isfinite() | ~rows).all()):
        raise ValueError("a reward is not finite and not marked as failed")
    return torch.where(rows, rewards_B.double(), 0.0), ok


def _like_rows(flags_B: Tensor, values: Tensor) -> Tensor:
    return flags_B.reshape(-1, *[1] * (values.ndim - 1))


def _members(group_B: Tensor, ok_B: Tensor) -> tuple[Tensor, Tensor]:
    """Ids of the groups with a row that is ok, and bool [G, B]: which rows those are."""
    ids_G = torch.unique(group_B[ok_B])
    return ids_G, (group_B == ids_G[:, None]) & ok_B


def _extremes(values: Tensor, member_GB: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and smallest reward of each group."""
    if not len(values):
        none = values.new_zeros((len(member_GB), *values.shape[1:]))
        return none, none
    inside = member_GB if values.ndim == 1 else member_GB[..., None]
    return values.masked_fill(~inside, -torch.inf).amax(1), values.masked_fill(~inside, torch.inf).amin(1)


def _deviations(values: Tensor, member_GB: Tensor, resolution_B: Tensor) -> tuple[Tensor, Tensor]:
    """Group means [G, ...] and deviations [G, B, ...], 0 outside the group and in constant groups."""
    inside = member_GB if values.ndim == 1 else member_GB[..., None]
    count_G = inside.sum(1).clamp(min=1)
    mean_G = torch.where(inside, values, 0.0).sum(1) / count_G
    top_G, bottom_G = _extremes(values, member_GB)
    tolerance_G, _ = _extremes(resolution_B, member_GB)
    varies_G = (top_G - bottom_G) > tolerance_G
    return mean_G, torch.where(inside & varies_G[:, None], values - mean_G[:, None], 0.0)


def _std(deviation_GB: Tensor, member_GB: Tensor, ddof: int) -> Tensor:
    count_G = member_GB.sum(1) - ddof
    count_G = count_G if deviation_GB.ndim == 2 else count_G[:, None]
    return (deviation_GB.square().sum(1) / count_G.clamp(min=1)).sqrt()


def _normalised(
    values: Tensor, group_B: Tensor, ok_B: Tensor, scale: Scale, spread: Spread, resolution_B: Tensor
) -> Tensor:
    if scale not in ("group", "batch"):
        raise ValueError(f"scale is 'group' or 'batch', not {scale!r}")
    _, member_GB = _members(group_B, ok_B)
    _, deviation_GB = _deviations(values, member_GB, resolution_B)
    if scale == "group":
        std_G = _std(deviation_GB, member_GB, spread.ddof)
    else:
        everyone = ok_B[None]
        _, from_batch = _deviations(values, everyone, resolution_B)
        std_G = _std(from_batch, everyone, spread.ddof)
    # Each row belongs to one group at most: the sum over groups picks its own.
    return (deviation_GB / spread.divisor(std_G)[:, None]).sum(0)


def _aligned(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], ok: Mapping[str, Tensor] | None
) -> tuple[Mapping[str, Tensor], Tensor]:
    """Rewards of one shape and which rows every one of them is known for."""
    if not weights or set(rewards) != set(weights) or not set(ok or {}) <= set(weights):
        raise ValueError(f"rewards {sorted(rewards)}, weights {sorted(weights)} and ok {sorted(ok or {})} differ")
    if len({tuple(values.shape) for values in rewards.values()}) != 1:
        raise ValueError(f"rewards differ in shape: { {name: tuple(r.shape) for name, r in rewards.items()} }")
    first = next(iter(rewards.values()))
    ok_B = torch.ones(len(first), dtype=torch.bool, device=first.device)
    for flags in (ok or {}).values():
        ok_B = ok_B & flags
    return rewards, ok_B
