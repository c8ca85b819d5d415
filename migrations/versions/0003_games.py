"""Games: as clients sent them, with columns for what they are listed and found by.

Revision: 0003, after 0002
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def document_id() -> sa.Text:
    """An id as text, ordered by its bytes (``crossfade.entity.DocumentId``, frozen as of this revision)."""
    return sa.Text(collation="C")


def create_games(name: str, *own: sa.Column[Any]) -> None:
    op.create_table(
        name,
        sa.Column("id", document_id(), nullable=False),
        sa.Column("user_id", document_id()),
        sa.Column("local_id", sa.Text),
        sa.Column("local_id_key", sa.Text),
        sa.Column("game_data", JSONB),
        sa.Column("player_identities", JSONB),
        sa.Column("nested_player_identities", JSONB),
        sa.Column("created_at", sa.DateTime(timezone=True)),
        sa.Column("updated_at", sa.DateTime(timezone=True)),
        sa.Column("version", sa.Integer),
        *own,
        sa.Column("extra", JSONB),
        sa.Column("cf_rev", sa.BigInteger, nullable=False),
        sa.Column("cf_op", sa.Uuid),
        sa.Column("cf_digest", sa.LargeBinary, nullable=False),
        sa.Column("cf_mapping", sa.Integer, nullable=False),
        sa.Column("cf_shape", JSONB),
        sa.PrimaryKeyConstraint("id", name=f"pk_{name}"),
        sa.UniqueConstraint(
            "local_id_key", name=f"uq_{name}_local_id_key", deferrable=True, initially="IMMEDIATE"
        ),
    )
    op.create_index(f"ix_{name}_local_id", name, ["local_id"])
    newest = [sa.text("created_at NULLS FIRST"), "id"]
    op.create_index(f"ix_{name}_user_id", name, ["user_id", *newest])
    op.create_index(f"ix_{name}_created_at", name, newest)
    for ids in ("player_identities", "nested_player_identities"):
        op.create_index(f"ix_{name}_{ids}", name, [ids], postgresql_using="gin")


def shared(name: str) -> None:
    op.create_index(
        f"ix_{name}_share_id", name, ["share_id"], postgresql_where=sa.text("share_id IS NOT NULL")
    )


def share_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("share_id", sa.Text),
        sa.Column("is_shared", sa.Boolean),
        sa.Column("shared_at", sa.DateTime(timezone=True)),
    ]


def upgrade() -> None:
    create_games("games", *share_columns())
    shared("games")
    create_games(
        "wizard_games",
        *share_columns(),
        sa.Column("migrated_from", sa.Text),
        sa.Column("migrated_at", sa.DateTime(timezone=True)),
        sa.Column("original_game_id", document_id()),
    )
    shared("wizard_games")
    create_games(
        "table_games",
        sa.Column("name", sa.Text),
        sa.Column("game_type", sa.Text),
        sa.Column("game_type_name", sa.Text),
        sa.Column("game_finished", sa.Boolean),
        sa.Column("player_count", sa.Integer),
        sa.Column("total_rounds", sa.Integer),
        sa.Column("target_number", sa.Integer),
        sa.Column("low_is_better", sa.Boolean),
    )


def downgrade() -> None:
    for name in ("table_games", "wizard_games", "games"):
        op.drop_table(name)
