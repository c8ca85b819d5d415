"""How a game document of the old back end is laid out in PostgreSQL.

``gameData`` is free in form and stays whole, as JSONB; it says who played, by which games are found.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Table

from crossfade.entity import Entity, FieldColumn, UniqueRule, column, ids_at, normalised
from scorekeeper.games import tables
from scorekeeper.names import without_nul

#: The rule "one game of this id that a client gave it"; errors and ``_cf.keys`` name it.
LOCAL_ID_RULE: Final = "localId"

#: Where games name the identities of their players.
PLAYERS: Final = "gameData.players.identityId"

#: Where games of one version of the client do.
NESTED_PLAYERS: Final = "gameData.gameData.players.identityId"


def _as_given(local_id: str) -> str:
    """Local ids are compared to the letter."""
    return local_id


def _local_id() -> UniqueRule:
    return normalised("localId", to="local_id_key", rule=LOCAL_ID_RULE, normalise=_as_given)


_HEAD: Final = (column("userId", to="user_id"), column("localId", to="local_id", stand_in=without_nul))
_DATA: Final = column("gameData", to="game_data")
_SHARED: Final = (
    column("shareId", to="share_id", stand_in=without_nul),
    column("isShared", to="is_shared"),
    column("sharedAt", to="shared_at"),
)
_STAMPS: Final = (
    column("createdAt", to="created_at"),
    column("updatedAt", to="updated_at"),
    column("__v", to="version"),
)
_PLAYERS: Final = (
    ids_at(PLAYERS, to="player_identities"),
    ids_at(NESTED_PLAYERS, to="nested_player_identities"),
)


def _card_game(name: str, collection: str, table: Table, *own: FieldColumn) -> Entity:
    return Entity(
        name,
        collection=collection,
        table=table,
        columns=[*_HEAD, _DATA, *_SHARED, *own, *_STAMPS],
        unique=[_local_id()],
        nested_ids=_PLAYERS,
        mapping_version=1,
    )


games = _card_game("games", "games", tables.games)

wizard_games = _card_game(
    "wizard_games",
    "wizard",
    tables.wizard_games,
    column("migratedFrom", to="migrated_from", stand_in=without_nul),
    column("migratedAt", to="migrated_at"),
    column("originalGameId", to="original_game_id"),
)

table_games = Entity(
    "table_games",
    collection="tablegames",
    table=tables.table_games,
    columns=[
        _HEAD[0],
        column("name", stand_in=without_nul),
        column("gameType", to="game_type", stand_in=without_nul),
        column("gameTypeName", to="game_type_name", stand_in=without_nul),
        _DATA,
        column("gameFinished", to="game_finished"),
        column("playerCount", to="player_count"),
        column("totalRounds", to="total_rounds"),
        column("targetNumber", to="target_number"),
        column("lowIsBetter", to="low_is_better"),
        _HEAD[1],
        *_STAMPS,
    ],
    unique=[_local_id()],
    nested_ids=_PLAYERS,
    mapping_version=1,
)
