"""SIGTERM to a real process: what was admitted is answered, new work gets 503, then exit 0."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.service.bodies import grey, item, score_body
from tests.service.live import read_answer, running, spawn, wait_for_address, wait_until
from tests.service.test_bad_input import assert_problem


def test_sigterm_under_load_loses_no_admitted_request(tmp_path: Path) -> None:
    """And the service goes on refusing for min_s, so that balancers notice."""
    slow = {"options": {"batch_s": 0.25}, "micro_batch": 4}
    with running(tmp_path, {"models": {"slow": slow}, "drain": {"min_s": 6.0}}) as live:

        def ask(i: int) -> httpx.Response:
            body = score_body("slow", *[item("a", grey(6 * i + k, 16)) for k in range(6)])
            return httpx.post(f"{live.url}/score", json=body, timeout=60)

        with ThreadPoolExecutor(8) as pool:
            admitted = [pool.submit(ask, i) for i in range(8)]
            wait_until(
                lambda: live.metric("reward_queue_cost") + live.metric("reward_samples_total") >= 48, "admission"
            )
            live.terminate()
            assert live.metric("reward_queue_cost") > 0  # else this was no test
            wait_until(lambda: not live.ready(), "readiness is false")
            refused = live.post("/score", score_body("slow", item("a", grey(0))))
            assert_problem(refused, 503, "draining")
            assert int(refused.headers["retry-after"]) >= 1
            assert_problem(live.get("/health/ready"), 503, "draining")
            assert live.get("/health/live").status_code == 200
            for i, request in enumerate(admitted):
                response = request.result()
                assert response.status_code == 200, response.text
                scores = [result["scores"]["slow"][0] for result in response.json()["results"]]
                assert scores == [pytest.approx((6 * i + k) / 255) for k in range(6)]
        with httpx.Client() as newcomer:  # a new connection: the socket still listens
            assert_problem(newcomer.get(f"{live.url}/health/ready"), 503, "draining")
        assert live.wait() == 0
        [drained] = [line for line in live.log_lines() if line["message"] == "drained"]
        assert drained["seconds"] >= 6.0


def test_an_upload_under_way_at_sigterm_is_told_to_go_elsewhere(tmp_path: Path) -> None:
    """It was not admitted: it hears 503, which clients repeat, and keeps nobody waiting."""
    with running(tmp_path, {"drain": {"max_s": 20.0}}) as live:
        with socket.create_connection(live.address, timeout=15) as connection:
            head = "POST /score HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
            connection.sendall(head.encode() + b" " * 1000)
            wait_until(lambda: live.metric("reward_inflight_bytes") == 1000, "the upload has begun")
            live.terminate()
            answer = read_answer(connection)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b'"code": "draining"' in answer
        assert live.wait(15) == 0
        assert "Traceback" not in live.log


def test_a_drain_that_takes_too_long_says_that_work_was_lost(tmp_path: Path) -> None:
    with running(tmp_path, {"models": {"hangs": {}}, "drain": {"max_s": 1.0}}) as live:
        answers: list[httpx.Response | httpx.HTTPError] = []
        body = score_body("hangs", item("hang", grey(0)))

        def ask() -> None:
            try:
                answers.append(httpx.post(f"{live.url}/score", json=body, timeout=60))
            except httpx.HTTPError as error:
                answers.append(error)

        waiting = threading.Thread(target=ask)
        waiting.start()
        wait_until(lambda: live.metric("reward_queue_cost") == 1, "the request is admitted")
        live.terminate()
        assert live.wait(60) == 1
        waiting.join(10)
        assert isinstance(answers[0], httpx.HTTPError) or answers[0].status_code == 503
        assert any("admitted work is lost" in line["message"] for line in live.log_lines())


def test_sigterm_while_models_load_ends_the_process(tmp_path: Path) -> None:
    """An orchestrator that changes its mind need not wait for minutes of loading, nor kill."""
    live = spawn(tmp_path, {"models": {"loads-slowly": {"options": {"load_s": 120}}}})
    try:
        wait_for_address(live)
        wait_until(lambda: "Started server" in live.log or live.process.poll() is not None, "loading", 60)
        assert live.process.poll() is None, live.log
        live.terminate()
        assert live.wait(20) == 0
        assert "Traceback" not in live.log
    finally:
        live.kill()
