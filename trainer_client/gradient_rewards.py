"""Differentiable rewards of a run: asked on a thread, so that the trainer can sample while they are on their way."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from torch import Tensor

from trainer_client.client import RewardClient
from trainer_client.config import RewardsSection
from trainer_client.prompts import Prompt
from trainer_client.remote_reward import RemoteReward, RemoteTotals
from trainer_client.results import WireCounts
from trainer_client.reward_queue import QueueStats
from trainer_client.rewards import API_KEY, RewardBatch, joined


class DifferentiableReward(Protocol):
    """:class:`RemoteReward`, or a function of this process that answers as it does.

    It takes float32 images [B, 3, H, W] in [0, 1], a prompt and metadata for each; it is called on another thread.
    """

    def __call__(
        self, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None, /
    ) -> RemoteTotals: ...


class GradientRewards:
    """Totals with gradients by ``reward``, and its scores without them as other runs get theirs.

    ``names`` are the reward models. ``client`` is what ``reward`` asks, if anything; it is closed with this.
    """

    def __init__(self, reward: DifferentiableReward, names: Sequence[str], client: RewardClient | None = None) -> None:
        self._reward, self._names, self._client = reward, tuple(names), client
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gradients")
        self._submitted: list[Future[RemoteTotals]] = []
        self._asked = 0

    def ask(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Future[RemoteTotals]:
        """Start scoring float images; the answer's ``total`` is differentiable by them."""
        self._asked += 1
        texts, metadata = [prompt.text for prompt in prompts], [dict(prompt.metadata) for prompt in prompts]
        return self._thread.submit(self._reward, images_B3HW, texts, metadata)

    def submit(self, images_B3HW: Tensor, prompts: Sequence[Prompt], group_B: Sequence[int]) -> None:
        """Start scoring uint8 images, without gradients."""
        self._submitted.append(self.ask(images_B3HW.float() / 255, prompts))

    def collect(self) -> RewardBatch:
        """Scores of all that was submitted since the last time, in that order."""
        handles, self._submitted = self._submitted, []
        return joined([scores_of(handle.result(), self._names) for handle in handles])

    def stats(self) -> QueueStats:
        """Batches asked for, and what crossed the wire."""
        counts = WireCounts() if self._client is None else self._client.counts()
        return QueueStats(
            submitted=self._asked,
            requests=counts.requests,
            retries=counts.retries,
            bytes_sent=counts.bytes_sent,
            bytes_received=counts.bytes_received,
            cpu_seconds=counts.cpu_seconds,
        )

    def close(self) -> None:
        """Let go of connections; a call that still waits for a service ends with an error."""
        if self._client is not None:
            self._client.close()
        self._thread.shutdown(wait=False, cancel_futures=True)


MakeGradients = Callable[[RewardsSection, Sequence[str], Mapping[str, str]], GradientRewards]
"""(settings, names of models, fingerprints of their scores by name) -> where a run gets gradients."""


def served_gradients(config: RewardsSection, names: Sequence[str], fingerprints: Mapping[str, str]) -> GradientRewards:
    """Gradients by the models ``names`` of the services, weighted as in the configuration.

    ``fingerprints`` are those of scores, the ones that services list: they are insisted on before each request. Those
    of gradients differ from them (another dtype and batch shape) and are insisted on from their first use.
    """
    client = RewardClient(
        config.services,
        patience=config.patience,
        fingerprints={"score": {name: fingerprints[name] for name in names if name in fingerprints}},
        allow_fingerprint_change=config.allow_fingerprint_change,
        api_key=os.environ.get(API_KEY),
    )
    weights = {name: config.models[name] for name in names}
    return GradientRewards(RemoteReward(client, weights, deadline=config.deadline), names, client)


def scores_of(totals: RemoteTotals, names: Sequence[str]) -> RewardBatch:
    """The scores by ``names``, without gradients."""
    scores = {name: totals.scores[name].detach().double().cpu() for name in names}
    return RewardBatch(
        scores,
        {name: values.isfinite() for name, values in scores.items()},
        failures=tuple(f"{failure.model}: {failure.code}: {failure.message}" for _, failure in totals.failures),
    )
