"""FLUX.1 dev and schnell (Black Forest Labs)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from trainer_client.policies.conditioning import Conditioning
from trainer_client.policies.flow_pipeline import FlowPolicy, pack, shift_exponent, unpack


class FluxPolicy(FlowPolicy):
    """FluxPipeline. Guidance is an input of the network of FLUX.1-dev (3.5 is its default); FLUX.1-schnell has none,
    and takes only 1. There are no negative prompts."""

    family = "flux"
    guidance_is_input = True

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
        if is_negative:
            raise ValueError("FLUX takes its guidance as a number and has no negative prompts")
        embeddings, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            device=self.device,
            max_sequence_length=512 if self.max_sequence_length is None else self.max_sequence_length,
        )
        return Conditioning(embeddings, pooled)

    def _network_velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float | None
    ) -> Tensor:
        told = self._features(conditioning)
        height, width = latents.shape[2:]
        velocity: Tensor = self.network(
            hidden_states=pack(latents).to(self._input_dtype()),
            timestep=sigma,
            guidance=self._guidance(sigma, guidance),
            pooled_projections=told.pooled,
            encoder_hidden_states=told.embeddings,
            txt_ids=torch.zeros(told.embeddings.shape[1], 3, device=self.device),
            img_ids=self._positions(height // 2, width // 2),
            return_dict=False,
        )[0]
        return unpack(velocity.float(), height, width)

    def _guidance(self, sigma: Tensor, scale: float | None) -> Tensor | None:
        if self.network.config.guidance_embeds:
            return torch.full_like(sigma, 1.0 if scale is None else scale)
        if scale not in (None, 1.0):
            raise ValueError(f"this FLUX takes no guidance (guidance_embeds is false), so not {scale}")
        return None

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Position ids [rows * columns, 3] of image tokens: 0, row, column."""
        row = torch.arange(rows, dtype=torch.float32, device=self.device)
        column = torch.arange(columns, dtype=torch.float32, device=self.device)
        grid = torch.stack(torch.meshgrid(row, column, indexing="ij"), dim=-1).reshape(-1, 2)
        return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)
