"""How a player identity of the old back end is laid out in PostgreSQL.

What is free in form or nested (histories, aliases, ratings) is JSONB; what is looked for has a column.
"""

from __future__ import annotations

from crossfade.entity import Entity, column
from scorekeeper.identities.tables import TYPES, player_identities
from scorekeeper.names import without_nul

identities = Entity(
    "identities",
    collection="playeridentities",
    table=player_identities,
    columns=[
        column("displayName", to="display_name", stand_in=without_nul),
        column("normalizedName", to="normalized_name", stand_in=without_nul),
        column("userId", to="user_id"),
        column("type", fits=TYPES.__contains__),
        column("nameHistory", to="name_history"),
        column("aliases"),
        column("stats"),
        column("eloByGameType", to="elo_by_game_type"),
        column("linkedIdentities", to="linked_identities"),
        column("mergedInto", to="merged_into"),
        column("createdBy", to="created_by"),
        column("isDeleted", to="is_deleted"),
        column("deletedAt", to="deleted_at"),
        column("createdAt", to="created_at"),
        column("updatedAt", to="updated_at"),
        column("__v", to="version"),
    ],
    mapping_version=1,
)
