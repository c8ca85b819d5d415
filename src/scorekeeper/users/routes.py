"""`/api/users`: from HTTP to the service and back."""

from __future__ import annotations

from hashlib import blake2b
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Request, Response
from starlette.convertors import StringConvertor, register_url_convertor

from scorekeeper.auth.current import BEARER, Administrator, Authenticator, SignedIn
from scorekeeper.routing import Direct, errors_of, of_app, streamed
from scorekeeper.users.changes import AccountChanges
from scorekeeper.users.profiles import ProfileService
from scorekeeper.users.schemas import (
    AccountChangedOut,
    Credentials,
    DoneOut,
    EverybodyForAdminOut,
    EverybodyOut,
    LoggedInOut,
    LookupOut,
    NewName,
    NewPicture,
    NewRole,
    NewUsername,
    OwnUserAnswer,
    PictureChangedOut,
    PictureOut,
    ProfileOut,
    RegisteredOut,
    RenamedOut,
)
from scorekeeper.users.service import UserService


class _AccountId(StringConvertor):
    """An id right behind the prefix, where words of the routes stand too: a wrong method on one of those is 405."""

    regex = r"(?!(?:register|login|me|profile|all)$)[^/]+"


register_url_convertor("account", _AccountId())

router = APIRouter(prefix="/api/users", tags=["users"])
direct = APIRouter(prefix="/api/users", tags=["users"], route_class=Direct)


Users = Annotated[UserService, of_app("users")]
Changes = Annotated[AccountChanges, of_app("account_changes")]
Profiles = Annotated[ProfileService, of_app("profiles")]


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


@direct.get("/me", response_model=OwnUserAnswer, dependencies=[BEARER], responses=errors_of(401))
@direct.get("/profile", response_model=OwnUserAnswer, dependencies=[BEARER], responses=errors_of(401))
async def me(request: Request) -> Response:
    """Who is signed in."""
    services = request.app.state
    authenticator: Authenticator = services.authenticator
    users: UserService = services.users
    claims = await authenticator.claims_of(request.headers.get("authorization"))
    body = await users.me(claims.user_id)
    if body is None:
        raise await authenticator.nobody()
    return Response(body, media_type="application/json")


@router.delete("/me", response_model=DoneOut, responses=errors_of(401))
async def remove_oneself(current: SignedIn, changes: Changes) -> Any:
    """Delete one's own account."""
    return await changes.remove_oneself(current)


@router.get("/me/profile-picture", response_model=PictureOut, responses={304: {}, **errors_of(401)})
async def picture(request: Request, current: SignedIn, changes: Changes) -> Response:
    """One's own picture; 304 if the client has it."""
    body = orjson.dumps({"profilePicture": await changes.picture(current)})
    # Weak: the same picture may travel compressed.
    tag = f'W/"{blake2b(body, digest_size=16).hexdigest()}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type="application/json")


@router.put(
    "/me/profile-picture",
    response_model=PictureChangedOut,
    response_model_exclude_unset=True,
    responses=errors_of(400, 401),
)
async def set_picture(body: NewPicture, current: SignedIn, changes: Changes) -> Any:
    """Take a picture for oneself."""
    return await changes.set_picture(current, body.profilePicture)


@router.delete(
    "/me/profile-picture",
    response_model=PictureChangedOut,
    response_model_exclude_unset=True,
    responses=errors_of(401),
)
async def remove_picture(current: SignedIn, changes: Changes) -> Any:
    """Have no picture any more."""
    return await changes.remove_picture(current)


@router.get("/all", response_model=EverybodyOut, response_model_exclude_unset=True, responses=errors_of(401))
async def everybody(_current: SignedIn, profiles: Profiles) -> Response:
    """All accounts, by name."""
    return await streamed("users", profiles.everybody())


@router.get("/admin/all", response_model=EverybodyForAdminOut, responses=errors_of(401, 403))
async def everybody_for_admin(_current: Administrator, profiles: Profiles) -> Response:
    """All users, by name; for administrators."""
    return await streamed("users", profiles.everybody_for_admin())


@router.get(
    "/lookup/{username:path}",
    response_model=LookupOut,
    response_model_exclude_unset=True,
    responses=errors_of(404),
)
async def look_up(username: str, profiles: Profiles) -> Any:
    """Whether a name has an account, in any letter case."""
    return await profiles.look_up(username)


@router.get(
    "/{usernameOrId:path}/profile",
    response_model=ProfileOut,
    response_model_exclude_unset=True,
    responses=errors_of(404),
)
async def profile(usernameOrId: str, response: Response, profiles: Profiles) -> Any:
    """The public profile of a user, by id, name, or a player's name."""
    response.headers["Cache-Control"] = "no-store"
    return await profiles.profile(usernameOrId)


@router.patch(
    "/{userId}/name",
    response_model=RenamedOut,
    response_model_exclude_unset=True,
    responses=errors_of(400, 401, 403, 404),
)
async def rename(userId: str, body: NewName, current: SignedIn, changes: Changes) -> Any:
    """Give oneself another name."""
    return await changes.rename(current, userId, body.name)


@router.put(
    "/{userId}/username",
    response_model=AccountChangedOut,
    response_model_exclude_unset=True,
    responses=errors_of(400, 401, 403, 404),
)
async def set_username(userId: str, body: NewUsername, current: Administrator, changes: Changes) -> Any:
    """Give somebody another name; for administrators."""
    return await changes.set_username(current, userId, body.username)


@router.put(
    "/{userId}/role",
    response_model=AccountChangedOut,
    response_model_exclude_unset=True,
    responses=errors_of(400, 401, 403, 404),
)
async def set_role(userId: str, body: NewRole, current: Administrator, changes: Changes) -> Any:
    """Give somebody another role; for administrators."""
    return await changes.set_role(current, userId, body.role)


@router.delete("/{userId:account}", response_model=DoneOut, responses=errors_of(401, 403, 404))
async def remove(userId: str, current: Administrator, changes: Changes) -> Any:
    """Delete somebody's account; for administrators."""
    return await changes.remove(current, userId)
