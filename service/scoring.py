"""Scores by comparisons: a judge as a reward for each candidate, beside models that score each alone."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence

from models.base import InputError, ModelError, Output, SampleError
from models.judge import AnswerError, Preference
from service.engine.batcher import Outcome
from service.engine.engine import Engine
from service.engine.request import SampleResult, Timing
from service.errors import InvalidRequest
from service.items import Group
from service.judging import Judged, Plan, judge
from service.settings import LimitSettings
from service.tournament import Pair, all_pairs


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
        await asyncio.gather(*tasks, return_exceptions=True)
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
        SampleResult({model: outcome}, group.unreadable(index), group.warnings(index))
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
    known: dict[Group, Judged] = {}
    chosen, first = await _references(engine, model, groups, known, deadline=deadline, limits=limits)
    plans: list[Plan] = [
        [pair for pair in _plan(group, reference) if group not in known or pair not in known[group].outcomes]
        for group, reference in zip(groups, chosen, strict=True)
    ]
    judged, timing = await judge(
        engine, model, groups, plans, both_orders=settings.both_orders, deadline=deadline, limits=limits
    )
    for each in judged:
        each.outcomes |= known[each.group].outcomes if each.group in known else {}
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
    engine: Engine,
    model: str,
    groups: Sequence[Group],
    known: dict[Group, Judged],
    *,
    deadline: float,
    limits: LimitSettings,
) -> tuple[list[int | None], Timing]:
    """What the candidates of each item are compared with: an index, or None for the whole group.

    ``known`` is given what was judged in choosing.
    """
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
        most = int(how.removeprefix("best-of-"))
        best, timing = await _winners(engine, model, asked, most, known, deadline=deadline, limits=limits)
    else:
        best, timing = await _best_scored(engine, how.removeprefix("best:"), asked, deadline)
    for place, index in zip(open_, best, strict=True):
        chosen[place] = index
    return chosen, timing


async def _winners(
    engine: Engine,
    model: str,
    groups: Sequence[Group],
    most: int,
    known: dict[Group, Judged],
    *,
    deadline: float,
    limits: LimitSettings,
) -> tuple[list[int], Timing]:
    """The candidate with the most wins among the first ``most`` of each group, of which all pairs are judged."""
    counts = [min(most, group.count) for group in groups]
    plans: list[Plan] = [all_pairs(count) for count in counts]
    both_orders = engine.settings.models[model].both_orders
    judged, timing = await judge(
        engine, model, groups, plans, both_orders=both_orders, deadline=deadline, limits=limits
    )
    if both_orders:  # else what was asked in the other order would carry the judge's bias the other way
        known.update({each.group: each for each in judged})
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
        return Output(0.5, warnings=("is_reference",))
    if group.count < 2 and reference is None:
        return InputError(
            f"{model} compares: an item has a reference or at least two candidates", code="too_few_candidates"
        )
    opponents = [reference] if reference is not None else [j for j in range(group.count) if j != index]
    preferences = [judged.preference(index, j, model) for j in opponents]
    known = [preference for preference in preferences if preference is not None]
    if not known:
        return _why(judged, index, opponents, model)
    outcomes = [outcome for _, outcome in _outcomes(judged, index, opponents, model)]
    answers = [outcome for outcome in outcomes if isinstance(outcome, Preference)]
    warnings = dict.fromkeys(warning for answer in answers for warning in answer.warnings)
    failed = ("comparisons_failed",) if len(answers) < len(outcomes) else ()
    return Output(
        math.fsum(known) / len(known),
        outputs={"comparisons": float(len(answers))},
        details={"comparisons": _told(judged, index, opponents, model)},
        warnings=(*warnings, *failed),
    )


def _outcomes(judged: Judged, index: int, opponents: Sequence[int], model: str) -> list[tuple[Pair, Outcome]]:
    """A candidate's comparisons with the opponents, in both orders where both were asked."""
    pairs = [pair for j in opponents for pair in ((index, j), (j, index)) if pair in judged.outcomes]
    return [(pair, judged.outcome(pair, model)) for pair in pairs]


def _why(judged: Judged, index: int, opponents: Sequence[int], model: str) -> SampleError:
    """The error of the first of a candidate's comparisons, all of which failed."""
    unreadable = [error for j in opponents if (error := judged.group.unreadable(j)) is not None]
    for _, outcome in _outcomes(judged, index, opponents, model):
        if isinstance(outcome, SampleError) and not any(outcome is error for error in unreadable):
            return outcome
    if unreadable:
        return InputError(
            f"what it is to be compared with cannot be read: {unreadable[0].message}", code="opponent_unreadable"
        )
    return ModelError("no comparison of this candidate was answered", code="no_comparison")


def _told(judged: Judged, index: int, opponents: Sequence[int], model: str) -> list[Mapping[str, object]]:
    """Each comparison of a candidate, for those who ask why."""
    count = judged.group.count
    told: list[Mapping[str, object]] = []
    for pair, outcome in _outcomes(judged, index, opponents, model):
        first, second = ("reference" if place == count else place for place in pair)
        entry: dict[str, object] = {"first": first, "second": second}
        if isinstance(outcome, Preference):
            entry |= {"probability": outcome.probability, **outcome.details}
        elif isinstance(outcome, SampleError):
            entry |= {"error": outcome.code}
        if isinstance(outcome, AnswerError):
            entry |= {"texts": list(outcome.texts)}
        told.append(entry)
    return told
