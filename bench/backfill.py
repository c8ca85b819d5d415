"""Backfill of users against a bare binary COPY of the same rows into the same indexed tables, in the same run.

    python -m bench.backfill [--users 50000] [--rounds 2]

By one process and by two, the guarded way, which is that beside a running application, and the direct one into empty
tables; and onto rows that are there already. Ends with a JSON line per figure. Rates depend on the machine; the ratios
hardly do, as long as two processors are free.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any

import psycopg
import pymongo
from bson import ObjectId
from psycopg import sql

from bench import Figure, make_tables, report, with_database
from crossfade.bulk.backfill import Backfill, Report
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres
from scorekeeper.users.entity import users

GOAL_GUARDED, GOAL_DIRECT, GOAL_SCALING = 0.5, 0.6, 1.15
MIGRATION = "accounts"
NAME = "crossfade_bench"


def documents(count: int) -> Iterator[dict[str, Any]]:
    """Users as the old back end wrote them, clean, with 0 to 20 friends, the same for every run."""
    chance = random.Random(7)
    ids = [
        ObjectId(f"{0x60000000 + n:08x}{chance.getrandbits(40):010x}{n & 0xFFFFFF:06x}") for n in range(count)
    ]
    began = datetime(2021, 3, 1, tzinfo=UTC)
    for n, id_ in enumerate(ids):
        made = began + timedelta(milliseconds=n * 700_001)
        yield {
            "_id": id_,
            "username": f"Player{n:07d}",
            "passwordHash": "$2a$12$" + f"{chance.getrandbits(300):053x}"[:53],
            "role": "admin" if n % 1000 == 0 else "user",
            "guestMetadata": None,
            "lastLogin": made + timedelta(days=30) if n % 3 else None,
            "profilePicture": None,
            "friends": chance.choices(ids, k=chance.randrange(21)),
            "createdAt": made,
            "updatedAt": made,
            "__v": n % 5,
        }


def fill_mongo(uri: str, count: int) -> None:
    with pymongo.MongoClient[dict[str, Any]](uri) as client:
        collection = client.get_default_database()["users"]
        if collection.estimated_document_count() == count:
            return
        collection.drop()
        insert_users(collection, count)


def insert_users(collection: pymongo.collection.Collection[dict[str, Any]], count: int) -> None:
    made = documents(count)
    while batch := list(itertools.islice(made, 5000)):
        collection.insert_many(batch, ordered=False)


def make_database(url: str) -> str:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(NAME)))
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(NAME)))
    own = with_database(url, NAME)
    make_tables(own)
    with psycopg.connect(own, autocommit=True) as connection:
        connection.execute(resources.files("crossfade.stores").joinpath("schema.sql").read_bytes())
        connection.execute(
            "INSERT INTO crossfade.control (migration, epoch, record) VALUES (%s, 1, '{}')", [MIGRATION]
        )
    return own


def empty(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("TRUNCATE users, user_friends, user_pictures, crossfade.runs CASCADE")
        connection.execute("CHECKPOINT")


def write_copy_files(url: str, folder: Path) -> list[tuple[sql.Composed, Path]]:
    """Every row that a backfill has made, links included, in COPY's binary form, one file per table."""
    files = []
    with psycopg.connect(url) as connection:
        for table in (users.table, *(child.table for child in users.children)):
            name, columns = (
                sql.Identifier(table.name),
                sql.SQL(", ").join(map(sql.Identifier, table.columns.keys())),
            )
            path = folder / f"{table.name}.copy"
            out = sql.SQL("COPY {} ({}) TO STDOUT (FORMAT BINARY)").format(name, columns)
            with connection.cursor().copy(out) as copy, path.open("wb") as file:
                for block in copy:
                    file.write(block)
            files.append((sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(name, columns), path))
    return files


def bare_copy(url: str, files: list[tuple[sql.Composed, Path]]) -> float:
    """Seconds that copying the files into the tables takes."""
    with psycopg.connect(url) as connection:
        began = time.perf_counter()
        for statement, path in files:
            with connection.cursor().copy(statement) as copy, path.open("rb") as file:
                while block := file.read(1 << 18):
                    copy.write(block)
        connection.commit()
        return time.perf_counter() - began


class Worker:
    """A process that has loaded everything, and works on a run once it is told."""

    def __init__(self, mongo_uri: str, url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from bench.backfill import worker; worker()", mongo_uri, url],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def begin(self, run: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{run}\n")
        self._process.stdin.flush()

    def end(self) -> dict[str, Any]:
        """Peak memory in MiB, and what the run says of itself."""
        out, _ = self._process.communicate()
        assert self._process.returncode == 0
        return dict(json.loads(out))


def worker() -> None:
    """The process of a `Worker`."""
    print("ready", flush=True)
    run = sys.stdin.readline().strip()
    _, mongo_uri, url = sys.argv
    report = asyncio.run(_part(mongo_uri, url, run))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak": peak, **asdict(report.counts)}))


async def _part(mongo_uri: str, url: str, run: str) -> Report:
    source, target = BulkMongo(mongo_uri), await BulkPostgres.connect(url)
    try:
        made = Backfill(users, source, target, migration=MIGRATION, epoch=1)
        return await made.run(await target.runs.get(run), alone=False)
    finally:
        await target.close()
        source.close()


async def _begin(mongo_uri: str, url: str, workers: int, *, loading: bool) -> str:
    source, target = BulkMongo(mongo_uri), await BulkPostgres.connect(url)
    try:
        made = Backfill(users, source, target, migration=MIGRATION, epoch=1, loading=loading)
        return str((await made.begin(restart=True, workers=workers)).run)
    finally:
        await target.close()
        source.close()


async def _restore(url: str) -> None:
    target = await BulkPostgres.connect(url)
    try:
        await target.loading.restore(users, lambda _number, _of, _what: None)
    finally:
        await target.close()


def backfill(
    mongo_uri: str, url: str, expected: int, *, workers: int = 1, onto: bool = False, loading: bool = False
) -> tuple[float, float]:
    """Seconds and peak memory in MiB of a worker.

    Args:
        onto: the rows are there already.
        loading: foreign keys and further indexes are put aside, and made anew at the end.
    """
    if not onto:
        empty(url)
    crew = [Worker(mongo_uri, url) for _ in range(workers)]
    began = time.perf_counter()
    run = asyncio.run(_begin(mongo_uri, url, workers, loading=loading))
    for each in crew:
        each.begin(run)
    told = [each.end() for each in crew]
    if loading:
        asyncio.run(_restore(url))
    seconds = time.perf_counter() - began
    with psycopg.connect(url) as connection:
        [total] = connection.execute(
            "SELECT sum((counts->>%s)::int) FROM crossfade.ranges WHERE run = %s AND state = 'complete'",
            ["same" if onto else "inserted", run],
        ).fetchone() or (0,)
    assert total == expected, (total, expected)
    return seconds, max(one["peak"] for one in told)


def run(mongo_uri: str, database_url: str, count: int, rounds: int) -> bool:
    uri = with_database(mongo_uri, NAME)
    print(f"making {count:,} users ...", flush=True)
    fill_mongo(uri, count)
    url = make_database(database_url)
    ways = {
        "one": {"workers": 1}, "onto": {"workers": 1, "onto": True}, "two": {"workers": 2},
        "direct, one": {"workers": 1, "loading": True}, "direct, two": {"workers": 2, "loading": True},
    }  # fmt: skip
    took: dict[str, list[float]] = {way: [] for way in ("bare", *ways)}
    with tempfile.TemporaryDirectory(prefix="crossfade-bench-") as folder:
        backfill(uri, url, count, workers=2, loading=True)
        files = write_copy_files(url, Path(folder))
        size = sum(path.stat().st_size for _, path in files) / 2**20
        print(f"{count:,} users are {size:.0f} MiB in COPY's binary form", flush=True)
        for n in range(rounds):
            empty(url)
            took["bare"].append(bare_copy(url, files))
            for way, arguments in ways.items():
                took[way].append(backfill(uri, url, count, **arguments)[0])
            shown = ", ".join(f"{way} {seconds[-1]:.2f} s" for way, seconds in took.items())
            print(f"round {n + 1}: {shown}", flush=True)
    middle = {way: statistics.median(seconds) for way, seconds in took.items()}
    print(f"{count / middle['one']:,.0f} users/s, into empty tables {count / middle['direct, two']:,.0f}")
    bare = "bare binary COPY of the same rows into the same tables, one connection"
    return report(
        Figure("backfill, one process", middle["bare"] / middle["one"], bare, least=GOAL_GUARDED),
        Figure("backfill onto rows that are there, one process", middle["bare"] / middle["onto"], bare),
        Figure("backfill, two processes", middle["one"] / middle["two"], "one process"),
        Figure(
            "backfill into empty tables, two processes", middle["bare"] / middle["direct, two"], bare,
            least=GOAL_DIRECT,
        ),
        Figure(
            "backfill into empty tables, two processes", middle["direct, one"] / middle["direct, two"],
            "one process", least=GOAL_SCALING,
        ),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    from crossfade.embedded import EmbeddedServers

    with EmbeddedServers() as servers:
        return 0 if run(servers.mongo_uri, servers.database_url, arguments.users, arguments.rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
