"""Rewards in the loop: a batch is scored while the next one is sampled.

``submit`` starts the request at once, on a thread of its own, and gives a handle; ``result`` waits only for what is not
there yet. A trainer's step then costs the longer of sampling and scoring, and not their sum::

    with RewardQueue(remote_scores("http://rewards:8000", "pickscore")) as queue:
        handles = [queue.submit(items_of(sample(prompts))) for prompts in batches]
        totals = [handle.result().as_array() for handle in handles]

A reward that costs nothing (:class:`LocalScores`) has the same interface: the difference is what the service costs.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, Self, TypeVar, Unpack

from trainer_client._base import Options
from trainer_client._calls import Items, Models, Pairs, Question, compare_question, score_question
from trainer_client._wire import Wire
from trainer_client.client import AsyncRewardClient
from trainer_client.items import Item, build_items, pixel_bytes
from trainer_client.results import (
    CompareResponse,
    ItemScores,
    ModelIdentity,
    ScoreResponse,
    WireCounts,
)

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


@dataclass(frozen=True)
class QueueStats:
    """What a queue has done so far; :func:`dataclasses.asdict` of it is a row for a logger.

    ``submitted`` batches, of which ``answered``, ``failed`` (an exception at ``result``, or cancelled) and
    ``in_flight``, the last with ``in_flight_bytes`` of pixels. ``waited_seconds``: the caller stood still in
    ``result``; ``blocked_seconds``: in ``submit``, because too many bytes were in flight; ``in_flight_seconds``: sum
    over batches from submission to answer. ``requests``, ``retries``, ``bytes_sent`` and ``bytes_received`` on the
    wire, and ``cpu_seconds`` of this process for converting, sending, receiving and checking.
    """

    submitted: int = 0
    answered: int = 0
    failed: int = 0
    in_flight: int = 0
    in_flight_bytes: int = 0
    waited_seconds: float = 0.0
    blocked_seconds: float = 0.0
    in_flight_seconds: float = 0.0
    requests: int = 0
    retries: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    cpu_seconds: float = 0.0


class RewardSource(Protocol[Result_co]):
    """Where a queue gets its rewards; used from the queue's own event loop."""

    async def answer(self, items: Sequence[Item]) -> Result_co:
        """The rewards of one batch."""
        ...

    def counts(self) -> WireCounts:
        """What crossed the wire; ``cpu_seconds`` are those outside of the event loop's thread."""
        ...

    async def aclose(self) -> None:
        """Let go of connections."""
        ...


class RemoteQuestions(Generic[Result]):
    """Questions to reward services; images are converted on threads beside the event loop.

    ``build`` makes the question about a batch; the client is closed with the queue.
    """

    def __init__(self, client: AsyncRewardClient, build: Callable[[Sequence[Item]], Question[Result]]) -> None:
        self._client = client
        self._build = build
        self._converting = 0.0

    async def answer(self, items: Sequence[Item]) -> Result:
        question, seconds = await asyncio.to_thread(self._timed, items)
        self._converting += seconds
        return await self._client.answer(question)

    def _timed(self, items: Sequence[Item]) -> tuple[Question[Result], float]:
        started = time.thread_time()
        question = self._build(items)
        return question, time.thread_time() - started

    def counts(self) -> WireCounts:
        return replace(self._client.counts(), cpu_seconds=self._converting)

    async def aclose(self) -> None:
        await self._client.aclose()


def remote_scores(
    base_url: str | Sequence[str], models: Models, *, deadline: float | None = None, **options: Unpack[Options]
) -> RemoteQuestions[ScoreResponse]:
    """Scores by ``models`` of one or several services; ``options`` are those of AsyncRewardClient."""
    wire: Wire = options.get("wire", "safetensors")
    return RemoteQuestions(
        AsyncRewardClient(base_url, **options), lambda items: score_question(items, models, deadline, False, wire)
    )


def remote_comparisons(
    base_url: str | Sequence[str],
    model: str,
    *,
    pairs: Pairs = "all",
    both_orders: bool = True,
    deadline: float | None = None,
    **options: Unpack[Options],
) -> RemoteQuestions[CompareResponse]:
    """Preferences within each item by ``model``, as RewardClient.compare gives them."""
    wire: Wire = options.get("wire", "safetensors")
    return RemoteQuestions(
        AsyncRewardClient(base_url, **options),
        lambda items: compare_question(items, model, pairs, both_orders, False, deadline, wire),
    )


class LocalScores:
    """A function of this process as a source: ``function(item)`` gives a finite score per candidate [K].

    For comparisons and for rewards that are a line of Python. The model's name is ``name``, its fingerprint says that
    nothing is known about the function. An exception of the function surfaces at ``result``.
    """

    def __init__(self, function: Callable[[Item], Sequence[float]], name: str = "local") -> None:
        self._function = function
        self._name = name

    async def answer(self, items: Sequence[Item]) -> ScoreResponse:
        return await asyncio.to_thread(self._score, items)

    def _score(self, items: Sequence[Item]) -> ScoreResponse:
        identity = ModelIdentity(f"local:{self._name}", "float64")
        return ScoreResponse([self._score_item(item) for item in items], {self._name: identity}, {})

    def _score_item(self, item: Item) -> ItemScores:
        scores: list[float | None] = [float(score) for score in self._function(item)]
        if len(scores) != len(item) or not all(score is not None and math.isfinite(score) for score in scores):
            raise ValueError(f"{self._name} gave {scores} for {len(item)} candidates: one finite score each is due")
        nothing: list[list[Any]] = [[] for _ in scores]
        return ItemScores({self._name: scores}, list(scores), nothing, nothing, outputs={}, details={})

    def counts(self) -> WireCounts:
        return WireCounts()

    async def aclose(self) -> None:
        pass


class Handle(Generic[Result]):
    """A batch on its way; ``index`` counts submissions from 0."""

    def __init__(self, queue: RewardQueue[Result], index: int, future: Future[Result]) -> None:
        self._queue = queue
        self._future = future
        self._landed = False
        self.index = index

    def done(self) -> bool:
        """Whether ``result`` would return (or raise) at once."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Result:
        """The answer, waited for; raises what went wrong: RewardError, ValueError, TypeError, or CancelledError.

        Raises TimeoutError after ``timeout`` seconds; the batch stays on its way.
        """
        return self._queue._wait(self, timeout)

    def __repr__(self) -> str:
        return f"Handle({self.index}, {'done' if self.done() else 'in flight'})"


class RewardQueue(Generic[Result]):
    """Batches of items in flight to a :class:`RewardSource`; use it as a context manager.

    At most ``max_requests`` batches are converted and on the wire at a time, in the order of submission; ``submit``
    waits while ``max_bytes`` of pixels (uint8) are in flight, so that a slow service slows the trainer instead of
    filling its memory. A batch larger than that goes alone. Images must not be changed in place before ``result``: they
    are converted when their turn comes, on another thread. An answer is kept until it is asked for. Leaving the
    ``with`` block cancels what is in flight.
    """

    def __init__(self, source: RewardSource[Result], *, max_requests: int = 8, max_bytes: int = 1 << 30) -> None:
        if max_requests < 1 or max_bytes < 1:
            raise ValueError(f"max_requests and max_bytes are at least 1, not {max_requests} and {max_bytes}")
        self._source = source
        self._max_bytes = max_bytes
        self._slots = asyncio.Semaphore(max_requests)
        self._changed = threading.Condition()
        self._stats = QueueStats()
        self._outstanding: dict[int, Handle[Result]] = {}
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward-queue", daemon=True)
        self._thread.start()

    def submit(self, items: Items) -> Handle[Result]:
        """Send a batch (an item, or several) on its way; returns as soon as there is room for it.

        Raises TypeError or ValueError for what are no items, CancelledError when the queue is or gets closed.
        """
        built = build_items(items)
        size = pixel_bytes(built)
        started = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room(size))
            self._add(blocked_seconds=time.monotonic() - started)
            if self._closed:
                raise CancelledError("the queue is closed")
            future = asyncio.run_coroutine_threadsafe(self._answer(built), self._loop)
            handle = Handle(self, self._stats.submitted, future)
            self._outstanding[handle.index] = handle
            self._add(submitted=1, in_flight=1, in_flight_bytes=size)
        submitted = time.monotonic()
        future.add_done_callback(lambda done: self._land(handle, size, time.monotonic() - submitted))
        return handle

    def results(self) -> Iterator[Result]:
        """The answers whose ``result`` was not asked yet, in the order of submission, waiting for each.

        Ends when nothing is outstanding; what is submitted meanwhile is included.
        """
        while True:
            with self._changed:
                if not self._outstanding:
                    return
                handle = self._outstanding[min(self._outstanding)]
            yield handle.result()

    def stats(self) -> QueueStats:
        """A snapshot."""
        counts = self._source.counts()
        with self._changed:
            return replace(
                self._stats,
                requests=counts.requests,
                retries=counts.retries,
                bytes_sent=counts.bytes_sent,
                bytes_received=counts.bytes_received,
                cpu_seconds=self._stats.cpu_seconds + counts.cpu_seconds,
            )

    def close(self) -> None:
        """Cancel what is in flight, wake up whoever waits, close the source. Closing again does nothing."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def _answer(self, items: Sequence[Item]) -> Result:
        async with self._slots:
            try:
                return await self._source.answer(items)
            finally:
                # this thread does nothing else: its processor time is that of sending, receiving and checking
                with self._changed:
                    self._stats = replace(self._stats, cpu_seconds=time.thread_time())

    async def _shut_down(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._source.aclose()
        await self._loop.shutdown_default_executor()

    def _land(self, handle: Handle[Result], size: int, seconds: float) -> None:
        future = handle._future
        failed = future.cancelled() or future.exception() is not None
        with self._changed:
            self._add(
                answered=int(not failed), failed=int(failed), in_flight=-1, in_flight_bytes=-size,
                in_flight_seconds=seconds,
            )  # fmt: skip
            handle._landed = True
            self._changed.notify_all()

    def _wait(self, handle: Handle[Result], timeout: float | None) -> Result:
        started = time.monotonic()
        try:
            return handle._future.result(timeout)
        finally:
            with self._changed:
                self._add(waited_seconds=time.monotonic() - started)
                if handle.done():
                    # a future wakes its waiters before its callbacks: the counts would be a moment behind
                    self._changed.wait_for(lambda: handle._landed)
                    self._outstanding.pop(handle.index, None)

    def _has_room(self, size: int) -> bool:
        return self._stats.in_flight == 0 or self._stats.in_flight_bytes + size <= self._max_bytes

    def _add(self, **more: float) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})
