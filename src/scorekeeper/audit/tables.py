"""The table of audit events, in SQLAlchemy Core. Alembic owns it; keep ``migrations/`` in step."""

from __future__ import annotations

from sqlalchemy import Column, DateTime, Index, Table, Text
from sqlalchemy.dialects.postgresql import JSONB

from crossfade.entity import DocumentId, record_columns
from scorekeeper.schema import metadata

#: The ids name no tables: an event outlives whom it is about.
audit_events = Table(
    "audit_events",
    metadata,
    Column("id", DocumentId, primary_key=True),
    Column("event", Text),
    Column("user_id", DocumentId),
    Column("by", DocumentId),
    Column("address", Text),
    Column("request_id", Text),
    Column("details", JSONB),
    Column("created_at", DateTime(timezone=True)),
    *record_columns(),
    Index("ix_audit_events_user_id", "user_id", "created_at"),
    Index("ix_audit_events_created_at", "created_at"),
)
