"""The games that somebody played, as their profile shows them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, Final

from crossfade import Record, any_of
from scorekeeper.games.data import innermost
from scorekeeper.games.entity import NESTED_PLAYERS, PLAYERS
from scorekeeper.games.repository import GameRepository, spellings
from scorekeeper.games.shown import created_at, is_low_better, winner_id
from scorekeeper.wire import plain

#: Games of one profile at most.
MOST: Final = 200

#: What a profile shows of a game's data.
_DATA: Final = ("players", "total_rounds", "final_scores", "round_data", "winner_ids")


class ProfileGames:
    """Games by their players' identities.

    Args:
        cards: repositories of games of Wizard, of whatever format.
        table: table games.
    """

    def __init__(self, cards: Iterable[GameRepository], table: GameRepository) -> None:
        self._cards = tuple(cards)
        self._table = table

    async def newest_of(self, identities: Iterable[Record]) -> list[dict[str, Any]]:
        """The newest games of these identities, with what each did to their ratings."""
        players = list(identities)
        if not players:
            return []
        named = any_of([spelling for player in players for spelling in spellings(str(player.id))])
        where = [{PLAYERS: named}, {NESTED_PLAYERS: named}]
        table, *cards = await asyncio.gather(
            *(games.newest(where, limit=MOST) for games in (self._table, *self._cards))
        )
        ratings = _ratings(players)
        shown = [_shown(game, ratings) for games in cards for game in games]
        shown += [_shown_table_game(game, ratings) for game in table]
        shown.sort(key=lambda game: str(game["created_at"] or ""), reverse=True)
        return shown[:MOST]


def _ratings(players: Iterable[Record]) -> dict[str, Mapping[str, Any]]:
    """By id of a game, the entry that it made in one of the players' histories."""
    found: dict[str, Mapping[str, Any]] = {}
    for player in players:
        by_type = player.get("eloByGameType")
        for rating in by_type.values() if isinstance(by_type, Mapping) else ():
            history = rating.get("history") if isinstance(rating, Mapping) else None
            for entry in history if isinstance(history, list) else ():
                if isinstance(entry, Mapping):
                    found[str(entry.get("gameId"))] = entry
    return found


def _shown(game: Record, ratings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    data = innermost(game.get("gameData"))
    winners = data.get("winner_ids")
    rating = ratings.get(str(game.id), {})
    return {
        "id": plain(game.id),
        "gameType": "wizard",
        "created_at": created_at(game),
        "winner_ids": plain(winners) if isinstance(winners, list) else [],
        "winner_id": plain(winner_id(data)),
        "eloChange": plain(rating.get("change")),
        "eloRating": plain(rating.get("rating")),
        "eloPlacement": plain(rating.get("placement")),
        "gameData": {name: plain(data[name]) for name in _DATA if name in data},
    }


def _shown_table_game(game: Record, ratings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        **_shown(game, ratings),
        "gameType": "table",
        "gameTypeName": plain(game.get("gameTypeName")),
        "name": plain(game.get("name")),
        "lowIsBetter": is_low_better(game),
    }
