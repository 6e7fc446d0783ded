"""How the guard is configured, and one look at one signal: does it fire, and on which numbers?"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from trainer_client.guard_metrics import Change, fall_beyond, mean_above, paired_change, pooled_std, with_wobble

LookState: TypeAlias = Literal["fires", "holds", "clear", "unknown"]
"""Beyond the limit for sure; neither; well within the limit; not enough data."""
KEPT_TO_BE_BEST = 0.9
"""An evaluation that lost more of the prompts is compared, but never becomes the best: later ones would lack pairs."""

LEAST_JUMPS = 3
"""Changes between successive evaluations that a judgement needs: fewer don't tell how much the mean jumps about."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What is watched, and how sure the guard must be. Raises ValueError for values out of range."""

    reward: str
    """Name of the training reward (or of the weighted total) in the evaluations."""
    heldout: tuple[str, ...]
    """Names of the rewards that are not trained on; at least one, for hacking can't be seen without."""
    alpha: float = 0.05
    """Bound of the probability, for each signal and whole run, of a false alarm."""
    patience: int = 2
    """Firings in a row before anything is said."""
    stop_after: int = 5
    """Firings in a row before the run should stop; at least ``patience``."""
    recovery: int = 2
    """Clear looks in a row that end an alarm."""
    release: float = 0.5
    """Share of a limit below which a look is clear, in [0, 1]."""
    min_prompts: int = 16
    """Prompts that a comparison of two evaluations needs, at least 2."""
    heldout_fall: float = 0.2
    """Least fall of a held-out reward that counts, in pooled standard deviations of its samples' scores."""
    agreement_fall: float = 0.2
    """Least fall of Kendall's tau-b that counts."""
    window: int = 10
    """Training steps in a block, at least 3; a block with fewer than half of them known is no data."""
    group_std_fall: float = 0.75
    """Relative fall of the spread within groups that is tolerated, in (0, 1)."""
    diversity_fall: float = 0.5
    """Relative fall of the diversity within groups that is tolerated, in (0, 1)."""
    drift_limit: float | None = None
    """Largest drift that is tolerated, in the caller's unit. None: not watched, since no limit fits all algorithms."""

    def __post_init__(self) -> None:
        names = [self.reward, *self.heldout]
        fits = {
            "heldout names at least one reward, none twice, and not the training reward": len(names) > 1
            and len(set(names)) == len(names),
            "alpha, group_std_fall and diversity_fall lie in (0, 1)": all(
                0 < value < 1 for value in (self.alpha, self.group_std_fall, self.diversity_fall)
            ),
            "release lies in [0, 1]": 0 <= self.release <= 1,
            "1 <= patience <= stop_after": 1 <= self.patience <= self.stop_after,
            "recovery is at least 1, min_prompts 2, window 3": self.recovery >= 1
            and self.min_prompts >= 2
            and self.window >= 3,
            "heldout_fall and agreement_fall are at least 0": min(self.heldout_fall, self.agreement_fall) >= 0,
            "drift_limit is positive": self.drift_limit is None or self.drift_limit > 0,
        }
        if wrong := [rule for rule, kept in fits.items() if not kept]:
            raise ValueError("; ".join(wrong))


@dataclass(frozen=True)
class Look:
    """What was seen, in words and numbers; ``only_warn`` when the signal is no reason to act."""

    state: LookState
    reason: str
    numbers: dict[str, float] = field(default_factory=dict)
    only_warn: bool = False


@dataclass
class Best:
    """The best evaluation of a score so far, [prompts, seeds] with NaN for failures, chosen from ``looks``.

    ``last_PS`` is the last evaluation, ``jumps`` the mean changes from each to the next and ``errors`` their standard
    errors over prompts.
    """

    scores_PS: list[list[float]]
    step: int
    last_PS: list[list[float]]
    looks: int = 1
    jumps: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


def as_scores(rows: list[list[float]]) -> Tensor:
    """float64 [prompts, seeds]."""
    return torch.tensor(rows, dtype=torch.float64)


@dataclass
class Block:
    """A metric's values: of the first block, and of the one that is being filled (``steps`` so far)."""

    baseline: list[float] = field(default_factory=list)
    current: list[float] = field(default_factory=list)
    steps: int = 0
    looks: int = 0

    def add(self, value: float, window: int) -> list[float] | None:
        """Add a step's value (NaN: none); the values of the block when it is full."""
        self.steps += 1
        if not math.isnan(value):
            self.current.append(value)
        if self.steps < window:
            return None
        values, self.current, self.steps = self.current, [], 0
        return values


def level_of_look(alpha: float, look: int, patience: int, first: int = 1) -> float:
    """What the p-value at the look number ``look`` must be below, where number ``first`` was the first to be judged.

    alpha first / (look (look + 1)) adds up to alpha over all looks (Bonferroni), and ``patience`` times that is
    allowed: an alarm is ``patience`` firings in a row, so every alarm holds one of the looks first + patience - 1,
    first + 2 patience - 1, ..., and since levels fall those alone have at most a ``patience``-th of the sum.
    """
    return min(alpha, alpha * patience * first / (look * (look + 1)))


def level_of_best(alpha: float, look: int, patience: int) -> float:
    """The level of a comparison with the best of ``look`` evaluations: a ``look``-th, since the best was chosen."""
    return level_of_look(alpha, look, patience, first=LEAST_JUMPS + 1) / look


def known_prompts(scores_PS: Tensor) -> int:
    """Prompts with at least one score."""
    return int((~scores_PS.isnan()).any(1).sum())


def look_at_scores(
    best: Best,
    step: int,
    scores_PS: Tensor,
    *,
    limit: float,
    pooled: bool,
    alpha: float,
    release: float,
    least: int,
    patience: int,
) -> Look:
    """Compare an evaluation with the best one before, which it replaces if it is better.

    ``limit`` is the least fall that counts, in pooled standard deviations of the samples (``pooled``) or absolute;
    ``least`` the number of prompts needed.
    """
    before_PS = as_scores(best.scores_PS)
    change, jump = paired_change(before_PS, scores_PS), paired_change(as_scores(best.last_PS), scores_PS)
    if min(change.count, jump.count) < least:
        reason = f"{change.count} prompts can be paired with those of step {best.step}, {least} are needed"
        return Look("unknown", reason, {"count": change.count})
    # Prompts tell the noise of measuring; that the policy itself wobbles, all prompts together, only time tells.
    change = with_wobble(change, best.jumps, best.errors)
    limit = limit * pooled_std(before_PS, scores_PS) if pooled else limit
    level = level_of_best(alpha, best.looks, patience)
    reason = (
        f"{change.mean:+.4g} (standard error {change.standard_error:.2g}, {change.count} prompts) against its best, "
        f"at step {best.step}; p = {change.p_fall:.2g} for a fall, level {level:.2g}, limit {limit:.2g}"
    )
    fires = change.mean < 0 and -change.mean >= limit and change.p_fall < level
    numbers = _numbers(scores_PS.nanmean().item(), change.mean, change, change.p_fall, level, limit)
    known_jumps = len(best.jumps)
    best.looks += 1
    best.jumps.append(jump.mean)
    best.errors.append(jump.standard_error)
    best.last_PS = scores_PS.tolist()
    if change.mean > 0 and known_prompts(scores_PS) >= KEPT_TO_BE_BEST * known_prompts(before_PS):
        best.scores_PS, best.step = best.last_PS, step
    if known_jumps < LEAST_JUMPS:
        reason = f"{known_jumps + 2} evaluations are known, {LEAST_JUMPS + 2} are needed to know how much they vary"
        return Look("unknown", reason, {"count": change.count})
    return Look(_state(fires, -change.mean, release * limit), reason, numbers)


def look_at_fall(
    block: Block, values: list[float], *, limit: float, alpha: float, patience: int, release: float
) -> Look:
    """Compare a full block with the first one; ``limit`` is the relative fall that is tolerated."""
    if not block.baseline:
        if statistics.fmean(values) <= 0:
            return Look("unknown", "it was 0 from the start: there is nothing that could fall")
        block.baseline = values
        return Look("unknown", "this is the first block: there is none to compare with")
    block.looks += 1
    level = level_of_look(alpha, block.looks, patience)
    change = fall_beyond(block.baseline, values, limit)
    mean, before = statistics.fmean(values), statistics.fmean(block.baseline)
    fall = 1 - mean / before
    reason = (
        f"mean {mean:.4g} over {len(values)} steps, {before:.4g} in the first block: a relative change of "
        f"{-fall:+.0%}; p = {change.p_fall:.2g} for a fall of more than {limit:.0%}, level {level:.2g}"
    )
    numbers = _numbers(mean, -fall, change, change.p_fall, level, limit)
    return Look(_state(change.p_fall < level, fall, release * limit), reason, numbers)


def look_at_drift(
    block: Block, values: list[float], *, limit: float, alpha: float, patience: int, release: float
) -> Look:
    """Compare a full block with an absolute limit."""
    block.looks += 1
    level = level_of_look(alpha, block.looks, patience)
    change = mean_above(values, limit)
    mean = statistics.fmean(values)
    reason = (
        f"mean {mean:.4g} over {len(values)} steps, limit {limit:.4g}; p = {change.p_rise:.2g} for more, "
        f"level {level:.2g}"
    )
    numbers = _numbers(mean, change.mean, change, change.p_rise, level, limit)
    return Look(_state(change.p_rise < level, mean, release * limit), reason, numbers)


def _numbers(mean: float, change: float, test: Change, p_value: float, level: float, limit: float) -> dict[str, float]:
    return {
        "mean": mean,
        "change": change,
        "standard_error": test.standard_error,
        "count": test.count,
        "p_value": p_value,
        "level": level,
        "limit": limit,
    }


def _state(fires: bool, size: float, release: float) -> LookState:
    if fires:
        return "fires"
    return "holds" if size > release else "clear"
