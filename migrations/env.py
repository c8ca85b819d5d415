"""Alembic's entry: the address comes from DATABASE_URL (environment or .env), the tables from scorekeeper."""

from __future__ import annotations

from alembic import context
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

import scorekeeper.audit.tables
import scorekeeper.friends.tables
import scorekeeper.games.tables
import scorekeeper.identities.tables
import scorekeeper.users.tables  # noqa: F401 - declares its tables in `metadata`
from scorekeeper.schema import metadata
from scorekeeper.settings import database_url, sqlalchemy_url

#: One upgrade at a time, also when two deployments start at once. Any number that nobody else uses.
_LOCK = 7_235_101


def include_name(name: str | None, type_: str, _parents: object) -> bool:
    """Compare scorekeeper's own tables only: a database may hold others."""
    return type_ != "table" or name in metadata.tables


def run_migrations_online() -> None:
    engine = create_engine(
        sqlalchemy_url(context.config.get_main_option("sqlalchemy.url") or database_url()), poolclass=NullPool
    )
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _LOCK})
        connection.commit()
        context.configure(
            connection=connection, target_metadata=metadata, include_name=include_name, compare_type=True
        )
        with context.begin_transaction():
            context.run_migrations()


def run_migrations_offline() -> None:
    context.configure(dialect_name="postgresql", target_metadata=metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    run_migrations_offline()
else:
    run_migrations_online()
