"""Steps of rectified-flow samplers as Gaussian transitions, with their log-probabilities.

Rectified flow: x_s = (1 - s) x_0 + s eps for sigma s in [0, 1], velocity v = eps - x_0. Hence x_0 = x - s v and
eps = x + (1 - s) v. A sampler walks the sigmas of a schedule down to 0, so dt = s' - s < 0.

Latents are [B, ...] of any rank. ``sigma``, ``sigma_next`` and ``noise_level`` are numbers or tensors [B] or [1], with
0 <= sigma_next < sigma <= 1 and noise_level >= 0. :func:`check_sigmas` raises for a schedule that isn't so; a step does
not look, because looking at a tensor on a GPU waits for it. Half precision is promoted to float32, float64 stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Dynamics: TypeAlias = Literal["ode", "flow-sde", "dance-sde", "cps"]
"""How a step is drawn: the ODE's Euler step, an SDE's with the same marginals, or CPS, which renews some noise."""
Level: TypeAlias = float | Tensor
"""A number, or one per sample [B]."""


@dataclass(frozen=True)
class Transition:
    """One step x -> x' ~ N(mean, std^2) of a sampler.

    ``mean`` is [B, ...]; ``std`` [B, 1, ...] is the standard deviation of x', 0 for a deterministic step;
    ``diffusion`` [B, 1, ...] is the coefficient of the Wiener process, std = diffusion * sqrt(-dt) (for CPS, which
    has none, it is ``std``). ``unit_variance``: the log-probability leaves the variance out, as CPS does.
    """

    mean: Tensor
    std: Tensor
    diffusion: Tensor
    unit_variance: bool = False


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Time shift of SD3: k s / (1 + (k - 1) s) (Esser et al. 2024, eq. 23). Maps [0, 1] onto itself."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def flow_match_sigmas(steps: int, shift: float = 1.0, *, train_steps: int = 1000) -> Tensor:
    """Sigmas [steps + 1] of diffusers' FlowMatchEulerDiscreteScheduler, float32, from 1 to 0.

    Evenly spaced between 1 and the smallest sigma of training, then shifted. The smallest one, 1 / train_steps, is
    itself shifted first: the shift acts twice on the lower end. The network's timesteps are ``1000 * sigmas[:-1]``.
    """
    smallest = shift_sigmas(torch.tensor([1 / train_steps], dtype=torch.float64), shift).item()
    spaced = torch.linspace(1.0, smallest, steps, dtype=torch.float64)
    sigmas = shift_sigmas(spaced, shift)
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def linspace_sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """Sigmas [steps + 1] of DanceGRPO and Pref-GRPO: evenly spaced from 1 to 0, both included, then shifted once."""
    # In float32 like the published loops: they hand int(1000 s) to the network, and a last bit decides there.
    sigmas = shift_sigmas(torch.linspace(1.0, 0.0, steps + 1), shift)
    sigmas[0] = 1.0  # the shift gives 1 up to rounding only, and more than 1 has no square root
    return sigmas


def check_sigmas(sigmas: Tensor) -> Tensor:
    """The schedule [N + 1] itself; raises ValueError unless it falls strictly from at most 1 to 0 or more."""
    falling = sigmas.ndim == 1 and len(sigmas) > 1 and bool((sigmas[1:] < sigmas[:-1]).all())
    if not falling or not bool((sigmas[0] <= 1) & (sigmas[-1] >= 0)):
        raise ValueError(f"sigmas must fall strictly from at most 1 to 0 or more, not {sigmas.tolist()}")
    return sigmas


def predict_x0(x: Tensor, velocity: Tensor, sigma: Level) -> Tensor:
    """One-step estimate of the clean latent [B, ...]: x - s v."""
    x, velocity, sigma = _promoted(x, velocity, sigma)
    return x - sigma * velocity


def predict_noise(x: Tensor, velocity: Tensor, sigma: Level) -> Tensor:
    """Estimate of the noise in x [B, ...]: x + (1 - s) v."""
    x, velocity, sigma = _promoted(x, velocity, sigma)
    return x + (1 - sigma) * velocity


def transition(
    dynamics: Dynamics, x: Tensor, velocity: Tensor, sigma: Level, sigma_next: Level, noise_level: Level = 0.0
) -> Transition:
    """The step of ``dynamics`` from ``x``; ``"ode"`` takes no notice of ``noise_level``.

    Raises ValueError for unknown dynamics.
    """
    if dynamics == "ode":
        return ode_transition(x, velocity, sigma, sigma_next)
    if dynamics not in _NOISY:
        raise ValueError(f"dynamics is 'ode', {', '.join(map(repr, _NOISY))}, not {dynamics!r}")
    return _NOISY[dynamics](x, velocity, sigma, sigma_next, noise_level)


def ode_transition(x: Tensor, velocity: Tensor, sigma: Level, sigma_next: Level) -> Transition:
    """Euler's step of dx = v ds: mean x + v (s' - s), standard deviation 0."""
    x, velocity, sigma, sigma_next = _promoted(x, velocity, sigma, sigma_next)
    still = torch.zeros_like(sigma)
    return Transition(x + velocity * (sigma_next - sigma), still, still)


def flow_sde_transition(x: Tensor, velocity: Tensor, sigma: Level, sigma_next: Level, noise_level: Level) -> Transition:
    """Flow-GRPO's step (Liu et al. 2025, arXiv 2505.05470), a = noise level:

    diffusion g = a sqrt(s / (1 - s)), mean = x (1 + g^2 dt / (2 s)) + v (1 + g^2 (1 - s) / (2 s)) dt,
    std = g sqrt(-dt). At s = 1 the denominator takes s' in place of s, as the authors' code does: g stays finite. So
    it does within 1e-6 of 1, where a shifted schedule in float32 may land.
    """
    x, velocity, sigma, sigma_next, noise_level = _promoted(x, velocity, sigma, sigma_next, noise_level)
    dt = sigma_next - sigma
    guarded = torch.where(1 - sigma < 1e-6, sigma_next, sigma)
    diffusion = noise_level * (sigma / (1 - guarded)).sqrt()
    drift = diffusion.square() * dt / (2 * sigma)
    mean = x * (1 + drift) + velocity * (dt + drift * (1 - sigma))
    return Transition(mean, diffusion * (-dt).sqrt(), diffusion)


def dance_sde_transition(
    x: Tensor, velocity: Tensor, sigma: Level, sigma_next: Level, noise_level: Level
) -> Transition:
    """DanceGRPO's step (Xue et al. 2025, arXiv 2505.07818): constant diffusion a = noise level.

    mean = x + (v - a^2 / 2 * score) dt with score = -(x - (1 - s) x_0) / s^2, std = a sqrt(-dt). Below s of about
    a^2 / 2 the correction is larger than the step itself: the last steps amplify what float32 loses.
    """
    x, velocity, sigma, sigma_next, noise_level = _promoted(x, velocity, sigma, sigma_next, noise_level)
    dt = sigma_next - sigma
    score = -(x - (1 - sigma) * (x - sigma * velocity)) / sigma.square()
    mean = x + (velocity - noise_level.square() / 2 * score) * dt
    diffusion = noise_level.expand_as(sigma)
    return Transition(mean, diffusion * (-dt).sqrt(), diffusion)


def cps_transition(x: Tensor, velocity: Tensor, sigma: Level, sigma_next: Level, noise_level: Level) -> Transition:
    """Coefficients-preserving sampling (FlowCPS, as Flow-Factory has it), noise level a in [0, 1].

    std = s' sin(a pi / 2), mean = (1 - s') x_0 + sqrt(s'^2 - std^2) eps: signal and noise keep the shares that the
    schedule gives them, if x_0 is right. The log-probability is -mean((x' - mean)^2), without variance or constant.
    """
    x, velocity, sigma, sigma_next, noise_level = _promoted(x, velocity, sigma, sigma_next, noise_level)
    std = sigma_next * (noise_level * (math.pi / 2)).sin()
    # cos of the same angle: sqrt(s'^2 - std^2) would take the root of a rounding error at a = 1.
    kept = sigma_next * (noise_level * (math.pi / 2)).cos()
    mean = (1 - sigma_next) * (x - sigma * velocity) + kept * (x + (1 - sigma) * velocity)
    return Transition(mean, std, std, unit_variance=True)


_NOISY = {"flow-sde": flow_sde_transition, "dance-sde": dance_sde_transition, "cps": cps_transition}


def draw(step: Transition, noise: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The next latent mean + std * noise [B, ...], for standard normal ``noise`` of the mean's shape.

    ``dtype`` is the one in which latents are kept (None: the mean's). Take :func:`log_prob` of what this returns:
    the policy that is trained sees the rounded latent, and an unrounded one would have another probability.
    """
    following = step.mean + step.std * noise.to(step.mean.dtype)
    return following if dtype is None else following.to(dtype)


def log_prob(step: Transition, x_next: Tensor) -> Tensor:
    """Log-probability of ``x_next`` [B, ...] under the step: [B], the *mean* over a sample's elements, in nats.

    Mean and not sum, as in DDPO and Flow-GRPO: ratios are the D-th root of the true ones, which clip ranges of 1e-4
    presume. A step without noise chooses nothing: its log-probability is 0 with gradient 0, so that its ratio is 1
    (the formula gives NaN there).
    """
    squared = (x_next.detach().to(step.mean.dtype) - step.mean).square()
    if step.unit_variance:
        return -_mean_over_sample(squared)
    noisy = step.std > 0
    std = torch.where(noisy, step.std, 1.0)
    density = -squared / (2 * std.square()) - std.log() - math.log(2 * math.pi) / 2
    return _mean_over_sample(torch.where(noisy, density, 0.0))


def _mean_over_sample(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


def _promoted(x: Tensor, velocity: Tensor, *levels: Level) -> tuple[Tensor, ...]:
    """Everything in at least float32, each level shaped to broadcast over its sample; raises for unequal shapes."""
    if x.shape != velocity.shape:
        raise ValueError(f"latents {tuple(x.shape)} and velocities {tuple(velocity.shape)} have different shapes")
    dtype = torch.promote_types(torch.promote_types(x.dtype, velocity.dtype), torch.float32)
    shaped = []
    for level in levels:
        tensor = torch.as_tensor(level, dtype=dtype, device=x.device).reshape(-1)
        if len(tensor) not in (1, len(x)):
            raise ValueError(f"{len(tensor)} levels for {len(x)} samples")
        shaped.append(tensor.expand(len(x)).reshape(-1, *[1] * (x.ndim - 1)))
    return x.to(dtype), velocity.to(dtype), *shaped
