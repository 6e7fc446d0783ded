"""``python -m benchmarks.training.reward_wait``: a training step with a remote reward over one with a free reward.

One Flow-GRPO run of the embedded policy, whose steps take turns: the images of even steps are scored by a real
service whose reward sleeps (the share ``--reward-share`` of the time that sampling them takes), those of odd steps by a
function in the process. Medians over the steps of each kind; everything else is the same. Beside the ratio: the time
that the trainer stood still, and the processor time that the wire cost it.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.report import RESULTS, number
from benchmarks.server import ROOT, serve
from trainer_client.config import RewardsSection, parse_config
from trainer_client.flow_grpo import FlowGRPOConfig, train
from trainer_client.items import Item
from trainer_client.prompts import Prompt
from trainer_client.reward_queue import LocalScores, QueueStats
from trainer_client.rewards import PointwiseRewards, RewardBatch, Rewards, served

TARGET = 1.03
POLICY = ROOT / "models" / "shapes" / "weights" / "policy"


class TakingTurns:
    """Rewards that are remote in even steps and free in odd ones."""

    def __init__(self, remote: Rewards, free: Rewards) -> None:
        self._sources = (remote, free)
        self._turn = 0

    def submit(self, images_B3HW: Tensor, prompts: Sequence[Prompt], group_B: Sequence[int]) -> None:
        self._sources[self._turn].submit(images_B3HW, prompts, group_B)

    def collect(self) -> RewardBatch:
        found = self._sources[self._turn].collect()
        self._turn = 1 - self._turn
        return found

    def stats(self) -> QueueStats:
        return self._sources[0].stats()

    def close(self) -> None:
        for source in self._sources:
            source.close()


def brightness(item: Item) -> list[float]:
    """What the sleeping model says, without sleep."""
    images = torch.as_tensor(item.images)
    return [float(value) for value in images.float().flatten(1).mean(1) / 255]


def configuration(url: str, steps: int, batch_size: int, smallest_batch: int | None) -> FlowGRPOConfig:
    """192 images a step, 10 denoising steps, a window of 3."""
    return parse_config(
        FlowGRPOConfig,
        {
            "prompts": "shapes:train",
            "steps": steps,
            "prompts_per_step": 12,
            "group_size": 16,
            "train_batch_size": 64,
            "window": "fast",
            "policy": {"source": str(POLICY), "weights": "full", "max_sequence_length": 0},
            "sampling": {"steps": 10, "batch_size": batch_size, "smallest_batch": smallest_batch},
            "rewards": {"services": [url], "models": {"sleeping": 1.0}},
            "optimizer": {"lr": 1e-6},
            "checkpoints": {"every": steps},
            "logging": {"tensorboard": False, "progress": False},
        },
    )


def rows_of(folder: Path) -> list[dict[str, float]]:
    """The training rows of a run's log."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def measure(image_s: float, steps: int, batch_size: int, smallest_batch: int | None) -> list[dict[str, float]]:
    """The training rows of a run that takes turns, the first of each kind left out."""
    settings = {
        "REWARD_PLUGINS": '["benchmarks.training.sleeping"]',
        "REWARD_MODELS": json.dumps({"sleeping": {"options": {"image_s": image_s}, "micro_batch": batch_size}}),
        "REWARD_THREADS": "1",
    }
    with serve(settings) as server, tempfile.TemporaryDirectory() as folder:

        def make(config: RewardsSection, names: Sequence[str], fingerprints: Mapping[str, str]) -> Rewards:
            free = PointwiseRewards(LocalScores(brightness, "sleeping"), names)
            return TakingTurns(served(config, names, fingerprints), free)

        config = configuration(server.url, steps + 2, batch_size, smallest_batch)
        out = train(config, Path(folder) / "run", make_rewards=make)
        return rows_of(out)[2:]


def main(
    steps: Annotated[int, typer.Option(help="steps of each kind")] = 12,
    batch_size: Annotated[int, typer.Option(help="images that are drawn, decoded and submitted together")] = 16,
    smallest_batch: Annotated[int | None, typer.Option(help="the last batch is drawn in halves down to it")] = 4,
    reward_share: Annotated[float, typer.Option(help="the reward's time over that of sampling the images")] = 0.5,
    write: Annotated[bool, typer.Option(help="write benchmarks/results/reward_wait.md")] = False,
) -> None:
    """Print the ratio; exit 1 above the target."""
    torch.set_num_threads(1)
    trial = measure(0.0, 4, batch_size, smallest_batch)
    image_s = reward_share * statistics.median(row["time/sample"] for row in trial) / 192
    load = os.getloadavg()[0]
    rows = measure(image_s, 2 * steps, batch_size, smallest_batch)
    remote, free = rows[0::2], rows[1::2]

    def median(chosen: Sequence[Mapping[str, float]], name: str) -> float:
        return statistics.median(row[name] for row in chosen)

    ratio = median(remote, "time/step") / median(free, "time/step")
    table = Table("quantity", "remote", "free", title="a Flow-GRPO step of 192 images of the embedded policy")
    for name in ("time/step", "time/sample", "time/reward_wait", "time/train"):
        table.add_row(f"{name}, s", number(median(remote, name)), number(median(free, name)))
    wire, sent = median(remote, "wire/cpu_seconds"), median(remote, "wire/bytes_sent")
    table.add_row("processor time of the wire, s", number(wire), "")
    table.add_row("sent, MB", number(sent / 1e6), "")
    Console().print(table)
    asleep = f"The reward sleeps {image_s * 1e3:.1f} ms an image ({reward_share:.0%} of sampling it)"
    waited = f"{median(remote, 'time/reward_wait'):.3f} s of {median(remote, 'time/step'):.2f} s"
    lines = [
        f"{asleep}, {batch_size} images at a time, the last of them in halves down to {smallest_batch}.",
        f"Step with the remote reward over the step with a free one: {ratio:.3f} (target {TARGET}).",
        f"Medians of {steps} steps of each kind, which took turns in one run; load average before: {load:.1f}.",
        f"The trainer waited {waited}; {wire:.3f} s of processor time went into sending {sent / 1e6:.2f} MB.",
    ]
    Console().print("\n".join(lines), highlight=False, soft_wrap=True)
    if write:
        head = "<!-- written by python -m benchmarks.training.reward_wait --write -->\n\n"
        (RESULTS / "reward_wait.md").write_text(head + "\n\n".join(lines) + "\n", encoding="utf-8")
    raise typer.Exit(0 if ratio <= TARGET else 1)


if __name__ == "__main__":
    typer.run(main)
