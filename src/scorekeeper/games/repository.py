"""Games as the stories ask for them; which store answers is Crossfade's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Final

from bson import ObjectId

from crossfade import EntityHandle, Record, any_of
from crossfade.query import Where
from scorekeeper.games.entity import LOCAL_ID_RULE
from scorekeeper.wire import now

#: Games of one portion of a list that is read whole: some are of several hundred KiB.
PORTION: Final = 50


class GameRepository:
    """The games of one collection."""

    def __init__(self, games: EntityHandle) -> None:
        self._games = games

    async def get(self, id_: str) -> Record | None:
        """The game of this id, as it is on the wire; old ids may be text that looks like an ObjectId."""
        return next(iter(await self._games.get_many(spellings(id_))), None)

    async def which_exist(self, ids: Iterable[str]) -> set[str]:
        """Those of these ids that there is a game for; in one question."""
        sought = [spelling for id_ in ids for spelling in spellings(id_)]
        return {str(game.id) for game in await self._games.get_many(sought)}

    async def of_local_id(self, local_id: str) -> Record | None:
        """The game that its client gave this id, or None."""
        return await self._games.find_by_key(LOCAL_ID_RULE, local_id)

    async def shared_as(self, share_id: str) -> Record | None:
        """A game that is shared under this id, the oldest of several, or None."""
        return await self._games.find_one({"shareId": share_id})

    async def newest(
        self, where: Where, *, skip: int = 0, limit: int, oldest_first: bool = False
    ) -> list[Record]:
        """A portion of a list by date."""
        order = "createdAt" if oldest_first else "-createdAt"
        return await self._games.find(where, order_by=order, skip=skip, limit=limit)

    async def in_portions(
        self, where: Mapping[str, Any], *, skip: int = 0, limit: int
    ) -> AsyncIterator[Record]:
        """A long list, newest first, read in portions that each begin behind the last one."""
        left = limit
        found = await self._games.find(where, order_by="-createdAt", skip=skip, limit=min(left, PORTION))
        while found:
            for game in found:
                yield game
            left -= len(found)
            if len(found) < PORTION or not left:
                return
            behind = (found[-1].get("createdAt"), found[-1].id)
            found = await self._games.find(
                where, order_by="-createdAt", after=behind, limit=min(left, PORTION)
            )

    async def count(self, where: Mapping[str, Any]) -> int:
        """How many games a list has."""
        return await self._games.count(where)

    async def create(self, user_id: Any, fields: Mapping[str, Any], *, context: str) -> Record:
        """A new game, laid out as the old back end lays out its documents.

        Raises:
            crossfade.DuplicateKey: there is a game with this ``localId``; decided by an index.
        """
        moment = now()
        document = {"userId": user_id, **fields, "createdAt": moment, "updatedAt": moment, "__v": 0}
        return await self._games.insert(document, context=context)

    async def share(self, game: Record, share_id: str) -> Record:
        """Let the game be found by anybody who knows this id."""
        moment = now()
        fields = {"shareId": share_id, "isShared": True, "sharedAt": moment, "updatedAt": moment}
        return await self._games.update(game.id, fields, context="Game Share")

    async def delete(self, game: Record, *, context: str) -> None:
        """Delete a game for good.

        Raises:
            crossfade.NotFound: it is gone already.
        """
        await self._games.delete(game.id, context=context)


def spellings(id_: str) -> tuple[Any, ...]:
    """How documents may spell an id that is text on the wire."""
    return (ObjectId(id_), id_) if len(id_) == 24 and ObjectId.is_valid(id_) else (id_,)


def owned_by(user_id: str) -> dict[str, Any]:
    """The condition that a game is this user's."""
    return {"userId": any_of(spellings(user_id))}
