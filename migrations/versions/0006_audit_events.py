"""Audit events: every security decision leaves one.

Revision: 0006, after 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def document_id() -> sa.Text:
    """An id as text, ordered by its bytes (``crossfade.entity.DocumentId``, frozen as of this revision)."""
    return sa.Text(collation="C")


def upgrade() -> None:
    op.create_table(
        "audit_events",
        sa.Column("id", document_id(), nullable=False),
        sa.Column("event", sa.Text),
        sa.Column("user_id", document_id()),
        sa.Column("by", document_id()),
        sa.Column("address", sa.Text),
        sa.Column("request_id", sa.Text),
        sa.Column("details", JSONB),
        sa.Column("created_at", sa.DateTime(timezone=True)),
        sa.Column("extra", JSONB),
        sa.Column("cf_rev", sa.BigInteger, nullable=False),
        sa.Column("cf_op", sa.Uuid),
        sa.Column("cf_digest", sa.LargeBinary, nullable=False),
        sa.Column("cf_mapping", sa.Integer, nullable=False),
        sa.Column("cf_shape", JSONB),
        sa.PrimaryKeyConstraint("id", name="pk_audit_events"),
    )
    op.create_index("ix_audit_events_user_id", "audit_events", ["user_id", "created_at"])
    op.create_index("ix_audit_events_created_at", "audit_events", ["created_at"])


def downgrade() -> None:
    op.drop_table("audit_events")
