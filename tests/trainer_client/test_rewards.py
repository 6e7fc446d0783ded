"""Rewards of a rollout: batches, groups, failures, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.trainer_client.conftest import FINGERPRINT, RewardServer
from trainer_client.config import RewardsSection
from trainer_client.errors import FingerprintChanged, RewardError
from trainer_client.items import Item
from trainer_client.prompts import Prompt
from trainer_client.reward_queue import LocalScores
from trainer_client.rewards import API_KEY, PointwiseRewards, RewardBatch, items_of, joined, served

RED, BLUE = Prompt("red", {"target": "a"}), Prompt("blue")


def grey(*levels: int) -> Tensor:
    """uint8 [B, 3, 4, 4]."""
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()


def test_images_of_a_prompt_travel_together() -> None:
    items = items_of(grey(1, 2, 3, 4), [RED, RED, BLUE, RED], [0, 0, 1, 2])
    assert [(item.prompt, len(item)) for item in items] == [("red", 2), ("blue", 1), ("red", 1)]
    assert items[0].metadata == {"target": "a"}


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12))
def test_no_image_is_lost_or_moved(groups: list[int]) -> None:
    prompts = [Prompt(f"prompt {group}") for group in groups]
    items = items_of(grey(*range(len(groups))), prompts, groups)
    flat = [
        (item.prompt, round(float(torch.as_tensor(image).float().mean()))) for item in items for image in told(item)
    ]
    assert flat == [(prompt.text, place) for place, prompt in enumerate(prompts)]


def told(item: Item) -> list[Tensor]:
    """The images of an item."""
    assert isinstance(item.images, Tensor)
    return list(item.images)


@pytest.mark.parametrize(("side", "most"), [(4, 64), (2048, 5)])
def test_requests_stay_below_what_a_service_takes(side: int, most: int) -> None:
    """A group of 96 small images, or of 7 large ones, goes in several requests and comes back in order."""
    sizes: list[int] = []

    def first_pixel(item: Item) -> list[float]:
        images = told(item)
        sizes.append(len(images))
        return [float(image[0, 0, 0]) for image in images]

    count = 96 if side == 4 else 7
    levels = torch.arange(count, dtype=torch.uint8)[:, None, None, None]
    rewards = PointwiseRewards(LocalScores(first_pixel), ["local"])
    try:
        rewards.submit(levels.expand(-1, 3, side, side), [RED] * count, [0] * count)
        found = rewards.collect()
    finally:
        rewards.close()
    assert max(sizes) == most
    assert found.scores["local"].tolist() == list(range(count))


def test_lengths_must_fit() -> None:
    with pytest.raises(ValueError, match="2 images, 1 prompts and 2 groups"):
        items_of(grey(1, 2), [RED], [0, 0])


def batch(scores: Sequence[float], name: str = "a", failures: tuple[str, ...] = ()) -> RewardBatch:
    values = torch.tensor(scores, dtype=torch.float64)
    return RewardBatch({name: values}, {name: ~values.isnan()}, {name: "f"}, failures)


def test_batches_are_joined_in_their_order() -> None:
    both = joined([batch([1.0, math.nan], failures=("x",)), batch([3.0])])
    assert both.scores["a"][[0, 2]].tolist() == [1.0, 3.0]
    assert both.ok["a"].tolist() == [True, False, True]
    assert (both.fingerprints, both.failures) == ({"a": "f"}, ("x",))
    with pytest.raises(ValueError, match="nothing was submitted"):
        joined([])


def test_a_total_needs_every_reward() -> None:
    one, other = batch([1.0, math.nan, 3.0]), batch([10.0, 20.0, math.nan], "b")
    both = RewardBatch(one.scores | other.scores, one.ok | other.ok)
    total, ok = both.total({"a": 2.0, "b": -0.5})
    assert ok.tolist() == [True, False, False]
    assert total[0] == pytest.approx(-3.0)
    assert total[1:].isnan().all()
    total, ok = both.total({"a": 2.0})
    assert ok.tolist() == [True, False, True]


def mean_brightness(item: Item) -> list[float]:
    return [float(image.float().mean()) for image in told(item)]


def test_local_rewards_are_collected_once_and_in_order() -> None:
    rewards = PointwiseRewards(LocalScores(mean_brightness), ["local"])
    try:
        rewards.submit(grey(1, 2), [RED, RED], [0, 0])
        rewards.submit(grey(7), [BLUE], [1])
        assert rewards.collect().scores["local"].tolist() == [1.0, 2.0, 7.0]
        rewards.submit(grey(9), [BLUE], [0])
        assert rewards.collect().scores["local"].tolist() == [9.0]
        assert rewards.stats().answered == 3
        with pytest.raises(ValueError, match="nothing was submitted"):
            rewards.collect()
    finally:
        rewards.close()


def settings(server: RewardServer, **values: object) -> RewardsSection:
    return RewardsSection.model_validate({"services": [server.url], "models": {"mean": 1.0}, "patience": 5} | values)


def test_served_rewards(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, "secret")
    rewards = served(settings(server), ["mean"], {"mean": FINGERPRINT})
    try:
        rewards.submit(grey(51, 102), [RED, RED], [0, 0])
        rewards.submit(grey(255), [BLUE], [1])
        found = rewards.collect()
    finally:
        rewards.close()
    assert found.scores["mean"].tolist() == pytest.approx([0.2, 0.4, 1.0])
    assert found.fingerprints == {"mean": FINGERPRINT}
    [first, *_] = sorted(server.asked(), key=lambda received: len(received.images), reverse=True)
    assert first.headers["Authorization"] == "Bearer secret"
    assert first.request is not None
    assert first.request["items"][0]["prompt"] == "red"
    assert first.request["items"][0]["metadata"] == {"target": "a"}


def test_a_failed_sample_is_told_beside_the_others(server: RewardServer) -> None:
    def fail_second(answer: dict[str, Any]) -> None:
        [result] = answer["results"]
        result["scores"]["mean"][1] = result["total"][1] = None
        result["errors"][1] = [{"model": "mean", "code": "model_error", "message": "dark"}]

    server.play(server.changed(fail_second))
    rewards = served(settings(server), ["mean"], {})
    try:
        rewards.submit(grey(51, 102, 255), [RED] * 3, [0] * 3)
        found = rewards.collect()
    finally:
        rewards.close()
    assert found.ok["mean"].tolist() == [True, False, True]
    assert found.scores["mean"].isnan().tolist() == [False, True, False]
    assert found.failures == ("mean: model_error: dark",)


@pytest.mark.parametrize("allowed", [False, True])
def test_another_fingerprint(server: RewardServer, allowed: bool) -> None:
    rewards = served(settings(server, allow_fingerprint_change=allowed), ["mean"], {"mean": "sha256:before"})
    try:
        rewards.submit(grey(51), [RED], [0])
        if allowed:
            assert rewards.collect().fingerprints == {"mean": FINGERPRINT}
        else:
            with pytest.raises(FingerprintChanged, match="sha256:feed, not sha256:before"):
                rewards.collect()
    finally:
        rewards.close()


def test_patience_and_deadline_are_the_settings(server: RewardServer) -> None:
    server.default = server.problem(503, "draining")
    for values in ({"patience": 0}, {"patience": 60, "deadline": 0.3}):
        rewards = served(settings(server, **values), ["mean"], {})
        try:
            rewards.submit(grey(51), [RED], [0])
            with pytest.raises(RewardError, match=r"draining"):
                rewards.collect()
        finally:
            rewards.close()
