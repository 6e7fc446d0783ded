"""GET /models: every registered reward model, and whether it is loaded here."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter

from models.registry import get_info, list_models
from service.routes.common import Service, ServiceDep
from service.schemas import CalibrationOut, ModelOut, ModelsResponse

router = APIRouter()


@router.get("/models")
async def catalog(service: ServiceDep) -> ModelsResponse:
    """Licence, citation, range, weights, fingerprint: what a user must know before training on a reward."""
    names = list_models(hidden=service.settings.show_hidden)
    return ModelsResponse(models=[describe(service, name) for name in names])


def describe(service: Service, name: str) -> ModelOut:
    info = get_info(name)
    worker = service.engine.workers.get(name)
    loaded = worker is not None and worker.loaded
    return ModelOut(
        name=info.name,
        description=info.description,
        kind=info.kind,
        inputs=list(info.inputs),
        outputs=list(info.outputs),
        differentiable=info.differentiable,
        range=info.range,
        calibration=CalibrationOut(**asdict(info.calibration)),
        citation=info.citation,
        license=info.license,
        weights=info.weights,
        weights_bytes=info.weights_bytes,
        verified=info.verified,
        ready=loaded and service.engine.state == "serving",
        fingerprint=worker.fingerprint() if worker is not None and loaded else None,
        dtype=worker.dtype() if worker is not None and loaded else None,
    )
