"""The OpenAPI description of bodies that the routes read by themselves, because they travel in three ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.wire import JSON, MULTIPART, SAFETENSORS


def request_body(schema: type[BaseModel], form: Mapping[str, Any] | None) -> dict[str, Any]:
    """``openapi_extra`` of a route; ``form`` is the schema of its multipart form, None for safetensors alone."""
    described = f"metadata key 'request': {schema.__name__}"
    content: dict[str, Any] = {
        SAFETENSORS: {"schema": {"type": "string", "format": "binary", "description": described}}
    }
    if form is not None:
        content[JSON] = {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}
        content[MULTIPART] = {"schema": form}
    return {"requestBody": {"required": True, "content": content}}


def describe_bodies(app: FastAPI, schemas: Sequence[type[BaseModel]]) -> None:
    """Add what the routes' bodies refer to: FastAPI itself describes only the models of parameters and answers."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            _, definitions = models_json_schema(
                [(schema, "validation") for schema in schemas], ref_template="#/components/schemas/{model}"
            )
            document["components"]["schemas"] |= definitions["$defs"]
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
