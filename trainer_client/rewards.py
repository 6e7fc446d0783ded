"""Rewards of a rollout: asked as soon as a batch of images is decoded, collected when all are there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from trainer_client.advantages import weighted_sum
from trainer_client.config import RewardsSection
from trainer_client.items import Item
from trainer_client.prompts import Prompt
from trainer_client.results import ScoreResponse
from trainer_client.reward_queue import Handle, QueueStats, RewardQueue, RewardSource, remote_scores

API_KEY = "REWARD_API_KEY"
"""The environment variable with the services' key."""

MOST_IMAGES, MOST_BYTES = 64, 64 << 20
"""Of one request: half of what a service takes by default in bytes, and its images of one item."""


@dataclass(frozen=True)
class RewardBatch:
    """Rewards of B images: ``scores`` float64 [B] by name, NaN where ``ok`` bool [B] is False.

    ``fingerprints`` by name say what scored them; ``failures`` are the reasons, one text for each failed score.
    """

    scores: dict[str, Tensor]
    ok: dict[str, Tensor]
    fingerprints: dict[str, str] = field(default_factory=dict)
    failures: tuple[str, ...] = ()

    def total(self, weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """Weighted sum float64 [B], NaN for a sample that failed one of the rewards, and where it is known."""
        return weighted_sum({name: self.scores[name] for name in weights}, weights, {n: self.ok[n] for n in weights})


class Rewards(Protocol):
    """Where a run gets its rewards: batches are submitted while sampling goes on, and collected together."""

    def submit(self, images_B3HW: Tensor, prompts: Sequence[Prompt], group_B: Sequence[int]) -> None:
        """Start scoring uint8 [B, 3, H, W] images on the CPU; ``group_B`` says which share a prompt."""
        ...

    def collect(self) -> RewardBatch:
        """Rewards of all that was submitted since the last time, in that order; waits for them."""
        ...

    def stats(self) -> QueueStats:
        """What was done so far."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class PointwiseRewards:
    """Scores by reward models, of services or of any :class:`RewardSource`; the reward models are ``names``."""

    def __init__(self, source: RewardSource[ScoreResponse], names: Sequence[str]) -> None:
        self._queue = RewardQueue(source)
        self._names = tuple(names)
        self._handles: list[Handle[ScoreResponse]] = []

    def submit(self, images_B3HW: Tensor, prompts: Sequence[Prompt], group_B: Sequence[int]) -> None:
        size = max(1, min(MOST_IMAGES, MOST_BYTES // max(images_B3HW[:1].nbytes, 1)))
        for start in range(0, len(images_B3HW), size):
            rows = slice(start, start + size)
            self._handles.append(self._queue.submit(items_of(images_B3HW[rows], prompts[rows], group_B[rows])))

    def collect(self) -> RewardBatch:
        handles, self._handles = self._handles, []
        return joined([from_response(handle.result(), self._names) for handle in handles])

    def stats(self) -> QueueStats:
        return self._queue.stats()

    def close(self) -> None:
        self._queue.close()


def served(config: RewardsSection, names: Sequence[str], fingerprints: Mapping[str, str]) -> Rewards:
    """Scores by the models ``names`` of the services; their ``fingerprints`` by name are insisted on."""
    source = remote_scores(
        config.services,
        list(names),
        deadline=config.deadline,
        patience=config.patience,
        fingerprints={"score": {name: fingerprints[name] for name in names if name in fingerprints}},
        allow_fingerprint_change=config.allow_fingerprint_change,
        api_key=os.environ.get(API_KEY),
    )
    return PointwiseRewards(source, names)


def items_of(images_B3HW: Tensor, prompts: Sequence[Prompt], group_B: Sequence[int]) -> list[Item]:
    """One item for each run of neighbours that share a group: a prompt travels once for its images."""
    if not len(images_B3HW) == len(prompts) == len(group_B):
        raise ValueError(f"{len(images_B3HW)} images, {len(prompts)} prompts and {len(group_B)} groups")
    items = []
    for _, rows in groupby(range(len(group_B)), key=lambda row: group_B[row]):
        chosen = list(rows)
        prompt = prompts[chosen[0]]
        items.append(Item(prompt.text, images_B3HW[chosen[0] : chosen[-1] + 1], metadata=dict(prompt.metadata)))
    return items


def from_response(response: ScoreResponse, names: Sequence[str]) -> RewardBatch:
    """The scores of a response by ``names``."""
    found = {name: response.as_array(name) for name in names}
    return RewardBatch(
        {name: torch.from_numpy(array.values).double() for name, array in found.items()},
        {name: torch.from_numpy(array.ok) for name, array in found.items()},
        {name: response.models[name].fingerprint for name in names},
        tuple(f"{failure.model}: {failure.code}: {failure.message}" for _, failure in response.failures()),
    )


def joined(parts: Sequence[RewardBatch]) -> RewardBatch:
    """Batches one after the other. Raises ValueError for none."""
    if not parts:
        raise ValueError("nothing was submitted")
    return RewardBatch(
        {name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores},
        {name: torch.cat([part.ok[name] for part in parts]) for name in parts[0].ok},
        {name: fingerprint for part in parts for name, fingerprint in part.fingerprints.items()},
        tuple(failure for part in parts for failure in part.failures),
    )
