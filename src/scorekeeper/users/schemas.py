"""What the user routes take and give. Names are camelCase, as on the wire."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints

#: Longer than any password or name that counts; what is longer is refused before any work is done on it.
Text = Annotated[str, StringConstraints(strict=True, max_length=4096)]


class Credentials(BaseModel):
    """A name and a password."""

    model_config = ConfigDict(
        extra="ignore", json_schema_extra={"examples": [{"username": "Ann", "password": "correct horse"}]}
    )

    username: Text
    password: Text


class UserOut(BaseModel):
    """A user. ``createdAt`` is absent where the document has none."""

    id: str
    username: str
    role: str
    createdAt: str | None = None
    profilePicture: str | None


class IdentityOut(BaseModel):
    """A player identity of a user; the nested values are as stored."""

    model_config = ConfigDict(populate_by_name=True, extra="allow")

    displayName: Any
    aliases: Any
    nameHistory: Any
    eloByGameType: Any
    linkedIdentities: Any


class OwnUserOut(UserOut):
    """The user who is signed in, with their identities."""

    identities: list[IdentityOut]


class RegisteredOut(BaseModel):
    """Answer to a registration."""

    message: str
    token: str
    user: UserOut


class LoggedInOut(BaseModel):
    """Answer to a log-in."""

    message: str
    token: str
    user: OwnUserOut


class OwnUserAnswer(BaseModel):
    """Answer to `/me` and `/profile`."""

    user: OwnUserOut


class FoundUser(BaseModel):
    """A user as a look-up by name shows them."""

    id: str
    username: str
    createdAt: str | None = None


class LookupOut(BaseModel):
    """Answer to a look-up that found somebody."""

    found: bool
    user: FoundUser


class ProblemOut(BaseModel):
    """Every error: problem details (RFC 9457), and ``error`` for the client."""

    model_config = ConfigDict(extra="allow")

    error: str
    type: str
    title: str
    status: int
    detail: str
