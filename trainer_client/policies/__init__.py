"""Policies: text-to-image models under training, over diffusers pipelines. Needs the extra "train".

In use::

    policy = from_pretrained(folder_or_hub_id, device="cuda", dtype=torch.bfloat16)
    weights = policy.train_lora(rank=32, alpha=64)  # or train_full()
    weights.add("old")
    optimizer = torch.optim.AdamW(weights.tensors(), lr=3e-4)
    encode = PromptCache(policy.encode_prompts, negative="")
    conditioning = encode(prompts).repeat(group)
    latents, sigmas = policy.initial_latents(seeds, 512, 512), policy.sigmas(10, 512, 512)
    velocity = policy.velocity(latents, sigmas[0], conditioning, guidance_scale=4.5)
    with policy.reference(), torch.no_grad(): ...  # policy.use("old") likewise
    policy.save_lora(directory)
"""

from trainer_client.policies.base import Policy
from trainer_client.policies.conditioning import Conditioning, PromptCache
from trainer_client.policies.ddpm_pipeline import DDPMPolicy
from trainer_client.policies.flow_pipeline import FlowPolicy
from trainer_client.policies.loading import FAMILIES, from_pretrained, policy_for
from trainer_client.policies.weights import TrainableWeights

__all__ = [
    "FAMILIES",
    "Conditioning",
    "DDPMPolicy",
    "FlowPolicy",
    "Policy",
    "PromptCache",
    "TrainableWeights",
    "from_pretrained",
    "policy_for",
]
