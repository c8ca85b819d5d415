"""A stage for failures: healthy workers that prepare and judge, workers that fail, and a restart after them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pymongo
import pytest

from crossfade import Crossfade, DuplicateKey, Entity, FailureStrategy
from crossfade.errors import CrossfadeError
from crossfade.record import CF, Image
from crossfade.testing.failure_points import Failure, FailurePoints, Killed, Place, Point
from crossfade.values import id_to_text

from ..protocol.conftest import FAST, PATIENCE, World, create_tables, requests_entity, users_entity
from .stories import STORIES, Telling

#: Of what the caller is told, what both stores may hold: nothing of it, all of it.
NOTHING = {
    "StoreUnavailable", "Unanswered", "Undone", "UndoPending", "DuplicateKey", "NotFound", "ConditionNotMet", "Busy",
    "StaleRevision", "Quarantined",
}  # fmt: skip
ENDS: Mapping[str, tuple[str, ...]] = {
    "acknowledged": ("after",),
    "OutcomeUnknown": ("before", "after"),
    "killed": ("before", "after"),
    **dict.fromkeys(NOTHING, ("before",)),
}
_numbers = itertools.count()


def entities() -> list[Entity]:
    """Users, who may have pictures, and friend requests."""
    return [users_entity(pictures=True), requests_entity()]


@dataclass(frozen=True)
class Case:
    """One story, told by a worker that fails at these points; ``lasting``: their store is dead from there on."""

    story: str
    strategy: FailureStrategy | None
    failures: Mapping[Place, Failure] = field(default_factory=dict)
    lasting: bool = False

    def __str__(self) -> str:
        where = ", ".join(f"{failure} at {place}" for place, failure in self.failures.items())
        strategy = self.strategy.value if self.strategy else "default"
        return f"{self.story} ({strategy}): {where}{' and from there on' if self.lasting else ''}"


@dataclass
class Outcome:
    """What became of a case.

    Attributes:
        told: what the caller heard: "acknowledged", "killed", or the name of an error.
        points: those that the run came by.
        struck: the failures that it met, by the number of the point.
    """

    case: Case
    telling: Telling
    told: str
    points: list[Point]
    struck: Mapping[int, Failure]

    def describe(self) -> str:
        at = ", ".join(f"{self.points[n]}: {failure}" for n, failure in self.struck.items())
        return f"{self.case}; met {at or 'nothing'}; told {self.told}"


@dataclass
class Stage:
    """One database in each store, and the workers upon them."""

    phase: str
    mongo_uri: str
    database_url: str
    documents: Any
    healthy: World

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, phase: str, mongo_uri: str, database_url: str) -> AsyncIterator[Stage]:
        with pymongo.MongoClient[dict[str, Any]](mongo_uri, tz_aware=True) as client:
            stage = cls(phase, mongo_uri, database_url, client.get_default_database(), None)  # type: ignore[arg-type]
            async with stage.worker(board_age=2.0) as stage.healthy:
                yield stage

    def _crossfade(self, mongo: Any = None, postgres: Any = None, **options: Any) -> tuple[Crossfade, Any]:
        cf = Crossfade(
            mongo_uri=mongo.uri if mongo else self.mongo_uri,
            database_url=postgres.uri if postgres else self.database_url,
            initial_phase=self.phase,
            # Nobody looks by himself here: one lease is enough for all.
            options=replace(FAST, **({"lease": 600.0} | options)), background=False,
        )  # fmt: skip
        return cf, cf.migration("accounts", entities())

    @contextlib.asynccontextmanager
    async def worker(self, **options: Any) -> AsyncIterator[World]:
        cf, migration = self._crossfade(**options)
        async with cf:
            await migration.board.obtain_lease()
            yield World(cf, migration, entities()[0], self.documents["users"], self.database_url)

    # --- one case ---

    async def play(
        self,
        case: Case,
        *,
        kill: Callable[[], None] = lambda: None,
        begins: Callable[[Telling], None] = lambda _: None,
        **proxies: Any,
    ) -> Outcome:
        """Tell the story by a worker of its own that fails as the case says, and is gone afterwards.

        ``kill`` ends the process where the case says so; ``begins`` hears of the records before the story is told;
        ``mongo``, ``postgres``: a proxy to go through.
        """
        telling = await self.prepared(case)
        told, points = await self.fail(
            telling.tell,
            case.failures,
            lasting=case.lasting,
            kill=kill,
            begins=lambda: begins(telling),
            **proxies,
        )
        return Outcome(case, telling, told, points.points, points.struck)

    async def prepared(self, case: Case) -> Telling:
        """A telling of the story with records of its own, which both stores hold."""
        telling = await STORIES[case.story](self.healthy.m, f"u{os.getpid()}-{next(_numbers)}", case.strategy)
        await self.healthy.settle()
        return telling

    async def fail(
        self,
        tell: Callable[[Any], Awaitable[Any]],
        failures: Mapping[Place, Failure],
        *,
        lasting: bool = False,
        kill: Callable[[], None] = lambda: None,
        begins: Callable[[], None] = lambda: None,
        **proxies: Any,
    ) -> tuple[str, FailurePoints]:
        """Do something by a worker of its own that fails so, and is gone afterwards; what was told, and the points.

        ``begins`` is called once the worker is open.
        """
        hurried = lasting or any(failure.waits for failure in failures.values())
        cf, migration = self._crossfade(board_age=2.0, **proxies)
        points = FailurePoints(cf, kill)
        await cf.__aenter__()
        await migration.board.obtain_lease()
        # It was opened with patience, and need not wait long for the others. A board's age and lease bound its looks.
        deadlines = {"primary_deadline": 0.3, "secondary_deadline": 0.1, "lease": 4.0} if hurried else {}
        migration.pair.options = replace(cf.options, **deadlines)
        migration.board.options = replace(migration.pair.options, board_age=0.1)
        begins()
        told = "killed"

        async def operation() -> None:
            nonlocal told
            try:
                await tell(migration)
                told = "acknowledged"
            except CrossfadeError as cause:
                told = type(cause).__name__
            if points.killed:
                told = "killed"
            # What is erased behind the caller's back has its points, too.
            joined = asyncio.ensure_future(migration.settler.eraser.join())
            await asyncio.wait({joined, migration.settler.eraser._task}, return_when=asyncio.FIRST_COMPLETED)
            joined.cancel()

        points.plan(failures, lasting=lasting)
        try:
            await asyncio.wait_for(points.run(operation), PATIENCE)
        except* Killed:
            pass  # alone, or of several tasks
        await points.deliver_late()
        points.end()
        await _drop(cf, migration)
        await self.clear_flag()
        return told, points

    async def clear_flag(self) -> None:
        """The next case is not to begin with what this one has found out about a store."""
        board, record = self.healthy.m.board, self.healthy.m.record
        now = (await board.refresh()).control
        if now.unreadable is not None:
            readable = now.changed(by="a test", reason="a test", unreadable=None, lifting=False)
            assert await record.change(now, readable, timeout=PATIENCE)
            await board.refresh()

    # --- and what is true after it ---

    async def violations(self, outcomes: Sequence[Outcome]) -> list[str]:
        """Restart, reconcile, and name every promise that does not hold."""
        async with self.worker(tentative=0.1, board_age=2.0) as restarted:
            found: list[str] = []
            try:
                await restarted.reconcile()
            except TimeoutError:
                left = await restarted.owed()
                found.append(f"not settled: {left}")
            found += await self._differences(restarted)
            if self.phase != "postgres_primary" and await restarted.m.reconciler.full_sweep():
                found.append("a full pass found a difference that was owed by nobody")
            held = await self._held()
            for outcome in outcomes:
                found += await self._judge(restarted, outcome, held)
            await restarted.settle()
        return found

    async def _differences(self, w: World) -> list[str]:
        """What is left over, or unlike in the two stores."""
        found = []
        for entity in entities():
            rows = {}
            for text, id_, _ in await w.postgres.ids_after(entity, "", limit=100_000, timeout=PATIENCE):
                rows[text] = await w.postgres.read(entity, id_, timeout=PATIENCE)
            async for image in w.mongo.scan(entity, batch=1000, timeout=PATIENCE):
                assert isinstance(image, Image)
                row = rows.pop(id_to_text(image.id), None)
                if row is None:
                    found.append(f"only in MongoDB: {image}")
                elif (row.rev, row.digest) != (image.rev, image.digest):
                    found.append(f"unlike: {image} and {row}")
                if image.keys != entity.keys(image.document):
                    found.append(f"keys {image.keys} of {image.document}")
            found += [f"only in PostgreSQL: {row}" for row in rows.values()]
            leftover = {
                "$or": [
                    {f"{CF}.{note}": {"$exists": True}} for note in ("debt", "steps", "deleted", "done.0")
                ]
            }
            found += [f"left over: {d}" for d in self.documents[entity.collection].find(leftover)]
        found += [
            f"keys held: {d}"
            for d in self.documents["users"].find({f"{CF}.keys.username": {"$type": "array"}})
        ]
        tombstones = self.documents["crossfade_tombstones"]
        found += [f"tombstone in debt: {d}" for d in tombstones.find({"debt": {"$exists": True}})]
        for table in ("outbox", "quarantine", "conflicts"):
            found += [f"left in {table}: {row}" for row in w.sql(f"SELECT * FROM crossfade.{table}")]
        return found

    async def _held(self) -> dict[str, dict[Any, tuple[Any, dict[str, Any]]]]:
        """By entity, by id and by user name: (id, document) as MongoDB holds it; PostgreSQL's is equal."""
        held: dict[str, dict[Any, tuple[Any, dict[str, Any]]]] = {}
        for entity in entities():
            there = held[entity.name] = {}
            for document in self.documents[entity.collection].find():
                id_, state = document["_id"], {k: v for k, v in document.items() if k not in ("_id", CF)}
                there[id_] = (id_, state)
                if "username" in state:
                    there[state["username"]] = (id_, state)
        return held

    async def end_of(self, outcome: Outcome) -> str:
        """Which end the story has come to: "before", "after" or "neither"."""
        return _end_of(outcome.telling, await self._held())[0]

    async def _judge(self, w: World, outcome: Outcome, held: Mapping[str, Any]) -> list[str]:
        telling = outcome.telling
        now = [held[entity].get(key, (None, None))[1] for entity, key in telling.records]
        end = (
            "before" if now == list(telling.before) else "after" if now == list(telling.after) else "neither"
        )
        allowed = ENDS.get(outcome.told, ())
        if end not in allowed:
            return [f"{outcome.describe()}: {end} of {allowed}: {now}"]
        found = []
        every = {name for names in telling.names.values() for name in names}
        for name in every:
            taken = name in telling.names[end]
            try:
                await w.users.insert({"username": name.upper()})
                if taken:
                    found.append(f"{outcome.describe()}: {name} could be registered twice")
            except DuplicateKey:
                if not taken:
                    found.append(f"{outcome.describe()}: {name} cannot be registered")
        return found


def _end_of(telling: Telling, held: Mapping[str, Any]) -> tuple[str, list[Any]]:
    now = [held[entity].get(key, (None, None))[1] for entity, key in telling.records]
    for end, states in (("before", telling.before), ("after", telling.after)):
        if now == list(states):
            return end, now
    return "neither", now


async def _drop(cf: Crossfade, migration: Any) -> None:
    """End a worker as the end of its process would: nothing is finished, every connection breaks."""
    tasks = [migration.settler.eraser._task, *migration.writer.background.running]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=1)
    for task in tasks:
        if task.done() and not task.cancelled():
            task.exception()
    await cf.mongo.close()
    await cf.postgres.close()


@pytest.fixture
async def open_stage(mongo_uri, database_url):
    """``await open_stage("dual_write")``."""
    async with contextlib.AsyncExitStack() as stack:
        create_tables(database_url)
        yield lambda phase: stack.enter_async_context(Stage.open(phase, mongo_uri, database_url))
