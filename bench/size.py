"""Backfill and verify of ten times as many users: the same memory, ten times the time.

    python -m bench.size [--users 100000]

`--users 1000000` is the full size. Into empty tables, as the command does it with so many. One in a thousand users, up
to twenty, is of 15 MiB; they are put in once the time has been taken. Peak memory is that of a worker process as the
system counts it. Ends with a JSON line per figure.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import pymongo
from bson import ObjectId

from bench import Figure, report, with_database
from bench.backfill import NAME, backfill, fill_mongo, make_database
from bench.verify import verify

#: Time of all against that of a tenth of them; peak memory the same by this much, and at most so many MiB.
GOAL_TIME, GOAL_MEMORY, GOAL_MIB = 11.0, 1.2, 400.0
LARGE = 15 * 2**20


def add_large_users(uri: str, number: int) -> None:
    """Users with 15 MiB in a field that no column is for, all over the collection."""
    with pymongo.MongoClient[dict[str, Any]](uri) as client:
        collection = client.get_default_database()["users"]
        total = collection.estimated_document_count()
        for n in range(number):
            [at] = collection.find({}, {"_id": 1}).sort("_id", 1).skip(total * n // number).limit(1)
            beside = ObjectId(at["_id"].binary[:11] + bytes([at["_id"].binary[11] ^ 1]))
            text = "drawn by hand " * (LARGE // 14)
            collection.insert_one({"_id": beside, "username": f"Large{n}", "notes": text, "friends": []})


def run(mongo_uri: str, database_url: str, count: int) -> bool:
    numbers = (count // 10, count)
    uris = [with_database(mongo_uri, f"{NAME}_{number}") for number in numbers]
    url = make_database(database_url)
    took, peaks = [], []
    for uri, number in zip(uris, numbers, strict=True):
        print(f"making {number:,} users ...", flush=True)
        fill_mongo(uri, number)
        took.append((backfill(uri, url, number, loading=True)[0], verify(uri, url, number, 1, fast=False)[0]))
        print(f"{number:,} users: backfill {took[-1][0]:.1f} s, verify {took[-1][1]:.1f} s", flush=True)
        large = min(max(number // 1000, 1), 20)
        add_large_users(uri, large)
        peaks.append(
            (
                backfill(uri, url, number + large, loading=True)[1],
                verify(uri, url, number + large, 1, fast=False)[1],
            )
        )
        print(
            f"with {large} users of 15 MiB: backfill {peaks[-1][0]:.0f} MiB, verify {peaks[-1][1]:.0f} MiB",
            flush=True,
        )
    figures = []
    for what, (small, large), (little, much) in zip(
        ("backfill", "verify"), zip(*took, strict=True), zip(*peaks, strict=True), strict=True
    ):
        against = f"{numbers[0]:,} users"
        figures += [
            Figure(f"{what} of {count:,} users, time", large / small, against, most=GOAL_TIME),
            Figure(
                f"{what} of {count:,} users, memory", much / little, against, least=1 / GOAL_MEMORY, most=GOAL_MEMORY
            ),
            Figure(f"{what}, memory of a worker", max(little, much), "the limit", most=GOAL_MIB, unit="MiB"),
        ]  # fmt: skip
    return report(*figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--users", type=int, default=100_000)
    arguments = parser.parse_args()
    from crossfade.embedded import EmbeddedServers

    with EmbeddedServers() as servers:
        return 0 if run(servers.mongo_uri, servers.database_url, arguments.users) else 1


if __name__ == "__main__":
    sys.exit(main())
