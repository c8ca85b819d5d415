"""How an audit event is laid out in both stores."""

from __future__ import annotations

from crossfade.entity import Entity, column
from scorekeeper.audit.tables import audit_events as table

audit_events = Entity(
    "audit_events",
    collection="auditevents",
    table=table,
    columns=[
        column("event"),
        column("userId", to="user_id"),
        column("by"),
        column("address"),
        column("requestId", to="request_id"),
        column("details"),
        column("createdAt", to="created_at"),
    ],
    mapping_version=1,
)
