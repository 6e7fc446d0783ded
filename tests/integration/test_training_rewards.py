"""Rewards of a training run against real services: gradients over HTTP, several services, kill -9, refusals."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.base import LoadOptions
from models.registry import load_model
from models.shapes_clip import ShapesClip
from tests.service.bodies import noise
from tests.service.live import Live, running, spawn, wait_until
from trainer_client import Item, RewardClient, ScoreResponse
from trainer_client.remote_reward import RemoteReward
from trainer_client.reward_queue import QueueStats, RewardQueue, remote_scores

PROMPTS = ["a red circle", "two blue squares", "a green triangle above a yellow circle", "a red circle"]
MODELS = {"shapes-clip": 1.0, "jpeg-compressibility": 0.1}
# a request of eight images fills the queue: everyone else is refused meanwhile
SETTINGS = {"models": {"shapes-clip": {}}, "queue": {"max_cost": 16}, "limits": {"images_per_request": 16}}


@pytest.fixture(scope="module")
def clip_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(tmp_path_factory.mktemp("clip"), SETTINGS) as live:
        yield live


@pytest.fixture(scope="module")
def jpeg_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(tmp_path_factory.mktemp("jpeg"), {"models": {"jpeg-compressibility": {}}}) as live:
        yield live


# -- gradients --------------------------------------------------------------------------------------------------------


def image_maker() -> nn.Module:
    """Noise [B, 8, 16, 16] -> images [B, 3, 64, 64] in [0, 1]: as much of a generator as a gradient needs."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(32, 16, 3, padding=1),
        nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(16, 3, 3, padding=1), nn.Sigmoid(),
    )  # fmt: skip


def reward_in_process(images_B3HW: Tensor) -> Tensor:
    model = load_model("shapes-clip", LoadOptions(dtype=torch.float32))
    assert isinstance(model, ShapesClip)
    tokens = torch.stack([model.prepare_text(prompt)[0] for prompt in PROMPTS])
    return model.head(model.encode_image(model.preprocess_tensor(images_B3HW)), model.encode_text(tokens)).score_B


def test_a_refl_step_over_http_is_the_step_in_process(clip_service: Live) -> None:
    """ReFL's loss (relu of a margin minus the reward, so that its gradient depends on the served totals)."""
    latents = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    gradients: list[list[Tensor]] = []
    totals: list[Tensor] = []
    with RewardClient(clip_service.url, patience=60) as client:
        remote = RemoteReward(client, {"shapes-clip": 0.5})
        for served in (False, True):
            maker = image_maker()
            images = maker(latents)
            total = remote(images, PROMPTS).total if served else 0.5 * reward_in_process(images)
            loss = torch.nn.functional.softplus(2.0 - total).mean()
            loss.backward()
            totals.append(total.detach())
            gradients.append([parameter.grad for parameter in maker.parameters() if parameter.grad is not None])
    assert remote.failed == 0
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-4, atol=1e-4)
    assert len(gradients[0]) == len(gradients[1]) == 6
    for here, there in zip(*gradients, strict=True):
        assert here.norm() > 0
        assert (there - here).norm() <= 1e-4 * here.norm()


# -- several services -------------------------------------------------------------------------------------------------


def batch_of(index: int) -> Item:
    return Item(PROMPTS[index % 4], [noise(100 * index + k, 96, 96) for k in range(8)])


def test_models_of_two_real_services_make_one_total(clip_service: Live, jpeg_service: Live) -> None:
    item = batch_of(0)
    with RewardClient([clip_service.url, jpeg_service.url], patience=60) as client:
        assert {info.name for info in client.models()} == set(MODELS)
        [both] = client.score(item, MODELS).raise_for_errors()
        assert client.counts().requests == 4  # each service for its models and for its scores
    alone = {}
    for service, name in ((clip_service, "shapes-clip"), (jpeg_service, "jpeg-compressibility")):
        with RewardClient(service.url, patience=60) as client:
            alone[name] = client.score(item, name)[0].scores[name]
    assert both.scores == alone
    for k, total in enumerate(both.total):
        assert total == pytest.approx(sum(weight * (alone[name][k] or 0) for name, weight in MODELS.items()))


# -- rewards in the loop ----------------------------------------------------------------------------------------------


def totals_of(responses: list[ScoreResponse]) -> list[list[float | None]]:
    """One list per batch; what is there twice, or not at all, is in the wrong place."""
    return [response[0].total for response in responses]


def run_queue(url: str, batches: int, models: str | dict[str, float]) -> tuple[list[list[float | None]], QueueStats]:
    with RewardQueue(remote_scores(url, models, patience=200)) as queue:
        for index in range(batches):
            queue.submit(batch_of(index))
        return totals_of(list(queue.results())), queue.stats()


def test_a_storm_of_refusals_changes_no_total(clip_service: Live) -> None:
    """Eight requests at once want a queue that holds two: refused ones are repeated, none is lost or mixed up."""
    with RewardClient(clip_service.url, patience=60) as client:
        calm = [client.score(batch_of(index), "shapes-clip")[0].total for index in range(16)]
    before = clip_service.metric("reward_errors_total", code="overloaded")
    stormy, stats = run_queue(clip_service.url, 16, "shapes-clip")
    assert clip_service.metric("reward_errors_total", code="overloaded") > before
    assert stats.retries > 0
    assert (stats.answered, stats.failed) == (16, 0)
    assert stormy == calm
    assert len({total for batch in calm for total in batch}) == 16 * 8  # a mixed-up batch would show


class Restarted:
    """A service that the test kills and starts again on the same port."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port: int = free.getsockname()[1]
        self._folder = folder
        self.url = f"http://127.0.0.1:{self._port}"
        self.lives: list[Live] = []

    def start(self) -> None:
        settings = {"models": {name: {} for name in MODELS}, "port": self._port}
        self.lives.append(spawn(self._folder / str(len(self.lives)), settings))

    def kill_9(self) -> None:
        self.lives[-1].process.send_signal(signal.SIGKILL)
        self.lives[-1].process.wait(30)

    def stop(self) -> None:
        for live in self.lives:
            live.kill()


@pytest.fixture
def restarted(tmp_path: Path) -> Iterator[Restarted]:
    service = Restarted(tmp_path)
    yield service
    service.stop()


def test_a_queue_of_forty_batches_survives_two_deaths_of_its_service(restarted: Restarted) -> None:
    """kill -9 with batches in flight, twice: the totals are those of an undisturbed run, each batch answered once."""
    restarted.start()
    with RewardClient(restarted.url) as client:
        wait_until(client.ready, "the first life is ready", 120)
    calm, calm_stats = run_queue(restarted.url, 40, MODELS)
    assert calm_stats.retries == 0

    with RewardQueue(remote_scores(restarted.url, MODELS, patience=250)) as queue:
        handles = [queue.submit(batch_of(index)) for index in range(40)]
        for answered in (6, 20):
            wait_until(lambda enough=answered: queue.stats().answered >= enough, f"{answered} are answered", 150)  # type: ignore[misc]
            restarted.kill_9()
            assert queue.stats().in_flight > 0
            restarted.start()
        disturbed = totals_of([handle.result(250) for handle in handles])
        stats = queue.stats()
    assert [live.process.poll() for live in restarted.lives] == [-signal.SIGKILL, -signal.SIGKILL, None]
    assert stats.retries > 0
    assert (stats.submitted, stats.answered, stats.failed, stats.in_flight) == (40, 40, 0, 0)
    assert disturbed == calm
    assert np.isfinite(np.array(disturbed, float)).all()
    assert len({total for batch in calm for total in batch}) == 40 * 8
