"""`/api/wizard-games`, `/api/table-games`, `/api/games`: from HTTP to the services and back."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from scorekeeper.auth.current import SignedIn
from scorekeeper.games.everybodys import PublicGames
from scorekeeper.games.paging import number_in, portion
from scorekeeper.games.schemas import (
    FoundOut,
    GameDocument,
    GameExists,
    GameOut,
    GamesSought,
    InvalidGame,
    RecentOut,
    SharedOut,
    Sharing,
    TableGameKept,
    TableGameSent,
    TableGamesOut,
    WizardGameKept,
    WizardGameSent,
    WizardGamesOut,
)
from scorekeeper.games.table import MOST_LISTED, TableGameService
from scorekeeper.games.wizard import WizardGameService
from scorekeeper.routing import errors_of, of_app
from scorekeeper.users.schemas import DoneOut

router = APIRouter(tags=["games"])

#: Games in a portion of a list where the client does not say how many, and at most.
USUAL, MOST = 50, 200
#: Everybody's newest games in one answer at most.
MOST_RECENT = 100


Wizard = Annotated[WizardGameService, of_app("wizard_games")]
Tables = Annotated[TableGameService, of_app("table_games")]
Public = Annotated[PublicGames, of_app("public_games")]

#: Read as the old back end reads it: see `scorekeeper.games.paging`.
Number = Annotated[str | None, Query(max_length=32, json_schema_extra={"examples": ["1"]})]
Word = Annotated[str | None, Query(max_length=32)]


@router.get("/api/wizard-games", response_model=WizardGamesOut, responses=errors_of(401))
async def list_wizard_games(
    current: SignedIn,
    games: Wizard,
    page: Number = None,
    skip: Number = None,
    limit: Number = None,
    sortOrder: Word = None,
    allGames: Word = None,
) -> Any:
    """One's own games of Wizard, or everybody's, newest first."""
    return await games.list_games(
        current,
        portion(page, skip, limit, usual=USUAL, most=MOST),
        everybodys=allGames == "true",
        oldest_first=sortOrder == "asc",
    )


@router.post(
    "/api/wizard-games",
    status_code=201,
    response_model=WizardGameKept,
    responses={**errors_of(401), 400: {"model": InvalidGame}, 409: {"model": GameExists}},
)
async def keep_wizard_game(body: WizardGameSent, current: SignedIn, games: Wizard) -> Any:
    """Keep a game of Wizard."""
    return await games.create(current, body.gameData, body.localId)


@router.post("/api/wizard-games/batch-check", response_model=FoundOut, responses=errors_of(400, 401))
async def check_wizard_games(body: GamesSought, current: SignedIn, games: Wizard) -> Any:  # noqa: ARG001
    """Which of these games there are."""
    return await games.which_exist(body.gameIds)


@router.get("/api/wizard-games/public/{id}", response_model=GameDocument, responses=errors_of(400, 404))
async def show_wizard_game_to_anybody(id: str, games: Wizard) -> Any:
    """A game of Wizard, to anybody who knows its id."""
    return await games.show(id)


@router.get("/api/wizard-games/{id}", response_model=GameDocument, responses=errors_of(400, 401, 404))
async def show_wizard_game(id: str, current: SignedIn, games: Wizard) -> Any:  # noqa: ARG001
    """A game of Wizard."""
    return await games.show(id)


@router.delete("/api/wizard-games/{id}", response_model=DoneOut, responses=errors_of(400, 401, 403, 404))
async def delete_wizard_game(id: str, current: SignedIn, games: Wizard) -> Any:
    """Delete one's own game of Wizard."""
    return await games.delete(current, id)


@router.get("/api/table-games", response_model=TableGamesOut, responses=errors_of(401))
async def list_table_games(
    current: SignedIn,
    games: Tables,
    page: Number = None,
    skip: Number = None,
    limit: Number = None,
    allGames: Word = None,
) -> Any:
    """One's own table games, or everybody's, newest first."""
    asked = portion(page, skip, limit, usual=MOST_LISTED, most=MOST_LISTED)
    return await games.list_games(current, asked, everybodys=allGames == "true")


@router.post(
    "/api/table-games",
    status_code=201,
    response_model=TableGameKept,
    response_model_exclude_unset=True,
    responses={
        **errors_of(401),
        200: {"model": TableGameKept, "description": "There is a game of this local id."},
        400: {"model": InvalidGame},
    },
)
async def keep_table_game(body: TableGameSent, current: SignedIn, games: Tables, response: Response) -> Any:
    """Keep a table game."""
    answer, is_new = await games.create(current, body.gameData, body.localId)
    response.status_code = 201 if is_new else 200
    return answer


@router.get("/api/table-games/public/{id}", response_model=GameOut, responses=errors_of(400, 404))
async def show_table_game_to_anybody(id: str, games: Tables) -> Any:
    """A table game, to anybody who knows its id."""
    return await games.show_to_anybody(id)


@router.get("/api/table-games/{id}", response_model=GameOut, responses=errors_of(400, 401, 403, 404))
async def show_table_game(id: str, current: SignedIn, games: Tables) -> Any:
    """A table game, to those who played it."""
    return await games.show(current, id)


@router.delete("/api/table-games/{id}", response_model=DoneOut, responses=errors_of(400, 401, 403, 404))
async def delete_table_game(id: str, current: SignedIn, games: Tables) -> Any:
    """Delete one's own table game."""
    return await games.delete(current, id)


@router.get("/api/games/recent", response_model=RecentOut, responses=errors_of())
async def recent_games(games: Public, limit: Number = None) -> Any:
    """Everybody's newest games."""
    return await games.recent(number_in(limit, USUAL, low=1, high=MOST_RECENT))


@router.get("/api/games/shared/{shareId}", response_model=GameOut, responses=errors_of(404))
async def show_shared_game(shareId: str, games: Public) -> Any:
    """A game that its owner shares."""
    return await games.shared(shareId)


@router.put("/api/games/{id}/share", response_model=SharedOut, responses=errors_of(400, 401, 403, 404, 409))
async def share_game(id: str, body: Sharing, current: SignedIn, games: Public) -> Any:
    """Share one's own game of Wizard."""
    return await games.share(current, id, body.shareId)
