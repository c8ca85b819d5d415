"""What the game routes take and give. Games are free in form, and so are their documents here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from scorekeeper.users.schemas import ProblemOut, Text

#: As sent. Judged by the service, which names every fault at once; the framework would stop at the first.
_Object = Annotated[Any, WithJsonSchema({"type": "object", "additionalProperties": True})]
_String = Annotated[Any, WithJsonSchema({"type": "string", "minLength": 1, "maxLength": 200})]

#: A game's document: ``_id``, ``gameData``, dates and what else it has.
GameDocument = dict[str, Any]

_ROUND = {"round": 1, "players": [{"id": f"p{n}", "call": 0, "made": n % 2, "score": 20} for n in (1, 2, 3)]}
_WIZARD_GAME: dict[str, Any] = {
    "localId": "game_1767225600000_1",
    "gameData": {
        "version": "3.0",
        "created_at": "2026-01-31T10:30:00.000Z",
        "total_rounds": 1,
        "players": [{"id": f"p{n}", "name": name} for n, name in enumerate(("Ann", "Bob", "Cid"), 1)],
        "round_data": [_ROUND],
        "final_scores": {"p1": 20, "p2": 20, "p3": 20},
        "winner_ids": ["p1", "p2", "p3"],
    },
}
_TABLE_GAME: dict[str, Any] = {
    "localId": "table_1767225600000_1",
    "gameData": {
        "gameName": "Skat",
        "rows": 2,
        "gameFinished": True,
        "players": [{"name": "Ann", "points": [18, 20]}, {"name": "Bob", "points": [0, 24]}],
    },
}


class WizardGameSent(BaseModel):
    """A game of Wizard in format 3.0, with the id that its client gave it."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [_WIZARD_GAME]})

    gameData: _Object = None
    localId: _String = None


class TableGameSent(BaseModel):
    """A table game, with the id that its client gave it."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [_TABLE_GAME]})

    gameData: _Object = None
    localId: _String = None


class GamesSought(BaseModel):
    """Which games to look for."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [{"gameIds": ["6" * 24]}]})

    gameIds: Annotated[list[Any], Field(min_length=1, max_length=100)]


class Sharing(BaseModel):
    """The id to share a game under, made up by the client."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [{"shareId": "share-1a2b3c"}]})

    shareId: Text


class KeptGame(BaseModel):
    """A game of Wizard that was kept."""

    id: str
    localId: str
    version: str
    createdAt: str


class WizardGameKept(BaseModel):
    """Answer to a new game of Wizard."""

    message: str
    game: KeptGame


class InvalidGame(ProblemOut):
    """400: ``validationErrors`` has a sentence for each fault of the data."""

    validationErrors: list[str] | None = None


class ExistingGame(BaseModel):
    """The game that was there before."""

    id: str
    localId: Any


class GameExists(ProblemOut):
    """409: there is a game of this local id."""

    existingGame: ExistingGame


class Pagination(BaseModel):
    """Where in the whole list a portion is."""

    currentPage: int
    totalPages: int
    hasNextPage: bool
    hasPrevPage: bool


class WizardGamesOut(BaseModel):
    """A portion of a list of games."""

    games: list[GameDocument]
    total: int
    limit: int
    skip: int
    pagination: Pagination


class TableGamesOut(BaseModel):
    """A list of table games; ``total`` counts the whole of it."""

    games: list[GameDocument]
    total: int


class FoundOut(BaseModel):
    """For each id whether there is a game."""

    results: dict[str, bool]


class GameOut(BaseModel):
    """A game."""

    game: GameDocument


class TableGameKept(BaseModel):
    """Answer to a table game: a new one, or the one of this local id that is there."""

    game: GameDocument
    duplicate: bool
    message: str | None = None


class RecentOut(BaseModel):
    """Everybody's newest games."""

    games: list[dict[str, Any]]
    totalGames: int


class SharedGame(BaseModel):
    """What sharing changed."""

    id: str
    shareId: Any
    isShared: Any
    sharedAt: Any


class SharedOut(BaseModel):
    """Answer to sharing a game."""

    message: str
    game: SharedGame
