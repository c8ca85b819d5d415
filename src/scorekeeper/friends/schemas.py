"""What the friend routes take and give. Names are camelCase, as on the wire."""

from __future__ import annotations

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


class DoneOut(BaseModel):
    """Answer to what has nothing else to say."""

    message: str
