"""Pref-GRPO (Wang et al. 2025, arXiv 2508.20751): Flow-GRPO whose reward is how often an image beats its group.

Pointwise scores of one prompt's images lie close together; dividing by their standard deviation makes large advantages
of small differences, which a policy learns to exploit. A judge that compares the images of a group gives win rates,
which spread by themselves. Pointwise rewards may stand beside it; each is normalised by itself before it is weighed.
The loop is :mod:`trainer_client.flow_grpo`'s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trainer_client import distributed, flow_grpo
from trainer_client.config import RewardsSection
from trainer_client.distributed import Json
from trainer_client.flow_grpo import FlowGRPOConfig
from trainer_client.items import Item
from trainer_client.prompts import Prompt
from trainer_client.results import CompareResponse
from trainer_client.reward_queue import Handle, QueueStats, RewardQueue, RewardSource, remote_comparisons
from trainer_client.rewards import API_KEY, RewardBatch, Rewards, served
from trainer_client.run import MakeRewards, Run

WIN_RATE = "win_rate"
"""The name of the judge's reward."""


class PrefRewardsSection(RewardsSection):
    """Pointwise rewards beside the judge, none by default, and how they and the win rate become one."""

    aggregate: Literal["sum", "per_reward", "gdpo"] = Field(
        "per_reward",
        description="weighted sum of advantages normalised by themselves, of rewards, or of the advantages once more "
        "over the batch (GDPO)",
    )


class PrefGRPOConfig(FlowGRPOConfig):
    """Flow-GRPO's values, and the judge's; the paper (FLUX) gives the win rate 0.4 and a CLIP score beside it 0.6."""

    judge: str = Field(description="the model that compares images; a pointwise one compares by its scores")
    judge_weight: float = Field(1.0, gt=0, description="of the win rate among the rewards")
    pairs: Literal["all", "adaptive"] = Field(
        "all", description="which pairs of a group are compared: all, or those that a tournament finds worth asking"
    )
    both_orders: bool = Field(True, description="show each pair both ways round: a judge may prefer a place")
    rewards: PrefRewardsSection = PrefRewardsSection()

    @property
    def reward_weights(self) -> dict[str, float]:
        return {**self.rewards.models, WIN_RATE: self.judge_weight}

    @property
    def judges(self) -> tuple[str, ...]:
        return (self.judge,)

    @model_validator(mode="after")
    def _judge_fits(self) -> PrefGRPOConfig:
        if WIN_RATE in self.rewards.models:
            raise ValueError(f"no reward model can be called {WIN_RATE!r}: the judge's reward is")
        if self.judge in self.evaluation.heldout:
            raise ValueError(f"{self.judge} is both the judge and held out")
        if self.evaluation.prompts and not self.rewards.models and not self.evaluation.heldout:
            raise ValueError("evaluation.prompts needs rewards.models or evaluation.heldout: win rates are no scores")
        return self


def train(
    config: PrefGRPOConfig,
    out: str | Path,
    *,
    make_rewards: MakeRewards | None = None,
    resume: bool = False,
    allow: Sequence[str] = (),
) -> Path:
    """Run Pref-GRPO; returns the run's folder. Raises as :class:`trainer_client.run.Run` does.

    ``make_rewards`` gives the win rates too; None: scores and comparisons by the services' models.
    """
    with Run[FlowGRPOConfig](
        "pref_grpo",
        config,
        out,
        make_rewards=make_rewards or judged_by(config),
        kl_weight=config.beta,
        resume=resume,
        allow=allow,
    ) as run:
        flow_grpo.optimise(run)
    return Path(out)


def judged_by(config: PrefGRPOConfig) -> MakeRewards:
    """Where a run gets its rewards: the services' scores, and their comparisons by the configuration's judge."""

    def make(settings: RewardsSection, names: Sequence[str], fingerprints: Mapping[str, str]) -> Rewards:
        judge = remote_comparisons(
            settings.services,
            config.judge,
            pairs=config.pairs,
            both_orders=config.both_orders,
            deadline=settings.deadline,
            patience=settings.patience,
            fingerprints={"score": {config.judge: fingerprints[config.judge]}},
            allow_fingerprint_change=settings.allow_fingerprint_change,
            api_key=os.environ.get(API_KEY),
        )
        return JudgedRewards(judge, config.group_size, beside=served(settings, names, fingerprints) if names else None)

    return make


@dataclass
class _Group:
    """What was submitted of a group so far: images uint8 [3, H, W], and their places in the order of submission."""

    prompt: Prompt
    images: list[Tensor] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


class JudgedRewards:
    """Win rates within groups of ``group_size`` images by a ``judge``, and the rewards of ``beside``, if any.

    A group is sent to the judge as soon as its last image is submitted, while the others are still drawn. Groups that
    are spread over ranks are gathered in :meth:`collect`, which every rank must call, after at least one image; one
    rank asks for each. An image of which no comparison succeeded has no win rate.
    """

    def __init__(self, judge: RewardSource[CompareResponse], group_size: int, *, beside: Rewards | None = None) -> None:
        self._queue = RewardQueue(judge)
        self._group_size = group_size
        self._beside = beside
        self._forget()

    def submit(self, images_B3HW: Tensor, prompts: Sequence[Prompt], group_B: Sequence[int]) -> None:
        if not len(images_B3HW) == len(prompts) == len(group_B):
            raise ValueError(f"{len(images_B3HW)} images, {len(prompts)} prompts and {len(group_B)} groups")
        if self._beside is not None:
            self._beside.submit(images_B3HW, prompts, group_B)
        self._nothing = images_B3HW[:0]
        for image, prompt, index in zip(images_B3HW, prompts, group_B, strict=True):
            group = self._begun.setdefault(index, _Group(prompt))
            group.images.append(image)
            group.places.append(self._count)
            self._count += 1
            if len(group.images) == self._group_size:
                del self._begun[index]
                self._asked.append((group.places, self._ask(prompt, torch.stack(group.images))))

    def collect(self) -> RewardBatch:
        try:
            return self._collected()
        finally:
            self._forget()

    def stats(self) -> QueueStats:
        """Of both kinds of questions together."""
        own = asdict(self._queue.stats())
        beside = asdict(QueueStats() if self._beside is None else self._beside.stats())
        return QueueStats(**{name: own[name] + beside[name] for name in own})

    def close(self) -> None:
        self._queue.close()
        if self._beside is not None:
            self._beside.close()

    def _collected(self) -> RewardBatch:
        rate_B = torch.full((self._count,), torch.nan, dtype=torch.float64)
        # First what all ranks do together: a rank that fails in its own part then leaves no other one waiting.
        places = [place for group in self._begun.values() for place in group.places]
        if int(distributed.gather_rows(torch.tensor([len(places)])).sum()):
            rate_B[places] = self._rates_of_spread_groups()
        for own, handle in self._asked:
            rate_B[own] = self._rates(handle)
        beside = RewardBatch({}, {}) if self._beside is None else self._beside.collect()
        return RewardBatch(
            {**beside.scores, WIN_RATE: rate_B},
            {**beside.ok, WIN_RATE: ~rate_B.isnan()},
            {**beside.fingerprints, **self._fingerprints},
            (*beside.failures, *self._failures),
        )

    def _forget(self) -> None:
        self._count = 0
        self._begun: dict[int, _Group] = {}
        self._asked: list[tuple[list[int], Handle[CompareResponse]]] = []
        self._nothing = torch.zeros((0, 3, 0, 0), dtype=torch.uint8)
        self._fingerprints: dict[str, str] = {}
        self._failures: list[str] = []

    def _ask(self, prompt: Prompt, images_N3HW: Tensor) -> Handle[CompareResponse]:
        return self._queue.submit(Item(prompt.text, images_N3HW, metadata=dict(prompt.metadata)))

    def _rates(self, handle: Handle[CompareResponse]) -> Tensor:
        """Win rates [N] of the one group that was asked, NaN where there is none."""
        response = handle.result()
        self._fingerprints |= response.fingerprints
        self._failures += [f"{failure.model}: {failure.code}: {failure.message}" for _, failure in response.failures()]
        return torch.from_numpy(response[0].as_array(WIN_RATE).values)

    def _rates_of_spread_groups(self) -> Tensor:
        """Win rates of the images whose groups this rank has in part, group by group."""

        def ask(group_N: Tensor, images_N3HW: Tensor, notes: list[Json]) -> Tensor:
            handles = []
            for index in torch.unique(group_N).tolist():
                rows = (group_N == index).nonzero().flatten()
                if len(rows) != self._group_size:
                    raise ValueError(f"group {index} has {len(rows)} images where {self._group_size} are due")
                text, metadata = notes[int(rows[0])]
                handles.append(self._ask(Prompt(text, metadata), images_N3HW[rows]))
            return torch.cat([self._rates(handle) for handle in handles])

        rows = [(index, group, image) for index, group in self._begun.items() for image in group.images]
        images = torch.stack([image for *_, image in rows]) if rows else self._nothing
        return distributed.rewards_of_whole_groups(
            torch.tensor([index for index, *_ in rows], dtype=torch.int64),
            images,
            [[group.prompt.text, dict(group.prompt.metadata)] for _, group, _ in rows],
            ask,
        )
