"""An authenticated request: what scorekeeper's `/me` costs against bare FastAPI routes that do the least for it.

    python -m bench.auth_request [--seconds 3] [--rounds 5]

Two pairs, each under uvicorn with two workers and the same 64 connections from this machine, in turns:

- from the cache, against a route that checks the token and knows nothing else;
- from PostgreSQL (no cache, PostgreSQL deciding), against a route that checks the token and asks PostgreSQL, through
  psycopg's pool, for what `/me` shows: the user with the picture, and the identities.

The answers of both are the same users in turn, 200 of them. Ends with a JSON line per figure: requests a second, as a
ratio of medians. Any answer but 200 is an error, and errors are a figure of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Annotated, Any

import jwt
from fastapi import FastAPI, Header, HTTPException
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from bench import databases
from crossfade import Crossfade, Options, observe
from crossfade.embedded import EmbeddedServers
from scorekeeper.auth.tokens import Tokens
from scorekeeper.identities.service import first_identity_id
from scorekeeper.migration import accounts as account_entities
from scorekeeper.migration import name as migration_name
from scorekeeper.wire import now

CONNECTIONS, WORKERS, USERS = 64, 2, 200
GOAL_CACHE, GOAL_POSTGRES = 0.7, 0.5
SECRET = "a secret for this benchmark alone, 44 bytes.."

OF_USER = """
SELECT u.id, u.username, u.role, u.created_at, p.content_type, p.data
FROM users u LEFT JOIN user_pictures p ON p.user_id = u.id WHERE u.id = %s
"""
OF_IDENTITIES = """
SELECT id, display_name, aliases, name_history, elo_by_game_type, linked_identities FROM player_identities
WHERE user_id = %s AND NOT is_deleted AND merged_into IS NULL ORDER BY id LIMIT 200
"""


def _user_of(authorization: str) -> str:
    try:
        claims = jwt.decode(
            authorization.removeprefix("Bearer "), os.environ["JWT_SECRET"], algorithms=["HS256"]
        )
    except jwt.PyJWTError:
        raise HTTPException(401) from None
    return str(claims["userId"])


def bare() -> FastAPI:
    """The least: a token that counts."""
    app = FastAPI()

    @app.get("/api/users/me")
    async def me(authorization: Annotated[str, Header()]) -> dict[str, Any]:
        return {"user": {"id": _user_of(authorization)}}

    return app


def bare_postgres() -> FastAPI:
    """The least that shows the same from PostgreSQL."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        options = {"autocommit": True, "row_factory": dict_row}
        async with AsyncConnectionPool(
            os.environ["DATABASE_URL"], min_size=20, max_size=20, kwargs=options
        ) as pool:
            app.state.pool = pool
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/api/users/me")
    async def me(authorization: Annotated[str, Header()]) -> dict[str, Any]:
        id_ = _user_of(authorization)
        async with app.state.pool.connection() as connection:
            user = await (await connection.execute(OF_USER, [id_])).fetchone()
            if user is None:
                raise HTTPException(401)
            identities = await (await connection.execute(OF_IDENTITIES, [id_])).fetchall()
        return {"user": {**user, "identities": identities}}

    return app


class Connection(asyncio.Protocol):
    """Asks again as soon as it is answered, until told to stop."""

    def __init__(self, requests: list[bytes], first: int) -> None:
        self._requests, self._next = requests, first
        self._held = b""
        self.answered = self.errors = 0
        self.stopping = False
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._transport.write(self._requests[self._next % len(self._requests)])
        self._next += 1

    def data_received(self, data: bytes) -> None:
        self._held += data
        head, separator, body = self._held.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return
        self.answered += 1
        self.errors += not head.startswith(b"HTTP/1.1 200")
        self._held = b""
        if self.stopping:
            self._transport.close()
        else:
            self._ask()

    def connection_lost(self, _cause: Exception | None) -> None:
        if not self.stopping:
            self.errors += 1
        self.closed.set_result(None)


async def load(port: int, tokens: list[str], seconds: float) -> tuple[float, int]:
    """Answers a second, and errors."""
    head = "GET /api/users/me HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer "
    requests = [f"{head}{token}\r\n\r\n".encode() for token in tokens]
    loop = asyncio.get_running_loop()
    connections: list[Connection] = []
    began = time.perf_counter()
    for number in range(CONNECTIONS):
        first = number * len(requests) // CONNECTIONS
        _, protocol = await loop.create_connection(
            lambda at=first: Connection(requests, at), "127.0.0.1", port
        )
        connections.append(protocol)
    await asyncio.sleep(seconds)
    for each in connections:
        each.stopping = True
    answered, took = sum(each.answered for each in connections), time.perf_counter() - began
    await asyncio.wait([each.closed for each in connections], timeout=10)
    return answered / took, sum(each.errors for each in connections)


async def populate(mongo_uri: str, database_url: str) -> list[str]:
    """Users with an identity each; their tokens."""
    tokens = Tokens(SECRET)
    # Not what is measured, and a busy machine may take its time for it.
    patient = Options(primary_deadline=60, secondary_deadline=30, lease=60)
    cf = Crossfade(
        mongo_uri=mongo_uri, database_url=database_url, initial_phase="postgres_primary", options=patient
    )
    accounts = cf.migration(migration_name, account_entities())
    places = asyncio.Semaphore(8)

    async def account(number: int) -> str:
        async with places:
            moment, name = now(), f"Player {number}"
            user = await accounts["users"].insert(
                {
                    "username": name, "passwordHash": None, "role": "user", "guestMetadata": None, "lastLogin": None,
                    "profilePicture": None, "friends": [], "createdAt": moment, "updatedAt": moment, "__v": 0,
                }
            )  # fmt: skip
            await accounts["identities"].insert(
                {
                    "_id": first_identity_id(user.id), "displayName": name, "normalizedName": name.lower(),
                    "userId": user.id, "type": "user", "nameHistory": [], "aliases": [],
                    "stats": {"totalGames": 0, "totalWins": 0, "lastGameAt": None}, "eloByGameType": {},
                    "linkedIdentities": [], "mergedInto": None, "createdBy": user.id, "isDeleted": False,
                    "deletedAt": None, "createdAt": moment, "updatedAt": moment, "__v": 0,
                }
            )  # fmt: skip
            return tokens.issue(str(user.id), name)

    async with cf:
        return list(await asyncio.gather(*(account(number) for number in range(USERS))))


@contextmanager
def serving(environ: dict[str, str], *command: str) -> Iterator[int]:
    """A server in processes of its own; its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "--workers", str(WORKERS), "--port", str(port)],
        env={**os.environ, **environ}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def measure(pair: dict[str, int], tokens: list[str], *, seconds: float, rounds: int) -> dict[str, float]:
    """Medians of answers a second, in turns; errors of all together under ``errors``."""
    found: dict[str, list[float]] = {name: [] for name in pair}
    errors = 0
    for turn in range(rounds + 1):
        for name, port in pair.items():
            rate, failed = asyncio.run(load(port, tokens, seconds))
            errors += failed
            # The first round warms up pools and caches.
            if turn:
                found[name].append(rate)
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    for name, rate in medians.items():
        print(f"{name:32} {rate:8.0f} a second", flush=True)
    return {**medians, "errors": errors}


def report(figure: str, value: float, unit: str, against: str, goal: str, holds: bool) -> bool:
    print(
        json.dumps(
            {
                "figure": figure,
                "value": round(value, 3),
                "unit": unit,
                "against": against,
                "goal": goal,
                "holds": holds,
            }
        ),
        flush=True,
    )
    return holds


def run(seconds: float, rounds: int) -> bool:
    with ExitStack() as stack:
        servers = stack.enter_context(EmbeddedServers(environ={}))
        mongo_uri, database_url = databases(servers, "auth_request")
        tokens = asyncio.run(populate(mongo_uri, database_url))
        environ = {
            "MONGO_URI": mongo_uri, "DATABASE_URL": database_url, "REDIS_URL": servers.redis_url,
            "JWT_SECRET": SECRET, "LOG_LEVEL": "WARNING",
        }  # fmt: skip

        def uvicorn(factory: str) -> int:
            options = ("--factory", "--log-level", "warning", "--no-access-log")
            return stack.enter_context(serving(environ, "uvicorn", f"bench.auth_request:{factory}", *options))

        of_cache = {
            "bare, token only": uvicorn("bare"),
            "scorekeeper, from the cache": stack.enter_context(serving(environ, "scorekeeper")),
        }
        of_postgres = {
            "bare, token and psycopg": uvicorn("bare_postgres"),
            "scorekeeper, from PostgreSQL": stack.enter_context(
                serving({**environ, "CACHE_TTL": "0"}, "scorekeeper")
            ),
        }
        holds, errors = True, 0.0
        for pair, goal in ((of_cache, GOAL_CACHE), (of_postgres, GOAL_POSTGRES)):
            found = measure(pair, tokens, seconds=seconds, rounds=rounds)
            errors += found["errors"]
            against, own = pair
            ratio = found[own] / found[against]
            holds &= report(own, ratio, "x", against, f">= {goal}", ratio >= goal)
    return report("errors", errors, f"of all, {CONNECTIONS} connections", "", "0", errors == 0) and holds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    observe.configure_logging("WARNING")
    return 0 if run(arguments.seconds, arguments.rounds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
