"""Every error answer, in one shape: problem details (RFC 9457) with the member ``error`` that the client
shows.

`Problem` is what services raise. Crossfade's errors are translated here and nowhere else. No answer holds a
driver's message, a stack trace or a secret.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from crossfade import errors as crossfade_errors
from scorekeeper.metrics import STORE_ERRORS

log = structlog.get_logger("scorekeeper")

#: Seconds after which a client may ask again when a store did not answer: a fail-over is seldom shorter.
RETRY_AFTER = 2


class Problem(Exception):
    """An answer that is not a success.

    Attributes:
        status: HTTP status.
        kind: last part of the ``type`` URI; names the problem for programs.
        error: a sentence for a person; the client shows it.
        members: further members of the object.
        headers: further headers.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        error: str,
        *,
        members: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(error)
        self.status = status
        self.kind = kind
        self.error = error
        self.members = dict(members or {})
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        """The answer itself, ``application/problem+json``."""
        body = {
            "error": self.error,
            "type": f"urn:scorekeeper:problem:{self.kind}",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.error,
            **self.members,
        }
        return JSONResponse(body, self.status, self.headers, media_type="application/problem+json")


def invalid(error: str) -> Problem:
    """400: what was sent cannot be accepted as it is."""
    return Problem(400, "invalid", error)


def name_taken() -> Problem:
    """400: the name belongs to somebody, in whatever letter case."""
    return Problem(400, "name-taken", "Username already exists")


def unauthorized(error: str = "Authentication required") -> Problem:
    """401: no token, or none that counts."""
    return Problem(401, "unauthorized", error, headers={"WWW-Authenticate": "Bearer"})


def forbidden(error: str = "You are not allowed to do this") -> Problem:
    """403."""
    return Problem(403, "forbidden", error)


def too_many(retry_after: float) -> Problem:
    """429. ``retry_after`` in seconds, rounded up."""
    seconds = max(1, math.ceil(retry_after))
    return Problem(
        429,
        "too-many-requests",
        "Too many requests, please try again later",
        members={"retryAfter": seconds},
        headers={"Retry-After": str(seconds)},
    )


def unavailable(error: str, kind: str = "unavailable", members: Mapping[str, Any] | None = None) -> Problem:
    """503 with Retry-After: the same request may succeed in a moment."""
    return Problem(503, kind, error, members=members, headers={"Retry-After": str(RETRY_AFTER)})


def body_too_large(limit: int) -> Problem:
    """413: the whole body is over ``limit`` bytes."""
    return Problem(413, "body-too-large", f"The request body is larger than {limit} bytes")


_UNAVAILABLE = "The service cannot reach its database at the moment, please try again"

# By class, most particular first; looked up along the class's bases.
_FROM_CROSSFADE: dict[type[Exception], tuple[str, str]] = {
    crossfade_errors.StoreUnavailable: ("unavailable", _UNAVAILABLE),
    crossfade_errors.Busy: ("busy", "The record is being changed by somebody else, please try again"),
    crossfade_errors.Undone: (
        "undone",
        "The change could not be stored and was taken back, please try again",
    ),
    crossfade_errors.UndoPending: (
        "undone",
        "The change could not be stored and is being taken back, please try again",
    ),
    crossfade_errors.OutcomeUnknown: (
        "outcome-unknown",
        "It is not known yet whether the change was stored; please look before you try again",
    ),
}


def from_crossfade(error: crossfade_errors.CrossfadeError) -> Problem:
    """The answer for an error of Crossfade that no service has taken care of."""
    STORE_ERRORS.labels(type(error).__name__).inc()
    if isinstance(error, crossfade_errors.NotFound):
        return Problem(404, "not-found", "Not found")
    if isinstance(error, crossfade_errors.DuplicateKey):
        return Problem(400, "duplicate", "This value is already in use")
    if isinstance(error, crossfade_errors.Quarantined):
        return invalid("This cannot be stored as it is")
    for cls in type(error).__mro__:
        if cls in _FROM_CROSSFADE:
            kind, sentence = _FROM_CROSSFADE[cls]
            log.warning("request not carried out", kind=kind, cause=str(error))
            return unavailable(sentence, kind)
    log.error("request failed", exc_info=error)
    return internal()


def internal() -> Problem:
    """500, and nothing about why: that is in the log."""
    return Problem(500, "internal", "Internal server error")


def _from_http(error: HTTPException) -> Problem:
    sentences = {
        404: ("not-found", "Not found"),
        405: ("method-not-allowed", "This method is not allowed here"),
        400: ("invalid", "The request could not be read"),
    }
    kind, sentence = sentences.get(error.status_code, ("http", HTTPStatus(error.status_code).phrase))
    return Problem(error.status_code, kind, sentence, headers=error.headers)


def _from_validation(error: RequestValidationError) -> Problem:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "path", "query")]
    kind = first["type"]
    if kind == "json_invalid":
        return Problem(400, "malformed-json", "The request body is not valid JSON")
    if kind == "value_error":
        return invalid(str(first["msg"]).removeprefix("Value error, "))
    if not where:
        return invalid("A JSON object is required as the request body")
    if kind == "missing":
        return invalid(f"The field {where[-1]} is required")
    return invalid(f"The field {'.'.join(where)} is not valid: {str(first['msg'])[:200]}")


def install(app: FastAPI) -> None:
    """Let ``app`` answer every error in this shape."""

    async def problem(_request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return error.response()

    async def crossfade(_request: Request, error: Exception) -> Response:
        assert isinstance(error, crossfade_errors.CrossfadeError)
        return from_crossfade(error).response()

    async def http(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _from_http(error).response()

    async def validation(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _from_validation(error).response()

    app.add_exception_handler(Problem, problem)
    app.add_exception_handler(crossfade_errors.CrossfadeError, crossfade)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, validation)
