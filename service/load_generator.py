"""The load generator: closed-loop clients against the /score of a running service.

Every client sends its next request when its last one is answered. The generator often shares a machine with the
service that it measures, so it is built to take little of it: request bodies are bytes, answers are parsed by
httptools, one asyncio loop does it all, and its own CPU time is part of the report.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import ssl
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools

FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 15.0
ANSWER_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Load:
    """What to send: ``body(i)`` is the i-th request, with ``images`` images in it."""

    content_type: str
    images: int
    body: Callable[[int], bytes]


@dataclass(frozen=True)
class Answered:
    """One request that got its final answer. Times are ``time.perf_counter()`` seconds.

    ``first_sent`` starts its first attempt and ``sent`` the one that was answered: between them it was rejected.
    """

    first_sent: float
    sent: float
    finished: float
    status: int
    scored: int
    errors: tuple[str, ...]


@dataclass(frozen=True)
class LoadReport:
    """One load, measured over ``seconds`` in the middle of it. Latencies run from first attempt to answer, in ms."""

    clients: int
    images_per_request: int
    seconds: float
    requests_per_s: float
    images_per_s: float
    p50_ms: float | None
    p99_ms: float | None
    answered: int
    attempts: int
    rejected: int
    errors: dict[str, int]
    client_cores: float

    @property
    def rejected_fraction(self) -> float:
        """Share of attempts that were answered 429."""
        return self.rejected / self.attempts if self.attempts else 0.0


def percentile(values: Sequence[float], share: float) -> float | None:
    """Nearest rank: the smallest value that at least ``share`` (0 < share <= 1) of all do not exceed; None of none."""
    if not 0 < share <= 1:
        raise ValueError(f"share is in (0, 1], not {share}")
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else None


def credited(answers: Sequence[Answered], start: float, end: float) -> tuple[float, float]:
    """(requests, scored images) of the window: an answer counts by the share of its time in service that lies in it.

    Counting whole answers would add or lose one batch or group at either edge, several percent of a short window.
    """
    requests = images = 0.0
    for answer in answers:
        inside = min(answer.finished, end) - max(answer.sent, start)
        if inside > 0:
            share = inside / (answer.finished - answer.sent)
            requests += share
            images += share * answer.scored
    return requests, images


async def run_load(
    url: str,
    load: Load,
    *,
    clients: int,
    seconds: float,
    warmup_s: float = 1.0,
    retry: bool = True,
    key: str | None = None,
    on_tick: Callable[[float], None] | None = None,
) -> LoadReport:
    """Load ``url`` + /score with closed-loop clients and measure ``seconds`` of it, after ``warmup_s``.

    With ``retry`` a client that is answered 429 waits for Retry-After plus a random backoff, as the Python client
    does, and sends the same request again; without, it goes on with the next one at once. After the window the load
    goes on until everything that was in flight at its end is answered, so that no request is cut off. Requests that
    cannot be sent or answered count as the error ``connection``; nothing is raised for them.
    """
    run = _Run(url, load, retry, key)
    tasks = [asyncio.create_task(run.client()) for _ in range(clients)]
    try:
        await _sleep(warmup_s, 0.0, on_tick)
        start, cpu_start = time.perf_counter(), time.process_time()
        attempts_start, rejected_start = run.attempts, run.rejected
        await _sleep(seconds, warmup_s, on_tick)
        end, cpu_end = time.perf_counter(), time.process_time()
        attempts, rejected = run.attempts - attempts_start, run.rejected - rejected_start
        run.in_flight_at_end = set(run.in_flight)
        while run.in_flight_at_end and any(not task.done() for task in tasks):
            await asyncio.sleep(0.02)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return _report(run, clients, start, end, attempts, rejected, (cpu_end - cpu_start) / (end - start))


def _report(
    run: _Run, clients: int, start: float, end: float, attempts: int, rejected: int, cores: float
) -> LoadReport:
    requests, images = credited([answer for answer in run.answers if answer.status == 200], start, end)
    inside = [answer for answer in run.answers if start <= answer.finished < end]
    latencies = [1000 * (answer.finished - answer.first_sent) for answer in inside if answer.status == 200]
    return LoadReport(
        clients=clients,
        images_per_request=run.load.images,
        seconds=end - start,
        requests_per_s=requests / (end - start),
        images_per_s=images / (end - start),
        p50_ms=percentile(latencies, 0.5),
        p99_ms=percentile(latencies, 0.99),
        answered=len(inside),
        attempts=attempts,
        rejected=rejected,
        errors=dict(Counter(code for answer in inside for code in answer.errors)),
        client_cores=cores,
    )


async def _sleep(seconds: float, before: float, on_tick: Callable[[float], None] | None) -> None:
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0:
        await asyncio.sleep(min(left, 0.25))
        if on_tick is not None:
            on_tick(before + seconds - max(0.0, end - time.perf_counter()))


class _Run:
    """What the clients of one load share."""

    def __init__(self, url: str, load: Load, retry: bool, key: str | None) -> None:
        self.load = load
        self.answers: list[Answered] = []
        self.attempts = self.rejected = 0
        self.in_flight: set[int] = set()
        self.in_flight_at_end: set[int] = set()
        self._url, self._retry, self._key = url, retry, key
        self._next = 0

    async def client(self) -> None:
        """Send requests until cancelled."""
        connection = _Connection(self._url, "/score", self.load.content_type, self._key)
        try:
            while True:
                number, self._next = self._next, self._next + 1
                await self._request(connection, number)
        finally:
            connection.close()

    async def _request(self, connection: _Connection, number: int) -> None:
        body = self.load.body(number)
        first_sent = time.perf_counter()
        rejections = 0
        while True:
            sent = time.perf_counter()
            self.attempts += 1
            self.in_flight.add(number)
            try:
                # Not wait_for: in Python 3.11 it swallows a cancellation that meets the answer: the load never ends.
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    answer = await connection.post(body)
            except (OSError, EOFError, TimeoutError, httptools.HttpParserError):
                connection.close()
                self._finish(number, Answered(first_sent, sent, time.perf_counter(), 0, 0, ("connection",)))
                await asyncio.sleep(FIRST_BACKOFF_S)  # a service that is gone must not be hammered
                return
            if answer.status == 429:
                self.rejected += 1
                self.in_flight.discard(number)
                self.in_flight_at_end.discard(number)
                if self._retry:
                    await asyncio.sleep(backoff(answer.retry_after, rejections, random.random()))
                    rejections += 1
                    continue
            scored, errors = read_answer(answer.status, bytes(answer.body))
            self._finish(number, Answered(first_sent, sent, time.perf_counter(), answer.status, scored, errors))
            return

    def _finish(self, number: int, answer: Answered) -> None:
        self.in_flight.discard(number)
        self.in_flight_at_end.discard(number)
        self.answers.append(answer)


def backoff(retry_after_s: float, rejections: int, chance: float) -> float:
    """Seconds to wait after a 429: what the service asked for, plus full jitter that doubles with every rejection."""
    return retry_after_s + chance * min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(rejections, 16))


def read_answer(status: int, body: bytes) -> tuple[int, tuple[str, ...]]:
    """Scored images of an answer of /score, and codes of what failed: of single images, or of the whole request."""
    if status == 200:
        results = json.loads(body)["results"]
        scored = sum(total is not None for result in results for total in result["total"])
        return scored, tuple(e["code"] for result in results for errors in result["errors"] for e in errors)
    try:
        return 0, (f"{status} {json.loads(body)['code']}",)
    except (ValueError, KeyError, TypeError):
        return 0, (str(status),)


@dataclass
class _Answer:
    """Collects one response; its methods are httptools' callbacks."""

    parser: httptools.HttpResponseParser = field(init=False)
    status: int = 0
    retry_after: float = 0.0
    body: bytearray = field(default_factory=bytearray)
    complete: bool = False
    keep_alive: bool = False

    def __post_init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after" and value.isdigit():
            self.retry_after = float(value)

    def on_body(self, chunk: bytes) -> None:
        self.body += chunk

    def on_message_complete(self) -> None:
        self.complete = True
        # asked here: after its message the parser has forgotten whether the connection lives on
        self.status, self.keep_alive = self.parser.get_status_code(), self.parser.should_keep_alive()


class _Connection:
    """One keep-alive HTTP/1.1 connection, opened when it is needed."""

    def __init__(self, url: str, path: str, content_type: str, key: str | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not an http or https URL")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, parts.port or (443 if self._tls else 80)
        authorization = f"Authorization: Bearer {key}\r\n" if key else ""
        self._head = (
            f"POST {parts.path.rstrip('/')}{path} HTTP/1.1\r\nHost: {parts.netloc.rpartition('@')[2]}\r\n"
            f"{authorization}Content-Type: {content_type}\r\nContent-Length: "
        ).encode()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, body: bytes) -> _Answer:
        """Send one request and read its answer; raises OSError, EOFError and httptools' errors."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        reader, writer = self._streams
        writer.write(b"%b%d\r\n\r\n" % (self._head, len(body)))
        writer.write(body)
        await writer.drain()
        answer = _Answer()
        while not answer.complete:
            chunk = await reader.read(1 << 16)
            if not chunk:
                raise EOFError("the service closed the connection before it had answered")
            answer.parser.feed_data(chunk)
        if not answer.keep_alive:
            self.close()
        return answer

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
