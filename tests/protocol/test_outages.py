"""A secondary that is down, hangs or is slow: callers go on, the debt stands, and it is settled by itself."""

import asyncio
import contextlib
import time

import pytest
from bson import ObjectId
from bson.int64 import Int64

from crossfade import (
    Crossfade,
    FailureStrategy,
    NotFound,
    Quarantined,
    StoreUnavailable,
    Undone,
    board,
    delivery,
    reconcile,
)
from crossfade.record import CF, new_operation
from crossfade.stores.errors import Unanswered
from crossfade.values import id_to_text

from .conftest import FAST, PATIENCE, World, create_tables, eventually, users_entity
from .test_images import apply, image_of
from .test_several_records import unreadable


async def nothing_owed(w: World) -> bool:
    try:
        return await w.owed() == ()
    except Exception:
        return False


@pytest.mark.parametrize("phase", ["dual_write", "postgres_read"])
async def test_postgres_is_away_and_mongo_decides_and_the_reconciler_catches_up_by_itself(
    open_world, postgres_proxy, phase
):
    w = await open_world(phase, postgres=postgres_proxy, background=True)
    kept, gone = [(await w.users.insert({"username": name})).id for name in ("kept", "gone")]
    postgres_proxy.refuse()
    made = await w.users.insert({"username": "made"})
    await w.users.update(kept, {"n": 2})
    await w.users.delete(gone)
    assert w.debt(made.id) is not None
    assert w.debt(kept) is not None
    assert "debt" in w.tombstone_in_mongo(gone)
    # Acknowledged writes are seen although PostgreSQL cannot have them.
    assert (await w.users.get(kept))["n"] == 2
    assert await w.users.get(gone) is None
    # The name of a deleted record is free at once.
    await w.users.insert({"username": "GONE"})
    postgres_proxy.pass_through()
    await eventually(lambda: nothing_owed(w))
    await w.assert_equal()


async def test_reads_that_waited_in_vain_spare_a_write_its_wait(open_world, postgres_proxy):
    w = await open_world("postgres_read", postgres=postgres_proxy, background=True)
    made = await w.users.insert({"username": "Ann"})
    await eventually(lambda: nothing_owed(w))
    postgres_proxy.swallow_answers()
    reads = await asyncio.gather(
        *(w.users.get(made.id) for _ in range(w.m.pair.postgres_breaker.failures_to_open))
    )
    assert [read.source for read in reads] == ["mongo"] * len(reads)
    with pytest.raises(Undone, match="known to be down"):
        await w.users.update(made.id, {"n": 2}, strategy=FailureStrategy.ROLLBACK_BOTH)
    postgres_proxy.pass_through()
    await eventually(lambda: nothing_owed(w))
    await w.assert_equal()


async def test_lists_that_take_longer_than_a_caller_waits_keep_no_write_from_a_postgres_that_answers(
    open_world, monkeypatch
):
    w = await open_world("postgres_read", board_age=PATIENCE, secondary_deadline=1.0)
    made = await w.users.insert({"username": "Bob"})
    await w.settle()
    await w.m.board.refresh()

    async def slow(_entity, _query, *, timeout, small):
        return await w.postgres._rows(b"SELECT pg_sleep(60)", [], timeout)

    monkeypatch.setattr(w.postgres, "find", slow)
    for _ in range(w.m.pair.postgres_breaker.failures_to_open):
        [found] = await w.users.find({"username": "Bob"})
        assert found.source == "mongo"
    await w.users.update(made.id, {"n": 2}, strategy=FailureStrategy.ROLLBACK_BOTH)
    await w.settle()
    await w.assert_equal()


@pytest.mark.parametrize("phase", ["dual_write", "postgres_read"])
async def test_debts_that_nobody_can_use_are_not_read_with_every_look(
    open_world, postgres_proxy, monkeypatch, phase
):
    monkeypatch.setattr(board, "_SPARED", 3600)
    w = await open_world(phase, postgres=postgres_proxy, background=True)
    made = await w.users.insert({"username": "Ann"})
    await eventually(lambda: nothing_owed(w))
    postgres_proxy.refuse()
    await w.users.update(made.id, {"n": 2})

    async def known_while_it_is_away() -> bool:
        look = w.m.board.look
        if len(look.debts) != 1:
            await w.m.board.refresh()  # the last that read them may have been a moment before the write
        return not look.postgres and len(look.debts) == 1 and look.debts_read < look.began

    await eventually(known_while_it_is_away)
    before = w.m.board.look
    await w.users.insert({"username": "Bob"})

    async def looked_again() -> bool:
        return w.m.board.look.began > before.began + 5 * FAST.poll

    await eventually(looked_again)
    assert w.m.board.look.debts == before.debts
    # Who asks, and the reconciler once there is somebody to settle with, is told of all.
    assert len((await w.m.board.refresh()).debts) == 2
    postgres_proxy.pass_through()
    await eventually(lambda: nothing_owed(w))
    await w.assert_equal()


async def test_the_debts_of_an_outage_are_settled_together_and_a_refused_one_does_not_keep_the_others(
    open_world, postgres_proxy, monkeypatch
):
    w = await open_world("dual_write", postgres=postgres_proxy)
    deleted, renamed = [(await w.users.insert({"username": name})).id for name in ("deleted", "renamed")]
    postgres_proxy.refuse()
    ids = [(await w.users.insert({"username": f"user {n}", "friends": [renamed]})).id for n in range(230)]
    refused = await w.users.insert({"username": "refused", "n": 666})
    await w.users.delete(deleted)
    await w.users.update(renamed, {"username": "renamed since"})
    await w.users.insert({"username": "RENAMED"})
    # Two hundred and thirty and the two that are new; the one renamed; one tombstone.
    assert await w.m.reconciler.owed() == 234
    postgres_proxy.pass_through()
    apply, transactions = w.cf.postgres.apply, []

    async def counted(images, **how):
        transactions.append(len(images))
        return await apply(images, **how)

    monkeypatch.setattr(w.cf.postgres, "apply", counted)
    await w.reconcile()
    assert w.m.reconciler.settled == 233
    # Two hundred in two or, around the refused one, in halves; the rest one by one.
    assert len(transactions) < 100
    assert [owed.id for owed in await w.owed()] == [refused.id]
    assert "users_n_allowed" in w.debt(refused.id)["parked"]
    assert await w.row(deleted) is None
    assert all([await w.row(id_) for id_ in ids])
    await w.users.update(refused.id, {"n": 1})
    await w.reconcile()
    await w.assert_equal()


def owed_together(w: World, monkeypatch, **fields):
    """What writers leave that die before they ask PostgreSQL, as many as are settled together; the ids."""
    number = 4
    monkeypatch.setattr(reconcile, "_MANY", number)
    ids = [ObjectId() for _ in range(number)]
    for n, id_ in enumerate(ids):
        op, name = new_operation(), f"user {n}"
        notes = {
            "rev": 1,
            "op": op,
            "born": op,
            "keys": {"username": name},
            "debt": {"epoch": w.control.epoch},
        }
        w.documents.insert_one({"_id": id_, "username": name, **fields, CF: notes})
    return ids


async def test_a_row_ahead_of_the_primary_is_not_confirmed_among_others_either(open_world, monkeypatch):
    w = await open_world()
    ids = owed_together(w, monkeypatch, n=1)
    stray = image_of(ids[0], 9, n=99)
    await apply(w, stray)
    await w.reconcile()
    assert [(await w.row(id_)).document["n"] for id_ in ids] == [1] * len(ids)
    assert w.notes(ids[0])["rev"] > 9
    assert w.conflicts() == [("postgres", stray.document)]
    await w.assert_equal()


async def test_an_insert_that_arrives_again_after_its_delete_is_not_settled_among_others(
    open_world, monkeypatch
):
    w = await open_world()
    made = await w.users.insert({"username": "Bob"})
    late = w.document(made.id)
    await w.users.delete(made.id)
    await w.settle()
    # Restored from a backup, PostgreSQL knows nothing of it.
    w.sql("DELETE FROM crossfade.tombstones")
    ids = owed_together(w, monkeypatch)
    late[CF]["debt"] = {"epoch": w.control.epoch}
    w.documents.insert_one(late)
    await w.reconcile()
    assert (w.document(made.id), await w.row(made.id)) == (None, None)
    assert all([await w.row(id_) for id_ in ids])
    await w.assert_equal()


async def test_each_of_many_that_are_refused_is_parked_with_its_cause_in_one_round(open_world, monkeypatch):
    w = await open_world()
    ids = owed_together(w, monkeypatch, n=666)
    assert (await w.m.reconciler.reconcile()).parked == len(ids)
    assert all("users_n_allowed" in w.debt(id_)["parked"] for id_ in ids)


async def buried_together(w: World, monkeypatch, **last):
    """What deletes leave that die before they ask PostgreSQL, as many as are settled together; the ids, and of the
    records that are settled one by one.
    """
    number, alone = 4, []
    monkeypatch.setattr(reconcile, "_MANY", number)
    settle = w.settler.settle_tombstone

    async def noted(entity, id_, control, **how):
        alone.append(id_)
        return await settle(entity, id_, control, **how)

    monkeypatch.setattr(w.settler, "settle_tombstone", noted)
    ids = [
        (await w.users.insert({"username": f"user {n}", "friends": [ObjectId()]})).id for n in range(number)
    ]
    await w.settle()
    for id_ in ids:
        how = last if id_ == ids[-1] else {}
        await w.mongo.bury(w.entity, id_, rev=2, op=new_operation(), owed=True, timeout=PATIENCE, **how)
        w.documents.delete_one({"_id": id_})
    return ids, alone


async def test_the_deletes_of_an_outage_are_settled_together_but_those_that_belong_to_an_operation(
    open_world, monkeypatch
):
    w = await open_world()
    ids, alone = await buried_together(w, monkeypatch, group=(("users", id_to_text(ObjectId())),))
    await w.reconcile()
    assert alone == ids[-1:]
    assert w.sql("SELECT id FROM users") == []
    assert [w.tombstone_in_postgres(id_) for id_ in ids] == [2] * len(ids)
    await w.assert_equal()


async def test_the_deletes_of_phase_0_are_settled_together(open_world, monkeypatch):
    w = await open_world("mongo_only")
    ids, alone = await buried_together(w, monkeypatch)
    await w.m.prepare()
    await w.set_phase("dual_write")
    await w.reconcile()
    assert alone == []
    assert [w.tombstone_in_postgres(id_) for id_ in ids] == [2] * len(ids)
    await w.assert_equal()


async def test_what_is_made_again_while_deletes_are_settled_together_stays(open_world, monkeypatch):
    w = await open_world()
    [again, *gone], alone = await buried_together(w, monkeypatch)
    apply = w.postgres.apply_deletes

    async def then_made_again(*deletes, **how):
        answers = await apply(*deletes, **how)
        if w.document(again) is None:
            w.documents.insert_one({"_id": again, "username": "again"})
        return answers

    monkeypatch.setattr(w.postgres, "apply_deletes", then_made_again)
    await w.reconcile()
    assert alone == [again]
    assert (await w.row(again)).rev > 2
    assert [await w.row(id_) for id_ in gone] == [None] * len(gone)
    await w.assert_equal()


async def test_deletes_are_not_settled_together_beside_images_whose_rows_they_lock(open_world, monkeypatch):
    monkeypatch.setattr(reconcile, "_CALLERS", 0)
    w = await open_world()
    kept = [(await w.users.insert({"username": f"kept {n}"})).id for n in range(4)]
    gone, _ = await buried_together(w, monkeypatch)
    for id_ in kept:
        owed = {f"{CF}.rev": Int64(2), f"{CF}.op": new_operation(), f"{CF}.debt": {"epoch": w.control.epoch}}
        w.documents.update_one({"_id": id_}, {"$set": {"friends": gone, **owed}})
    under_way, most = [0], [0]

    def counted(settle):
        async def counting(*args):
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
            settled = await settle(*args)
            under_way[0] -= 1
            return settled

        return counting

    for name in ("settle_many", "settle_deletes"):
        monkeypatch.setattr(w.settler, name, counted(getattr(w.settler, name)))
    await w.reconcile()
    assert most == [1]
    await w.assert_equal()


async def test_a_row_that_is_newer_than_its_delete_does_not_stay_among_others_either(open_world, monkeypatch):
    w = await open_world()
    ids, alone = await buried_together(w, monkeypatch)
    stray = image_of(ids[0], 9, n=99)
    await apply(w, stray)
    await w.reconcile()
    assert alone == ids[:1]
    assert w.sql("SELECT id FROM users") == []
    assert w.conflicts() == [("postgres", stray.document)]
    await w.assert_equal()


async def test_a_background_round_leaves_a_write_in_flight_to_its_writer(open_world):
    w, later = [await open_world(reconcile_age=age) for age in (60.0, 0.0)]
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.settle()
    w.documents.update_one({"_id": made.id}, {"$set": {"n": 2, "_cf.rev": 2, "_cf.debt": {"epoch": 1}}})
    for worker, n in ((w, 1), (later, 2)):
        assert len(await worker.owed()) == 1
        await worker.m.reconciler._background_round()
        assert (await w.row(made.id)).document["n"] == n
    await w.assert_equal()


async def test_one_record_that_cannot_be_settled_does_not_keep_the_others_from_it(open_world, monkeypatch):
    w = await open_world()
    bad, good = [(await w.users.insert({"username": name})).id for name in ("bad", "good")]
    await w.settle()
    w.documents.update_many({}, {"$set": {f"{CF}.debt": {"epoch": 1}}})
    settle_one = w.settler.settle_one

    async def unforeseen(entity, id_, control, **how):
        if id_ == bad:
            raise Quarantined("nobody has thought of this")
        return await settle_one(entity, id_, control, **how)

    monkeypatch.setattr(w.settler, "settle_one", unforeseen)
    done = await w.m.reconciler.reconcile()
    assert (done.settled, done.parked, done.failed, done.cause) == (1, 1, 0, "nobody has thought of this")
    assert (w.debt(bad) is None, w.debt(good) is None) == (False, True)


async def test_mongo_is_away_and_postgres_decides_and_the_outbox_is_delivered_by_itself(
    open_world, mongo_proxy
):
    w = await open_world("postgres_primary", mongo=mongo_proxy, background=True)
    kept, gone = [(await w.users.insert({"username": name})).id for name in ("kept", "gone")]
    mongo_proxy.refuse()
    made = await w.users.insert({"username": "made", "friends": [ObjectId()]})
    await w.users.update(kept, {"n": 2})
    await w.users.delete(gone)
    assert [rev for _, rev, _, _ in w.outbox()] == [2, 2, 1]
    assert await w.m.reconciler.owed() == 3
    assert (await w.users.get(made.id)).source == "postgres"
    mongo_proxy.pass_through()
    await eventually(lambda: nothing_owed(w))
    await w.assert_equal()


async def test_a_document_with_odd_names_of_fields_is_delivered(open_world):
    w = await open_world("postgres_primary")
    odd = {"username": "Bob", "$legacy": {"$set": 1}, "theme.color": 2, "": 3, "n": {"$where": [1]}}
    made = await w.users.insert(odd)
    await w.users.update(made.id, {"n": 2, "bio": "x"})
    await w.settle()
    kept = {name: value for name, value in w.document(made.id).items() if name != CF}
    assert list(kept.items()) == [("_id", made.id), *({**odd, "n": 2, "bio": "x"}).items()]
    assert w.outbox() == []


async def test_a_foreign_write_after_the_switch_is_journaled_whole_before_it_is_replaced(open_world):
    w = await open_world("postgres_primary")
    made = await w.users.insert({"username": "Bob", "n": 1})
    w.documents.update_one({"_id": made.id}, {"$set": {"n": 99, "stray": "kept for a person"}})
    await w.users.update(made.id, {"n": 2})
    assert w.document(made.id)["n"] == 2
    [(store, document)] = w.conflicts()
    assert (store, document["n"], document["stray"]) == ("mongo", 99, "kept for a person")
    await w.assert_equal()


async def test_what_another_application_left_unreadable_is_journaled_whole_before_it_is_replaced(open_world):
    w = await open_world("postgres_primary")
    made = await w.users.insert({"username": "Bob", "n": 1})
    # A mark that is erased meanwhile makes other bytes of the same, and those are kept as well.
    await w.settle()
    await unreadable(w, made.id)
    await w.users.update(made.id, {"n": 2})
    assert w.document(made.id)["n"] == 2
    [(kept,)] = w.sql("SELECT document FROM crossfade.conflicts")
    assert b"odd" in bytes(kept)
    await w.assert_equal()


async def test_a_foreign_write_that_restores_what_was_delivered_before_the_way_back_is_journaled(open_world):
    w = await open_world("postgres_primary")
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.reconcile()
    await w.set_phase("postgres_read")
    await w.users.update(made.id, {"n": 2})
    await w.reconcile()
    await w.set_phase("postgres_primary")
    w.documents.update_one({"_id": made.id}, {"$set": {"n": 1}})
    await w.users.update(made.id, {"n": 3})
    assert [document["n"] for _, document in w.conflicts()] == [1]
    await w.reconcile()
    await w.assert_equal()


async def test_a_foreign_document_under_a_delete_is_journaled_and_goes(open_world):
    w = await open_world("postgres_primary")
    made = await w.users.insert({"username": "Bob"})
    w.documents.replace_one({"_id": made.id}, {"username": "Mallory"})
    await w.users.delete(made.id)
    assert w.document(made.id) is None
    assert [document["username"] for _, document in w.conflicts()] == ["Mallory"]
    await w.assert_equal()


async def test_a_revision_that_a_sleeper_numbered_in_mongo_is_overtaken(open_world):
    """A worker that slept through the switch wrote to MongoDB: PostgreSQL's content goes above it."""
    w = await open_world("postgres_primary")
    made = await w.users.insert({"username": "Bob", "n": 1})
    w.documents.update_one({"_id": made.id}, {"$set": {"_cf.rev": 7, "_cf.op": "0" * 32, "n": 99}})
    await w.users.update(made.id, {"n": 2})
    await w.reconcile()
    assert w.document(made.id)["n"] == 2
    assert w.notes(made.id)["rev"] > 7
    assert [document["n"] for _, document in w.conflicts()] == [99]
    await w.assert_equal()


async def test_a_late_delivery_after_a_delete_removes_itself(open_world):
    """The row was read before the delete, and its insert arrives after it."""
    w = await open_world("postgres_primary")
    made = await w.users.insert({"username": "Bob"})
    row = await w.row(made.id)
    await w.users.delete(made.id)
    assert not await w.settler.deliverer._put(w.entity, None, None, row, w.control, timeout=PATIENCE)
    assert w.document(made.id) is None


async def test_stores_that_stop_hang_and_come_back(own_servers):
    """Postgres stopped, then paused (SIGSTOP), under a worker that goes on writing."""
    mongo_uri = own_servers.mongo_uri.replace("/?", "/t?") if "/?" in own_servers.mongo_uri else None
    from crossfade.testing.plugin import _with_database

    mongo_uri = mongo_uri or _with_database(own_servers.mongo_uri, "t")
    create_tables(own_servers.database_url)
    cf = Crossfade(
        mongo_uri=mongo_uri,
        database_url=own_servers.database_url,
        initial_phase="postgres_read",
        options=FAST,
    )
    m = cf.migration("accounts", [users_entity()])
    import pymongo

    async with cf:
        with pymongo.MongoClient(mongo_uri) as client:
            w = World(
                cf, m, m["users"].entity, client.get_default_database()["users"], own_servers.database_url
            )
            made = await w.users.insert({"username": "Bob", "n": 0})

            own_servers.postgres.stop()
            number = await write_for(w, made.id, seconds=2.0, start=1)
            await asyncio.to_thread(own_servers.postgres.start)
            await eventually(lambda: nothing_owed(w))

            own_servers.postgres.pause()
            # Longer than the lease: a hanging secondary may not let it run out either.
            number = await write_for(w, made.id, seconds=FAST.lease + 2.0, start=number)
            own_servers.postgres.resume()
            await eventually(lambda: nothing_owed(w))

            async def readable() -> bool:
                return (await w.users.get(made.id)).source == "postgres"

            await eventually(readable)
            assert (await w.users.get(made.id))["n"] == number - 1
            await w.assert_equal()


async def write_for(w: World, id_, *, seconds: float, start: int) -> int:
    """Write and read back for so long; no caller waits beyond the deadlines (generously)."""
    ends = time.monotonic() + seconds
    number = start
    while time.monotonic() < ends:
        began = time.monotonic()
        await w.users.update(id_, {"n": number})
        assert (await w.users.get(id_))["n"] == number
        assert time.monotonic() - began < 8.0
        number += 1
        await asyncio.sleep(0.05)
    assert number > start + 2
    return number


async def test_callers_that_give_up_again_and_again_do_not_block_the_driver_for_good(open_world, mongo_proxy):
    """A deadline and the end of a request may both cancel a call that waits for a server."""
    w = await open_world("dual_write", mongo=mongo_proxy)
    made = await w.users.insert({"username": "Bob"})
    await w.settle()
    mongo_proxy.refuse()
    for _ in range(20):
        calls = [asyncio.create_task(w.mongo.read(w.entity, made.id, timeout=PATIENCE)) for _ in range(4)]
        await asyncio.sleep(0.05)
        for _ in range(3):
            for call in calls:
                call.cancel()
            await asyncio.sleep(0)
        await asyncio.wait(calls, timeout=PATIENCE)
    mongo_proxy.pass_through()
    async with asyncio.timeout(PATIENCE):
        image = await w.mongo.read(w.entity, made.id, timeout=PATIENCE)
    assert image.document["username"] == "Bob"


@pytest.mark.parametrize("phase", ["dual_write", "postgres_primary"])
async def test_callers_that_give_up_do_not_make_a_secondary_that_answers_one_that_is_down(
    open_world, mongo_proxy, postgres_proxy, phase
):
    """A client that closes its connection ends its request."""
    w = await open_world(phase, mongo=mongo_proxy, postgres=postgres_proxy, secondary_deadline=10.0)
    made = await w.users.insert({"username": "Bob", "n": 0})
    await w.settle()
    secondary, breaker = postgres_proxy, w.m.pair.postgres_breaker
    if phase == "postgres_primary":
        secondary, breaker = mongo_proxy, w.m.pair.mongo_breaker
    secondary.delay(2.0)  # long after the primary's answer, on a busy machine too
    for n in range(1, 5):
        write = asyncio.create_task(w.users.update(made.id, {"n": n}))

        async def decided(n: int = n) -> bool:
            if phase == "dual_write":
                return w.document(made.id)["n"] == n
            return w.sql("SELECT n FROM users") == [(n,)]

        await eventually(decided)
        await asyncio.sleep(0.1)  # the primary's answer has come; the secondary's takes longer
        assert not write.done()
        write.cancel()
        with pytest.raises(asyncio.CancelledError):
            await write
        assert (breaker.failures, breaker.allows()) == (0, True)
    secondary.pass_through()
    await w.users.update(made.id, {"n": 9})
    await w.settle()
    assert w.document(made.id)["n"] == 9
    assert (await w.row(made.id)).document["n"] == 9


@pytest.mark.parametrize(
    ("phase", "call"), [("dual_write", "update"), ("postgres_read", "get"), ("postgres_primary", "get")]
)
async def test_callers_that_never_wait_as_long_as_a_deadline_find_a_silent_postgres_all_the_same(
    open_world, postgres_proxy, phase, call
):
    w = await open_world(phase, postgres=postgres_proxy, board_age=PATIENCE)
    made = await w.users.insert({"username": "Bob", "n": 0})
    await w.settle()
    await w.m.board.refresh()
    postgres_proxy.swallow_answers()

    async def opened() -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await (w.users.update(made.id, {"n": 1}) if call == "update" else w.users.get(made.id))
        return not w.m.pair.postgres_breaker.allows()

    await eventually(opened)


async def test_a_claim_of_a_database_that_does_not_answer_ends(open_world, postgres_proxy):
    w = await open_world(postgres=postgres_proxy)
    async with w.postgres.claim("work", timeout=1.0) as claim:
        assert claim.mine
        async with w.postgres.claim("work", timeout=1.0) as another:
            assert not another.mine
        postgres_proxy.swallow_answers()
        with pytest.raises(StoreUnavailable):
            await claim.stay()
    postgres_proxy.refuse()
    with pytest.raises(StoreUnavailable):
        async with w.postgres.claim("work", timeout=0.5):
            pass
    postgres_proxy.pass_through()
    await w.postgres_answers()

    async def free_again():
        async with w.postgres.claim("work", timeout=1.0) as claim:
            return claim.mine

    await eventually(free_again)


async def inserted_by_a_dying_worker(w, monkeypatch):
    """(id, what lets the insert arrive that it sent to MongoDB last)."""
    insert, late = w.mongo.insert, []

    async def dies(entity, document, **how):
        late.append(lambda: insert(entity, document, **how))
        raise asyncio.CancelledError

    monkeypatch.setattr(w.mongo, "insert", dies)
    id_ = ObjectId()
    with pytest.raises(asyncio.CancelledError):
        await w.users.insert({"_id": id_, "username": "Bob"})
    return id_, late[0]


@pytest.mark.parametrize("back", [False, True], ids=["", "after the switch back"])
async def test_an_insert_that_is_delivered_after_the_delete_of_its_record_does_not_stay(
    open_world, monkeypatch, back
):
    """Its worker has died before it arrived: nothing in PostgreSQL says that it was ever sent."""
    w, other = await open_world("postgres_primary"), await open_world("postgres_primary")
    id_, arrive = await inserted_by_a_dying_worker(w, monkeypatch)
    await other.reconcile()
    assert other.document(id_) is not None
    await other.users.delete(id_)
    await other.reconcile()
    assert (other.document(id_), other.outbox()) == (None, [])

    await arrive()
    assert other.document(id_) is not None
    if back:
        await other.set_phase("postgres_read")
    await other.reconcile()
    assert other.document(id_) is None
    await other.assert_equal()


@pytest.mark.parametrize("first", ["document", "tombstone"])
async def test_an_insert_that_is_delivered_after_the_switch_back_and_a_delete_that_is_still_owed_does_not_stay(
    open_world, postgres_proxy, monkeypatch, first
):
    w = await open_world("postgres_primary")
    other = await open_world("postgres_primary", postgres=postgres_proxy)
    id_, arrive = await inserted_by_a_dying_worker(w, monkeypatch)
    await other.reconcile()
    await other.set_phase("postgres_read")
    postgres_proxy.refuse()
    await other.users.delete(id_)
    await arrive()
    assert other.document(id_) is not None
    postgres_proxy.pass_through()
    await other.postgres_answers()
    if first == "document":
        await other.settler.settle_one(other.entity, id_, other.control)
    else:
        await other.settler.settle_tombstone(other.entity, id_, other.control, timeout=PATIENCE)
    await other.reconcile()
    assert other.document(id_) is None
    await other.assert_equal()


async def test_an_insert_that_was_delivered_loses_its_mark(open_world):
    w = await open_world("postgres_primary")
    made = await w.users.insert({"username": "Bob"})
    await w.settle()
    assert w.debt(made.id) is None
    w.documents.update_one({"_id": made.id}, {"$set": {"_cf.debt": {"epoch": 1, "delivery": True}}})
    await w.reconcile()
    assert w.debt(made.id) is None
    assert w.document(made.id) is not None
    await w.assert_equal()


@pytest.mark.parametrize("back", [False, True], ids=["postgres down", "after the switch back"])
async def test_nobody_sees_or_writes_upon_a_delivered_insert_that_a_delete_overtook(
    open_world, postgres_proxy, monkeypatch, back
):
    w = await open_world("postgres_primary")
    other = await open_world("postgres_primary", postgres=postgres_proxy)
    id_, arrive = await inserted_by_a_dying_worker(w, monkeypatch)
    await other.reconcile()
    await other.users.delete(id_)
    await other.reconcile()
    await arrive()
    assert w.document(id_) is not None
    if back:
        await other.set_phase("postgres_read", foreign_writers=True)
        assert await other.users.get(id_) is None
        with pytest.raises(NotFound):
            await other.users.update(id_, {"n": 1})
    else:
        postgres_proxy.refuse()
        for read in (other.users.get(id_), other.users.find({"username": "Bob"})):
            with pytest.raises(StoreUnavailable):
                await read


# --- deliveries together ---------------------------------------------------------------------------------------------


async def undelivered(w: World, proxy, monkeypatch, **fields):
    """Records of which MongoDB has the first state, as many as are delivered together; the ids, and those of whatever
    is delivered one by one from then on.
    """
    number, alone = 4, []
    monkeypatch.setattr(reconcile, "_MANY", number)
    ids = [(await w.users.insert({"username": f"user {n}", "n": 1, **fields})).id for n in range(number)]
    await w.reconcile()
    proxy.refuse()
    for id_ in ids:
        await w.users.update(id_, {"n": 2})
    deliver = w.settler.deliverer.deliver

    async def noted(owed, control, **how):
        alone.append(owed.id)
        return await deliver(owed, control, **how)

    monkeypatch.setattr(w.settler.deliverer, "deliver", noted)
    return ids, alone


def just_before_it_is_sent(w: World, monkeypatch, happens):
    """Let something happen between the look at the stores and the next request that delivers together."""
    deliver_many = w.mongo.deliver_many

    async def overtaken(*args, **how):
        monkeypatch.setattr(w.mongo, "deliver_many", deliver_many)
        await happens()
        return await deliver_many(*args, **how)

    monkeypatch.setattr(w.mongo, "deliver_many", overtaken)


def written_by_another(w: World, id_):
    async def happens():
        w.documents.update_one({"_id": id_}, {"$set": {"n": 99}})

    return happens


@pytest.mark.parametrize("fields", [{}, {"picture": b"p" * 5000}], ids=["whole", "without their parts"])
async def test_the_deliveries_of_an_outage_are_made_together(open_world, mongo_proxy, monkeypatch, fields):
    w = await open_world("postgres_primary", mongo=mongo_proxy, entity=users_entity(pictures=True))
    one, other, gone = [(await w.users.insert({"username": name})).id for name in ("one", "other", "gone")]
    ids, alone = await undelivered(w, mongo_proxy, monkeypatch, **fields)
    ids.append((await w.users.insert({"username": "new"})).id)
    # What must give way, what another application has written, what was deleted, and a part.
    await w.users.update(one, {"username": "a third"})
    await w.users.update(other, {"username": "one"})
    await w.users.update(one, {"username": "other"})
    await w.users.delete(gone)
    foreign, pictured, *ids = ids
    await w.users.update(pictured, {"picture": b"q" * 5000})
    w.documents.update_one({"_id": foreign}, {"$set": {"n": 99}})
    mongo_proxy.pass_through()
    alone.clear()
    await w.reconcile()
    assert {gone, foreign, pictured} <= set(alone) <= {gone, foreign, pictured, one, other}
    assert [document["n"] for _, document in w.conflicts()] == [99]
    assert [w.document(id_)["n"] for id_ in ids[:-1]] == [2] * (len(ids) - 1)
    await w.assert_equal()


async def test_a_foreign_write_since_the_look_is_journaled_among_others_too(
    open_world, mongo_proxy, monkeypatch
):
    w = await open_world("postgres_primary", mongo=mongo_proxy)
    ids, alone = await undelivered(w, mongo_proxy, monkeypatch)
    just_before_it_is_sent(w, monkeypatch, written_by_another(w, ids[0]))
    mongo_proxy.pass_through()
    await w.reconcile()
    assert alone == ids[:1]
    assert [document["n"] for _, document in w.conflicts()] == [99]
    await w.assert_equal()


async def test_an_insert_that_a_delete_overtakes_does_not_stay_among_others(
    open_world, mongo_proxy, monkeypatch
):
    w, other = await open_world("postgres_primary", mongo=mongo_proxy), await open_world("postgres_primary")
    await undelivered(w, mongo_proxy, monkeypatch)
    new = (await w.users.insert({"username": "new"})).id
    just_before_it_is_sent(w, monkeypatch, lambda: other.users.delete(new))
    mongo_proxy.pass_through()
    await w.reconcile()
    assert w.document(new) is None
    await w.assert_equal()


async def test_an_insert_sent_among_others_that_arrives_after_its_delete_does_not_stay(
    open_world, mongo_proxy, monkeypatch
):
    w, other = await open_world("postgres_primary", mongo=mongo_proxy), await open_world("postgres_primary")
    await undelivered(w, mongo_proxy, monkeypatch)
    new = (await w.users.insert({"username": "new"})).id
    deliver_many, sent = w.mongo.deliver_many, []

    async def under_way(*args, **how):
        sent.append(lambda: deliver_many(*args, **how))
        raise Unanswered("mongo", "on its way")

    monkeypatch.setattr(w.mongo, "deliver_many", under_way)
    mongo_proxy.pass_through()
    await w.m.reconciler._settle_together((await w.m.board.refresh()).debts, w.control, reconcile.Round())
    [arrive] = sent
    await other.reconcile()
    await other.users.delete(new)
    await other.reconcile()
    await arrive()
    assert w.document(new) is not None
    await other.reconcile()
    assert w.document(new) is None
    await other.assert_equal()


async def test_an_open_write_is_not_delivered_among_others(open_world, mongo_proxy, monkeypatch):
    w = await open_world("postgres_primary", mongo=mongo_proxy)
    ids, _ = await undelivered(w, mongo_proxy, monkeypatch)
    mongo_proxy.pass_through()
    tentative = '{"kind": "update", "before": null}'
    w.sql("UPDATE crossfade.outbox SET tentative = %s WHERE id = %s", tentative, id_to_text(ids[0]))
    settled, _ = await w.settler.deliverer.deliver_many(w.entity, ids, w.control)
    assert settled == {id_to_text(id_) for id_ in ids[1:]}
    assert [w.document(id_)["n"] for id_ in ids] == [1, 2, 2, 2]


async def test_a_foreign_write_upon_what_was_delivered_and_not_yet_settled_is_journaled_among_others_too(
    open_world, mongo_proxy, monkeypatch
):
    w = await open_world("postgres_primary", mongo=mongo_proxy)
    ids, _ = await undelivered(w, mongo_proxy, monkeypatch)
    mongo_proxy.pass_through()
    with monkeypatch.context() as dies:  # whoever delivers it, before it is settled
        dies.setattr(w.postgres, "settle_many", lambda *_, **_how: asyncio.sleep(0, set()))
        await w.settler.deliverer.deliver_many(w.entity, ids[:1], w.control)
    just_before_it_is_sent(w, monkeypatch, written_by_another(w, ids[0]))
    await w.reconcile()
    assert [document["n"] for _, document in w.conflicts()] == [99]
    await w.assert_equal()


async def test_a_row_that_cannot_be_read_keeps_no_others_from_being_delivered(
    open_world, mongo_proxy, monkeypatch
):
    w = await open_world("postgres_primary", mongo=mongo_proxy)
    ids, _ = await undelivered(w, mongo_proxy, monkeypatch)
    mongo_proxy.pass_through()
    w.sql("UPDATE users SET extra = '5' WHERE id = %s", id_to_text(ids[0]))
    done = await w.m.reconciler.reconcile()
    assert [w.document(id_)["n"] for id_ in ids] == [1, 2, 2, 2]
    assert done.parked == 1


async def test_deletes_that_postgres_refuses_are_not_tried_with_every_round(open_world, monkeypatch):
    w = await open_world()
    ids, _ = await buried_together(w, monkeypatch)
    w.sql("CREATE TABLE orders (user_id text REFERENCES users (id))")
    for id_ in ids:
        w.sql("INSERT INTO orders VALUES (%s)", id_to_text(id_))
    asked, apply = [], w.postgres.apply_deletes

    async def noted(entity, deletes, **how):
        asked.append(len(deletes))
        return await apply(entity, deletes, **how)

    monkeypatch.setattr(w.postgres, "apply_deletes", noted)
    for _ in range(3):
        look = await w.m.board.refresh()
        await w.m.reconciler._settle(look.debts, look.control, retry_parked=False)
    # In halves, and one by one; from then on they rest.
    assert asked == [4, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1]
    w.sql("DROP TABLE orders")
    await w.reconcile()
    await w.assert_equal()


async def test_records_of_many_rows_are_not_all_read_at_once(open_world, mongo_proxy, monkeypatch):
    w = await open_world("postgres_primary", mongo=mongo_proxy)
    friends = [ObjectId() for _ in range(500)]
    _, alone = await undelivered(w, mongo_proxy, monkeypatch, friends=friends)
    mongo_proxy.pass_through()
    monkeypatch.setattr(delivery, "MOST_TOGETHER", 2 * len(friends) * len(id_to_text(ObjectId())))
    read_many, read = w.postgres.read_many, []

    async def noted(*args, **how):
        found = await read_many(*args, **how)
        read.append(sum(len(image.document["friends"]) for image in found))
        return found

    monkeypatch.setattr(w.postgres, "read_many", noted)
    await w.reconcile()
    assert max(read) <= 2 * len(friends)
    assert alone
    await w.assert_equal()


async def test_a_record_that_was_delivered_and_that_postgres_has_lost_is_brought_there_after_the_switch_back(
    open_world,
):
    """Its mark outlived the switch, and PostgreSQL comes from a backup."""
    w = await open_world("postgres_read")
    made = await w.users.insert({"username": "Bob"})
    await w.settle()
    w.documents.update_one({"_id": made.id}, {"$set": {"_cf.debt": {"epoch": 1, "delivery": True}}})
    w.sql("DELETE FROM users")
    await w.reconcile()
    await w.assert_equal()
    assert "debt" not in w.notes(made.id)


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
async def test_a_delivery_upon_an_insert_that_came_behind_the_delete_of_its_record_does_not_keep_it(
    open_world, monkeypatch, many
):
    """Its worker had read the row before the delete, and reads the document when the insert has arrived."""
    w, slow, other = [await open_world("postgres_primary") for _ in range(3)]
    id_, arrive = await inserted_by_a_dying_worker(w, monkeypatch)
    if many:

        async def unanswered(*what, **how):
            raise Unanswered("mongo", "a test")

        monkeypatch.setattr(other.mongo, "deliver", unanswered)
        await other.users.update(id_, {"n": 1})
        monkeypatch.undo()
    reads = "read_raw_many" if many else "read_raw"
    read, read_first = getattr(slow.mongo, reads), []

    async def behind_the_delete(*what, **how):
        if not read_first:
            read_first.append(True)
            await other.users.delete(id_)
            await other.reconcile()
            assert (other.document(id_), other.outbox()) == (None, [])
            await arrive()
        return await read(*what, **how)

    monkeypatch.setattr(slow.mongo, reads, behind_the_delete)
    if many:
        await slow.settler.deliverer.deliver_many(slow.entity, [id_], slow.control)
    else:
        await slow.reconcile()
    assert read_first
    await other.reconcile()
    assert other.document(id_) is None
    await other.assert_equal()
