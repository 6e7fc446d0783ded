from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI, Request
from prometheus_client import generate_latest

from service import errors
from service.app import create_app
from service.errors import Overloaded
from service.settings import Settings
from service.telemetry import REQUEST_ID, RequestMiddleware, Telemetry, configure_logging


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger as the service configures it, given back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def app_with_routes() -> FastAPI:
    app = FastAPI()
    app.state.telemetry = Telemetry()
    errors.install(app)
    app.add_middleware(RequestMiddleware, telemetry=app.state.telemetry, on_error=errors.handle)
    app.state.seen = []

    @app.get("/items/{name}")
    async def item(name: str) -> str:
        app.state.seen.append(REQUEST_ID.get())
        return name

    @app.get("/broken")
    async def broken(request: Request) -> str:
        raise ZeroDivisionError("secret")

    @app.get("/busy")
    async def busy() -> str:
        raise Overloaded("full", retry_after_s=3)

    @app.get("/health/live")
    async def live() -> str:
        return "alive"

    return app


def call(app: FastAPI, method: str, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(main())


def counts(app: FastAPI) -> dict[tuple[str, str, str], float]:
    return {
        (s.labels["route"], s.labels["method"], s.labels["status"]): s.value
        for metric in app.state.telemetry.registry.collect()
        for s in metric.samples
        if s.name == "reward_requests_total"
    }


def test_requests_are_counted_by_the_template_of_their_route() -> None:
    app = app_with_routes()
    for name in ("a", "b"):
        assert call(app, "GET", f"/items/{name}").status_code == 200
    assert call(app, "GET", "/busy").status_code == 429
    assert counts(app) == {("/items/{name}", "GET", "200"): 2, ("/busy", "GET", "429"): 1}


def test_unknown_paths_and_methods_cannot_grow_the_number_of_series() -> None:
    app = app_with_routes()
    for i in range(20):
        call(app, "GET", f"/nothing/{i}")
        call(app, f"BREW{i}", f"/nothing/{i}")
        call(app, f"BREW{i}", "/items/a")
    assert len(counts(app)) <= 3


def test_every_answer_has_an_id_and_a_safe_one_of_the_caller_is_kept() -> None:
    app = app_with_routes()
    response = call(app, "GET", "/items/a", {"x-request-id": "trainer-7.step_3"})
    assert response.headers["x-request-id"] == "trainer-7.step_3"
    assert app.state.seen == ["trainer-7.step_3"]
    assert REQUEST_ID.get() is None


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "<script>", "a\tb"])
def test_an_unsafe_id_is_replaced(given: str) -> None:
    response = call(app_with_routes(), "GET", "/items/a", {"x-request-id": given})
    assert len(response.headers["x-request-id"]) == 32
    assert response.headers["x-request-id"] != given


def test_an_unexpected_error_is_counted_as_500_and_its_log_line_has_the_id_of_the_answer(
    root_logger: logging.Logger,
) -> None:
    configure_logging("INFO", "json")
    stream = io.StringIO()
    handler = root_logger.handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream)
    app = app_with_routes()
    response = call(app, "GET", "/broken", {"x-request-id": "find-me"})
    assert response.status_code == 500
    assert response.json()["request_id"] == "find-me"
    assert response.headers["x-request-id"] == "find-me"
    assert "secret" not in response.text
    assert counts(app) == {("/broken", "GET", "500"): 1}
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    reasons = [line for line in lines if "ZeroDivisionError" in line.get("exc_info", "")]
    assert [line["request_id"] for line in reasons] == ["find-me"]


def test_logs_are_json_lines_with_the_request_id(root_logger: logging.Logger) -> None:
    configure_logging("INFO", "json")
    stream = io.StringIO()
    handler = root_logger.handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream)
    app = app_with_routes()
    call(app, "GET", "/items/a", {"x-request-id": "one"})
    call(app, "GET", "/health/live")
    logging.getLogger("anything").info("no request", extra={"model": "m"})
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    ours = [line for line in lines if line["logger"] in ("service.access", "anything")]
    assert len(ours) == 2  # probes are not worth a line each
    assert ours[0]["request_id"] == "one"
    assert (ours[0]["route"], ours[0]["status"], ours[0]["level"]) == ("/items/{name}", 200, "INFO")
    assert (ours[1]["message"], ours[1]["model"], ours[1]["request_id"]) == ("no request", "m", None)


def test_a_log_for_people_is_plain_text(root_logger: logging.Logger) -> None:
    configure_logging("WARNING", "text")
    stream = io.StringIO()
    handler = root_logger.handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream)
    logging.getLogger("anything").info("not shown")
    logging.getLogger("anything").warning("shown")
    assert stream.getvalue().endswith("WARNING  anything: shown\n")
    assert "not shown" not in stream.getvalue()


def below(telemetry: Telemetry, statistic: str, edge: float) -> float | None:
    """Number of groups whose statistic is at most ``edge``, one of the buckets."""
    labels = {"model": "m", "statistic": statistic, "le": str(float(edge)) if edge != float("inf") else "+Inf"}
    return telemetry.registry.get_sample_value("reward_score_bucket", labels)


@pytest.mark.parametrize(("statistic", "low", "high"), [("mean", 3, 4), ("min", 0.9, 1), ("max", 7, 10), ("std", 2, 3)])
def test_group_statistics_leave_failed_samples_out(statistic: str, low: float, high: float) -> None:
    telemetry = Telemetry()
    telemetry.observe_group("m", [1.0, None, 3.0, 8.0])  # mean 4, standard deviation sqrt(26 / 3) = 2.94
    assert (below(telemetry, statistic, low), below(telemetry, statistic, high)) == (0, 1)


def test_negative_scores_have_buckets_too() -> None:
    telemetry = Telemetry()
    telemetry.observe_group("m", [-3.0])
    assert (below(telemetry, "mean", -5), below(telemetry, "mean", -2)) == (0, 1)


def test_a_group_of_one_has_no_spread_and_an_empty_one_nothing() -> None:
    telemetry = Telemetry()
    telemetry.observe_group("m", [None, None])
    assert below(telemetry, "mean", float("inf")) is None
    telemetry.observe_group("m", [2.0])
    assert below(telemetry, "mean", float("inf")) == 1
    assert below(telemetry, "std", float("inf")) is None


def test_apps_have_registries_of_their_own() -> None:
    first, second = (create_app(Settings(models={}), on_fatal=lambda reason: None) for _ in range(2))
    first.state.telemetry.samples.labels("m", "score").inc()
    assert b'reward_samples_total{kind="score",model="m"} 1.0' in generate_latest(first.state.telemetry.registry)
    assert b'model="m"' not in generate_latest(second.state.telemetry.registry)
