"""When to ask again, whom, and when to give up. No I/O here: the sync and the async client share it."""

from __future__ import annotations

import email.utils
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from trainer_client._wire import Content
from trainer_client.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    Overloaded,
    ProtocolError,
    RequestRejected,
    RewardError,
    ServiceFailed,
    ServiceUnavailable,
    TimedOut,
    TransportError,
)

logger = logging.getLogger("trainer_client")

CONNECT_TIMEOUT = 5.0
FIRST_BACKOFF = 0.5
LONGEST_BACKOFF = 15.0
DEADLINE_GRACE = 0.5
"""Seconds past the deadline for the service's last word: what it had finished by then arrives a moment later."""
_DETAIL_CHARACTERS = 300


@dataclass(frozen=True, eq=False)
class Answer:
    """A whole HTTP answer."""

    status: int
    headers: httpx.Headers
    content: bytes


@dataclass(frozen=True)
class Attempt:
    """One try: whom to ask, the time that is left (ms), and when to stop listening (on the client's clock)."""

    service: str
    deadline_ms: int | None
    timeout: httpx.Timeout
    stop_at: float | None


class Budget:
    """How long one call may take, shared by all its attempts at all services; and when it is spent."""

    def __init__(
        self,
        *,
        deadline: float | None,
        patience: float,
        timeout: float,
        clock: Callable[[], float],
        random: Callable[[], float],
    ) -> None:
        self.clock = clock
        self.started = clock()
        self._random = random
        self._timeout = timeout
        self._deadline_at = None if deadline is None else self.started + deadline
        self._patience_at = self.started + patience
        self._failures = 0
        self._last: RewardError | None = None
        self._abandoned = False

    def abandon(self) -> None:
        """Make no further attempt: another part of the call has failed, and with it the call."""
        self._abandoned = True

    def attempt(self, service: str, at_most: float | None = None) -> Attempt:
        """An attempt that begins now and may be silent for ``at_most`` seconds (None: the client's timeout).

        Raises :class:`DeadlineExceeded` when no time is left for one.
        """
        if self._abandoned:
            raise ConnectionFailed(f"{service}: not asked again, another part of the call has failed") from self._last
        wait = self._timeout if at_most is None else min(at_most, self._timeout)
        if self._deadline_at is None:
            return Attempt(service, None, httpx.Timeout(wait, connect=min(CONNECT_TIMEOUT, wait)), None)
        remaining = self._deadline_at - self.clock()
        if remaining <= 0:
            raise DeadlineExceeded(self._summary("the deadline passed")) from self._last
        wait = min(wait, remaining + DEADLINE_GRACE)
        timeout = httpx.Timeout(wait, connect=min(CONNECT_TIMEOUT, wait))
        return Attempt(service, max(1, int(remaining * 1000)), timeout, self._deadline_at + DEADLINE_GRACE)

    def backoff(self, failures: int) -> float:
        """Seconds to leave a service alone after so many earlier failures: full jitter, doubling up to a cap."""
        return min(LONGEST_BACKOFF, FIRST_BACKOFF * 2.0**failures) * self._random()

    def failed(self, error: RewardError) -> None:
        """Count a failed attempt; raises ``error`` if repeating cannot help."""
        if not isinstance(error, TransportError | Overloaded | DeadlineExceeded):
            raise error
        self._last = error
        self._failures += 1

    def wait(self, next_at: float, error: RewardError, whom: str) -> float:
        """Seconds until ``next_at``; raises ``error``, or DeadlineExceeded from it, when that is too late."""
        now = self.clock()
        next_at = max(now, next_at)
        if self._deadline_at is not None and next_at >= self._deadline_at:
            raise DeadlineExceeded(self._summary(f"the deadline leaves no time to ask again ({error})")) from error
        if next_at >= self._patience_at:
            error.add_note(self._summary("patience ended"))
            raise error
        logger.warning("%s; asking %s again in %.1f s", error, whom, next_at - now)
        return next_at - now

    def _summary(self, what: str) -> str:
        tries = f"{self._failures} failed attempt{'' if self._failures == 1 else 's'}"
        return f"{what} after {self.clock() - self.started:.1f} s and {tries}"


class Attempts:
    """The attempts of one request at one or several replicas.

    After a retryable failure a service is left alone for its Retry-After plus a random time of up to
    ``FIRST_BACKOFF * 2**n`` seconds (full jitter, capped), n being its failures in this call; the next attempt goes to
    the service that is free first. ``first`` is the index of the first to be asked; ``free_at`` says until when each
    is better left alone (on the budget's clock).
    """

    def __init__(self, services: Sequence[str], budget: Budget, *, first: int, free_at: Sequence[float]) -> None:
        self._services = services
        self._budget = budget
        self._current = first
        self._free_at = list(free_at)
        self._failures = [0] * len(services)

    def begin(self) -> Attempt:
        """The next attempt; raises :class:`DeadlineExceeded` when no time is left for one."""
        return self._budget.attempt(self._services[self._current])

    def after(self, error: RewardError) -> float:
        """Seconds to wait before the next attempt; raises ``error``, or DeadlineExceeded from it, if none is due."""
        self._budget.failed(error)
        failed = self._current
        retry_after = getattr(error, "retry_after", None) or 0.0
        backoff = self._budget.backoff(self._failures[failed])
        self._failures[failed] += 1
        self._free_at[failed] = self._budget.clock() + retry_after + backoff
        count = len(self._services)
        self._current = min(range(count), key=lambda s: (self._free_at[s], (s - failed) % count))
        return self._budget.wait(self._free_at[self._current], error, self._services[self._current])


@contextmanager
def transport_errors(service: str, content: Content | None) -> Iterator[None]:
    """httpx's transport errors -> ours, at this one place; ``content`` is the body being sent."""
    try:
        yield
    except httpx.TimeoutException as exc:
        raise TimedOut(f"{service}: {type(exc).__name__}: no answer in time") from exc
    except (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.DecodingError) as exc:
        raise ProtocolError(f"{service}: {exc}") from exc
    except httpx.TransportError as exc:
        message = f"{service}: {type(exc).__name__}: {exc}"
        if content is not None and 0 < content.sent < content.length:
            # asyncio loses an early 413 when the connection is reset behind it: then this is all that can be told
            message += f" (after {content.sent} of {content.length} bytes: is the request larger than is accepted?)"
        raise ConnectionFailed(message) from exc


def raise_for_status(service: str, answer: Answer) -> None:
    """Nothing for 200, else the error that the status and the problem document say."""
    status = answer.status
    if status == 200:
        return
    problem = _problem(answer)
    code = problem.get("code")
    code = code if isinstance(code, str) else f"http_{status}"
    detail = problem.get("detail") or problem.get("title")
    if not isinstance(detail, str):
        detail = answer.content[:_DETAIL_CHARACTERS].decode("utf-8", "replace").strip()
    message = f"{service} answered {status} {code}: {detail}"
    hint = retry_after(answer.headers.get("retry-after"), wall_clock=time.time)
    if status == 429:
        raise Overloaded(message, code=code, retry_after=hint)
    if status == 504 and problem:
        raise DeadlineExceeded(message)
    if status in (408, 502, 503, 504):  # 408: the upload took too long
        raise ServiceUnavailable(message, status=status, code=code, retry_after=hint)
    if status >= 400:
        kind = RequestRejected if status < 500 else ServiceFailed
        raise kind(message, service=service, status=status, code=code, detail=detail, problem=problem)
    raise ProtocolError(f"{service} answered {status} where 200 or an error was due")


def retry_after(value: str | None, *, wall_clock: Callable[[], float]) -> float | None:
    """Seconds of a Retry-After header (RFC 9110: seconds, or a date), None if there is none or it is malformed."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value)
    date = email.utils.parsedate_tz(value)
    return None if date is None else max(0.0, email.utils.mktime_tz(date) - wall_clock())


def _problem(answer: Answer) -> Mapping[str, Any]:
    """The RFC 9457 document, {} where the body is none: an answer of a proxy, whose status then says all."""
    if not answer.headers.get("content-type", "").startswith("application/problem+json"):
        return {}
    try:
        problem = json.loads(answer.content)
    except (ValueError, RecursionError):
        return {}
    return problem if isinstance(problem, dict) else {}
