from __future__ import annotations

import random
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from models.base import ModelError, Output
from service.engine import batcher as batcher_module
from service.engine.batcher import COST, Batcher, Outcome, Ticket
from service.errors import Overloaded
from service.telemetry import Telemetry

NEVER = float("inf")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(batcher_module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def make(max_cost: int = 100, max_delay_s: float = 1.0, telemetry: Telemetry | None = None) -> Batcher:
    return Batcher(
        "m",
        max_cost=max_cost,
        max_delay_s=max_delay_s,
        wakeup=threading.Condition(),
        telemetry=telemetry or Telemetry(),
    )


def ticket(job: str = "score", deadline: float = NEVER, answers: list[Outcome] | None = None) -> Ticket:
    def settle(_: Ticket, outcome: Outcome) -> None:
        if answers is not None:
            answers.append(outcome)

    return Ticket(job, settle, deadline)  # type: ignore[arg-type]


def queued(batcher: Batcher, *tickets: Ticket) -> None:
    for entry in tickets:
        batcher.admit(entry)
        batcher.ready(entry, "payload")


def metric(telemetry: Telemetry, name: str, **labels: str) -> float:
    return telemetry.registry.get_sample_value(name, labels) or 0.0


def test_a_batch_holds_samples_of_different_requests_oldest_first() -> None:
    batcher = make()
    tickets = [ticket() for _ in range(5)]
    queued(batcher, *tickets)
    assert batcher.take(3) == tickets[:3]
    assert batcher.take(3) == tickets[3:]
    assert batcher.take(3) == []


def test_a_batch_holds_one_kind_of_job_and_the_oldest_decides_which() -> None:
    batcher = make()
    first, second, third = ticket("gradient"), ticket("score"), ticket("gradient")
    queued(batcher, first, second, third)
    assert batcher.take(8) == [first, third]
    assert batcher.take(8) == [second]


def test_cost_counts_forward_passes_and_is_free_when_settled() -> None:
    batcher = make()
    score, gradient = ticket(), ticket("gradient")
    queued(batcher, score, gradient)
    assert batcher.cost == COST["score"] + COST["gradient"] == 4
    batch = batcher.take(8)
    assert batcher.cost == 4  # running work still counts
    batcher.settle(batch, [Output(1.0)])
    assert batcher.cost == 3


def test_admission_is_bounded_by_cost() -> None:
    batcher = make(max_cost=4)
    batcher.check(4, "score")
    batcher.admit(ticket("gradient"))
    batcher.check(1, "score")
    with pytest.raises(Overloaded):
        batcher.check(2, "score")
    with pytest.raises(Overloaded):
        batcher.check(1, "gradient")


@pytest.mark.parametrize(("rate", "count", "seconds"), [(None, 5, 1), (2.0, 5, 3), (1000.0, 5, 1), (0.001, 5, 60)])
def test_retry_after_is_the_time_until_the_request_would_fit(rate: float | None, count: int, seconds: int) -> None:
    batcher = make(max_cost=10)
    for _ in range(10):
        batcher.admit(ticket())
    batcher.rate = rate
    with pytest.raises(Overloaded) as refusal:
        batcher.check(count, "score")
    assert refusal.value.retry_after_s == seconds


def test_the_rate_is_a_moving_average_of_cost_per_second_from_admission_or_the_last_batch(clock: Clock) -> None:
    batcher = make()
    early = [ticket() for _ in range(4)]
    for entry in early:
        entry.admitted_at = clock.now
    queued(batcher, *early)
    clock.now += 2.0
    batcher.settle(batcher.take(4), [Output(0.0)] * 4)
    assert batcher.rate == 2.0  # decoding and waiting count: 4 in the 2 s since admission
    waited = ticket("gradient")
    waited.admitted_at = clock.now - 1.0
    queued(batcher, waited)
    clock.now += 0.5
    batcher.settle(batcher.take(4), [Output(0.0)])
    assert batcher.rate == pytest.approx(0.8 * 2.0 + 0.2 * 6.0)  # time that the batch before used counts once
    idle = ticket()
    clock.now += 1000.0
    idle.admitted_at = clock.now
    queued(batcher, idle)
    clock.now += 0.25
    batcher.settle(batcher.take(4), [Output(0.0)])
    assert batcher.rate == pytest.approx(0.8 * 2.8 + 0.2 * 4.0)  # idle time does not slow the rate


def test_a_full_batch_and_an_idle_decoder_do_not_wait(clock: Clock) -> None:
    batcher = make(max_delay_s=1.0)
    assert batcher.due_in(clock.now, 2) is None
    queued(batcher, ticket())
    assert batcher.due_in(clock.now, 2) == 0.0  # nothing is being decoded: waiting could bring nothing
    batcher.admit(ticket())
    assert batcher.due_in(clock.now, 2) == 1.0  # one is: it may fill the batch
    assert batcher.due_in(clock.now, 1) == 0.0  # the batch is full already


def test_waiting_is_counted_from_the_oldest_and_never_exceeds_max_delay(clock: Clock) -> None:
    batcher = make(max_delay_s=1.0)
    batcher.admit(ticket())
    queued(batcher, ticket())
    clock.now += 0.75
    queued(batcher, ticket())
    assert batcher.due_in(clock.now, 8) == pytest.approx(0.25)
    clock.now += 0.25
    assert batcher.due_in(clock.now, 8) == 0.0
    clock.now += 5
    assert batcher.due_in(clock.now, 8) == 0.0


@pytest.mark.parametrize("end", ["reject", "drop"])
def test_a_sample_that_never_becomes_ready_ends_the_waiting(end: str, clock: Clock) -> None:
    batcher = make(max_delay_s=1.0)
    coming = ticket()
    batcher.admit(coming)
    queued(batcher, ticket())
    assert batcher.due_in(clock.now, 8) == 1.0
    if end == "reject":
        batcher.reject(coming, ModelError("no"))
    else:
        assert batcher.drop(coming, "disconnect")
    assert batcher.due_in(clock.now, 8) == 0.0


def test_those_who_are_refused_are_told_to_come_back_one_after_the_other(clock: Clock) -> None:
    """If all came back when the first has room, most would be refused again, and refusing costs time too."""
    batcher = make(max_cost=10)
    for _ in range(10):
        batcher.admit(ticket())
    batcher.rate = 4.0
    waits = []
    for _ in range(80):
        with pytest.raises(Overloaded) as refusal:
            batcher.check(1, "score")
        waits.append(refusal.value.retry_after_s)
    assert waits == sorted(waits)
    assert waits[0] == 1
    # Appointments come at twice the measured rate, because not everyone keeps them.
    assert waits[-1] == pytest.approx(80 / (2 * 4.0), abs=1.01)
    clock.now += 1000
    with pytest.raises(Overloaded) as refusal:
        batcher.check(1, "score")
    assert refusal.value.retry_after_s == 1  # appointments of the past are forgotten


def test_a_batch_waits_briefly_for_as_many_as_came_last_time(clock: Clock) -> None:
    """Clients that wait for their answers send again together: half a padded batch costs as much as a full one."""
    batcher = make(max_delay_s=0.004)
    queued(batcher, *(ticket() for _ in range(8)))
    for _ in range(30):  # the batch's time is a moving average
        batch = batcher.take(8)
        clock.now += 1.0
        batcher.settle(batch, [Output(0.0)] * len(batch))
        queued(batcher, *(ticket() for _ in range(8)))
    batcher.settle(batch := batcher.take(8), [Output(0.0)] * len(batch))
    queued(batcher, ticket())
    assert batcher.due_in(clock.now, 8) == pytest.approx(0.1, rel=0.3)
    queued(batcher, *(ticket() for _ in range(7)))
    assert batcher.due_in(clock.now, 8) == 0.0
    batcher.settle(batch := batcher.take(8), [Output(0.0)] * len(batch))
    queued(batcher, ticket())
    clock.now += 0.11
    assert batcher.due_in(clock.now, 8) == 0.0  # the others did not come
    batcher.settle(batch := batcher.take(8), [Output(0.0)] * len(batch))
    queued(batcher, ticket())
    assert batcher.due_in(clock.now, 8) == 0.0  # and a client that is alone does not wait


def test_expired_samples_are_dropped_and_never_run(clock: Clock) -> None:
    telemetry = Telemetry()
    batcher = make(telemetry=telemetry)
    answers: list[Outcome] = []
    late, at_the_second, alive = (ticket(deadline=clock.now + s, answers=answers) for s in (0.5, 1.0, 1.5))
    queued(batcher, late, at_the_second, alive)
    clock.now += 1.0
    assert batcher.take(8) == [alive]
    assert [late.state, at_the_second.state] == ["dropped", "dropped"]
    assert batcher.cost == 1
    assert metric(telemetry, "reward_queue_dropped_total", model="m", reason="deadline") == 2
    assert answers == []
    assert not batcher.drop(late, "deadline")
    assert metric(telemetry, "reward_queue_dropped_total", model="m", reason="deadline") == 2


def test_expired_samples_do_not_shorten_the_batch(clock: Clock) -> None:
    batcher = make()
    queued(batcher, *(ticket(deadline=clock.now + 1) for _ in range(4)))
    alive = [ticket() for _ in range(4)]
    queued(batcher, *alive)
    clock.now += 2
    assert batcher.take(4) == alive


def test_dropping_a_sample_in_preparation_frees_its_cost_and_ignores_the_late_payload() -> None:
    batcher = make()
    gone = ticket()
    batcher.admit(gone)
    assert batcher.drop(gone, "disconnect")
    assert batcher.cost == 0
    batcher.ready(gone, "payload")
    assert (batcher.take(8), gone.state, gone.payload) == ([], "dropped", None)
    batcher.reject(gone, ModelError("too late"))
    assert batcher.cost == 0


def test_dropping_a_ready_sample_frees_its_cost_and_its_payload() -> None:
    batcher = make()
    gone, stays = ticket(), ticket()
    queued(batcher, gone, stays)
    assert batcher.drop(gone, "deadline")
    assert (batcher.cost, gone.payload) == (1, None)
    assert batcher.take(8) == [stays]
    assert not batcher.drop(gone, "deadline")
    assert batcher.cost == 1


def test_a_running_or_finished_sample_cannot_be_dropped() -> None:
    batcher = make()
    answers: list[Outcome] = []
    entry = ticket(answers=answers)
    queued(batcher, entry)
    batch = batcher.take(8)
    assert not batcher.drop(entry, "disconnect")
    assert batcher.cost == 1
    batcher.settle(batch, [Output(0.5)])
    assert not batcher.drop(entry, "disconnect")
    assert (batcher.cost, answers, entry.payload) == (0, [Output(0.5)], None)


def test_a_rejected_sample_is_answered_without_a_forward() -> None:
    batcher = make()
    answers: list[Outcome] = []
    entry, error = ticket(answers=answers), ModelError("bad")
    batcher.admit(entry)
    batcher.reject(entry, error)
    assert (answers, batcher.cost, batcher.take(8)) == ([error], 0, [])


def test_a_canary_goes_to_the_front() -> None:
    batcher = make()
    waiting, canary = [ticket() for _ in range(3)], ticket()
    queued(batcher, *waiting)
    batcher.admit(canary)
    batcher.ready(canary, "payload", front=True)
    assert batcher.take(2) == [canary, waiting[0]]


def test_a_canary_does_not_make_older_samples_wait_anew(clock: Clock) -> None:
    batcher = make(max_delay_s=1.0)
    batcher.admit(ticket())  # in decoding
    queued(batcher, ticket())
    oldest = clock.now
    clock.now += 0.75
    canary = ticket()
    batcher.admit(canary)
    batcher.ready(canary, "payload", front=True)
    assert batcher.oldest() == oldest
    assert batcher.due_in(clock.now, 8) == pytest.approx(0.25)


def test_an_expired_sample_keeps_no_payload_alive(clock: Clock) -> None:
    batcher = make()
    late = ticket(deadline=clock.now)
    queued(batcher, late)
    assert batcher.take(8) == []
    assert late.payload is None


def test_gauges_follow_the_queue() -> None:
    telemetry = Telemetry()
    batcher = make(telemetry=telemetry)
    batcher.admit(ticket("gradient"))
    queued(batcher, ticket(), ticket())
    assert metric(telemetry, "reward_queue_depth", model="m") == 2
    assert metric(telemetry, "reward_queue_cost", model="m") == 5
    batcher.take(1)
    assert metric(telemetry, "reward_queue_depth", model="m") == 1


def test_settling_a_batch_with_too_few_outcomes_raises() -> None:
    batcher = make()
    queued(batcher, ticket(), ticket())
    with pytest.raises(ValueError, match="shorter"):
        batcher.settle(batcher.take(2), [Output(1.0)])


class QueueMachine(RuleBasedStateMachine):
    """Any order of events: the cost is always that of the live tickets, and each ticket ends exactly once."""

    tickets = Bundle("tickets")
    batches = Bundle("batches")

    def __init__(self) -> None:
        super().__init__()
        self.telemetry = Telemetry()
        self.batcher = make(max_cost=10_000, telemetry=self.telemetry)
        self.all: list[Ticket] = []
        self.answers: dict[Ticket, int] = {}

    @rule(target=tickets, job=strategies.sampled_from(["score", "gradient"]), expired=strategies.booleans())
    def admit(self, job: str, expired: bool) -> Ticket:
        def settle(entry: Ticket, _: Outcome) -> None:
            self.answers[entry] = self.answers.get(entry, 0) + 1

        entry = Ticket(job, settle, 0.0 if expired else NEVER)  # type: ignore[arg-type]
        self.batcher.admit(entry)
        self.all.append(entry)
        return entry

    @rule(entry=tickets, front=strategies.booleans())
    def ready(self, entry: Ticket, front: bool) -> None:
        self.batcher.ready(entry, "payload", front=front)

    @rule(entry=tickets)
    def reject(self, entry: Ticket) -> None:
        self.batcher.reject(entry, ModelError("no"))

    @rule(entry=tickets)
    def drop(self, entry: Ticket) -> None:
        before = entry.state
        assert self.batcher.drop(entry, "disconnect") == (before in ("admitted", "ready"))

    @rule(target=batches, full=strategies.integers(1, 4))
    def take(self, full: int) -> list[Ticket]:
        batch = self.batcher.take(full)
        assert len(batch) <= full
        assert len({entry.job for entry in batch}) <= 1
        assert all(entry.state == "running" and entry.deadline == NEVER for entry in batch)
        return batch

    @rule(batch=consumes(batches))
    def settle(self, batch: list[Ticket]) -> None:
        if batch:  # a lane has nothing to settle otherwise
            self.batcher.settle(batch, [Output(0.0)] * len(batch))

    @invariant()
    def cost_is_that_of_live_tickets(self) -> None:
        live = [entry for entry in self.all if entry.state in ("admitted", "ready", "running")]
        assert self.batcher.cost == sum(entry.cost for entry in live)
        assert metric(self.telemetry, "reward_queue_cost", model="m") == self.batcher.cost

    @invariant()
    def waiting_ends_with_the_last_preparation(self) -> None:
        states = [entry.state for entry in self.all]
        due = self.batcher.due_in(time.monotonic(), 10_000)
        assert (due is None) == ("ready" not in states)
        if "admitted" not in states and due is not None:
            assert due == 0.0

    @invariant()
    def only_settled_tickets_are_answered_and_once(self) -> None:
        assert all(count == 1 for count in self.answers.values())
        assert {entry for entry in self.all if entry.state == "settled"} == self.answers.keys()


QueueMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestQueue = QueueMachine.TestCase


def test_under_concurrent_hammering_every_ticket_ends_once_and_the_cost_returns_to_zero() -> None:
    batcher = make(max_cost=1 << 30, max_delay_s=0.0)
    wakeup = batcher._wakeup
    ended: dict[Ticket, int] = {}
    lock = threading.Lock()
    tickets: list[Ticket] = []
    stopping = threading.Event()

    def settle(entry: Ticket, _: Outcome) -> None:
        with lock:
            ended[entry] = ended.get(entry, 0) + 1

    for i in range(3000):
        entry = Ticket("gradient" if i % 5 == 0 else "score", settle, NEVER)
        tickets.append(entry)
        batcher.admit(entry)

    def prepare(seed: int) -> None:
        chooser = random.Random(seed)
        for entry in chooser.sample(tickets, len(tickets)):
            if chooser.random() < 0.1:
                batcher.reject(entry, ModelError("no"))
            else:
                batcher.ready(entry, "payload")

    def leave() -> None:
        chooser = random.Random(99)
        for entry in chooser.sample(tickets, len(tickets) // 2):
            if batcher.drop(entry, "disconnect"):
                settle(entry, Output(0.0))

    def lane() -> None:
        while True:
            with wakeup:
                batch = batcher.take(8)
            if batch:
                batcher.settle(batch, [Output(0.0)] * len(batch))
            elif stopping.is_set():
                return

    worker = threading.Thread(target=lane)
    others = [threading.Thread(target=prepare, args=(seed,)) for seed in range(4)] + [threading.Thread(target=leave)]
    for thread in [worker, *others]:
        thread.start()
    for thread in others:
        thread.join()
    stopping.set()
    worker.join()
    assert batcher.cost == 0
    assert batcher.oldest() is None
    assert ended == dict.fromkeys(tickets, 1)


# -- weights -----------------------------------------------------------------------------------------------------------


@given(strategies.lists(strategies.integers(0, 12), min_size=1, max_size=12), strategies.integers(1, 20))
def test_batches_by_weight_hold_everything_once_and_no_more_than_fits(weights: list[int], full: int) -> None:
    batcher = make()
    tickets = [ticket("compare") for _ in weights]
    for entry, weight in zip(tickets, weights, strict=True):
        batcher.admit(entry)
        batcher.ready(entry, "payload", weight=weight)
    due_at_once = batcher.due_in(time.monotonic(), full) == 0.0
    assert due_at_once or sum(max(1, weight) for weight in weights) < full
    taken: list[Ticket] = []
    while batch := batcher.take(full):
        assert batch[0] is next(entry for entry in tickets if entry not in taken)  # the oldest is never passed over
        assert len(batch) == 1 or sum(entry.weight for entry in batch) <= full
        taken += batch
        batcher.settle(batch, [Output(0.0) for _ in batch])
    assert sorted(map(id, taken)) == sorted(map(id, tickets))
    assert batcher.cost == 0


def test_the_rest_of_a_tournament_does_not_wait_for_more(clock: Clock) -> None:
    """The batch before was larger, and took long; a pointwise model would wait for its clients to come again."""
    batcher = make()
    first = [ticket("compare") for _ in range(2)]
    for entry in first:
        batcher.admit(entry)
        batcher.ready(entry, "payload", weight=50)
    batch = batcher.take(100)
    clock.now += 60
    batcher.settle(batch, [Output(0.0)] * 2)
    last = ticket("compare")
    batcher.admit(last)
    batcher.ready(last, "payload", weight=10)
    assert batcher.due_in(clock.now, 100) == 0.0
