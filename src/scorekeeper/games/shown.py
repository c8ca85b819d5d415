"""Games as the client knows them (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from crossfade import Record
from scorekeeper.games.data import innermost, names_of_players, players_of, winner_of_table_game
from scorekeeper.wire import plain

#: What anybody may see of a table game.
_PUBLIC: Final = (
    "_id",
    "localId",
    "name",
    "gameTypeName",
    "gameData",
    "gameFinished",
    "playerCount",
    "totalRounds",
    "lowIsBetter",
    "createdAt",
)


def document_of(game: Record) -> dict[str, Any]:
    """The document, as Mongoose writes it to JSON."""
    return {str(name): plain(value) for name, value in game.document.items()}


def listed(game: Record) -> dict[str, Any]:
    """The document as lists have it."""
    shown = document_of(game)
    shown.pop("__v", None)
    return shown


def public_table_game(game: Record) -> dict[str, Any]:
    """A table game as anybody may see it: without whose it is."""
    shown: dict[str, Any] = {name: plain(game[name]) for name in _PUBLIC if name in game.document}
    return {**shown, "id": plain(game.id)}


def recent_wizard_game(game: Record) -> dict[str, Any]:
    """A game of Wizard in the list of everybody's newest."""
    data = innermost(game.get("gameData"))
    return {
        **_ids(game),
        "players": [
            {"name": name, "id": plain(player.get("id")) if isinstance(player, Mapping) else None}
            for name, player in zip(names_of_players(data), players_of(data), strict=True)
        ],
        "winner_id": plain(winner_id(data)),
        "final_scores": plain(data.get("final_scores")) or {},
        "created_at": created_at(game),
        "total_rounds": plain(data.get("total_rounds")) or 0,
        "gameFinished": data.get("gameFinished") is not False,
        "gameType": "wizard",
    }


def recent_table_game(game: Record) -> dict[str, Any]:
    """A finished table game in the list of everybody's newest."""
    data = game.get("gameData")
    return {
        **_ids(game),
        "name": plain(game.get("name") or game.get("gameTypeName")) or "Table Game",
        "players": names_of_players(data),
        "created_at": created_at(game),
        "totalRounds": plain(game.get("totalRounds")) or 0,
        "gameFinished": plain(game.get("gameFinished")),
        "gameType": "table",
        "winner_name": winner_of_table_game(data, low_is_better=is_low_better(game)),
    }


def _ids(game: Record) -> dict[str, Any]:
    return {"id": plain(game.id), "cloudId": plain(game.id), "localId": plain(game.get("localId"))}


def created_at(game: Record) -> Any:
    """When the game was played: the document's own date, else the data's."""
    return plain(game.get("createdAt") or innermost(game.get("gameData")).get("created_at"))


def winner_id(data: Mapping[str, Any]) -> Any:
    """The winner, the first of several."""
    winners = data.get("winner_ids")
    first = winners[0] if isinstance(winners, list) and winners else None
    return data.get("winner_id") or first


def is_low_better(game: Record) -> bool:
    """Whether the fewest points win."""
    return bool(game.get("lowIsBetter") or innermost(game.get("gameData")).get("lowIsBetter"))
