"""POST /score: every candidate of every item, by every model asked for."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from models.base import Output
from service import items, wire
from service.engine.request import SampleResult
from service.openapi import request_body
from service.routes.common import (
    ArrivalDep,
    Service,
    ServiceDep,
    deadline_at,
    errors_of,
    score_of,
    scores_of,
    split,
    timing_out,
    total_of,
    until_disconnect,
    used,
    warnings_of,
)
from service.schemas import ItemIn, ItemScores, ScoreRequest, ScoreResponse

router = APIRouter()

FORM = {
    "type": "object",
    "required": ["model", "images", "prompt"],
    "properties": {
        "model": {"type": "array", "items": {"type": "string"}, "description": "name or name=weight; may repeat"},
        "images": {"type": "array", "items": {"type": "string", "format": "binary"}},
        "prompt": {"type": "string"},
        "metadata": {"type": "string", "description": "JSON object"},
        "deadline_ms": {"type": "integer"},
        "explain": {"type": "boolean"},
    },
}


@router.post("/score", response_model=ScoreResponse, openapi_extra=request_body(ScoreRequest, FORM))
async def score(request: Request, service: ServiceDep, arrival: ArrivalDep) -> Response:
    """Score candidates. A sample that failed is null and has a typed error; the others keep their scores."""
    limits = service.settings.limits
    async with wire.receive(request, limits, service.budget, service.engine.check_open) as incoming:
        body = incoming.parse(ScoreRequest)
        items.check(body.items, limits)
        models = list(body.models)
        deadline = deadline_at(arrival, body.deadline_ms, service.settings)
        work = scores_of(service, models, incoming, body.items, deadline)
        results, timing = await until_disconnect(request, work)
    return wire.json_response(
        ScoreResponse(
            results=[item_scores(service, body, item, part) for item, part in split(body.items, results)],
            models={model: used(service, model) for model in models},
            timing_ms=timing_out(timing),
        )
    )


def item_scores(service: Service, body: ScoreRequest, item: ItemIn, results: list[SampleResult]) -> ItemScores:
    models = list(body.models)
    outcomes = {model: [result.outcomes[model] for result in results] for model in models}
    scores = {model: [score_of(outcome) for outcome in outcomes[model]] for model in models}
    for model in models:
        service.telemetry.observe_group(model, scores[model])
    return ItemScores(
        scores=scores,
        total=[total_of(result, body.models) for result in results],
        outputs={m: [dict(o.outputs) if isinstance(o, Output) else None for o in outcomes[m]] for m in models},
        details={m: [dict(o.details) if isinstance(o, Output) else None for o in outcomes[m]] for m in models}
        if body.explain
        else None,
        errors=errors_of(results, models),
        warnings=warnings_of(service, results, models, item),
    )
