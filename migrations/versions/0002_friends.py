"""Friends: requests, and links from friend lists to the users that are there.

Revision: 0002, after 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def document_id() -> sa.Text:
    """An id as text, ordered by its bytes (``crossfade.entity.DocumentId``, frozen as of this revision)."""
    return sa.Text(collation="C")


def upgrade() -> None:
    op.add_column("user_friends", sa.Column("friend_ref", document_id()))
    op.create_foreign_key(
        "fk_user_friends_friend_ref", "user_friends", "users", ["friend_ref"], ["id"], ondelete="SET NULL"
    )
    op.create_index(
        "ix_user_friends_friend_ref",
        "user_friends",
        ["friend_ref"],
        postgresql_where=sa.text("friend_ref IS NOT NULL"),
    )
    op.create_index(
        "ix_user_friends_friend_waits",
        "user_friends",
        ["friend_id"],
        postgresql_where=sa.text("friend_ref IS NULL"),
    )
    op.drop_index("ix_user_friends_friend_id", "user_friends")
    op.create_table(
        "friend_requests",
        sa.Column("id", document_id(), nullable=False),
        sa.Column("sender", document_id()),
        sa.Column("receiver", document_id()),
        sa.Column("sender_ref", document_id()),
        sa.Column("receiver_ref", document_id()),
        sa.Column("status", sa.Text),
        sa.Column("created_at", sa.DateTime(timezone=True)),
        sa.Column("updated_at", sa.DateTime(timezone=True)),
        sa.Column("version", sa.Integer),
        sa.Column("extra", JSONB),
        sa.Column("cf_rev", sa.BigInteger, nullable=False),
        sa.Column("cf_op", sa.Uuid),
        sa.Column("cf_digest", sa.LargeBinary, nullable=False),
        sa.Column("cf_mapping", sa.Integer, nullable=False),
        sa.Column("cf_shape", JSONB),
        sa.PrimaryKeyConstraint("id", name="pk_friend_requests"),
        sa.UniqueConstraint(
            "sender", "receiver", name="uq_friend_requests_sender", deferrable=True, initially="IMMEDIATE"
        ),
        sa.CheckConstraint(
            "status IN ('pending', 'accepted', 'rejected')", name=op.f("ck_friend_requests_status")
        ),
        *(
            sa.ForeignKeyConstraint(
                [f"{side}_ref"], ["users.id"], name=f"fk_friend_requests_{side}_ref", ondelete="SET NULL"
            )
            for side in ("sender", "receiver")
        ),
    )
    op.create_index("ix_friend_requests_receiver", "friend_requests", ["receiver"])
    for side in ("sender", "receiver"):
        op.create_index(
            f"ix_friend_requests_{side}_ref",
            "friend_requests",
            [f"{side}_ref"],
            postgresql_where=sa.text(f"{side}_ref IS NOT NULL"),
        )
        op.create_index(
            f"ix_friend_requests_{side}_waits",
            "friend_requests",
            [side],
            postgresql_where=sa.text(f"{side}_ref IS NULL"),
        )


def downgrade() -> None:
    op.drop_table("friend_requests")
    op.create_index("ix_user_friends_friend_id", "user_friends", ["friend_id"])
    op.drop_column("user_friends", "friend_ref")
