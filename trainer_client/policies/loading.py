"""From a diffusers folder or hub id to a policy, by the pipeline class that its model_index.json names."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch

from trainer_client.policies.base import Policy

FAMILIES = {
    "StableDiffusion3Pipeline": ("trainer_client.policies.sd3", "SD3Policy"),
    "FluxPipeline": ("trainer_client.policies.flux", "FluxPolicy"),
    "QwenImagePipeline": ("trainer_client.policies.qwen_image", "QwenImagePolicy"),
    "StableDiffusionPipeline": ("trainer_client.policies.ddpm_pipeline", "StableDiffusionPolicy"),
    "StableDiffusionXLPipeline": ("trainer_client.policies.ddpm_pipeline", "StableDiffusionXLPolicy"),
}
"""Module and class of the policy for each pipeline class; a family is imported when it is needed."""


def from_pretrained(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    **options: Any,
) -> Policy:
    """The policy of a diffusers folder or hub id, on ``device``; only safetensors are read, never pickles.

    Network and text encoders compute in ``dtype``, the VAE in float32. ``options`` go to the policy:
    ``max_sequence_length``, and ``sampler`` for Stable Diffusion 1, 2 and XL. Raises ValueError for a pipeline class
    that has no policy, naming those that have.
    """
    index = diffusers.DiffusionPipeline.load_config(str(source), revision=revision)
    name = str(index["_class_name"])
    if name not in FAMILIES:
        raise ValueError(f"{source} is a {name}; there are policies for {', '.join(FAMILIES)}")
    # A pipeline that was saved without a part, such as T5, asks for the part unless told that there is none.
    given: dict[str, Any] = {part: None for part, library in index.items() if library in ([None, None], (None, None))}
    if "safety_checker" in index:
        given |= {"safety_checker": None, "requires_safety_checker": False}  # a policy doesn't use it
    pipeline = getattr(diffusers, name).from_pretrained(
        str(source), revision=revision, dtype={"default": dtype, "vae": torch.float32}, use_safetensors=True, **given
    )
    return policy_for(pipeline.to(device), **options)


def policy_for(pipeline: Any, **options: Any) -> Policy:
    """The policy over a pipeline in memory; ``options`` and errors as for :func:`from_pretrained`."""
    name = type(pipeline).__name__
    if name not in FAMILIES:
        raise ValueError(f"this is a {name}; there are policies for {', '.join(FAMILIES)}")
    module, policy_class = FAMILIES[name]
    policy: Policy = getattr(import_module(module), policy_class)(pipeline, **options)
    return policy
