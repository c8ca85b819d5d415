"""`/api/users`: from HTTP to the service and back."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from scorekeeper.auth.current import SignedIn
from scorekeeper.users.schemas import (
    Credentials,
    LoggedInOut,
    LookupOut,
    OwnUserAnswer,
    ProblemOut,
    RegisteredOut,
)
from scorekeeper.users.service import UserService

router = APIRouter(prefix="/api/users", tags=["users"])


def _service(request: Request) -> UserService:
    service: UserService = request.app.state.users
    return service


Users = Annotated[UserService, Depends(_service)]


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route answers besides success, for its OpenAPI description."""
    return {status: {"model": ProblemOut} for status in (*statuses, 413, 503)}


@router.post(
    "/register",
    status_code=201,
    response_model=RegisteredOut,
    response_model_exclude_unset=True,
    responses=errors_of(400),
)
async def register(credentials: Credentials, users: Users) -> Any:
    """Open an account."""
    return await users.register(credentials.username, credentials.password)


@router.post(
    "/login", response_model=LoggedInOut, response_model_exclude_unset=True, responses=errors_of(400, 401)
)
async def log_in(credentials: Credentials, users: Users) -> Any:
    """Get a token."""
    return await users.log_in(credentials.username, credentials.password)


@router.get("/me", response_model=OwnUserAnswer, response_model_exclude_unset=True, responses=errors_of(401))
@router.get(
    "/profile", response_model=OwnUserAnswer, response_model_exclude_unset=True, responses=errors_of(401)
)
async def me(current: SignedIn, users: Users) -> Any:
    """Who is signed in."""
    return await users.me(current)


@router.get(
    "/lookup/{username:path}",
    response_model=LookupOut,
    response_model_exclude_unset=True,
    responses=errors_of(404),
)
async def look_up(username: str, users: Users) -> Any:
    """Whether a name has an account, in any letter case."""
    return await users.look_up(username)
