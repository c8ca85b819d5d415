"""The switch of the primary: what other tools got wrong, each played on real servers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from bson.int64 import Int64

from crossfade import (
    Busy,
    DuplicateKey,
    FailureStrategy,
    NotAllowedInPhase,
    Phase,
    Record,
    StoreUnavailable,
    Undone,
    UndoPending,
)
from crossfade.control import ANNOUNCED, PREPARED, STEADY, SWITCHING, Control
from crossfade.primary_mongo import MongoPrimary
from crossfade.primary_postgres import PostgresPrimary
from crossfade.record import CF, Image, Settled, new_id, new_operation
from crossfade.stores.errors import Fenced, Unanswered
from crossfade.stores.postgres import Change, Delivery
from crossfade.switch import Coordinator, abort, resolve, resume
from crossfade.transition import change_phase
from crossfade.values import digest, id_to_text
from crossfade.workers import Registry, Worker

from .conftest import PATIENCE, World, eventually, users_entity

THERE = {"postgres_read": Phase.POSTGRES_PRIMARY, "postgres_primary": Phase.POSTGRES_READ}
BOTH_WAYS = list(THERE)
#: Nobody has verified these few records; what the switch itself compares is asked all the same.
UNVERIFIED = ("verify",)


@pytest.fixture
def open_world(open_world: Any) -> Any:
    """As everywhere, with more patience: no test here is about how fast the machine is."""

    async def open_(phase: str, **how: Any) -> World:
        patient = {
            "enlisted": False,
            "lease": 30.0,
            "primary_deadline": 30.0,
            "secondary_deadline": 10.0,
            "board_age": 1.0,
        }
        return await open_world(phase, **(patient | how))

    return open_


async def go(w: World, to: Phase | None = None, **how: Any) -> Any:
    """Switch the primary to the other side, or go to this phase."""
    target = to or THERE[w.m.phase.value]
    force = UNVERIFIED if target is Phase.POSTGRES_PRIMARY else ()
    # However slow the machine is: no test's meaning depends on it.
    how = {"limit": 25.0, **how}
    return await change_phase(w.m, target, by="a test", reason="a test", force=force, **how)


async def at(w: World, state: str, *, limit: float = 60.0) -> Control:
    """What a coordinator leaves that died in this state."""
    record = w.m.record
    control = (await w.m.board.refresh()).control
    target = THERE[control.phase.value]
    forced = UNVERIFIED if target is Phase.POSTGRES_PRIMARY else ()
    for make in (
        lambda c: c.announced(target, by="x", reason="y", limit=limit, coordinator="gone", forced=forced),
        lambda c: c.fenced(),
        lambda c: c.prepared(),
    ):
        after = make(control)
        assert await record.change(control, after, timeout=PATIENCE, copy=False)
        control = after
        if control.state == state:
            break
    if state == "prepared":
        await record.copy(control, to=control.phase.rules.secondary, timeout=PATIENCE)
    return control


def once(number: str, act: Callable[[], Any]) -> Callable[[str], None]:
    """For ``on_step``: what is to happen when this step begins."""
    return lambda text: act() if text.startswith(number) else None


async def registered(w: World) -> list[Any]:
    registry = Registry("accounts", w.m.record.stores)
    return await registry.workers(w.control.phase.rules.primary, timeout=PATIENCE)


class Writing:
    """Writes one after the other to a record, until the end; what was acknowledged."""

    def __init__(self, w: World, id_: Any, *, pace: float = 0.01) -> None:
        self.w, self.id, self.acknowledged, self.failed = w, id_, [], []
        self._pace = pace
        self._numbers, self._ended = itertools.count(1_000), False
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while not self._ended:
            n = next(self._numbers)
            try:
                self.acknowledged.append((await self.w.users.update(self.id, {"n": n}), n))
            except Exception as cause:
                self.failed.append(cause)
            await asyncio.sleep(self._pace)

    async def end(self) -> int:
        """The last number that was acknowledged."""
        self._ended = True
        await self._task
        assert self.failed == []
        revisions = [record.rev for record, _ in self.acknowledged]
        assert revisions == sorted(set(revisions)), "a revision was told twice, or out of order"
        return self.acknowledged[-1][1]


@pytest.mark.parametrize("phase", BOTH_WAYS)
async def test_the_primary_is_switched_and_every_write_meanwhile_succeeds(open_world, phase):
    workers = [await open_world(phase, background=True) for _ in range(2)]
    w = await open_world(phase)
    writing = [
        Writing(each, (await each.users.insert({"username": f"user {number}"})).id)
        for number, each in enumerate(workers)
    ]
    for _ in range(3):
        done = await go(w)
        assert done.pause.failed == 0
        assert done.silent == ()
        assert {each.token for each in await registered(w)} >= {done.after.token}
    assert w.m.phase is THERE[phase]
    for each in writing:
        last = await each.end()
        assert (await w.users.get(each.id))["n"] == last
    await w.reconcile()
    await w.assert_equal()
    assert w.conflicts() == []


@pytest.mark.parametrize("phase", BOTH_WAYS)
async def test_writes_that_arrive_in_the_pause_wait_and_succeed(open_world, phase):
    worker, w = await open_world(phase, background=True), await open_world(phase)
    made = await worker.users.insert({"username": "Bob"})
    held: list[asyncio.Task[Any]] = []

    def on_step(text: str) -> None:
        if text.startswith("3"):
            held.append(asyncio.create_task(worker.users.update(made.id, {"n": 7})))

    done = await go(w, on_step=on_step)
    assert (await held[0]).rev == 2
    assert done.pause.writes == 1
    assert 0 < done.pause.longest <= done.pause.whole + 0.5
    await w.reconcile()
    await w.assert_equal()


@pytest.mark.parametrize("phase", BOTH_WAYS)
async def test_of_two_coordinators_at_once_one_switches_and_the_other_is_told_so(open_world, phase):
    first, second = await open_world(phase), await open_world(phase)
    outcomes = await asyncio.gather(go(first), go(second), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, NotAllowedInPhase)]
    assert len(refused) == 1, outcomes
    await first.m.board.refresh()
    assert first.m.phase is THERE[phase]
    assert first.control.state == STEADY


@pytest.mark.parametrize("flagged", [False, True])
async def test_an_announcement_that_arrives_late_is_the_coordinators_own(open_world, monkeypatch, flagged):
    w = await open_world("postgres_read")
    store, late, arrived = w.m.record.stores["mongo"], [], []
    change = store.change_control

    async def change_control(migration: str, record: dict[str, Any], **how: Any) -> bool:
        if record["state"] == ANNOUNCED and not late:
            late.append(record)
            raise Unanswered("mongo", "a test")
        if late and not arrived:
            arrived.append(await change(migration, late[0], **how))
            if flagged:
                made = Control.from_document(late[0])
                above = made.changed(by="a worker", reason="a write met a failure", unreadable="a test")
                assert await change(migration, above.to_document(), expected=made.version, timeout=PATIENCE)
        return await change(migration, record, **how)

    monkeypatch.setattr(store, "change_control", change_control)
    done = await go(w)
    assert arrived == [True]
    assert done.after.phase is Phase.POSTGRES_PRIMARY


@pytest.mark.parametrize("phase", BOTH_WAYS)
async def test_a_cancelled_switch_does_not_leave_writes_refused(open_world, phase):
    worker, w = await open_world(phase, background=True), await open_world(phase)
    for number in "12345":
        reached = asyncio.Event()
        switching = asyncio.create_task(go(w, on_step=once(number, reached.set)))
        await asyncio.wait_for(reached.wait(), PATIENCE)
        switching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await switching
        await worker.users.insert({"username": f"after {number}"})
        assert (await w.m.board.refresh()).control.state == STEADY
        if w.m.phase is not Phase(phase):  # too late to cancel
            await go(w)
    await w.reconcile()
    await w.assert_equal()


@pytest.mark.parametrize("phase", BOTH_WAYS)
async def test_the_coordinator_killed_between_the_two_stores_leaves_one_primary(open_world, phase):
    """It decided in the old primary's store, and died before the new one's heard of it."""
    worker, w = await open_world(phase, background=True), await open_world(phase)
    record, old, new = w.m.record, w.control.phase.rules.primary, w.control.phase.rules.secondary
    made = await worker.users.insert({"username": "Bob"})
    await w.settle()
    await worker.settle()
    control = await at(w, "prepared")
    decided = control.decided(reason="z")
    assert await record.change(control, decided, timeout=PATIENCE, copy=False)

    async def has_heard() -> bool:
        return worker.control == decided

    await eventually(has_heard)
    assert (await record.look(timeout=PATIENCE)).copies[new] == decided
    assert (await worker.users.update(made.id, {"n": 1})).source == new
    assert old != new


@pytest.mark.parametrize("phase", BOTH_WAYS)
async def test_workers_go_back_from_a_switch_whose_coordinator_is_gone(open_world, phase):
    worker, w = await open_world(phase, background=True), await open_world(phase)
    await at(w, "switching", limit=0.2)
    await worker.m.board.refresh()
    assert worker.control.state == SWITCHING
    assert (await worker.users.insert({"username": "Bob"})).source == Phase(phase).rules.primary
    seen = await w.m.record.look(timeout=PATIENCE)
    assert (seen.control.state, seen.control.phase) == (STEADY, Phase(phase))
    # A switch retried after a half-done one.
    await go(w)
    await w.reconcile()
    await w.assert_equal()


@pytest.mark.parametrize("state", ["announced", "switching", "prepared"])
@pytest.mark.parametrize("phase", BOTH_WAYS)
async def test_another_coordinator_finishes_what_a_dead_one_began(open_world, phase, state):
    w = await open_world(phase)
    made = await w.users.insert({"username": "Bob"})
    await w.settle()
    await at(w, state)
    done = await resume(w.m, by="another")
    assert (done.after.phase, done.after.state) == (THERE[phase], STEADY)
    assert (await w.users.update(made.id, {"n": 1})).rev == 2
    await w.reconcile()
    await w.assert_equal()


@pytest.mark.parametrize("phase", BOTH_WAYS)
async def test_a_switch_past_its_pause_limit_goes_back_by_itself(open_world, phase):
    worker, w = await open_world(phase, background=True), await open_world(phase)
    made = await worker.users.insert({"username": "Bob"})
    inside = worker.m.board.gate.entered(worker.control.epoch, [("users", "x")])
    with inside, pytest.raises(NotAllowedInPhase, match=r"the limit|the switch's coordinator is gone"):
        await go(w, limit=0.3)  # a write that does not end
    assert (await worker.users.update(made.id, {"n": 1})).rev == 2
    assert w.m.phase is Phase(phase)
    await w.reconcile()
    await w.assert_equal()


@pytest.mark.parametrize("phase", BOTH_WAYS)
async def test_a_silent_worker_delays_the_announcement_and_not_the_pause(open_world, phase):
    """Killed, it stays in the registry for a while."""
    w = await open_world(phase, lease=4.0)
    worker = await open_world(phase, background=True, lease=4.0)
    await worker.users.insert({"username": "Bob"})
    worker.m.board._task.cancel()
    done = await go(w, limit=3.9)
    assert done.silent == (worker.m.board.member.name,)
    assert done.pause.whole < 3.9


@pytest.mark.parametrize("store", ["mongo", "postgres"])
async def test_who_has_died_is_taken_out_of_either_registry(open_world, monkeypatch, store):
    """Else a switch waits for him, and `crossfade workers` shows him, once that store is the primary."""
    monkeypatch.setattr("crossfade.workers._TERM", 1.0)
    monkeypatch.setattr("crossfade.board._REAP", 0.2)
    w = await open_world("postgres_read", background=True, lease=0.5)
    registry = Registry("accounts", w.m.record.stores)
    dead = Worker("the dead one", "elsewhere:1", 7, w.control.token, False, lease=0.5, term=1.0)
    await registry.put(store, dead, timeout=PATIENCE)

    async def there() -> set[str]:
        return {each.id for each in await registry.workers(store, timeout=PATIENCE)}

    async def is_gone() -> bool:
        return dead.id not in await there()

    await eventually(is_gone)
    assert w.m.board.member.id in await there()


async def test_a_worker_that_does_not_know_of_the_decision_writes_nothing(open_world, mongo_proxy):
    """It sees *prepared* in one store, and the other one does not answer."""
    w = await open_world("postgres_read")
    await at(w, "prepared")
    late = await open_world("postgres_read", mongo=mongo_proxy, primary_deadline=0.5, lease=2.0)
    mongo_proxy.refuse()
    for _ in range(2):
        with pytest.raises((Busy, StoreUnavailable)):
            await late.users.insert({"username": "Bob"})
    assert w.documents.count_documents({}) == 0
    assert w.sql("SELECT count(*) FROM users") == [(0,)]


async def test_a_person_decides_when_the_old_primary_is_lost_before_it_could_tell(open_world, mongo_proxy):
    # Each look at the store that is lost takes its deadline.
    w = await open_world("postgres_read", mongo=mongo_proxy, primary_deadline=3.0, lease=6.0)
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.settle()
    with pytest.raises(NotAllowedInPhase, match="nothing to resolve"):
        await resolve(w.m, by="somebody", primary="postgres")
    await at(w, "prepared")
    mongo_proxy.refuse()
    with pytest.raises(StoreUnavailable):
        await w.m.board.refresh()
    with pytest.raises(NotAllowedInPhase, match="start it"):
        await resolve(w.m, by="somebody", primary="mongo")
    resolved = await resolve(w.m, by="somebody", primary="postgres")
    await w.m.board.refresh()
    assert w.m.primary == "postgres"
    assert (await w.users.update(made.id, {"n": 2})).source == "postgres"
    # MongoDB comes back, with *prepared*: what a person decided is above it.
    mongo_proxy.pass_through()
    assert (await w.m.board.refresh()).control == resolved
    await w.reconcile()
    await w.assert_equal()


async def test_nothing_is_resolved_that_had_not_come_to_its_decision(open_world, mongo_proxy):
    w = await open_world("postgres_read", mongo=mongo_proxy)
    await w.m.record.copy(await at(w, "switching"), to="postgres", timeout=PATIENCE)
    mongo_proxy.refuse()
    with pytest.raises(NotAllowedInPhase, match="mongo is still primary: start it"):
        await resolve(w.m, by="somebody", primary="postgres")


async def test_a_unique_rule_holds_on_the_way_back(open_world):
    w = await open_world("postgres_read")
    await w.users.insert({"username": "Bob"})
    await go(w)
    renamed = await w.users.insert({"username": "Eve"})
    await w.users.update(renamed.id, {"username": "Eva"})
    await go(w)
    for taken in ("BOB", "EVA"):
        with pytest.raises(DuplicateKey):
            await w.users.insert({"username": taken})
    assert (await w.users.insert({"username": "eve"})).source == "mongo"
    await w.reconcile()
    await w.assert_equal()


async def test_the_guard_is_asked_again_while_writes_wait(open_world):
    w = await open_world("postgres_read")

    def on_step(text: str) -> None:
        if text.startswith("3"):
            w.sql(
                "INSERT INTO crossfade.quarantine (entity, id, reason, rev, digest, document) "
                "VALUES ('users', 'x', 'y', 1, '', '')"
            )

    with pytest.raises(NotAllowedInPhase, match=r"while writes waited: \[quarantine\]"):
        await go(w, on_step=on_step)
    assert (await w.m.board.refresh()).control.state == STEADY
    assert w.m.primary == "mongo"


async def test_what_another_application_has_just_written_comes_along(open_world):
    worker, w = await open_world("postgres_read", background=True), await open_world("postgres_read")
    made = await worker.users.insert({"username": "Bob", "n": 1})
    await worker.settle()

    def on_step(text: str) -> None:
        if text.startswith("2"):  # after everything was compared
            now = datetime.now(UTC)
            w.documents.update_one({"_id": made.id}, {"$set": {"n": 2, "updatedAt": now}})

    done = await go(w, on_step=on_step)
    assert done.adopted == 1
    found = await worker.users.get(made.id)
    assert (found["n"], found.source) == (2, "postgres")
    await w.reconcile()
    await w.assert_equal()
    assert w.conflicts() == []


async def test_what_another_application_has_just_written_is_refused_where_postgres_cannot_take_it(open_world):
    w = await open_world("postgres_read")
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.settle()

    def on_step(text: str) -> None:
        if text.startswith("2"):
            now = datetime.now(UTC)
            w.documents.update_one({"_id": made.id}, {"$set": {"n": 666, "updatedAt": now}})

    with pytest.raises(NotAllowedInPhase, match=r"while writes waited: \[parked\]"):
        await go(w, on_step=on_step)
    assert (await w.m.board.refresh()).control.state == STEADY
    assert w.m.primary == "mongo"


async def test_what_was_written_since_the_announcement_is_compared_in_the_pause(open_world):
    worker, w = await open_world("postgres_read", background=True), await open_world("postgres_read")
    made = await worker.users.insert({"username": "Bob", "n": 1})

    def on_step(text: str) -> None:
        if text.startswith("2"):
            worker.m.board.gate._wrote.add(("users", id_to_text(made.id)))
        elif text.startswith("3"):
            w.sql("UPDATE users SET cf_digest = 'x'")  # nothing is owed, and yet it differs

    with pytest.raises(NotAllowedInPhase, match="1 records differ though nothing is owed"):
        await go(w, on_step=on_step)
    assert (await w.m.board.refresh()).control.state == STEADY


@pytest.mark.parametrize("phase", BOTH_WAYS)
async def test_a_record_with_a_picture_written_since_the_announcement_is_no_obstacle(open_world, phase):
    worker, w = [
        await open_world(phase, entity=users_entity(pictures=True), background=b) for b in (True, False)
    ]
    made = await worker.users.insert({"username": "Bob", "picture": b"o" * 1_000, "n": 1})
    writing = Writing(worker, made.id)
    for _ in range(2):
        done = await go(w)
        assert done.compared >= 1
    last = await writing.end()
    assert (await w.users.get(made.id))["n"] == last
    await w.reconcile()
    await w.assert_equal()


@pytest.mark.parametrize("phase", BOTH_WAYS)
async def test_an_open_write_whose_worker_is_gone_is_undone_before_the_decision(
    open_world, phase, monkeypatch
):
    w, gone = await open_world(phase, tentative=60.0), await open_world(phase, tentative=60.0)
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.settle()

    async def dies(*_: Any) -> None:
        raise asyncio.CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(MongoPrimary, "_confirm", dies)
        patch.setattr(PostgresPrimary, "_confirm", dies)
        with pytest.raises(asyncio.CancelledError):
            await gone.users.update(made.id, {"n": 2}, strategy=FailureStrategy.ROLLBACK_BOTH)
    await gone.m.board.stop()
    done = await go(w)
    assert done.drained >= 1
    assert (await w.users.get(made.id))["n"] == 1
    await w.reconcile()
    await w.assert_equal()


async def test_the_history_is_in_both_stores_and_survives_either(open_world, mongo_proxy):
    w = await open_world("postgres_read", mongo=mongo_proxy)
    await go(w)
    await go(w)
    whole = await w.m.record.history(timeout=PATIENCE)
    assert [entry["state"] for entry in whole] == ["announced", "switching", "prepared", "steady"] * 2
    assert {entry["changed_by"] for entry in whole} == {"a test"}
    for store in w.m.record.stores.values():
        kept = [entry["version"] for entry in await store.history("accounts", after=0, timeout=PATIENCE)]
        assert kept == [entry["version"] for entry in whole]
    mongo_proxy.refuse()
    assert await w.m.record.history(timeout=PATIENCE) == whole


# --- workers that did not hear of it -------------------------------------------------------------------------------


def again(w: World, before: Image, **fields: Any) -> Change:
    """The record's next revision, as PostgreSQL decides it."""
    document = {**before.document, **fields}
    image = Image(before.id, document, before.rev + 1, new_operation(), before.keys, digest(document))
    return Change(image, w.entity.to_rows(image.document, image.keys), image.rev, image.op)


async def late_write(w: World, id_: Any, rev: int, epoch: int, **fields: Any) -> None:
    """A write to MongoDB of a worker that slept through the switch, as it reaches the server."""
    marks = {"rev": Int64(rev + 1), "op": "0" * 31 + "1", "debt": {"epoch": Int64(epoch)}}
    change = {**fields, **{f"{CF}.{name}": value for name, value in marks.items()}}
    done = w.documents.update_one({"_id": id_, f"{CF}.rev": Int64(rev)}, {"$set": change})
    assert done.matched_count == 1


async def test_however_often_a_switch_was_announced_the_fence_waits_for_writes_under_way(
    open_world, monkeypatch
):
    worker, w = await open_world("postgres_read", background=True), await open_world("postgres_read")
    made = await worker.users.insert({"username": "Bob", "n": 1})
    await worker.settle()
    monkeypatch.setattr("crossfade.switch._LONG_ANNOUNCEMENT", 0.0)
    become = Coordinator.become

    async def become_and_be_heard(coordinator: Coordinator, make: Any) -> None:
        await become(coordinator, make)
        if coordinator.now.state == ANNOUNCED:

            async def heard() -> bool:
                return worker.m.board.member.token == coordinator.now.token

            await eventually(heard)

    monkeypatch.setattr(Coordinator, "become", become_and_be_heard)
    under_way, released = asyncio.Event(), asyncio.Event()
    compare_and_set = worker.mongo.compare_and_set

    async def late(*of: Any, **how: Any) -> Any:
        under_way.set()
        await released.wait()
        return await compare_and_set(*of, **how)

    monkeypatch.setattr(worker.mongo, "compare_and_set", late)
    writing = asyncio.create_task(worker.users.update(made.id, {"n": 2}))
    await under_way.wait()
    # By then a switch that does not wait for the write has been decided.
    fenced = once("2", lambda: asyncio.get_running_loop().call_later(1.0, released.set))
    await go(w, on_step=fenced)
    assert (await writing)["n"] == 2
    assert w.m.primary == "postgres"
    assert (await w.users.get(made.id))["n"] == 2
    assert (await w.m.reconciler.strays.merge_all(w.control))["applied"] == 0
    await w.reconcile()
    await w.assert_equal()


async def test_a_write_that_is_open_while_all_is_compared_does_not_end_the_switch_back(
    open_world, mongo_proxy, monkeypatch
):
    w = await open_world("postgres_primary")
    other = await open_world("postgres_primary", mongo=mongo_proxy, background=True)
    made = await other.users.insert({"username": "Bob", "n": 1})
    await w.reconcile()
    w.documents.update_one({"_id": made.id}, {"$set": {"n": 2}})  # something to deliver anew
    deliver_anew, writing = w.settler.deliverer.deliver_anew, []

    async def is_open() -> bool:
        return bool(w.outbox())

    async def deliver_what_is_being_written(*of: Any, **how: Any) -> Any:
        mongo_proxy.delay(0.3)
        writing.append(
            asyncio.create_task(other.users.update(made.id, {"n": 3}, strategy=FailureStrategy.ROLLBACK_BOTH))
        )
        await eventually(is_open)
        return await deliver_anew(*of, **how)

    monkeypatch.setattr(w.settler.deliverer, "deliver_anew", deliver_what_is_being_written)
    await go(w)
    assert w.m.primary == "mongo"
    mongo_proxy.pass_through()
    with contextlib.suppress(Undone):
        await writing[0]
    assert len(writing) == 1
    await w.reconcile()
    await w.assert_equal()
    assert [document["n"] for _, document in w.conflicts()] == [2]


async def test_a_late_write_upon_what_postgres_still_holds_becomes_a_write_of_postgres(open_world):
    w = await open_world("postgres_read")
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.settle()
    epoch = w.control.epoch
    await go(w)
    await late_write(w, made.id, 1, epoch, n=2)
    counts = await w.m.reconciler.strays.merge_all(w.control)
    assert counts["applied"] == 1
    assert (await w.users.get(made.id))["n"] == 2
    await w.reconcile()
    await w.assert_equal()
    assert w.conflicts() == []


async def test_a_command_that_lifts_a_record_is_in_the_registry_first(open_world):
    w = await open_world("postgres_read", enlisted=False)
    id_ = w.documents.insert_one({"username": "Bob"}).inserted_id
    assert w.m.board.member is None
    lifted = await w.m.settler.lift(w.entity, id_, above=4, control=w.control)
    assert lifted is not None
    assert lifted.rev == 5
    assert w.m.board.lease_valid
    [entry] = await Registry("accounts", w.m.record.stores).workers("mongo", timeout=PATIENCE)
    assert entry.id == w.m.board.member.id


@pytest.mark.parametrize("phase", BOTH_WAYS)
async def test_two_that_enter_the_registry_at_once_both_have_a_lease(open_world, phase):
    """In one process: the one that finds the entry being written waits for it."""
    w = await open_world(phase, enlisted=False)

    async def has_a_lease() -> bool:
        await w.m.board.obtain_lease()
        return w.m.board.lease_valid

    assert await asyncio.gather(*(has_a_lease() for _ in range(4))) == [True] * 4


async def test_a_step_that_was_heard_of_is_not_forgotten_for_a_slower_look(open_world, monkeypatch):
    w = await open_world("postgres_read")
    board, debts = w.m.board, w.m.pair.mongo.debts
    asked, released = [asyncio.Event(), asyncio.Event()], [asyncio.Event(), asyncio.Event()]
    turns = iter((0, 1))

    async def debts_later(*entities: Any, **limits: Any) -> Any:
        turn = next(turns)
        asked[turn].set()
        await released[turn].wait()
        return await debts(*entities, **limits)

    monkeypatch.setattr(w.m.pair.mongo, "debts", debts_later)
    slower = asyncio.create_task(board.refresh())
    await asked[0].wait()
    announced = w.control.announced(
        Phase.POSTGRES_PRIMARY, by="a test", reason="", limit=60.0, coordinator="", forced=()
    )
    assert await w.m.record.change(w.control, announced, timeout=PATIENCE)
    assert await w.m.record.change(announced, announced.fenced(), timeout=PATIENCE)
    later = asyncio.create_task(board.refresh())
    await asked[1].wait()
    assert board.control.holds_writes, "nobody's writes wait for this process to have looked at debts"
    released[0].set()
    await slower
    assert board.control.holds_writes
    released[1].set()
    await later
    assert board.control.holds_writes


async def test_a_step_heard_of_before_debts_are_looked_at_makes_no_row_readable(open_world, monkeypatch):
    """What was left in debt while nobody read PostgreSQL is on no board from that time."""
    patient = {"board_age": 30.0, "poll": 10.0}
    w, other = await open_world("postgres_read", **patient), await open_world("postgres_read", **patient)
    made = await other.users.insert({"username": "Bob", "n": 1})
    await other.settle()
    flag = w.control.changed(by="a test", reason="a test", unreadable="x")
    assert await w.m.record.change(w.control, flag, timeout=PATIENCE)
    await other.m.board.refresh()
    await w.m.board.refresh()
    await other.users.update(made.id, {"n": 666})  # PostgreSQL refuses it, so it stays in debt
    control = w.control
    for make in (
        lambda c: c.changed(by="a test", reason="a test", unreadable=None),
        lambda c: c.announced(
            Phase.POSTGRES_PRIMARY, by="", reason="", limit=60.0, coordinator="", forced=()
        ),
        lambda c: c.fenced(),
    ):
        after = make(control)
        assert await w.m.record.change(control, after, timeout=PATIENCE)
        control = after
    asked, released, debts = asyncio.Event(), asyncio.Event(), w.m.pair.mongo.debts

    async def debts_later(*entities: Any, **limits: Any) -> Any:
        asked.set()
        await released.wait()
        return await debts(*entities, **limits)

    monkeypatch.setattr(w.m.pair.mongo, "debts", debts_later)
    looking = asyncio.create_task(w.m.board.refresh())
    await asked.wait()
    look = w.m.board.look
    released.set()
    await looking
    assert ("users", id_to_text(made.id)) in look.ids or look.control.unreadable == "x"
    assert ("users", id_to_text(made.id)) in w.m.board.look.ids


@pytest.mark.parametrize("phase", BOTH_WAYS)
async def test_a_read_of_what_was_not_the_primary_is_asked_again_although_it_is_by_now(
    open_world, mongo_proxy, postgres_proxy, monkeypatch, phase
):
    """Its worker has slept through a switch, and through the way back before it hears of either."""
    first, proxy = ("mongo", mongo_proxy) if phase == "postgres_read" else ("postgres", postgres_proxy)
    w, other = await open_world(phase, lease=0.2), await open_world(phase, **{first: proxy})
    made = await other.users.insert({"username": "Bob", "n": 1})
    await other.settle()
    await go(other)
    proxy.refuse()
    await other.users.update(made.id, {"n": 2})
    proxy.pass_through()
    store, asked, released = getattr(w, first), asyncio.Event(), asyncio.Event()
    read = store.read

    async def read_and_sleep(*of: Any, **how: Any) -> Any:
        answer = await read(*of, **how)
        asked.set()
        await released.wait()
        return answer

    monkeypatch.setattr(store, "read", read_and_sleep)
    monkeypatch.setattr(w.m.reader, "_not_postgres", lambda *_, **__: "the primary is asked")
    reading = asyncio.create_task(w.users.get(made.id))
    await asked.wait()
    await other.reconcile()
    await go(other)
    released.set()
    assert (await reading)["n"] == 2


@pytest.mark.parametrize("foreign", [7, 1], ids=["another value", "the value from before"])
@pytest.mark.parametrize("entity", [None, users_entity(pictures=True)], ids=["whole", "without its part"])
async def test_a_delivery_that_wakes_when_mongo_decides_again_writes_over_nothing(
    open_world, mongo_proxy, monkeypatch, foreign, entity
):
    """Another worker has delivered the same since; and in phase 3 other applications may write."""
    w = await open_world("postgres_primary", lease=0.2, entity=entity)
    other = await open_world("postgres_primary", mongo=mongo_proxy, entity=entity)
    picture = {} if entity is None else {"picture": b"p" * 1000}
    made = await other.users.insert({"username": "Bob", "n": 1, **picture})
    await other.settle()
    mongo_proxy.refuse()
    await other.users.update(made.id, {"n": 2})
    mongo_proxy.pass_through()
    asked, released = asyncio.Event(), asyncio.Event()
    read = w.postgres.read

    async def read_and_sleep(*of: Any, **how: Any) -> Any:
        answer = await read(*of, **how)
        asked.set()
        await released.wait()
        return answer

    monkeypatch.setattr(w.postgres, "read", read_and_sleep)
    owed = Delivery("users", made.id, 0, "", None, None, None)
    delivering = asyncio.create_task(w.settler.deliverer.deliver(owed, w.control, timeout=PATIENCE))
    await asked.wait()
    await other.reconcile()
    await go(other)
    w.documents.update_one({"_id": made.id}, {"$set": {"n": foreign}})
    released.set()
    assert await delivering is Settled.CONFIRMED
    await other.m.reconciler.full_sweep()
    assert (await other.users.get(made.id))["n"] == foreign
    assert other.conflicts() == []
    await other.assert_equal()


async def two_who_may_find_a_late_write(open_world: Any, **fields: Any) -> tuple[World, World, Record]:
    """Two workers behind a switch to PostgreSQL, and a record that a late write has changed since."""
    w, other = await open_world("postgres_read"), await open_world("postgres_read", enlisted=False)
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.settle()
    epoch = w.control.epoch
    await go(w)
    await other.m.board.refresh()
    await late_write(w, made.id, 1, epoch, **fields)
    return w, other, made


async def test_a_late_write_that_two_workers_find_is_no_conflict(open_world, monkeypatch):
    w, other, made = await two_who_may_find_a_late_write(open_world, n=2)
    strays = w.m.reconciler.strays
    applied, released, bring = asyncio.Event(), asyncio.Event(), strays._bring

    async def bring_later(*stray: Any) -> None:
        applied.set()
        await released.wait()
        await bring(*stray)

    monkeypatch.setattr(strays, "_bring", bring_later)
    first = asyncio.create_task(strays.merge_all(w.control))
    await applied.wait()
    await other.m.reconciler.strays.merge_all(other.control)
    released.set()
    await first
    await w.reconcile()
    assert (await w.users.get(made.id))["n"] == 2
    await w.assert_equal()
    assert w.conflicts() == []


@pytest.mark.parametrize("buried", [False, True], ids=["document", "tombstone"])
async def test_a_late_delete_that_two_workers_find_is_no_conflict(open_world, monkeypatch, buried):
    w, other, made = await two_who_may_find_a_late_write(open_world, **{f"{CF}.deleted": True})
    if buried:
        await w.settler.bury(w.entity, await w.image(made.id))
    strays = w.m.reconciler.strays
    is_applied = strays._is_applied

    async def behind_another(*stray: Any) -> bool:
        await other.m.reconciler.strays.merge_all(other.control)
        return await is_applied(*stray)

    monkeypatch.setattr(strays, "_is_applied", behind_another)
    await strays.merge_all(w.control)
    await w.reconcile()
    assert await w.users.get(made.id) is None
    await w.assert_equal()
    assert w.conflicts() == []


@pytest.mark.parametrize("kind", ["operation", "open"])
async def test_a_look_for_late_writes_that_the_switch_back_overtakes_leaves_what_mongo_decides(
    open_world, postgres_proxy, monkeypatch, kind
):
    w = await open_world("postgres_primary")
    other = await open_world(
        "postgres_primary", postgres=postgres_proxy, primary_deadline=5.0, secondary_deadline=0.5
    )
    friend = await other.users.insert({"username": "Ann", "n": 1})
    await other.reconcile()
    asked, released, debts = asyncio.Event(), asyncio.Event(), w.mongo.debts

    async def late(*of: Any, **how: Any) -> Any:
        asked.set()
        await released.wait()
        return await debts(*of, **how)

    monkeypatch.setattr(w.mongo, "debts", late)
    looking = asyncio.create_task(w.m.reconciler.strays.merge_all(w.control))
    await asked.wait()
    await go(other)
    postgres_proxy.refuse()
    if kind == "operation":
        async with other.m.operation("Registration") as op:
            op.insert("users", {"username": "Bob", "n": 2})
            op.also("users", friend.id, set={"n": 2})
        made = op.result.id
    else:
        made = new_id()
        monkeypatch.setattr(other.settler, "undo", lambda *_, **__: asyncio.sleep(0, Settled.OPEN))
        with pytest.raises(UndoPending):
            await other.users.insert(
                {"_id": made, "username": "Bob", "n": 2}, strategy=FailureStrategy.ROLLBACK_BOTH
            )
    before = w.document(made)
    released.set()
    with contextlib.suppress(Fenced):
        await looking
    assert w.document(made) == before
    assert w.conflicts() == []
    postgres_proxy.pass_through()
    await other.postgres_answers()
    monkeypatch.undo()
    await other.reconcile()
    await other.assert_equal()
    assert (w.document(made) is not None) is (kind == "operation")


async def test_a_sweep_that_a_switch_overtakes_leaves_what_postgres_has_acknowledged(open_world, monkeypatch):
    w = await open_world("postgres_read", background=True)
    coordinator = await open_world("postgres_read")
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.reconcile()
    w.documents.update_one({"_id": made.id}, {"$set": {"n": 2}})  # something for the sweep to adopt
    paused, released = asyncio.Event(), asyncio.Event()
    adopt = w.m.reconciler._adopt_batch

    async def adopt_later(*batch: Any) -> int:
        if w.control.phase is Phase.POSTGRES_READ:
            paused.set()
            await released.wait()
        return await adopt(*batch)

    monkeypatch.setattr(w.m.reconciler, "_adopt_batch", adopt_later)
    sweep = asyncio.create_task(w.m.reconciler.full_sweep())
    await paused.wait()
    await go(coordinator)
    await eventually(lambda: knows(w, Phase.POSTGRES_PRIMARY))
    row = await w.row(made.id)
    written = again(w, row, n=3)
    await w.postgres.write(
        [(w.entity, made.id, lambda *_: written)],
        migration="accounts", epoch=w.control.epoch, timeout=PATIENCE,
    )  # fmt: skip
    released.set()
    with contextlib.suppress(Fenced):
        await sweep
    assert (await w.row(made.id)).document["n"] == 3
    await w.reconcile()
    assert (await w.users.get(made.id))["n"] == 3
    await w.assert_equal()


async def knows(w: World, phase: Phase) -> bool:
    return w.control.phase is phase and w.m.board.lease_valid


async def test_a_late_write_upon_what_has_changed_since_is_kept_in_the_conflict_journal(open_world):
    w = await open_world("postgres_read")
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.settle()
    epoch = w.control.epoch
    await go(w)
    # MongoDB has not heard of the write that PostgreSQL has decided meanwhile.
    await w.postgres.write(
        [(w.entity, made.id, lambda before, _: again(w, before, n=3))],
        migration="accounts", epoch=w.control.epoch, timeout=PATIENCE,
    )  # fmt: skip
    await late_write(w, made.id, 1, epoch, n=2)
    counts = await w.m.reconciler.strays.merge_all(w.control)
    assert counts["journaled"] == 1
    assert (await w.users.get(made.id))["n"] == 3
    await w.reconcile()
    await w.assert_equal()
    assert [document["n"] for _, document in w.conflicts()] == [2]


async def test_a_late_write_that_has_not_seen_what_is_to_be_delivered_is_kept_whatever_its_number(open_world):
    w = await open_world("postgres_read")
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.settle()
    epoch = w.control.epoch
    await go(w)
    await w.postgres.write(
        [(w.entity, made.id, lambda before, _: again(w, before, n=3))],
        migration="accounts", epoch=w.control.epoch, timeout=PATIENCE,
    )  # fmt: skip
    await late_write(w, made.id, 1, epoch, n=2)
    # As after a lift: just above the revision that PostgreSQL holds, and not made upon it.
    w.documents.update_one({"_id": made.id}, {"$set": {f"{CF}.rev": Int64(3)}})
    counts = await w.m.reconciler.strays.merge_all(w.control)
    assert counts["journaled"] == 1
    await w.reconcile()
    assert (await w.users.get(made.id))["n"] == 3
    await w.assert_equal()
    assert [document["n"] for _, document in w.conflicts()] == [2]


async def test_a_late_write_of_a_record_with_a_part_is_made_and_a_broken_one_is_in_nobodys_way(
    open_world,
):
    w = await open_world("postgres_read", entity=users_entity(pictures=True))
    broken, made = [await w.users.insert({"username": n, "picture": b"p", "n": 1}) for n in ("Al", "Bob")]
    await w.settle()
    epoch = w.control.epoch
    await go(w)
    for each in (broken, made):
        await late_write(w, each.id, 1, epoch, n=2)
    w.documents.update_one(
        {"_id": broken.id}, {"$set": {f"{CF}.parts": 1}}
    )  # what only a foreign hand writes
    counts = await w.m.reconciler.strays.merge_all(w.control)
    assert counts["applied"] == 1
    found = await w.users.get(made.id)
    assert (found["n"], found["picture"]) == (2, b"p")
    w.documents.update_one({"_id": broken.id}, {"$unset": {f"{CF}.parts": 1}})
    await w.reconcile()
    await w.assert_equal()


async def test_late_writes_that_cannot_be_ended_hide_no_others_however_many_they_are(open_world, monkeypatch):
    monkeypatch.setattr("crossfade.strays.MOST_DELIVERIES", 2)
    w = await open_world("postgres_read", entity=users_entity(pictures=True))
    names = ["Al", "Bea", "Cem", "Dan", "Eva"]
    made = [await w.users.insert({"username": name, "n": 1}) for name in names]
    await w.settle()
    epoch = w.control.epoch
    await go(w)
    for each in made:
        await late_write(w, each.id, 1, epoch, n=2)
    # The last one made, and touched, is the last one found, whether by an index or as documents lie.
    sound, mended = made[-1].id, {"$unset": {f"{CF}.parts": 1}}
    w.documents.update_many({}, {"$set": {f"{CF}.parts": 1}})
    w.documents.update_one({"_id": sound}, mended)
    counts = await w.m.reconciler.strays.merge_all(w.control)
    assert counts["applied"] == 1
    assert (await w.users.get(sound))["n"] == 2
    w.documents.update_many({"_id": {"$ne": sound}}, mended)
    await w.reconcile()
    await w.assert_equal()


async def test_a_late_delete_of_an_unchanged_record_is_made_and_one_of_a_changed_record_is_not(open_world):
    w = await open_world("postgres_read")
    kept, gone = [await w.users.insert({"username": name, "n": 1}) for name in ("Kept", "Gone")]
    await w.settle()
    control = w.control
    await go(w)
    for made in (kept, gone):
        image = await w.image(made.id)
        await late_write(w, made.id, image.rev, control.epoch, **{f"{CF}.deleted": True})
    await w.postgres.write(
        [(w.entity, kept.id, lambda before, _: again(w, before))],
        migration="accounts", epoch=w.control.epoch, timeout=PATIENCE,
    )  # fmt: skip
    counts = await w.m.reconciler.strays.merge_all(w.control)
    assert (counts["applied"], counts["journaled"]) == (1, 1)
    assert await w.users.get(gone.id) is None
    assert (await w.users.get(kept.id))["n"] == 1
    await w.reconcile()
    await w.assert_equal()


async def test_a_late_delete_of_a_record_that_is_to_be_delivered_does_not_keep_it_out_of_mongo(open_world):
    w = await open_world("postgres_read")
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.settle()
    control = w.control
    await go(w)
    await w.postgres.write(
        [(w.entity, made.id, lambda before, _: again(w, before, n=3))],
        migration="accounts", epoch=w.control.epoch, timeout=PATIENCE,
    )  # fmt: skip
    await late_write(w, made.id, 1, control.epoch, **{f"{CF}.deleted": True})
    image = await w.image(made.id)
    await w.settler.bury(w.entity, image)
    counts = await w.m.reconciler.strays.merge_all(w.control)
    assert counts["journaled"] == 1
    await w.reconcile()
    assert w.document(made.id)["n"] == 3
    await w.assert_equal()


async def test_going_back_from_a_switch_is_told_only_where_there_was_one(open_world):
    w = await open_world("postgres_read")
    assert not await abort(w.m, by="somebody")
    await at(w, "announced")
    assert await abort(w.m, by="somebody")
    assert w.control.state == STEADY
    assert PREPARED not in {entry["state"] for entry in await w.m.record.history(timeout=PATIENCE)}


async def test_a_late_insert_of_a_number_that_postgres_has_in_another_type_is_ended(open_world, mongo_proxy):
    w = await open_world("postgres_read", mongo=mongo_proxy)
    epoch = w.control.epoch
    await go(w)
    mongo_proxy.refuse()
    await w.users.insert({"_id": 5, "username": "Bob"})
    mongo_proxy.pass_through()
    op = "0" * 31 + "1"
    notes = {
        "rev": Int64(1),
        "op": op,
        "born": op,
        "keys": {"username": "ann"},
        "debt": {"epoch": Int64(epoch)},
    }
    w.documents.insert_one({"_id": 5.0, "username": "Ann", CF: notes})
    counts = await w.m.reconciler.strays.merge_all(w.control)
    assert counts["journaled"] == 1
    await w.reconcile()
    await w.assert_equal()
    assert [document["username"] for _, document in w.conflicts()] == ["Ann"]
