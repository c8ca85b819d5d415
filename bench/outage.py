"""A store that stands still under load: what callers notice, what memory does, and whether all is settled by itself.

    python -m bench.outage [--seconds 60]

Eight clients read and write users. A server is stopped (SIGSTOP): it accepts and says nothing, the worst way to be
gone. PostgreSQL while MongoDB is primary and read, PostgreSQL while it is read, MongoDB while PostgreSQL is primary,
and Redis under the reference service. Beside each the same load before it. Ends with a JSON line per figure.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from bench import as_a_service, databases
from bench.write_latency import document
from crossfade import Crossfade, Migration, observe
from crossfade.embedded import EmbeddedServers
from crossfade.embedded.servers import Server
from crossfade.errors import CrossfadeError
from scorekeeper.users.entity import users

CLIENTS, USERS = 8, 200
#: Seconds between two operations of one client.
PACE = 0.08
BEFORE = 10.0


@dataclass
class Heard:
    """What clients noticed.

    Attributes:
        took: milliseconds of each operation, by whether the secondary's breaker was closed when it began.
        failed: by error.
    """

    took: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    failed: Counter[str] = field(default_factory=Counter)

    @property
    def all(self) -> list[float]:
        return self.took[True] + self.took[False]


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98] if len(values) > 1 else 0.0


def memory() -> float:
    """MiB that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def load(operation: Callable[[int], Awaitable[bool]], seconds: float) -> Heard:
    """Eight clients for so long. ``operation`` gets a number and says whether the breaker was closed."""
    heard = Heard()
    ends = time.monotonic() + seconds

    async def client(number: int) -> None:
        n = number
        while time.monotonic() < ends:
            began = time.perf_counter()
            try:
                closed = await operation(n)
            except (CrossfadeError, httpx.HTTPError, AssertionError) as cause:
                heard.failed[f"{type(cause).__name__}: {cause}"[:120]] += 1
            else:
                heard.took[closed].append((time.perf_counter() - began) * 1000)
            n += CLIENTS
            await asyncio.sleep(PACE)

    await asyncio.gather(*map(client, range(CLIENTS)))
    return heard


@contextlib.asynccontextmanager
async def worker(mongo_uri: str, database_url: str, phase: str) -> AsyncIterator[Migration]:
    # With an old application beside it dual writing reads from MongoDB, as it does where PostgreSQL is not filled yet.
    cf = Crossfade(
        mongo_uri=mongo_uri, database_url=database_url, initial_phase=phase, foreign_writers=phase == "dual_write"
    )  # fmt: skip
    accounts = cf.migration("accounts", [users])
    await cf.postgres.open()
    await cf.postgres.prepare()
    async with cf:
        yield accounts


def writes(accounts: Migration, ids: list[Any]) -> Callable[[int], Awaitable[bool]]:
    async def operation(n: int) -> bool:
        closed = accounts.pair.mongo_breaker.allows() and accounts.pair.postgres_breaker.allows()
        id_ = ids[n % len(ids)]
        record = await accounts.users.get(id_)
        assert record is not None, "an acknowledged record is not found"
        await accounts.users.update(id_, {"lastLogin": datetime.now(UTC)})
        if n % 20 == 0:
            await accounts.users.insert(document(f"new {n} {time.monotonic_ns()}"))
        return closed

    return operation


async def secondary_stands_still(
    servers: EmbeddedServers, stopped: Server, phase: str, alone: str, seconds: float
) -> list[tuple[str, Any, str, bool]]:
    """The secondary of ``phase`` stands still; ``alone``: the phase with the primary only, to compare with."""
    figures: list[tuple[str, Any, str, bool]] = []
    mongo_uri, url = databases(servers, f"alone_{phase}")
    async with worker(mongo_uri, url, alone) as accounts:
        ids = [(await accounts.users.insert(document(f"{n}"))).id for n in range(USERS)]
        primary_only = await load(writes(accounts, ids), BEFORE)
    mongo_uri, url = databases(servers, f"outage_{phase}")
    async with worker(mongo_uri, url, phase) as accounts:
        ids = [(await accounts.users.insert(document(f"{n}"))).id for n in range(USERS)]
        before = await load(writes(accounts, ids), BEFORE)
        held = memory()
        stopped.pause()
        try:
            during = await load(writes(accounts, ids), seconds)
        finally:
            stopped.resume()
        grown = memory() - held
        resumed = time.monotonic()
        while (look := await accounts.board.refresh()).debts or look.control.unreadable:
            assert time.monotonic() - resumed < 120, f"{len(look.debts)} debts are left"
            await asyncio.sleep(0.25)
        settled = time.monotonic() - resumed
        options = accounts.pair.options
        deadline = options.secondary_deadline * 1000
        if phase == "postgres_read":
            # A read waits for PostgreSQL first, and a write until no worker serves an older row.
            deadline = 2 * deadline + options.board_age * 1000
    name = f"{stopped.name} stopped in {phase}"
    closed, opened, ours = p99(during.took[True]), p99(during.took[False]), p99(primary_only.all)
    print(f"{name}: {len(before.all)} operations before, p99 {p99(before.all):.0f} ms; "
          f"{len(during.took[True])} with the breaker closed, {len(during.took[False])} open; "
          f"the primary alone p99 {ours:.0f} ms; {dict(during.failed)}", flush=True)  # fmt: skip
    figures += [
        (f"{name}: failed", sum(during.failed.values()), "operations, goal 0", not during.failed),
        (f"{name}: p99 while the breaker is closed", round(closed), f"ms, goal <= {deadline:.0f} ms and the primary's "
         f"own {ours:.0f}", closed <= deadline + ours),
        (f"{name}: p99 once it is open", round(opened / ours, 2), f"x the primary alone ({opened:.0f} ms), goal <= 2",
         opened <= 2 * ours),
        (f"{name}: memory grown", round(grown, 1), "MiB, goal <= 32", grown <= 32),
        (f"{name}: settled by itself after", round(settled, 1), "s", True),
    ]  # fmt: skip
    return figures


async def redis_stands_still(servers: EmbeddedServers, seconds: float) -> list[tuple[str, Any, str, bool]]:
    mongo_uri, url = databases(servers, "outage_redis", tables=False)
    environment = {
        **os.environ, "MONGO_URI": mongo_uri, "DATABASE_URL": url, "REDIS_URL": servers.redis_url, "PORT": "0",
        "JWT_SECRET": "of this bench alone, and long enough", "LOG_LEVEL": "warning", "BCRYPT_ROUNDS": "4",
        "USE_POSTGRES": "true",
    }  # fmt: skip
    subprocess.run([sys.executable, "-m", "alembic", "upgrade", "head"], env=environment, check=True)  # noqa: ASYNC221
    port = _free_port()
    service = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "scorekeeper", env={**environment, "PORT": str(port)}, stdout=subprocess.DEVNULL
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            tokens = [await _token(http, f"player {n}") for n in range(20)]

            async def me(n: int) -> bool:
                headers = {"Authorization": f"Bearer {tokens[n % len(tokens)]}"}
                answer = await http.get("/api/users/me", headers=headers)
                assert answer.status_code == 200, f"status {answer.status_code}"
                return True

            before = await load(me, BEFORE)
            servers.redis.pause()
            try:
                during = await load(me, seconds)
            finally:
                servers.redis.resume()
    finally:
        with contextlib.suppress(ProcessLookupError):
            service.terminate()
        await service.wait()
    print(
        f"redis stopped: p99 {p99(before.all):.0f} ms before, {p99(during.all):.0f} ms; {dict(during.failed)}"
    )
    failed = sum(during.failed.values())
    ratio = p99(during.all) / p99(before.all)
    return [
        ("redis stopped: failed", failed, "requests, goal 0", not failed),
        ("redis stopped: p99", round(ratio, 2), "x before, goal <= 3", ratio <= 3),
    ]


async def _token(http: httpx.AsyncClient, name: str) -> str:
    for _ in range(100):
        with contextlib.suppress(httpx.TransportError):
            answer = await http.post("/api/users/register", json={"username": name, "password": "a password"})
            assert answer.status_code == 201, answer.text
            return str(answer.json()["token"])
        await asyncio.sleep(0.2)
    raise TimeoutError("the service does not start")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def run(servers: EmbeddedServers, seconds: float) -> bool:
    figures = await secondary_stands_still(servers, servers.postgres, "dual_write", "mongo_only", seconds)
    figures += await secondary_stands_still(servers, servers.postgres, "postgres_read", "mongo_only", seconds)
    figures += await secondary_stands_still(
        servers, servers.mongo, "postgres_primary", "postgres_only", seconds
    )
    figures += await redis_stands_still(servers, seconds / 3)
    for figure, value, unit, holds in figures:
        print(json.dumps({"figure": figure, "value": value, "unit": unit, "holds": holds}), flush=True)
    return all(holds for *_, holds in figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    seconds = parser.parse_args().seconds
    observe.configure_logging("error")
    with EmbeddedServers(environ={}) as servers:
        return 0 if as_a_service(run(servers, seconds)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
