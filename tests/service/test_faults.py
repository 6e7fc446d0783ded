"""Models that fail in a real process: the guilty sample fails with a typed error, the others keep their scores."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.service.bodies import INNER_TEXT, JPEG_MODEL, encoded, grey, item, noise, score_body
from tests.service.live import Live, running, wait_until
from tests.service.test_bad_input import assert_problem


def results(live: Live, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = live.post("/score", body)
    assert response.status_code == 200, response.text
    assert INNER_TEXT not in response.text
    found: list[dict[str, Any]] = response.json()["results"]
    return found


def one(live: Live, model: str, prompt: str, level: int = 51, **extra: Any) -> dict[str, Any]:
    return results(live, score_body(model, item(prompt, grey(level)), **extra))[0]


def test_a_model_that_raises_on_one_sample_fails_that_sample_alone(service: Live) -> None:
    before = service.metric("reward_sample_errors_total", model="raises-on-red", code="model_error")
    items = [item("red" if i in (3, 9) else "blue", grey(10 * i)) for i in range(16)]
    found = results(service, score_body("raises-on-red", *items))
    scores = [result["scores"]["raises-on-red"][0] for result in found]
    assert scores == [None if i in (3, 9) else pytest.approx(10 * i / 255) for i in range(16)]
    assert [result["errors"][0][0]["code"] if result["errors"][0] else None for result in found] == [
        "model_error" if i in (3, 9) else None for i in range(16)
    ]
    assert service.metric("reward_sample_errors_total", model="raises-on-red", code="model_error") == before + 2


def test_a_guilty_request_takes_no_other_request_with_it(service: Live) -> None:
    """Samples of different requests share batches; each client gets its own scores, whoever the neighbours were."""
    batches = service.metric("reward_batch_size_count", model="raises-on-red")
    samples = service.metric("reward_batch_size_sum", model="raises-on-red")

    def ask(i: int) -> dict[str, Any]:
        return one(service, "raises-on-red", "red" if i % 8 == 0 else "blue", i)

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(ask, range(64)))
    for i, result in enumerate(found):
        expected = None if i % 8 == 0 else pytest.approx(i / 255)
        assert result["scores"]["raises-on-red"] == [expected]
    batches = service.metric("reward_batch_size_count", model="raises-on-red") - batches
    samples = service.metric("reward_batch_size_sum", model="raises-on-red") - samples
    assert samples == 64
    assert batches < 48  # else nothing was shared and nothing was tested


@pytest.mark.parametrize("prompt", ["short", "long"])
def test_outputs_of_another_length_are_never_assigned(service: Live, prompt: str) -> None:
    body = score_body("wrong-length", *[item(prompt, grey(40 * i)) for i in range(5)])
    for result in results(service, body):
        assert result["scores"]["wrong-length"] == [None]
        assert result["errors"][0][0]["code"] == "model_error"
    mixed = score_body("wrong-length", *[item(prompt if i == 2 else "fine", grey(40 * i)) for i in range(5)])
    scores = [result["scores"]["wrong-length"][0] for result in results(service, mixed)]
    assert scores == [None if i == 2 else pytest.approx(40 * i / 255) for i in range(5)]


@pytest.mark.parametrize("prompt", ["nan", "inf", "-inf"])
def test_a_score_that_is_not_finite_is_an_error_and_no_number(service: Live, prompt: str) -> None:
    found = results(service, score_body("not-finite", item(prompt, grey(51)), item("fine", grey(51))))
    assert [result["scores"]["not-finite"] for result in found] == [[None], [0.2]]
    assert [result["total"] for result in found] == [[None], [0.2]]
    assert found[0]["errors"][0][0]["code"] == "not_finite"
    compared = service.post("/compare", {"model": "not-finite", "items": [item(prompt, grey(1), grey(2))]})
    assert compared.status_code == 200, compared.text
    [result] = compared.json()["results"]
    assert result["win_rate"] == [None, None]
    assert result["comparisons"][0]["error"]["code"]


def test_a_further_output_that_is_not_finite_is_never_sent_as_a_hole(service: Live) -> None:
    """``outputs`` holds numbers; a NaN among them is an error of the sample, not a null in a dict of numbers."""
    result = one(service, "not-finite", "nan beside")
    assert result["scores"]["not-finite"] == [None]
    assert result["outputs"]["not-finite"] == [None]
    assert result["errors"][0][0]["code"] == "not_finite"


@pytest.mark.parametrize("prompt", ["none", "float", "text score", "object in details"])
def test_things_that_are_no_outputs_are_errors_of_their_sample(service: Live, prompt: str) -> None:
    """Neither a null without a reason nor a 500 for the neighbours."""
    body = score_body("wrong-type", item(prompt, grey(51)), item("fine", grey(51)), explain=True)
    bad, good = results(service, body)
    assert good["scores"]["wrong-type"] == [0.2]
    assert bad["scores"]["wrong-type"] == [None]
    assert bad["errors"][0][0]["code"] == "model_error"


def test_a_model_that_fails_to_prepare_fails_that_sample_alone(service: Live) -> None:
    found = results(service, score_body("prepare-raises", item("unprepared", grey(51)), item("fine", grey(51))))
    assert [result["scores"]["prepare-raises"] for result in found] == [[None], [0.2]]
    assert found[0]["errors"][0][0]["code"] == "model_error"


def test_another_model_of_the_request_keeps_its_score(service: Live) -> None:
    body = {"models": {"raises-on-red": 1.0, JPEG_MODEL: 1.0}, "items": [item("red", noise(0))]}
    [result] = results(service, body)
    assert result["scores"]["raises-on-red"] == [None]
    assert result["scores"][JPEG_MODEL][0] > 0
    assert result["total"] == [None]
    assert [error["model"] for error in result["errors"][0]] == ["raises-on-red"]


def test_the_warning_of_an_animation_travels(service: Live, tmp_path: Path) -> None:
    frames = [Image.fromarray(noise(i)) for i in range(3)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True, duration=100)
    scores = []
    for data, codes in (((tmp_path / "a.webp").read_bytes(), ["animated_first_frame"]), (encoded(noise(0)), [])):
        images = [base64.b64encode(data).decode()] * 2
        for path, models in (("/score", {"models": {JPEG_MODEL: 1.0}}), ("/compare", {"model": JPEG_MODEL})):
            [result] = service.post(path, models | {"items": [{"prompt": "a", "images": images}]}).json()["results"]
            assert [[warning["code"] for warning in warnings] for warnings in result["warnings"]] == [codes, codes]
            scores.append(result["scores"][JPEG_MODEL] if path == "/score" else None)
    assert scores[0] == scores[2]  # the first frame's pixels are the still image's


class TestDeadlines:
    def test_504_when_nothing_was_finished_and_the_work_is_dropped(self, service: Live) -> None:
        dropped = service.metric("reward_queue_dropped_total", model="slow", reason="deadline")
        samples = service.metric("reward_samples_total", model="slow")
        body = score_body("slow", *[item("a", grey(i)) for i in range(40)], deadline_ms=100)
        assert_problem(service.post("/score", body), 504, "deadline")
        service.assert_empty_queue()
        ran = service.metric("reward_samples_total", model="slow") - samples
        assert service.metric("reward_queue_dropped_total", model="slow", reason="deadline") - dropped == 40 - ran
        assert ran <= 8  # batches of 4, 0.25 s each: what was running at the deadline, no more

    def test_what_was_finished_is_answered(self, service: Live) -> None:
        body = score_body("slow", *[item("a", grey(i)) for i in range(40)], deadline_ms=1500)
        found = results(service, body)
        scores = [result["scores"]["slow"][0] for result in found]
        codes = [result["errors"][0][0]["code"] if result["errors"][0] else None for result in found]
        assert {score is None for score in scores} == {True, False}
        assert codes == ["deadline" if score is None else None for score in scores]
        assert [score for score in scores if score is not None] == [
            pytest.approx(i / 255) for i, score in enumerate(scores) if score is not None
        ]

    def test_a_fast_model_keeps_its_scores_beside_a_slow_one(self, service: Live) -> None:
        body = score_body("slow", *[item("a", grey(i)) for i in range(40)], deadline_ms=1500)
        body["models"][JPEG_MODEL] = 1.0
        found = results(service, body)
        assert all(result["scores"][JPEG_MODEL][0] > 0 for result in found)
        assert found[-1]["scores"]["slow"] == [None]
        assert found[-1]["total"] == [None]


FATAL = {"hangs": ("hang", "a forward of hangs hangs"), "poisons": ("poison", "poisons poisoned its device")}


@pytest.mark.parametrize("model", FATAL)
def test_what_no_retry_can_mend_ends_the_process(tmp_path: Path, model: str) -> None:
    """Readiness turns false at once, what waits gets 503, one clear line is logged, and the exit code says restart.

    A model that is slow by nature may have a watchdog of its own, and is left in peace.
    """
    prompt, reason = FATAL[model]
    slow = {"options": {"batch_s": 1.5}, "watchdog_s": 30.0}
    settings = {"models": {model: {}, "slow": slow}, "watchdog_s": 1.0, "exit_grace_s": 5.0}
    with running(tmp_path, settings) as live:
        assert one(live, model, "fine")["scores"][model] == [0.2]
        assert one(live, "slow", "fine")["scores"]["slow"] == [0.2]
        answers: list[httpx.Response] = []
        body = score_body(model, item(prompt, grey(0)))
        guilty = threading.Thread(target=lambda: answers.append(httpx.post(f"{live.url}/score", json=body, timeout=60)))
        guilty.start()
        wait_until(lambda: live.get("/health/ready").status_code == 503, "readiness is false")
        response = live.get("/health/ready")
        assert_problem(response, 503, "failed")
        assert int(response.headers["retry-after"]) >= 1
        assert live.get("/health/live").status_code == 200
        assert live.metric("reward_ready") == 0
        assert_problem(live.post("/score", score_body("slow", item("a", grey(0)))), 503, "failed")
        guilty.join(30)
        assert_problem(answers[0], 503, "failed")
        assert live.wait() == 70
        critical = [line for line in live.log_lines() if "the process ends" in line["message"]]
        assert len(critical) == 1
        assert critical[0]["level"] == "CRITICAL"
        assert reason in critical[0]["message"]


@pytest.fixture(scope="module")
def cramped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Too little memory, from the start and later, and one decode thread."""
    models = {
        "oom-over-4": {"micro_batch": 8},
        "oom-later": {"micro_batch": 8},
        "slow-to-prepare": {"options": {"prepare_s": 2.0}},
    }
    with running(tmp_path_factory.mktemp("cramped"), {"models": models, "decode_threads": 1}) as live:
        yield live


def test_out_of_memory_halves_the_batch_and_the_size_is_remembered(cramped: Live) -> None:
    """The fingerprint names the shape of the batch, so it changes with it; scores stay those of their samples."""
    body = score_body("oom-later", *[item("a", grey(10 * i)) for i in range(16)])
    before = cramped.post("/score", body).json()
    assert one(cramped, "oom-later", "arm")["scores"]["oom-later"] == [0.2]
    batches = cramped.metric("reward_batch_size_bucket", model="oom-later", le="4.0")
    after = cramped.post("/score", body).json()
    assert [r["scores"] for r in after["results"]] == [r["scores"] for r in before["results"]]
    assert cramped.metric("reward_batch_size_bucket", model="oom-later", le="4.0") - batches >= 4
    assert after["models"]["oom-later"]["fingerprint"] != before["models"]["oom-later"]["fingerprint"]
    assert cramped.post("/score", body).json()["models"] == after["models"]
    halved = [line for line in cramped.log_lines() if "out of memory" in line["message"]]
    assert [line["model"] for line in halved].count("oom-later") == 1


def test_a_batch_that_does_not_fit_at_the_start_is_halved_too(cramped: Live) -> None:
    body = score_body("oom-over-4", *[item("a", grey(10 * i)) for i in range(16)])
    scores = [result["scores"]["oom-over-4"][0] for result in results(cramped, body)]
    assert scores == [pytest.approx(10 * i / 255) for i in range(16)]


def test_preparation_that_outlasts_its_deadline(cramped: Live) -> None:
    """504 on time, and what waits behind it in the decode pool is answered later."""
    started = time.monotonic()
    body = score_body("slow-to-prepare", item("slow", grey(1)), deadline_ms=200)
    assert_problem(cramped.post("/score", body), 504, "deadline")
    assert one(cramped, "slow-to-prepare", "quick")["scores"]["slow-to-prepare"] == [0.2]
    assert time.monotonic() - started > 1.0  # it did wait for the one thread
    cramped.assert_empty_queue()
