"""The exception tree of the service, and the one handler that turns it into RFC 9457 problem documents.

    ServiceError                    500 internal_error
    ├── BadRequest                  400 the body cannot be read
    ├── Unauthorized                401
    ├── UnknownModel                404
    ├── BodyTimeout                 408 the body did not arrive in time
    ├── PayloadTooLarge             413
    ├── UnsupportedMediaType        415
    ├── InvalidRequest              422 the body can be read and asks for something that cannot be
    ├── Overloaded                  429 with Retry-After
    ├── ClientDisconnected          499 nobody reads it; it is counted
    ├── Unavailable                 503 with Retry-After: starting, draining or failed
    └── DeadlineExceeded            504

``code`` is stable and machine-readable; ``detail`` is for people and never holds the text of an inner exception.
Errors of single samples are not here: they are :class:`models.base.SampleError` and travel beside the scores.
"""

from __future__ import annotations

import http
import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

log = logging.getLogger(__name__)

PROBLEM_JSON = "application/problem+json"


class ServiceError(Exception):
    """Base of all errors that answer a whole request."""

    status = 500
    code = "internal_error"

    def __init__(self, detail: str, *, code: str | None = None, retry_after_s: int | None = None, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.extra = extra
        if code is not None:
            self.code = code


class BadRequest(ServiceError):
    status, code = 400, "malformed_body"


class Unauthorized(ServiceError):
    status, code = 401, "unauthorized"


class UnknownModel(ServiceError):
    status, code = 404, "unknown_model"


class BodyTimeout(ServiceError):
    status, code = 408, "body_timeout"


class PayloadTooLarge(ServiceError):
    status, code = 413, "payload_too_large"


class UnsupportedMediaType(ServiceError):
    status, code = 415, "unsupported_media_type"


class InvalidRequest(ServiceError):
    status, code = 422, "invalid_request"


class Overloaded(ServiceError):
    status, code = 429, "overloaded"


class ClientDisconnected(ServiceError):
    status, code = 499, "client_disconnected"


class Unavailable(ServiceError):
    status, code = 503, "unavailable"


class DeadlineExceeded(ServiceError):
    status, code = 504, "deadline"


def problem(status: int, code: str, detail: str, headers: Mapping[str, str] | None = None, **extra: Any) -> Response:
    """An RFC 9457 problem document."""
    body = {
        "type": f"urn:reward-service:error:{code}",
        "title": _phrase(status),
        "status": status,
        "detail": detail,
        "code": code,
        **extra,
    }
    return Response(json.dumps(body), status_code=status, media_type=PROBLEM_JSON, headers=dict(headers or {}))


def _phrase(status: int) -> str:
    return "Client Closed Request" if status == 499 else http.HTTPStatus(status).phrase


async def handle(request: Request, error: Exception) -> Response:
    """The one handler: every exception of a route becomes a problem document."""
    telemetry = request.app.state.telemetry
    headers: dict[str, str] = {}
    if isinstance(error, ServiceError):
        status, code, detail, extra = error.status, error.code, error.detail, error.extra
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(error.retry_after_s)
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(error, HTTPException):
        status, code, extra = error.status_code, http.HTTPStatus(error.status_code).phrase.lower().replace(" ", "_"), {}
        detail = "no such route" if status == 404 else str(error.detail)
        headers.update(error.headers or {})
    else:
        status, code, extra = 500, "internal_error", {}
        detail = "the service failed on this request; its log says why under the request id"
        log.error("unhandled exception", exc_info=error, extra={"path": request.url.path})
    telemetry.errors.labels(code).inc()
    return problem(status, code, detail, headers, request_id=request.scope.get("request_id"), **extra)


def install(app: FastAPI) -> None:
    for kind in (ServiceError, HTTPException):  # what nobody expects reaches handle() through RequestMiddleware
        app.add_exception_handler(kind, handle)
