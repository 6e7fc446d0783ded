"""A rollout's samples on this rank, and their rewards compared over all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer_client import distributed
from trainer_client.advantages import combined_advantages, group_advantages
from trainer_client.config import RewardsSection, RunConfig
from trainer_client.guard_metrics import TrainingMetrics, training_metrics
from trainer_client.prompt_order import PromptOrder
from trainer_client.prompts import Prompt
from trainer_client.rewards import RewardBatch


@dataclass(frozen=True)
class Batch:
    """This rank's B samples of one rollout, by contiguous indices over all ranks.

    ``group_B`` int64 [B] counts the rollout's prompts over all ranks; ``chunk_B`` [B] says in which of the step's
    optimizer steps a sample counts. ``generators`` draw a sample's noise, whatever batch it is drawn in.
    """

    seed: int
    step: int
    indices: range
    prompts: list[Prompt]
    group_B: Tensor
    chunk_B: Tensor
    generators: list[torch.Generator]

    def __len__(self) -> int:
        return len(self.prompts)

    def group_generator(self, row: int) -> torch.Generator:
        """A fresh generator that is the same for all samples of the row's group, on every rank."""
        seed = distributed.derived_seed(self.seed, self.step, "group", int(self.group_B[row]))
        return torch.Generator().manual_seed(seed)

    def pieces(self, size: int, chunk: int | None = None, smallest: int | None = None) -> Iterator[list[int]]:
        """Rows of the batch (or of one chunk), at most ``size`` at a time.

        With ``smallest`` the last ``size`` rows of the whole batch come in halves down to that number: the rewards of
        the last images are what a step waits for.
        """
        chosen = [row for row in range(len(self)) if chunk is None or int(self.chunk_B[row]) == chunk]
        last = not chosen or chosen[-1] == len(self) - 1
        start = 0
        while start < len(chosen):
            left = len(chosen) - start
            taken = min(size, left) if smallest is None or not last or left > size else halved(left, smallest)
            yield chosen[start : start + taken]
            start += taken


@dataclass(frozen=True)
class Advantages:
    """Of this rank's samples: float64 ``advantage_B``, 0 where bool ``ok_B`` is False, and the rewards ``total_B``,
    NaN there."""

    advantage_B: Tensor
    ok_B: Tensor
    total_B: Tensor


def draw_batch(config: RunConfig, step: int, prompts: Sequence[Prompt], order: PromptOrder) -> Batch:
    """The next prompts of ``order``, each as often as the algorithm draws it; this rank's share."""
    taken = order.take(config.prompts_per_step)
    own = distributed.own_share(config.images_per_step)
    groups = [index // config.images_per_prompt for index in own]
    return Batch(
        config.seed,
        step,
        own,
        [prompts[taken[group]] for group in groups],
        torch.tensor(groups, dtype=torch.int64),
        torch.tensor([index % config.updates_per_step for index in own], dtype=torch.int64),
        distributed.sample_generators(config.seed, step, own),
    )


def halved(left: int, smallest: int) -> int:
    """How many of ``left`` images come next: half of them, or all where fewer than ``smallest`` would be left."""
    return (left + 1) // 2 if left // 2 >= smallest else left


def parts(rows_N: Tensor, size: int) -> Iterator[Tensor]:
    """``rows_N`` int64 [N], at most ``size`` at a time; nothing for no rows, where torch.split gives an empty part."""
    for start in range(0, len(rows_N), size):
        yield rows_N[start : start + size]


def gathered(found: RewardBatch) -> RewardBatch:
    """Rewards of every rank, in the order of ranks; the failures stay this rank's own."""
    return RewardBatch(
        {name: distributed.gather_rows(scores) for name, scores in found.scores.items()},
        {name: distributed.gather_rows(ok) for name, ok in found.ok.items()},
        found.fingerprints,
        found.failures,
    )


def compare(
    found: RewardBatch, weights: Mapping[str, float], group_N: Tensor, settings: RewardsSection
) -> tuple[Tensor, Tensor, Tensor]:
    """(advantage, ok, total) float64, bool and float64 [N] of all ranks' samples."""
    total_N, ok_N = found.total(weights)
    if settings.aggregate == "sum":
        advantage_N = group_advantages(total_N, group_N, ok_B=ok_N, scale=settings.std)
    else:
        advantage_N = combined_advantages(
            {name: found.scores[name] for name in weights},
            weights,
            group_N,
            ok={name: found.ok[name] for name in weights},
            scale=settings.std,
            standardise=settings.aggregate == "gdpo",
        )
    return torch.where(ok_N, advantage_N, 0.0), ok_N, total_N


def own_rows(values_N: Tensor, count: int) -> Tensor:
    """The part of all ranks' rows that belongs to this rank, which has ``count`` of them."""
    counts = distributed.gather_rows(torch.tensor([count]))
    start = int(counts[: distributed.rank()].sum())
    return values_N[start : start + count]


def thumbnails(images_B3HW: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float [B, 3, 16, 16] in [0, 1]: what the diversity of a group is measured on."""
    return F.adaptive_avg_pool2d(images_B3HW.float() / 255, 16)


def reward_numbers(
    found: RewardBatch, total_N: Tensor, ok_N: Tensor, advantage_N: Tensor, watched: TrainingMetrics
) -> dict[str, float]:
    """What a log tells of a rollout's rewards."""
    numbers = {
        "reward/total": watched.reward_mean,
        "group_std": watched.group_std,
        "zero_std_ratio": watched.zero_std_ratio,
        "failed_ratio": watched.failed_ratio,
        "advantage_abs": float(advantage_N[ok_N].abs().mean()),
    }
    for name, scores in found.scores.items():
        known = scores[found.ok[name]]
        numbers[f"reward/{name}"] = float(known.mean())
        numbers[f"reward_std/{name}"] = float(known.std(correction=0))
    if watched.diversity is not None:
        numbers["diversity"] = watched.diversity
    return numbers


def watch(total_N: Tensor, ok_N: Tensor, group_N: Tensor, thumbnails_N: Tensor) -> TrainingMetrics:
    """What the guard is told of a rollout; groups of one image have neither spread nor diversity."""
    alone = bool((torch.unique(group_N, return_counts=True)[1] < 2).all())
    return training_metrics(total_N, group_N, ok_B=ok_N, images_BCHW=None if alone else thumbnails_N)


class Means:
    """Weighted means of a step's numbers over its backward passes and over all ranks."""

    def __init__(self, *names: str) -> None:
        self._sums = {name: torch.zeros(2, dtype=torch.float64) for name in names}

    def add(self, numbers: Mapping[str, Tensor], weight: int) -> None:
        """Scalars of ``weight`` samples; names that were not announced raise KeyError."""
        for name, number in numbers.items():
            self._sums[name] += torch.tensor([float(number) * weight, weight], dtype=torch.float64)

    def over_ranks(self) -> dict[str, float]:
        """The means by name, those that nothing was added to left out; every rank must call it."""
        stacked = torch.stack(list(self._sums.values()))[None]
        total = distributed.gather_rows(stacked).sum(0)
        return {name: float(row[0] / row[1]) for name, row in zip(self._sums, total, strict=True) if row[1] > 0}
