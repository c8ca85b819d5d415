"""Player identities: lists by name, look-ups by alias.

Revision: 0004, after 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_player_identities_by_name",
        "player_identities",
        [sa.text('normalized_name COLLATE "C" NULLS FIRST'), "id"],
    )
    op.create_index(
        "ix_player_identities_aliases",
        "player_identities",
        ["aliases"],
        postgresql_using="gin",
        postgresql_ops={"aliases": "jsonb_path_ops"},
    )


def downgrade() -> None:
    op.drop_index("ix_player_identities_aliases", "player_identities")
    op.drop_index("ix_player_identities_by_name", "player_identities")
