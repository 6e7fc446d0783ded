"""create_app: lifespan and the route table, nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI

from service import errors
from service.engine.engine import Engine
from service.openapi import describe_bodies
from service.process import exit_soon
from service.routes import catalog, compare, compute, gradient, health, score
from service.routes.common import Service, authorize
from service.schemas import CompareRequest, GradientRequest, Problem, ScoreRequest
from service.settings import Settings
from service.telemetry import RequestMiddleware, Telemetry
from service.wire import ByteBudget


def create_app(settings: Settings | None = None, on_fatal: Callable[[str], None] | None = None) -> FastAPI:
    """The service as an ASGI app. ``on_fatal`` is told why the process must end; the default ends it (exit 70)."""
    settings = settings or Settings()
    telemetry = Telemetry()
    engine = Engine(settings, telemetry, on_fatal or exit_soon(settings.exit_grace_s))
    digests = tuple(hashlib.sha256(key.encode()).digest() for key in settings.bearer_keys())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if engine.state == "starting":  # `reward-service serve` has started it by now; other ASGI servers have not
            await engine.start()
        yield
        await engine.stop()

    problem: dict[str, Any] = {"model": Problem, "content": {errors.PROBLEM_JSON: {}}}
    problems: dict[int | str, dict[str, Any]] = dict.fromkeys(
        (400, 401, 404, 408, 413, 415, 422, 429, 503, 504), problem
    )
    app = FastAPI(
        redirect_slashes=False, title="reward-service", version="0.1.0", lifespan=lifespan, responses=problems
    )
    app.state.telemetry = telemetry
    budget = ByteBudget(settings.limits.inflight_bytes, telemetry)
    engine.on_closing = budget.stop_reading
    app.state.service = Service(settings, engine, telemetry, budget, digests)
    errors.install(app)
    app.add_middleware(RequestMiddleware, telemetry=telemetry, on_error=errors.handle)
    for router in (score.router, compare.router, gradient.router, catalog.router):
        app.include_router(router, dependencies=[Depends(authorize)])
    for router in (health.router, compute.router):
        app.include_router(router)
    describe_bodies(app, [ScoreRequest, CompareRequest, GradientRequest])
    return app
