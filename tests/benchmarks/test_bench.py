"""The arithmetic of the benchmark against naive forms of it, its inputs, and the load generator on a real server."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
from base64 import b64decode
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from benchmarks import measures, report, samples
from benchmarks.plan import Plan, Row
from benchmarks.server import PeakMemory, serve
from service import load_generator, tensors
from service.load_generator import Answered, Load, backoff, credited, percentile, read_answer, run_load
from service.loadtest import file_load, generated_files

MODEL = "jpeg-compressibility"
finite = st.floats(-1e6, 1e6)


# -- arithmetic --------------------------------------------------------------------------------------------------------


@given(st.lists(finite, min_size=1, max_size=40), st.floats(0.01, 1.0))
def test_a_percentile_is_a_measured_value_that_the_share_does_not_exceed(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values)
    smaller = [value for value in values if value < found]
    assert len(smaller) < share * len(values), "a smaller value would have done"


def test_percentiles_of_known_values() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50.0, 99.0, 100.0)
    assert percentile([7.0], 0.5) == 7.0
    assert percentile([], 0.5) is None
    with pytest.raises(ValueError, match="share"):
        percentile(values, 0.0)


def answered(sent: float, finished: float, scored: int = 1) -> Answered:
    return Answered(sent, sent, finished, 200, scored, ())


def test_an_answer_counts_by_the_share_of_its_service_time_that_lies_in_the_window() -> None:
    answers = [
        answered(0.0, 4.0, scored=8),  # a quarter is inside
        answered(4.0, 5.0, scored=2),  # all of it
        answered(6.0, 10.0, scored=4),  # the first half
        answered(8.0, 9.0, scored=100),  # none
    ]
    assert credited(answers, 3.0, 8.0) == (0.25 + 1 + 0.5, 0.25 * 8 + 2 + 0.5 * 4)


@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0.01, 20), st.integers(0, 24)), max_size=20),
    st.floats(1, 49),
)
def test_neighbouring_windows_credit_each_answer_once(spans: list[tuple[float, float, int]], cut: float) -> None:
    answers = [answered(sent, sent + seconds, scored) for sent, seconds, scored in spans]
    left, right = credited(answers, 0.0, cut), credited(answers, cut, 100.0)
    assert left[0] + right[0] == pytest.approx(len(answers))
    assert left[1] + right[1] == pytest.approx(sum(answer.scored for answer in answers))


@given(st.floats(0, 600), st.integers(0, 2000), st.floats(0, 1))
def test_a_backoff_is_never_shorter_than_the_service_asked_and_is_bounded(
    asked: float, rejections: int, chance: float
) -> None:
    assert asked <= backoff(asked, rejections, chance) <= asked + 15.0


def test_answers_are_read_as_scores_and_codes() -> None:
    results = [{"total": [0.5, None], "errors": [[], [{"code": "truncated_image"}]]}, {"total": [0.0], "errors": [[]]}]
    assert read_answer(200, json.dumps({"results": results}).encode()) == (2, ("truncated_image",))
    assert read_answer(504, b'{"code": "deadline_exceeded"}') == (0, ("504 deadline_exceeded",))
    assert read_answer(502, b"<html>bad gateway</html>") == (0, ("502",))


def test_a_ratio_wants_a_base_and_the_best_wants_a_measurement() -> None:
    assert measures.ratio(9.0, 10.0) == 0.9
    for base in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="says nothing"):
            measures.ratio(1.0, base)
    assert measures.best([1.0, 3.0, 2.0]) == 3.0
    with pytest.raises(ValueError, match="nothing"):
        measures.best([])


def test_verdicts_look_in_the_direction_of_the_target() -> None:
    assert measures.verdict(0.90, 0.90) == "meets"
    assert measures.verdict(0.89, 0.90) == "misses"
    assert measures.verdict(0.0, 0.0, "at most") == "meets"
    assert measures.verdict(1e-9, 0.0, "at most") == "misses"
    assert measures.verdict(0.5, None) == ""


def test_the_largest_difference_sees_one_sample_in_one_order() -> None:
    alone = {0: 1.0, 1: 2.0}
    assert measures.largest_difference(alone, [{0: 1.0, 1: 2.0}, {1: 2.0}]) == 0.0
    assert measures.largest_difference(alone, [{0: 1.0, 1: 2.0}, {1: 1.75}]) == 0.25
    with pytest.raises(KeyError):
        measures.largest_difference(alone, [{2: 1.0}])


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=12))
def test_kendall_tau_equals_a_count_of_pairs(pairs: list[tuple[int, int]]) -> None:
    first, second = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    if len(set(first)) == 1 or len(set(second)) == 1:
        with pytest.raises(ValueError, match="not defined"):
            measures.kendall_tau(first, second)
        return
    agreement = untied_first = untied_second = 0
    for i in range(len(pairs)):
        for j in range(i):
            a, b = np.sign(first[i] - first[j]), np.sign(second[i] - second[j])
            agreement, untied_first, untied_second = agreement + a * b, untied_first + a * a, untied_second + b * b
    assert measures.kendall_tau(first, second) == pytest.approx(agreement / (untied_first * untied_second) ** 0.5)


def test_top1_agreement_is_the_share_of_prompts_with_the_same_best_image() -> None:
    table = [[0.1, 0.9], [0.8, 0.2], [0.3, 0.4], [1.0, 0.0]]
    other = [[0.0, 0.1], [0.5, 0.6], [0.3, 0.4], [0.7, 0.6]]
    assert measures.top1_agreement(table, other) == 0.75
    with pytest.raises(ValueError, match="cannot be compared"):
        measures.top1_agreement(table, other[:2])


def test_rotations_put_every_sample_at_every_position() -> None:
    orders = measures.rotations(5)
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert all({order[position] for order in orders} == set(range(5)) for position in range(5))


# -- what is sent ------------------------------------------------------------------------------------------------------


def test_captions_never_repeat_and_depend_on_their_number_alone() -> None:
    captions = [samples.caption(number) for number in range(2000)]
    assert len(set(captions)) == 2000
    assert captions[17] == samples.caption(17)
    lengths = [len(caption.split()) for caption in captions]
    assert min(lengths) >= 6
    assert max(lengths) <= 40


def test_images_are_different_crops() -> None:
    images = samples.crops(16, side=64)
    assert {image.shape for image in images} == {(64, 64, 3)}
    assert len({image.tobytes() for image in images}) == 16


@pytest.mark.parametrize("wire", samples.WIRES)
def test_requests_of_every_wire_hold_the_images_in_turn_and_a_fresh_caption(wire: samples.Wire) -> None:
    images = samples.crops(5, side=512)
    load = samples.load(images, wire, 3, first_caption=100)
    assert load.images == 3
    for number in (0, 1):
        body = load.body(number)
        if wire == "safetensors":
            arrays, metadata = tensors.parse(body, 1 << 20)
            message = json.loads(metadata["request"])
            sent = [arrays[name] for name in message["items"][0]["images"]]
        else:
            message = json.loads(body)
            files = [io.BytesIO(b64decode(text)) for text in message["items"][0]["images"]]
            sent = [np.asarray(PILImage.open(file)) for file in files]
        assert message["items"][0]["prompt"] == samples.caption(100 + number)
        expected = [images[(3 * number + i) % 5] for i in range(3)]
        for pixels, original in zip(sent, expected, strict=True):
            error = np.abs(pixels.astype(int) - original.astype(int)).mean()
            assert error == 0 if wire != "json-jpeg" else error < 4


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_report_keeps_every_row_in_json_and_markdown(tmp_path: Path) -> None:
    rows = [
        Row("HTTP", "64 clients", 0.93, "ratio", "27.9 of 30.0 images/s", 0.9),
        Row("Exactness", "difference", 2e-6, "score", "99 comparisons", 0.0, "at most"),
    ]
    report.write(rows, report.environment(Plan(), 0.5), tmp_path)
    document = json.loads((tmp_path / "latest.json").read_text())
    assert [(row["name"], row["value"], row["verdict"]) for row in document["rows"]] == [
        ("64 clients", 0.93, "meets"),
        ("difference", 2e-6, "misses"),
    ]
    text = (tmp_path / "latest.md").read_text()
    assert "| 64 clients | 0.930 ratio | ≥ 0.9 meets | 27.9 of 30.0 images/s |" in text
    assert "| difference | 2e-06 score | ≤ 0 misses | 99 comparisons |" in text
    assert socket.gethostname() not in (tmp_path / "latest.json").read_text()


# -- a real server -----------------------------------------------------------------------------------------------------


def test_a_load_on_a_real_server_is_counted_as_the_server_counts_it() -> None:
    load = file_load(MODEL, "a photo", generated_files(4), group=3)
    with serve({"REWARD_MODELS": f'["{MODEL}"]'}) as server, PeakMemory(server) as memory:
        before = server.cpu_s()
        found = asyncio.run(run_load(server.url, load, clients=4, seconds=2.0, warmup_s=0.3))
        spent = server.cpu_s() - before
        unknown = file_load("no-such-model", "a photo", generated_files(1), group=1)
        refused = asyncio.run(run_load(server.url, unknown, clients=1, seconds=0.5, warmup_s=0.0))
    assert found.errors == {}
    assert found.answered > 4
    assert found.images_per_s == pytest.approx(3 * found.requests_per_s)
    # answers of the window, and the same by their shares: at most the clients' last and first ones are cut
    assert abs(found.answered - found.requests_per_s * found.seconds) <= 4
    assert found.p50_ms is not None
    assert found.p99_ms is not None
    assert found.p50_ms <= found.p99_ms
    assert found.rejected == 0
    assert spent > 0
    assert memory.peak > 20 << 20
    assert refused.images_per_s == 0
    assert set(refused.errors) == {"404 unknown_model"}


def test_a_rejected_request_is_sent_again_after_retry_after() -> None:
    """A scripted server: the first attempt of each request gets 429, the second one its score."""
    bodies: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=_reject_then_answer, args=(listener, bodies), daemon=True)
        thread.start()
        load = Load("application/json", 1, lambda number: b"request %d" % number)
        found = asyncio.run(run_load(f"http://127.0.0.1:{port}", load, clients=1, seconds=1.0, warmup_s=0.0))
    thread.join(10)
    assert not thread.is_alive(), "all requests went over the one connection that was accepted"
    assert bodies[0] == bodies[1] == b"request 0"
    assert found.attempts - 2 * found.rejected in (0, -1, 1), "every request was rejected once"
    assert found.images_per_s > 0
    assert found.errors == {}


def test_without_a_service_every_request_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    load = Load("application/json", 1, lambda number: b"{}")
    found = asyncio.run(run_load(f"http://127.0.0.1:{port}", load, clients=2, seconds=0.7, warmup_s=0.0))
    assert found.images_per_s == 0
    assert set(found.errors) == {"connection"}


def test_a_load_ends_even_if_it_is_ended_in_the_moment_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio.wait_for of Python 3.11 swallows such a cancellation, and a client went on for ever."""

    async def scenario() -> bool:
        run = load_generator._Run("http://127.0.0.1:1", Load("application/json", 1, lambda number: b"{}"), True, None)
        answered = 0

        async def post(connection: object, body: bytes) -> SimpleNamespace:
            nonlocal answered
            answered += 1
            await asyncio.sleep(0)
            if answered == 3:
                asyncio.get_running_loop().call_soon(task.cancel)
            return SimpleNamespace(status=404, body=b"{}")

        monkeypatch.setattr(load_generator._Connection, "post", post)
        task = asyncio.create_task(run.client())
        await asyncio.wait({task}, timeout=2)
        cancelled = task.cancelled()
        task.cancel()
        return cancelled

    assert asyncio.run(scenario())


def _reject_then_answer(listener: socket.socket, bodies: list[bytes]) -> None:
    score = json.dumps({"results": [{"total": [1.0], "errors": [[]]}]}).encode()
    rejection = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 0\r\nContent-Length: 2\r\n\r\n{}"
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(score), score)
    connection, _ = listener.accept()
    with connection, connection.makefile("rb") as stream:
        while line := stream.readline():
            length = 0
            while line not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
                line = stream.readline()
            body = stream.read(length)
            bodies.append(body)
            connection.sendall(answer if bodies.count(body) > 1 else rejection)
