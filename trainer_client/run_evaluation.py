"""The policy on fixed prompts and seeds while it trains: held-out rewards, the guard's data, samples for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer_client import distributed
from trainer_client.config import RunConfig
from trainer_client.distributed import derived_seed
from trainer_client.eval_statistics import mean_interval
from trainer_client.guard_metrics import group_diversity
from trainer_client.policies import Policy
from trainer_client.prompts import Prompt
from trainer_client.rewards import RewardBatch, Rewards
from trainer_client.run_batch import gathered, thumbnails
from trainer_client.run_setup import TOTAL


@dataclass(frozen=True)
class Evaluated:
    """Scores and ok [P, S] by reward (the trained ones' weighted sum is "total"), uint8 images [P, S, 3, H, W]."""

    scores: dict[str, Tensor]
    ok: dict[str, Tensor]
    images_PS3HW: Tensor
    failures: tuple[str, ...]

    def numbers(self) -> dict[str, float]:
        """Means with 95 % intervals over prompts, for the log."""
        found: dict[str, float] = {}
        for name, scores_PS in self.scores.items():
            interval = mean_interval(scores_PS, self.ok[name])
            found |= {
                f"eval/{name}": interval.mean,
                f"eval/{name}/low": interval.low,
                f"eval/{name}/high": interval.high,
            }
        failed = torch.stack([~ok_PS for ok_PS in self.ok.values()]).any(0)
        found["eval/failed_ratio"] = float(failed.double().mean())
        prompts, seeds = failed.shape
        if seeds > 1:
            groups = torch.arange(prompts).repeat_interleave(seeds)
            found["eval/diversity"] = float(group_diversity(thumbnails(self.images_PS3HW.flatten(0, 1)), groups).mean())
        return found


class Evaluation:
    """Draws ``seeds`` images of each prompt, always from the same noise, and asks ``rewards`` for all of them.

    The images are spread over the ranks, and every rank gets the same answer.
    """

    def __init__(self, config: RunConfig, prompts: Sequence[Prompt], policy: Policy, rewards: Rewards) -> None:
        self._config = config
        self.prompts = list(prompts[: config.evaluation.count])
        self.seeds = [config.evaluation.seed + column for column in range(config.evaluation.seeds)]
        self._policy = policy
        self._rewards = rewards

    def run(self) -> Evaluated:
        """Raises RewardError where the services cannot be reached within the run's patience."""
        settings, sampling = self._config.evaluation, self._config.sampling
        places = [(p, s) for p in range(len(self.prompts)) for s in range(len(self.seeds))]
        own = distributed.own_share(len(places))
        images: list[Tensor] = []
        for start in range(own.start, own.stop, sampling.batch_size):
            chosen = places[start : min(start + sampling.batch_size, own.stop)]
            told = [self.prompts[p] for p, _ in chosen]
            guided = self._policy.needs_negative(sampling.guidance_scale)
            drawn = self._policy.sample(
                [prompt.text for prompt in told],
                [derived_seed("evaluation", self.seeds[s], p) for p, s in chosen],
                steps=settings.steps or sampling.steps,
                guidance_scale=sampling.guidance_scale,
                negative=sampling.negative if guided else None,
                height=sampling.height,
                width=sampling.width,
            )
            pixels = (drawn * 255).round().to(torch.uint8).cpu()
            self._rewards.submit(pixels, told, [p for p, _ in chosen])
            images.append(pixels)
        found, pixels_N = self._gather(images)
        shape = (len(self.prompts), len(self.seeds))
        trained = self._config.rewards.models
        scores, ok = dict(found.scores), dict(found.ok)
        if trained:
            scores[TOTAL], ok[TOTAL] = found.total(trained)
        return Evaluated(
            {name: values.reshape(shape) for name, values in scores.items()},
            {name: values.reshape(shape) for name, values in ok.items()},
            pixels_N.reshape(*shape, *pixels_N.shape[1:]),
            found.failures,
        )

    def _gather(self, images: Sequence[Tensor]) -> tuple[RewardBatch, Tensor]:
        """A rank without an image of its own has no rewards to gather either, and so sends rows of none."""
        names = [*self._config.rewards.models, *self._config.evaluation.heldout]
        nothing = RewardBatch(
            {name: torch.zeros(0, dtype=torch.float64) for name in names},
            {name: torch.zeros(0, dtype=torch.bool) for name in names},
        )
        error: Exception | None = None
        found = nothing
        try:
            found = self._rewards.collect() if images else nothing
        except Exception as caught:  # it is raised below, on every rank
            error = caught
        distributed.raise_together(error)
        return gathered(found), distributed.gather_rows(torch.cat(list(images)) if images else None)


def guard_scores(evaluated: Evaluated, names: Sequence[str]) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """(scores, ok) by name, as a guard takes them."""
    return {name: evaluated.scores[name] for name in names}, {name: evaluated.ok[name] for name in names}
