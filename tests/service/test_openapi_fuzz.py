"""The served OpenAPI document, fuzzed: no request that it describes, or forbids, makes the service fail."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.service.bodies import JPEG_MODEL, SAFETENSORS, b64, item, noise, score_body, tensor_body
from tests.service.live import Live

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
IMAGE = b64(noise(0))


@schemathesis.serializer(SAFETENSORS)
def serialize_tensors(context: Any, value: Any) -> bytes:
    """The document calls a file of tensors "binary"; whatever else is generated travels as its request."""
    return value if isinstance(value, bytes) else tensor_body(json.dumps(value, default=str), {})


def document(service: Live) -> dict[str, Any]:
    found: dict[str, Any] = service.get("/openapi.json").json()
    return found


def operation(service: Live, document: dict[str, Any], path: str, method: str) -> Any:
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=service.url)
    return schema[path][method]


def settings(examples: int) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=examples, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True
    )


POST = [("/score", "POST", 60), ("/compare", "POST", 60), ("/gradient", "POST", 30), ("/compute", "POST", 30)]
GET = [
    ("/models", "GET", 2),
    ("/health", "GET", 2),
    ("/health/live", "GET", 2),
    ("/health/ready", "GET", 2),
    ("/metrics", "GET", 2),
]


@pytest.mark.parametrize(
    ("path", "method", "examples", "mode"),
    [(*each, GenerationMode.POSITIVE) for each in POST + GET] + [(*each, GenerationMode.NEGATIVE) for each in POST[:2]],
)
def test_no_request_makes_the_service_fail(
    service: Live, path: str, method: str, examples: int, mode: GenerationMode
) -> None:
    """Requests that fit the document, and requests that do not: never 5xx, always answered as the document says."""

    @settings(examples)
    @hypothesis.given(case=operation(service, document(service), path, method).as_strategy(generation_mode=mode))
    def fuzz(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=30)

    fuzz()


def with_one_form(item: dict[str, Any], form: str) -> dict[str, Any]:
    """The schema of an item that has ``form``, two to eight of them, and not the other."""
    found = copy.deepcopy(item)
    text = {"type": "string"}
    candidate = {"type": "object", "properties": {"image": text}, "required": ["image"], "additionalProperties": False}
    entries = {"images": text, "candidates": candidate}
    for name in entries:
        del found["properties"][name]
    found["properties"][form] = {"type": "array", "items": entries[form], "minItems": 2, "maxItems": 8}
    found["required"].append(form)
    return found


def narrowed(document: dict[str, Any], path: str) -> dict[str, Any]:
    """The document for requests in JSON that get far: random model names and lone candidates end early."""
    found = copy.deepcopy(document)
    weights = {"type": "number", "minimum": -100, "maximum": 100}
    loaded = {"tiny-tower": weights, JPEG_MODEL: weights, "raises-on-red": weights}
    schemas = found["components"]["schemas"]
    for name, models in (("ScoreRequest", loaded), ("GradientRequest", {"tiny-tower": weights})):
        schemas[name]["properties"]["models"] = {
            "type": "object", "properties": models, "additionalProperties": False, "minProperties": 1,
        }  # fmt: skip
    schemas["CompareRequest"]["properties"]["model"] = {"enum": list(loaded)}
    for name in ("ScoreRequest", "GradientRequest", "CompareRequest"):
        del schemas[name]["properties"]["deadline_ms"]  # its answers depend on the time
    for name in ("ItemIn", "CompareItemIn"):
        # JSON Schema is not told that an item has images or candidates, and not both
        forms = ["images"] if path == "/gradient" else ["images", "candidates"]
        schemas[name] = {"anyOf": [with_one_form(schemas[name], form) for form in forms]}
    for path, name in (("/score", "ScoreRequest"), ("/compare", "CompareRequest"), ("/gradient", "GradientRequest")):
        body = found["paths"][path]["post"]["requestBody"]
        body["content"] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    return found


def with_images(value: Any, image: Callable[[], str]) -> Any:
    """Every image of a generated request is one that exists, so that the request goes all the way."""
    if isinstance(value, list):
        return [with_images(entry, image) for entry in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, entry in value.items():
        if key in ("image", "mask") and isinstance(entry, str):
            found[key] = image()
        elif key in ("images", "frames") and isinstance(entry, list):
            found[key] = [image() for _ in entry]
        else:
            found[key] = with_images(entry, image)
    return found


@pytest.mark.parametrize(
    ("path", "wire"),
    [("/score", "json"), ("/score", "safetensors"), ("/compare", "json"), ("/compare", "safetensors"),
     ("/gradient", "safetensors")],
)  # fmt: skip
def test_requests_that_go_all_the_way(service: Live, path: str, wire: str) -> None:
    """Generated requests with real images and loaded models: scored, or refused with a reason, never 5xx."""
    pixels = noise(0) if path != "/gradient" else np.full((3, 32, 32), 0.5, np.float32)
    described = operation(service, narrowed(document(service), path), path, "POST")
    statuses = []

    @settings(60)
    @hypothesis.given(case=described.as_strategy(generation_mode=GenerationMode.POSITIVE))
    def fuzz(case: Any) -> None:
        if wire == "json":
            response = service.post(path, with_images(case.body, lambda: IMAGE))
        else:
            counter = itertools.count()
            request = with_images(case.body, lambda: f"image{next(counter)}")
            body = tensor_body(request, {f"image{i}": pixels for i in range(next(counter))})
            response = service.post(path, content=body, headers={"content-type": SAFETENSORS})
        assert response.status_code in (200, 422), response.text[:500]
        statuses.append(response.status_code)

    fuzz()
    assert 200 in statuses  # else nothing went all the way


def test_the_document_describes_what_there_is(service: Live) -> None:
    """Every route, its three bodies, and problem documents for what can go wrong."""
    found = document(service)
    assert set(found["paths"]) == {
        "/score", "/compare", "/gradient", "/compute", "/models",
        "/health", "/health/live", "/health/ready", "/metrics",
    }  # fmt: skip
    score = found["paths"]["/score"]["post"]
    assert set(score["requestBody"]["content"]) == {"application/json", "multipart/form-data", SAFETENSORS}
    for status in ("400", "401", "413", "415", "422", "429", "503", "504"):
        assert "application/problem+json" in score["responses"][status]["content"]


def test_every_reference_of_the_document_leads_somewhere(service: Live) -> None:
    found = document(service)
    schemas = found["components"]["schemas"]
    references = set()

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            references.update({value["$ref"]} if isinstance(value.get("$ref"), str) else ())
            value = list(value.values())
        for entry in value if isinstance(value, list) else ():
            collect(entry)

    collect(found)
    names = {reference.removeprefix("#/components/schemas/") for reference in references}
    assert names <= set(schemas)
    assert {"ScoreRequest", "CompareRequest", "ScoreResponse", "CompareResponse", "Problem"} <= names
    assert "GradientRequest" in schemas  # named in words: it travels inside a binary body


def test_answers_fit_the_document(service: Live) -> None:
    models = {JPEG_MODEL: 1.0, "raises-on-red": 1.0}
    body = {"models": models, "items": [item("a", noise(0)), item("red", noise(0))], "explain": True}
    operation(service, document(service), "/score", "POST").validate_response(service.post("/score", body))
    compared = service.post("/compare", {"model": JPEG_MODEL, "items": [item("a", noise(0), noise(1), noise(2))]})
    operation(service, document(service), "/compare", "POST").validate_response(compared)
    problem = service.post("/score", score_body("nope", item("a", noise(0))))
    operation(service, document(service), "/score", "POST").validate_response(problem)
