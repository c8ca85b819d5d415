"""Benchmarks: each prints its figures as JSON lines, against peers or limits of the same run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql
from sqlalchemy import create_engine

from crossfade.embedded import EmbeddedServers
from scorekeeper.schema import metadata


def with_database(uri: str, name: str) -> str:
    """The address of a database on the same server."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=f"/{name}"))


def make_tables(url: str) -> None:
    """The reference service's tables."""
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    metadata.create_all(engine)
    engine.dispose()


def databases(servers: EmbeddedServers, name: str, *, tables: bool = True) -> tuple[str, str]:
    """A new database in each store: MongoDB's and PostgreSQL's address; with the service's tables, or empty."""
    with psycopg.connect(servers.database_url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    url = with_database(servers.database_url, name)
    if tables:
        make_tables(url)
    return with_database(servers.mongo_uri, name), url


@contextmanager
def two_databases(name: str) -> Iterator[tuple[str, str]]:
    """The same on servers that end with the block."""
    with EmbeddedServers(environ={}) as servers:
        yield databases(servers, name)
