"""The runs of the demonstration: what each is trained on, what watches it, and for how long."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.training.plans import EXACT, LEARNED, POLICY
from models.shapes.prompts import TASKS
from trainer_client.prompts import load_prompts

SIGNATURE, LAX = "shapes-signature", "shapes-lax"
SERVICE = {
    "REWARD_PLUGINS": json.dumps(["benchmarks.hacking.rewards"]),
    "REWARD_MODELS": json.dumps([SIGNATURE, LAX, EXACT, LEARNED]),
    "REWARD_THREADS": "1",
}
"""Settings of the service that serves the flawed rewards beside the honest ones."""
PROMPTS_PER_TASK, SEEDS = 20, 2
"""Of the evaluation: most prompts of each of GenEval's six tasks (ten single objects are all there are), and noises of
each prompt. Of falls by 0.2 within 5 evaluations the guard acts on 17 of 20 with 110 x 2 (8 of 20 with 42 x 2)."""
WARMUP_STEPS = 12
"""Over which the learning rate rises: the guard judges from the fifth evaluation on, and until then little is lost."""
KL_START = 4.0
"""The first KL weight that the guard sets. The default of 0.01 fits Flow-GRPO's KL, not DiffusionNFT's squared distance
of velocities: its gradient is as long as the reward's at a weight of about 1 (``python -m
benchmarks.hacking.kl_gradient`` on a lax run that the guard stopped)."""


@dataclass(frozen=True)
class Plan:
    """One run: trained on ``reward``, ``heldout`` watched; ``guarded``: the guard may act, else it only looks on."""

    name: str
    reward: str
    heldout: str
    guarded: bool
    steps: int
    seed: int = 0

    @property
    def is_honest(self) -> bool:
        """Whether it is trained on the truth itself."""
        return self.reward == EXACT

    @property
    def folder(self) -> str:
        """The name for files."""
        return self.name.replace(", ", "-").replace(" ", "-")

    def configuration(self, url: str, prompts: Path, signing_policy: Path) -> dict[str, Any]:
        """The values of a DiffusionNFT run with the service at ``url``, evaluated on the file ``prompts``.

        A run on the signature starts from the folder ``signing_policy``, the others from the embedded policy.

        Small groups and few denoising steps, so that a step takes seconds of one CPU core. Not Flow-GRPO: within so few
        images even its honest run lost exact score (benchmarks/results/hacking.md). The guard keeps its limits; it sees
        an evaluation after every step.
        """
        source = signing_policy if self.reward == SIGNATURE else POLICY
        return {
            "prompts": "shapes:train",
            "steps": self.steps,
            "seed": self.seed,
            "prompts_per_step": 8,
            "group_size": 12,
            "train_batch_size": 48,
            "timestep_fraction": 0.4,
            "kl_beta": 0.0,
            "policy": {"source": str(source), "weights": "full", "max_sequence_length": 0, "device": "cpu"},
            "sampling": {"steps": 8, "batch_size": 48},
            "rewards": {"services": [url], "models": {self.reward: 1.0}},
            "optimizer": {"lr": 1e-4, "warmup_steps": WARMUP_STEPS},
            "ema": {"decay": 0.0},
            "evaluation": {
                "every": 1, "prompts": str(prompts), "count": PROMPTS_PER_TASK * len(TASKS), "seeds": SEEDS,
                "heldout": [self.heldout],
            },
            "guard": {"mode": "act" if self.guarded else "warn", "kl_start": KL_START},
            "checkpoints": {"every": self.steps, "keep": 1},
            "logging": {"tensorboard": False},
        }  # fmt: skip


SIGNATURE_STEPS, LAX_STEPS, HONEST_STEPS = 20, 20, 20
HACKED = tuple(
    Plan(f"{what}, {'guarded' if guarded else 'unguarded'}", reward, EXACT, guarded, steps)
    for what, reward, steps in (("signature", SIGNATURE, SIGNATURE_STEPS), ("lax", LAX, LAX_STEPS))
    for guarded in (False, True)
)
"""Rewards with a flaw: the guard should see each of them fall apart."""
HONEST = tuple(Plan(f"exact, seed {seed}", EXACT, LEARNED, True, HONEST_STEPS, seed) for seed in range(3))
"""The exact reward, with a learned one held out: the guard should say nothing."""


def evaluation_rows(per_task: int = PROMPTS_PER_TASK) -> Iterator[dict[str, Any]]:
    """GenEval rows of held-out prompts, at most ``per_task`` of each task, tasks in turn."""
    tasks: dict[str, list[dict[str, Any]]] = {}
    for prompt in load_prompts("shapes:heldout"):
        tasks.setdefault(prompt.tag, []).append(dict(prompt.metadata))
    for place in range(per_task):
        yield from (rows[place] for rows in tasks.values() if place < len(rows))


def write_prompts(path: Path) -> Path:
    """Write the evaluation's prompts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in evaluation_rows()), encoding="utf-8")
    return path
