"""GET /health/live, /health/ready and /metrics: for orchestrators and Prometheus; they need no key."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.errors import Unavailable
from service.routes.common import ServiceDep

router = APIRouter()


@router.get("/health/live")
async def live() -> dict[str, str]:
    """The process answers. It runs no model: a busy device is not a dead process."""
    return {"status": "alive"}


@router.get("/health/ready")
async def ready(service: ServiceDep) -> dict[str, dict[str, bool] | str]:
    """Every loaded model answers: a success of the last seconds, or its canary scored now. 503 otherwise."""
    answers = await service.engine.check_ready()
    if not all(answers.values()):
        silent = sorted(name for name, answered in answers.items() if not answered)
        raise Unavailable(f"no answer from {', '.join(silent)}", code="not_ready", retry_after_s=5)
    return {"status": "ready", "models": answers}


@router.get("/metrics", response_class=Response)
async def metrics(service: ServiceDep) -> Response:
    """Prometheus text format; every metric is defined in docs/metrics.md."""
    return Response(generate_latest(service.telemetry.registry), media_type=CONTENT_TYPE_LATEST)
