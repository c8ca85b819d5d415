"""The stories of games of Wizard: sent once, listed, shown, deleted."""

from __future__ import annotations

from typing import Any

from crossfade import DuplicateKey, NotFound, Record
from scorekeeper import names
from scorekeeper.auth.current import CurrentUser
from scorekeeper.errors import Problem, forbidden
from scorekeeper.games.data import faults_of_wizard_game
from scorekeeper.games.guests import Players
from scorekeeper.games.paging import Portion, pages
from scorekeeper.games.repository import GameRepository, owned_by
from scorekeeper.games.sending import is_id, judged, no_such_game, of_local_id, wire_id
from scorekeeper.games.shown import document_of, listed
from scorekeeper.wire import document_id, plain


class WizardGameService:
    """Games of Wizard. Knows no HTTP and no store."""

    def __init__(self, games: GameRepository, players: Players) -> None:
        self._games = games
        self._players = players

    async def create(self, current: CurrentUser, sent: Any, local_id: Any) -> dict[str, Any]:
        """Keep a game; players who have no identity are given a guest's.

        Raises:
            Problem: 400 with ``validationErrors``; 409 with ``existingGame``, a game of this local id is there.
        """
        data = judged(sent, local_id, faults_of_wizard_game)
        there = await self._games.of_local_id(local_id)
        if there is not None:
            raise _exists(there)
        fields = {
            "localId": local_id,
            "gameData": await self._players.identified(data, by=current.id),
            "isShared": False,
            "sharedAt": None,
            "migratedFrom": None,
            "migratedAt": None,
            "originalGameId": None,
        }
        try:
            game = await self._games.create(document_id(current.id), fields, context="Wizard Game")
        except DuplicateKey:
            # Of two that are sent at once, one is kept.
            raise _exists(await of_local_id(self._games, local_id)) from None
        return {
            "message": "Wizard game created successfully",
            "game": {
                "id": plain(game.id),
                "localId": local_id,
                "version": data["version"],
                "createdAt": plain(game.get("createdAt")),
            },
        }

    async def list_games(
        self, current: CurrentUser, portion: Portion, *, everybodys: bool, oldest_first: bool
    ) -> dict[str, Any]:
        """A portion of one's own games, or of everybody's."""
        where = {} if everybodys else owned_by(current.id)
        total = await self._games.count(where)
        found: list[Record] = []
        if portion.skip < total:
            found = await self._games.newest(
                where, skip=portion.skip, limit=portion.limit, oldest_first=oldest_first
            )
        return {"games": [listed(game) for game in found], **pages(portion, total)}

    async def show(self, game_id: str) -> dict[str, Any]:
        """The document of a game.

        Raises:
            Problem: 400, malformed id; 404.
        """
        return document_of(await self._existing(game_id))

    async def which_exist(self, ids: list[Any]) -> dict[str, Any]:
        """For each of these ids whether there is a game."""
        texts = [id_ for id_ in ids if isinstance(id_, str) and names.is_unicode(id_)]
        there = await self._games.which_exist({text.lower() for text in texts if is_id(text)})
        return {"results": {text: text.lower() in there for text in texts}}

    async def delete(self, current: CurrentUser, game_id: str) -> dict[str, Any]:
        """Delete one's own game.

        Raises:
            Problem: 400, malformed id; 403, somebody else's; 404.
        """
        game = await self._existing(game_id)
        if str(game.get("userId")) != current.id:
            raise forbidden("You can only delete your own games")
        try:
            await self._games.delete(game, context="Wizard Game Deletion")
        except NotFound:
            raise no_such_game() from None
        return {"message": "Wizard game deleted successfully"}

    async def _existing(self, game_id: str) -> Record:
        game = await self._games.get(wire_id(game_id))
        if game is None:
            raise no_such_game()
        return game


def _exists(game: Record) -> Problem:
    existing = {"id": plain(game.id), "localId": plain(game.get("localId"))}
    return Problem(409, "game-exists", "Game already exists", members={"existingGame": existing})
