"""What the identity routes take and give. Names are camelCase, as on the wire.

Documents of the old back end are free enough that their fields are typed no further than they are sure to be.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StringConstraints

from scorekeeper.users.schemas import Text

#: An id on the wire: 24 hex characters, or what another tool made.
Id = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256)]
#: Identities that one request may link, or merge.
MOST_AT_ONCE = 20
Ids = Annotated[list[Id], Field(min_length=1, max_length=MOST_AT_ONCE)]
_EXAMPLE = "6" * 24


class _In(BaseModel):
    model_config = ConfigDict(extra="ignore", populate_by_name=True)


class NewAlias(_In):
    """One more name for an identity."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"aliasName": "Annie"}]})

    aliasName: Text = Field(validation_alias=AliasChoices("aliasName", "alias", "name"))


class Guest(_In):
    """A guest to link, or to unlink."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"guestIdentityId": _EXAMPLE}]})

    guestIdentityId: Id = Field(validation_alias=AliasChoices("guestIdentityId", "identityId"))


class Guests(_In):
    """Guests to link."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"guestIdentityIds": [_EXAMPLE]}]})

    guestIdentityIds: Ids = Field(validation_alias=AliasChoices("guestIdentityIds", "identityIds"))


class GuestOfUser(_In):
    """A guest, and the user that it is linked to."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"guestIdentityId": _EXAMPLE, "userId": "7" * 24}]}
    )

    guestIdentityId: Id
    userId: Id


class Assignment(_In):
    """An identity, and the user whose it becomes."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"identityId": _EXAMPLE, "userId": "7" * 24}]})

    identityId: Id
    userId: Id


class Merging(_In):
    """Identities to merge, and into which."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"targetId": _EXAMPLE, "sourceIds": ["7" * 24]}]}
    )

    targetId: Id = Field(validation_alias=AliasChoices("targetId", "targetIdentityId", "primaryIdentityId"))
    sourceIds: Ids = Field(
        validation_alias=AliasChoices("sourceIds", "sourceIdentityIds", "identityIds", "identitiesToMerge")
    )


class Splitting(_In):
    """An alias to make a guest of its own."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"identityId": _EXAMPLE, "aliasName": "Annie"}]}
    )

    identityId: Id
    aliasName: Text = Field(validation_alias=AliasChoices("aliasName", "alias", "name"))


class IdentityDocument(BaseModel):
    """A player identity as it is stored, with every field that it has."""

    model_config = ConfigDict(populate_by_name=True, extra="allow")

    id: str = Field(alias="_id")


class Pagination(BaseModel):
    """Where in a list one is."""

    page: int
    limit: int
    total: int
    pages: int


class IdentitiesOut(BaseModel):
    """One page of identities."""

    identities: list[IdentityDocument]
    pagination: Pagination


class IdentityStats(BaseModel):
    """Games of one identity, those linked to it among them."""

    id: str = Field(alias="_id")
    displayName: str
    type: Any
    totalGames: int
    totalWins: int
    lastGameAt: str | None


class OwnStats(BaseModel):
    """Games of all of one's own identities."""

    identities: int
    totalGames: int
    totalWins: int
    lastGameAt: str | None
    identityDetails: list[IdentityStats]


class OwnIdentitiesOut(BaseModel):
    """One's own identities."""

    identities: list[IdentityDocument]
    stats: OwnStats


class StandsFor(BaseModel):
    """The identity at the end of a chain of merges."""

    id: str = Field(alias="_id")
    displayName: str
    userId: Any


class IdentityDetailOut(BaseModel):
    """One identity. ``standsFor`` only of one that was linked: for whom it stands, null where that is nobody."""

    identity: IdentityDocument
    recentGames: list[dict[str, Any]]
    standsFor: StandsFor | None = None


class IdentityChangedOut(BaseModel):
    """Answer to a change of one identity."""

    message: str
    identity: IdentityDocument


class GamesUpdated(BaseModel):
    """How many games have followed."""

    tableGames: int
    wizardGames: int


class LinkedOut(BaseModel):
    """Answer to linking and unlinking."""

    message: str
    guestIdentity: IdentityDocument
    userIdentity: IdentityDocument | None
    gamesUpdated: GamesUpdated


class LinkedGuest(BaseModel):
    """One guest that was linked."""

    id: str
    guestIdentity: IdentityDocument
    gamesUpdated: GamesUpdated


class NotLinked(BaseModel):
    """One guest that was not linked, and why."""

    id: str
    errors: list[str]


class ManyLinkedOut(BaseModel):
    """Answer to linking several guests; ``success``: all of them."""

    success: bool
    linked: list[LinkedGuest]
    failed: list[NotLinked]
    totalGamesUpdated: int


class SuggestionOut(BaseModel):
    """A guest that may be this user; ``exact``: by a name that the user has or had."""

    id: str = Field(alias="_id")
    displayName: str
    gameCount: int
    lastSeen: Any
    exact: bool


class SuggestionsOut(BaseModel):
    """Guests that may be this user, the likeliest first."""

    suggestions: list[SuggestionOut]


class MyIdentitiesOut(BaseModel):
    """One's own identities, and those linked to them."""

    identities: list[IdentityDocument]
    linkedIdentities: list[IdentityDocument]


class LinkedToUser(BaseModel):
    """The user that a guest is linked to."""

    id: str = Field(alias="_id")
    username: str


class GuestOut(BaseModel):
    """A guest."""

    id: str = Field(alias="_id")
    displayName: str
    gameCount: int
    lastSeen: Any
    linkedAt: Any
    linkedToUser: LinkedToUser | None


class GuestsOut(BaseModel):
    """One page of guests."""

    identities: list[GuestOut]
    pagination: Pagination


class MergedOut(BaseModel):
    """Answer to a merge."""

    message: str
    identity: IdentityDocument
    merged: list[str]
    gamesUpdated: GamesUpdated


class SplitOut(BaseModel):
    """Answer to a split."""

    message: str
    identity: IdentityDocument
    newIdentity: IdentityDocument


class RatingOut(BaseModel):
    """A rating as stored; only ``hasIdentity`` where there is no identity."""

    hasIdentity: bool
    gameType: str | None = None
    allGameTypes: list[str] | None = None
    identityId: str | None = None
    displayName: str | None = None
    currentRating: Any = None
    peak: Any = None
    floor: Any = None
    gamesPlayed: Any = None
    streak: Any = None
    history: list[Any] | None = None


class RatingsOut(BaseModel):
    """All ratings as stored; only ``hasIdentity`` where there is no identity."""

    hasIdentity: bool
    eloByGameType: dict[str, Any] | None = None
    gameTypes: list[str] | None = None
