"""Games follow their players' identities: when one is merged its games become the target's, and when that is undone
they become its own again.

Each game is changed by itself, and may be changed any number of times. A crash in between leaves games that name the
merged identity, and that one leads to the right one; doing it again does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from crossfade import EntityHandle, Migration, NotFound, Record, StaleRevision, any_of
from scorekeeper.games.entity import NESTED_PLAYERS, PLAYERS
from scorekeeper.games.shown import recent_table_game, recent_wizard_game
from scorekeeper.identities.players import given_back, handed_over, spellings
from scorekeeper.wire import now

#: Games read at a time: some are of several hundred KiB.
PORTION: Final = 20
#: How often a game that somebody else changes meanwhile is read again.
ATTEMPTS: Final = 5

#: From ``gameData`` to what it is to be; None: it is to stay.
Change = Callable[[Any], Any]


#: Fields with what they are to hold; all of it.
Condition = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Played:
    """One entity of games: "table" or "wizard", and where its documents name the identities of their players."""

    kind: str
    games: EntityHandle
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GamesMoved:
    """How many games have changed hands."""

    table_games: int = 0
    wizard_games: int = 0

    def __add__(self, other: GamesMoved) -> GamesMoved:
        return GamesMoved(self.table_games + other.table_games, self.wizard_games + other.wizard_games)

    @property
    def total(self) -> int:
        """Of both kinds."""
        return self.table_games + self.wizard_games

    def shown(self) -> dict[str, int]:
        """As the client knows it."""
        return {"tableGames": self.table_games, "wizardGames": self.wizard_games}


class PlayedGames:
    """The games of players, as far as identities touch them."""

    def __init__(self, accounts: Migration) -> None:
        self._played = (
            _Played("table", accounts["table_games"], (PLAYERS, NESTED_PLAYERS)),
            _Played("wizard", accounts["wizard_games"], (PLAYERS,)),
            # Formats 1.0 and 2.0.
            _Played("wizard", accounts["games"], (PLAYERS,)),
        )

    async def follow(self, merged: Any, target: Any) -> GamesMoved:
        """Let the games of a merged identity be its target's."""

        def wanted(path: str) -> list[Condition]:
            return [{path: any_of(spellings(merged))}]

        return await self._change(wanted, lambda data: handed_over(data, merged, target))

    async def give_back(self, merged: Any, holders: Collection[Any]) -> GamesMoved:
        """Let the games that were ``merged``'s, and are one of the holders' now, be its own again."""
        held_by = any_of([spelling for holder in holders for spelling in spellings(holder)])

        def wanted(path: str) -> list[Condition]:
            players = path.removesuffix("identityId")
            return [
                {path: held_by, f"{players}{past}": any_of(spellings(merged))}
                for past in ("previousIdentityId", "earlierIdentityIds")
            ]

        return await self._change(wanted, lambda data: given_back(data, merged, holders))

    async def newest_of(self, identity: Any, limit: int) -> list[dict[str, Any]]:
        """The newest games of an identity, of all kinds, as the list of everybody's newest has them."""
        shown: list[dict[str, Any]] = []
        for played in self._played:
            where = [{path: any_of(spellings(identity))} for path in played.paths]
            found = await played.games.find(where, order_by="-createdAt", limit=limit)
            as_listed = recent_table_game if played.kind == "table" else recent_wizard_game
            shown += map(as_listed, found)
        shown.sort(key=lambda game: str(game["created_at"] or ""), reverse=True)
        return shown[:limit]

    async def _change(self, wanted: Callable[[str], list[Condition]], change: Change) -> GamesMoved:
        moved = GamesMoved()
        for played in self._played:
            where = [condition for path in played.paths for condition in wanted(path)]
            number = await self._change_each(played.games, where, change)
            moved += GamesMoved(number, 0) if played.kind == "table" else GamesMoved(0, number)
        return moved

    async def _change_each(self, games: EntityHandle, where: Sequence[Condition], change: Change) -> int:
        moved, after = 0, None
        while True:
            found = await games.find(where, after=after, limit=PORTION)
            for game in found:
                moved += await self._change_one(games, game, change)
            if len(found) < PORTION:
                return moved
            after = (found[-1].id,)

    async def _change_one(self, games: EntityHandle, game: Record, change: Change) -> bool:
        current: Record | None = game
        for attempt in range(1, ATTEMPTS + 1):
            data = None if current is None else change(current.get("gameData"))
            if current is None or data is None:
                return False
            try:
                await games.update(
                    game.id,
                    {"gameData": data, "updatedAt": now()},
                    if_revision=current.rev,
                    context="Game Handover",
                )
            except NotFound:
                return False
            except StaleRevision:
                if attempt == ATTEMPTS:
                    raise
                current = await games.get(game.id)
            else:
                return True
        return False
