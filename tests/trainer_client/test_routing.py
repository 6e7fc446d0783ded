"""Several services, each with models of its own: who is asked what, and what happens when one goes or changes."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer_client.conftest import (
    FINGERPRINT,
    FakeTime,
    Received,
    RewardServer,
    answer_well,
    gradients,
    score,
    serving,
)
from trainer_client import (
    AsyncRewardClient,
    ConnectionFailed,
    DeadlineExceeded,
    Item,
    RequestRejected,
    RewardClient,
    ServiceUnavailable,
)
from trainer_client._retry import FIRST_BACKOFF
from trainer_client.errors import FingerprintChanged, ModelNotOffered
from trainer_client.routing import cover

IMAGES = [np.full((4, 4, 3), level, np.uint8) for level in (51, 102)]
ITEM = Item("x", IMAGES)


@pytest.fixture
def left() -> Iterator[RewardServer]:
    with serving({"a": FINGERPRINT, "both": FINGERPRINT}) as server:
        yield server


@pytest.fixture
def right() -> Iterator[RewardServer]:
    with serving({"b": "sha256:b", "both": FINGERPRINT}, factor=10) as server:
        yield server


def make(fake_time: FakeTime, *servers: RewardServer, **options: object) -> RewardClient:
    urls = [server.url for server in servers]
    return RewardClient(
        urls, clock=fake_time.clock, sleep=fake_time.sleep, random=lambda: 1.0, **{"patience": 100, **options}
    )


NAMES = st.sampled_from("abcdef")


@given(st.dictionaries(st.sampled_from(["s", "t", "u", "v"]), st.sets(NAMES), min_size=1), st.lists(NAMES, unique=True))
def test_a_cover_has_every_offered_model_once_and_by_services_that_have_it(offers, models):
    parts = cover(offers, models)
    assert sorted(model for part in parts for model in part.models) == sorted(
        model for model in models if any(model in offered for offered in offers.values())
    )
    for part in parts:
        assert part.services
        assert all(set(part.models) <= offers[service] for service in part.services)
    if any(set(models) <= offered for offered in offers.values()) and models:
        assert len(parts) == 1


def test_models_go_to_the_services_that_have_them(fake_time, left, right):
    weights = {"b": 0.5, "a": 2.0, "both": 1.0}
    with make(fake_time, left, right) as client:
        assert [info.name for info in client.models()] == ["a", "b", "both"]
        response = client.score([ITEM, Item("y", IMAGES[:1])], weights)
    assert set(left.asked()[0].request["models"]) | set(right.asked()[0].request["models"]) == set(weights)
    assert "b" not in left.asked()[0].request["models"]
    assert "a" not in right.asked()[0].request["models"]
    assert list(response[0].scores) == list(weights)
    assert response[0].scores["a"] == pytest.approx([0.2, 0.4])
    assert response[0].scores["b"] == pytest.approx([2.0, 4.0])
    for item in response:
        for k, total in enumerate(item.total):
            assert total == pytest.approx(sum(weight * item.scores[name][k] for name, weight in weights.items()))
    assert len(response[1].total) == 1
    assert response.fingerprints == {"b": "sha256:b", "a": FINGERPRINT, "both": FINGERPRINT}
    assert response.timing_ms == {"decode": 1.0, "queue": 2.0, "forward": 3.0}


def test_the_services_of_one_call_work_at_the_same_time(left, right):
    meeting = threading.Barrier(2, timeout=10)  # each answers only when the other has been asked too

    def meet(handler, received: Received) -> None:
        if received.path == "/score":
            meeting.wait()
        answer_well(handler, received, lambda answer: answer)

    left.default = right.default = meet
    with RewardClient([left.url, right.url]) as client:
        assert client.score(ITEM, ["a", "b"])[0].total == pytest.approx([2.2, 4.4])

    async def run():
        async with AsyncRewardClient([left.url, right.url]) as client:
            return await client.score(ITEM, ["a", "b"])

    assert asyncio.run(run())[0].total == pytest.approx([2.2, 4.4])


def test_one_service_that_has_all_models_gets_one_upload(fake_time, left, right):
    left.offered = {"a": FINGERPRINT, "b": "sha256:b", "both": FINGERPRINT}
    with make(fake_time, left, right) as client:
        client.score(ITEM, ["a", "b", "both"])
    assert (len(left.asked()), len(right.asked())) == (1, 0)


def test_replicas_share_the_load(fake_time, left, right):
    with make(fake_time, left, right) as client:
        for _ in range(10):
            client.score(ITEM, "both")
    assert (len(left.asked()), len(right.asked())) == (5, 5)


def test_a_busy_replica_gets_no_more(left, right):
    """While one replica thinks, the other gets all calls but none waits behind the first."""
    with RewardClient([left.url, right.url]) as client, ThreadPoolExecutor(1) as pool:
        client.models()
        left.play(left.silence())
        right.play(right.silence())
        thinking = pool.submit(client.score, ITEM, "both")
        while not left.asked() + right.asked():
            threading.Event().wait(0.01)
        slow, quick = (left, right) if left.asked() else (right, left)
        quick.plays.clear()
        for _ in range(6):
            client.score(ITEM, "both")
        assert (len(slow.asked()), len(quick.asked())) == (1, 6)
        slow.released.set()  # closes the connection without an answer: the call goes to the other
        assert thinking.result(30)[0].total == pytest.approx([0.2 * quick.factor, 0.4 * quick.factor])


def test_a_failed_score_voids_the_total_and_no_other_score(fake_time, left, right):
    def fail_second(answer):
        result = answer["results"][0]
        result["scores"]["a"][1] = result["total"][1] = None
        result["errors"][1] = [{"model": "a", "code": "model_error", "message": "m"}]
        result["warnings"][0] = [{"model": None, "code": "animated_first_frame", "message": "w"}]

    def warn(answer):
        answer["results"][0]["warnings"][0] = [{"model": None, "code": "animated_first_frame", "message": "w"}]

    with make(fake_time, left, right) as client:
        client.models()
        left.play(left.changed(fail_second))
        right.play(right.changed(warn))
        [item] = client.score(ITEM, {"a": 0.0, "b": 1.0})
    assert item.total == [pytest.approx(2.0), None]
    assert item.scores == {"a": [pytest.approx(0.2), None], "b": pytest.approx([2.0, 4.0])}
    assert [failure.model for failure in item.errors[1]] == ["a"]
    assert [warning.code for warning in item.warnings[0]] == ["animated_first_frame"]


def undecodable(*names):
    def change(answer):
        result = answer["results"][0]
        result["total"][0] = None
        for name in names:
            result["scores"][name][0] = None
        result["errors"][0] = [{"model": None, "code": "image_truncated", "message": "m"}]

    return change


def test_an_image_that_no_service_can_read_failed_for_every_model(fake_time, left, right):
    with make(fake_time, left, right) as client:
        client.models()
        left.play(left.changed(undecodable("a")))
        right.play(right.changed(undecodable("b")))
        [item] = client.score(ITEM, ["a", "b"])
        assert [(failure.model, failure.code) for failure in item.errors[0]] == [(None, "image_truncated")]
        left.play(left.changed(undecodable("a", "both")))
        [item] = client.score(ITEM, ["a", "both", "b"])
    assert sorted(failure.model for failure in item.errors[0]) == ["a", "both"]
    assert item.total[0] is None
    assert item.scores["b"][0] is not None


def test_a_replica_that_goes_is_left_and_asked_for_its_models_when_it_is_back(fake_time, right):
    with ExitStack() as first_life, make(fake_time, right) as alone:
        assert alone.models()
        left = first_life.enter_context(serving({"both": FINGERPRINT}))
        with make(fake_time, left, right) as client:
            client.score(ITEM, "both")
            client.score(ITEM, "both")
            assert (len(left.asked()), len(right.asked())) == (1, 1)
            port = left.server_port
            first_life.close()
            for _ in range(6):
                assert client.score(ITEM, "both")[0].total == pytest.approx([2.0, 4.0])
            assert sum(fake_time.slept) == 0  # another replica was there: nobody waited
            with serving({"both": FINGERPRINT, "new": "sha256:n"}, port=port) as again:
                fake_time.now += 60
                totals = [client.score(ITEM, "both")[0].total[0] for _ in range(4)]
                assert [received.path for received in again.received[:2]] == ["/models", "/score"]
                assert sorted(totals) == pytest.approx([0.2, 0.2, 2.0, 2.0])
                assert client.score(ITEM, "new")[0].total == pytest.approx([0.2, 0.4])


def test_every_replica_gone_is_waited_for(fake_time, left):
    other = RewardServer()
    other.server_close()  # nobody listens there
    with make(fake_time, left, other) as client:
        left.play(*[left.plain(503)] * 3)
        assert client.score(ITEM, "a")[0].total == pytest.approx([0.2, 0.4])
        assert fake_time.slept == [0.5, 1.0, 2.0]
        left.default = left.plain(503)
        with pytest.raises(ServiceUnavailable) as raised:
            client.score(ITEM, "a")
        assert "patience ended" in "".join(raised.value.__notes__)


def test_a_lost_service_is_asked_when_nobody_else_has_the_model(fake_time, left, right):
    with make(fake_time, left, right) as client:
        client.score(ITEM, ["a", "b"])
        well, left.default = left.default, left.plain(503)
        with pytest.raises(ServiceUnavailable):
            client.score(ITEM, ["a", "b"])
        left.default = well
        waits = len(fake_time.slept)
        left.play(left.plain(503), left.plain(503))  # neither its models nor its scores, at first
        assert client.score(ITEM, ["a", "b"])[0].total == pytest.approx([2.2, 4.4])
        assert len(fake_time.slept) == waits + 1


def test_a_service_that_was_started_anew_with_other_models_is_noticed(fake_time, left, right):
    with make(fake_time, left, right) as client:
        client.score(ITEM, ["a", "b"])
        left.offered, right.offered = right.offered, left.offered
        [item] = client.score(ITEM, ["a", "b"])
        assert item.scores["a"] == pytest.approx([2.0, 4.0])
        assert item.scores["b"] == pytest.approx([0.2, 0.4])


def test_a_service_that_refuses_what_it_offers_is_believed_the_second_time(fake_time, left, right):
    with make(fake_time, left, right) as client:
        client.models()
        refusal = left.problem(404, "model_not_loaded")
        left.default = lambda handler, received: (
            refusal(handler, received) if received.path == "/score" else answer_well(handler, received, lambda a: a)
        )
        with pytest.raises(RequestRejected) as raised:
            client.score(ITEM, "a")
    assert raised.value.service == left.url
    assert len(left.asked()) == 2


def test_a_model_that_nobody_offers(fake_time, left, right):
    with make(fake_time, left, right) as client:
        with pytest.raises(ModelNotOffered, match="'c'") as raised:
            client.score(ITEM, ["a", "c"])
        assert raised.value.models == ("c",)
        assert left.asked() + right.asked() == []
        assert fake_time.slept == []
        right.offered = {**right.offered, "c": "sha256:c"}
        assert client.score(ITEM, ["a", "c"])[0].total == pytest.approx([2.2, 4.4])


def test_a_model_of_a_service_that_is_down_is_waited_for(fake_time, left):
    dead = "http://127.0.0.1:9"
    options = {"clock": fake_time.clock, "sleep": fake_time.sleep, "random": lambda: 1.0, "patience": 20}
    with RewardClient([left.url, dead], **options) as client:
        with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:9"):
            client.score(ITEM, "b")
        assert 10 < sum(fake_time.slept) <= 20
        with pytest.raises(DeadlineExceeded):
            client.score(ITEM, "b", deadline=3)
        assert client.score(ITEM, "a")[0].total == pytest.approx([0.2, 0.4])  # what is there can be had meanwhile


def test_a_service_that_is_still_loading_is_waited_for(fake_time, left, right):
    def loading(answer):
        for row in answer["models"]:
            row |= {"ready": False, "fingerprint": None}

    right.play(*[right.changed(loading)] * 3)
    with make(fake_time, left, right) as client:
        assert client.score(ITEM, "b")[0].total == pytest.approx([2.0, 4.0])
    assert fake_time.slept == [0.5, 1.0, 2.0]


def test_a_rejected_part_fails_the_call(fake_time, left, right):
    with make(fake_time, left, right) as client:
        client.models()
        left.play(left.problem(422, "invalid_request"))
        with pytest.raises(RequestRejected, match="422"):
            client.score(ITEM, ["a", "b"])


def test_when_one_part_fails_the_others_are_not_repeated(left, right):
    with RewardClient([left.url, right.url], random=lambda: 1.0) as client:
        client.models()
        left.play(left.problem(422, "invalid_request"))
        right.default = right.plain(503)
        with pytest.raises(RequestRejected, match="422"):
            client.score(ITEM, ["a", "b"])
        time.sleep(2 * FIRST_BACKOFF)
        assert len(right.asked()) == 1


def test_a_model_whose_service_is_lost_is_looked_for_elsewhere(fake_time, right):
    with ExitStack() as life:
        left = life.enter_context(serving({"a": FINGERPRINT}))
        with make(fake_time, left, right) as client:
            client.score(ITEM, "a")
            life.close()
            with pytest.raises(ConnectionFailed):
                client.score(ITEM, "a")
            right.offered = {"a": FINGERPRINT}  # nobody told the client
            waited = sum(fake_time.slept)
            assert client.score(ITEM, "a")[0].total == pytest.approx([2.0, 4.0])
            assert sum(fake_time.slept) == waited


def test_gradients_of_several_services_are_summed(fake_time, left, right):
    with make(fake_time, left, right) as client:
        [item] = client.gradient(ITEM, {"a": 3.0, "b": -0.5})
    assert item.total == pytest.approx([0.6 - 1.0, 1.2 - 2.0])
    for gradient in item.gradients:
        np.testing.assert_allclose(gradient, np.full((3, 4, 4), (3.0 - 5.0) / 48), rtol=1e-6)
        assert gradient.dtype == np.float32
        assert gradient.flags.writeable


def test_a_gradient_that_one_service_lacks_is_no_gradient(fake_time, left, right):
    def fail(handler, received):
        response, tensors = score(received, left), gradients(received, left)
        result = response["results"][0]
        result["scores"]["a"][0] = result["total"][0] = None
        result["errors"][0] = [{"model": "a", "code": "model_error", "message": "m"}]
        del tensors["item0.image0"]
        body = safetensors.numpy.save(tensors, {"response": json.dumps(response)})
        handler.answer(body, content_type="application/vnd.safetensors")

    with make(fake_time, left, right) as client:
        client.models()
        left.play(fail)
        [item] = client.gradient(ITEM, ["a", "b"])
    assert item.gradients[0] is None
    assert item.total[0] is None
    assert item.gradients[1] is not None


def test_comparisons_go_where_the_model_is(fake_time, left, right):
    with make(fake_time, left, right) as client:
        client.compare(ITEM, "b")
        client.compare(ITEM, "a")
    assert (len(left.asked("/compare")), len(right.asked("/compare"))) == (1, 1)


# -- fingerprints -----------------------------------------------------------------------------------------------------


def test_a_changed_fingerprint_stops_the_run(fake_time, left):
    with make(fake_time, left) as client:
        client.score(ITEM, "a")
        left.offered = {"a": "sha256:other"}
        with pytest.raises(FingerprintChanged, match="allow_fingerprint_change") as raised:
            client.score(ITEM, "a")
        with pytest.raises(FingerprintChanged):
            client.compare(ITEM, "a")
        client.gradient(ITEM, "a")  # never asked before: gradients have fingerprints of their own
        assert client.fingerprints == {"score": {"a": FINGERPRINT}, "gradient": {"a": "sha256:other"}}
    error = raised.value
    assert (error.model, error.old, error.new, error.service) == ("a", FINGERPRINT, "sha256:other", left.url)


def test_a_changed_fingerprint_can_be_allowed(fake_time, left, caplog):
    with make(fake_time, left, allow_fingerprint_change=True) as client:
        client.score(ITEM, "a")
        left.offered = {"a": "sha256:other"}
        client.score(ITEM, "a")
        assert client.fingerprints["score"] == {"a": "sha256:other"}
    assert "sha256:other" in caplog.text


def test_fingerprints_of_an_earlier_run_are_insisted_on(fake_time, left):
    with make(fake_time, left) as client:
        client.score(ITEM, "a")
        kept = client.fingerprints
    with make(fake_time, left, fingerprints=kept) as client:
        client.score(ITEM, "a")
    with make(fake_time, left, fingerprints={"score": {"a": "sha256:old"}}) as client:
        with pytest.raises(FingerprintChanged):
            client.score(ITEM, "a")
        client.score(ITEM, "both")


def test_replicas_that_differ_are_an_error_before_anything_is_scored(fake_time, left, right):
    right.offered = {"b": "sha256:b", "both": "sha256:other"}
    with make(fake_time, left, right) as client:
        with pytest.raises(FingerprintChanged) as raised:
            client.score(ITEM, "both")
        assert raised.value.service == right.url
        assert left.asked() + right.asked() == []
        client.score(ITEM, ["a", "b"])  # the model that differs is not asked
    with make(fake_time, left, right, allow_fingerprint_change=True) as client:
        client.score(ITEM, "both")


def test_a_replica_that_comes_back_as_another_is_not_used(fake_time, left):
    with ExitStack() as first_life:
        right = first_life.enter_context(serving({"both": FINGERPRINT}))
        with make(fake_time, left, right) as client:
            client.models()
            port = right.server_port
            first_life.close()
            for _ in range(3):
                client.score(ITEM, "both")
            with serving({"both": "sha256:other"}, port=port) as again:
                fake_time.now += 60
                with pytest.raises(FingerprintChanged):
                    client.score(ITEM, "both")
                assert again.asked() == []


def test_the_async_client_routes_alike(fake_time, left, right):
    async def run():
        async with AsyncRewardClient(
            [left.url, right.url], clock=fake_time.clock, sleep=fake_time.async_sleep, random=lambda: 1.0
        ) as client:
            response = await client.score(ITEM, {"a": 1.0, "b": 1.0})
            assert response[0].total == pytest.approx([2.2, 4.4])
            gradient = await client.gradient(ITEM, ["a", "b"])
            np.testing.assert_allclose(gradient[0].gradients[0], np.full((3, 4, 4), 11 / 48), rtol=1e-6)
            left.play(left.reset())
            assert (await client.score(ITEM, ["a", "b"]))[0].total == pytest.approx([2.2, 4.4])
            assert client.counts().retries == 1
            left.play(left.problem(422, "invalid_request"))
            with pytest.raises(RequestRejected):
                await client.score(ITEM, ["a", "b"])
            right.offered = {"b": "sha256:changed"}
            with pytest.raises(FingerprintChanged):
                await client.score(ITEM, ["a", "b"])

    asyncio.run(run())


def test_what_crosses_the_wire_is_counted(fake_time, left, right):
    with make(fake_time, left, right) as client:
        client.score(ITEM, ["a", "b"])
        before = client.counts()
        right.play(right.problem(429, "overloaded", Retry_After="1"))
        client.score(ITEM, ["a", "b"])
        after = client.counts()
    assert (before.requests, before.retries) == (4, 0)  # models and scores of both
    assert (after.requests, after.retries) == (7, 1)
    pixels = 2 * 4 * 4 * 3
    assert before.bytes_sent > 2 * pixels
    assert after.bytes_sent - before.bytes_sent > 3 * pixels
    assert after.bytes_received > before.bytes_received > 0
    assert after.cpu_seconds > before.cpu_seconds > 0
