"""What the friend routes take and give. Names are camelCase, as on the wire."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from scorekeeper.users.schemas import Text


class Asking(BaseModel):
    """Whom to ask."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [{"receiverId": "6" * 24}]})

    receiverId: Text


class RequestOut(BaseModel):
    """A friend request. ``createdAt`` is null where the document has none."""

    id: str
    sender: str
    receiver: str
    status: str
    createdAt: str | None


class AskedOut(BaseModel):
    """Answer to a new friend request."""

    message: str
    friendRequest: RequestOut


class FriendOut(BaseModel):
    """A friend, as lists show them."""

    id: str
    username: str
    createdAt: str | None = None
    profilePicture: str | None


class AcceptedOut(BaseModel):
    """Answer to an acceptance."""

    message: str
    friend: FriendOut


class FriendsOut(BaseModel):
    """One's friends."""

    friends: list[FriendOut]


class ReceivedRequest(BaseModel):
    """An open request to oneself. ``createdAt`` is absent where the document has none."""

    id: str
    sender: FriendOut
    status: str
    createdAt: Any = None


class SentRequest(BaseModel):
    """An open request of one's own."""

    id: str
    receiver: FriendOut
    status: str
    createdAt: Any = None


class ReceivedOut(BaseModel):
    """Open requests to oneself, the newest first."""

    requests: list[ReceivedRequest]


class SentOut(BaseModel):
    """One's own open requests, the newest first."""

    requests: list[SentRequest]


class EverythingOut(BaseModel):
    """Friends and the open requests of both sides."""

    friends: list[FriendOut]
    receivedRequests: list[ReceivedRequest]
    sentRequests: list[SentRequest]
