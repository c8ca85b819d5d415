"""The service's description of itself: what every route may answer besides success, and as what media type.

FastAPI describes what a route declares. What all of them have in common (errors are problem details, some are possible
everywhere) is said here, once, for every route of every room.
"""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

_PROBLEM: Final = "#/components/schemas/ProblemOut"
_EXAMPLE: Final = {
    "error": "The username must be 3 to 20 characters long",
    "type": "urn:scorekeeper:problem:invalid",
    "title": "Bad Request",
    "status": 400,
    "detail": "The username must be 3 to 20 characters long",
}
#: Possible on every route.
_EVERYWHERE: Final = {
    "400": "The request cannot be accepted as it is",
    "413": "The body is too large",
    "429": "Too many requests; `Retry-After` and `retryAfter` say in how many seconds to come again",
    "503": "No store can answer at the moment; `Retry-After` says when to come again",
}


def install(app: FastAPI) -> None:
    """Let ``app`` describe itself so."""

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app)
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]


def _described(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    if "ProblemOut" in schemas:
        schemas["ProblemOut"]["examples"] = [_EXAMPLE]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for path in document["paths"].values():
        for operation in path.values():
            _describe(operation["responses"])
    return document


def _describe(responses: dict[str, Any]) -> None:
    # FastAPI's own answer to an invalid request, which is a 400 here.
    responses.pop("422", None)
    for status, description in _EVERYWHERE.items():
        responses.setdefault(
            status,
            {"description": description, "content": {"application/json": {"schema": {"$ref": _PROBLEM}}}},
        )
    for status, response in responses.items():
        content = response.get("content", {})
        # Some have more members than the common shape; all of them travel as problem details.
        if status[0] in "45" and "application/json" in content:
            response["content"] = {"application/problem+json": content.pop("application/json")}
