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
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pymongo
import pytest
from bson import ObjectId
from model.programs import compiler, environment

from crossfade import Crossfade, CrossfadeError, NotAllowedInPhase, Phase
from crossfade.control import ANNOUNCED, STEADY
from crossfade.switch import resume
from crossfade.testing.failure_points import Failure, FailurePoints, Killed, Place, Point
from crossfade.transition import change_phase

from ..protocol.conftest import FAST, PATIENCE, World, create_tables, eventually, users_entity
from ..protocol.test_switch import THERE, UNVERIFIED, Writing

PHASES = list(THERE)
STEPS = "0123457"
#: Short, so that workers soon go back from a switch whose coordinator is gone.
LIMIT = 1.0
LEASE = 1.5
FAILURES = (
    Failure.KILLED_BEFORE, Failure.KILLED_AFTER, Failure.REQUEST_LOST, Failure.ANSWER_LOST, Failure.REFUSED,
)  # fmt: skip
#: Cases of the coordinator's in an ordinary run.
SAMPLE = 5
#: Fewer points than this in a switch without failures: the counting is broken.
FEWEST = 60

Case = tuple[Place, Failure]


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

    async def play(self, failures: dict[Place, Failure]) -> list[Point]:
        """A coordinator that fails at these points; those that it came by."""
        cf, m = self.crossfade(background=False)
        points = FailurePoints(cf)
        await cf.__aenter__()
        points.plan(failures)

        def on_step(text: str) -> None:
            # Also the words that begin no numbered step: the guard before them, and going back.
            points.stage = text

        with contextlib.suppress(Killed, CrossfadeError):
            await asyncio.wait_for(points.run(lambda: self.switch(m, on_step)), PATIENCE)
        self.struck += bool(points.struck)
        points.end()
        m.settler.eraser._task.cancel()
        await cf.mongo.close()
        await cf.postgres.close()
        return points.points

    async def judge(self, w: World, worker: World, *, resumes: bool = False) -> None:
        """One primary, the same in both stores, and writes go on; ``resumes``: by a person, if workers are slower."""
        control = (await w.m.board.refresh()).control
        # Nobody waits for a switch that is only announced, so workers take their time to go back from it.
        if control.state == ANNOUNCED or (resumes and control.state != STEADY):
            with contextlib.suppress(NotAllowedInPhase):
                await resume(w.m, by="another")

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


async def count(stage: Stage, w: World, phase: str) -> list[Case]:
    """Every failure of a coordinator in one run without: at each point that another run comes by, too."""
    points = await stage.play({})
    await stage.begin_in(w, phase)
    again = {point.place for point in await stage.play({})}
    assert len(again) > FEWEST
    return [
        (point.place, failure)
        for point in points
        for failure in point.failures
        if point.place in again and failure in FAILURES
    ]


async def play_all(stage: Stage, w: World, worker: World, phase: str, cases: Sequence[Case]) -> None:
    for number, (place, failure) in enumerate(cases):
        await stage.begin_in(w, phase)
        await stage.play({place: failure})
        await stage.judge(w, worker, resumes=number % 2 == 0)
    assert stage.struck > 0.7 * len(cases), "points were not met"


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("phase", PHASES)
async def test_the_coordinator_fails_at_every_await(mongo_uri, database_url, record_property, phase, failure):
    async with stage_of(mongo_uri, database_url, phase) as (stage, w, worker):
        cases = [case for case in await count(stage, w, phase) if case[1] is failure]
        await play_all(stage, w, worker, phase, cases)
    record_property("failure_points", stage.struck)
    print(f"{phase}: the coordinator failed {stage.struck} times: {failure}")  # noqa: T201


@pytest.mark.parametrize("phase", PHASES)
async def test_the_coordinator_fails_at_some_awaits(mongo_uri, database_url, record_property, phase):
    chosen = random.Random(f"{os.environ['FAULTS_SEED']} switch {phase}")
    async with stage_of(mongo_uri, database_url, phase) as (stage, w, worker):
        cases = await count(stage, w, phase)
        await play_all(stage, w, worker, phase, chosen.sample(cases, SAMPLE))
    record_property("failure_points", stage.struck)


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
                    await answers(worker, w)
                    await stage.judge(w, worker)
                    played += 1
            await worker.settle()
            await w.m.board.refresh()
            await w.reconcile()
            await w.assert_equal()
    return played


async def answers(w: World, other: World) -> None:
    """Wait until both stores are back for these workers, and a write of the first one is acknowledged."""

    async def is_acknowledged() -> bool:
        try:
            await w.users.insert({"username": f"u{ObjectId()}"})
        except CrossfadeError:
            return False
        healths = [await each.cf.health() for each in (w, other)]
        return all(up for health in healths for up, _ in health.values())

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


async def sleeper(mongo_uri: str, database_url: str, phase: str, id_: Any, **environment: str) -> Any:
    """A worker in a process of its own that writes to this record, once it has made some writes."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.faults.sleeper", mongo_uri, database_url, phase, str(id_), str(LEASE),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=os.environ | environment,
    )  # fmt: skip
    assert process.stdout is not None
    for _ in range(4):
        await process.stdout.readline()
    return process


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
                process = await sleeper(mongo_uri, database_url, phase, made.id)

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
                told, _ = await process.communicate(b"")
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


# --- clocks ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def skewed_clock(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What makes the clocks of a process wrong, when it is preloaded."""
    library = tmp_path_factory.mktemp("clock") / "skewed_clock.so"
    source = Path(__file__).with_name("skewed_clock.c")
    subprocess.run(
        [*compiler(), "-shared", "-fPIC", "-o", str(library), str(source)], env=environment(), check=True
    )
    return str(library)


@contextlib.asynccontextmanager
async def beside_a_worker(mongo_uri: str, database_url: str, phase: str, **environment: str) -> Any:
    """A coordinator, the record that a worker in a process of its own writes to, and that process."""
    create_tables(database_url)
    with pymongo.MongoClient[dict[str, Any]](mongo_uri, tz_aware=True) as client:
        stage = Stage(mongo_uri, database_url, phase, client.get_default_database()["users"])
        async with stage.world(background=True) as worker, stage.world(background=False) as w:
            made = await worker.users.insert({"username": "Bob"})
            process = await sleeper(mongo_uri, database_url, phase, made.id, **environment)
            try:
                yield stage, w, made.id, process
            finally:
                if process.returncode is None:
                    process.kill()
            await w.m.board.refresh()
            await w.reconcile()
            await w.assert_equal()


def acknowledged(told: bytes) -> list[int]:
    """The numbers of which a sleeper was told a revision."""
    lines = [line.split() for line in told.decode().splitlines()]
    return [int(number) for number, what in lines if what.isdigit()]


@pytest.mark.parametrize(("phase", "offset"), [(PHASES[0], "18000"), (PHASES[1], "-18000")])
async def test_a_worker_whose_date_is_wrong_is_like_any_other(
    mongo_uri, database_url, phase, offset, skewed_clock
):
    wrong = {"LD_PRELOAD": skewed_clock, "CLOCK_OFFSET": offset}
    async with beside_a_worker(mongo_uri, database_url, phase, **wrong) as (stage, w, id_, process):
        done = await stage.switch(w.m)
        assert done.silent == ()
        for _ in range(4):
            await process.stdout.readline()
        told, _ = await process.communicate(b"")
        numbers = acknowledged(told)
        assert len(numbers) == len(told.splitlines()), told[-300:]
        await w.m.board.refresh()
        assert (await w.users.get(id_))["n"] == numbers[-1]
    assert w.conflicts() == []


@pytest.mark.parametrize("phase", PHASES)
async def test_what_a_worker_acknowledges_whose_lease_outlasts_all_others_is_found(
    mongo_uri, database_url, phase, skewed_clock
):
    """Far more than the one per cent that is assumed of clocks, and it sleeps through the switch."""
    wrong = {"LD_PRELOAD": skewed_clock, "CLOCK_RATE": "0.05"}
    async with beside_a_worker(mongo_uri, database_url, phase, **wrong) as (stage, w, id_, process):
        process.send_signal(signal.SIGSTOP)
        # The first attempt goes back where PostgreSQL has still to end the transaction that it was stopped in.
        await stage.begin_in(w, THERE[phase].value)
        process.send_signal(signal.SIGCONT)
        for _ in range(4):
            await process.stdout.readline()
        told, _ = await process.communicate(b"")
        last = acknowledged(told)[-1]
        await w.m.board.refresh()
        await w.reconcile()
        held = (await w.users.get(id_))["n"]
    # PostgreSQL refuses such a write for its epoch; in MongoDB it is made anew, or kept for a person to see.
    assert held == last or last in [document["n"] for _, document in w.conflicts()]
