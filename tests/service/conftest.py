"""The service on real servers: one application per test, spoken to in process.

`serve` opens a worker; two of them on the same stores are two workers. The tables come from Alembic, migrated
once into a template that every test's database is cloned from.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import psycopg
import pymongo
import pytest
from alembic import command
from alembic.config import Config
from psycopg import sql

from crossfade import Options, Phase
from scorekeeper.app import create_app
from scorekeeper.auth.current import CurrentUser
from scorekeeper.settings import Settings, sqlalchemy_url

from .log_scan import LogScan, scanning, written_by_processes

ROOT = Path(__file__).parents[2]
SECRET = "the secret that both back ends share"  # 36 bytes
#: The contract is held in each of them.
PHASES = tuple(phase.value for phase in Phase)

#: Who does what an administrator does, in tests that ask a service directly.
ADMINISTRATOR = CurrentUser("0" * 24, "Root", "admin")


_SCAN = pytest.StashKey[LogScan]()


@pytest.fixture(autouse=True)
def log_scan(request: pytest.FixtureRequest) -> Iterator[LogScan]:
    """What this test logs, and the secrets that it uses; see `pytest_runtest_makereport`."""
    with scanning() as scan:
        scan.keep("secret", SECRET)
        request.node.stash[_SCAN] = scan
        yield scan


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test in whose logs a secret of its own stands has failed, when all of it is over."""
    report = yield
    if call.when == "teardown" and _SCAN in item.stash:
        folder = getattr(item, "funcargs", {}).get("tmp_path")
        streams = (text for _, text in report.sections)
        leaks = item.stash[_SCAN].leaks(*streams, *written_by_processes(folder))
        if leaks and report.passed:
            report.outcome, report.longrepr = "failed", "\n".join(["secrets in the logs:", *leaks])
    return report


def with_database(uri: str, name: str) -> str:
    return urlunsplit(urlsplit(uri)._replace(path=f"/{name}"))


@pytest.fixture(scope="session")
def database_template(servers: Any) -> Iterator[str]:
    """A database at Alembic's head, to clone."""
    name = f"template_{secrets.token_hex(6)}"
    with psycopg.connect(servers.database_url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
    config = Config(ROOT / "alembic.ini")
    config.set_main_option(
        "sqlalchemy.url", sqlalchemy_url(with_database(servers.database_url, name)).replace("%", "%%")
    )
    command.upgrade(config, "head")
    yield name
    with psycopg.connect(servers.database_url, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@dataclass
class Service:
    """One worker.

    Attributes:
        http: speaks to it.
        app: the application, for its state.
        documents: the MongoDB database as the old back end has it (plain PyMongo).
        database_url: PostgreSQL, past any proxy.
    """

    http: httpx.AsyncClient
    app: Any
    documents: Any
    database_url: str

    def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            return connection.execute(query, parameters).fetchall()

    async def register(self, username: Any, password: Any = "secret1") -> httpx.Response:
        return await self.http.post("/api/users/register", json={"username": username, "password": password})

    async def log_in(self, username: Any, password: Any = "secret1") -> httpx.Response:
        return await self.http.post("/api/users/login", json={"username": username, "password": password})

    async def get(self, path: str, token: str | None = None) -> httpx.Response:
        # As the web client does: a JSON content type also without a body.
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        return await self.http.get(path, headers=headers)


Serve = Callable[..., Awaitable[Service]]


@pytest.fixture
async def serve(
    mongo_uri: str,
    database_url: str,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    log_scan: LogScan,
) -> AsyncIterator[Serve]:
    """Open a worker; other addresses by name (``redis_url=``...), other options as `Options`."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    async with contextlib.AsyncExitStack() as stack:
        client = stack.enter_context(pymongo.MongoClient(mongo_uri, tz_aware=True))
        documents = client[urlsplit(mongo_uri).path.removeprefix("/")]

        async def open_(
            phase: str = "dual_write", *, options: Options | None = None, **settings: Any
        ) -> Service:
            addresses = {"mongo_uri": mongo_uri, "database_url": database_url, "redis_url": redis_url}
            given = {"jwt_secret": SECRET, "bcrypt_rounds": 4, **addresses, **settings}
            for secret in (given["jwt_secret"], *given.get("jwt_former_secrets", ())):
                log_scan.keep("secret", secret)
            app = create_app(Settings(_env_file=None, **given), initial_phase=phase, options=options)
            await stack.enter_async_context(app.router.lifespan_context(app))
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            http = httpx.AsyncClient(transport=transport, base_url="http://service", timeout=300)
            await stack.enter_async_context(http)
            return Service(http, app, documents, database_url)

        yield open_
        for hashed in password_hashes(documents, database_url):
            log_scan.keep("hash", hashed)


def password_hashes(documents: Any, database_url: str) -> set[Any]:
    """Those that both stores hold at the end."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        rows = connection.execute("SELECT password_hash FROM users").fetchall()
    return {held for (held,) in rows} | {user.get("passwordHash") for user in documents["users"].find()}


def assert_problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """Every error has one shape, shows no internals, and never has the member that the client would prefer."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert isinstance(body["error"], str)
    assert body["error"]
    assert body["status"] == status
    assert {"type", "title", "detail"} <= body.keys()
    assert "message" not in body or body.get("found") is False
    for internal in ("Traceback", "psycopg", "pymongo", "duplicate key", "secret1"):
        assert internal not in answer.text
    return body
