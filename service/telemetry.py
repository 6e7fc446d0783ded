"""Metrics (Prometheus) and structured logs with a request id."""

from __future__ import annotations

import contextvars
import logging
import re
import statistics
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from pythonjsonlogger.json import JsonFormatter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OnError = Callable[[Request, Exception], Awaitable[Response]]

REQUEST_ID: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# Rewards live on very different scales (cosines, logits, kilobytes): buckets are fine around 0..1 and coarse far out.
_SCORES: tuple[float, ...] = (
    -100,
    -30,
    -10,
    -5,
    -2,
    -1,
    -0.5,
    -0.2,
    -0.1,
    -0.05,
    0,
    0.05,
    0.1,
    0.15,
    0.2,
    0.25,
    0.3,
    0.35,
    0.4,
    0.5,
)
_SCORES += (0.6, 0.7, 0.8, 0.9, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 25, 30, 50, 100, 300)


class Telemetry:
    """All metrics of one app, in a registry of its own. Defined in docs/metrics.md."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter that nobody reads
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "reward_requests", "HTTP requests answered", ["route", "method", "status"], registry=registry
        )
        self.latency = Histogram(
            "reward_request_seconds", "arrival to last byte handed over", ["route"], buckets=_SECONDS, registry=registry
        )
        self.errors = Counter("reward_errors", "requests answered by an error, by code", ["code"], registry=registry)
        self.sample_errors = Counter(
            "reward_sample_errors", "samples without a score, by code", ["model", "code"], registry=registry
        )
        self.samples = Counter("reward_samples", "samples scored", ["model", "kind"], registry=registry)
        self.depth = Gauge("reward_queue_depth", "prepared samples that wait for a batch", ["model"], registry=registry)
        self.cost = Gauge(
            "reward_queue_cost", "cost admitted and not finished (one forward = 1)", ["model"], registry=registry
        )
        self.dropped = Counter(
            "reward_queue_dropped", "admitted samples dropped before a forward", ["model", "reason"], registry=registry
        )
        self.batch = Histogram(
            "reward_batch_size",
            "samples in one batch",
            ["model"],
            buckets=(1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256),
            registry=registry,
        )
        self.stage = Histogram(
            "reward_stage_seconds",
            "time of one sample in decode (decode and prepare), queue or forward",
            ["model", "stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.group = Histogram(
            "reward_score",
            "mean, std, min and max of a model's scores over one item (GRPO's group)",
            ["model", "statistic"],
            buckets=_SCORES,
            registry=registry,
        )
        self.cache = Counter("reward_feature_cache", "feature look-ups", ["tower", "result"], registry=registry)
        self.cache_bytes = Gauge("reward_feature_cache_bytes", "bytes held", ["tower"], registry=registry)
        self.judge_tokens = Counter(
            "reward_judge_tokens", "tokens of the questions that judges were asked", ["model"], registry=registry
        )
        self.ready = Gauge("reward_ready", "1 when the last readiness check passed", registry=registry)
        self.inflight_bytes = Gauge("reward_inflight_bytes", "request bytes held", registry=registry)
        self.warmup = Gauge("reward_warmup_seconds", "time to load and warm a model", ["model"], registry=registry)

    def observe_group(self, model: str, scores: Iterable[float | None]) -> None:
        """Statistics of one item's scores; failed samples are left out, std is the population's."""
        known = [score for score in scores if score is not None]
        if not known:
            return
        self.group.labels(model, "mean").observe(statistics.fmean(known))
        self.group.labels(model, "min").observe(min(known))
        self.group.labels(model, "max").observe(max(known))
        if len(known) > 1:
            self.group.labels(model, "std").observe(statistics.pstdev(known))


class RequestIdFilter(logging.Filter):
    """Every line of the log carries the id of the request that it belongs to."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = REQUEST_ID.get()
        vars(record).pop("color_message", None)  # uvicorn's own copy of the message for terminals
        return True


class TextFormatter(logging.Formatter):
    """For a terminal: one line, with the structured fields behind the message."""

    _STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "request_id", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        fields = {key: value for key, value in vars(record).items() if key not in self._STANDARD}
        line = super().format(record)
        return line + "".join(f" {key}={value}" for key, value in fields.items())


def configure_logging(level: str, style: str) -> None:
    """Root logger to standard error: JSON lines, or plain text for a terminal."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(RequestIdFilter())
    if style == "json":
        handler.setFormatter(
            JsonFormatter(
                "%(asctime)s %(levelname)s %(name)s %(message)s %(request_id)s",
                rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            )
        )
    else:
        handler.setFormatter(TextFormatter("%(asctime)s %(levelname)-8s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(noisy)
        logger.handlers.clear()
        logger.propagate = noisy != "uvicorn.access"  # our own middleware logs requests, with their id


class RequestMiddleware:
    """Gives each request an id (a safe X-Request-ID is kept), counts it, times it and logs it."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry, on_error: OnError) -> None:
        self.app = app
        self.telemetry = telemetry
        self.on_error = on_error
        self.log = logging.getLogger("service.access")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        scope["request_id"] = request_id
        token = REQUEST_ID.set(request_id)
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            if status:  # the answer has begun: all that is left is to break the connection
                raise
            response = await self.on_error(Request(scope), error)
            await response(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - started
            # the route's template, so that unknown paths cannot grow the number of series
            route = getattr(scope.get("route"), "path", "unknown")
            method = scope["method"] if scope["method"] in _METHODS and route != "unknown" else "other"
            self.telemetry.requests.labels(route, method, status).inc()
            self.telemetry.latency.labels(route).observe(seconds)
            level = logging.DEBUG if route.startswith(("/health", "/metrics")) else logging.INFO
            self.log.log(
                level,
                "request",
                extra={"route": route, "method": scope["method"], "status": status, "ms": round(seconds * 1000, 2)},
            )
            REQUEST_ID.reset(token)
