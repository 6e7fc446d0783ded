"""POST /gradient: d(total)/d(image) of differentiable models, stateless, safetensors in and out."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray

from models.base import Candidate, Context
from models.judge import Judge
from service import items, tensors, wire
from service.engine.batcher import GradientResult
from service.engine.request import Made, Maker, SampleResult
from service.engine.worker import TensorSample
from service.errors import InvalidRequest, UnsupportedMediaType
from service.images import ImageLimits, checked_pixels
from service.openapi import request_body
from service.routes.common import (
    ArrivalDep,
    ServiceDep,
    deadline_at,
    errors_of,
    score_of,
    split,
    timing_out,
    total_of,
    until_disconnect,
    used,
    warnings_of,
)
from service.schemas import GradientRequest, GradientResponse, ItemGradients, ItemIn
from service.wire import SAFETENSORS, Incoming

router = APIRouter()

BODY = request_body(GradientRequest, None)
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"content": {SAFETENSORS: {"schema": {"type": "string", "format": "binary"}}}, "description": "gradients"}
}


@router.post("/gradient", openapi_extra=BODY, responses=ANSWER, response_class=Response)
async def gradient(request: Request, service: ServiceDep, arrival: ArrivalDep) -> Response:
    """Scores and their gradients along the differentiable twin of the preprocessing, in float32.

    A judge's score is the probability that the image is preferred to the item's ``reference``, the mean over both
    orders unless the request says otherwise (then the image is seen first). The reference is a uint8 [H, W, 3] tensor,
    or float32 pixels, which are rounded to 8 bits.

    The answer holds one float32 [3, H, W] tensor per image under the image's own name (absent where the sample failed)
    and a GradientResponse as the metadata string ``response``.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != SAFETENSORS:
        raise UnsupportedMediaType(f"/gradient speaks {SAFETENSORS} only: pixels in float32, gradients back")
    limits = service.settings.limits
    async with wire.receive(request, limits, service.budget, service.engine.check_open) as incoming:
        body = incoming.parse(GradientRequest)
        items.check(body.items, limits)
        names = _tensor_names(body.items)
        pixel_limits = items.image_limits(limits)
        models = list(body.models)
        judged = any(isinstance(service.engine.worker(model).model, Judge) for model in models)
        shared = [_shared(incoming, item, pixel_limits, judged=judged) for item in body.items]
        asked = [(i, each) for i, each in zip(body.items, shared, strict=True) for _ in i.all_candidates()]
        makers = [
            _maker(incoming, item.prompt, name, each, pixel_limits, both_orders=body.both_orders)
            for (item, each), name in zip(asked, names, strict=True)
        ]
        deadline = deadline_at(arrival, body.deadline_ms, service.settings)
        work = service.engine.submit(models, makers, job="gradient", deadline=deadline)
        results, timing = await until_disconnect(request, work)
    answer = GradientResponse(
        results=[
            ItemGradients(
                scores={model: [score_of(result.outcomes[model]) for result in part] for model in models},
                total=[total_of(result, body.models) for result in part],
                errors=errors_of(part, models),
                warnings=warnings_of(service, part, models, item),
            )
            for item, part in split(body.items, results)
        ],
        models={model: used(service, model, "gradient") for model in models},
        timing_ms=timing_out(timing),
    )
    content = await asyncio.to_thread(_serialize, names, results, body, answer)
    return Response(content, media_type=SAFETENSORS)


def _serialize(names: list[str], results: list[SampleResult], body: GradientRequest, answer: GradientResponse) -> bytes:
    """Sums and copies of up to hundreds of megabytes: not for the event loop."""
    totals = {name: _total(result, body) for name, result in zip(names, results, strict=True)}
    gradients = {name: total for name, total in totals.items() if total is not None}
    return tensors.serialize(gradients, {"response": answer.model_dump_json()})


def _tensor_names(request_items: list[ItemIn]) -> list[str]:
    """The tensor of each candidate, in order; each may be named once, because its gradient gets its name."""
    names = [candidate.image for item in request_items for candidate in item.all_candidates()]
    if None in names:
        raise InvalidRequest("gradients are taken with respect to images; a candidate is not one", code="not_an_image")
    if len(set(names)) != len(names):
        raise InvalidRequest("a tensor is named twice; one name cannot hold two gradients", code="duplicate_tensor")
    return [name for name in names if name is not None]


@dataclass(frozen=True, eq=False)
class _Shared:
    """What the candidates of an item have in common for judges, decoded once."""

    reference: items.Once[Candidate] | None = None
    context: items.Once[Context] | None = None


def _shared(incoming: Incoming, item: ItemIn, limits: ImageLimits, *, judged: bool) -> _Shared:
    if not judged:
        return _Shared()
    reference = None
    if item.reference is not None:
        reference = items.Once(items.reference_maker(incoming, item.reference, limits))
    context = None if item.context is None else items.Once(items.context_maker(incoming, item.context, limits))
    return _Shared(reference, context)


def _maker(
    incoming: Incoming, prompt: str, name: str, shared: _Shared, limits: ImageLimits, *, both_orders: bool
) -> Maker:
    source = incoming.source(name)
    assert isinstance(source, np.ndarray)  # a safetensors body holds nothing else

    def make() -> Made:
        pixels = torch.from_numpy(checked_pixels(source, limits))
        reference = None if shared.reference is None else shared.reference()
        context = None if shared.context is None else shared.context()
        return Made(TensorSample(prompt, pixels, reference, context, both_orders))

    return make


def _total(result: SampleResult, body: GradientRequest) -> NDArray[np.float32] | None:
    """The weighted sum of the models' gradients; None when one of them failed."""
    total: NDArray[np.float32] | None = None
    for model, weight in body.models.items():
        outcome = result.outcomes[model]
        if not isinstance(outcome, GradientResult):
            return None
        part = np.float32(weight) * outcome.gradient.numpy()
        total = part if total is None else total + part
    return total
