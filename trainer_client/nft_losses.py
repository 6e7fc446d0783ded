"""Loss of DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): policy optimisation on the forward process.

A clean sample x_0 is noised again to x_t = (1 - t) x_0 + t eps. The policy's velocity v and the old policy's v_old
give a positive prediction v+ = beta v + (1 - beta) v_old and an implicit negative one, v- = (1 + beta) v_old - beta v;
good samples pull v+ to themselves, bad ones v-, and no likelihood is needed. Latents are [B, ...], t is in (0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from trainer_client.losses import masked_mean

AdvantageMode: TypeAlias = Literal["all", "positive_only", "negative_only", "one_only", "binary"]
"""What of the clipped advantage is used: all of it, its positive or negative part, 1 where positive, or its sign."""


@dataclass(frozen=True)
class NFTLoss:
    """``loss`` is the policy loss, a float64 scalar; the rest per sample [B], float64 and without gradients.

    ``positive_B`` and ``negative_B`` are the errors of the two predictions after adaptive weighting.
    """

    loss: Tensor
    positive_B: Tensor
    negative_B: Tensor


def forward_noising(x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t eps [B, ...]."""
    t = t_B.reshape(-1, *[1] * (x0.ndim - 1))
    return (1 - t) * x0 + t * noise


def nft_probability(
    advantage_B: Tensor, *, clip: tuple[float, float] = (-5.0, 5.0), mode: AdvantageMode = "all"
) -> Tensor:
    """Optimality probability r [B] in [0, 1] of each sample: clip(A / M / 2 + 1/2, 0, 1), M = max(clip).

    A is clipped to ``clip``, then ``mode`` applies. As in the reference, ``one_only`` and ``binary`` give
    1/2 + 1/(2M) and not 1: they take away differences of size, and do not make the step larger. Raises ValueError for
    an unknown mode and for a range without a positive end.
    """
    largest = max(clip)
    if largest <= 0:
        raise ValueError(f"the clip range needs a positive end, not {clip}")
    clipped = advantage_B.clamp(*clip)
    if mode == "positive_only":
        clipped = clipped.clamp(min=0)
    elif mode == "negative_only":
        clipped = clipped.clamp(max=0)
    elif mode == "one_only":
        clipped = (clipped > 0).to(clipped.dtype)
    elif mode == "binary":
        clipped = clipped.sign()
    elif mode != "all":
        raise ValueError(f"unknown mode {mode!r} of advantages")
    return (clipped / largest / 2 + 0.5).clamp(0, 1)


def positive_prediction(velocity: Tensor, old_velocity: Tensor, beta: float) -> Tensor:
    """v+ = beta v + (1 - beta) v_old."""
    return beta * velocity + (1 - beta) * old_velocity


def negative_prediction(velocity: Tensor, old_velocity: Tensor, beta: float) -> Tensor:
    """v- = (1 + beta) v_old - beta v: the old policy's velocity, mirrored away from the new one."""
    return (1 + beta) * old_velocity - beta * velocity


def adaptive_error(x0: Tensor, x_t: Tensor, t_B: Tensor, velocity: Tensor, *, floor: float = 1e-5) -> Tensor:
    """mean(e^2) / w of each sample, float64 [B], e = x_t - t v - x_0, w = max(mean |e|, floor) without gradient.

    The weight levels the sizes of errors across t.
    """
    t = t_B.double().reshape(-1, *[1] * (x0.ndim - 1))
    # float64 as in the reference: errors of a policy near its old one are differences of nearly equal numbers.
    error = (x_t.double() - t * velocity.double() - x0.double()).flatten(1)
    weight_B = error.detach().abs().mean(1).clamp(min=floor)
    return error.square().mean(1) / weight_B


def nft_loss(
    x0: Tensor,
    x_t: Tensor,
    t_B: Tensor,
    velocity: Tensor,
    old_velocity: Tensor,
    probability_B: Tensor,
    *,
    beta: float,
    scale: float = 5.0,
    ok_B: Tensor | None = None,
) -> NFTLoss:
    """scale * mean_b[(r l+ + (1 - r) l-) / beta], with l+- the adaptive errors of v+ and v-.

    ``scale`` is the largest clipped advantage, which :func:`nft_probability` divided by; ``beta`` > 0 is how far the
    implicit policies stand from the old one. The gradient reaches ``velocity`` only; add
    :func:`trainer_client.losses.mean_squared_difference` to the reference policy's velocity as a KL term. Raises
    ValueError for a beta that is not positive.
    """
    if beta <= 0:
        raise ValueError(f"beta is positive, not {beta}")
    old, r_B = old_velocity.detach(), probability_B.detach().double()
    positive_B = adaptive_error(x0, x_t, t_B, positive_prediction(velocity, old, beta))
    negative_B = adaptive_error(x0, x_t, t_B, negative_prediction(velocity, old, beta))
    loss = scale * masked_mean((r_B * positive_B + (1 - r_B) * negative_B) / beta, ok_B)
    return NFTLoss(loss, positive_B.detach(), negative_B.detach())
