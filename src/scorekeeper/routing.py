"""What the routes of every resource have in common."""

from __future__ import annotations

from typing import Any

from fastapi import Depends, Request

from scorekeeper.users.schemas import ProblemOut


def of_app(name: str) -> Any:
    """The dependency that gives a route the service of this name, as `scorekeeper.app` has put it together."""

    def service(request: Request) -> Any:
        return getattr(request.app.state, name)

    return Depends(service)


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route answers besides success, for its OpenAPI description."""
    return {status: {"model": ProblemOut} for status in (*statuses, 413, 503)}
