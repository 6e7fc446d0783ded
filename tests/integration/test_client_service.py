"""The Python client against a real service process: what one sends the other understands."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from tests.service.bodies import JPEG_MODEL, grey, noise
from tests.service.live import Live, running, wait_until
from trainer_client import (
    AsyncRewardClient,
    DeadlineExceeded,
    Item,
    Overloaded,
    RequestRejected,
    RewardClient,
    SamplesFailed,
)

KEY = "a-bearer-key"
SETTINGS = {
    "models": {
        JPEG_MODEL: {}, "jpeg-compressibility": {}, "tiny-tower": {}, "raises-on-red": {},
        "slow": {"options": {"batch_s": 0.4}, "micro_batch": 4},
    },
    "queue": {"max_cost": 16}, "limits": {"images_per_request": 16}, "api_keys": [KEY],
}  # fmt: skip


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(tmp_path_factory.mktemp("service"), SETTINGS) as live:
        yield live


@pytest.fixture(params=["safetensors", "json"])
def client(service: Live, request: pytest.FixtureRequest) -> Iterator[RewardClient]:
    with RewardClient(service.url, api_key=KEY, wire=request.param, patience=60) as client:
        yield client


IMAGES = [noise(i, 32 + 8 * i, 48) for i in range(3)]


def test_scores(client: RewardClient) -> None:
    """Weighted totals, per-model scores and outputs, for images of any kind and size."""
    models = {JPEG_MODEL: 0.5, "tiny-tower": 2.0}
    items = [Item("a red cat", [IMAGES[0], Image.fromarray(IMAGES[1])]), Item("🦊", [IMAGES[2]])]
    response = client.score(items, models)
    response.raise_for_errors()
    assert [len(item.total) for item in response] == [2, 1]
    for item in response:
        for k, total in enumerate(item.total):
            assert total == pytest.approx(sum(weight * item.scores[name][k] for name, weight in models.items()))
    assert response[0].outputs[JPEG_MODEL][0] == {"kilobytes": response[0].scores[JPEG_MODEL][0]}
    assert set(response.fingerprints) == set(models)
    alone = [client.score(Item("a red cat", [image]), models)[0].total[0] for image in IMAGES[:2]]
    assert response[0].total == alone  # no neighbour, and no wire, changes a score


def test_both_wires_and_both_clients_agree(service: Live) -> None:
    async def ask() -> list[float | None]:
        async with AsyncRewardClient(service.url, api_key=KEY) as client:
            return (await client.score(Item("a", IMAGES), "tiny-tower"))[0].total

    totals = [asyncio.run(ask())]
    for wire in ("safetensors", "json"):
        with RewardClient(service.url, api_key=KEY, wire=wire) as client:  # type: ignore[arg-type]
            totals.append(client.score(Item("a", IMAGES), "tiny-tower")[0].total)
    assert totals[0] == totals[1] == totals[2]
    assert len(set(totals[0])) == 3


def test_preferences_follow_the_scores(client: RewardClient) -> None:
    scores = client.score(Item("a", IMAGES), JPEG_MODEL)[0].scores[JPEG_MODEL]
    [item] = client.compare(Item("a", IMAGES), JPEG_MODEL)
    assert item.ranking == sorted(range(3), key=lambda k: -(scores[k] or 0))
    for c in item.comparisons:
        expected = 1 / (1 + np.exp(-((scores[c.i] or 0) - (scores[c.j] or 0)) / 10))  # the model's temperature is 10
        assert c.probability == pytest.approx(expected)
        assert item.probabilities[c.j][c.i] == pytest.approx(1 - expected)
    some = client.compare(Item("a", IMAGES), JPEG_MODEL, pairs=[[2, 0]])[0]
    assert [(c.i, c.j) for c in some.comparisons] == [(2, 0)]
    assert some.probabilities[0][1] is None


def test_gradients_are_those_of_the_scores(client: RewardClient) -> None:
    """Finite differences of the served score along the served gradient and along random directions."""
    generator = np.random.default_rng(0)
    image = generator.uniform(0.2, 0.8, (3, 24, 32)).astype(np.float32)

    def ask(pixels: np.ndarray) -> tuple[float, np.ndarray]:
        answer = client.gradient(Item("a cat", [pixels]), {"tiny-tower": 3.0})
        answer.raise_for_errors()
        gradient, total = answer[0].gradients[0], answer[0].total[0]
        assert gradient is not None
        assert total is not None
        return total, gradient

    _, gradient = ask(image)
    assert gradient.shape == image.shape
    assert gradient.dtype == np.float32
    directions = [gradient, generator.standard_normal(image.shape).astype(np.float32)]
    for direction in directions:
        step = 0.002 * direction / np.abs(direction).max()
        difference = (ask(image + step)[0] - ask(image - step)[0]) / 2
        assert difference == pytest.approx(float((gradient * step).sum()), rel=0.01, abs=2e-6)


def test_a_sample_that_fails_is_a_failure_and_no_number(client: RewardClient) -> None:
    items = [Item("blue", [grey(51)]), Item("red", [grey(51)])]
    response = client.score(items, "raises-on-red")
    assert response[0].total == [0.2]
    assert response[1].total == [None]
    [(where, failure)] = response.failures()
    assert (where, failure.model, failure.code) == ("item 1 candidate 0", "raises-on-red", "model_error")
    values, ok = response.as_array()
    assert ok.tolist() == [True, False]
    assert np.isnan(values[1])
    with pytest.raises(SamplesFailed):
        response.raise_for_errors()


def test_models(client: RewardClient) -> None:
    known = {info.name: info for info in client.models()}
    assert known["tiny-tower"].ready
    assert known["tiny-tower"].differentiable
    assert not known[JPEG_MODEL].differentiable
    assert known["tiny-tower"].fingerprint == client.score(Item("a", IMAGES), "tiny-tower").fingerprints["tiny-tower"]
    assert not known["wrong-length"].ready  # registered, and not loaded here
    assert client.ready()


@pytest.mark.parametrize(("model", "code"), [("no-such-model", "unknown_model"), ("wrong-length", "model_not_loaded")])
def test_refusals_are_typed(client: RewardClient, model: str, code: str) -> None:
    with pytest.raises(RequestRejected) as caught:
        client.score(Item("a", IMAGES), model)
    assert (caught.value.status, caught.value.code) == (404, code)


def test_a_wrong_key(service: Live) -> None:
    with RewardClient(service.url, api_key="wrong") as client, pytest.raises(RequestRejected) as caught:
        client.score(Item("a", IMAGES), JPEG_MODEL)
    assert caught.value.status == 401


def test_a_deadline_reaches_the_service(client: RewardClient, service: Live) -> None:
    """What was finished by then comes back, the rest is a failure with the code deadline; too short is an error."""
    response = client.score(Item("a", [grey(i) for i in range(16)]), "slow", deadline=1.2)
    assert {failure.code for _, failure in response.failures()} == {"deadline"}
    assert any(score is not None for score in response[0].total)
    with pytest.raises(DeadlineExceeded):
        client.score(Item("a", [grey(1)]), "slow", deadline=0.1)
    service.assert_empty_queue()


def test_an_overloaded_service_is_asked_again(client: RewardClient, service: Live) -> None:
    """Eight callers of eight samples want a queue of sixteen: all are answered in the end."""
    found: dict[int, list[float | None]] = {}

    def ask(i: int) -> None:
        found[i] = client.score(Item("a", [grey(i)] * 8), "slow")[0].total

    callers = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(120)
    assert found == {i: [pytest.approx(i / 255)] * 8 for i in range(8)}
    assert service.metric("reward_errors_total", code="overloaded") > 0


def test_impatience_gets_the_refusal(service: Live) -> None:
    """Without patience the 429 is told, with the time that the service asks for."""
    with (
        RewardClient(service.url, api_key=KEY, patience=0) as impatient,
        ThreadPoolExecutor(1) as pool,
    ):
        filling = pool.submit(impatient.score, Item("a", [grey(1)] * 16), "slow")
        wait_until(lambda: service.metric("reward_queue_cost", model="slow") > 0, "the queue is filled")
        with pytest.raises(Overloaded) as caught:
            impatient.score(Item("a", [grey(1)] * 16), "slow")
        assert caught.value.retry_after is not None
        assert 1 <= caught.value.retry_after <= 3
        assert filling.result().failures() == []
