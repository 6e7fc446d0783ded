"""A rollout's images on their way to their rewards, and what comes of them: advantages over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer_client import distributed
from trainer_client.config import RunConfig
from trainer_client.guard_metrics import TrainingMetrics
from trainer_client.rewards import RewardBatch, Rewards
from trainer_client.run_batch import Advantages, Batch, compare, gathered, own_rows, reward_numbers, thumbnails, watch


class RunFailed(RuntimeError):
    """A run cannot go on; the message is one line."""


@dataclass(frozen=True)
class Compared:
    """The rewards of a rollout: this rank's ``advantages``, what the guard watches, numbers for the log, and how many
    scores ``failed`` on all ranks, with the first reason."""

    advantages: Advantages
    watched: TrainingMetrics
    numbers: dict[str, float]
    failed: int
    reason: str


class Scoring:
    """Pieces of a rollout are submitted as they are decoded, in any order, and collected together."""

    def __init__(self, rewards: Rewards) -> None:
        self._rewards = rewards
        self._submitted: list[tuple[list[int], Tensor]] = []

    @property
    def pending(self) -> bool:
        """Whether something was submitted and not collected."""
        return bool(self._submitted)

    def submit(self, images_B3HW: Tensor, batch: Batch, rows: Sequence[int]) -> None:
        """Start scoring the images [b, 3, H, W] in [0, 1] of some rows of the batch."""
        pixels = (images_B3HW.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        self._rewards.submit(pixels, [batch.prompts[row] for row in rows], [int(batch.group_B[row]) for row in rows])
        self._submitted.append((list(rows), thumbnails(pixels)))

    def collect(self) -> tuple[RewardBatch, Tensor]:
        """Wait for the rewards; they and the thumbnails in the order of the batch.

        Raises what any rank's rewards raise, on every rank: one alone would leave the others waiting.
        """
        submitted, self._submitted = self._submitted, []
        error: Exception | None = None
        try:
            found = self._rewards.collect()
        except Exception as caught:
            error = caught
        distributed.raise_together(error)
        places = torch.tensor([row for rows, _ in submitted for row in rows]).argsort()
        ordered = replace(
            found,
            scores={name: scores[places] for name, scores in found.scores.items()},
            ok={name: ok[places] for name, ok in found.ok.items()},
        )
        return ordered, torch.cat([small for _, small in submitted])[places]


def compare_rewards(found: RewardBatch, thumbnails_B: Tensor, batch: Batch, config: RunConfig) -> Compared:
    """Each sample against its group, over all ranks. Raises RunFailed where not one image has a reward."""
    everywhere = gathered(found)
    group_N = distributed.gather_rows(batch.group_B)
    advantage_N, ok_N, total_N = compare(everywhere, config.reward_weights, group_N, config.rewards)
    reasons = distributed.gather_json([len(found.failures), *found.failures[:1]])
    reason = next((each[1] for each in reasons if each[0]), "none was given")
    if not bool(ok_N.any()):
        raise RunFailed(f"step {batch.step}: not one image has a reward; the first reason: {reason}")
    watched = watch(total_N, ok_N, group_N, distributed.gather_rows(thumbnails_B))
    return Compared(
        Advantages(*(own_rows(values, len(batch)) for values in (advantage_N, ok_N, total_N))),
        watched,
        reward_numbers(everywhere, total_N, ok_N, advantage_N, watched),
        sum(each[0] for each in reasons),
        reason,
    )
