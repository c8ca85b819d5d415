"""`/api/health`, its two parts, and `/metrics`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from crossfade import Crossfade, Migration
from scorekeeper.errors import unavailable
from scorekeeper.metrics import exposition

router = APIRouter(tags=["operations"])


@router.get("/api/health")
async def health(request: Request) -> JSONResponse:
    """Both stores: whether they answer, and in how many milliseconds. 503 when the one that decides does
    not.
    """
    cf: Crossfade = request.app.state.crossfade
    accounts: Migration = request.app.state.accounts
    found = await cf.health()
    shown: dict[str, Any] = {
        name: {"healthy": up, "latency": None if seconds is None else round(seconds * 1000, 2)}
        for name, (up, seconds) in (("mongodb", found["mongo"]), ("postgres", found["postgres"]))
    }
    active = "mongodb" if accounts.primary == "mongo" else "postgres"
    healthy = shown[active]["healthy"]
    everything = all(store["healthy"] for store in shown.values())
    status = "ok" if everything else "degraded" if healthy else "error"
    messages = {
        "ok": "Server is running",
        "degraded": "Server is running on one of its two databases",
        "error": "The database that decides does not answer",
    }
    body = {"status": status, "message": messages[status], "database": {"active": active, **shown}}
    if not healthy:
        return unavailable(messages[status], members=body).response()
    return JSONResponse(body)


@router.get("/api/health/live")
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/api/health/ready")
async def ready(request: Request) -> dict[str, str]:
    """This worker holds a lease: it may acknowledge writes."""
    accounts: Migration = request.app.state.accounts
    if not accounts.board.lease_valid:
        raise unavailable("This worker has lost touch with its database", "not-ready")
    return {"status": "ok"}


@router.get("/metrics", include_in_schema=False)
async def metrics() -> Response:
    """Prometheus metrics."""
    return Response(exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")
