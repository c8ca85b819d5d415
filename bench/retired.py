"""What is left of Crossfade's cost once MongoDB is retired: reads and updates against a plain repository, in one run.

    python -m bench.retired [--operations 600]

The plain repository is what the application would have without Crossfade: psycopg on a table of the same columns, a
read by id, and an update that locks the row, looks at it and writes it with a version, in one transaction. Both are
given the same users, take turns, and are as durable. Ends with a JSON line per figure.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

from bson import ObjectId
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from bench import Figure, report, two_databases
from crossfade import Crossfade, Phase, observe
from crossfade.retire import retire
from scorekeeper.users.entity import users

NAME = "crossfade_retired"
USERS = 200
#: A read is one statement on either side; what is on top builds the document, and its digest.
MOST_READ = 1.5
#: An update also locks the migration's epoch and the record's id, and keeps revision, operation and digest.
MOST_UPDATE = 2.0

Work = Callable[[Any], Awaitable[Any]]


def plain(pool: AsyncConnectionPool) -> tuple[Work, Work]:
    async def read(id_: ObjectId) -> None:
        async with pool.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            await (await cursor.execute("SELECT * FROM plain WHERE id = %s", [str(id_)])).fetchone()

    async def update(id_: ObjectId) -> None:
        async with pool.connection() as connection, connection.transaction():
            cursor = connection.cursor(row_factory=dict_row)
            await cursor.execute("SELECT * FROM plain WHERE id = %s FOR UPDATE", [str(id_)])
            row = await cursor.fetchone()
            assert row is not None
            await cursor.execute(
                "UPDATE plain SET last_login = %s, cf_rev = %s WHERE id = %s AND cf_rev = %s",
                [datetime.now(UTC), row["cf_rev"] + 1, str(id_), row["cf_rev"]],
            )

    return read, update


async def measure(ways: dict[str, Work], ids: list[ObjectId], operations: int) -> dict[str, float]:
    """Milliseconds of an operation, the median, by way; the ways take turns."""
    took: dict[str, list[float]] = {way: [] for way in ways}
    for n in range(operations):
        for way in sorted(ways, reverse=bool(n % 2)):
            began = time.perf_counter()
            await ways[way](ids[n % len(ids)])
            took[way].append((time.perf_counter() - began) * 1000)
    return {way: statistics.median(values) for way, values in took.items()}


async def run(mongo_uri: str, database_url: str, operations: int) -> bool:
    async with AsyncExitStack() as stack:
        cf = Crossfade(mongo_uri=mongo_uri, database_url=database_url, initial_phase="postgres_primary")
        accounts = cf.migration("accounts", [users])
        await stack.enter_async_context(cf)
        pool = await stack.enter_async_context(AsyncConnectionPool(database_url, kwargs={"autocommit": True}))
        now = datetime.now(UTC)
        ids = []
        for n in range(USERS):
            document = {"username": f"user {n}", "passwordHash": "$2a$12$" + "a" * 53, "role": "user",
                        "lastLogin": now, "friends": [], "createdAt": now, "updatedAt": now, "__v": 0}  # fmt: skip
            ids.append((await accounts.users.insert(document)).id)
        async with pool.connection() as connection:
            await connection.execute("CREATE TABLE plain (LIKE users INCLUDING ALL)")
            await connection.execute("INSERT INTO plain SELECT * FROM users")
        await accounts.reconciler.reconcile()
        before = (await accounts.board.refresh()).control
        only = before.changed(by="a bench", reason="a bench", phase=Phase.POSTGRES_ONLY)
        assert await accounts.record.change(before, only, timeout=5.0)
        await retire(accounts, by="a bench", rate=1e6)

        plain_read, plain_update = plain(pool)

        async def update(id_: ObjectId) -> None:
            await accounts.users.update(id_, {"lastLogin": datetime.now(UTC)})

        ways = {
            "read": {"crossfade": accounts.users.get, "plain": plain_read},
            "update": {"crossfade": update, "plain": plain_update},
        }
        found = {}
        for operation, both in ways.items():
            await measure(both, ids, 50)
            found[operation] = await measure(both, ids, operations)
            for way, p50 in found[operation].items():
                print(f"{operation:8} {way:10} p50 {p50:6.2f} ms", flush=True)
    return report(
        *(
            Figure(f"{operation} in phase 5, retired: p50", found[operation]["crossfade"] / found[operation]["plain"],
                   "a plain psycopg repository", most=most)
            for operation, most in (("read", MOST_READ), ("update", MOST_UPDATE))
        )
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=600)
    operations = parser.parse_args().operations
    observe.configure_logging("warning")
    with two_databases(NAME) as (mongo_uri, url):
        return 0 if asyncio.run(run(mongo_uri, url, operations)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
