"""Policies that predict noise against the diffusers pipelines that they are built over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, PNDMScheduler

from tests.trainer_client.policies.tiny_pipelines import PROMPTS, build
from trainer_client.policies import DDPMPolicy, PromptCache, policy_for

SIZE = {"height": 32, "width": 24}
TOLERANCE = 1e-4
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sd-ddim": ("sd", {}, {}),
    "sd-ddpm": ("sd", {}, {"sampler": "ddpm"}),
    "sd-v": ("sd", {"prediction_type": "v_prediction"}, {}),
    "sdxl-ddim": ("sdxl", {}, {}),
    "sdxl-ddpm": ("sdxl", {}, {"sampler": "ddpm"}),
}


def policy_of(case: str) -> DDPMPolicy:
    family, options, policy_options = CASES[case]
    policy = policy_for(build(family, **options), **policy_options)
    assert isinstance(policy, DDPMPolicy)
    return policy


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("case", CASES)
def test_samples_are_those_of_the_pipeline(case: str, guidance: float) -> None:
    policy = policy_of(case)
    ours = policy.sample(PROMPTS, [7, 8], steps=4, guidance_scale=guidance, **SIZE)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    theirs = policy.pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=guidance, generator=generators, output_type="pt", **SIZE
    ).images
    assert ours.shape == (2, 3, 32, 24)
    assert ours.std() > 0.02
    assert (ours - theirs).abs().max() < TOLERANCE


def test_samples_are_those_of_the_pipeline_from_given_latents() -> None:
    policy = policy_of("sd-ddim")
    latents = policy.initial_latents([3, 4], **SIZE)
    theirs = policy.pipeline(PROMPTS, num_inference_steps=3, guidance_scale=2.0, latents=latents, output_type="pt")
    assert (policy.sample(PROMPTS, [3, 4], steps=3, guidance_scale=2.0, **SIZE) - theirs.images).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_the_prompt_and_the_size_matter(case: str) -> None:
    policy = policy_of(case)
    latents = policy.initial_latents([1, 1], **SIZE)
    prediction = policy.prediction(latents, 500, policy.encode_prompts(PROMPTS))
    assert (prediction[0] - prediction[1]).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("case", ["sd-ddim", "sd-v", "sdxl-ddim"])
def test_a_prediction_does_not_depend_on_its_neighbours(case: str) -> None:
    policy = policy_of(case)
    latents = policy.initial_latents([1, 2], **SIZE)
    timesteps = torch.tensor([900, 20])
    together = policy.prediction(latents, timesteps, policy.encode_prompts(PROMPTS, ["", "a square"]), 3.0)
    for i, negative in enumerate(["", "a square"]):
        alone = policy.encode_prompts([PROMPTS[i]], negative)
        expected = policy.prediction(latents[[i]], int(timesteps[i]), alone, 3.0)
        assert (together[[i]] - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", ["sd-ddim", "sd-v"])
def test_a_perfect_prediction_gives_the_clean_latents_back(case: str) -> None:
    policy = policy_of(case)
    x0, noise = policy.initial_latents([1, 2], **SIZE), policy.initial_latents([3, 4], **SIZE)
    timesteps = torch.tensor([999, 3])
    noisy = policy.add_noise(x0, noise, timesteps)
    torch.testing.assert_close(noisy, policy.pipeline.scheduler.add_noise(x0, noise, timesteps), rtol=1e-5, atol=1e-5)
    found = policy.predict_x0(noisy, policy.target(x0, noise, timesteps), timesteps)
    torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", ["sd-ddim", "sd-v", "sd-ddpm"])
def test_clean_predictions_are_the_schedulers(case: str) -> None:
    policy = policy_of(case)
    latents = policy.initial_latents([1], **SIZE)
    scheduler = policy.scheduler(40)
    assert len(scheduler.timesteps) == 40
    timestep = scheduler.timesteps[30]
    prediction = policy.prediction(latents, timestep, policy.encode_prompts(PROMPTS[:1]))
    theirs = scheduler.step(prediction, timestep, latents).pred_original_sample
    torch.testing.assert_close(policy.predict_x0(latents, prediction, timestep), theirs, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_an_image_reaches_the_network_through_one_step() -> None:
    policy = policy_of("sd-ddim")
    weights = policy.train_lora(2, 2)
    conditioning = policy.encode_prompts(PROMPTS)
    latents = policy.initial_latents([1, 2], **SIZE)
    prediction = policy.prediction(latents, 300, conditioning)
    policy.decode(policy.predict_x0(latents, prediction, 300)).mean().backward()
    moved = [key for key, tensor in weights.named_tensors().items() if tensor.grad is not None and tensor.grad.any()]
    assert moved
    assert all(key.endswith("lora_B") for key in moved)  # A's gradient is B's value, which starts at zero


def test_an_empty_negative_of_sdxl_is_zeros_and_another_is_not() -> None:
    policy = policy_of("sdxl-ddim")
    negative = policy.encode_prompts(PROMPTS, ["", "a"]).negative
    assert negative is not None
    assert negative.pooled is not None
    assert (negative.embeddings[0] == 0).all()
    assert (negative.pooled[0] == 0).all()
    assert torch.equal(negative.embeddings[1:], policy.encode_prompts(["a"]).embeddings)
    assert policy.encode_prompts([""]).embeddings.any()  # as a prompt it is encoded
    cached = PromptCache(policy.encode_prompts, negative="")(PROMPTS).negative
    assert cached is not None
    assert (cached.embeddings == 0).all()


@pytest.mark.parametrize("foreign", [PNDMScheduler, EulerDiscreteScheduler])
def test_another_scheduler_gives_way_to_ddim_with_its_noise(foreign: Any) -> None:
    pipeline = build("sd")
    pipeline.scheduler = foreign(
        beta_start=0.001, beta_end=0.02, beta_schedule="linear", steps_offset=1, timestep_spacing="leading"
    )
    alpha_bars = pipeline.scheduler.alphas_cumprod
    policy = policy_for(pipeline)
    assert isinstance(policy, DDPMPolicy)
    assert type(policy.pipeline.scheduler).__name__ == "DDIMScheduler"
    assert not policy.pipeline.scheduler.config.clip_sample
    torch.testing.assert_close(policy.alpha_bar(torch.arange(1000)).flatten(), alpha_bars)


def test_what_is_not_supported_is_refused() -> None:
    with pytest.raises(ValueError, match="'epsilon' or 'v_prediction', not 'sample'"):
        policy_for(build("sd", prediction_type="sample"))
    with pytest.raises(ValueError, match="'ddim' or 'ddpm', not 'euler'"):
        policy_for(build("sd"), sampler="euler")
    with pytest.raises(ValueError, match="prompt length of sd is fixed"):
        policy_for(build("sd"), max_sequence_length=10)
