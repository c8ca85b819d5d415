"""Alembic's entry: the address comes from DATABASE_URL (environment or .env), the tables from scorekeeper."""

from __future__ import annotations

from alembic import context
from alembic.script.revision import ResolutionError
from alembic.util import CommandError
from psycopg import errors
from sqlalchemy import create_engine, text
from sqlalchemy.exc import ProgrammingError
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
#: What a revision meets in tables that are not those which the one before it leaves.
_UNLIKE = (
    errors.DuplicateColumn, errors.DuplicateObject, errors.DuplicateTable, errors.UndefinedColumn,
    errors.UndefinedObject, errors.UndefinedTable,
)  # fmt: skip


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
            there = context.get_context().get_current_heads()
            where = f"{engine.url.host}:{engine.url.port or 5432}/{engine.url.database}"
            try:
                context.run_migrations()
            except CommandError as cause:
                if isinstance(cause.__cause__, ResolutionError) and cause.__cause__.argument in there:
                    raise _of_another_version(where, there, "which this version does not have") from None
                raise
            except ProgrammingError as cause:
                if isinstance(cause.orig, _UNLIKE):
                    why = f"and are not those of this version: {cause.orig.diag.message_primary}"
                    raise _of_another_version(where, there, why) from None
                raise


def _of_another_version(where: str, there: tuple[str, ...], why: str) -> SystemExit:
    """One line for who has data of a version that numbered its revisions otherwise."""
    revision = ", ".join(there) or "(none)"
    return SystemExit(
        f"error: the tables in PostgreSQL at {where} are at the Alembic revision {revision}, {why}. Nothing was "
        "changed. Run the version that made them, or set DATABASE_URL to an empty database; embedded servers begin "
        "anew after `crossfade servers down` without their folder (`crossfade servers status --json` names it)"
    )


def run_migrations_offline() -> None:
    context.configure(dialect_name="postgresql", target_metadata=metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    run_migrations_offline()
else:
    run_migrations_online()
