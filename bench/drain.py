"""Settling what an outage of PostgreSQL left in debt: by one reconciler, by two and by twenty at once.

    python -m bench.drain [--debts 20000]

Users are put into MongoDB as a worker leaves them that cannot reach PostgreSQL: with their first revision, its
operation and its debt. Then the reconcilers drain them, nobody else writes, and the debts must be gone. Ends with a
JSON line per figure; rates depend on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from contextlib import AsyncExitStack
from typing import Any

import psycopg
import pymongo
from bson import ObjectId
from bson.int64 import Int64
from sqlalchemy import create_engine

from bench.backfill import with_database
from bench.write_latency import document
from crossfade import Crossfade, Migration, Options, observe
from crossfade.embedded import EmbeddedServers
from crossfade.record import CF, Debt, new_operation
from scorekeeper.schema import metadata
from scorekeeper.users.entity import users

NAME = "crossfade_drain"
GOAL = 3000
MANY = 20
#: Nothing settles behind the bench's back.
QUIET = Options(poll=3600.0, board_age=3600.0, lease=7200.0, sweep=0, full_sweep=0, postgres_pool=3)


def owe(mongo_uri: str, debts: int, epoch: int) -> None:
    """Put users into MongoDB that PostgreSQL has not heard of."""
    with pymongo.MongoClient[dict[str, Any]](mongo_uri) as client:
        collection = client.get_default_database()[users.collection]
        for start in range(0, debts, 1000):
            made = []
            for n in range(start, min(start + 1000, debts)):
                fields, op = {"_id": ObjectId(), **document(f"player {n}")}, new_operation()
                notes = {"rev": Int64(1), "op": op, "born": op, "keys": users.keys(fields),
                         "debt": Debt(epoch).to_document()}  # fmt: skip
                made.append({**fields, CF: notes})
            collection.insert_many(made)


async def drain(accounts: list[Migration]) -> float:
    """Seconds until nothing is owed."""
    began = time.perf_counter()
    await asyncio.gather(*(each.reconciler.reconcile() for each in accounts))
    took = time.perf_counter() - began
    left = (await accounts[0].board.refresh()).debts
    assert not left, f"{len(left)} debts are left"
    return took


async def run(mongo_uri: str, database_url: str, debts: int) -> bool:
    mongo_uri = with_database(mongo_uri, NAME)
    async with AsyncExitStack() as stack:
        workers = []
        for _ in range(MANY):
            cf = Crossfade(
                mongo_uri=mongo_uri, database_url=database_url, initial_phase="dual_write", options=QUIET
            )
            workers.append(cf.migration("accounts", [users]))
            await stack.enter_async_context(cf)
        rates = []
        for reconcilers in (1, 2, MANY):
            for store in ("mongo", "postgres"):
                await clear(store, mongo_uri, database_url)
            await asyncio.to_thread(owe, mongo_uri, debts, workers[0].board.control.epoch)
            took = await drain(workers[:reconcilers])
            rates.append(debts / took)
            print(f"{reconcilers} reconciler(s): {debts:,} debts in {took:.1f} s", flush=True)
    one, two, many = rates
    figures = [
        ("debts settled a second, one reconciler", round(one), "records/s", f">= {GOAL}", one >= GOAL),
        ("two reconcilers against one", round(two / one, 2), "x", "not slower", two >= 0.9 * one),
        ("twenty reconcilers against one", round(many / one, 2), "x", "not slower", many >= 0.9 * one),
    ]
    for figure, value, unit, goal, holds in figures:
        print(json.dumps({"figure": figure, "value": value, "unit": unit, "goal": goal, "holds": holds}))
    return all(figure[-1] for figure in figures)


async def clear(store: str, mongo_uri: str, database_url: str) -> None:
    """Empty the entity's collection, or its tables."""
    if store == "mongo":
        with pymongo.MongoClient[dict[str, Any]](mongo_uri) as client:
            client.get_default_database()[users.collection].delete_many({})
    else:
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
            await connection.execute("TRUNCATE users CASCADE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--debts", type=int, default=20_000)
    debts = parser.parse_args().debts
    observe.configure_logging("warning")
    with EmbeddedServers(environ={}) as servers:
        with psycopg.connect(servers.database_url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {NAME}")
        url = with_database(servers.database_url, NAME)
        engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
        metadata.create_all(engine)
        engine.dispose()
        return 0 if asyncio.run(run(servers.mongo_uri, url, debts)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
