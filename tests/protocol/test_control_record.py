"""Where a migration stands: one record, changed by compare-and-set, and the fence that it is."""

import asyncio
import contextlib
from typing import Any

import psycopg
import pytest

from crossfade import OutcomeUnknown, Phase, StoreUnavailable
from crossfade.control import Control, ControlRecord
from crossfade.stores.errors import Fenced
from crossfade.transition import change_phase

from .conftest import PATIENCE
from .test_images import apply, image_of


@pytest.mark.parametrize("phase", ["dual_write", "postgres_primary"])
async def test_of_two_that_change_it_one_wins(open_world, phase):
    w = await open_world(phase)
    old = w.control
    tries = [old.changed(by=str(n), reason="race", dual_epoch=n) for n in range(8)]
    won = await asyncio.gather(*(w.m.record.change(old, new, timeout=PATIENCE) for new in tries))
    assert sum(won) == 1
    winner = tries[won.index(True)]
    seen = await w.m.record.look(timeout=PATIENCE)
    assert seen.control == winner
    # Both copies are at it.
    assert (seen.mongo, seen.postgres) == (winner.version, winner.version)


@pytest.mark.parametrize("phase", ["mongo_only", "dual_write", "postgres_primary"])
async def test_workers_that_begin_together_agree(open_world, phase):
    worlds = await asyncio.gather(*(open_world(phase) for _ in range(3)))
    assert len({w.control for w in worlds}) == 1
    assert worlds[0].control.phase is Phase(phase)


@pytest.mark.parametrize("phases", [("mongo_only", "postgres_primary"), ("postgres_primary", "mongo_only")])
async def test_workers_that_are_told_different_phases_and_begin_together_agree(
    open_world, monkeypatch, phases
):
    w = await open_world("dual_write")
    one, other = (ControlRecord("games", w.mongo, w.postgres) for _ in range(2))
    mine, theirs = (Control("games", phase=Phase(phase)) for phase in phases)
    look, spread = one.look, other.spread
    written, released = asyncio.Event(), asyncio.Event()
    beginning: list[asyncio.Task[Control]] = []

    async def look_before_the_other_begins(**how: Any) -> Any:
        seen = await look(**how)
        if not beginning:
            beginning.append(asyncio.create_task(other.begin(theirs, timeout=PATIENCE)))
            await written.wait()
        return seen

    async def spread_late(*of: Any, **how: Any) -> Any:
        written.set()
        await released.wait()
        return await spread(*of, **how)

    monkeypatch.setattr(one, "look", look_before_the_other_begins)
    monkeypatch.setattr(other, "spread", spread_late)
    begun = await one.begin(mine, timeout=PATIENCE)
    released.set()
    assert await beginning[0] == begun == theirs
    copies = (await look(timeout=PATIENCE)).copies
    assert copies == {"mongo": theirs, "postgres": theirs}


async def test_the_phase_lives_in_the_stores_not_in_a_setting(open_world):
    w = await open_world("dual_write")
    await w.set_phase("shadow_read")
    assert (await open_world("mongo_only")).m.phase is Phase.SHADOW_READ


async def test_a_copy_that_lags_is_carried_over_by_the_next_look(open_world):
    w = await open_world("dual_write")
    new = w.control.changed(by="x", reason="died before the copy", phase=Phase.SHADOW_READ)
    assert await w.mongo.change_control(
        "accounts", new.to_document(), expected=w.control.version, timeout=PATIENCE
    )
    look = await w.m.board.refresh()
    assert look.control == new
    seen = await w.m.record.look(timeout=PATIENCE)
    assert seen.mongo == seen.postgres == new.version


async def test_a_transaction_whose_client_has_stopped_keeps_no_change_of_epoch_waiting(
    open_world, database_url
):
    """A process that is stopped within a pipeline is not idle in transaction, as the server sees it."""
    w = await open_world("postgres_primary")
    shared = "SELECT pg_advisory_xact_lock_shared(hashtextextended('crossfade:accounts', 0))"
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as stopped:
        with contextlib.suppress(psycopg.OperationalError):
            async with stopped.pipeline():
                await stopped.execute("BEGIN")
                await (await stopped.execute(shared)).fetchall()
                await w.set_phase("postgres_read")
                await stopped.execute("COMMIT")
        assert stopped.broken
    assert w.m.phase is Phase.POSTGRES_READ


async def test_a_transaction_that_sends_many_rows_is_waited_for(open_world, database_url):
    """Within a COPY the server waits for its client most of the time."""
    w = await open_world("postgres_primary")
    shared = "SELECT pg_advisory_xact_lock_shared(hashtextextended('crossfade:accounts', 0))"
    rows, times = b"x" * 99 + b"\n", 40
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as busy:
        async with busy.transaction():
            await busy.execute(shared)
            await busy.execute("CREATE TEMPORARY TABLE copied (line text)")
            changing = asyncio.create_task(w.set_phase("postgres_read"))
            async with busy.cursor().copy("COPY copied FROM STDIN") as copy:
                for _ in range(times):
                    await copy.write(rows * 2_000)
                    await asyncio.sleep(0.05)
            assert not changing.done()
        cursor = await busy.execute("SELECT count(*) FROM copied")
        assert await cursor.fetchone() == (times * 2_000,)
        await changing


async def test_a_transaction_whose_client_stops_within_its_rows_is_not(open_world, database_url):
    w = await open_world("postgres_primary")
    shared = "SELECT pg_advisory_xact_lock_shared(hashtextextended('crossfade:accounts', 0))"
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as stopped:
        with contextlib.suppress(psycopg.OperationalError):
            async with stopped.transaction():
                await stopped.execute(shared)
                await stopped.execute("CREATE TEMPORARY TABLE copied (line text)")
                async with stopped.cursor().copy("COPY copied FROM STDIN") as copy:
                    await copy.write(b"x\n" * 50_000)
                    await w.set_phase("postgres_read")
        assert stopped.broken
    assert w.m.phase is Phase.POSTGRES_READ


async def test_an_older_copy_never_replaces_a_newer_one(open_world):
    w = await open_world("dual_write")
    old = w.control
    await w.set_phase("shadow_read")
    for store in (w.mongo, w.postgres):
        await store.copy_control("accounts", old.to_document(), timeout=PATIENCE)
    seen = await w.m.record.look(timeout=PATIENCE)
    assert seen.mongo == seen.postgres == old.version + 1


async def test_a_look_without_the_primary_renews_nothing(open_world, mongo_proxy):
    w = await open_world("dual_write", mongo=mongo_proxy)
    began = w.m.board.look.began
    mongo_proxy.refuse()
    with pytest.raises(StoreUnavailable):
        await w.m.board.refresh()
    assert w.m.board.look.began == began


async def test_a_worker_of_an_older_epoch_cannot_write_to_postgres(open_world):
    w = await open_world("postgres_read")
    sleeper = await open_world("postgres_read")
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.set_phase("postgres_primary")
    # As secondary ...
    with pytest.raises(Fenced):
        await apply(sleeper, image_of(made.id, 5, n=5))
    # ... and a sleeper of phase 4 as primary.
    late = await open_world("postgres_primary")
    await w.set_phase("postgres_read")
    # PostgreSQL refuses it as a whole, so it is made once more, where it belongs now.
    assert (await late.users.update(made.id, {"n": 6})).source == "mongo"
    await late.settle()
    await w.assert_equal()


async def test_a_change_of_epoch_waits_for_the_writes_under_way(open_world, database_url):
    import psycopg

    w = await open_world("postgres_primary")
    async with await psycopg.AsyncConnection.connect(database_url) as writing:
        await writing.execute(
            "SELECT pg_advisory_xact_lock_shared(hashtextextended('crossfade:accounts', 0))"
        )
        change = asyncio.create_task(w.set_phase("postgres_read"))
        await asyncio.wait({change}, timeout=0.5)
        assert not change.done()
        await writing.commit()
    await change


async def test_a_write_of_an_older_epoch_leaves_its_debt_and_arrives_under_the_new_one(open_world):
    w = await open_world("dual_write")
    late = await open_world("dual_write")
    await w.set_phase("shadow_read")
    made = await late.users.insert({"username": "Bob"})
    assert late.debt(made.id) is not None
    assert await w.row(made.id) is None
    await w.reconcile()
    await w.assert_equal()


async def test_writes_wait_while_a_switch_is_under_way(open_world):
    w = await open_world("dual_write", background=True)
    old = (await w.m.board.refresh()).control
    switching = old.changed(by="x", reason="y", state="switching", target=Phase.SHADOW_READ)
    assert await w.m.record.change(old, switching, timeout=PATIENCE)
    await w.m.board.refresh()
    waiting = asyncio.create_task(w.users.insert({"username": "Bob"}))
    await asyncio.wait({waiting}, timeout=0.3)
    assert not waiting.done()
    steady = switching.changed(by="x", reason="y", state="steady")
    assert await w.m.record.change(switching, steady, timeout=PATIENCE)
    assert (await waiting).rev == 1


async def test_a_slower_look_never_replaces_a_later_one(open_world, mongo_proxy):
    w = await open_world("dual_write", mongo=mongo_proxy, lease=20.0, board_age=10.0)
    mongo_proxy.delay(0.3)
    slow = asyncio.create_task(w.m.board.refresh())
    await asyncio.sleep(0.05)
    mongo_proxy.delay(0)
    newer = await w.m.board.refresh()
    await slow
    assert w.m.board.look.began >= newer.began


async def test_a_migration_that_only_one_store_can_be_asked_about_is_not_begun(open_world, postgres_proxy):
    postgres_proxy.refuse()
    with pytest.raises(StoreUnavailable, match="PostgreSQL does not answer"):
        await open_world("mongo_only", postgres=postgres_proxy)
    w = await open_world("mongo_only")
    # The record is there: nothing is begun. (A first look has half a lease.)
    again = await open_world("mongo_only", postgres=postgres_proxy, lease=2.0)
    assert again.control == w.control


@pytest.mark.parametrize("phase", ["shadow_read", "postgres_primary"])
async def test_a_step_whose_answer_is_lost_is_told_as_it_was_decided(
    open_world, mongo_proxy, postgres_proxy, phase
):
    w = await open_world(phase, mongo=mongo_proxy, postgres=postgres_proxy)
    if phase == "shadow_read":
        target, proxy = Phase.DUAL_WRITE, mongo_proxy
        mongo_proxy.cut_after_request(
            when=lambda request: b"crossfade_control" in request and b"update" in request
        )
    else:
        target, proxy = Phase.POSTGRES_ONLY, postgres_proxy
        proxy.cut_after_request(when=lambda request: b"COMMIT" in request)
    force = ("verify",) if target is Phase.POSTGRES_ONLY else ()
    done = await change_phase(w.m, target, by="a test", reason="a test", force=force)
    assert proxy.counts.faults == 1
    assert done.after.phase is target
    assert (await w.m.board.refresh()).control.version == done.after.version


async def test_a_step_that_was_made_is_not_told_as_if_it_had_not_been(open_world, mongo_proxy):
    """Its store goes away before it says who has read it."""
    w = await open_world("shadow_read", mongo=mongo_proxy, primary_deadline=0.5)

    def on_step(text: str) -> None:
        if text.startswith("waiting"):
            mongo_proxy.refuse()

    with pytest.raises(OutcomeUnknown, match="dual_write"):
        await change_phase(w.m, Phase.DUAL_WRITE, by="a test", reason="a test", on_step=on_step)
    mongo_proxy.pass_through()
    found = (await w.m.record.look(timeout=PATIENCE)).control
    assert found is not None
    assert found.phase is Phase.DUAL_WRITE
