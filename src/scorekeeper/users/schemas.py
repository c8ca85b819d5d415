"""What the user routes take and give. Names are camelCase, as on the wire."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

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


class NewName(BaseModel):
    """The name that one wants to have."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [{"name": "Ann of Cleves"}]})

    name: Text


class NewUsername(BaseModel):
    """The name that somebody is to have."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [{"username": "Ann"}]})

    username: Text


class NewRole(BaseModel):
    """The role that somebody is to have."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [{"role": "admin"}]})

    role: Literal["user", "admin"]


class NewPicture(BaseModel):
    """A picture as a data URL: JPEG, PNG, GIF or WebP, 100 characters to 10 MiB."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={"examples": [{"profilePicture": "data:image/png;base64,iVBORw0KGgo..."}]},
    )

    profilePicture: Annotated[str, StringConstraints(strict=True)]


class PictureOut(BaseModel):
    """One's own picture, or null."""

    profilePicture: str | None


class PersonOut(BaseModel):
    """A user without role. ``createdAt`` is absent where the document has none."""

    id: str
    username: str
    createdAt: str | None = None
    profilePicture: str | None


class PictureChangedOut(BaseModel):
    """Answer to a change of one's picture."""

    message: str
    user: PersonOut


class RenamedOut(BaseModel):
    """Answer to a new name, with a token that has it."""

    message: str
    token: str
    user: UserOut


class AccountOut(BaseModel):
    """A user as an administrator's change is answered."""

    model_config = ConfigDict(populate_by_name=True)

    id_: str = Field(alias="_id")
    username: str
    role: str
    createdAt: str | None = None


class AccountChangedOut(BaseModel):
    """Answer to an administrator's change of an account."""

    message: str
    user: AccountOut


class DoneOut(BaseModel):
    """Answer to what has nothing else to say."""

    message: str


class EverybodyOut(BaseModel):
    """All accounts, by name."""

    users: list[UserOut]


class ListedOut(BaseModel):
    """A user in the administrators' list; null is what the document does not have."""

    model_config = ConfigDict(populate_by_name=True)

    id: str
    id_: str = Field(alias="_id")
    username: str
    email: str | None
    role: str
    createdAt: str | None
    lastLogin: str | None
    profilePicture: str | None


class EverybodyForAdminOut(BaseModel):
    """All users, by name."""

    users: list[ListedOut]


class ProfileOut(PersonOut):
    """A public profile. The games are as their own routes show them."""

    model_config = ConfigDict(populate_by_name=True)

    id_: str = Field(alias="_id")
    isRegisteredUser: bool
    totalGames: int
    totalWins: int
    identities: list[str]
    primaryIdentityId: str | None
    games: list[dict[str, Any]]


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
