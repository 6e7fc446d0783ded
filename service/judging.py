"""Judges asked about items: which comparisons, in which orders, in waves that the queue admits; scores from them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from models.base import InputError, ModelError, Output, SampleError
from models.judge import Preference
from service.engine.batcher import Outcome
from service.engine.engine import Engine
from service.engine.request import SampleResult, Timing
from service.errors import DeadlineExceeded, InvalidRequest, Overloaded
from service.items import Group
from service.settings import LimitSettings
from service.tournament import JudgedComparison, Pair, all_pairs, preference_from_orders

Plan = list[Pair] | Literal["adaptive"]
"""Unordered pairs to ask, or that the pairs follow from the answers."""
WAVE_SHARE = 2
"""A wave takes at most one part in this many of the queue: two requests can be in it at once."""
LONGEST_PAUSE_S = 1.0


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

    def comparisons(self, model: str) -> list[JudgedComparison]:
        """All that were asked, in the order of asking."""
        return [_judged(pair, self.outcome(pair, model)) for pair in self.outcomes]


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
    fixed = [[] if plan == "adaptive" else _ordered(plan, both_orders) for plan in plans]
    if sum(map(len, fixed)) > limits.comparisons_per_request:
        raise InvalidRequest(
            f"a request asks for at most {limits.comparisons_per_request} comparisons, not {sum(map(len, fixed))}",
            code="too_many_comparisons",
        )
    asking = _Asking(engine, model, deadline)
    await asking.ask(judged, fixed)
    if not any(each.adaptive for each in judged):
        return judged, asking.timing
    from service.adaptive import Adaptive

    schedules = [Adaptive(each.group.count) if each.adaptive else None for each in judged]
    while True:
        pairs = [
            [] if schedule is None else schedule.next_pairs(each.comparisons(model))
            for each, schedule in zip(judged, schedules, strict=True)
        ]
        if not any(pairs):
            return judged, asking.timing
        await asking.ask(judged, pairs)


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
        self.timing = Timing(0.0, 0.0, 0.0)

    async def ask(self, judged: Sequence[Judged], pairs: Sequence[Sequence[Pair]]) -> None:
        """Ask and note the outcomes."""
        questions = [(each, pair) for each, asked in zip(judged, pairs, strict=True) for pair in asked]
        for start in range(0, len(questions), self._wave):
            wave = questions[start : start + self._wave]
            for (each, pair), result in zip(wave, await self._submit(wave), strict=True):
                each.outcomes[pair] = result

    async def _submit(self, wave: Sequence[tuple[Judged, Pair]]) -> list[SampleResult]:
        makers = [each.group.maker(*pair) for each, pair in wave]
        while True:
            try:
                results, timing = await self._engine.submit(
                    [self._model], makers, job="compare", deadline=self._deadline
                )
            except Overloaded as error:
                # What was begun is finished: only the first wave is turned away.
                pause = min(LONGEST_PAUSE_S, error.retry_after_s or LONGEST_PAUSE_S)
                if not self._admitted or time.monotonic() + pause >= self._deadline:
                    if not self._admitted:
                        raise
                    return self._late(len(wave))
                await asyncio.sleep(pause)
            except DeadlineExceeded:
                if not self._admitted:
                    raise
                return self._late(len(wave))
            else:
                self._admitted = True
                old = self.timing
                self.timing = Timing(
                    max(old.decode, timing.decode), max(old.queue, timing.queue), old.forward + timing.forward
                )
                return results

    def _late(self, count: int) -> list[SampleResult]:
        late = ModelError("not finished at the deadline", code="deadline")
        return [SampleResult({self._model: late}) for _ in range(count)]


# ------------------------------------------------------------------------------------------------------------- scores


async def score_all(
    engine: Engine,
    models: Sequence[str],
    comparing: Sequence[str],
    groups: Sequence[Group],
    *,
    deadline: float,
    limits: LimitSettings,
) -> tuple[list[SampleResult], Timing]:
    """Scores of all candidates of all items by ``models``, of which ``comparing`` score by comparisons.

    The same form as :meth:`Engine.submit`. When one model is refused, the work of the others is dropped.
    """
    plain = [model for model in models if model not in comparing]
    count = sum(group.count for group in groups)
    tasks: list[asyncio.Task[tuple[list[SampleResult], Timing]]] = []
    try:
        if plain:
            makers = [group.sample_maker(index) for group in groups for index in range(group.count)]
            tasks.append(asyncio.create_task(engine.submit(plain, makers, job="score", deadline=deadline)))
        tasks += [
            asyncio.create_task(_as_samples(engine, model, groups, deadline=deadline, limits=limits))
            for model in comparing
        ]
        parts = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    merged = [SampleResult() for _ in range(count)]
    for results, _ in parts:
        for whole, part in zip(merged, results, strict=True):
            whole.outcomes |= part.outcomes
            whole.unreadable = whole.unreadable or part.unreadable
            whole.warnings = tuple(dict.fromkeys(whole.warnings + part.warnings))
    timings = [timing for _, timing in parts]
    return merged, Timing(*(max(getattr(t, name) for t in timings) for name in ("decode", "queue", "forward")))


async def _as_samples(
    engine: Engine, model: str, groups: Sequence[Group], *, deadline: float, limits: LimitSettings
) -> tuple[list[SampleResult], Timing]:
    scores, timing = await score(engine, model, groups, deadline=deadline, limits=limits)
    return [
        SampleResult({model: outcome}, unreadable=group.unreadable(index))
        for group, outcomes in zip(groups, scores, strict=True)
        for index, outcome in enumerate(outcomes)
    ], timing


async def score(
    engine: Engine, model: str, groups: Sequence[Group], *, deadline: float, limits: LimitSettings
) -> tuple[list[list[Outcome]], Timing]:
    """A score for each candidate of each item from comparisons: against the item's reference, else as the setting
    ``models.NAME.reference`` says: the win rate in the group, or against one of the group.

    A score is a probability of being preferred, in [0, 1]; the reference of a group itself has 0.5.
    """
    settings = engine.settings.models[model]
    chosen, first = await _references(engine, model, groups, deadline=deadline, limits=limits)
    plans: list[Plan] = [_plan(group, reference) for group, reference in zip(groups, chosen, strict=True)]
    judged, timing = await judge(
        engine, model, groups, plans, both_orders=settings.both_orders, deadline=deadline, limits=limits
    )
    scores = [
        [_score(each, index, reference, model) for index in range(each.group.count)]
        for each, reference in zip(judged, chosen, strict=True)
    ]
    total = Timing(max(first.decode, timing.decode), max(first.queue, timing.queue), first.forward + timing.forward)
    return scores, total


def _plan(group: Group, reference: int | None) -> list[Pair]:
    if reference is not None:
        return [(index, reference) for index in range(group.count) if index != reference]
    return all_pairs(group.count) if group.count > 1 else []


async def _references(
    engine: Engine, model: str, groups: Sequence[Group], *, deadline: float, limits: LimitSettings
) -> tuple[list[int | None], Timing]:
    """What the candidates of each item are compared with: an index, or None for the whole group."""
    how = engine.settings.models[model].reference
    none = Timing(0.0, 0.0, 0.0)
    chosen: list[int | None] = [group.count if group.has_reference else None for group in groups]
    open_ = [place for place, group in enumerate(groups) if chosen[place] is None and group.count > 1]
    if how == "group" or not open_:
        return chosen, none
    if how == "first":
        return [0 if place in open_ else reference for place, reference in enumerate(chosen)], none
    asked = [groups[place] for place in open_]
    if how.startswith("best-of-"):
        best, timing = await _winners(engine, model, asked, int(how.removeprefix("best-of-")), deadline, limits)
    else:
        best, timing = await _best_scored(engine, how.removeprefix("best:"), asked, deadline)
    for place, index in zip(open_, best, strict=True):
        chosen[place] = index
    return chosen, timing


async def _winners(
    engine: Engine, model: str, groups: Sequence[Group], most: int, deadline: float, limits: LimitSettings
) -> tuple[list[int], Timing]:
    """The candidate with the most wins among the first ``most`` of each group, all pairs in both orders."""
    counts = [min(most, group.count) for group in groups]
    plans: list[Plan] = [all_pairs(count) for count in counts]
    judged, timing = await judge(engine, model, groups, plans, both_orders=True, deadline=deadline, limits=limits)
    winners = []
    for each, count in zip(judged, counts, strict=True):
        wins = [sum((each.preference(i, j, model) or 0.0) > 0.5 for j in range(count) if j != i) for i in range(count)]
        winners.append(max(range(count), key=lambda i, wins=wins: wins[i]))  # type: ignore[misc]
    return winners, timing


async def _best_scored(
    engine: Engine, scorer: str, groups: Sequence[Group], deadline: float
) -> tuple[list[int], Timing]:
    """The candidate with the highest score of another model; InvalidRequest where no candidate of a group has one."""
    makers = [group.sample_maker(index) for group in groups for index in range(group.count)]
    results, timing = await engine.submit([scorer], makers, job="score", deadline=deadline)
    found = iter(results)
    best = []
    for group in groups:
        outcomes = [next(found).outcomes.get(scorer) for _ in range(group.count)]
        known = {i: o.score for i, o in enumerate(outcomes) if isinstance(o, Output)}
        if not known:
            raise InvalidRequest(
                f"no candidate has a score by {scorer}, which chooses the reference", code="reference_missing"
            )
        best.append(max(known, key=lambda i, known=known: known[i]))  # type: ignore[misc]
    return best, timing


def _score(judged: Judged, index: int, reference: int | None, model: str) -> Outcome:
    group = judged.group
    unreadable = group.unreadable(index)
    if unreadable is not None:
        return unreadable
    if index == reference:
        return Output(0.5, details={"reference": True})
    if group.count < 2 and reference is None:
        return InputError(
            f"{model} compares: an item has a reference or at least two candidates", code="too_few_candidates"
        )
    opponents = [reference] if reference is not None else [j for j in range(group.count) if j != index]
    preferences = [judged.preference(index, j, model) for j in opponents]
    known = [preference for preference in preferences if preference is not None]
    if not known:
        return _why(judged, index, opponents, model)
    return Output(
        math.fsum(known) / len(known),
        outputs={"comparisons": float(len(known))},
        details={"comparisons": _told(judged, index, opponents, model)},
        warnings=("comparisons_failed",) if len(known) < len(preferences) else (),
    )


def _why(judged: Judged, index: int, opponents: Sequence[int], model: str) -> SampleError:
    """The error of the first of a candidate's comparisons, all of which failed."""
    for j in opponents:
        for pair in ((index, j), (j, index)):
            outcome = judged.outcome(pair, model) if pair in judged.outcomes else None
            if isinstance(outcome, SampleError):
                return outcome
    return ModelError("no comparison of this candidate was answered", code="no_comparison")


def _told(judged: Judged, index: int, opponents: Sequence[int], model: str) -> list[Mapping[str, object]]:
    """Each comparison of a candidate, for those who ask why."""
    told: list[Mapping[str, object]] = []
    for j in opponents:
        for pair in ((index, j), (j, index)):
            outcome = judged.outcome(pair, model) if pair in judged.outcomes else None
            if isinstance(outcome, Preference):
                told.append(
                    {"first": pair[0], "second": pair[1], "probability": outcome.probability, **outcome.details}
                )
    return told
