"""One submission inside the engine: what makes its samples, what is known of them so far, and who waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from models.base import Sample, SampleError
from models.judge import Comparison
from service.engine.batcher import Outcome, Ticket
from service.engine.worker import TensorSample
from service.errors import ServiceError


@dataclass(frozen=True, eq=False)
class Made:
    """What a maker gives: a decoded sample and what the caller should know about its image."""

    sample: Sample | Comparison | TensorSample
    warnings: tuple[str, ...] = ()


Maker = Callable[[], Made]
"""Decodes one sample on a pool thread; raises SampleError when its input cannot be read."""


@dataclass(eq=False)
class SampleResult:
    """All that is known of one sample when its request ends."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    unreadable: SampleError | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Timing:
    """The longest that any sample of the request spent in each stage, in milliseconds."""

    decode: float
    queue: float
    forward: float


class PendingRequest:
    """The response channel of one submission: collects outcomes from any thread, wakes its coroutine once."""

    def __init__(self, makers: Sequence[Maker], expected: int, loop: asyncio.AbstractEventLoop) -> None:
        self.results = [SampleResult() for _ in makers]
        self.makers: list[Maker] | None = list(makers)
        """They hold the request's body: None as soon as nobody waits for it, whatever the pool still has queued."""
        self.done: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._left = expected
        self._lock = threading.Lock()

    def settle(self, index: int, model: str, outcome: Outcome) -> None:
        with self._lock:
            self.results[index].outcomes[model] = outcome
            self._left -= 1
            finished = self._left == 0
        if finished:
            self._wake(None)

    def snapshot(self) -> list[SampleResult]:
        """The results so far; a forward that is still running cannot change them any more."""
        with self._lock:
            return [SampleResult(dict(r.outcomes), r.unreadable, r.warnings) for r in self.results]

    def fail(self, error: ServiceError) -> None:
        self._wake(error)

    def _wake(self, error: ServiceError | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: the process ends, and nobody waits
            self._loop.call_soon_threadsafe(self._finish, error)

    def _finish(self, error: ServiceError | None) -> None:
        if not self.done.done():
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)


def bare(error: SampleError) -> SampleError:
    """The error without its traceback, whose frames would keep the request and its images alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def timing(tickets: Sequence[Ticket]) -> Timing:
    """The slowest ticket of each stage, in milliseconds."""
    decode = max((t.ready_at - t.admitted_at for t in tickets if t.ready_at), default=0.0)
    started = [t for t in tickets if t.started_at]
    queue = max((t.started_at - t.ready_at for t in started), default=0.0)
    forward = max((t.finished_at - t.started_at for t in started if t.finished_at), default=0.0)
    return Timing(*(round(seconds * 1000, 3) for seconds in (decode, queue, forward)))
