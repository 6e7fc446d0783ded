"""POST /gradient: d(total)/d(image) of differentiable models, stateless, safetensors in and out."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import torch
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray

from models.base import InputError
from service import items, tensors, wire
from service.engine.batcher import GradientResult
from service.engine.request import Made, Maker, SampleResult
from service.engine.worker import TensorSample
from service.errors import InvalidRequest, UnsupportedMediaType
from service.images import ImageLimits
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
        prompts = [item.prompt for item in body.items for _ in item.all_candidates()]
        makers = [_maker(incoming, prompt, name, pixel_limits) for prompt, name in zip(prompts, names, strict=True)]
        models = list(body.models)
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


def _maker(incoming: Incoming, prompt: str, name: str, limits: ImageLimits) -> Maker:
    source = incoming.source(name)
    assert isinstance(source, np.ndarray)  # a safetensors body holds nothing else

    def make() -> Made:
        return Made(TensorSample(prompt, torch.from_numpy(checked_pixels(source, limits))))

    return make


def checked_pixels(array: NDArray[Any], limits: ImageLimits) -> NDArray[np.float32]:
    """A copy of float32 [3, H, W] pixels in [0, 1]; raises InputError for anything else."""
    if array.dtype != np.float32 or array.ndim != 3 or array.shape[0] != 3:
        raise InputError("a gradient wants float32 pixels of shape [3, H, W]", code="invalid_image_array")
    limits.check_size(array.shape[2], array.shape[1])
    if not np.isfinite(array).all():
        raise InputError("the pixels hold numbers that are not finite", code="pixels_not_finite")
    if array.min() < 0 or array.max() > 1:
        raise InputError("the pixels are not within [0, 1]", code="pixels_out_of_range")
    return np.array(array, dtype=np.float32)


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
