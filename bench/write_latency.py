"""Registration and log-in, without the hash's cost: each store alone against writes to both, interleaved in one run.

    python -m bench.write_latency [--operations 400]

A registration looks the name up and inserts a user; a log-in looks the name up and stamps ``lastLogin``. Alone, each
store does that through its driver, acknowledged as durably as Crossfade asks for it. Beside them the two drivers bare,
with what both stores cannot do without (a revision and a debt in the document, a transaction that is committed once
MongoDB has answered, or PostgreSQL behind the answer), each look-up asked of the store that Crossfade asks in the end
(a taken name of PostgreSQL, a free one of MongoDB), and no promise: what is left of the ratios on this machine if
Crossfade cost nothing. One client, one operation at a time, in what a service's process is. Ends with a JSON line per
figure; times depend on the machine, ratios less so.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import psycopg
from bson import ObjectId
from psycopg_pool import AsyncConnectionPool
from pymongo import AsyncMongoClient, ReturnDocument
from pymongo.write_concern import WriteConcern

from bench import as_a_service, two_databases
from crossfade import Crossfade, Migration, observe
from scorekeeper.users.entity import USERNAME_RULE, users

NAME = "crossfade_latency"
GOAL_P50, GOAL_MORE_MS, GOAL_P99, GOAL_ASYNC = 1.5, 3.0, 1.7, 1.1
#: Operations of one way before the next has its turn, and seconds between two of them.
BLOCK, PAUSE = 10, 0.06
HASH = "$2a$12$" + "a" * 53

#: One way to do an operation: its name, and the operation for a user name; it returns once acknowledged.
Way = tuple[str, Callable[[str], Awaitable[Any]]]

#: The drivers without Crossfade.
BARE, BARE_ASYNC = "bare, both", "bare, async"

TABLE = """
CREATE TABLE alone (
    id text PRIMARY KEY, username text NOT NULL, username_norm text NOT NULL UNIQUE, password_hash text,
    role text, guest_metadata jsonb, last_login timestamptz, created_at timestamptz, updated_at timestamptz,
    version integer);
CREATE TABLE bare (LIKE alone INCLUDING ALL)
"""


def document(name: str) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {
        "username": name, "passwordHash": HASH, "role": "user", "guestMetadata": None, "lastLogin": None,
        "profilePicture": None, "friends": [], "createdAt": now, "updatedAt": now, "__v": 0,
    }  # fmt: skip


def mongo_alone(client: AsyncMongoClient[dict[str, Any]]) -> tuple[Way, Way]:
    found = client[NAME].get_collection("alone", write_concern=WriteConcern(w="majority", j=True))

    async def register(name: str) -> None:
        await found.find_one({"username_norm": name.lower()})
        await found.insert_one({**document(name), "username_norm": name.lower()})

    async def log_in(name: str) -> None:
        there = await found.find_one({"username_norm": name.lower()})
        assert there is not None
        await found.update_one({"_id": there["_id"]}, {"$set": {"lastLogin": datetime.now(UTC)}})

    return ("MongoDB", register), ("MongoDB", log_in)


def postgres_alone(pool: AsyncConnectionPool) -> tuple[Way, Way]:
    async def register(name: str) -> None:
        async with pool.connection() as connection:
            await connection.execute("SELECT * FROM alone WHERE username_norm = %s", [name.lower()])
        async with pool.connection() as connection:
            now = datetime.now(UTC)
            await connection.execute(
                "INSERT INTO alone VALUES (%s, %s, %s, %s, 'user', NULL, NULL, %s, %s, 0)",
                [str(ObjectId()), name, name.lower(), HASH, now, now],
            )

    async def log_in(name: str) -> None:
        async with pool.connection() as connection:
            rows = await connection.execute("SELECT * FROM alone WHERE username_norm = %s", [name.lower()])
            there = await rows.fetchone()
        assert there is not None
        async with pool.connection() as connection:
            await connection.execute(
                "UPDATE alone SET last_login = %s WHERE id = %s", [datetime.now(UTC), there[0]]
            )

    return ("PostgreSQL", register), ("PostgreSQL", log_in)


def drivers_alone(
    client: AsyncMongoClient[dict[str, Any]], pool: AsyncConnectionPool, *, asynchronous: bool
) -> tuple[Way, Way]:
    found = client[NAME].get_collection("bare", write_concern=WriteConcern(w="majority", j=True))
    way = BARE_ASYNC if asynchronous else BARE
    running: set[asyncio.Task[None]] = set()

    async def look_up(name: str) -> tuple[Any, ...] | None:
        async with pool.connection() as connection:
            rows = await connection.execute("SELECT * FROM bare WHERE username_norm = %s", [name.lower()])
            return await rows.fetchone()

    async def write(deciding: Coroutine[Any, Any, Any], query: str, parameters: list[Any]) -> None:
        if asynchronous:
            await deciding
            behind = asyncio.create_task(in_postgres(query, parameters))
            running.add(behind)
            behind.add_done_callback(running.discard)
            return
        task = asyncio.create_task(deciding)
        async with pool.connection() as connection:
            async with connection.pipeline():
                await connection.execute(b"BEGIN")
                await connection.execute(query, parameters)
            await task
            await connection.execute(b"COMMIT")

    async def in_postgres(query: str, parameters: list[Any]) -> None:
        await asyncio.sleep(0.005)
        async with pool.connection() as connection:
            await connection.execute(query, parameters)

    async def register(name: str) -> None:
        await found.find_one({"username_norm": name.lower()})
        id_, now = ObjectId(), datetime.now(UTC)
        marks = {"rev": 1, "op": uuid.uuid4().hex, "debt": {"epoch": 1}}
        await write(
            found.insert_one({"_id": id_, **document(name), "username_norm": name.lower(), "_cf": marks}),
            "INSERT INTO bare VALUES (%s, %s, %s, %s, 'user', NULL, NULL, %s, %s, 0)",
            [str(id_), name, name.lower(), HASH, now, now],
        )

    async def log_in(name: str) -> None:
        there = await look_up(name)
        assert there is not None
        now = datetime.now(UTC)
        marks = {"_cf.rev": 2, "_cf.op": uuid.uuid4().hex, "_cf.debt": {"epoch": 1}}
        await write(
            found.find_one_and_update(
                {"_id": ObjectId(there[0]), "_cf.rev": 1},
                {"$set": {"lastLogin": now, **marks}},
                return_document=ReturnDocument.AFTER,
            ),
            "UPDATE bare SET last_login = %s WHERE id = %s",
            [now, there[0]],
        )

    return (way, register), (way, log_in)


def both(accounts: Migration, *, asynchronous: bool) -> tuple[Way, Way]:
    handle = accounts.users
    way = "both, async" if asynchronous else "both"

    async def register(name: str) -> None:
        await handle.find_by_key(USERNAME_RULE, name)
        await handle.insert(document(name), mode="async" if asynchronous else "sync")

    async def log_in(name: str) -> None:
        there = await handle.find_by_key(USERNAME_RULE, name)
        assert there is not None
        stamp = {"lastLogin": datetime.now(UTC)}
        await handle.update(there.id, stamp, mode="async" if asynchronous else "sync")

    return (way, register), (way, log_in)


async def measure(
    ways: list[Way], operations: int, name_of: Callable[[str, int], str]
) -> dict[str, list[float]]:
    """Milliseconds of each operation, by way; the ways take turns, a block each, each round in another order.

    What has just run decides how warm caches and servers are: an operation that follows upon what another way still
    settles behind its answer is faster by a third than one that follows upon a pause. So each follows upon one of its
    own way, as in a service that knows no other, and the first of a block is not counted.
    """
    took: dict[str, list[float]] = {way: [] for way, _ in ways}
    orders = itertools.cycle(list(itertools.permutations(ways)))
    for block in range(0, operations, BLOCK):
        for way, work in next(orders):
            for n in range(block, block + BLOCK):
                name = name_of(way, n)
                began = time.perf_counter()
                await work(name)
                if n != block:
                    took[way].append((time.perf_counter() - began) * 1000)
                # Until what is done behind the caller's back is done.
                await asyncio.sleep(PAUSE)
    return took


def percentiles(values: list[float]) -> tuple[float, float]:
    return statistics.median(values), statistics.quantiles(values, n=100)[98]


def report(operation: str, took: dict[str, list[float]]) -> bool:
    shown = {way: percentiles(values) for way, values in took.items()}
    for way, (p50, p99) in shown.items():
        print(f"{operation:12} {way:12} p50 {p50:6.2f} ms   p99 {p99:6.2f} ms", flush=True)
    slower = max(("MongoDB", "PostgreSQL"), key=lambda way: shown[way][0])
    alone, alone99 = shown[slower]
    p50, p99 = shown["both"]
    for bare in (BARE, BARE_ASYNC):
        print(f"{operation:12} {bare} against {slower} alone: p50 {shown[bare][0] / alone:.2f}x", flush=True)
    figures = [
        ("p50 of both", p50 / alone, f"<= {GOAL_P50}, and at most {GOAL_MORE_MS} ms more",
         p50 / alone <= GOAL_P50 and p50 - alone <= GOAL_MORE_MS, f"x ({p50:.2f} ms, {p50 - alone:.2f} ms more)"),
        ("p99 of both", p99 / alone99, f"<= {GOAL_P99}", p99 / alone99 <= GOAL_P99, f"x ({p99:.2f} ms)"),
        ("p50 of both, async", shown["both, async"][0] / alone, f"<= {GOAL_ASYNC}",
         shown["both, async"][0] / alone <= GOAL_ASYNC, f"x ({shown['both, async'][0]:.2f} ms)"),
    ]  # fmt: skip
    for figure, value, goal, holds, unit in figures:
        print(
            json.dumps(
                {
                    "figure": f"{operation}: {figure}",
                    "value": round(value, 2),
                    "unit": unit,
                    "against": f"{slower} alone",
                    "goal": goal,
                    "holds": holds,
                }
            ),
            flush=True,
        )
    return all(holds for *_, holds, _ in figures)


async def run(mongo_uri: str, database_url: str, operations: int) -> bool:
    async with AsyncExitStack() as stack:
        client: AsyncMongoClient[dict[str, Any]] = await stack.enter_async_context(
            AsyncMongoClient(mongo_uri)
        )
        await client.drop_database(NAME)
        for name in ("alone", "bare"):
            await client[NAME][name].create_index("username_norm", unique=True)
        pool = await stack.enter_async_context(AsyncConnectionPool(database_url, kwargs={"autocommit": True}))
        cf = Crossfade(mongo_uri=mongo_uri, database_url=database_url, initial_phase="dual_write")
        accounts = cf.migration("accounts", [users])
        await stack.enter_async_context(cf)
        in_turn = [mongo_alone(client), postgres_alone(pool)]
        for asynchronous in (False, True):
            in_turn.append(drivers_alone(client, pool, asynchronous=asynchronous))
            in_turn.append(both(accounts, asynchronous=asynchronous))
        registering, logging_in = [ways[0] for ways in in_turn], [ways[1] for ways in in_turn]
        await measure(registering, 50, lambda way, n: f"warm {way} {n}")
        registered = await measure(registering, operations, lambda way, n: f"{way} {n}")
        await measure(logging_in, 50, lambda way, n: f"warm {way} {n}")
        logged_in = await measure(logging_in, operations, lambda way, n: f"{way} {n}")
    holds = report("registration", registered)
    return report("log-in", logged_in) and holds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=400)
    operations = parser.parse_args().operations
    observe.configure_logging("warning")
    with two_databases(NAME) as (mongo_uri, url):
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(TABLE)
        return 0 if as_a_service(run(mongo_uri, url, operations)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
