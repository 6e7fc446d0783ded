"""Batches in flight: started at once, answered in order, bounded, counted, and never a reward out of nothing."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from tests.service.live import wait_until
from tests.trainer_client.conftest import answer_well, serving
from trainer_client import Candidate, Context, Item, RequestRejected
from trainer_client.items import pixel_bytes
from trainer_client.reward_queue import LocalScores, RewardQueue, remote_comparisons, remote_scores

SIZE = 8 * 8 * 3


def batch(level: int, count: int = 1) -> Item:
    return Item("x", [np.full((8, 8, 3), level, np.uint8)] * count)


def brightness(item: Item) -> list[float]:
    return [float(np.mean(image)) / 255 for image in item.images]


@pytest.fixture
def queue(server):
    with RewardQueue(remote_scores(server.url, "mean", patience=30)) as queue:
        yield queue


def test_requests_start_at_submission(server, queue):
    handles = [queue.submit(batch(level)) for level in (51, 102)]
    wait_until(lambda: len(server.received) == 2, "both requests arrive, although nobody waits for an answer")
    assert [handle.result()[0].total for handle in handles] == [[pytest.approx(0.2)], [pytest.approx(0.4)]]


def test_only_what_is_missing_is_waited_for(server, queue):
    gate = threading.Event()

    def first_waits(handler, received):
        gate.wait(30)
        answer_well(handler, received, lambda answer: answer)

    server.play(first_waits)
    slow = queue.submit(batch(51))
    wait_until(lambda: server.received, "the first request arrives")
    quick = queue.submit(batch(102))
    assert quick.result(30)[0].total == pytest.approx([0.4])
    assert not slow.done()
    with pytest.raises(TimeoutError):
        slow.result(0.01)
    gate.set()
    assert slow.result(30)[0].total == pytest.approx([0.2])
    assert slow.result()[0].total == pytest.approx([0.2])  # asked again, answered again


def test_answers_come_in_the_order_of_submission(server):
    """Whatever order the service answers in; and what is submitted meanwhile comes too."""
    delays = iter([0.2, 0.0, 0.1, 0.0, 0.05, 0.0, 0.0])
    lock = threading.Lock()

    def late(handler, received):
        with lock:
            delay = next(delays)
        time.sleep(delay)
        answer_well(handler, received, lambda answer: answer)

    server.default = late
    with RewardQueue(remote_scores(server.url, "mean")) as queue:
        for level in range(6):
            queue.submit(batch(level))
        results = queue.results()
        totals = [next(results)[0].total[0]]
        queue.submit(batch(6))
        totals += [response[0].total[0] for response in results]
    assert totals == pytest.approx([level / 255 for level in range(7)])


@pytest.mark.parametrize("count", [1, 3])
def test_bytes_in_flight_are_bounded(server, count):
    """Three batches fit; the fourth submission waits until one is answered."""
    gate = threading.Semaphore(0)

    def gated(handler, received):
        gate.acquire(timeout=30)
        answer_well(handler, received, lambda answer: answer)

    server.default = gated
    bound = 3 * count * SIZE
    with (
        RewardQueue(remote_scores(server.url, "mean"), max_bytes=bound) as queue,
        ThreadPoolExecutor(1) as pool,
    ):
        handles = [queue.submit(batch(level, count)) for level in range(3)]
        assert queue.stats().in_flight_bytes == bound
        fourth = pool.submit(queue.submit, batch(3, count))
        with pytest.raises(TimeoutError):
            fourth.result(0.3)
        assert len(server.received) <= 3
        gate.release()
        handles.append(fourth.result(30))
        assert queue.stats().in_flight_bytes <= bound
        assert queue.stats().blocked_seconds >= 0.3
        for _ in range(3):
            gate.release()
        assert [handle.result()[0].total[0] for handle in handles] == pytest.approx([level / 255 for level in range(4)])
        assert queue.stats().in_flight_bytes == 0


def test_a_batch_larger_than_the_bound_goes_alone(server):
    with RewardQueue(remote_scores(server.url, "mean"), max_bytes=SIZE) as queue:
        handles = [queue.submit(batch(51, 4)), queue.submit(batch(102))]
        assert [handle.result().as_array().values.tolist() for handle in handles] == [
            pytest.approx([0.2] * 4),
            pytest.approx([0.4]),
        ]


def test_few_requests_are_on_the_wire_at_a_time(server):
    server.default = server.silence()
    with RewardQueue(remote_scores(server.url, "mean"), max_requests=2) as queue:
        for level in range(6):
            queue.submit(batch(level))
        wait_until(lambda: len(server.received) == 2, "two requests arrive")
        time.sleep(0.2)
        assert len(server.received) == 2


def test_what_went_wrong_surfaces_at_the_result(server, queue):
    server.play(server.problem(422, "invalid_request"))
    refused = queue.submit(batch(51))
    wait_until(refused.done, "the refusal is there")
    nonsense = queue.submit(Item("x", ["cat.png"]))
    good = queue.submit(batch(102))
    with pytest.raises(RequestRejected, match="invalid_request"):
        refused.result()
    with pytest.raises(TypeError, match="not str"):
        nonsense.result()
    assert good.result()[0].total == pytest.approx([0.4])
    stats = queue.stats()
    assert (stats.submitted, stats.answered, stats.failed, stats.in_flight) == (3, 1, 2, 0)
    with pytest.raises(ValueError, match="at least one item"):
        queue.submit([])


def test_closing_cancels_what_is_in_flight_and_whoever_waits(server):
    server.default = server.silence()
    queue = RewardQueue(remote_scores(server.url, "mean"), max_bytes=SIZE)
    with ThreadPoolExecutor(2) as pool:
        handle = queue.submit(batch(51))
        waiting = pool.submit(handle.result)
        blocked = pool.submit(queue.submit, batch(102))
        wait_until(lambda: server.received, "the request arrives")
        queue.close()
        for future in (waiting, blocked):
            with pytest.raises(CancelledError):
                future.result(10)
    with pytest.raises(CancelledError, match="closed"):
        queue.submit(batch(51))
    queue.close()
    assert queue.stats().failed == 1
    assert not any(thread.name == "reward-queue" for thread in threading.enumerate())


def test_an_exception_of_the_trainer_ends_the_queue(server):
    server.default = server.silence()
    handles = []

    def train():
        with RewardQueue(remote_scores(server.url, "mean")) as queue:
            handles.append(queue.submit(batch(51)))
            raise FloatingPointError("the loss is NaN")

    with pytest.raises(FloatingPointError):
        train()
    with pytest.raises(CancelledError):
        handles[0].result()


def test_a_local_function_is_scored_alike(server, queue):
    items = [batch(level, 2) for level in (10, 20)]
    with RewardQueue(LocalScores(brightness, "mean")) as local:
        ours, theirs = local.submit(items).result(), queue.submit(items).result()
        assert ours.as_array().values.tolist() == pytest.approx(theirs.as_array().values.tolist())
        assert ours.as_array("mean").ok.all()
        assert ours.failures() == []
        assert local.stats().requests == 0
        assert local.stats().answered == 1


@pytest.mark.parametrize("scores", [[0.5], [0.5, float("nan")], [0.5, 0.5, 0.5]])
def test_a_local_function_that_gives_no_scores_is_an_error(scores):
    with RewardQueue(LocalScores(lambda item: scores)) as queue, pytest.raises(ValueError, match="2 candidates"):
        queue.submit(batch(1, 2)).result()


def test_preferences_in_the_loop(server):
    with RewardQueue(remote_comparisons(server.url, "judge")) as queue:
        images = [np.full((8, 8, 3), level, np.uint8) for level in (10, 200, 90)]
        [item] = queue.submit(Item("x", images)).result()
    assert item.ranking == [1, 2, 0]


def test_several_services_in_the_loop(server):
    with (
        serving({"a": "sha256:a"}) as left,
        serving({"b": "sha256:b"}, factor=10) as right,
        RewardQueue(remote_scores([left.url, right.url], {"a": 1.0, "b": 0.5})) as queue,
    ):
        handles = [queue.submit(batch(level)) for level in (51, 102)]
        assert [handle.result()[0].total[0] for handle in handles] == pytest.approx([1.2, 2.4])


def test_what_it_costs_is_counted(server, queue):
    server.play(server.plain(503))
    queue.submit(batch(51, 4)).result()
    stats = asdict(queue.stats())
    assert stats["requests"] == 2
    assert stats["retries"] == 1
    assert stats["bytes_sent"] > 2 * 4 * SIZE
    assert stats["bytes_received"] > 0
    assert stats["cpu_seconds"] > 0
    assert 0 < stats["waited_seconds"] <= stats["in_flight_seconds"] + 0.1
    assert stats["answered"] == stats["submitted"] == 1


@pytest.mark.parametrize(
    ("item", "pixels"),
    [
        (Item("x", [np.zeros((5, 7, 3)), np.zeros((3, 5, 7)), np.zeros((5, 7))]), 3 * 35),
        (Item("x", torch.zeros(4, 3, 5, 7)), 4 * 35),
        (Item("x", [Image.new("L", (5, 7))]), 35),
        (Item("x", candidates=[{"text": "a"}, Candidate(frames=[np.zeros((2, 2, 3))] * 5, fps=8)]), 20),
        (
            Item(
                "x",
                [np.zeros((5, 7, 3))],
                context=Context(image=np.zeros((2, 2, 3)), mask=np.zeros((2, 2), bool), frames=[np.zeros((1, 2, 3))]),
                reference=Image.new("RGB", (3, 3)),
            ),
            35 + 4 + 4 + 2 + 9,
        ),
        (Item("x", [np.zeros((5, 7, 3))], reference={"image": np.zeros((2, 2, 3))}), 39),
    ],
)
def test_pixels_of_an_item_are_counted_without_looking_at_them(item, pixels):
    assert pixel_bytes([item]) == 3 * pixels
    assert pixel_bytes([item, item]) == 6 * pixels


@pytest.mark.parametrize("options", [{"max_requests": 0}, {"max_bytes": 0}])
def test_impossible_bounds_raise(options):
    with pytest.raises(ValueError, match="at least 1"):
        RewardQueue(LocalScores(brightness), **options)
