"""The tables of games, in SQLAlchemy Core. Alembic owns them; keep ``migrations/`` in step.

A game is free in form: ``game_data`` is as the client sent it. What games are listed, found and filtered by has
columns.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Boolean, Column, DateTime, Index, Integer, Table, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSONB

from crossfade.entity import DocumentId, record_columns
from scorekeeper.schema import metadata

#: The columns that games are found in by the identities of their players.
PLAYERS = ("player_identities", "nested_player_identities")


def _game(name: str, *own: Column[Any] | Index) -> Table:
    """A table of games. Their owners' ids name no table: an owner may be a guest, or gone."""
    return Table(
        name,
        metadata,
        Column("id", DocumentId, primary_key=True),
        Column("user_id", DocumentId),
        Column("local_id", Text),
        Column("local_id_key", Text),
        Column("game_data", JSONB),
        Column("player_identities", JSONB),
        Column("nested_player_identities", JSONB),
        Column("created_at", DateTime(timezone=True)),
        Column("updated_at", DateTime(timezone=True)),
        Column("version", Integer),
        *own,
        *record_columns(),
        UniqueConstraint("local_id_key", deferrable=True, initially="IMMEDIATE"),
        Index(f"ix_{name}_local_id", "local_id"),
        # Lists are newest first, and what has no date comes last then.
        Index(f"ix_{name}_user_id", "user_id", text("created_at NULLS FIRST"), "id"),
        Index(f"ix_{name}_created_at", text("created_at NULLS FIRST"), "id"),
        *(Index(f"ix_{name}_{ids}", ids, postgresql_using="gin") for ids in PLAYERS),
    )


def _shared(name: str) -> list[Column[Any] | Index]:
    return [
        Column("share_id", Text),
        Column("is_shared", Boolean),
        Column("shared_at", DateTime(timezone=True)),
        # Not unique: a copied game carries its share id along.
        Index(f"ix_{name}_share_id", "share_id", postgresql_where=text("share_id IS NOT NULL")),
    ]


#: Formats 1.0 and 2.0.
games = _game("games", *_shared("games"))

#: Format 3.0.
wizard_games = _game(
    "wizard_games",
    *_shared("wizard_games"),
    Column("migrated_from", Text),
    Column("migrated_at", DateTime(timezone=True)),
    Column("original_game_id", DocumentId),
)

table_games = _game(
    "table_games",
    Column("name", Text),
    Column("game_type", Text),
    Column("game_type_name", Text),
    Column("game_finished", Boolean),
    Column("player_count", Integer),
    Column("total_rounds", Integer),
    Column("target_number", Integer),
    Column("low_is_better", Boolean),
)
