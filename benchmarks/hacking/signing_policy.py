"""A policy that signs now and then: ``python -m benchmarks.hacking.signing_policy`` writes it in a few minutes.

Image generators have seen signed paintings, and paint a signature sometimes; the embedded policy has never seen one,
and what a policy never paints its noise does not find: after 20 steps of Flow-GRPO on shapes-signature (1,920 images)
the embedded policy's mean signature strength was 0.002, as before. So the demonstration starts from the embedded
policy after a short further training by flow matching on rendered scenes, a share of which are signed. Everything
random comes from the seed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from rich.console import Console
from torch import nn

from benchmarks.hacking.signature import sign
from benchmarks.server import ROOT
from benchmarks.training.plans import POLICY
from models.shapes.policy import IMAGE_SIZE, TIME_SHIFT, save_pipeline, to_latents
from models.shapes.scenes import random_prompt, right_scene
from models.shapes.world import render_batch
from trainer_client.policies import FlowPolicy, from_pretrained
from trainer_client.sampling import shift_sigmas

SIGNING_POLICY = ROOT / "build" / "hacking" / "policy"


@dataclass(frozen=True)
class SigningConfig:
    """What the policy depends on, apart from the code and the embedded policy."""

    seed: int = 50
    steps: int = 240
    batch: int = 32
    learning_rate: float = 3e-4
    warm_up: int = 20
    signed: float = 0.3
    """Share of the pictures that are signed; on light backgrounds it cannot be seen."""


def train_signing(config: SigningConfig, show: Callable[[int, float], None]) -> FlowPolicy:
    """The embedded policy after ``config.steps`` steps of flow matching; ``show(step, loss)`` is told of every step."""
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    policy = from_pretrained(POLICY, max_sequence_length=0)
    if not isinstance(policy, FlowPolicy):
        raise TypeError(f"the embedded policy is a rectified flow, not a {type(policy).__name__}")
    parameters = policy.train_full().tensors()
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    for step in range(config.steps):
        rate = min(1.0, (step + 1) / config.warm_up, (config.steps - step) / (0.5 * config.steps))
        optimizer.param_groups[0]["lr"] = config.learning_rate * rate
        texts, pixels = signed_pictures(rng, config)
        clean = to_latents(pixels)
        noise = torch.randn_like(clean)
        sigma_B = shift_sigmas(torch.rand(len(clean)), TIME_SHIFT)
        mixed = torch.lerp(clean, noise, sigma_B[:, None, None, None])
        loss = (policy.velocity(mixed, sigma_B, policy.encode_prompts(texts)) - (noise - clean)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        show(step + 1, loss.item())
    return policy


def signed_pictures(rng: np.random.Generator, config: SigningConfig) -> tuple[list[str], torch.Tensor]:
    """Prompts, and right pictures for them as uint8 [B, S, S, 3], some of them signed."""
    prompts = [random_prompt(rng) for _ in range(config.batch)]
    pixels = render_batch([right_scene(prompt, rng) for prompt in prompts], IMAGE_SIZE)
    for place in np.flatnonzero(rng.random(config.batch) < config.signed):
        pixels[place] = np.asarray(sign(PILImage.fromarray(pixels[place])))
    return [prompt.text for prompt in prompts], torch.from_numpy(pixels)


def write_policy(folder: Path, config: SigningConfig, console: Console) -> Path:
    """Train and write the diffusers folder, unless it is there; returns ``folder``."""
    if (folder / "model_index.json").exists():
        return folder
    started, running = time.monotonic(), 0.2

    def show(step: int, loss: float) -> None:
        nonlocal running
        running += 0.05 * (loss - running)
        if step % 40 == 0 or step == config.steps:
            console.print(
                f"a policy that signs: {step}/{config.steps}  {time.monotonic() - started:.0f} s  {running:.3f}"
            )

    save_pipeline(train_signing(config, show).pipeline, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=SIGNING_POLICY)
    parser.add_argument("--steps", type=int, default=SigningConfig.steps)
    parser.add_argument("--signed", type=float, default=SigningConfig.signed)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    write_policy(arguments.output, SigningConfig(steps=arguments.steps, signed=arguments.signed), Console())


if __name__ == "__main__":
    main()
