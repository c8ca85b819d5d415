"""`/api/users/{userId}/friend…`: from HTTP to the service and back. One's own friends only."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from scorekeeper.auth.current import CurrentUser, SignedIn
from scorekeeper.errors import forbidden
from scorekeeper.friends.schemas import (
    AcceptedOut,
    AskedOut,
    Asking,
    EverythingOut,
    FriendsOut,
    ReceivedOut,
    SentOut,
)
from scorekeeper.friends.service import FriendService
from scorekeeper.routing import errors_of, of_app
from scorekeeper.users.schemas import DoneOut

router = APIRouter(prefix="/api/users/{userId}", tags=["friends"])


async def _oneself(userId: str, current: SignedIn) -> CurrentUser:
    if userId != current.id:
        raise forbidden("You can only manage your own friends")
    return current


Friends = Annotated[FriendService, of_app("friends")]
Oneself = Annotated[CurrentUser, Depends(_oneself)]


@router.get(
    "/friends", response_model=FriendsOut, response_model_exclude_unset=True, responses=errors_of(401, 403)
)
async def friends_of(current: Oneself, friends: Friends) -> Any:
    """One's friends."""
    return await friends.friends(current)


@router.get(
    "/friends/batch-check",
    response_model=EverythingOut,
    response_model_exclude_unset=True,
    responses=errors_of(401, 403),
)
async def everything(current: Oneself, friends: Friends) -> Any:
    """One's friends and the open requests of both sides, in one answer."""
    return await friends.everything(current)


@router.post(
    "/friends/{friendId}",
    response_model=AcceptedOut,
    response_model_exclude_unset=True,
    responses=errors_of(400, 401, 403, 404),
)
async def befriend(friendId: str, current: Oneself, friends: Friends) -> Any:
    """Make somebody a friend, on both sides."""
    return await friends.befriend(current, friendId)


@router.get(
    "/friend-requests/received",
    response_model=ReceivedOut,
    response_model_exclude_unset=True,
    responses=errors_of(401, 403),
)
async def received(current: Oneself, friends: Friends) -> Any:
    """Open requests to oneself."""
    return await friends.received(current)


@router.get(
    "/friend-requests/sent",
    response_model=SentOut,
    response_model_exclude_unset=True,
    responses=errors_of(401, 403),
)
async def sent(current: Oneself, friends: Friends) -> Any:
    """One's own open requests."""
    return await friends.sent(current)


@router.post(
    "/friend-requests",
    status_code=201,
    response_model=AskedOut,
    responses=errors_of(400, 401, 403, 404),
)
async def ask(body: Asking, current: Oneself, friends: Friends) -> Any:
    """Ask somebody to be a friend."""
    return await friends.ask(current, body.receiverId)


@router.post(
    "/friend-requests/{requestId}/accept",
    response_model=AcceptedOut,
    response_model_exclude_unset=True,
    responses=errors_of(400, 401, 403, 404),
)
async def accept(requestId: str, current: Oneself, friends: Friends) -> Any:
    """Become friends of each other."""
    return await friends.accept(current, requestId)


@router.post(
    "/friend-requests/{requestId}/reject", response_model=DoneOut, responses=errors_of(400, 401, 403, 404)
)
async def reject(requestId: str, current: Oneself, friends: Friends) -> Any:
    """Turn a request down."""
    return await friends.reject(current, requestId)


@router.delete(
    "/friend-requests/{requestId}", response_model=DoneOut, responses=errors_of(400, 401, 403, 404)
)
async def cancel(requestId: str, current: Oneself, friends: Friends) -> Any:
    """Take one's own request back."""
    return await friends.cancel(current, requestId)


@router.delete("/friends/{friendId}", response_model=DoneOut, responses=errors_of(400, 401, 403))
async def part(friendId: str, current: Oneself, friends: Friends) -> Any:
    """End a friendship, on both sides."""
    return await friends.part(current, friendId)
