"""How strong a KL weight is in DiffusionNFT: ``python -m benchmarks.hacking.kl_gradient RUN`` on a run's last weights.

The gradient of the reward's loss and that of the squared distance to the reference's velocity are taken on one fresh
batch, group by group as in a step of the run, with the lax score as reward. The ratio of their lengths says what a KL
weight does: at a weight of one over it both pull equally hard. The batch is drawn in two halves, and the cosine between
their gradients tells how much of a gradient is signal.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks.hacking.rewards import lax_score
from benchmarks.training.plans import POLICY
from models.shapes.oracle import detect
from models.shapes.prompts import parse
from trainer_client.advantages import group_advantages
from trainer_client.losses import mean_squared_difference
from trainer_client.nft_losses import forward_noising, nft_loss, nft_probability
from trainer_client.policies import FlowPolicy, from_pretrained
from trainer_client.prompts import load_prompts
from trainer_client.solvers import solve
from trainer_client.trained_policy import apply, locate


@dataclass(frozen=True)
class Sizes:
    """Of the loss of the reward and of the KL term at weight 1: gradient lengths, and cosines between two halves.

    ``kl``: mean squared distance to the reference's velocity. ``reward``: mean of the batch.
    """

    reward: float
    kl: float
    reward_gradient: float
    kl_gradient: float
    reward_cosine: float
    kl_cosine: float


def gradients(policy: FlowPolicy, prompts: Sequence[str], group_size: int, steps: int, levels: int) -> Sizes:
    """Measure on ``group_size`` images of each of an even number of ``prompts``, drawn in ``steps`` denoising steps and
    noised to ``levels`` of their noise levels."""
    half = len(prompts) // 2
    found = [_half(policy, part, group_size, steps, levels) for part in (prompts[:half], prompts[half:])]
    (reward, kl, scores, distance) = (torch.stack(values) for values in zip(*found, strict=True))
    return Sizes(
        reward=scores.mean().item(),
        kl=distance.mean().item(),
        reward_gradient=reward.mean(0).norm().item(),
        kl_gradient=kl.mean(0).norm().item(),
        reward_cosine=cosine_similarity(reward[0], reward[1], dim=0).item(),
        kl_cosine=cosine_similarity(kl[0], kl[1], dim=0).item(),
    )


def _half(policy: FlowPolicy, prompts: Sequence[str], size: int, steps: int, levels: int) -> tuple[Tensor, ...]:
    """(gradient of the reward's loss, gradient of the KL term, mean reward, KL) of one half of the batch."""
    texts = [text for text in prompts for _ in range(size)]
    told, sigmas = policy.encode_prompts(texts), policy.sigmas(steps, None, None)
    with torch.no_grad():
        noise = policy.initial_latents([torch.Generator().manual_seed(i) for i in range(len(texts))], None, None)
        x0 = solve(lambda x, sigma: policy.velocity(x, sigma, told, 1.0), noise, sigmas, "dpm2")
        rewards = lax_scores(texts, policy.decode(x0))
    group_B = torch.arange(len(prompts)).repeat_interleave(size)
    probability_B = nft_probability(group_advantages(rewards, group_B))
    parameters = policy.weights.tensors()
    totals = [torch.zeros(sum(each.numel() for each in parameters)) for _ in range(2)]
    distance = torch.zeros(())
    for _ in range(levels):
        sigma_B = sigmas[torch.randint(len(sigmas) - 1, (len(texts),))]
        x_t = forward_noising(x0, torch.randn_like(x0), sigma_B)
        with torch.no_grad(), policy.reference():
            reference = policy.velocity(x_t, sigma_B, told, 1.0)
        velocity = policy.velocity(x_t, sigma_B, told, 1.0)
        kl = mean_squared_difference(velocity, reference)
        loss = nft_loss(x0, x_t, sigma_B, velocity, velocity.detach(), probability_B, beta=1.0).loss
        for total, term in zip(totals, (loss, kl), strict=True):
            parts = torch.autograd.grad(term / levels, parameters, retain_graph=True, materialize_grads=True)
            total += torch.cat([part.flatten() for part in parts])
        distance += kl.detach() / levels
    return totals[0], totals[1], rewards.mean(), distance


def lax_scores(texts: Sequence[str], images_B3HW: Tensor) -> Tensor:
    """float64 [B] of images in [0, 1]. Raises ValueError for a prompt outside the grammar of the shapes world."""
    scores = []
    for text, pixels in zip(texts, (images_B3HW.permute(0, 2, 3, 1) * 255).round().to(torch.uint8), strict=True):
        prompt = parse(text)
        if prompt is None:
            raise ValueError(f"not a prompt of the shapes world: {text!r}")
        scores.append(lax_score(prompt, detect(PILImage.fromarray(pixels.numpy()))))
    return torch.tensor(scores, dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run that trained the whole embedded policy")
    parser.add_argument("--prompts", type=int, default=16, help="an even number")
    parser.add_argument("--group-size", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    policy = from_pretrained(POLICY, max_sequence_length=0)
    if not isinstance(policy, FlowPolicy):
        raise TypeError(f"the embedded policy is a rectified flow, not a {type(policy).__name__}")
    apply(policy, locate(arguments.run))
    texts = [prompt.text for prompt in load_prompts("shapes:train")]
    chosen = np.random.default_rng(arguments.seed).choice(len(texts), arguments.prompts, replace=False)
    found = gradients(policy, [texts[i] for i in chosen.tolist()], arguments.group_size, steps=8, levels=3)
    print(found)
    print(f"equal at a KL weight of {found.reward_gradient / found.kl_gradient:.2f}")


if __name__ == "__main__":
    main()
