"""More work than fits, and clients that leave: refused early or dropped at once, and the queue is empty afterwards."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from tests.service.bodies import grey, item, noise, score_body
from tests.service.live import Live, read_answer, running, wait_until
from tests.service.test_bad_input import assert_problem

BATCH, BATCH_S, MAX_COST = 4, 0.25, 16
SETTINGS = {
    "models": {"slow": {"options": {"batch_s": BATCH_S}, "micro_batch": BATCH}},
    "queue": {"max_cost": MAX_COST, "default_deadline_ms": 4000, "max_deadline_ms": 60_000},
    "limits": {"images_per_request": MAX_COST, "body_bytes": 600_000, "inflight_bytes": 1_000_000, "body_timeout_s": 6},
}


@pytest.fixture(scope="module")
def _busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(tmp_path_factory.mktemp("busy"), SETTINGS) as live:
        yield live


@pytest.fixture
def busy(_busy: Live) -> Iterator[Live]:
    """A service of 16 samples a second and 16 places."""
    yield _busy
    _busy.assert_healthy()


def body(levels: Sequence[int]) -> dict[str, Any]:
    return score_body("slow", *[item("a", grey(level, 16)) for level in levels], deadline_ms=60_000)


def head(length: int) -> bytes:
    lines = ["POST /score HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def test_a_full_queue_refuses_before_the_body_is_sent(busy: Live) -> None:
    with ThreadPoolExecutor(1) as pool:
        full = body(range(MAX_COST))
        full["items"][0]["prompt"] = "longer"  # the first batch: nothing becomes free for two seconds
        filling = pool.submit(busy.post, "/score", full)
        wait_until(lambda: busy.metric("reward_queue_cost") == MAX_COST, "the queue is full", 5)
        with socket.create_connection(busy.address, timeout=10) as connection:
            connection.sendall(head(500_000))  # and not one byte of the body
            answer = read_answer(connection)
        assert busy.metric("reward_queue_cost") > 0  # it was refused while the work went on
        assert filling.result().status_code == 200
    assert answer.startswith(b"HTTP/1.1 429 ")
    assert b'"code": "overloaded"' in answer
    assert b"\r\nretry-after: 1\r\n" in answer.lower()  # one place is free after a batch of 0.25 s


def test_retry_after_is_the_time_until_it_fits(busy: Live) -> None:
    """Waiting as told is enough, and not many times too much."""
    with ThreadPoolExecutor(1) as pool:
        filling = pool.submit(busy.post, "/score", body(range(12)))
        wait_until(lambda: busy.metric("reward_queue_cost") > 0, "the queue is filled", 5)
        refused = busy.post("/score", body(range(MAX_COST)))
        problem = assert_problem(refused, 429, "overloaded")
        assert problem["model"] == "slow"
        wait_s = int(refused.headers["retry-after"])
        assert 1 <= wait_s <= 3  # at most twelve samples, at about sixteen a second
        assert filling.result().status_code == 200
        for _ in range(5):  # on a crowded machine the measured rate is not kept
            time.sleep(wait_s)
            if (answer := busy.post("/score", body(range(MAX_COST)))).status_code == 200:
                return
        pytest.fail(f"waited as told five times, still {answer.status_code}")


def test_ten_times_overload(busy: Live) -> None:
    """Everyone gets scores or 429, and what was admitted is right."""

    def ask(i: int) -> tuple[int, int, Any]:
        response = busy.post("/score", body([i] * 4))
        return i, response.status_code, response.json()

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(ask, range(40)))
    good = [(i, answer) for i, status, answer in answers if status == 200]
    assert {status for _, status, _ in answers} == {200, 429}
    assert len(good) >= MAX_COST // 4
    for i, answer in good:
        assert [r["scores"]["slow"][0] for r in answer["results"]] == [pytest.approx(i / 255)] * 4
    assert all(answer["code"] == "overloaded" for _, status, answer in answers if status == 429)


def test_bytes_in_flight_are_bounded(busy: Live) -> None:
    """Two bodies of 500 kB may be on their way, not three; who leaves gives its bytes back."""
    with ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(socket.create_connection(busy.address, timeout=10))
            connection.sendall(head(490_000) + b" " * 489_999)
        wait_until(lambda: busy.metric("reward_inflight_bytes") == 979_998, "two bodies are almost there", 5)
        refused = busy.post("/score", content=b" " * 490_000, headers={"content-type": "application/json"})
        assert_problem(refused, 429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
    wait_until(lambda: busy.metric("reward_inflight_bytes") == 0, "the bytes are free again", 5)


def test_silent_clients_shut_nobody_out(busy: Live) -> None:
    """Bytes that were promised hold no place, those that came hold one until the time for a body is over."""
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(busy.address, timeout=30)) for _ in range(8)]
        for connection in silent:
            connection.sendall(head(590_000) + b" " * 1000)
        wait_until(lambda: busy.metric("reward_inflight_bytes") == 8000, "the beginnings have come", 5)
        assert busy.post("/score", body([51])).status_code == 200
        answers = [read_answer(connection) for connection in silent]
    assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in answers)
    assert all(b'"code": "body_timeout"' in answer for answer in answers)
    wait_until(lambda: busy.metric("reward_inflight_bytes") == 0, "the bytes are free again", 5)


def test_200_clients_that_leave_leave_an_empty_queue(service: Live) -> None:
    dropped = service.metric("reward_queue_dropped_total", model="slow", reason="disconnect")
    ran = service.metric("reward_samples_total", model="slow")
    errors = service.metric("reward_errors_total", code="internal_error")
    text = json.dumps(score_body("slow", item("a", noise(0)))).encode()
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection(service.address, timeout=10)).sendall(head(len(text)) + text)

        def admitted() -> float:
            done = service.metric("reward_samples_total", model="slow") - ran
            return done + service.metric("reward_queue_cost", model="slow")

        wait_until(lambda: admitted() >= 200, "all requests are admitted")
    service.assert_empty_queue()
    dropped = service.metric("reward_queue_dropped_total", model="slow", reason="disconnect") - dropped
    finished = service.metric("reward_samples_total", model="slow") - ran
    assert 190 <= dropped + finished <= 200  # a client may have left before its body was read to the end
    assert dropped > 100
    assert service.metric("reward_errors_total", code="internal_error") == errors
    assert service.metric("reward_errors_total", code="client_disconnected") >= dropped


def test_clients_that_leave_amid_their_body(service: Live) -> None:
    log_before = len(service.log)
    text = json.dumps(score_body("slow", item("a", noise(0)))).encode()
    for cut in range(50):
        with socket.create_connection(service.address, timeout=10) as connection:
            connection.sendall(head(len(text)) + text[: cut * len(text) // 50])
    service.assert_empty_queue()
    wait_until(lambda: service.metric("reward_inflight_bytes") == 0, "no bytes are held")
    assert '"ERROR"' not in service.log[log_before:]
    assert "Traceback" not in service.log[log_before:]
