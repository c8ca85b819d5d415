"""The table of player identities, in SQLAlchemy Core. Alembic owns it; keep ``migrations/`` in step."""

from __future__ import annotations

from sqlalchemy import Boolean, CheckConstraint, Column, DateTime, Index, Integer, Table, Text, text
from sqlalchemy.dialects.postgresql import JSONB

from crossfade.entity import DocumentId, record_columns
from scorekeeper.schema import metadata

TYPES = ("user", "guest", "imported")

#: The ids name no tables: what they refer to may be gone, or not have arrived yet.
player_identities = Table(
    "player_identities",
    metadata,
    Column("id", DocumentId, primary_key=True),
    Column("display_name", Text),
    Column("normalized_name", Text),
    Column("user_id", DocumentId),
    Column("type", Text),
    Column("name_history", JSONB),
    Column("aliases", JSONB),
    Column("stats", JSONB),
    Column("elo_by_game_type", JSONB),
    Column("linked_identities", JSONB),
    Column("merged_into", DocumentId),
    Column("created_by", DocumentId),
    Column("is_deleted", Boolean),
    Column("deleted_at", DateTime(timezone=True)),
    Column("created_at", DateTime(timezone=True)),
    Column("updated_at", DateTime(timezone=True)),
    Column("version", Integer),
    *record_columns(),
    CheckConstraint("type IN ('user', 'guest', 'imported')", name="type"),
    Index("ix_player_identities_normalized_name", "normalized_name"),
    # Lists go by name: by its bytes, those without one first.
    Index("ix_player_identities_by_name", text('normalized_name COLLATE "C" NULLS FIRST'), "id"),
    Index(
        "ix_player_identities_aliases",
        "aliases",
        postgresql_using="gin",
        postgresql_ops={"aliases": "jsonb_path_ops"},
    ),
    Index("ix_player_identities_user_id", "user_id"),
    Index("ix_player_identities_merged_into", "merged_into"),
)
