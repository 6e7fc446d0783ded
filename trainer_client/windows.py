"""Which steps of a trajectory are drawn from the SDE and trained on; all others follow the ODE.

A window is a list of step indices in [0, steps). The last step is never eligible by default: at sigma' = 0 its noise
would stay in the picture. Randomness comes from a torch.Generator on the CPU, so that a resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def eligible_steps(steps: int, given: Sequence[int] | None = None) -> list[int]:
    """The given steps, or all but the last. Raises ValueError for steps that are repeated or out of range."""
    eligible = list(range(steps - 1)) if given is None else list(given)
    if len(set(eligible)) != len(eligible) or not all(0 <= step < steps for step in eligible):
        raise ValueError(f"{eligible} are not different steps of {steps}")
    return eligible


def random_steps(
    steps: int, count: int | None, generator: torch.Generator, given: Sequence[int] | None = None
) -> list[int]:
    """``count`` of the eligible steps without replacement, in the order drawn; all of them for None (Flow-Factory).

    Draws nothing from the generator when no choice is left. Raises ValueError for a negative count.
    """
    eligible = eligible_steps(steps, given)
    if count is None or count >= len(eligible):
        return eligible
    if count < 0:
        raise ValueError(f"a window has at least no steps, not {count}")
    return [eligible[i] for i in torch.randperm(len(eligible), generator=generator)[:count].tolist()]


def flow_grpo_fast_window(steps: int, size: int, generator: torch.Generator, *, stop: int | None = None) -> list[int]:
    """Flow-GRPO-Fast: ``size`` consecutive steps at a random place within the first ``stop`` (None: half of them).

    Raises ValueError when the window doesn't fit.
    """
    stop = steps // 2 if stop is None else stop
    if not 1 <= size <= stop <= steps:
        raise ValueError(f"a window of {size} steps doesn't fit into the first {stop} of {steps}")
    start = int(torch.randint(stop - size + 1, (1,), generator=generator).item())
    return list(range(start, start + size))


def mix_grpo_window(
    iteration: int, steps: int, size: int, *, every: int = 1, stride: int = 1, roll_back: bool = True
) -> list[int]:
    """MixGRPO (Li et al. 2025, arXiv 2507.21802): a window that slides from noise to image as training goes on.

    It moves by ``stride`` steps every ``every`` iterations, within all steps but the last. At the end it starts again
    (``roll_back``) or stays. Raises ValueError when the window doesn't fit or a number isn't positive.
    """
    places = steps - 1 - size
    if size < 1 or places < 0 or every < 1 or stride < 1 or iteration < 0:
        raise ValueError(
            f"no window of {size} steps in {steps - 1} at iteration {iteration}, every {every}, stride {stride}"
        )
    moves = iteration // every
    # The last place is reached even where the stride doesn't divide the way to it.
    last = -(-places // stride)
    moves = moves % (last + 1) if roll_back else min(moves, last)
    start = min(moves * stride, places)
    return list(range(start, start + size))


def window_noise_levels(steps: int, window: Sequence[int], noise_level: float) -> Tensor:
    """float32 [steps]: ``noise_level`` inside the window, 0 elsewhere. Raises ValueError for steps out of range."""
    levels = torch.zeros(steps)
    levels[torch.tensor(eligible_steps(steps, window), dtype=torch.long)] = noise_level
    return levels
