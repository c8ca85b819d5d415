"""Backfill of users against a bare binary COPY of the same rows into the same indexed tables, in the same run.

    python -m bench.backfill [--users 200000] [--rounds 3]

Ends with two JSON lines, the speed and the memory. Rates depend on the machine; the ratio hardly does.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path
from typing import Any

import psycopg
import pymongo
from bson import ObjectId
from psycopg import sql

from bench import make_tables, with_database
from crossfade.bulk.backfill import Backfill, Report
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres
from scorekeeper.users.entity import users

GOAL_SPEED = 0.4
#: Peak memory may differ by this factor between a quarter of the users and all of them.
GOAL_MEMORY = 1.15
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
        batch: list[dict[str, Any]] = []
        for document in documents(count):
            batch.append(document)
            if len(batch) == 5000:
                collection.insert_many(batch, ordered=False)
                batch = []
        if batch:
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
        connection.execute("TRUNCATE users, user_friends, user_pictures, crossfade.runs")
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


async def backfill(mongo_uri: str, url: str) -> tuple[float, Report]:
    source, target = BulkMongo(mongo_uri), await BulkPostgres.connect(url)
    began = time.perf_counter()
    report = await Backfill(users, source, target, migration=MIGRATION, epoch=1).run(restart=True)
    seconds = time.perf_counter() - began
    await target.close()
    source.close()
    return seconds, report


def one_backfill(mongo_uri: str, url: str, expected: int) -> tuple[float, float]:
    """Seconds and peak memory in MiB of a backfill in a process of its own."""
    empty(url)
    code = (
        "import asyncio, json, resource, sys; from bench.backfill import backfill; "
        "seconds, report = asyncio.run(backfill(sys.argv[1], sys.argv[2])); "
        "print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "
        "report.state, report.counts.inserted]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, mongo_uri, url],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ,
    )
    seconds, memory, state, inserted = json.loads(done.stdout)
    assert (state, inserted) == ("complete", expected), (state, inserted)
    return seconds, memory


def run(mongo_uri: str, database_url: str, count: int, rounds: int) -> bool:
    few = count // 4
    many_uri, few_uri = with_database(mongo_uri, NAME), with_database(mongo_uri, f"{NAME}_few")
    print(f"making {count:,} users ...", flush=True)
    fill_mongo(many_uri, count)
    fill_mongo(few_uri, few)
    url = make_database(database_url)
    bare: list[float] = []
    ours: list[float] = []
    memory: list[float] = []
    with tempfile.TemporaryDirectory(prefix="crossfade-bench-") as folder:
        one_backfill(many_uri, url, count)
        files = write_copy_files(url, Path(folder))
        size = sum(path.stat().st_size for _, path in files) / 2**20
        print(f"{count:,} users are {size:.0f} MiB in COPY's binary form", flush=True)
        for n in range(rounds):
            empty(url)
            bare.append(bare_copy(url, files))
            seconds, peak = one_backfill(many_uri, url, count)
            ours.append(seconds)
            memory.append(peak)
            print(
                f"round {n + 1}: bare COPY {bare[-1]:.2f} s, backfill {seconds:.2f} s "
                f"({count / seconds:,.0f} users/s), ratio {bare[-1] / seconds:.2f}, peak {peak:.0f} MiB",
                flush=True,
            )
    small = statistics.median([one_backfill(few_uri, url, few)[1] for _ in range(min(rounds, 2))])
    large = statistics.median(memory)
    speed = statistics.median(bare) / statistics.median(ours)
    print(
        json.dumps(
            {
                "figure": "peak memory of a backfill",
                "value": round(large / small, 2),
                "unit": f"x that of {few} users ({small:.0f} MiB; {count} users: {large:.0f} MiB)",
                "against": f"backfill of {few} users",
                "goal": f"<= {GOAL_MEMORY}",
                "holds": large / small <= GOAL_MEMORY,
            }
        )
    )
    print(
        json.dumps(
            {
                "figure": "backfill rate",
                "value": round(speed, 2),
                "unit": f"x bare COPY ({count / statistics.median(ours):.0f} users/s)",
                "against": "bare binary COPY of the same rows into the same tables",
                "goal": f">= {GOAL_SPEED}",
                "holds": speed >= GOAL_SPEED,
            }
        )
    )
    return speed >= GOAL_SPEED and large / small <= GOAL_MEMORY


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    from crossfade.embedded import EmbeddedServers

    with EmbeddedServers() as servers:
        return 0 if run(servers.mongo_uri, servers.database_url, arguments.users, arguments.rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
