"""The stories of games that anybody may see: the newest of all, and those that their owners share."""

from __future__ import annotations

import asyncio
from typing import Any

from crossfade import Record
from scorekeeper.auth.current import CurrentUser
from scorekeeper.errors import Problem, forbidden
from scorekeeper.games.repository import GameRepository
from scorekeeper.games.sending import check_made_up_id, is_made_up_id, no_such_game, wire_id
from scorekeeper.games.shown import recent_table_game, recent_wizard_game
from scorekeeper.wire import plain


class PublicGames:
    """Games as everybody sees them.

    Args:
        wizard: games of Wizard, format 3.0.
        older: games of the formats before.
        table: table games.
    """

    def __init__(self, wizard: GameRepository, older: GameRepository, table: GameRepository) -> None:
        self._wizard = wizard
        self._older = older
        self._table = table

    async def recent(self, limit: int) -> dict[str, Any]:
        """Everybody's newest games of Wizard and finished table games."""
        wizard, table = await asyncio.gather(
            self._wizard.newest({}, limit=limit), self._table.newest({"gameFinished": True}, limit=limit)
        )
        shown = [*map(recent_wizard_game, wizard), *map(recent_table_game, table)]
        # Dates are written so that their order is that of their text.
        shown.sort(key=lambda game: str(game["created_at"] or ""), reverse=True)
        return {"games": shown[:limit], "totalGames": min(len(shown), limit)}

    async def share(self, current: CurrentUser, game_id: str, share_id: str) -> dict[str, Any]:
        """Let one's own game of Wizard be found by an id that the client made up.

        Raises:
            Problem: 400, malformed; 403, somebody else's; 404; 409, another game is shared under this id.
        """
        check_made_up_id(share_id, "shareId")
        game = await self._wizard.get(wire_id(game_id))
        if game is None:
            raise no_such_game()
        if str(game.get("userId")) != current.id:
            raise forbidden("You can only share your own games")
        # Looked for, not ruled by an index: old data has share ids that several games carry.
        other = await self._shared_as(share_id)
        if other is not None and other.id != game.id:
            raise Problem(409, "share-id-taken", "Share ID already in use")
        shared = await self._wizard.share(game, share_id)
        fields = ("shareId", "isShared", "sharedAt")
        return {
            "message": "Game shared successfully",
            "game": {"id": plain(shared.id), **{name: plain(shared.get(name)) for name in fields}},
        }

    async def shared(self, share_id: str) -> dict[str, Any]:
        """The game that is shared under an id.

        Raises:
            Problem: 404.
        """
        game = await self._shared_as(share_id) if is_made_up_id(share_id) else None
        if game is None:
            raise Problem(404, "not-found", "Shared game not found")
        fields = ("gameData", "shareId", "sharedAt", "createdAt")
        shown = {name: plain(game.get(name)) for name in fields if name in game.document}
        return {"game": {"id": plain(game.id), **shown}}

    async def _shared_as(self, share_id: str) -> Record | None:
        for games in (self._wizard, self._older):
            game = await games.shared_as(share_id)
            if game is not None:
                return game
        return None
