"""What the sync and the async client share: settings, headers, counters. They differ in how they wait."""

from __future__ import annotations

import random as random_module
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypedDict, TypeVar, get_args

import httpx

from trainer_client._calls import Call, Job, Question
from trainer_client._flow import Flow, ask
from trainer_client._retry import Attempt, Budget
from trainer_client._wire import Content, Wire
from trainer_client.errors import TimedOut
from trainer_client.results import WireCounts
from trainer_client.routing import Routes

Result = TypeVar("Result")


class Options(TypedDict, total=False):
    """The keyword arguments that both clients share; see :class:`RewardClient`."""

    api_key: str | None
    wire: Wire
    patience: float
    timeout: float
    clock: Callable[[], float]
    random: Callable[[], float]
    fingerprints: Mapping[Job, Mapping[str, str]]
    allow_fingerprint_change: bool


class Meter:
    """Adds up what the threads of a client do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = WireCounts()

    def add(self, **more: float) -> None:
        with self._lock:
            self._counts = replace(self._counts, **{name: getattr(self._counts, name) + n for name, n in more.items()})

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count the processor time of this thread."""
        started = time.thread_time()
        try:
            yield
        finally:
            self.add(cpu_seconds=time.thread_time() - started)

    def read(self) -> WireCounts:
        with self._lock:
            return self._counts


class BaseClient:
    """What both clients share."""

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        api_key: str | None = None,
        wire: Wire = "safetensors",
        patience: float = 300.0,
        timeout: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random_module.random,
        fingerprints: Mapping[Job, Mapping[str, str]] | None = None,
        allow_fingerprint_change: bool = False,
    ) -> None:
        if wire not in get_args(Wire):
            raise ValueError(f"wire is one of {get_args(Wire)}, not {wire!r}")
        if not (patience >= 0 and timeout > 0):
            raise ValueError(f"patience is at least 0 s and timeout positive, not {patience!r} and {timeout!r}")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key):
            raise ValueError("an API key is printable ASCII without surrounding blanks")
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        for url in urls:
            if httpx.URL(url).scheme not in ("http", "https") or not httpx.URL(url).host:
                raise ValueError(f"a service is addressed as http://host:port or https://host, not {url!r}")
            if httpx.URL(url).userinfo:
                raise ValueError("credentials belong into api_key, not into the address, which is shown in messages")
        if not urls:
            raise ValueError("at least one service is needed")
        self._routes = Routes(
            [url.rstrip("/") for url in urls],
            clock=clock,
            fingerprints=fingerprints or {},
            allow_fingerprint_change=allow_fingerprint_change,
        )
        self._wire: Wire = wire
        self._patience = patience
        self._timeout = timeout
        self._clock = clock
        self._random = random
        self._meter = Meter()
        self._headers = {"User-Agent": "reward-trainer"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._routes.urls)}, wire={self._wire!r})"

    @property
    def fingerprints(self) -> dict[Job, dict[str, str]]:
        """The fingerprint of every model used so far, by job ("score", "gradient") and name; a checkpoint keeps it."""
        return self._routes.fingerprints

    def counts(self) -> WireCounts:
        """Requests, repetitions, bytes and processor time so far."""
        return self._meter.read()

    def _budget(self, deadline: float | None) -> Budget:
        return Budget(
            deadline=deadline, patience=self._patience, timeout=self._timeout, clock=self._clock, random=self._random
        )

    def _ask(self, build: Callable[[], Question[Result]]) -> Flow[Result]:
        question = build()
        return (yield from ask(question, self._routes, self._budget(question.deadline)))

    def _request(self, call: Call[Any], attempt: Attempt, content: Content | None, stream: Any) -> httpx.Request:
        return httpx.Request(
            call.method,
            attempt.service + call.path,
            headers=self._headers_of(call, content),
            content=stream,
            extensions={"timeout": attempt.timeout.as_dict()},
        )

    def _count(self, content: Content | None, received: bytes | bytearray) -> None:
        self._meter.add(requests=1, bytes_sent=content.sent if content else 0, bytes_received=len(received))

    def _headers_of(self, call: Call[Any], content: Content | None) -> dict[str, str]:
        headers = {**self._headers, "Accept": f"{call.accept}, application/problem+json"}
        if call.body is not None and content is not None:
            headers |= {"Content-Type": call.body.content_type, "Content-Length": str(content.length)}
        return headers

    def _check_time(self, attempt: Attempt) -> None:
        # httpx limits each read, not the whole answer: one that trickles in would outlive the deadline
        if attempt.stop_at is not None and self._clock() > attempt.stop_at:
            raise TimedOut(f"{attempt.service}: the answer was still arriving at the deadline")
