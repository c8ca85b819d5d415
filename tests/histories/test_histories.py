"""Eight workers write and read a few records while everything around them fails; what they were told is checked.

A round takes seconds: workers are killed and replaced, connections cut, requests and answers lost, servers refuse;
reconcilers run in every worker, a backfill runs again and again, and in the phases that allow it another application
writes, too. ``SOAK=1800 pytest tests/histories`` (``make soak``) plays rounds for that many seconds; each prints its
seed, and ``HISTORY_SEED`` begins with that one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pymongo
import pytest
from bson import ObjectId

from crossfade import Crossfade, CrossfadeError, FailureStrategy, StoreUnavailable
from crossfade.board import end
from crossfade.bulk.backfill import Backfill
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres
from crossfade.stores.errors import Fenced
from crossfade.testing.failure_points import FailurePoints, Killed

from ..protocol.conftest import FAST, PATIENCE, World, create_tables, users_entity
from .history import Event, History

WORKERS = 8
RECORDS = 6
#: Rounds in which nobody is acknowledged before that is a failure.
ROUNDS_WITHOUT = 5
SOAK = float(os.environ.get("SOAK", "0"))
#: Seconds of trouble in one round: where there is time, workers live longer and do more between two starts.
ROUND = min(20.0, max(6.0, SOAK / 10))
SEED = int(os.environ.get("HISTORY_SEED", "1"))
PHASES = ("dual_write", "postgres_read", "postgres_primary")


@dataclass
class Round:
    """One round: the stores, the history, and the clock that all share."""

    phase: str
    seed: int
    mongo: Any
    postgres: Any
    history: History = field(default_factory=History)
    #: From 1,000 on: the table refuses a number below.
    values: Any = field(default_factory=lambda: itertools.count(1_000))
    ids: list[ObjectId] = field(default_factory=lambda: [ObjectId() for _ in range(RECORDS)])
    kills: int = 0

    def open(self, **how: Any) -> tuple[Crossfade, Any]:
        cf = Crossfade(
            mongo_uri=self.mongo.uri,
            database_url=self.postgres.uri,
            initial_phase=self.phase,
            foreign_writers=self.phase != "postgres_primary",
            options=how.pop("options", FAST),
            **how,
        )
        return cf, cf.migration("accounts", [users_entity()])

    def begin(self, kind: str, id_: Any, value: int | None = None) -> Event:
        event = Event(kind, id_, time.monotonic(), value=value)
        self.history.events.append(event)
        return event

    @property
    def foreign(self) -> list[ObjectId]:
        """The records that another application writes, too: of them less can be promised."""
        return self.ids[:2] if self.phase != "postgres_primary" else []


async def tell(round_: Round, m: Any, rng: random.Random) -> None:
    """One operation of one worker, and what it is told."""
    id_ = rng.choice(round_.ids)
    strategy = FailureStrategy.ROLLBACK_BOTH if rng.random() < 0.25 else None
    kind = rng.choice(["insert", "update", "update", "update", "delete", "read", "read", "read"])
    value = next(round_.values) if kind in ("insert", "update") else None
    event = round_.begin(kind, id_, value)
    try:
        match kind:
            case "insert":
                name = f"{id_}"
                done = await m.users.insert({"_id": id_, "username": name, "n": value}, strategy=strategy)
            case "update":
                done = await m.users.update(id_, {"n": value}, strategy=strategy)
            case "delete":
                done = await m.users.delete(id_, strategy=strategy)
            case _:
                done = await m.users.get(id_)
                event.value = None if done is None else done["n"]
                event.stale = done is not None and done.stale
        event.rev = None if done is None else done.rev
        event.told = "acknowledged"
    except StoreUnavailable:
        event.told = StoreUnavailable.__name__
    except CrossfadeError as cause:
        event.told = type(cause).__name__
    event.ended = time.monotonic()
    if event.told == StoreUnavailable.__name__:
        # Who asks a store that is away again and again at once leaves the others no processor.
        await asyncio.sleep(rng.uniform(0, 0.1))


async def worker(round_: Round, number: int, ends: float) -> None:
    """Operations, one after the other, until the end; now and then the process is killed, and another one begins."""
    rng = random.Random(f"{round_.seed} {number}")
    while time.monotonic() < ends:
        cf, m = round_.open()
        points = FailurePoints(cf)
        try:
            await cf.__aenter__()
        except CrossfadeError:
            # The stores are in trouble; the process is started again.
            await drop(cf, m)
            await asyncio.sleep(0.1)
            continue
        lives = min(ends, time.monotonic() + rng.uniform(0.5, ROUND))
        with contextlib.suppress(Killed):
            while time.monotonic() < lives:
                doing = asyncio.ensure_future(tell(round_, m, rng))
                await asyncio.wait({doing}, timeout=max(0.0, lives - time.monotonic()))
                if not doing.done():
                    # In the middle of what it does.
                    doing.cancel()
                    points.end()
                    round_.kills += 1
                    await asyncio.wait({doing})
                    break
                await doing
        points.end()
        await drop(cf, m)


async def drop(cf: Crossfade, m: Any) -> None:
    """End a worker as the end of its process would: nothing is finished, every connection breaks."""
    running = [m.board._task, m.reconciler._task, m.settler.eraser._task, *m.writer.background.running]
    tasks = [task for task in running if task is not None]
    await asyncio.gather(*(end(task) for task in tasks))
    for task in tasks:
        if not task.cancelled():
            task.exception()  # it may have met the end before this did
    await cf.mongo.close()
    await cf.postgres.close()


async def other_application(round_: Round, uri: str, ends: float) -> None:
    rng = random.Random(f"{round_.seed} another application")
    with pymongo.MongoClient[dict[str, Any]](uri, tz_aware=True) as client:
        users = client.get_default_database()["users"]
        while time.monotonic() < ends and round_.foreign:
            id_ = rng.choice(round_.foreign)
            event = round_.begin("foreign", id_, next(round_.values))
            change = {"$set": {"n": event.value}, "$currentDate": {"updatedAt": True}}
            done = await asyncio.to_thread(users.update_one, {"_id": id_}, change)
            event.told = "acknowledged" if done.matched_count else "NotFound"
            event.ended = time.monotonic()
            await asyncio.sleep(rng.uniform(0, 0.3))


async def backfills(round_: Round, mongo_uri: str, database_url: str, ends: float) -> None:
    while time.monotonic() < ends and round_.phase != "postgres_primary":
        source, target = BulkMongo(mongo_uri), await BulkPostgres.connect(database_url)
        with contextlib.suppress(Fenced):
            epoch = await target.epoch("accounts")
            assert epoch is not None
            await Backfill(
                users_entity(), source, target, migration="accounts", epoch=epoch, batch_size=2
            ).run(restart=True)
        await target.close()
        source.close()
        await asyncio.sleep(0.2)


async def trouble(round_: Round, ends: float) -> None:
    rng = random.Random(f"{round_.seed} trouble")
    while time.monotonic() < ends:
        proxy = rng.choice([round_.mongo, round_.postgres])
        match rng.choice(["cut", "before", "after", "refuse", "delay", "calm", "calm", "calm"]):
            case "cut":
                proxy.cut()
            case "before":
                proxy.cut_before_request(rng.randrange(1, 4))
            case "after":
                proxy.cut_after_request(rng.randrange(1, 4))
            case "refuse":
                proxy.refuse()
                await asyncio.sleep(rng.uniform(0, 0.8))
                proxy.pass_through()
            case "delay":
                proxy.delay(rng.uniform(0, 0.4))
                await asyncio.sleep(rng.uniform(0, 0.8))
                proxy.pass_through()
        await asyncio.sleep(rng.uniform(0, 0.3))


async def ended(round_: Round, w: World) -> dict[Any, tuple[int, int | None] | None]:
    """Everything owed is settled; what both stores hold then, which is the same."""
    await w.m.reconciler.reconcile()
    await w.m.reconciler.full_sweep() if round_.phase != "postgres_primary" else None
    await w.reconcile()
    await w.assert_equal()
    found: dict[Any, tuple[int, int | None] | None] = {}
    for id_ in round_.ids:
        image = await w.image(id_)
        found[id_] = None if image is None else (image.rev, image.document.get("n"))
    return found


async def play(round_: Round, mongo_uri: str, database_url: str) -> list[str]:
    first, _ = round_.open(background=False)
    async with first:
        pass  # both stores are prepared before the trouble begins
    ends = time.monotonic() + ROUND
    async with asyncio.timeout(ROUND + 2 * PATIENCE), asyncio.TaskGroup() as tasks:
        tasks.create_task(trouble(round_, ends))
        tasks.create_task(other_application(round_, mongo_uri, ends))
        tasks.create_task(backfills(round_, mongo_uri, database_url, ends))
        for number in range(WORKERS):
            tasks.create_task(worker(round_, number, ends))
    for proxy in (round_.mongo, round_.postgres):
        proxy.pass_through()
    cf, m = round_.open(background=False)
    async with cf:
        with pymongo.MongoClient[dict[str, Any]](mongo_uri, tz_aware=True) as client:
            w = World(cf, m, users_entity(), client.get_default_database()["users"], database_url)
            final = await ended(round_, w)
    return round_.history.violations(final)


@pytest.mark.long
@pytest.mark.timeout(SOAK + 300)
@pytest.mark.parametrize("phase", PHASES)
async def test_a_history_of_many_workers_in_trouble_could_have_happened_one_after_the_other(
    mongo_uri, database_url, mongo_proxy, postgres_proxy, record_property, phase
):
    create_tables(database_url)
    began, seed, kills = time.monotonic(), SEED, 0
    told: Counter[str] = Counter()
    while True:
        round_ = Round(phase, seed, mongo_proxy, postgres_proxy)
        violations = await play(round_, mongo_uri, database_url)
        told.update(event.told for event in round_.history.events)
        kills += round_.kills
        assert not violations, f"HISTORY_SEED={seed}\n" + round_.history.of_interest(violations)
        # On a machine that hardly moves a round can end before anybody is served: another may do better.
        if time.monotonic() - began > SOAK / len(PHASES) and (
            told["acknowledged"] or seed - SEED >= ROUNDS_WITHOUT
        ):
            break
        seed += 1
    record_property("history_events", told.total())
    rounds = f"{phase}: rounds {SEED} to {seed}, {kills} workers killed"
    print(f"{rounds}, {told.total()} operations: {dict(told.most_common())}")  # noqa: T201
    assert told["acknowledged"], "the trouble let nothing through"
