"""ELO ratings as they are stored: kept and shown, never computed here (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from crossfade import Record
from scorekeeper.identities.shown import id_of, name_of
from scorekeeper.wire import plain

#: The game type meant where none is named.
DEFAULT_TYPE: Final = "wizard"
#: A rating before the first game.
FIRST: Final = 1000
#: Entries of a history shown where nothing else is asked for, and kept at most.
SHOWN: Final = 20
KEPT: Final = 50


def game_type_of(text: str) -> str:
    """The name that ratings of a game are kept under: lower case, with ``-`` for blanks."""
    return "-".join(text.lower().split()) or DEFAULT_TYPE


def by_game_type(identity: Record) -> dict[str, Any]:
    """All ratings of an identity, by game type; none where an old document has no such field."""
    ratings = identity.get("eloByGameType")
    return {str(name): value for name, value in ratings.items()} if isinstance(ratings, Mapping) else {}


def rating_of(identity: Record, game_type: str, *, entries: int) -> dict[str, Any]:
    """One rating and the newest ``entries`` of its history; that of a newcomer where there is none."""
    ratings = by_game_type(identity)
    stored = ratings.get(game_type)
    rating: Mapping[str, Any] = stored if isinstance(stored, Mapping) else {}
    history = rating.get("history")
    return {
        "hasIdentity": True,
        "gameType": game_type,
        "allGameTypes": sorted(ratings),
        "identityId": id_of(identity),
        "displayName": name_of(identity),
        "currentRating": plain(rating.get("rating", FIRST)),
        "peak": plain(rating.get("peak", FIRST)),
        "floor": plain(rating.get("floor", FIRST)),
        "gamesPlayed": plain(rating.get("gamesPlayed", 0)),
        "streak": plain(rating.get("streak", 0)),
        "history": plain(history[:entries]) if isinstance(history, list) else [],
    }


def ratings_of(identity: Record) -> dict[str, Any]:
    """All ratings of an identity, as stored."""
    ratings = by_game_type(identity)
    return {"hasIdentity": True, "eloByGameType": plain(ratings), "gameTypes": sorted(ratings)}
