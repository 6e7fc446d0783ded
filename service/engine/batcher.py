"""The whole queue: admission, deadlines, cancellation and batch formation for one model.

A :class:`Ticket` is one admitted sample with its own response channel. It is *admitted* (its cost is reserved), then
prepared in the decode pool, then *ready* (waiting for a batch), then *running*, then settled. A ticket whose client
left or whose deadline passed is dropped wherever it is before *running*, and its cost is free again at once.

Admission happens on the event loop, tickets become ready on pool threads, batches are taken on a lane's thread: one
condition, shared by the batchers of a lane, guards them all.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from models.base import Output, SampleError
from models.judge import Preference
from service.errors import InvalidRequest, Overloaded
from service.telemetry import Telemetry

Job = Literal["score", "gradient", "compare"]
OVERBOOKED = 2.0
LONGEST_RETRY_AFTER_S = 60
PATIENCE = 0.1
"""Of a batch's time: how long a batch waits to become as large as the one before it."""
COST: dict[Job, int] = {"score": 1, "gradient": 3, "compare": 1}
"""In forward passes: a gradient is one forward and a backward of two."""


@dataclass(frozen=True, eq=False)
class GradientResult:
    """Output of one sample and d(score)/d(image), float32 [3, H, W] on the CPU."""

    output: Output
    gradient: Any


Outcome = Output | GradientResult | Preference | SampleError


@dataclass(eq=False)
class Ticket:
    """One admitted sample of one model. ``settle`` is called once, from any thread, unless the ticket is dropped."""

    job: Job
    settle: Callable[[Ticket, Outcome], None]
    deadline: float
    payload: Any = None
    weight: int = 1
    """How much of a batch it fills: 1, or the tokens of a judge's question. Known when it is ready."""
    state: Literal["admitted", "ready", "running", "settled", "dropped"] = "admitted"
    admitted_at: float = field(default_factory=time.monotonic)
    ready_at: float = 0.0
    started_at: float = 0.0
    finished_at: float = 0.0

    @property
    def cost(self) -> int:
        return COST[self.job]


class Batcher:
    """The queue of one model, bounded by cost."""

    def __init__(
        self, model: str, *, max_cost: int, max_delay_s: float, wakeup: threading.Condition, telemetry: Telemetry
    ) -> None:
        self.model = model
        self.max_cost = max_cost
        self.max_delay_s = max_delay_s
        self.rate: float | None = None
        """Cost finished per second while there is work (moving average), first measured at warm-up; None before."""
        self._wakeup = wakeup
        self._telemetry = telemetry
        self._depth_gauge = telemetry.depth.labels(model)
        self._cost_gauge = telemetry.cost.labels(model)
        self._cost = 0
        self._preparing = 0
        self._last_settled = 0.0
        self._next_appointment = 0.0
        self._last_taken = 1
        self._ready_weight = 0
        self._batch_seconds = 0.0
        self._ready: dict[Ticket, None] = {}  # insertion-ordered: a queue from which any ticket can leave at once

    # -- admission (event loop) ---------------------------------------------------------------------------------------

    def check(self, count: int, job: Job) -> None:
        """Raise :class:`Overloaded` with the time until ``count`` samples would fit, if they do not now.

        Raises :class:`InvalidRequest` if they never will.
        """
        cost = count * COST[job]
        if cost > self.max_cost:
            raise InvalidRequest(
                f"{count} samples of {job} cost {cost}; {self.model} admits {self.max_cost}: split the request",
                code="request_too_large",
            )
        if not self.fits(cost):
            raise Overloaded(
                f"{self.model} has admitted {self._cost} of {self.max_cost} cost units; this request needs {cost}",
                retry_after_s=self._appointment(cost),
                model=self.model,
            )

    def fits(self, cost: int) -> bool:
        """Whether ``cost`` more can be admitted now."""
        return self._cost + cost <= self.max_cost

    def _appointment(self, cost: int) -> int:
        """Seconds after which a refused request should come again.

        Not before there is room, and not all at once: whoever is refused gets a place in a queue that exists only as
        times to come again. It moves at OVERBOOKED times the measured rate, because some will not come.
        """
        if self.rate is None:
            return 1
        now = time.monotonic()
        with self._wakeup:
            room_at = now + (self._cost + cost - self.max_cost) / self.rate
            self._next_appointment = max(self._next_appointment + cost / (OVERBOOKED * self.rate), room_at)
            return max(1, min(LONGEST_RETRY_AFTER_S, math.ceil(self._next_appointment - now)))

    def admit(self, ticket: Ticket) -> None:
        """Reserve the ticket's cost; the caller has checked that it fits, on the same turn of the event loop."""
        with self._wakeup:
            self._cost += ticket.cost
            self._preparing += 1
            self._publish()

    # -- from the pool ------------------------------------------------------------------------------------------------

    def ready(self, ticket: Ticket, payload: Any, *, weight: int = 1, front: bool = False) -> None:
        """The sample is prepared: queue it (a canary at the front), unless it was dropped in the meantime."""
        with self._wakeup:
            if ticket.state != "admitted":
                return
            ticket.payload, ticket.state, ticket.ready_at = payload, "ready", time.monotonic()
            ticket.weight = max(1, weight)
            self._ready_weight += ticket.weight
            if front and (oldest := self.oldest()) is not None:
                ticket.ready_at = min(ticket.ready_at, oldest)  # the head tells how long the queue has waited
            self._preparing -= 1
            if front:
                self._ready = {ticket: None, **self._ready}
            else:
                self._ready[ticket] = None
            self._publish()
            self._wakeup.notify()

    def reject(self, ticket: Ticket, error: SampleError) -> None:
        """The sample could not be prepared: settle it without a forward."""
        with self._wakeup:
            if ticket.state != "admitted":
                return
            self._preparing -= 1
            self._leave(ticket, "settled")
            self._wakeup.notify()  # a worker may be waiting for this sample to fill its batch
        ticket.settle(ticket, error)

    def drop(self, ticket: Ticket, reason: Literal["deadline", "disconnect"]) -> bool:
        """Forget a ticket that nobody waits for any more; False when it is running or done already."""
        with self._wakeup:
            if ticket.state == "admitted":
                self._preparing -= 1
            elif ticket.state == "ready":
                self._remove(ticket)
            else:
                return False
            ticket.payload = None
            self._leave(ticket, "dropped")
            self._wakeup.notify()
        self._telemetry.dropped.labels(self.model, reason).inc()
        return True

    # -- batch formation (lane; the lane holds the condition) ---------------------------------------------------------

    def oldest(self) -> float | None:
        """When the head of the queue became ready; None when nothing waits."""
        return next(iter(self._ready)).ready_at if self._ready else None

    def next_job(self) -> Job | None:
        """The kind of job at the head of the queue; None when nothing waits."""
        return next(iter(self._ready)).job if self._ready else None

    def due_in(self, now: float, full: int) -> float | None:
        """Seconds until a batch of the weight ``full`` should be formed: 0 now, None when nothing waits.

        A padded batch costs the same with one sample as with all, so it waits for more where more can be expected:
        while samples are being decoded for it, at most max_delay_s; and, because clients that wait for their answers
        send again together, until it is as large as the one before, at most PATIENCE of a batch's time. A client that
        is alone never waits.
        """
        oldest = self.oldest()
        if oldest is None:
            return None
        if self._ready_weight >= full:
            return 0.0
        patience = self.max_delay_s if self._preparing else 0.0
        # What waits for a judge's verdicts is one tournament, which does not send again.
        if self.next_job() != "compare" and self._ready_weight < min(full, self._last_taken):
            patience = max(patience, PATIENCE * self._batch_seconds)
        return max(0.0, oldest + patience - now)

    def take(self, full: int) -> list[Ticket]:
        """Form a batch: the oldest tickets of one kind of job, of at most the weight ``full`` or of one ticket.

        Expired ones are dropped.
        """
        now = time.monotonic()
        batch: list[Ticket] = []
        weight = 0
        for ticket in list(self._ready):
            if weight >= full:
                break
            if ticket.deadline <= now:
                self._remove(ticket)
                ticket.payload = None
                self._leave(ticket, "dropped")
                self._telemetry.dropped.labels(self.model, "deadline").inc()
            elif not batch or (ticket.job == batch[0].job and weight + ticket.weight <= full):
                self._remove(ticket)
                ticket.state, ticket.started_at = "running", now
                batch.append(ticket)
                weight += ticket.weight
        if batch:
            self._last_taken = weight
        self._publish()
        return batch

    # -- results (lane) -----------------------------------------------------------------------------------------------

    def settle(self, batch: list[Ticket], outcomes: list[Outcome], *, learn: bool = True) -> None:
        """Answer a batch, free its cost and, with ``learn``, learn the rate."""
        now = time.monotonic()
        with self._wakeup:
            # Work on this batch began when the one before was settled, or with its own admission if that was later:
            # decoding counts, and so does the time that other models of the lane took.
            began = max(self._last_settled, min(ticket.admitted_at for ticket in batch))
            if learn:
                self.learn(sum(ticket.cost for ticket in batch), now - began)
                self._batch_seconds = 0.8 * self._batch_seconds + 0.2 * (now - batch[0].started_at)
            self._last_settled = now
            for ticket in batch:
                ticket.finished_at, ticket.payload = now, None
                self._leave(ticket, "settled")
        for ticket, outcome in zip(batch, outcomes, strict=True):
            ticket.settle(ticket, outcome)

    def learn(self, cost: float, seconds: float) -> None:
        """Fold a measurement into the moving average of the rate (cost per second)."""
        rate = cost / max(seconds, 1e-6)
        self.rate = rate if self.rate is None else 0.8 * self.rate + 0.2 * rate

    def _remove(self, ticket: Ticket) -> None:
        del self._ready[ticket]
        self._ready_weight -= ticket.weight

    def _leave(self, ticket: Ticket, state: Literal["settled", "dropped"]) -> None:
        ticket.state = state
        self._cost -= ticket.cost
        self._publish()

    def _publish(self) -> None:
        self._depth_gauge.set(len(self._ready))
        self._cost_gauge.set(self._cost)

    @property
    def cost(self) -> int:
        """Admitted and unfinished cost."""
        return self._cost
