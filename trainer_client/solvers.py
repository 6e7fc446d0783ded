"""Deterministic solvers of the rectified-flow ODE, the samplers of DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117).

A solver needs only clean predictions x_0 = x - s v, and DiffusionNFT's loss only the sampled images: any solver does.
Words, shapes and ranges as in :mod:`trainer_client.sampling`. With alpha = 1 - s and lambda = log(alpha / s):

- ``ddim``: x' = (1 - s') x_0 + s' eps (Song et al. 2021, eta = 0);
- ``dpm1``: x' = (s'/s) x - alpha' (e^{-h} - 1) x_0, h = lambda' - lambda (Lu et al. 2022, first order);
- ``dpm2``: the same with D = (1 + 1/(2q)) x_0 - x_0^{before} / (2q) in place of x_0, q = h_before / h (Lu et al. 2022,
  DPM-Solver++ 2M); its first and last steps are of first order;
- ``euler``: Euler's step. For a rectified flow ddim, dpm1 and euler are one and the same step, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from trainer_client.sampling import check_sigmas, ode_transition, predict_noise, predict_x0

Solver: TypeAlias = Literal["euler", "ddim", "dpm1", "dpm2"]
Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(x [B, ...], sigma [B]) -> velocity [B, ...]: the policy with its prompts filled in."""


def ddim_step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Deterministic DDIM on a rectified flow; ``sigma`` and ``sigma_next`` are scalars."""
    return (1 - sigma_next) * predict_x0(x, velocity, sigma) + sigma_next * predict_noise(x, velocity, sigma)


def dpm1_step(x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """First-order data-prediction step of DPM-Solver++; ``sigma`` and ``sigma_next`` are scalars, s may be 1, s' 0.

    alpha' e^{-h} is alpha s' / s, which needs neither logarithm: both are infinite at the ends of a schedule.
    """
    ratio = sigma_next / sigma
    return ratio * x + ((1 - sigma_next) - (1 - sigma) * ratio) * x0


def dpm2_step(
    x: Tensor, x0: Tensor, x0_before: Tensor, sigma_before: Tensor, sigma: Tensor, sigma_next: Tensor
) -> Tensor:
    """Second-order multistep step of DPM-Solver++, scalars sigma_before > sigma > sigma_next > 0.

    With sigma_before = 1 the step before was infinitely long (lambda = -inf), so 1 / q is 0 and this one is of first
    order.
    """
    lambda_before, lambda_now, lambda_next = (((1 - s) / s).log() for s in (sigma_before, sigma, sigma_next))
    half = (lambda_next - lambda_now) / (2 * (lambda_now - lambda_before))
    return dpm1_step(x, (1 + half) * x0 - half * x0_before, sigma, sigma_next)


def solve(velocity: Velocity, x: Tensor, sigmas: Tensor, solver: Solver = "dpm2") -> Tensor:
    """Carry ``x`` [B, ...] from sigmas[0] to sigmas[-1] along the ODE; one call of ``velocity`` a step.

    ``sigmas`` [N + 1] falls strictly, at most 1 and at least 0. Computes in at least float32 and returns the dtype of
    ``x``, which is also what ``velocity`` gets. Raises ValueError for another schedule or an unknown solver.
    """
    if solver not in ("euler", "ddim", "dpm1", "dpm2"):
        raise ValueError(f"solver is 'euler', 'ddim', 'dpm1' or 'dpm2', not {solver!r}")
    kept, working = x.dtype, torch.promote_types(x.dtype, torch.float32)
    sigmas = check_sigmas(sigmas).to(x.device, working)
    steps = len(sigmas) - 1
    x0_before: Tensor | None = None
    for i in range(steps):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        v = velocity(x.to(kept), sigma.expand(len(x)))
        x0 = predict_x0(x, v, sigma)
        if solver == "euler":
            x = ode_transition(x, v, sigma, sigma_next).mean
        elif solver == "ddim":
            x = ddim_step(x, v, sigma, sigma_next)
        elif solver == "dpm1" or x0_before is None or i == steps - 1:
            x = dpm1_step(x.to(working), x0, sigma, sigma_next)
        else:
            x = dpm2_step(x, x0, x0_before, sigmas[i - 1], sigma, sigma_next)
        x0_before = x0
    return x.to(kept)
