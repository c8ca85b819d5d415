"""Pytest plugin: real servers for tests, one set per run, a fresh database per test.

Fixtures
    servers             the set of the run, shared by all tests and xdist workers; tests must not stop it
    mongo_uri           its MongoDB URI, with a database of the test's own
    database_url        its PostgreSQL URL, with a database of the test's own
    database_template   (session; override it) the PostgreSQL database that `database_url` is cloned from
    redis_url           its Redis URL, with a numbered database of the test's own
    own_servers         a private set that the test may stop, kill and pause
    mongo_proxy, postgres_proxy, redis_proxy
                        a `FaultProxy` in front of the test's own database

The set starts when the first test asks for it, in whichever worker; it belongs to the main pytest process and
ends with it, SIGKILL included. MONGO_URI, DATABASE_URL and REDIS_URL in the environment are used instead of
embedded servers, except by `own_servers`.

Nothing of the embedded servers is imported before a fixture is used.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import pytest

if TYPE_CHECKING:
    from crossfade.embedded import EmbeddedServers
    from crossfade.testing.proxy import FaultProxy

_RUN = pytest.StashKey[Path]()


@dataclass(frozen=True)
class SharedServers:
    """The addresses of the run's servers, without a test's database."""

    mongo_uri: str
    database_url: str
    redis_url: str


# --- the run --------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    """The main process names the run's folder; workers are told (`pytest_configure_node`)."""
    if not hasattr(config, "workerinput"):
        from crossfade.embedded.places import scratch_root

        config.stash[_RUN] = scratch_root() / f"crossfade-servers-run-{secrets.token_hex(8)}"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell an xdist worker which run it belongs to."""
    node.workerinput["crossfade_run"] = str(node.config.stash[_RUN])
    node.workerinput["crossfade_owner"] = os.getpid()


def pytest_unconfigure(config: pytest.Config) -> None:
    """The run is over: the main process stops its servers."""
    if _RUN not in config.stash or not config.stash[_RUN].exists():
        return
    from crossfade.embedded import EmbeddedError, EmbeddedServers

    run = config.stash[_RUN]
    try:
        EmbeddedServers.attach(run).stop()
    except EmbeddedError:
        # Nothing of it runs any more.
        pass
    shutil.rmtree(run, ignore_errors=True)


def _shared(config: pytest.Config) -> EmbeddedServers:
    """The run's set: attach to it, or be the first and start it."""
    from crossfade.embedded import EmbeddedServers

    worker: dict[str, Any] = getattr(config, "workerinput", {})
    run = Path(worker["crossfade_run"]) if worker else config.stash[_RUN]
    shared = EmbeddedServers(run, durable=False, owner=worker.get("crossfade_owner"), temporary=True)
    shared.start_or_attach()
    return shared


# --- the servers ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def servers(pytestconfig: pytest.Config) -> SharedServers:
    """The run's servers."""
    try:
        shared = _shared(pytestconfig)
    except ImportError as error:
        pytest.fail(f"the embedded servers need crossfade[embedded] ({error.name} is missing)", pytrace=False)
    return SharedServers(shared.mongo_uri, shared.database_url, shared.redis_url)


@pytest.fixture
def own_servers() -> Iterator[EmbeddedServers]:
    """A private set of servers, started, whatever the environment names; the test may do anything to it."""
    from crossfade.embedded import EmbeddedServers

    with EmbeddedServers(environ={}, durable=False) as own:
        yield own


# --- a database per test --------------------------------------------------------------------------------


@pytest.fixture
def mongo_uri(servers: SharedServers) -> Iterator[str]:
    """The URI of MongoDB with a fresh database, dropped after the test."""
    import pymongo

    name = _fresh_name()
    yield _with_database(servers.mongo_uri, name)
    with pymongo.MongoClient[dict[str, Any]](servers.mongo_uri, serverSelectionTimeoutMS=5000) as client:
        client.drop_database(name)


@pytest.fixture(scope="session")
def database_template() -> str | None:
    """Name of a PostgreSQL database on the run's server to clone for each test; None: an empty one.

    Override it in a conftest.py to migrate once and clone after; nobody may be connected to the template.
    """
    return None


@pytest.fixture
def database_url(servers: SharedServers, database_template: str | None) -> Iterator[str]:
    """The URL of PostgreSQL with a fresh database, dropped after the test even while connected to."""
    import psycopg
    from psycopg import sql

    name = sql.Identifier(fresh := _fresh_name())
    # template0 is never connected to, so cloning it never waits for anybody.
    template = sql.Identifier(database_template or "template0")
    with psycopg.connect(servers.database_url, autocommit=True) as connection:
        # Copied by files it takes a quarter of the time; before PostgreSQL 15 there was no other way.
        how = " STRATEGY FILE_COPY" if connection.info.server_version >= 150_000 else ""
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}" + how).format(name, template))
    yield _with_database(servers.database_url, fresh)
    with psycopg.connect(servers.database_url, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))


@pytest.fixture
def redis_url(servers: SharedServers, worker_number: int) -> Iterator[str]:
    """The URL of Redis with an empty numbered database of this worker's own, flushed after the test."""
    import redis

    embedded = "REDIS_URL" not in os.environ
    # A user's own Redis has 16 databases, and 0 is likely in use.
    number = worker_number + 1 if embedded else 1 + worker_number % 15
    url = _with_database(servers.redis_url, str(number))
    client = redis.Redis.from_url(url)
    client.flushdb()
    yield url
    client.flushdb()
    client.close()


@pytest.fixture(scope="session")
def worker_number(pytestconfig: pytest.Config) -> int:
    """The number of this xdist worker, from 0; 0 without xdist."""
    worker: dict[str, Any] = getattr(pytestconfig, "workerinput", {})
    return int(str(worker.get("workerid", "gw0")).removeprefix("gw"))


# --- proxies --------------------------------------------------------------------------------------------


@pytest.fixture
def mongo_proxy(mongo_uri: str) -> Iterator[FaultProxy]:
    """A proxy in front of MongoDB; its `uri` names the same database as `mongo_uri`."""
    yield from _proxy(mongo_uri)


@pytest.fixture
def postgres_proxy(database_url: str) -> Iterator[FaultProxy]:
    """A proxy in front of PostgreSQL; its `uri` names the same database as `database_url`."""
    yield from _proxy(database_url)


@pytest.fixture
def redis_proxy(redis_url: str) -> Iterator[FaultProxy]:
    """A proxy in front of Redis; its `uri` names the same database as `redis_url`."""
    yield from _proxy(redis_url)


def _proxy(uri: str) -> Iterator[FaultProxy]:
    from crossfade.testing.proxy import FaultProxy

    with FaultProxy(uri) as proxy:
        yield proxy


def _fresh_name() -> str:
    return f"t_{secrets.token_hex(6)}"


def _with_database(uri: str, name: str) -> str:
    return urlunsplit(urlsplit(uri)._replace(path=f"/{name}"))
