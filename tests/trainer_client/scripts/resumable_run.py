"""A small training run that can be killed at any moment: FOLDER STEPS SAVE_EVERY SLOW_EXPORT_SECONDS.

Everything that a checkpoint must hold takes part: accumulated gradients under AdamW and a schedule, an average of the
weights, prompts in a shuffled order, noise of an explicit generator, and draws of all global generators.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer_client.checkpoint import Checkpoints, RunIdentity, policy_identity
from trainer_client.distributed import derived_seed, sample_generators
from trainer_client.ema import ema_update_, power_decay
from trainer_client.prompt_order import PromptOrder
from trainer_client.run_state import RunState, rewind_log

PROMPTS = [f"{count} {colour} circles" for count in ("two", "three", "four") for colour in ("red", "green", "blue")]
ACCUMULATED, BATCH = 2, 4


class Run:
    """Network, optimizer and all else; ``step()`` is one optimizer step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.1), nn.Tanh(), nn.Linear(32, 8))
        config = {"widths": [8, 32, 8], "dropout": 0.1}
        settings = {"seed": 3, "optimizer": {"lr": 3e-3}, "accumulated": ACCUMULATED}
        self.identity = RunIdentity("flow_grpo", **policy_identity(self.network, config), configuration=settings)
        self.weights = dict(self.network.named_parameters())
        self.ema = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=3e-3)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 50)
        self.order = PromptOrder(PROMPTS, seed=3)
        self.noise = torch.Generator().manual_seed(5)
        self.counters: dict[str, Any] = {"step": 0, "samples": 0}
        self.state = RunState(
            weights=self.weights, ema=self.ema, optimizer=self.optimizer, schedule=self.schedule, order=self.order,
            noise=self.noise, counters=self.counters,
        )  # fmt: skip

    def step(self) -> dict[str, Any]:
        losses = []
        for _ in range(ACCUMULATED):
            chosen = self.order.take(BATCH)
            loss = self._loss(chosen) / ACCUMULATED
            loss.backward()
            losses.append(loss.item())
            self.counters["samples"] += BATCH
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.counters["step"] += 1
        ema_update_(self.ema.values(), self.weights.values(), power_decay(self.counters["step"], 0.9))
        return {"losses": losses, "lr": self.schedule.get_last_lr(), "chosen": chosen, **self.counters}

    def _loss(self, chosen: list[int]) -> Tensor:
        targets = torch.stack(
            [torch.randn(8, generator=torch.Generator().manual_seed(derived_seed(i))) for i in chosen]
        )
        generators = sample_generators(3, self.counters["step"], chosen)
        inputs = targets + torch.stack([torch.randn(8, generator=each) for each in generators])
        shared = torch.randn(BATCH, 8, generator=self.noise)
        scale = 1 + 0.1 * random.random() + 0.1 * float(np.random.normal())
        return (self.network(inputs + 0.1 * shared) - scale * targets).square().mean()


def main(folder: Path, steps: int, save_every: int, slow: float) -> None:
    run = Run()
    random.seed(time.time_ns())
    np.random.seed(time.time_ns() % 2**32)
    checkpoints, log = Checkpoints(folder / "checkpoints"), folder / "metrics.jsonl"
    if checkpoints.latest() is None:
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(4)
        log.unlink(missing_ok=True)
    else:
        rewind_log(log, run.state.load(checkpoints, run.identity).step)

    def export(into: Path) -> None:
        (into / "half.txt").write_text("first half")
        time.sleep(slow)

    with log.open("a", buffering=1) as file:
        while (step := run.counters["step"]) < steps:
            metrics = run.step()
            file.write(json.dumps(metrics) + "\n")
            step += 1
            if step % save_every == 0 or step == steps:
                score = -sum(metrics["losses"])
                run.state.save(checkpoints, step, run.identity, score=score, exports={"half": export})
            time.sleep(0.005)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
