"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from trainer_client.policies.conditioning import Conditioning
from trainer_client.policies.flow_pipeline import FlowPolicy, shift_exponent


class SD3Policy(FlowPolicy):
    """StableDiffusion3Pipeline. Without T5 the pipeline appends ``max_sequence_length`` zero tokens (256 by default)
    in its place; 0 leaves them out."""

    family = "sd3"

    @property
    def latent_channels(self) -> int:
        channels: int = self.network.config.in_channels
        return channels

    @property
    def latent_multiple(self) -> int:  # type: ignore[override]
        return self._patch_size

    @property
    def _patch_size(self) -> int:
        size: int = self.network.config.patch_size
        return size

    def _schedule(self, steps: int, tokens: int) -> dict[str, Any]:
        scheduler = self.pipeline.scheduler
        if not scheduler.config.use_dynamic_shifting:
            return {}
        return {"mu": shift_exponent(scheduler, tokens, calculate_shift, 1.16)}

    @torch.no_grad()
    def _encode(self, prompts: list[str], *, is_negative: bool) -> Conditioning:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=256 if self.max_sequence_length is None else self.max_sequence_length,
        )
        return Conditioning(embeddings, pooled)

    def _network_velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        told = self._features(conditioning)
        velocity: Tensor = self.network(
            hidden_states=latents.to(self._input_dtype()),
            timestep=sigma * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=told.embeddings,
            pooled_projections=told.pooled,
            return_dict=False,
        )[0]
        return velocity.float()
