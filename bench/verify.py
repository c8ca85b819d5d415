"""Verify of users against bare reads of both stores, in the same run.

    python -m bench.verify [--users 50000] [--rounds 3]

A bare read takes every document through PyMongo into dicts, or every row of the same users through a cursor of psycopg
into tuples, and does nothing with them. Ends with a JSON line per figure. Rates depend on the machine; the ratios
hardly do.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import psycopg
import pymongo
from psycopg import sql

from bench import Figure, report, with_database
from bench.backfill import MIGRATION, NAME, backfill, fill_mongo, make_database
from crossfade.bulk.verify import Report, Verify
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres
from scorekeeper.users.entity import users

GOAL_FULL, GOAL_FAST = 0.5, 3.0


def read_mongo(uri: str) -> float:
    """Seconds that reading every document takes."""
    began = time.perf_counter()
    with pymongo.MongoClient[dict[str, Any]](uri) as client:
        for _ in client.get_default_database()[users.collection].find().sort("_id", 1):
            pass
    return time.perf_counter() - began


def read_postgres(url: str) -> float:
    """Seconds that reading every row of every table takes."""
    began = time.perf_counter()
    with psycopg.connect(url) as connection:
        for number, table in enumerate((users.table, *(child.table for child in users.children))):
            key = sql.SQL(", ").join(sql.Identifier(column.name) for column in table.primary_key.columns)
            with connection.cursor(f"bare_{number}") as cursor:
                cursor.itersize = 10_000
                cursor.execute(
                    sql.SQL("SELECT * FROM {} ORDER BY {}").format(sql.Identifier(table.name), key)
                )
                for _ in cursor:
                    pass
    return time.perf_counter() - began


def worker() -> None:
    """A process that has loaded everything, and works on a run once it is told."""
    print("ready", flush=True)
    run = sys.stdin.readline().strip()
    _, mongo_uri, url, mode = sys.argv
    asyncio.run(_part(mongo_uri, url, run, fast=mode == "fast"))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


async def _part(mongo_uri: str, url: str, run: str, *, fast: bool) -> Report:
    source, target = BulkMongo(mongo_uri), await BulkPostgres.connect(url)
    try:
        made = Verify(users, source, target, migration=MIGRATION, epoch=1, fast=fast)
        return await made.run(await target.runs.get(run), alone=False)
    finally:
        await target.close()
        source.close()


async def _begin(mongo_uri: str, url: str, workers: int, *, fast: bool) -> str:
    source, target = BulkMongo(mongo_uri), await BulkPostgres.connect(url)
    try:
        made = Verify(users, source, target, migration=MIGRATION, epoch=1, fast=fast)
        return str((await made.begin(restart=True, workers=workers)).run)
    finally:
        await target.close()
        source.close()


def verify(mongo_uri: str, url: str, expected: int, workers: int, *, fast: bool) -> tuple[float, float]:
    """Seconds, and peak memory of a worker in MiB, of a verify that has to find everything equal."""
    crew = [
        subprocess.Popen(
            [sys.executable, "-c", "from bench.verify import worker; worker()", mongo_uri, url,
             "fast" if fast else "full"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ,
        )
        for _ in range(workers)
    ]  # fmt: skip
    for each in crew:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    began = time.perf_counter()
    run = asyncio.run(_begin(mongo_uri, url, workers, fast=fast))
    for each in crew:
        assert each.stdin is not None
        each.stdin.write(f"{run}\n")
        each.stdin.flush()
    peaks = [float(each.communicate()[0]) for each in crew]
    assert all(each.returncode == 0 for each in crew)
    seconds = time.perf_counter() - began
    with psycopg.connect(url) as connection:
        [equal] = connection.execute(
            "SELECT sum((counts->>'equal')::int) FROM crossfade.ranges WHERE run = %s AND state = 'complete'",
            [run],
        ).fetchone() or (0,)
    assert equal == expected, (equal, expected)
    return seconds, max(peaks)


def run(mongo_uri: str, database_url: str, count: int, rounds: int) -> bool:
    uri = with_database(mongo_uri, NAME)
    print(f"making {count:,} users in both stores ...", flush=True)
    fill_mongo(uri, count)
    url = make_database(database_url)
    backfill(uri, url, count, workers=2, loading=True)
    took: dict[str, list[float]] = {}
    for n in range(rounds):
        for way, seconds in (
            ("MongoDB bare", read_mongo(uri)),
            ("PostgreSQL bare", read_postgres(url)),
            ("full", verify(uri, url, count, 1, fast=False)[0]),
            ("full, two", verify(uri, url, count, 2, fast=False)[0]),
            ("fast", verify(uri, url, count, 1, fast=True)[0]),
        ):
            took.setdefault(way, []).append(seconds)
        print(
            f"round {n + 1}: " + ", ".join(f"{way} {its[-1]:.2f} s" for way, its in took.items()), flush=True
        )
    middle = {way: statistics.median(seconds) for way, seconds in took.items()}
    slower = max(("MongoDB bare", "PostgreSQL bare"), key=lambda way: middle[way])
    full = f"a decoded read of the slower store ({slower})"
    return report(
        Figure("full verify, one process", middle[slower] / middle["full"], full),
        Figure("full verify, two processes", middle[slower] / middle["full, two"], full, least=GOAL_FULL),
        Figure(
            "fast verify, one process", middle["full"] / middle["fast"], "full verify, one process", least=GOAL_FAST
        ),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    from crossfade.embedded import EmbeddedServers

    with EmbeddedServers() as servers:
        return 0 if run(servers.mongo_uri, servers.database_url, arguments.users, arguments.rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
