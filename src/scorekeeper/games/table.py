"""The stories of table games: sent, listed, shown to those who played, deleted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from crossfade import DuplicateKey, NotFound, Record
from scorekeeper import names
from scorekeeper.auth.current import CurrentUser
from scorekeeper.errors import forbidden
from scorekeeper.games.data import faults_of_players, innermost, players_of
from scorekeeper.games.guests import Players
from scorekeeper.games.paging import Portion
from scorekeeper.games.repository import GameRepository, owned_by
from scorekeeper.games.sending import judged, no_such_game, of_local_id, wire_id
from scorekeeper.games.shown import document_of, listed, public_table_game
from scorekeeper.wire import document_id, now

#: Games of one answer: the client asks for no portions, and more would be an answer of tens of megabytes.
MOST_LISTED: Final = 2000


class TableGameService:
    """Table games. Knows no HTTP and no store."""

    def __init__(self, games: GameRepository, players: Players) -> None:
        self._games = games
        self._players = players

    async def create(self, current: CurrentUser, sent: Any, local_id: Any) -> tuple[dict[str, Any], bool]:
        """Keep a game: the answer, and whether it is a new one; of one local id there is one game.

        Raises:
            Problem: 400, with ``validationErrors`` where its players cannot be.
        """
        data = judged(sent, local_id, faults_of_players)
        there = await self._games.of_local_id(local_id)
        if there is not None:
            return _duplicate(there), False
        identified = await self._players.identified(data, by=current.id)
        fields = {**_described(data), "gameData": identified, "localId": local_id}
        try:
            game = await self._games.create(document_id(current.id), _in_order(fields), context="Table Game")
        except DuplicateKey:
            return _duplicate(await of_local_id(self._games, local_id)), False
        return {"game": document_of(game), "duplicate": False}, True

    async def list_games(self, current: CurrentUser, portion: Portion, *, everybodys: bool) -> dict[str, Any]:
        """One's own games, or everybody's, newest first; ``total`` counts those that are left out, too."""
        where = {} if everybodys else owned_by(current.id)
        games = [
            listed(game)
            async for game in self._games.in_portions(where, skip=portion.skip, limit=portion.limit)
        ]
        whole = portion.skip == 0 and len(games) < portion.limit
        return {"games": games, "total": len(games) if whole else await self._games.count(where)}

    async def show(self, current: CurrentUser, game_id: str) -> dict[str, Any]:
        """A game, to its owner and to those who played.

        Raises:
            Problem: 400, malformed id; 403, neither; 404.
        """
        game = await self._existing(game_id)
        if str(game.get("userId")) != current.id and not await self._played(current, game):
            raise forbidden("You do not have permission to view this game")
        return {"game": document_of(game)}

    async def show_to_anybody(self, game_id: str) -> dict[str, Any]:
        """A game without whose it is.

        Raises:
            Problem: 400, malformed id; 404.
        """
        return {"game": public_table_game(await self._existing(game_id))}

    async def delete(self, current: CurrentUser, game_id: str) -> dict[str, Any]:
        """Delete one's own game.

        Raises:
            Problem: 400, malformed id; 403, somebody else's; 404.
        """
        game = await self._existing(game_id)
        if str(game.get("userId")) != current.id:
            raise forbidden("You can only delete your own games")
        try:
            await self._games.delete(game, context="Table Game Deletion")
        except NotFound:
            raise no_such_game() from None
        return {"message": "Table game deleted successfully"}

    async def _played(self, current: CurrentUser, game: Record) -> bool:
        players = [player for player in players_of(game.get("gameData")) if isinstance(player, Mapping)]
        if any(str(player.get("id")) == current.id for player in players):
            return True
        own_name = names.normal_form(current.username)
        if any(names.normal_form(str(player.get("name") or "")) == own_name for player in players):
            return True
        own = await self._players.identities_of(current.id)
        return any(str(player.get("identityId")) in own for player in players)

    async def _existing(self, game_id: str) -> Record:
        game = await self._games.get(wire_id(game_id))
        if game is None:
            raise no_such_game()
        return game


def _duplicate(game: Record) -> dict[str, Any]:
    message = "Table game already exists with this localId"
    return {"game": document_of(game), "duplicate": True, "message": message}


def _described(data: Mapping[str, Any]) -> dict[str, Any]:
    """What the document says of its data, so that lists need not look into it."""
    inner = innermost(data)

    def first_text(*fields: str) -> str | None:
        values = (holder.get(field) for field in fields for holder in (inner, data))
        return next((value for value in values if isinstance(value, str) and value), None)

    def number(field: str) -> int | float | None:
        value = inner.get(field)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    type_name = first_text("gameName", "gameTypeName")
    return {
        "name": type_name or first_text("name") or f"Table Game - {now():%Y-%m-%d}",
        "gameType": "table",
        "gameTypeName": type_name,
        "gameFinished": bool(inner.get("gameFinished")),
        "playerCount": len(players_of(data)),
        "totalRounds": number("rows") or 0,
        "targetNumber": number("targetNumber") or None,
        "lowIsBetter": bool(inner.get("lowIsBetter")),
    }


def _in_order(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as the old back end orders them."""
    order = ("name", "gameType", "gameTypeName", "gameData")
    return {**{name: fields[name] for name in order}, **fields}
