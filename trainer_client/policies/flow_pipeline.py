"""Rectified-flow policies over diffusers pipelines with FlowMatchEulerDiscreteScheduler: SD3, FLUX, Qwen-Image.

x_s = (1 - s) x_0 + s eps for sigma s in [0, 1], velocity v = eps - x_0, as in :mod:`trainer_client.sampling`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from trainer_client.policies.base import ATTENTION_LORA_TARGETS, Policy
from trainer_client.policies.conditioning import Conditioning
from trainer_client.sampling import check_sigmas
from trainer_client.solvers import Solver, solve


class FlowPolicy(Policy):
    """A policy that predicts velocities. A family says how its network is called; the rest is here.

    Raises ValueError for a pipeline whose scheduler is another one, samples stochastically or runs from data to noise.
    """

    network_name = "transformer"
    lora_targets = ATTENTION_LORA_TARGETS
    latent_multiple = 2

    def __init__(self, pipeline: Any, *, max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline, max_sequence_length=max_sequence_length)
        scheduler = pipeline.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(f"a flow policy needs a FlowMatchEulerDiscreteScheduler, not a {type(scheduler).__name__}")
        if scheduler.config.stochastic_sampling or scheduler.config.invert_sigmas:
            raise ValueError("schedulers with stochastic_sampling or invert_sigmas are not supported")

    def sigmas(self, steps: int, height: int | None = None, width: int | None = None) -> Tensor:
        """Sigmas [steps + 1] of the pipeline's own schedule for an image of this size, float32 on the CPU, falling
        to 0. Where the scheduler shifts dynamically, larger images stay longer at large sigmas."""
        _, rows, columns = self.latent_shape(height, width)
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(steps, **self._schedule(steps, rows * columns // self._patch_size**2))
        return check_sigmas(scheduler.sigmas)

    def velocity(
        self, latents: Tensor, sigma: float | Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """Velocity float32 [B, C, h, w] at ``latents`` [B, C, h, w] and ``sigma`` (a number, [1] or [B]).

        ``guidance_scale`` above 1 is classifier-free guidance and needs a conditioning with a negative; for networks
        that take guidance as an input it is that input. Raises ValueError for unequal batch sizes, or guidance that
        isn't to be had.
        """
        levels = self._levels(sigma, latents, conditioning)
        with self._precision():
            if self.guidance_is_input:
                return self._network_velocity(latents, levels, conditioning, guidance_scale)

            def predict(x: Tensor, level: Tensor, told: Conditioning) -> Tensor:
                return self._network_velocity(x, level, told, None)

            return self._guided(predict, latents, levels, conditioning, guidance_scale)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str] | Conditioning,
        seeds: Sequence[int | torch.Generator],
        *,
        steps: int,
        guidance_scale: float = 1.0,
        negative: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        solver: Solver = "euler",
    ) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] along the ODE, image i from prompt i and seed i, without gradient.

        With the default solver these are the images of the pipeline itself. Where guidance needs a negative prompt
        and none is given, it is "".
        """
        latents = self.initial_latents(seeds, height, width)
        if not isinstance(prompts, Conditioning):
            if self.needs_negative(guidance_scale) and negative is None:
                negative = ""
            prompts = self.encode_prompts(prompts, negative)
        conditioning = prompts

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return self.velocity(x, sigma, conditioning, guidance_scale)

        return self.decode(solve(velocity, latents, self.sigmas(steps, height, width), solver))

    @property
    @abstractmethod
    def _patch_size(self) -> int:
        """Latent positions along the edge of one image token."""

    @abstractmethod
    def _schedule(self, steps: int, tokens: int) -> dict[str, Any]:
        """What the pipeline tells its scheduler besides the number of steps, for images of so many tokens."""

    @abstractmethod
    def _network_velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        """The network as it is: float32 [B, C, h, w] at sigma [B]."""

    def _features(self, conditioning: Conditioning) -> Conditioning:
        """The conditioning as the network takes it: on its device, in its input's type."""
        return conditioning.to(self.device, self._input_dtype())


def shift_exponent(scheduler: Any, tokens: int, calculate_shift: Any, default_max_shift: float) -> float:
    """mu of resolution-dependent shifting, by the pipeline's own ``calculate_shift``: linear in the image tokens."""
    config = scheduler.config
    mu: float = calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", default_max_shift),
    )
    return mu


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, (h / 2) (w / 2), 4 C]: 2x2 positions are one token, as FLUX and Qwen-Image read them."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack`, for latents of ``height`` x ``width`` positions."""
    batch, _, features = tokens.shape
    cells = tokens.reshape(batch, height // 2, width // 2, features // 4, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // 4, height, width)
