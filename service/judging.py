"""Judges asked about items: which comparisons, in which orders, in waves that the queue admits; scores from them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from models.base import ModelError, SampleError
from models.judge import Preference
from service.adaptive import Adaptive, default_budget
from service.engine.batcher import Outcome
from service.engine.engine import Engine
from service.engine.request import SampleResult, Timing
from service.errors import DeadlineExceeded, InvalidRequest, Overloaded
from service.items import Group
from service.settings import LimitSettings
from service.tournament import JudgedComparison, Pair, preference_from_orders

Plan = list[Pair] | Literal["adaptive"]
"""Unordered pairs to ask, or that the pairs follow from the answers."""
WAVE_SHARE = 2
"""A wave takes at most one part in this many of the queue: two requests can be in it at once."""
POLL_S = 0.01
"""How often a wave that found no room looks again."""


@dataclass(eq=False)
class Judged:
    """What is known of one item: an outcome for each ordered comparison, and which were chosen by ``adaptive``."""

    group: Group
    outcomes: dict[Pair, SampleResult] = field(default_factory=dict)
    adaptive: bool = False

    def outcome(self, pair: Pair, model: str) -> Outcome:
        """The preference, or why there is none."""
        result = self.outcomes[pair]
        return result.unreadable if result.unreadable is not None else result.outcomes[model]

    def probability(self, pair: Pair, model: str) -> float | None:
        """P(first preferred) of an ordered comparison that was answered."""
        outcome = self.outcome(pair, model) if pair in self.outcomes else None
        return outcome.probability if isinstance(outcome, Preference) else None

    def preference(self, i: int, j: int, model: str) -> float | None:
        """P(i preferred to j) from the orders that were answered; None where none was."""
        forwards, backwards = self.probability((i, j), model), self.probability((j, i), model)
        if forwards is not None and backwards is not None:
            return preference_from_orders(forwards, backwards)
        if backwards is not None:
            return 1.0 - backwards
        return forwards

    def inner(self, model: str) -> list[JudgedComparison]:
        """All that were asked among the candidates, the reference left out, in the order of asking."""
        return [_judged(pair, self.outcome(pair, model)) for pair in self.outcomes if max(pair) < self.group.count]


def _judged(pair: Pair, outcome: Outcome) -> JudgedComparison:
    if isinstance(outcome, Preference):
        return JudgedComparison(*pair, outcome.probability)
    code = outcome.code if isinstance(outcome, SampleError) else "model_error"
    return JudgedComparison(*pair, None, code)


async def judge(
    engine: Engine,
    model: str,
    groups: Sequence[Group],
    plans: Sequence[Plan],
    *,
    both_orders: bool,
    deadline: float,
    limits: LimitSettings,
) -> tuple[list[Judged], Timing]:
    """Ask all comparisons of ``plans``; those of one first candidate follow each other, so that they share it.

    ``adaptive`` plans are asked in rounds, each from the answers so far, and choose their own orders. Raises
    InvalidRequest ("too_many_comparisons"), and what :meth:`Engine.submit` raises for the first wave; a comparison that
    is not finished at the deadline has an error with that code.
    """
    judged = [Judged(group, adaptive=plan == "adaptive") for group, plan in zip(groups, plans, strict=True)]
    fixed = [
        _ordered(against_reference(group) if plan == "adaptive" else plan, both_orders)
        for group, plan in zip(groups, plans, strict=True)
    ]
    budget = sum(default_budget(each.group.count) for each in judged if each.adaptive)
    check_comparisons(sum(map(len, fixed)) + budget, limits)
    asking = _Asking(engine, model, deadline)
    schedules = [Adaptive(each.group.count) if each.adaptive else None for each in judged]
    pairs = fixed
    while not asking.late:
        rounds = [
            [] if schedule is None else await asyncio.to_thread(schedule.next_pairs, each.inner(model))
            for each, schedule in zip(judged, schedules, strict=True)
        ]
        pairs = [[*first, *more] for first, more in zip(pairs, rounds, strict=True)]
        if not any(pairs):
            break
        await asking.ask(judged, pairs)
        pairs = [[] for _ in judged]
    return judged, asking.timing


def check_comparisons(count: int, limits: LimitSettings) -> None:
    """Raise InvalidRequest ("too_many_comparisons") for more than a request may ask for."""
    if count > limits.comparisons_per_request:
        raise InvalidRequest(
            f"a request asks for at most {limits.comparisons_per_request} comparisons, not {count}: fewer items, fewer "
            "pairs, or adaptive ones",
            code="too_many_comparisons",
        )


def against_reference(group: Group) -> list[Pair]:
    """Each candidate with the item's reference, where it has one."""
    return [(index, group.count) for index in range(group.count)] if group.has_reference else []


def _ordered(pairs: Sequence[Pair], both_orders: bool) -> list[Pair]:
    """Ordered comparisons, sorted by what is shown first."""
    asked = [*pairs, *((j, i) for i, j in pairs)] if both_orders else list(pairs)
    return sorted(asked)


class _Asking:
    """One request's comparisons: waves of them, as the queue admits them."""

    def __init__(self, engine: Engine, model: str, deadline: float) -> None:
        self._engine, self._model, self._deadline = engine, model, deadline
        self._wave = max(1, engine.worker(model).batcher.max_cost // WAVE_SHARE)
        self._admitted = False
        self._batcher = engine.worker(model).batcher
        self.late = False
        """Whether something was not finished at the deadline: nothing more is worth asking."""
        self.timing = Timing(0.0, 0.0, 0.0)

    async def ask(self, judged: Sequence[Judged], pairs: Sequence[Sequence[Pair]]) -> None:
        """Ask and note the outcomes."""
        questions = [(each, pair) for each, asked in zip(judged, pairs, strict=True) for pair in asked]
        for start in range(0, len(questions), self._wave):
            wave = questions[start : start + self._wave]
            for (each, pair), result in zip(wave, await self._submit(wave), strict=True):
                each.outcomes[pair] = result

    async def _submit(self, wave: Sequence[tuple[Judged, Pair]]) -> list[SampleResult]:
        """The first wave is admitted or turned away at once; later ones wait for room."""
        while self._admitted and not self._batcher.fits(len(wave)) and time.monotonic() < self._deadline:
            await asyncio.sleep(POLL_S)
        makers = [each.group.maker(*pair) for each, pair in wave]
        try:
            results, timing = await self._engine.submit([self._model], makers, job="compare", deadline=self._deadline)
        except (DeadlineExceeded, Overloaded):
            if not self._admitted:
                raise
            self.late = True
            return self._late(len(wave))
        self._admitted = True
        self.late = any(_is_late(result.outcomes[self._model]) for result in results)
        old = self.timing
        self.timing = Timing(max(old.decode, timing.decode), max(old.queue, timing.queue), old.forward + timing.forward)
        return results

    def _late(self, count: int) -> list[SampleResult]:
        late = ModelError("not finished at the deadline", code="deadline")
        return [SampleResult({self._model: late}) for _ in range(count)]


def _is_late(outcome: Outcome) -> bool:
    return isinstance(outcome, SampleError) and outcome.code == "deadline"
