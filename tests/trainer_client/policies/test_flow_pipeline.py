"""Flow policies against the diffusers pipelines that they are built over: the same images from the same seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.shapes.policy import build_pipeline
from tests.trainer_client.policies.tiny_pipelines import PROMPTS, build
from trainer_client.policies import FlowPolicy, policy_for
from trainer_client.policies.flow_pipeline import pack, unpack
from trainer_client.sampling import flow_match_sigmas

SIZE = {"height": 32, "width": 24}
TOLERANCE = 1e-4

Variant = tuple[str, dict[str, Any], dict[str, Any]]
"""Family, options of the tiny pipeline, options of the policy."""
VARIANTS: dict[str, Variant] = {
    "sd3": ("sd3", {}, {}),
    "sd3-short": ("sd3", {}, {"max_sequence_length": 40}),
    "sd3-dynamic": ("sd3", {"use_dynamic_shifting": True, "max_image_seq_len": 512}, {}),
    "sd3-no-t5": ("sd3", {"text_encoder_3": False}, {}),
    "sd3-no-t5-no-zeros": ("sd3", {"text_encoder_3": False}, {"max_sequence_length": 0}),
    "flux-dev": ("flux", {}, {}),
    "flux-schnell": ("flux", {"guidance_embeds": False}, {"max_sequence_length": 64}),
    "qwen-image": ("qwen-image", {}, {}),
}
SCHNELL = ("flux-schnell", 3.5)  # takes no guidance
FAMILIES = ["sd3", "flux-dev", "qwen-image"]


def policy_of(variant: str) -> FlowPolicy:
    family, options, policy_options = VARIANTS[variant]
    policy = policy_for(build(family, **options), **policy_options)
    assert isinstance(policy, FlowPolicy)
    return policy


def pipeline_images(policy: FlowPolicy, prompts: list[str], steps: int, guidance: float, **inputs: Any) -> Tensor:
    """What the pipeline's own __call__ makes."""
    if policy.family == "qwen-image":
        guided = {"true_cfg_scale": guidance, "negative_prompt": [""] * len(prompts)} if guidance > 1 else {}
    else:
        guided = {"guidance_scale": guidance}
    if policy.max_sequence_length is not None:
        inputs["max_sequence_length"] = policy.max_sequence_length
    images: Tensor = policy.pipeline(
        prompts, num_inference_steps=steps, output_type="pt", **SIZE, **guided, **inputs
    ).images
    return images


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(
    ("variant", "guidance"), [(variant, g) for variant in VARIANTS for g in (1.0, 3.5) if (variant, g) != SCHNELL]
)
def test_samples_are_those_of_the_pipeline(variant: str, guidance: float) -> None:
    policy = policy_of(variant)
    ours = policy.sample(PROMPTS, [7, 8], steps=4, guidance_scale=guidance, **SIZE)
    theirs = pipeline_images(policy, PROMPTS, 4, guidance, generator=generators([7, 8]))
    assert ours.shape == (2, 3, 32, 24)
    assert ours.std() > 0.02  # not a grey plane that anything would equal
    assert (ours - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_those_of_the_pipeline_from_given_latents(family: str) -> None:
    policy = policy_of(family)
    latents = policy.initial_latents([3, 4], **SIZE)
    handed = latents if family == "sd3" else pack(latents)
    ours = policy.sample(PROMPTS, [3, 4], steps=3, guidance_scale=2.0, **SIZE)
    assert (ours - pipeline_images(policy, PROMPTS, 3, 2.0, latents=handed)).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_the_seed_and_guidance_matter(family: str) -> None:
    policy = policy_of(family)
    first = policy.sample([PROMPTS[0]], [1], steps=2, **SIZE)
    for other in (
        policy.sample([PROMPTS[1]], [1], steps=2, **SIZE),
        policy.sample([PROMPTS[0]], [2], steps=2, **SIZE),
        policy.sample([PROMPTS[0]], [1], steps=2, guidance_scale=4.0, **SIZE),
    ):
        assert (first - other).abs().max() > 10 * TOLERANCE


def test_a_negative_prompt_is_the_pipelines() -> None:
    policy = policy_of("sd3")
    ours = policy.sample(PROMPTS, [1, 2], steps=3, guidance_scale=3.0, negative=["blue", "a circle"], **SIZE)
    theirs = pipeline_images(
        policy, PROMPTS, 3, 3.0, generator=generators([1, 2]), negative_prompt=["blue", "a circle"]
    )
    assert (ours - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_latents_depend_on_their_own_seed_only(family: str) -> None:
    policy = policy_of(family)
    both = policy.initial_latents([5, 6], **SIZE)
    assert both.shape == (2, *policy.latent_shape(**SIZE))
    assert both.dtype == torch.float32
    assert torch.equal(both[1:], policy.initial_latents([6], **SIZE))
    assert torch.equal(both, policy.initial_latents(generators([5, 6]), **SIZE))
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_velocity_does_not_depend_on_its_neighbours(family: str) -> None:
    """Rows have their own sigma and prompt; Qwen-Image's prompts are padded to the longest of the batch."""
    policy = policy_of(family)
    latents = policy.initial_latents([1, 2], **SIZE)
    sigma = torch.tensor([0.9, 0.3])
    negative = None if family == "flux-dev" else ["", "a square"]
    together = policy.encode_prompts(PROMPTS, negative)
    velocity = policy.velocity(latents, sigma, together, 2.5)
    assert velocity.shape == latents.shape
    for i in range(2):
        alone = policy.encode_prompts([PROMPTS[i]], None if negative is None else negative[i])
        expected = policy.velocity(latents[[i]], sigma[i].item(), alone, 2.5)
        assert (velocity[[i]] - expected).abs().max() < TOLERANCE
    assert (velocity - policy.velocity(latents, sigma.flip(0), together, 2.5)).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_sigmas_are_those_that_the_pipeline_used(variant: str) -> None:
    policy = policy_of(variant)
    sigmas = policy.sigmas(5, **SIZE)
    pipeline_images(policy, PROMPTS[:1], 5, 1.0, generator=generators([0]))
    assert sigmas.dtype == torch.float32
    assert torch.equal(sigmas, policy.pipeline.scheduler.sigmas)


def test_dynamic_shifting_keeps_larger_images_longer_at_large_sigmas() -> None:
    for variant in ("sd3-dynamic", "flux-dev", "qwen-image"):
        policy = policy_of(variant)
        assert (policy.sigmas(6, 256, 256)[1:-2] > policy.sigmas(6, 32, 32)[1:-2]).all()


def test_a_static_schedule_is_the_one_in_sampling() -> None:
    torch.testing.assert_close(policy_of("sd3").sigmas(8), flow_match_sigmas(8, 3.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_differentiable(family: str) -> None:
    policy = policy_of(family)
    latents = policy.initial_latents([1, 2], **SIZE).requires_grad_()
    images = policy.decode(latents)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    images[0].mean().backward()
    assert latents.grad is not None
    assert latents.grad[0].abs().sum() > 0
    assert (latents.grad[1] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_encoding_undoes_the_scaling_of_decoding(family: str) -> None:
    """A VAE whose posterior and decoder are the identity would give images back; here a random one is looked at
    channel by channel."""
    policy = policy_of(family)
    images = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    pixels = images * 2 - 1
    config = policy.vae.config
    if family == "qwen-image":
        mode = policy.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
        scaled = [
            (mode[:, i] - mean) / std
            for i, (mean, std) in enumerate(zip(config.latents_mean, config.latents_std, strict=True))
        ]
        expected = torch.stack(scaled, dim=1)
    else:
        expected = (policy.vae.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    latents = policy.encode(images)
    assert latents.shape == (2, *policy.latent_shape(**SIZE))
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)


def test_the_shapes_policy_round_trips_pictures() -> None:
    """Its autoencoder is the identity up to 1e-3, so this sees scale and shift of both directions at once."""
    policy = policy_for(build_pipeline(width=32, layers=1), max_sequence_length=0)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert (policy.decode(policy.encode(images)) - images).abs().max() < 1e-3
    assert policy.encode_prompts(["a red circle"]).embeddings.shape[1] == 24
    assert policy.default_size == (32, 32)


def test_packing_is_the_pipelines_and_comes_back() -> None:
    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    packed = pack(latents)
    assert torch.equal(packed, build("flux")._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(unpack(packed, 6, 8), latents)


def test_guidance_that_is_not_to_be_had_is_refused() -> None:
    sd3, dev, schnell = policy_of("sd3"), policy_of("flux-dev"), policy_of("flux-schnell")
    latents = sd3.initial_latents([1], **SIZE)
    with pytest.raises(ValueError, match="needs a negative prompt"):
        sd3.velocity(latents, 0.5, sd3.encode_prompts(["a"]), 2.0)
    with pytest.raises(ValueError, match="no negative prompts"):
        dev.encode_prompts(["a"], "")
    with pytest.raises(ValueError, match="takes no guidance"):
        schnell.sample(["a"], [1], steps=1, guidance_scale=3.5, **SIZE)


def test_sizes_that_do_not_fit_are_refused() -> None:
    policy = policy_of("sd3")
    with pytest.raises(ValueError, match="multiples of 4, not 30x24"):
        policy.initial_latents([1], 30, 24)
    conditioning = policy.encode_prompts(["a"])
    with pytest.raises(ValueError, match="2 latents, 1 prompts and 1 noise levels"):
        policy.velocity(policy.initial_latents([1, 2], **SIZE), 0.5, conditioning)
    with pytest.raises(ValueError, match="1 negative prompts for 2"):
        policy.encode_prompts(PROMPTS, [""])
    with pytest.raises(ValueError, match="no prompts"):
        policy.encode_prompts([])


def test_schedulers_of_other_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="stochastic_sampling"):
        policy_for(build("sd3", stochastic_sampling=True))
    pipeline = build("sd3")
    pipeline.scheduler = build("sd").scheduler
    with pytest.raises(ValueError, match="not a DDIMScheduler"):
        policy_for(pipeline)
