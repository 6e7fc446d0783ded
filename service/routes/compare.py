"""POST /compare: preferences within each item. A pointwise model prefers by its calibrated score difference."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service import items, wire
from service.engine.request import SampleResult
from service.errors import InvalidRequest
from service.openapi import request_body
from service.routes.common import (
    ArrivalDep,
    Service,
    ServiceDep,
    deadline_at,
    errors_of,
    score_of,
    split,
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
)
from service.tournament import JudgedComparison, Pair, PairError, compare_by_scores, validate_pairs

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
    than ``all``, and both orders give the same probability.
    """
    limits = service.settings.limits
    async with wire.receive(request, limits, service.budget, service.engine.check_open) as incoming:
        body = incoming.parse(CompareRequest)
        items.check(body.items, limits)
        asked = [_pairs(item) for item in body.items]
        worker = service.engine.worker(body.model)
        with_context = "context" in worker.model.info.inputs
        makers = items.makers(incoming, body.items, items.image_limits(limits), with_context=with_context)
        deadline = deadline_at(arrival, body.deadline_ms, service.settings)
        work = service.engine.submit([body.model], makers, job="score", deadline=deadline)
        results, timing = await until_disconnect(request, work)
    parts = split(body.items, results)
    answer = CompareResponse(
        results=[
            _preferences(service, body, item, part, pairs) for (item, part), pairs in zip(parts, asked, strict=True)
        ],
        model=NamedModelUsed(name=body.model, **used(service, body.model).model_dump()),
        timing_ms=timing_out(timing),
    )
    return wire.json_response(answer)


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
    model = body.model
    scores = [score_of(result.outcomes[model]) for result in results]
    service.telemetry.observe_group(model, scores)
    temperature = service.engine.worker(model).model.info.calibration.temperature
    outcome = compare_by_scores(scores, temperature, pairs)
    return ItemPreferences(
        probabilities=outcome.probabilities,
        win_rate=outcome.win_rate,
        strength=outcome.strength,
        strength_stderr=outcome.strength_stderr,
        ranking=outcome.ranking,
        comparisons=[_comparison(model, comparison, body.both_orders) for comparison in outcome.comparisons],
        errors=errors_of(results, [model]),
        warnings=warnings_of(service, results, [model], item),
    )


def _comparison(model: str, comparison: JudgedComparison, both_orders: bool) -> ComparisonOut:
    error = None
    if comparison.probability is None:
        error = ErrorOut(model=model, code=comparison.code or "failed", message="a candidate of this pair has no score")
    return ComparisonOut(
        i=comparison.first,
        j=comparison.second,
        probability=comparison.probability,
        orders=(comparison.probability, comparison.probability if both_orders else None),
        parse="ok" if error is None else error.code,
        error=error,
    )
