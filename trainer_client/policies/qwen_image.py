"""Qwen-Image (Wu et al. 2025, arXiv 2508.02324)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from torch import Tensor

from trainer_client.policies.conditioning import Conditioning
from trainer_client.policies.flow_pipeline import FlowPolicy, pack, shift_exponent, unpack


class QwenImagePolicy(FlowPolicy):
    """QwenImagePipeline. Prompts differ in length and carry a mask. After guidance each token's velocity gets back
    the norm that it has without, as the pipeline does it."""

    family = "qwen-image"

    def __init__(self, pipeline: Any, *, max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline, max_sequence_length=max_sequence_length)
        if self.network.config.guidance_embeds:
            raise ValueError("Qwen-Image with distilled guidance (guidance_embeds) is not supported")

    @property
    def latent_channels(self) -> int:
        channels: int = self.network.config.in_channels // 4
        return channels

    @property
    def _patch_size(self) -> int:
        return 2

    def _schedule(self, steps: int, tokens: int) -> dict[str, Any]:
        mu = shift_exponent(self.pipeline.scheduler, tokens, calculate_shift, 1.15)
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": mu}

    @torch.no_grad()
    def _encode(self, prompts: list[str], *, is_negative: bool) -> Conditioning:
        embeddings, mask = self.pipeline.encode_prompt(
            prompts,
            device=self.device,
            max_sequence_length=512 if self.max_sequence_length is None else self.max_sequence_length,
        )
        if mask is None:  # the pipeline's word for prompts of one length
            mask = torch.ones(embeddings.shape[:2], device=embeddings.device)
        return Conditioning(embeddings, mask=mask.bool())

    def _network_velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        told = self._features(conditioning)
        height, width = latents.shape[2:]
        velocity: Tensor = self.network(
            hidden_states=pack(latents).to(self._input_dtype()),
            timestep=sigma,
            encoder_hidden_states_mask=told.mask,
            encoder_hidden_states=told.embeddings,
            img_shapes=[[(1, height // 2, width // 2)]] * len(latents),
            return_dict=False,
        )[0]
        return unpack(velocity.float(), height, width)

    def _combine(self, away: Tensor, toward: Tensor, scale: float) -> Tensor:
        guided, kept = pack(super()._combine(away, toward, scale)), pack(toward)
        scaled = guided * (kept.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return unpack(scaled, *away.shape[2:])

    def _decode(self, latents: Tensor) -> Tensor:
        mean, std = self._latent_statistics(latents)
        decoded: Tensor = self.vae.decode((latents * std + mean)[:, :, None], return_dict=False)[0]
        return decoded[:, :, 0]

    def _posterior_mode(self, pixels: Tensor) -> Tensor:
        mode: Tensor = self.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
        mean, std = self._latent_statistics(mode)
        return (mode - mean) / std
