"""Policies that predict noise: Stable Diffusion 1 and 2 (Rombach et al. 2022), and XL (Podell et al. 2023).

x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps for timesteps t in 0 ... T - 1, as in :mod:`trainer_client.ddpm`. A network
predicts eps, or v = sqrt(ab) eps - sqrt(1 - ab) x_0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from trainer_client.ddpm import predict_x0_epsilon, predict_x0_v
from trainer_client.policies.base import Policy, as_generators
from trainer_client.policies.conditioning import Conditioning

Sampler: TypeAlias = Literal["ddim", "ddpm"]
_SCHEDULERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}


class DDPMPolicy(Policy):
    """A UNet that predicts noise, sampled by DDIM or DDPM with the noise schedule of the pipeline's own scheduler.

    ``sampler`` None keeps the pipeline's scheduler where it is one of the two and takes DDIM otherwise; the pipeline
    gets the scheduler too. Raises ValueError for another prediction than eps or v, and for networks distilled to take
    guidance as an input.
    """

    network_name = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(
        self, pipeline: Any, *, max_sequence_length: int | None = None, sampler: Sampler | None = None
    ) -> None:
        super().__init__(pipeline, max_sequence_length=max_sequence_length)
        if max_sequence_length is not None:
            raise ValueError(f"the prompt length of {self.family} is fixed: max_sequence_length must be None")
        if self.network.config.time_cond_proj_dim is not None:
            raise ValueError("networks that take guidance as an input (time_cond_proj_dim) are not supported")
        scheduler: Any = pipeline.scheduler
        if sampler is not None or not isinstance(scheduler, tuple(_SCHEDULERS.values())):
            pipeline.scheduler = _scheduler_like(scheduler, sampler or "ddim")
        self.prediction_type: str = pipeline.scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"predictions are 'epsilon' or 'v_prediction', not {self.prediction_type!r}")
        self._alpha_bars: Tensor = pipeline.scheduler.alphas_cumprod.to(self.device, torch.float32)

    @property
    def latent_channels(self) -> int:
        channels: int = self.network.config.in_channels
        return channels

    @property
    def default_size(self) -> tuple[int, int]:
        size = self.network.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale, width * self.vae_scale

    def scheduler(self, steps: int) -> Any:
        """A fresh DDIMScheduler or DDPMScheduler over ``steps`` steps: ``timesteps`` int64 [steps], falling, and
        ``step(prediction, timestep, latents, generator=...)``, whose ``prev_sample`` is the next latents."""
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    def alpha_bar(self, timestep: int | Tensor) -> Tensor:
        """ab, float32 [1, 1, 1, 1] or [B, 1, 1, 1], at a timestep or at timesteps [B]."""
        return self._alpha_bars[torch.as_tensor(timestep, device=self.device).reshape(-1)].view(-1, 1, 1, 1)

    def prediction(
        self, latents: Tensor, timestep: int | Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """What the network predicts, eps or v by ``prediction_type``, float32 [B, C, h, w]; ``timestep`` is a number,
        [1] or [B]. ``guidance_scale`` above 1 is classifier-free guidance and needs a conditioning with a negative.
        """
        levels = self._levels(timestep, latents, conditioning)
        with self._precision():
            return self._guided(self._network_prediction, latents, levels, conditioning, guidance_scale)

    def predict_x0(self, latents: Tensor, prediction: Tensor, timestep: int | Tensor) -> Tensor:
        """One-step estimate of the clean latents [B, C, h, w], without clipping."""
        predict = predict_x0_epsilon if self.prediction_type == "epsilon" else predict_x0_v
        return predict(latents, prediction, self.alpha_bar(timestep))

    def add_noise(self, x0: Tensor, noise: Tensor, timestep: int | Tensor) -> Tensor:
        """Latents at a timestep, sqrt(ab) x_0 + sqrt(1 - ab) eps."""
        alpha_bar = self.alpha_bar(timestep)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise

    def target(self, x0: Tensor, noise: Tensor, timestep: int | Tensor) -> Tensor:
        """What :meth:`prediction` should be at ``add_noise(x0, noise, timestep)``: the target of pre-training."""
        if self.prediction_type == "epsilon":
            return noise
        alpha_bar = self.alpha_bar(timestep)
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0

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
    ) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], image i from prompt i and seed i, without gradient.

        All noise of image i comes from its own seed, and these are the images of the pipeline itself. Where guidance
        needs a negative prompt and none is given, it is "".
        """
        generators = as_generators(seeds)
        latents = self.initial_latents(generators, height, width)
        if not isinstance(prompts, Conditioning):
            prompts = self.encode_prompts(
                prompts, "" if self.needs_negative(guidance_scale) and negative is None else negative
            )
        scheduler = self.scheduler(steps)
        for timestep in scheduler.timesteps:
            prediction = self.prediction(latents, timestep, prompts, guidance_scale)
            latents = scheduler.step(prediction, timestep, latents, generator=generators).prev_sample
        return self.decode(latents)

    def _network_prediction(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        told = conditioning.to(self.device, self._input_dtype())
        prediction: Tensor = self.network(
            latents.to(self._input_dtype()),
            timestep,
            encoder_hidden_states=told.embeddings,
            added_cond_kwargs=self._added_conditions(latents, told),
            return_dict=False,
        )[0]
        return prediction.float()

    def _added_conditions(self, latents: Tensor, conditioning: Conditioning) -> dict[str, Tensor] | None:
        return None


class StableDiffusionPolicy(DDPMPolicy):
    """StableDiffusionPipeline. No safety checker looks at what :meth:`sample` makes."""

    family = "sd"

    @torch.no_grad()
    def _encode(self, prompts: list[str], *, is_negative: bool) -> Conditioning:
        embeddings, _ = self.pipeline.encode_prompt(prompts, self.device, 1, False)
        return Conditioning(embeddings)


class StableDiffusionXLPolicy(DDPMPolicy):
    """StableDiffusionXLPipeline. An empty negative prompt is zeros where the pipeline's configuration says
    ``force_zeros_for_empty_prompt``. Sizes are told as neither cropped nor scaled. No watermark is added."""

    family = "sdxl"

    @torch.no_grad()
    def _encode(self, prompts: list[str], *, is_negative: bool) -> Conditioning:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        if is_negative and self.pipeline.config.force_zeros_for_empty_prompt:
            told = torch.tensor([float(prompt != "") for prompt in prompts], device=self.device)
            embeddings, pooled = embeddings * told[:, None, None], pooled * told[:, None]
        return Conditioning(embeddings, pooled)

    def _added_conditions(self, latents: Tensor, conditioning: Conditioning) -> dict[str, Tensor] | None:
        height, width = (side * self.vae_scale for side in latents.shape[2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=self._input_dtype(), device=self.device)
        assert conditioning.pooled is not None  # _encode gives it
        return {"text_embeds": conditioning.pooled, "time_ids": sizes.expand(len(latents), -1)}


def _scheduler_like(scheduler: Any, sampler: str) -> Any:
    """A DDIM or DDPM scheduler with the noise schedule and timesteps of another one."""
    if sampler not in _SCHEDULERS:
        raise ValueError(f"sampler is 'ddim' or 'ddpm', not {sampler!r}")
    # Clipping to [-1, 1] is for pixels, and the default where a configuration doesn't speak of it.
    clip_sample = scheduler.config.get("clip_sample", False)
    return _SCHEDULERS[sampler].from_config(scheduler.config, clip_sample=clip_sample)
