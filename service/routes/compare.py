"""POST /compare: preferences within each item. A pointwise model prefers by its calibrated score difference."""

from __future__ import annotations

import math

from fastapi import APIRouter, Request, Response
from scipy.special import expit

from models.base import Output, SampleError
from models.judge import AnswerError, Judge, Preference
from service import items, judging, wire
from service.engine.batcher import Outcome
from service.engine.request import SampleResult
from service.errors import InvalidRequest
from service.openapi import request_body
from service.routes.common import (
    WARNINGS,
    ArrivalDep,
    Service,
    ServiceDep,
    deadline_at,
    errors_of,
    ignored,
    score_of,
    timing_out,
    until_disconnect,
    used,
    warnings_of,
)
from service.schemas import (
    CompareItemIn,
    CompareRequest,
    CompareResponse,
    ComparisonOut,
    ErrorOut,
    ItemPreferences,
    NamedModelUsed,
    WarningOut,
)
from service.tournament import (
    JudgedComparison,
    Pair,
    PairError,
    all_pairs,
    compare_by_judge,
    compare_by_scores,
    validate_pairs,
)

router = APIRouter()

FORM = {
    "type": "object",
    "required": ["model", "images", "prompt"],
    "properties": {
        "model": {"type": "string"},
        "images": {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 2},
        "prompt": {"type": "string"},
        "pairs": {"type": "string", "description": "all, adaptive, or a JSON list of [i, j]"},
        "metadata": {"type": "string", "description": "JSON object"},
        "both_orders": {"type": "boolean"},
        "explain": {"type": "boolean"},
        "deadline_ms": {"type": "integer"},
    },
}


@router.post("/compare", response_model=CompareResponse, openapi_extra=request_body(CompareRequest, FORM))
async def compare(request: Request, service: ServiceDep, arrival: ArrivalDep) -> Response:
    """Preferences, win rates, Bradley-Terry strengths and a ranking for each item.

    A pointwise model scores each candidate once: every pair then follows, so ``adaptive`` asks for no fewer forwards
    than ``all``, and both orders give the same probability. A judge is asked about pairs, in both orders unless the
    request says otherwise (``adaptive`` chooses its orders itself), and about the item's reference where it has one.
    """
    limits = service.settings.limits
    async with wire.receive(request, limits, service.budget, service.engine.check_open) as incoming:
        body = incoming.parse(CompareRequest)
        items.check(body.items, limits)
        asked = [_pairs(item) for item in body.items]
        worker = service.engine.worker(body.model)
        if isinstance(worker.model, Judge):
            return await _judge(
                request, service, body, incoming, asked, deadline_at(arrival, body.deadline_ms, service.settings)
            )
        groups = items.groups(incoming, body.items, items.image_limits(limits))
        makers = [group.sample_maker(index) for group in groups for index in range(len(group.candidates))]
        deadline = deadline_at(arrival, body.deadline_ms, service.settings)
        work = service.engine.submit([body.model], makers, job="score", deadline=deadline)
        results, timing = await until_disconnect(request, work)
    found = iter(results)
    parts = [[next(found) for _ in group.candidates] for group in groups]
    answer = CompareResponse(
        results=[
            _preferences(service, body, item, part, pairs)
            for item, part, pairs in zip(body.items, parts, asked, strict=True)
        ],
        model=NamedModelUsed(name=body.model, **used(service, body.model).model_dump()),
        timing_ms=timing_out(timing),
    )
    return wire.json_response(answer)


async def _judge(
    request: Request,
    service: Service,
    body: CompareRequest,
    incoming: wire.Incoming,
    asked: list[list[Pair] | None],
    deadline: float,
) -> Response:
    limits = service.settings.limits
    groups = items.groups(incoming, body.items, items.image_limits(limits))
    plans = [_plan(item, group, pairs) for item, group, pairs in zip(body.items, groups, asked, strict=True)]
    work = judging.judge(
        service.engine, body.model, groups, plans, both_orders=body.both_orders, deadline=deadline, limits=limits
    )
    judged, timing = await until_disconnect(request, work)
    answer = CompareResponse(
        results=[_judged(service, body, item, each) for item, each in zip(body.items, judged, strict=True)],
        model=NamedModelUsed(name=body.model, **used(service, body.model, "compare").model_dump()),
        timing_ms=timing_out(timing),
    )
    return wire.json_response(answer)


def _plan(item: CompareItemIn, group: items.Group, pairs: list[Pair] | None) -> judging.Plan:
    if item.pairs == "adaptive":
        return "adaptive"
    asked = all_pairs(group.count) if pairs is None else pairs
    return [*asked, *judging.against_reference(group)]


def _judged(service: Service, body: CompareRequest, item: CompareItemIn, judged: judging.Judged) -> ItemPreferences:
    model, count = body.model, judged.group.count
    outcome = compare_by_judge(judged.inner(model), count, position=judged.adaptive)
    pairs = dict.fromkeys((min(pair), max(pair)) for pair in judged.outcomes)
    return ItemPreferences(
        probabilities=outcome.probabilities,
        win_rate=outcome.win_rate,
        strength=outcome.strength,
        strength_stderr=outcome.strength_stderr,
        ranking=outcome.ranking,
        reference=[judged.preference(i, count, model) for i in range(count)] if judged.group.has_reference else None,
        position_bias=_position_bias(judged, model) if outcome.position is None else expit(outcome.position) - 0.5,
        comparisons=[_judged_pair(judged, (i, j), body) for i, j in pairs],
        errors=[_candidate_errors(judged, index) for index in range(count)],
        warnings=[_candidate_warnings(judged, index, model, ignored(service, model, item)) for index in range(count)],
    )


def _position_bias(judged: judging.Judged, model: str) -> float | None:
    both = [
        (forwards + backwards) / 2 - 0.5
        for i, j in judged.outcomes
        if i < j
        and (forwards := judged.probability((i, j), model)) is not None
        and (backwards := judged.probability((j, i), model)) is not None
    ]
    return math.fsum(both) / len(both) if both else None


def _judged_pair(judged: judging.Judged, pair: Pair, body: CompareRequest) -> ComparisonOut:
    i, j = pair
    forwards, against = (
        judged.outcome(order, body.model) if order in judged.outcomes else None for order in ((i, j), (j, i))
    )
    outcomes = [outcome for outcome in (forwards, against) if outcome is not None]
    failures = [outcome for outcome in outcomes if isinstance(outcome, SampleError)]
    probability = judged.preference(i, j, body.model)
    backwards = judged.probability((j, i), body.model)
    return ComparisonOut(
        i=i,
        j=j,
        probability=probability,
        orders=(judged.probability((i, j), body.model), None if backwards is None else 1.0 - backwards),
        text=[text for outcome in outcomes for text in _texts(outcome)] if body.explain else None,
        parse=failures[0].code if failures else "ok",
        parse_orders=(_parse(forwards), _parse(against)),
        error=ErrorOut(model=body.model, code=failures[0].code, message=failures[0].message)
        if probability is None
        else None,
    )


def _parse(outcome: Outcome | None) -> str | None:
    """ "ok", or the code of what failed; None for an order that was not asked."""
    if outcome is None:
        return None
    return outcome.code if isinstance(outcome, SampleError) else "ok"


def _texts(outcome: Outcome) -> list[str]:
    """What the judge wrote, readable or not."""
    if isinstance(outcome, AnswerError):
        return list(outcome.texts)
    if isinstance(outcome, Preference | Output):
        return [str(text) for text in outcome.details.get("texts", ())]
    return []


def _candidate_errors(judged: judging.Judged, index: int) -> list[ErrorOut]:
    error = judged.group.unreadable(index)
    return [] if error is None else [ErrorOut(model=None, code=error.code, message=error.message)]


def _candidate_warnings(judged: judging.Judged, index: int, model: str, unused: list[str]) -> list[WarningOut]:
    codes: dict[tuple[str | None, str], None] = {(None, code): None for code in judged.group.warnings(index)}
    for pair in judged.outcomes:
        outcome = judged.outcome(pair, model)
        if index in pair and isinstance(outcome, Preference):
            codes.update({(model, code): None for code in outcome.warnings})
    codes.update({(model, code): None for code in unused})
    return [WarningOut(model=m, code=c, message=WARNINGS.get(c, c)) for m, c in codes]


def _pairs(item: CompareItemIn) -> list[Pair] | None:
    """The asked pairs, None for all; raises InvalidRequest."""
    count = len(item.all_candidates())
    if count < 2:
        raise InvalidRequest("a comparison wants at least two candidates in an item", code="too_few_candidates")
    if isinstance(item.pairs, str):
        return None
    try:
        return validate_pairs(item.pairs, count)
    except PairError as error:
        raise InvalidRequest(str(error), code=error.code) from error


def _preferences(
    service: Service, body: CompareRequest, item: CompareItemIn, results: list[SampleResult], pairs: list[Pair] | None
) -> ItemPreferences:
    model, count = body.model, len(item.all_candidates())
    everything = [score_of(result.outcomes[model]) for result in results]
    scores, reference = everything[:count], everything[count:]
    service.telemetry.observe_group(model, scores)
    temperature = service.engine.worker(model).model.info.calibration.temperature
    outcome = compare_by_scores(scores, temperature, pairs)
    against = compare_by_scores(everything, temperature, [(i, count) for i in range(count)]) if reference else None
    return ItemPreferences(
        probabilities=outcome.probabilities,
        win_rate=outcome.win_rate,
        strength=outcome.strength,
        strength_stderr=outcome.strength_stderr,
        ranking=outcome.ranking,
        reference=None if against is None else [row[count] for row in against.probabilities[:count]],
        comparisons=[
            _comparison(model, comparison, body.both_orders)
            for comparison in (*outcome.comparisons, *(() if against is None else against.comparisons))
        ],
        errors=errors_of(results[:count], [model]),
        warnings=warnings_of(service, results[:count], [model], item, compared=True),
    )


def _comparison(model: str, comparison: JudgedComparison, both_orders: bool) -> ComparisonOut:
    error = None
    if comparison.probability is None:
        error = ErrorOut(model=model, code=comparison.code or "failed", message="a candidate of this pair has no score")
    parse = "ok" if error is None else error.code
    return ComparisonOut(
        i=comparison.first,
        j=comparison.second,
        probability=comparison.probability,
        orders=(comparison.probability, comparison.probability if both_orders else None),
        parse=parse,
        parse_orders=(parse, parse if both_orders else None),
        error=error,
    )
