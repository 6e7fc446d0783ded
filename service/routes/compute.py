"""POST /compute and GET /health: the form that Flow-Factory's remote reward client speaks.

The body has a prompt and an image per sample, the answer a number per sample: no names of models, no weights, no null.
Models and weights are therefore settings (``compute``), and a sample without a score refuses the whole request, or is
null where the settings say so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field, JsonValue, TypeAdapter, ValidationError

from models.base import InputError
from service import errors, items, wire
from service.engine.request import SampleResult
from service.errors import DeadlineExceeded, InvalidRequest, ServiceError, UnsupportedMediaType
from service.routes import health
from service.routes.common import (
    ArrivalDep,
    Service,
    ServiceDep,
    authorize,
    deadline_at,
    errors_of,
    score_of,
    scores_of,
    split,
    total_of,
    until_disconnect,
)
from service.schemas import ImageData, ItemIn, Problem, Schema
from service.settings import LimitSettings

router = APIRouter()
log = logging.getLogger(__name__)

SHOWN_FAILURES = 20
"""As many failures a problem document names; ``failed_samples`` counts them all."""
_OBJECT = TypeAdapter(dict[str, JsonValue])
_JSON: TypeAdapter[JsonValue] = TypeAdapter(JsonValue)


class ComputeRequest(Schema):
    """One prompt and one image a sample. The null fields are there because the client always sends them."""

    prompt: list[str] = Field(min_length=1)
    image: list[ImageData] | None = Field(None, description="as many as prompts")
    video: Any = Field(None, description="null: POST /score takes frames")
    condition_images: Any = Field(None, description="null: POST /score takes a context")
    condition_videos: Any = Field(None, description="null: POST /score takes a context")
    kwargs: dict[str, Any] | None = Field(
        None, description="metadata: a list with a JSON object, or the text of one, or null per sample"
    )


class ComputeResponse(Schema):
    """The reward of each sample, in order; null for one without a score where the settings allow it."""

    rewards: list[float | None]


@router.get("/health")
async def ready(service: ServiceDep) -> dict[str, dict[str, bool] | str]:
    """GET /health/ready under the name that the client asks for; it needs no key."""
    return await health.ready(service)


@router.post(
    "/compute",
    response_model=ComputeResponse,
    dependencies=[Depends(authorize)],
    responses={500: {"model": Problem, "content": {errors.PROBLEM_JSON: {}}}},
    openapi_extra={
        "requestBody": {"required": True, "content": {wire.JSON: {"schema": ComputeRequest.model_json_schema()}}}
    },
)
async def compute(request: Request, service: ServiceDep, arrival: ArrivalDep) -> Response:
    """Rewards by the models of the setting ``compute``. A sample that failed is never a number."""
    limits = service.settings.limits
    async with wire.receive(request, limits, service.budget, service.engine.check_open) as incoming:
        if incoming.content_type != wire.JSON:
            raise UnsupportedMediaType(f"Content-Type must be {wire.JSON}")
        weights = configured(service)
        groups = group(incoming.parse(ComputeRequest), limits)
        asked = [item for item, _ in groups]
        items.check(asked, limits)
        work = scores_of(service, list(weights), incoming, asked, deadline_at(arrival, None, service.settings))
        results, _ = await until_disconnect(request, work)
    for _, part in split(asked, results):
        for model in weights:
            service.telemetry.observe_group(model, [score_of(result.outcomes[model]) for result in part])
    order = [place for _, places in groups for place in places]
    ordered = [result for _, result in sorted(zip(order, results, strict=True), key=lambda pair: pair[0])]
    if not service.settings.compute.null_rewards:
        refuse_failures(ordered, list(weights))
    return wire.json_response(ComputeResponse(rewards=[total_of(result, weights) for result in ordered]))


def configured(service: Service) -> dict[str, float]:
    """Weights by model; raises InvalidRequest where the settings leave the choice open."""
    weights = service.settings.compute.models
    loaded = list(service.engine.workers)
    if not weights and len(loaded) == 1:
        return {loaded[0]: 1.0}
    if not weights:
        raise InvalidRequest(
            f"{len(loaded)} reward models are loaded; the setting compute.models says which answer /compute",
            code="compute_not_configured",
        )
    return weights


def group(asked: ComputeRequest, limits: LimitSettings) -> list[tuple[ItemIn, list[int]]]:
    """Items, which are samples of equal prompt and metadata, each with the places of its samples in the request.

    Raises InvalidRequest for what the route does not take.
    """
    for name in ("video", "condition_images", "condition_videos"):
        if getattr(asked, name) is not None:
            raise InvalidRequest(f"/compute scores images without {name}; POST /score has them", code="unknown_field")
    images = asked.image or []
    if len(images) != len(asked.prompt):
        raise InvalidRequest(f"{len(asked.prompt)} prompts and {len(images)} images", code="length_mismatch")
    rows = _metadata(asked.kwargs or {}, len(images), limits)
    groups: dict[str, list[int]] = {}
    for place, (prompt, metadata) in enumerate(zip(asked.prompt, rows, strict=True)):
        groups.setdefault(json.dumps([prompt, metadata], sort_keys=True), []).append(place)
    return [
        (ItemIn(prompt=asked.prompt[p[0]], images=[images[place] for place in p], metadata=rows[p[0]]), p)
        for p in groups.values()
    ]


def _metadata(kwargs: dict[str, Any], count: int, limits: LimitSettings) -> list[dict[str, JsonValue]]:
    if unknown := sorted(set(kwargs) - {"metadata"}):
        raise InvalidRequest(
            "of kwargs only metadata is known", code="unknown_field", fields=[name[:64] for name in unknown[:8]]
        )
    column = kwargs.get("metadata")
    if column is None:
        return [{} for _ in range(count)]
    if not isinstance(column, list) or len(column) != count:
        raise InvalidRequest(f"kwargs.metadata is a list of {count} entries, one a sample", code="length_mismatch")
    return [_row(entry, place, limits) for place, entry in enumerate(column)]


def _row(entry: Any, place: int, limits: LimitSettings) -> dict[str, JsonValue]:
    """One sample's metadata. Datasets keep it as text, and lists and objects inside it as text again."""
    if isinstance(entry, str) and len(entry) > limits.metadata_bytes:
        raise InvalidRequest(f"metadata is over {limits.metadata_bytes} bytes", code="metadata_too_large")
    try:
        row = _OBJECT.validate_json(entry) if isinstance(entry, str) else _OBJECT.validate_python(entry or {})
    except ValidationError as error:
        raise InvalidRequest(f"kwargs.metadata[{place}] is no JSON object", code="invalid_metadata") from error
    return {name: _unpacked(value) for name, value in row.items()}


def _unpacked(value: JsonValue) -> JsonValue:
    if not isinstance(value, str) or value[:1] not in ("[", "{"):
        return value
    try:
        return _JSON.validate_json(value)
    except ValidationError:
        return value  # words that begin with a bracket


def refuse_failures(results: Sequence[SampleResult], models: Sequence[str]) -> None:
    """Raise a problem that names the samples without a score: 422 if an input is at fault, 504 if all were too late."""
    rows = errors_of(results, models)
    failures = [(place, error) for place, row in enumerate(rows) for error in row]
    if not failures:
        return
    place, first = failures[0]
    failed = sum(1 for row in rows if row)
    detail = f"sample {place}, {first.model or 'every model'}: {first.code}: {first.message}"
    detail += f"; {failed} of {len(rows)} samples have no score"
    shown = [{"sample": place, **error.model_dump()} for place, error in failures[:SHOWN_FAILURES]]
    # The client that speaks this form shows its user the status alone.
    log.warning("refused: samples without a score", extra={"failed_samples": failed, "first_failure": shown[0]})
    kind: type[ServiceError] = ServiceError
    if any(_is_input(result, models) for result in results):
        kind = InvalidRequest
    elif all(error.code == "deadline" for _, error in failures):
        kind = DeadlineExceeded
    raise kind(detail, code="sample_failed", failed_samples=failed, failures=shown)


def _is_input(result: SampleResult, models: Sequence[str]) -> bool:
    outcomes: list[Any] = [result.unreadable, *(result.outcomes[model] for model in models)]
    return any(isinstance(outcome, InputError) for outcome in outcomes)
