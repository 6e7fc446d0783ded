"""Policies on another device than the CPU, without having one: fake tensors refuse to mix devices as real ones do."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.trainer_client.policies.tiny_pipelines import BUILDERS, PROMPTS, build
from trainer_client.policies import DDPMPolicy, FlowPolicy, policy_for


@pytest.mark.parametrize("family", BUILDERS)
def test_nothing_stays_behind_on_the_cpu(family: str) -> None:
    pipeline = build(family)
    on_cpu = policy_for(pipeline)
    conditioning = on_cpu.encode_prompts(PROMPTS, None if family == "flux" else "")
    latents = on_cpu.initial_latents([1, 2], 32, 32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with torch.device("cuda"):
            for name in (on_cpu.network_name, "vae"):
                part = getattr(pipeline, name)
                setattr(pipeline, name, type(part).from_config(part.config).eval())
        policy = policy_for(pipeline)
        assert policy.device.type == "cuda"
        conditioning = conditioning.map(mode.from_tensor).to("cuda")
        latents = mode.from_tensor(latents).to("cuda")
        levels = torch.tensor([500, 200])  # schedules and their sigmas are on the CPU
        guidance = 1.0 if family == "flux" else 2.0
        if isinstance(policy, FlowPolicy):
            x0 = policy.velocity(latents, levels / 1000, conditioning, guidance)
        else:
            assert isinstance(policy, DDPMPolicy)
            noisy = policy.add_noise(latents, latents, levels)
            x0 = policy.predict_x0(noisy, policy.prediction(noisy, levels, conditioning, guidance), levels)
        images = policy.decode(x0)
        again = policy.encode(images)
    assert (x0.device.type, images.device.type, again.device.type) == ("cuda",) * 3
    assert again.shape == latents.shape
