"""ReFL on several ranks: CONFIG.json OUT MEETING RANK WORLD_SIZE; and the reward that it is tested by."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer_client import distributed
from trainer_client.config import parse_config
from trainer_client.errors import SampleFailure
from trainer_client.gradient_rewards import GradientRewards, MakeGradients
from trainer_client.refl import ReFLConfig, train
from trainer_client.remote_reward import RemoteTotals

PROMPTS = ["a red circle", "two blue squares to the left of a green triangle", "a star", "three yellow circles"]
FAILS = frozenset({"a star"})


@dataclass
class Quality:
    """A differentiable reward; images of the prompts ``fails`` have none."""

    fails: frozenset[str] = frozenset()

    def __call__(
        self, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None, /
    ) -> RemoteTotals:
        ok = torch.tensor([prompt not in self.fails for prompt in prompts])
        total = torch.where(ok, quality(images_B3HW, prompts), 0.0)
        scores = torch.where(ok, total.detach(), torch.nan)
        failures = [(k, SampleFailure("mean", "model_error", "broken")) for k in range(len(ok)) if not ok[k]]
        return RemoteTotals(total, ok, {"mean": scores}, failures)


def quality(images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
    """Another picture is wanted for each length of a prompt; of the order of 1."""
    totals = []
    for image, prompt in zip(images_B3HW, prompts, strict=True):
        wanted = torch.rand(image.shape, generator=torch.Generator().manual_seed(len(prompt)))
        totals.append(1.5 - 4 * (image - wanted).square().mean() + len(prompt) / 50)
    return torch.stack(totals)


def local(reward: Any) -> MakeGradients:
    return lambda settings, names, fingerprints: GradientRewards(reward, names)


def main(config: Path, out: Path, meeting: Path, rank: int, world_size: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    train(parse_config(ReFLConfig, json.loads(config.read_text())), out, make_rewards=local(Quality(FAILS)))
    distributed.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *map(int, sys.argv[4:]))
    sys.stderr.flush()
    os._exit(0)  # Python 3.11 aborts where a thread of gloo asks for the GIL of an interpreter that is going down
