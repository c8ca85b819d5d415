"""Benchmarks: each prints its figures as JSON lines, against peers or limits of the same run."""

from __future__ import annotations

import json
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import psycopg
import uvloop
from psycopg import sql
from sqlalchemy import create_engine

from crossfade.embedded import EmbeddedServers
from scorekeeper.schema import metadata
from scorekeeper.serving import keep_what_is_loaded

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Figure:
    """What a benchmark found, against a peer of the same run, and what it has to be.

    Attributes:
        least, most: goals; None: without one.
    """

    name: str
    value: float
    against: str
    least: float | None = None
    most: float | None = None
    unit: str = "x"

    @property
    def holds(self) -> bool:
        return (self.least is None or self.value >= self.least) and (
            self.most is None or self.value <= self.most
        )


def report(*figures: Figure) -> bool:
    """Print a JSON line for each; whether all goals are met."""
    for one in figures:
        goals = [
            f">= {one.least}" if one.least is not None else "",
            f"<= {one.most}" if one.most is not None else "",
        ]
        print(
            json.dumps(
                {"figure": one.name, "value": round(one.value, 2), "unit": one.unit, "against": one.against,
                 "goal": " and ".join(filter(None, goals)) or "none", "holds": one.holds}
            )
        )  # fmt: skip
    return all(one.holds for one in figures)


def as_a_service(work: Coroutine[Any, Any, _T]) -> _T:
    """Run it in what a service's process is: the event loop of ``uvicorn[standard]``, and `keep_what_is_loaded`.

    A full collection of what is loaded takes 75 ms, and whoever asks meanwhile waits for it.
    """
    keep_what_is_loaded()
    return uvloop.run(work)


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
