"""Settling what an outage of PostgreSQL left in debt: by one reconciler, two and twenty, and under traffic.

    python -m bench.drain [--debts 100000]

Users are put into MongoDB as a worker leaves them that cannot reach PostgreSQL: with their first revision, its
operation and its debt. Then the reconcilers drain them, and the debts must be gone. Then, with PostgreSQL
as the primary, half of these users are made and half of them changed behind an outage of MongoDB; and then all of them
are deleted behind one of PostgreSQL. At last once more, while other users are written and read by a worker in the same
process, beside it the same traffic alone; and as many deletes of phase 0, which PostgreSQL has no rows of. Ends with a
JSON line per figure; rates depend on the machine.

A reconciler that has a worker to itself takes 250 records at once, two portions at a time. Beside callers of the same
process it takes a fifth of that, one portion at a time, and rests half as long as each took: what is converted is
converted on the loop that serves them.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import psycopg
import pymongo
from bson import ObjectId
from bson.int64 import Int64

from bench import as_a_service, two_databases
from bench.write_latency import document
from crossfade import Crossfade, Migration, Options, Phase, observe
from crossfade.entity import Entity
from crossfade.record import CF, Debt, new_operation
from crossfade.stores.mongo import TOMBSTONES
from crossfade.values import id_to_text
from scorekeeper.users.entity import users

NAME = "crossfade_drain"
GOAL = 3000
MANY = 20
#: How many reconcilers drain, one drain after the other.
ORDER = (1, 1, 2, 1, MANY, 1)
#: Reads and writes a second beside the last drain, and seconds without one.
RATE, QUIET_SECONDS = 50, 10.0
#: Nothing settles behind the bench's back.
QUIET = Options(poll=3600.0, board_age=3600.0, lease=7200.0, sweep=0, full_sweep=0, postgres_pool=6)


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


def owe_deletes(mongo_uri: str, ids: list[ObjectId]) -> None:
    """Bury these records in MongoDB, and remove those that there are; PostgreSQL has not heard of it."""
    with pymongo.MongoClient[dict[str, Any]](mongo_uri) as client:
        database = client.get_default_database()
        for at in range(0, len(ids), 1000):
            some = ids[at : at + 1000]
            database[TOMBSTONES].insert_many(
                {"_id": {"entity": users.name, "id": id_to_text(id_)}, "rev": Int64(2), "op": new_operation(),
                 "debt": True}
                for id_ in some
            )  # fmt: skip
            database[users.collection].delete_many({"_id": {"$in": some}})


def owe_deliveries(mongo_uri: str, database_url: str, epoch: int) -> None:
    """Write every row once more, with its outbox row, as behind an outage of MongoDB that has half of the records."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("UPDATE users SET cf_rev = cf_rev + 1, cf_op = gen_random_uuid()")
        connection.execute(
            "INSERT INTO crossfade.outbox (entity, id, rev, op, epoch, parts) "
            "SELECT %s, id, cf_rev, cf_op, %s, '{}' FROM users",
            [users.name, epoch],
        )
        connection.execute("ANALYZE crossfade.outbox")
    with pymongo.MongoClient[dict[str, Any]](mongo_uri) as client:
        half = all_ids(mongo_uri)[::2]
        client.get_default_database()[users.collection].delete_many({"_id": {"$in": half}})


async def set_phase(worker: Migration, phase: Phase) -> None:
    """The next phase at once: nobody else is there to be asked."""
    now = (await worker.board.refresh()).control
    await worker.record.change(now, now.changed(by="bench", reason="bench", phase=phase), timeout=5.0)
    await worker.board.refresh()


def all_ids(mongo_uri: str) -> list[ObjectId]:
    """Those of all users."""
    with pymongo.MongoClient[dict[str, Any]](mongo_uri) as client:
        return client.get_default_database()[users.collection].distinct("_id")


async def drain(accounts: list[Migration]) -> float:
    """Seconds until nothing is owed of what was when it began."""
    began = time.perf_counter()
    await asyncio.gather(*(each.reconciler.reconcile() for each in accounts))
    return time.perf_counter() - began


async def nothing_is_owed(worker: Migration) -> None:
    await worker.settler.eraser.join()
    left = (await worker.board.refresh()).debts
    assert not left, f"{len(left)} debts are left"


async def run(mongo_uri: str, database_url: str, debts: int) -> bool:
    async with AsyncExitStack() as stack:
        workers = []
        for _ in range(MANY):
            cf = Crossfade(
                mongo_uri=mongo_uri, database_url=database_url, initial_phase="dual_write", options=QUIET
            )
            workers.append(cf.migration("accounts", [users]))
            await stack.enter_async_context(cf)
        rates = []
        for reconcilers in ORDER:
            for store in ("mongo", "postgres"):
                await clear(store, mongo_uri, database_url)
            await asyncio.to_thread(owe, mongo_uri, debts, workers[0].board.control.epoch)
            took = await drain(workers[:reconcilers])
            await nothing_is_owed(workers[0])
            rates.append(debts / took)
            print(f"{reconcilers} reconciler(s): {debts:,} debts in {took:.1f} s", flush=True)
        await set_phase(workers[0], Phase.POSTGRES_PRIMARY)
        epoch = workers[0].board.control.epoch
        await asyncio.to_thread(owe_deliveries, mongo_uri, database_url, epoch)
        deliveries = debts / await drain(workers[:1])
        await nothing_is_owed(workers[0])
        print(f"{debts:,} deliveries: {deliveries:,.0f} a second", flush=True)
        await set_phase(workers[0], Phase.DUAL_WRITE)
        await asyncio.to_thread(owe_deletes, mongo_uri, await asyncio.to_thread(all_ids, mongo_uri))
        deletes = debts / await drain(workers[:1])
        await nothing_is_owed(workers[0])
        print(f"{debts:,} deletes: {deletes:,.0f} a second", flush=True)
        traffic_beside = [
            await beside_traffic(workers[0], mongo_uri, database_url, debts, **how)
            for how in ({}, {"apart": True}, {"deletes": True})
        ]
    one = rates[0]
    # The stores grow slower with what was drained before: each against those right before and behind it.
    two, many = (2 * rates[at] / (rates[at - 1] + rates[at + 1]) for at in (2, 4))
    figures = [
        ("debts settled a second, one reconciler", round(one), "records/s", f">= {GOAL}", one >= GOAL),
        (
            "deliveries settled a second, one reconciler",
            round(deliveries),
            "records/s",
            f">= {GOAL}",
            deliveries >= GOAL,
        ),
        (
            "deletes settled a second, one reconciler",
            round(deletes),
            "records/s",
            f">= {GOAL}",
            deletes >= GOAL,
        ),
        ("two reconcilers against one", round(two, 2), "x", "not slower", two >= 0.9),
        ("twenty reconcilers against one", round(many, 2), "x", "not slower", many >= 0.9),
    ]
    for by, (rate, alone, beside) in zip(
        ("a worker", "`crossfade reconcile`", "a worker, of deletes"), traffic_beside, strict=True
    ):
        print(
            f"under traffic, by {by}: p99 {alone:.1f} ms alone, {beside:.1f} ms beside the drain", flush=True
        )
        figures += [
            (
                f"debts settled a second under traffic, by {by}",
                round(rate),
                "records/s",
                f">= {GOAL}",
                rate >= GOAL,
            ),
            (
                f"p99 of traffic beside it, by {by}",
                round(beside / alone, 2),
                "x",
                "<= 2",
                beside <= 2 * alone,
            ),
        ]
    for figure, value, unit, goal, holds in figures:
        print(json.dumps({"figure": figure, "value": value, "unit": unit, "goal": goal, "holds": holds}))
    return all(figure[-1] for figure in figures)


async def traffic(accounts: Migration, ids: list[ObjectId], until: asyncio.Event) -> list[float]:
    """Milliseconds that a read and a write took, `RATE` of them a second."""
    took = []
    for id_ in itertools.cycle(ids):
        if until.is_set():
            return took
        began = time.perf_counter()
        record = await accounts.users.get(id_)
        assert record is not None
        await accounts.users.update(id_, {"lastLogin": datetime.now(UTC)})
        took.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(max(0.0, 1 / RATE - took[-1] / 1000))
    return took


def accounts() -> list[Entity]:
    """The entities, for the command."""
    return [users]


async def drain_apart(mongo_uri: str, database_url: str) -> float:
    """Seconds that `crossfade reconcile` took, a process of its own."""
    began, addresses = time.perf_counter(), {"MONGO_URI": mongo_uri, "DATABASE_URL": database_url}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from crossfade.cli.main import main; main()", "reconcile", "--json",
        env={**os.environ, **addresses, "CROSSFADE_APP": "bench.drain:accounts"},
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    print(out.decode().strip(), flush=True)
    return time.perf_counter() - began


async def beside_traffic(
    worker: Migration,
    mongo_uri: str,
    database_url: str,
    debts: int,
    *,
    apart: bool = False,
    deletes: bool = False,
) -> tuple[float, float, float]:
    """Records settled a second while others are written, and the p99 of that traffic without and with it.

    ``apart``: by `crossfade reconcile`; ``deletes``: tombstones of records that PostgreSQL has never had.
    """
    for store in ("mongo", "postgres"):
        await clear(store, mongo_uri, database_url)
    ids = [(await worker.users.insert(document(f"{n}"))).id for n in range(200)]
    quiet = asyncio.Event()
    asyncio.get_running_loop().call_later(QUIET_SECONDS, quiet.set)
    alone = await traffic(worker, ids, quiet)
    if deletes:
        await asyncio.to_thread(owe_deletes, mongo_uri, [ObjectId() for _ in range(debts)])
    else:
        await asyncio.to_thread(owe, mongo_uri, debts, worker.board.control.epoch)
    drained = asyncio.Event()
    beside = asyncio.create_task(traffic(worker, ids, drained))
    took = await (drain_apart(mongo_uri, database_url) if apart else drain([worker]))
    drained.set()
    found = debts / took, p99(alone), p99(await beside)
    await worker.reconciler.reconcile()
    await nothing_is_owed(worker)
    return found


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


async def clear(store: str, mongo_uri: str, database_url: str) -> None:
    """Empty the entity's collection, or its tables."""
    if store == "mongo":
        with pymongo.MongoClient[dict[str, Any]](mongo_uri) as client:
            for name in (users.collection, TOMBSTONES):
                client.get_default_database()[name].delete_many({})
    else:
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
            await connection.execute("TRUNCATE users, crossfade.tombstones CASCADE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--debts", type=int, default=100_000)
    debts = parser.parse_args().debts
    observe.configure_logging("warning")
    with two_databases(NAME) as (mongo_uri, url):
        return 0 if as_a_service(run(mongo_uri, url, debts)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
