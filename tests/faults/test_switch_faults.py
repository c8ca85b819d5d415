"""The switch of the primary, its coordinator, each store and a worker failing at every step, in both directions.

However it ends: there is exactly one primary, both stores say so, writes go on, none that was acknowledged is lost, and
both stores are equal. The coordinator fails at every await on a store, by instrumentation; the others at every numbered
step.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pymongo
import pytest
from bson import ObjectId

from crossfade import Crossfade, CrossfadeError, Phase
from crossfade.control import STEADY
from crossfade.testing.failure_points import Failure, FailurePoints, Killed
from crossfade.transition import change_phase

from ..protocol.conftest import FAST, PATIENCE, World, create_tables, eventually, users_entity
from ..protocol.test_switch import THERE, UNVERIFIED, Writing

PHASES = list(THERE)
STEPS = "0123457"
#: Short, so that workers soon go back from a switch whose coordinator is gone.
LIMIT = 1.0
LEASE = 1.5
KILLS = (Failure.KILLED_BEFORE, Failure.KILLED_AFTER)
LOSSES = (Failure.REQUEST_LOST, Failure.ANSWER_LOST)


class Stage:
    """Two stores, a worker that goes on writing, and coordinators that fail."""

    def __init__(self, mongo_uri: str, database_url: str, phase: str, documents: Any) -> None:
        self.mongo_uri, self.database_url, self.phase, self.documents = (
            mongo_uri,
            database_url,
            phase,
            documents,
        )
        self.struck = 0

    def crossfade(self, *, background: bool, **options: Any) -> tuple[Crossfade, Any]:
        cf = Crossfade(
            mongo_uri=self.mongo_uri, database_url=self.database_url, initial_phase=self.phase,
            options=replace(FAST, lease=LEASE, board_age=0.3, **options), background=background,
        )  # fmt: skip
        return cf, cf.migration("accounts", [users_entity()])

    @contextlib.asynccontextmanager
    async def world(self, *, background: bool) -> Any:
        cf, m = self.crossfade(background=background)
        async with cf:
            yield World(cf, m, users_entity(), self.documents, self.database_url)

    async def switch(self, m: Any, on_step: Callable[[str], None] = lambda _: None) -> Any:
        target = THERE[m.phase.value]
        force = UNVERIFIED if target is Phase.POSTGRES_PRIMARY else ()
        return await change_phase(m, target, by="x", reason="y", force=force, limit=LIMIT, on_step=on_step)

    async def begin_in(self, w: World, phase: str) -> None:
        async with asyncio.timeout(PATIENCE):
            while (await w.m.board.refresh()).control.phase.value != phase:
                with contextlib.suppress(CrossfadeError):
                    await self.switch(w.m)

    async def play(self, failures: dict[int, Failure]) -> int:
        """A coordinator that fails at these points; how many it came by."""
        cf, m = self.crossfade(background=False)
        points = FailurePoints(cf)
        await cf.__aenter__()
        points.plan(failures)
        with contextlib.suppress(Killed, CrossfadeError):
            await asyncio.wait_for(points.run(lambda: self.switch(m)), PATIENCE)
        self.struck += bool(points.struck)
        points.end()
        m.settler._task.cancel()
        await cf.mongo.close()
        await cf.postgres.close()
        return len(points.points)

    async def judge(self, w: World, worker: World) -> None:
        """One primary, the same in both stores, and writes go on."""

        async def has_ended() -> bool:
            seen = await w.m.record.look(timeout=PATIENCE)
            agree = {copy.version for copy in seen.copies.values()}
            return seen.control is not None and seen.control.state == STEADY and len(agree) == 1

        await eventually(has_ended)
        await w.m.board.refresh()
        made = await worker.users.insert({"username": f"u{ObjectId()}"})
        assert made.source == w.m.primary


@contextlib.asynccontextmanager
async def stage_of(mongo_uri: str, database_url: str, phase: str) -> Any:
    create_tables(database_url)
    with pymongo.MongoClient[dict[str, Any]](mongo_uri, tz_aware=True) as client:
        stage = Stage(mongo_uri, database_url, phase, client.get_default_database()["users"])
        async with stage.world(background=True) as worker, stage.world(background=False) as w:
            writing = Writing(worker, (await worker.users.insert({"username": "Bob"})).id)
            yield stage, w, worker
            last = await writing.end()
            assert (await worker.users.get(writing.id))["n"] == last
            await worker.settle()
            await w.m.board.refresh()
            await w.reconcile()
            await w.assert_equal()
            assert w.conflicts() == []


async def play_all(
    mongo_uri: str, database_url: str, phase: str, choose: Callable[[int], list[dict[int, Failure]]]
) -> int:
    async with stage_of(mongo_uri, database_url, phase) as (stage, w, worker):
        points = await stage.play({})
        cases = choose(points)
        for case in cases:
            await stage.begin_in(w, phase)
            await stage.play(case)
            await stage.judge(w, worker)
        assert stage.struck > 0.9 * len(cases), "points were not met"
        return len(cases)


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("phase", PHASES)
async def test_the_coordinator_fails_at_every_await(mongo_uri, database_url, record_property, phase):
    played = await play_all(
        mongo_uri, database_url, phase,
        lambda points: [{n: failure} for n in range(points) for failure in KILLS + LOSSES],
    )  # fmt: skip
    record_property("failure_points", played)
    print(f"{phase}: the coordinator failed {played} times")  # noqa: T201


@pytest.mark.faults
@pytest.mark.parametrize("phase", PHASES)
async def test_the_coordinator_fails_at_some_awaits(mongo_uri, database_url, record_property, phase):
    chosen = random.Random(f"{os.environ['FAULTS_SEED']} switch {phase}")
    played = await play_all(
        mongo_uri, database_url, phase,
        lambda points: [{chosen.randrange(points * 4 // 5): chosen.choice(KILLS + LOSSES)} for _ in range(5)],
    )  # fmt: skip
    record_property("failure_points", played)


# --- the stores ------------------------------------------------------------------------------------------------------


async def lose_a_store(phase: str, steps: str, uris: tuple[str, str], proxies: dict[str, Any]) -> int:
    """At each of these steps each store is gone for a while, for everybody."""
    create_tables(uris[1])
    played = 0
    with pymongo.MongoClient[dict[str, Any]](uris[0], tz_aware=True) as client:
        stage = Stage(
            proxies["mongo"].uri, proxies["postgres"].uri, phase, client.get_default_database()["users"]
        )
        async with stage.world(background=True) as worker, stage.world(background=False) as w:
            w.database_url = uris[1]
            await worker.users.insert({"username": "Bob"})
            for step in steps:
                for proxy in proxies.values():
                    await stage.begin_in(w, phase)
                    gone = asyncio.Event()

                    def on_step(text: str, step: str = step, proxy: Any = proxy, gone: Any = gone) -> None:
                        if text.startswith(step):
                            proxy.refuse()
                            gone.set()

                    switching = asyncio.create_task(stage.switch(w.m, on_step))
                    await asyncio.wait({switching, asyncio.create_task(gone.wait())}, timeout=PATIENCE)
                    await asyncio.wait({switching}, timeout=LIMIT + 0.5)
                    proxy.pass_through()
                    with contextlib.suppress(CrossfadeError):
                        await switching
                    await answers(worker)
                    await stage.judge(w, worker)
                    played += 1
            await worker.settle()
            await w.m.board.refresh()
            await w.reconcile()
            await w.assert_equal()
    return played


async def answers(w: World) -> None:
    """Wait until both stores are back for this worker, and a write of its is acknowledged."""

    async def is_acknowledged() -> bool:
        try:
            await w.users.insert({"username": f"u{ObjectId()}"})
        except CrossfadeError:
            return False
        return all(up for up, _ in (await w.cf.health()).values())

    await eventually(is_acknowledged)


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("phase", PHASES)
async def test_each_store_is_lost_at_every_step(
    mongo_uri, database_url, mongo_proxy, postgres_proxy, record_property, phase
):
    proxies = {"mongo": mongo_proxy, "postgres": postgres_proxy}
    played = await lose_a_store(phase, STEPS, (mongo_uri, database_url), proxies)
    record_property("failure_points", played)
    print(f"{phase}: a store was lost {played} times")  # noqa: T201


@pytest.mark.faults
@pytest.mark.parametrize("phase", PHASES)
async def test_each_store_is_lost_at_the_decision(
    mongo_uri, database_url, mongo_proxy, postgres_proxy, phase
):
    proxies = {"mongo": mongo_proxy, "postgres": postgres_proxy}
    await lose_a_store(phase, "5", (mongo_uri, database_url), proxies)


# --- the workers -----------------------------------------------------------------------------------------------------


async def stop_a_worker(
    phase: str, steps: str, how: signal.Signals, mongo_uri: str, database_url: str
) -> int:
    """At each of these steps a worker's process is stopped, to wake when all is over, or killed."""
    create_tables(database_url)
    with pymongo.MongoClient[dict[str, Any]](mongo_uri, tz_aware=True) as client:
        stage = Stage(mongo_uri, database_url, phase, client.get_default_database()["users"])
        async with stage.world(background=True) as worker, stage.world(background=False) as w:
            for step in steps:
                await stage.begin_in(w, phase)
                made = await worker.users.insert({"username": f"u{ObjectId()}"})
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "tests.faults.sleeper", mongo_uri, database_url, phase, str(made.id),
                    str(LEASE), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                )  # fmt: skip
                for _ in range(4):
                    await process.stdout.readline()

                def on_step(text: str, step: str = step, process: Any = process) -> None:
                    if text.startswith(step):
                        process.send_signal(how)

                with contextlib.suppress(CrossfadeError):
                    await stage.switch(w.m, on_step)
                await stage.judge(w, worker)
                if how is signal.SIGSTOP:
                    await asyncio.sleep(LEASE)
                    process.send_signal(signal.SIGCONT)
                    for _ in range(4):
                        await process.stdout.readline()
                told, _ = await process.communicate()
                await assert_kept(w, made.id, told.decode().split("\n")[:-1])
            await worker.settle()
            await w.m.board.refresh()
            await w.reconcile()
            await w.assert_equal()
            return len(steps)


async def assert_kept(w: World, id_: Any, told: list[str]) -> None:
    """The last number that was acknowledged, or a later one, stands."""
    await w.m.board.refresh()
    await w.reconcile()
    last = max((int(n) for n, what in map(str.split, told) if what.isdigit()), default=0)
    row = await w.users.get(id_)
    assert row is not None
    assert row.document.get("n", 0) >= last, told[-6:]


SIGNALS = [signal.SIGSTOP, signal.SIGKILL]


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", SIGNALS, ids=["stopped", "killed"])
@pytest.mark.parametrize("phase", PHASES)
async def test_a_worker_is_lost_at_every_step(mongo_uri, database_url, record_property, phase, how):
    played = await stop_a_worker(phase, STEPS, how, mongo_uri, database_url)
    record_property("failure_points", played)
    print(f"{phase}: a worker met {how.name} {played} times")  # noqa: T201


@pytest.mark.faults
@pytest.mark.parametrize("phase", PHASES)
async def test_a_worker_that_is_stopped_before_the_fence_and_wakes_after_the_switch_loses_nothing(
    mongo_uri, database_url, phase
):
    await stop_a_worker(phase, "2", signal.SIGSTOP, mongo_uri, database_url)
