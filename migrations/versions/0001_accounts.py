"""Accounts: users with their friends and pictures, and player identities.

Revision: 0001, the first
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def document_id() -> sa.Text:
    """An id as text, ordered by its bytes (``crossfade.entity.DocumentId``, frozen as of this revision)."""
    return sa.Text(collation="C")


def record_columns() -> list[sa.Column]:
    """What Crossfade keeps on every parent row (``crossfade.entity.record_columns``, frozen as well)."""
    return [
        sa.Column("extra", JSONB),
        sa.Column("cf_rev", sa.BigInteger, nullable=False),
        sa.Column("cf_op", sa.Uuid),
        sa.Column("cf_digest", sa.LargeBinary, nullable=False),
        sa.Column("cf_mapping", sa.Integer, nullable=False),
        sa.Column("cf_shape", JSONB),
    ]


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column("id", document_id(), nullable=False),
        sa.Column("username", sa.Text, nullable=False),
        sa.Column("username_norm", sa.Text, nullable=False),
        sa.Column("password_hash", sa.Text),
        sa.Column("role", sa.Text, nullable=False, server_default="user"),
        sa.Column("guest_metadata", JSONB),
        sa.Column("last_login", sa.DateTime(timezone=True)),
        sa.Column("created_at", sa.DateTime(timezone=True)),
        sa.Column("updated_at", sa.DateTime(timezone=True)),
        sa.Column("version", sa.Integer),
        *record_columns(),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint(
            "username_norm", name="uq_users_username_norm", deferrable=True, initially="IMMEDIATE"
        ),
        sa.CheckConstraint("role IN ('user', 'admin', 'guest')", name=op.f("ck_users_role")),
    )
    op.create_index("ix_users_username", "users", ["username"])
    op.create_index("ix_users_role", "users", ["role"])
    op.create_table(
        "user_friends",
        sa.Column("user_id", document_id(), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("friend_id", document_id(), nullable=False),
        sa.PrimaryKeyConstraint("user_id", "position", name="pk_user_friends"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_user_friends_user_id"),
    )
    op.create_index("ix_user_friends_friend_id", "user_friends", ["friend_id"])
    op.create_table(
        "user_pictures",
        sa.Column("user_id", document_id(), nullable=False),
        sa.Column("content_type", sa.Text, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("user_id", name="pk_user_pictures"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_user_pictures_user_id"),
    )
    # Pictures are compressed already: TOAST need not try.
    op.execute("ALTER TABLE user_pictures ALTER COLUMN data SET STORAGE EXTERNAL")
    op.create_table(
        "player_identities",
        sa.Column("id", document_id(), nullable=False),
        sa.Column("display_name", sa.Text),
        sa.Column("normalized_name", sa.Text),
        sa.Column("user_id", document_id()),
        sa.Column("type", sa.Text),
        sa.Column("name_history", JSONB),
        sa.Column("aliases", JSONB),
        sa.Column("stats", JSONB),
        sa.Column("elo_by_game_type", JSONB),
        sa.Column("linked_identities", JSONB),
        sa.Column("merged_into", document_id()),
        sa.Column("created_by", document_id()),
        sa.Column("is_deleted", sa.Boolean),
        sa.Column("deleted_at", sa.DateTime(timezone=True)),
        sa.Column("created_at", sa.DateTime(timezone=True)),
        sa.Column("updated_at", sa.DateTime(timezone=True)),
        sa.Column("version", sa.Integer),
        *record_columns(),
        sa.PrimaryKeyConstraint("id", name="pk_player_identities"),
        sa.CheckConstraint("type IN ('user', 'guest', 'imported')", name=op.f("ck_player_identities_type")),
    )
    op.create_index("ix_player_identities_normalized_name", "player_identities", ["normalized_name"])
    op.create_index("ix_player_identities_user_id", "player_identities", ["user_id"])
    op.create_index("ix_player_identities_merged_into", "player_identities", ["merged_into"])


def downgrade() -> None:
    for table in ("player_identities", "user_pictures", "user_friends", "users"):
        op.drop_table(table)
