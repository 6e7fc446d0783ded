"""Exponential moving averages of weights: decays by step, and the update.

average <- decay * average + (1 - decay) * current. DiffusionNFT's old policy is one, and so are evaluation weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def old_policy_decay(step: int, schedule: int) -> float:
    """Decay of DiffusionNFT's old policy at gradient step ``step`` (arXiv 2509.16117), in [0, 0.999].

    Schedule 0: 0, the old policy is the last one; 1: min(0.001 step, 0.5); 2: 0 for 75 steps, then
    min(0.0075 (step - 75), 0.999). Raises ValueError for another.
    """
    if schedule == 0:
        return 0.0
    if schedule == 1:
        return piecewise_linear_decay(step, 0.5, flat_steps=0, ramp_rate=0.001)
    if schedule == 2:
        return piecewise_linear_decay(step, 0.999, flat_steps=75, ramp_rate=0.0075)
    raise ValueError(f"the schedule is 0, 1 or 2, not {schedule!r}")


def power_decay(step: int, decay: float, *, warmup_steps: int = 10) -> float:
    """min((1 + step) / (warmup_steps + step), decay): the decay of evaluation weights in Flow-GRPO, without memory of
    the first random steps.
    """
    return min((1 + step) / (warmup_steps + step), decay)


def piecewise_linear_decay(step: int, decay: float, *, flat_steps: int, ramp_rate: float) -> float:
    """0 for ``flat_steps``, then ``ramp_rate`` more each step up to ``decay``."""
    return 0.0 if step < flat_steps else min(ramp_rate * (step - flat_steps), decay)


def linear_decay(step: int, decay: float, *, initial_decay: float, warmup_steps: int) -> float:
    """From ``initial_decay`` to ``decay`` on a straight line over ``warmup_steps``."""
    return initial_decay + (decay - initial_decay) * min(step / warmup_steps, 1.0)


def cosine_decay(step: int, decay: float, *, initial_decay: float, total_steps: int) -> float:
    """From ``initial_decay`` to ``decay`` on half a cosine over ``total_steps``."""
    share = min(step / total_steps, 1.0)
    return initial_decay + (decay - initial_decay) * (1 - math.cos(math.pi * share)) / 2


def warmup_cosine_decay(step: int, decay: float, *, initial_decay: float, warmup_steps: int, total_steps: int) -> float:
    """From 0 to ``initial_decay`` on a line over ``warmup_steps``, then :func:`cosine_decay` until ``total_steps``."""
    if step < warmup_steps:
        return initial_decay * step / warmup_steps
    return cosine_decay(step - warmup_steps, decay, initial_decay=initial_decay, total_steps=total_steps - warmup_steps)


@torch.no_grad()
def ema_update_(averages: Iterable[Tensor], current: Iterable[Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * current, in place, in the dtype of ``averages``.

    Keep averages in float32: near decay 0.999 a step is lost in half precision. Raises ValueError for a decay outside
    [0, 1] or another number of tensors.
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"a decay lies in [0, 1], not {decay}")
    for average, value in zip(averages, current, strict=True):
        average.mul_(decay).add_(value.to(average), alpha=1 - decay)
