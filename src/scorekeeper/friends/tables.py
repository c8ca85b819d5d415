"""The table of friend requests, in SQLAlchemy Core. Alembic owns it; keep ``migrations/`` in step."""

from __future__ import annotations

from sqlalchemy import CheckConstraint, Column, DateTime, Index, Integer, Table, Text, UniqueConstraint, text

from crossfade.entity import DocumentId, record_columns, reference
from scorekeeper.schema import metadata

STATUSES = ("pending", "accepted", "rejected")

friend_requests = Table(
    "friend_requests",
    metadata,
    Column("id", DocumentId, primary_key=True),
    Column("sender", DocumentId),
    Column("receiver", DocumentId),
    reference("sender_ref", "users.id", of="sender"),
    reference("receiver_ref", "users.id", of="receiver"),
    Column("status", Text),
    Column("created_at", DateTime(timezone=True)),
    Column("updated_at", DateTime(timezone=True)),
    Column("version", Integer),
    *record_columns(),
    # Also the index by sender. Deferrable, so that PostgreSQL can be given several records in any order.
    UniqueConstraint("sender", "receiver", deferrable=True, initially="IMMEDIATE"),
    CheckConstraint("status IN ('pending', 'accepted', 'rejected')", name="status"),
    Index("ix_friend_requests_receiver", "receiver"),
    Index("ix_friend_requests_sender_ref", "sender_ref", postgresql_where=text("sender_ref IS NOT NULL")),
    Index(
        "ix_friend_requests_receiver_ref", "receiver_ref", postgresql_where=text("receiver_ref IS NOT NULL")
    ),
    Index("ix_friend_requests_sender_waits", "sender", postgresql_where=text("sender_ref IS NULL")),
    Index("ix_friend_requests_receiver_waits", "receiver", postgresql_where=text("receiver_ref IS NULL")),
)
