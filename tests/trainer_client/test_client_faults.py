"""What the client does when the service, the network or the time fails. No test waits for a real backoff."""

from __future__ import annotations

import asyncio
import email.utils
import time

import httpx
import numpy as np
import pytest

from trainer_client import (
    AsyncRewardClient,
    ConnectionFailed,
    DeadlineExceeded,
    Item,
    Overloaded,
    ProtocolError,
    RequestRejected,
    RewardClient,
    ServiceFailed,
    ServiceUnavailable,
    TimedOut,
    TransportError,
)
from trainer_client._retry import DEADLINE_GRACE, FIRST_BACKOFF, LONGEST_BACKOFF, retry_after

ITEM = Item("x", [np.full((4, 4, 3), 51, np.uint8)])


@pytest.fixture
def client(server, fake_time):
    """A client whose waits are always the longest that the jitter allows, in a time that only waits move."""
    with RewardClient(
        server.url, patience=100, clock=fake_time.clock, sleep=fake_time.sleep, random=lambda: 1.0
    ) as client:
        yield client


def test_overload_is_waited_out_for_as_long_as_the_service_asks(server, client, fake_time):
    server.play(server.problem(429, "overloaded", Retry_After="7"))
    assert client.score(ITEM, "mean")[0].total == pytest.approx([0.2])
    assert fake_time.slept == [7 + FIRST_BACKOFF]
    assert len(server.received) == 2


@pytest.mark.parametrize("status", [502, 503, 504])
def test_an_unavailable_service_or_proxy_is_asked_again(server, client, status):
    server.play(server.plain(status), server.plain(status))
    assert client.score(ITEM, "mean")[0].total == pytest.approx([0.2])
    assert len(server.received) == 3


def test_draining_service_is_asked_again(server, client, fake_time):
    server.play(server.problem(503, "draining", Retry_After="2"))
    client.score(ITEM, "mean")
    assert fake_time.slept == [2 + FIRST_BACKOFF]


def test_a_connection_reset_in_the_middle_of_an_answer_is_asked_again(server, client):
    server.play(server.reset(), server.reset())
    assert client.score(ITEM, "mean")[0].total == pytest.approx([0.2])
    assert len(server.received) == 3


def test_backoff_doubles_up_to_its_cap(server, client, fake_time):
    server.play(*[server.plain(503)] * 8)
    client.score(ITEM, "mean")
    expected = [min(FIRST_BACKOFF * 2**n, LONGEST_BACKOFF) for n in range(8)]
    assert fake_time.slept == expected
    assert expected[-1] == LONGEST_BACKOFF


def test_jitter_is_full(server, fake_time):
    draws = iter([0.0, 0.25, 0.5])
    with RewardClient(server.url, clock=fake_time.clock, sleep=fake_time.sleep, random=lambda: next(draws)) as client:
        server.play(*[server.plain(503)] * 3)
        client.score(ITEM, "mean")
    assert fake_time.slept == [0, 0.25 * FIRST_BACKOFF * 2, 0.5 * FIRST_BACKOFF * 4]


def test_patience_ends_with_what_happened_last(server, client, fake_time):
    server.default = server.problem(429, "overloaded", Retry_After="30")
    with pytest.raises(Overloaded) as raised:
        client.score(ITEM, "mean")
    assert (raised.value.code, raised.value.retry_after) == ("overloaded", 30.0)
    assert "4 failed attempts" in "".join(raised.value.__notes__)
    assert len(server.received) == 4  # at 0, 30.5, 61.5 and 93.5 s: the next would be past 100
    assert fake_time.now - 1000 <= 100


def test_patience_ends_a_long_503(server, client):
    server.default = server.problem(503, "model_failed")
    with pytest.raises(ServiceUnavailable, match="why model_failed") as raised:
        client.score(ITEM, "mean")
    assert (raised.value.status, raised.value.code) == (503, "model_failed")
    assert isinstance(raised.value, TransportError)


def test_the_504_of_a_proxy_is_no_deadline(server, client):
    server.default = server.plain(504)
    with pytest.raises(ServiceUnavailable, match="504"):
        client.score(ITEM, "mean")


def test_no_patience_means_one_attempt(server, fake_time):
    server.play(server.plain(503))
    with (
        RewardClient(server.url, patience=0, sleep=fake_time.sleep) as client,
        pytest.raises(ServiceUnavailable),
    ):
        client.score(ITEM, "mean")
    assert len(server.received) == 1
    assert fake_time.slept == []


def test_a_service_that_is_down_is_waited_for(fake_time, server):
    """kill -9 and restart: refused connections, then an answer from the next life."""
    calls = 0

    def sleep(seconds):
        nonlocal calls
        calls += 1
        fake_time.sleep(seconds)
        if calls == 3:
            services[0] = server.url

    services = ["http://127.0.0.1:9"]  # the discard port: nobody listens

    class Moving(httpx.HTTPTransport):
        def handle_request(self, request):
            target = httpx.URL(services[0])
            request.url = request.url.copy_with(port=target.port)
            return super().handle_request(request)

    with RewardClient(
        services[0], transport=Moving(), clock=fake_time.clock, sleep=sleep, random=lambda: 0.5
    ) as client:
        assert client.score(ITEM, "mean")[0].total == pytest.approx([0.2])
    assert calls == 3
    assert len(server.received) == 1


def test_refused_connections_end_as_connection_failed(fake_time):
    with (
        RewardClient("http://127.0.0.1:9", patience=5, clock=fake_time.clock, sleep=fake_time.sleep) as client,
        pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:9") as raised,
    ):
        client.score(ITEM, "mean")
    assert isinstance(raised.value.__cause__, httpx.ConnectError)
    assert fake_time.slept


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (httpx.ConnectError, ConnectionFailed),
        (httpx.ReadError, ConnectionFailed),
        (httpx.WriteError, ConnectionFailed),
        (httpx.RemoteProtocolError, ConnectionFailed),
        (httpx.ConnectTimeout, TimedOut),
        (httpx.ReadTimeout, TimedOut),
        (httpx.PoolTimeout, TimedOut),
    ],
)
def test_every_transport_fault_is_repeated_and_then_named(fake_time, fault, error):
    requests = []

    def fail(request):
        requests.append(request)
        raise fault("broken")

    with (
        RewardClient(
            "http://x", transport=httpx.MockTransport(fail), patience=3, clock=fake_time.clock, sleep=fake_time.sleep,
            random=lambda: 1.0,
        ) as client,
        pytest.raises(error),
    ):  # fmt: skip
        client.score(ITEM, "mean")
    assert len(requests) == 3  # at 0, 0.5 and 1.5 s; the next would be at 3.5


def test_a_connection_that_breaks_during_the_upload_says_how_far_it_came():
    class Midway(httpx.BaseTransport):
        def handle_request(self, request):
            chunks = iter(request.stream)
            next(chunks), next(chunks)  # asking for the second chunk says that the first is sent
            raise httpx.WriteError("broken pipe")

    item = Item("x", [np.zeros((512, 512, 3), np.uint8)])
    with (
        RewardClient("http://x", transport=Midway(), patience=0) as client,
        pytest.raises(ConnectionFailed, match=r"broken pipe \(after \d+ of 7\d{5} bytes: is the request larger"),
    ):
        client.score(item, "mean")


@pytest.mark.parametrize("status", [400, 401, 404, 413, 415, 422])
def test_a_rejected_request_is_not_repeated(server, client, fake_time, status):
    server.play(server.problem(status, "unknown_model"))
    with pytest.raises(RequestRejected, match=f"{status} unknown_model: why unknown_model") as raised:
        client.score(ITEM, "mean")
    error = raised.value
    assert (error.status, error.code, error.detail) == (status, "unknown_model", "why unknown_model")
    assert error.problem["title"] == "T"
    assert len(server.received) == 1
    assert fake_time.slept == []


def test_a_rejection_by_something_else_keeps_its_status(server, client):
    server.play(server.plain(403))
    with pytest.raises(RequestRejected, match="<html>proxy</html>") as raised:
        client.score(ITEM, "mean")
    assert raised.value.code == "http_403"


def test_a_fault_of_the_service_is_not_repeated(server, client):
    server.play(server.problem(500, "internal"))
    with pytest.raises(ServiceFailed) as raised:
        client.score(ITEM, "mean")
    assert (raised.value.status, raised.value.code) == (500, "internal")
    assert len(server.received) == 1


@pytest.mark.parametrize("status", [204, 302])
def test_other_statuses_are_no_answers(server, client, status):
    server.play(server.plain(status, Location="http://127.0.0.1:9"))
    with pytest.raises(ProtocolError, match=str(status)):
        client.score(ITEM, "mean")


def test_the_service_is_told_what_is_left_of_the_deadline(server, client, fake_time):
    server.play(server.problem(429, "overloaded", Retry_After="4"))
    client.score(ITEM, "mean", deadline=20)
    left = [received.request["deadline_ms"] for received in server.received]
    assert left == [20_000, 20_000 - 1000 * (4 + FIRST_BACKOFF)]


def test_no_attempt_is_made_and_nothing_slept_past_the_deadline(server, client, fake_time):
    server.default = server.problem(429, "overloaded", Retry_After="8")
    with pytest.raises(DeadlineExceeded, match="2 failed attempts") as raised:
        client.score(ITEM, "mean", deadline=15)
    assert isinstance(raised.value.__cause__, Overloaded)
    assert len(server.received) == 2
    assert fake_time.now < 1015


def test_the_services_own_deadline_is_repeated_only_while_ours_lasts(server, client):
    server.play(server.problem(504, "deadline"))
    assert client.score(ITEM, "mean", deadline=10)[0].total == pytest.approx([0.2])
    server.default = server.problem(504, "deadline")
    with pytest.raises(DeadlineExceeded) as raised:
        client.score(ITEM, "mean", deadline=0.4)  # less than the first backoff
    assert "504 deadline" in str(raised.value.__cause__)
    assert len(server.received) == 3


def test_a_silent_service_runs_into_the_deadline(server):
    server.default = server.silence()
    with RewardClient(server.url) as client, pytest.raises(DeadlineExceeded) as raised:
        client.score(ITEM, "mean", deadline=0.1)
    assert isinstance(raised.value.__cause__, TimedOut)
    assert len(server.received) == 1


def test_a_silent_service_is_left_after_the_timeout(server, fake_time):
    server.play(server.silence())
    with RewardClient(server.url, timeout=0.2, sleep=fake_time.sleep) as client:
        assert client.score(ITEM, "mean")[0].total == pytest.approx([0.2])
    assert len(server.received) == 2


class Trickle(httpx.SyncByteStream, httpx.AsyncByteStream):
    """An answer of one blank a second, without end."""

    def __init__(self, fake_time):
        self.fake_time = fake_time
        self.closed = False

    def __iter__(self):
        while True:
            self.fake_time.now += 1
            yield b" "

    async def __aiter__(self):
        for blank in self:
            yield blank

    def close(self):
        self.closed = True

    async def aclose(self):
        self.closed = True


@pytest.mark.parametrize("is_async", [False, True])
def test_an_answer_that_trickles_in_is_cut_off_at_the_deadline(fake_time, is_async):
    trickle = Trickle(fake_time)
    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=trickle))

    def score():
        RewardClient("http://x", transport=transport, clock=fake_time.clock).score(ITEM, "mean", deadline=10)

    async def score_async():
        async with AsyncRewardClient("http://x", transport=transport, clock=fake_time.clock) as client:
            await client.score(ITEM, "mean", deadline=10)

    with pytest.raises(DeadlineExceeded) as raised:
        asyncio.run(score_async()) if is_async else score()
    assert "still arriving" in str(raised.value.__cause__)
    assert fake_time.now <= 1000 + 10 + DEADLINE_GRACE + 1
    assert trickle.closed  # the connection goes back to the pool or is dropped


def test_replicas_take_turns_and_one_that_is_down_is_left_alone(server, fake_time):
    dead = "http://127.0.0.1:9"
    with RewardClient([dead, server.url], clock=fake_time.clock, sleep=fake_time.sleep, random=lambda: 1.0) as client:
        for _ in range(4):
            assert client.score(ITEM, "mean")[0].total == pytest.approx([0.2])
        assert client.ready() is True
    assert fake_time.slept == []
    assert len(server.asked()) == 4


def test_an_overloaded_service_among_several_is_not_asked_before_its_time(server, fake_time):
    other = server.url.replace("127.0.0.1", "localhost")
    with RewardClient([server.url, other], clock=fake_time.clock, sleep=fake_time.sleep, random=lambda: 1.0) as client:
        client.models()
        server.play(
            server.problem(429, "overloaded", Retry_After="60"), server.plain(503), server.plain(503), server.plain(503)
        )
        client.score(ITEM, "mean")
    hosts = [received.headers["Host"].split(":")[0] for received in server.asked()]
    assert hosts == ["127.0.0.1"] + ["localhost"] * 4


def test_async_client_retries_waits_and_gives_up_alike(server, fake_time):
    async def run():
        async with AsyncRewardClient(
            server.url, patience=20, clock=fake_time.clock, sleep=fake_time.async_sleep, random=lambda: 1.0
        ) as client:
            server.play(server.problem(429, "overloaded", Retry_After="3"), server.reset())
            response = await client.score(ITEM, "mean", deadline=30)
            assert response[0].total == pytest.approx([0.2])
            assert fake_time.slept == [3 + FIRST_BACKOFF, 2 * FIRST_BACKOFF]
            server.play(server.problem(400, "bad"))
            with pytest.raises(RequestRejected):
                await client.score(ITEM, "mean")
            server.default = server.plain(503)
            assert await client.ready() is False
            with pytest.raises(ServiceUnavailable):
                await client.score(ITEM, "mean")
            with pytest.raises(DeadlineExceeded):
                await client.score(ITEM, "mean", deadline=3)

    asyncio.run(run())


def test_a_cancelled_async_call_leaves_the_client_usable(server):
    async def run():
        async with AsyncRewardClient(server.url) as client:
            server.play(server.silence())
            call = asyncio.create_task(client.score(ITEM, "mean"))
            while not server.received:
                await asyncio.sleep(0.01)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            return await client.score(ITEM, "mean")

    assert asyncio.run(run())[0].total == pytest.approx([0.2])


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("3", 3.0), (" 10 ", 10.0), ("-1", None), ("1.5", None), ("soon", None), ("", None), ("nan", None)],
)
def test_retry_after_in_seconds(value, seconds):
    assert retry_after(value, wall_clock=time.time) == seconds


def test_retry_after_as_a_date():
    now = 1_700_000_000
    date = email.utils.formatdate(now + 90, usegmt=True)
    assert retry_after(date, wall_clock=lambda: now) == 90
    assert retry_after(date, wall_clock=lambda: now + 500) == 0
