"""The tables of users, in SQLAlchemy Core. Alembic owns them; keep ``migrations/`` in step."""

from __future__ import annotations

from sqlalchemy import (
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from crossfade.entity import DocumentId, part_columns, record_columns, reference
from scorekeeper.schema import metadata

ROLES = ("user", "admin", "guest")

users = Table(
    "users",
    metadata,
    Column("id", DocumentId, primary_key=True),
    Column("username", Text, nullable=False),
    Column("username_norm", Text, nullable=False),
    Column("password_hash", Text),
    Column("role", Text, nullable=False, server_default="user"),
    Column("guest_metadata", JSONB),
    Column("last_login", DateTime(timezone=True)),
    Column("created_at", DateTime(timezone=True)),
    Column("updated_at", DateTime(timezone=True)),
    Column("version", Integer),
    *record_columns(),
    # Deferrable: two users who swap names in MongoDB reach PostgreSQL in one transaction.
    UniqueConstraint("username_norm", deferrable=True, initially="IMMEDIATE"),
    CheckConstraint("role IN ('user', 'admin', 'guest')", name="role"),
    Index("ix_users_username", "username"),
    Index("ix_users_role", "role"),
)

#: ``friend_id`` is what the document says; ``friend_ref`` is the same where that user is there.
user_friends = Table(
    "user_friends",
    metadata,
    Column("user_id", DocumentId, ForeignKey("users.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("friend_id", DocumentId, nullable=False),
    reference("friend_ref", "users.id", of="friend_id"),
    Index("ix_user_friends_friend_ref", "friend_ref", postgresql_where=text("friend_ref IS NOT NULL")),
    Index("ix_user_friends_friend_waits", "friend_id", postgresql_where=text("friend_ref IS NULL")),
)

#: Apart from ``users``, so that reading a name never reads megabytes.
user_pictures = Table(
    "user_pictures",
    metadata,
    Column("user_id", DocumentId, ForeignKey("users.id"), primary_key=True),
    Column("content_type", Text, nullable=False),
    Column("data", LargeBinary, nullable=False),
    *part_columns(),
)
