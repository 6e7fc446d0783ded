"""GET /models: every registered reward model, and whether it is loaded here."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter

from models.registry import get_info, list_models
from service.routes.common import Service, ServiceDep
from service.schemas import CalibrationOut, ModelOut, ModelsResponse, WeightSourceOut
from service.weights import needed

router = APIRouter()


@router.get("/models")
def catalog(service: ServiceDep) -> ModelsResponse:
    """Licence, citation, range, weights, fingerprint: what a user must know before training on a reward."""
    # Not a coroutine: it looks at files, and the event loop must not wait for a slow disk.
    names = list_models(hidden=service.settings.show_hidden)
    return ModelsResponse(models=[describe(service, name) for name in names])


def describe(service: Service, name: str) -> ModelOut:
    worker = service.engine.workers.get(name)
    loaded = worker is not None and worker.loaded
    # Options may change what a loaded model says of itself: the range, the calibration.
    info = worker.model.info if worker is not None and loaded else get_info(name)
    sources = [
        WeightSourceOut(role=file.role, source=file.shown, bytes=file.bytes, present=file.present)
        for file in needed(name, service.settings)
    ]
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
        weights_present=all(source.present for source in sources),
        sources=sources,
        verified=info.verified,
        ready=loaded and service.engine.state == "serving",
        fingerprint=worker.fingerprint() if worker is not None and loaded else None,
        dtype=worker.dtype() if worker is not None and loaded else None,
    )
