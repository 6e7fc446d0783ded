"""Losses of Flow-GRPO and its relatives, and of ReFL: pure functions, minimised, gradients through what they name.

Log-probabilities are means over a sample's elements (:func:`trainer_client.sampling.log_prob`). ``ok_B`` leaves failed
samples out of every mean; None: all count. A loss of no samples is 0 with gradient 0. DiffusionNFT's losses are in
:mod:`trainer_client.nft_losses`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """A clipped policy loss and what it is watched by: scalars, without gradients but for ``loss``.

    ``approx_kl`` = mean((log ratio)^2) / 2; ``clip_fraction_high`` and ``clip_fraction_low`` are the shares of samples
    whose ratio lies above or below the clip range, whatever the sign of their advantage.
    """

    loss: Tensor
    approx_kl: Tensor
    clip_fraction_high: Tensor
    clip_fraction_low: Tensor

    @property
    def clip_fraction(self) -> Tensor:
        """Share of samples whose ratio lies outside the clip range."""
        return self.clip_fraction_high + self.clip_fraction_low


def masked_mean(values_B: Tensor, ok_B: Tensor | None = None) -> Tensor:
    """Mean over the samples that are ok; 0 for none."""
    if ok_B is None:
        return values_B.mean()
    if values_B.shape != ok_B.shape:
        raise ValueError(f"values {tuple(values_B.shape)} and ok {tuple(ok_B.shape)} have different shapes")
    return torch.where(ok_B, values_B, 0.0).sum() / ok_B.sum().clamp(min=1)


def policy_log_ratio(log_prob_B: Tensor, old_log_prob_B: Tensor) -> Tensor:
    """log_prob - old_log_prob [B], the logarithm of PPO's ratio: exactly 0 on policy. The old one is a constant."""
    return log_prob_B - old_log_prob_B.detach()


def guard_log_ratio(log_prob_B: Tensor, old_log_prob_B: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """Logarithm of GRPO-Guard's ratio (arXiv 2510.22319) [B]: (log_prob - old) q + mean((mean - old_mean)^2) / (2 q).

    q = ``std``, the transition's standard deviation ([B, 1, ...], [B] or a scalar). For samples of the old policy the
    plain logarithm has expectation -mean((mean - old_mean)^2) / (2 q^2): at low noise ratios sink below 1 and are
    clipped on one side only. This one has expectation 0, and a spread free of q. 0 where q is 0.
    """
    q_B = _per_sample(std, log_prob_B)
    noisy_B = q_B > 0
    squared_B = (mean - old_mean.detach()).square().flatten(1).mean(1)
    bias_B = torch.where(noisy_B, squared_B / (2 * torch.where(noisy_B, q_B, 1.0)), 0.0)
    return policy_log_ratio(log_prob_B, old_log_prob_B) * q_B + bias_B


def clipped_policy_loss(
    log_ratio_B: Tensor,
    advantage_B: Tensor,
    clip_low: float,
    clip_high: float,
    *,
    advantage_clip: tuple[float, float] = (-5.0, 5.0),
    weight: Tensor | float = 1.0,
    ok_B: Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped loss (Schulman et al. 2017, eq. 7), mean_b max(-A ratio, -A clip(ratio, 1 - low, 1 + high)).

    ``log_ratio_B`` is the ratio's logarithm. ``advantage_B`` is clipped first to ``advantage_clip``. ``weight`` (a
    number or [B]) multiplies each sample's loss: GRPO-Guard's paper takes 1 / |dt|. ``clip_low`` and ``clip_high`` are
    positive. Raises ValueError for shapes that differ.
    """
    if log_ratio_B.shape != advantage_B.shape or log_ratio_B.ndim != 1:
        shapes = f"{tuple(log_ratio_B.shape)} and advantages {tuple(advantage_B.shape)}"
        raise ValueError(f"ratios {shapes} are not both [B]")
    ratio_B = log_ratio_B.exp()
    advantage_B = advantage_B.detach().to(ratio_B.dtype).clamp(*advantage_clip)
    unclipped = -advantage_B * ratio_B
    clipped = -advantage_B * ratio_B.clamp(1 - clip_low, 1 + clip_high)
    constant_B = ratio_B.detach()
    return PolicyLoss(
        loss=masked_mean(torch.maximum(unclipped, clipped) * weight, ok_B),
        approx_kl=masked_mean(log_ratio_B.detach().square() / 2, ok_B),
        clip_fraction_high=masked_mean((constant_B - 1 > clip_high).to(constant_B.dtype), ok_B),
        clip_fraction_low=masked_mean((1 - constant_B > clip_low).to(constant_B.dtype), ok_B),
    )


def kl_on_means(mean: Tensor, mean_ref: Tensor, std: Tensor, ok_B: Tensor | None = None) -> Tensor:
    """KL between two steps of one standard deviation: mean_b[mean((mean - mean_ref)^2) / (2 std^2)], nats per element.

    ``std`` [B, 1, ...], [B] or a scalar. With the transition's ``std`` this is the Gaussians' true KL (the paper of
    Flow-GRPO, and Pref-GRPO); with its ``diffusion`` it is |dt| times that (Flow-GRPO's code, whose weights beta
    presume it). A step without noise chooses nothing and counts 0, as its log-probability does.
    """
    squared_B = (mean - mean_ref.detach()).square().flatten(1).mean(1)
    std_B = _per_sample(std, squared_B)
    noisy_B = std_B > 0
    divisor_B = 2 * torch.where(noisy_B, std_B, 1.0).square()
    return masked_mean(torch.where(noisy_B, squared_B / divisor_B, 0.0), ok_B)


def mean_squared_difference(values: Tensor, reference: Tensor, ok_B: Tensor | None = None) -> Tensor:
    """mean_b[mean((values - reference)^2)]: the penalty on velocities (DiffusionNFT) or on means (Flow-Factory)."""
    return masked_mean((values - reference.detach()).square().flatten(1).mean(1), ok_B)


def refl_loss(
    rewards_B: Tensor, *, grad_scale: float = 1e-3, target: float = 2.0, ok_B: Tensor | None = None
) -> Tensor:
    """ReFL's loss (Xu et al. 2023, arXiv 2304.05977): grad_scale * mean_b max(0, target - r).

    Its gradient is -grad_scale / B where r < target, else 0: an image that is good enough is left alone. ``target`` 2
    is in the units of ImageReward, whose scores lie in about [-2.5, 2].
    """
    return grad_scale * masked_mean((target - rewards_B).relu(), ok_B)


def _per_sample(std: Tensor, like_B: Tensor) -> Tensor:
    """[B, 1, ...], [B] or a scalar -> [B]; raises for one value per element of a sample."""
    flat = std.to(like_B.dtype).reshape(-1)
    if len(flat) not in (1, len(like_B)):
        raise ValueError(f"{len(flat)} standard deviations for {len(like_B)} samples")
    return flat.expand(len(like_B))
