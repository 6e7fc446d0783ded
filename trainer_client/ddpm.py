"""DDPM's noise schedule, clean predictions and ancestral steps, for Stable Diffusion 1.5 and XL (Ho et al. 2020).

x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps, with ab the cumulative product of 1 - beta. Latents are [B, ...]; ``alpha_bar``
in (0, 1] is a number or a tensor that broadcasts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer_client.sampling import Transition


def scaled_linear_alpha_bar(train_steps: int = 1000, *, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """ab of every training timestep, float32 [train_steps]: sqrt(beta) evenly spaced (Stable Diffusion)."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, train_steps).square()
    return (1 - betas).cumprod(0)


def leading_timesteps(steps: int, *, train_steps: int = 1000, offset: int = 1) -> Tensor:
    """Timesteps of a sampler, int64 [steps], falling: multiples of train_steps // steps, plus ``offset``."""
    return torch.arange(steps).flip(0) * (train_steps // steps) + offset


def predict_x0_epsilon(x: Tensor, epsilon: Tensor, alpha_bar: Tensor, *, clip: float | None = None) -> Tensor:
    """(x - sqrt(1 - ab) eps) / sqrt(ab), the one-step prediction of ReFL; clamped to [-clip, clip] if given."""
    x0 = (x - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
    return x0 if clip is None else x0.clamp(-clip, clip)


def predict_x0_v(x: Tensor, v: Tensor, alpha_bar: Tensor) -> Tensor:
    """sqrt(ab) x - sqrt(1 - ab) v, for networks of v = sqrt(ab) eps - sqrt(1 - ab) x_0 (Salimans and Ho 2022)."""
    return alpha_bar.sqrt() * x - (1 - alpha_bar).sqrt() * v


def ancestral_transition(x: Tensor, x0: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor) -> Transition:
    """q(x' | x, x_0) of DDPM (Ho et al. 2020, eqs. 6 and 7), for steps of any length; scalars ab < ab' <= 1.

    With a = ab / ab': mean = (sqrt(ab') (1 - a) x_0 + sqrt(a) (1 - ab') x) / (1 - ab), and variance
    (1 - ab') (1 - a) / (1 - ab), 0 at ab' = 1.
    """
    alpha = alpha_bar / alpha_bar_next
    mean = (alpha_bar_next.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - alpha_bar_next) * x) / (1 - alpha_bar)
    variance = (1 - alpha_bar_next) * (1 - alpha) / (1 - alpha_bar)
    std = variance.sqrt().expand(len(x)).reshape(-1, *[1] * (x.ndim - 1))
    return Transition(mean, std, std)


def to_image(decoded: Tensor) -> Tensor:
    """What a VAE decodes, about [-1, 1] -> pixels in [0, 1]: clamp(x / 2 + 1/2). No gradient beyond the range."""
    return (decoded / 2 + 0.5).clamp(0, 1)
