"""A small write of a record with a 10 MB picture: what a part costs, in time and in memory.

Four in turn, in one run: both stores, of a user whose picture is a part; of one whose picture is not declared as one;
of one who has no picture; and MongoDB alone, the same update of the same document, its image without the picture. That
one is the floor: MongoDB writes a document whole, whatever is asked of it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import os
import statistics
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from pymongo import AsyncMongoClient, ReturnDocument

from bench import two_databases
from crossfade import Crossfade, Entity, observe
from crossfade.board import Options
from crossfade.migration import EntityHandle
from scorekeeper.users.entity import users

NAME = "parts"
#: Bytes of a picture; as a data URL in the document it is 10 MB.
PICTURE = 7_500_000
WITH, UNDECLARED, NONE, ALONE = "a part", "undeclared", "no picture", "MongoDB alone"
#: More than MongoDB's own work upon the document.
GOAL_ALONE = 1.3
#: What the part saves.
GOAL_UNDECLARED = 0.6
#: MiB of Python's memory that a small write takes at its peak.
GOAL_MEMORY = 2.0

#: The same tables; only images always carry the picture.
whole = Entity(
    "whole", collection="whole", table=users.table, columns=users.columns,
    children=[replace(child, is_part=False) for child in users.children],
    unique=users.unique, order=users.order,
)  # fmt: skip

Way = Callable[[], Awaitable[object]]


def document(name: str, picture: str | None) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {
        "username": name, "passwordHash": "$2b$12$" + "x" * 53, "role": "user", "guestMetadata": None,
        "lastLogin": None, "profilePicture": picture, "friends": [], "createdAt": now, "updatedAt": now, "__v": 0,
    }  # fmt: skip


async def stamping(handle: EntityHandle, name: str, picture: str | None) -> Way:
    """A log-in of a user of their own: the name looked up without the picture, the time noted."""
    await handle.insert(document(name, picture))
    await handle.update((await _found(handle, name)).id, {"lastLogin": datetime.now(UTC)})
    await asyncio.sleep(0.5)  # until what both stores hold is noted

    async def log_in() -> None:
        await handle.update((await _found(handle, name)).id, {"lastLogin": datetime.now(UTC)})

    return log_in


async def _found(handle: EntityHandle, name: str) -> Any:
    found = await handle.find_by_key("username", name, parts=False)
    assert found is not None
    return found


async def alone(client: AsyncMongoClient[dict[str, Any]], picture: str) -> Way:
    """The same asked of MongoDB's driver."""
    collection = client[NAME]["alone"]
    id_ = (await collection.insert_one(document("alone", picture))).inserted_id
    small = {"profilePicture": 0}

    async def log_in() -> None:
        await collection.find_one({"_id": id_}, small)
        await collection.find_one_and_update(
            {"_id": id_}, {"$set": {"lastLogin": datetime.now(UTC)}}, small,
            return_document=ReturnDocument.AFTER,
        )  # fmt: skip

    return log_in


async def measure(
    ways: dict[str, Way], operations: int, settled: Way
) -> tuple[dict[str, float], dict[str, float]]:
    """By way: milliseconds in the median; MiB of Python's memory at the peak of one operation."""
    took: dict[str, list[float]] = {way: [] for way in ways}
    orders = itertools.cycle(list(itertools.permutations(ways)))
    for _ in range(operations):
        for way in next(orders):
            began = time.perf_counter()
            await ways[way]()
            took[way].append((time.perf_counter() - began) * 1000)
            await asyncio.sleep(0.05)
    peaks = {}
    tracemalloc.start()
    for way, work in ways.items():
        await settled()  # what another way owes is not this one's memory
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        await work()
        await asyncio.sleep(0.05)
        peaks[way] = (tracemalloc.get_traced_memory()[1] - before) / 2**20
    tracemalloc.stop()
    return {way: statistics.median(values) for way, values in took.items()}, peaks


async def run(mongo_uri: str, database_url: str, operations: int) -> bool:
    picture = "data:image/png;base64," + base64.b64encode(os.urandom(PICTURE)).decode()
    async with AsyncExitStack() as stack:
        client: AsyncMongoClient[dict[str, Any]] = await stack.enter_async_context(
            AsyncMongoClient(mongo_uri, w="majority", journal=True)
        )
        # Both stores have to answer, however slow they are with a picture: what is timed is the whole write.
        patient = Options(primary_deadline=30.0, secondary_deadline=10.0, sweep=0, full_sweep=0)
        cf = Crossfade(
            mongo_uri=mongo_uri, database_url=database_url, initial_phase="dual_write", options=patient
        )
        accounts = cf.migration("accounts", [users, whole])
        await stack.enter_async_context(cf)
        ways = {
            WITH: await stamping(accounts["users"], "with", picture),
            UNDECLARED: await stamping(accounts["whole"], "undeclared", picture),
            NONE: await stamping(accounts["users"], "none", None),
            ALONE: await alone(client, picture),
        }
        p50, peaks = await measure(ways, operations, accounts.reconciler.reconcile)
    for way in ways:
        print(f"{way:14} p50 {p50[way]:7.2f} ms   peak {peaks[way]:6.2f} MiB", flush=True)
    figures: list[tuple[str, float, str, str, float | None]] = [
        ("small write of a record with a 10 MB part", p50[WITH] / p50[ALONE], "x", ALONE, GOAL_ALONE),
        (
            "small write of a record with a 10 MB part",
            p50[WITH] / p50[UNDECLARED],
            "x",
            UNDECLARED,
            GOAL_UNDECLARED,
        ),
        ("small write of a record with a 10 MB part", p50[WITH] / p50[NONE], "x", NONE, None),
        (
            "peak memory of a small write",
            peaks[WITH],
            "MiB",
            f"{peaks[UNDECLARED]:.1f} MiB undeclared",
            GOAL_MEMORY,
        ),
    ]
    for figure, value, unit, against, goal in figures:
        line = {"figure": figure, "value": round(value, 2), "unit": unit, "against": against}
        if goal is not None:
            line |= {"goal": f"<= {goal}", "holds": value <= goal}
        print(json.dumps(line), flush=True)
    return all(goal is None or value <= goal for _, value, _, _, goal in figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=24)
    operations = parser.parse_args().operations
    observe.configure_logging("warning")
    with two_databases(NAME) as (mongo_uri, url):
        return 0 if asyncio.run(run(mongo_uri, url, operations)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
