"""ROLLBACK_BOTH: success is told only when both stores hold the write; else neither does."""

import asyncio

import pytest
from bson import Int64, ObjectId

from crossfade import Busy, DuplicateKey, FailureStrategy, Undone, UndoPending, board
from crossfade.record import CF, Settled, new_operation
from crossfade.stores.errors import Unanswered

from .conftest import PATIENCE, World, eventually
from .test_unknown_outcomes import command

ROLLBACK = FailureStrategy.ROLLBACK_BOTH
OPERATIONS = ["insert", "update", "delete"]
BEFORE = {"username": "Bob", "n": 1, "friends": [ObjectId()], "flag": True, "x": float("nan")}


async def write(w: World, operation, id_, strategy=ROLLBACK):
    if operation == "insert":
        return await w.users.insert({"_id": id_, "username": "Eve"}, strategy=strategy)
    if operation == "update":
        return await w.users.update(
            id_, {"n": 2, "username": "Robert", "new": float("nan")}, unset=["flag"], strategy=strategy
        )
    return await w.users.delete(id_, strategy=strategy)


async def prepared(w: World, operation):
    id_ = ObjectId()
    if operation != "insert":
        await w.users.insert({"_id": id_, **BEFORE})
        await w.settle()
    return id_


async def check_undone(w: World, operation, id_):
    """Both stores as before, but for the revision; nobody's name is blocked."""
    await w.reconcile()
    await w.assert_equal()
    if operation == "insert":
        assert w.document(id_) is None
        await w.users.insert({"username": "eve"})
    else:
        image = await w.image(id_)
        after = {k: v for k, v in image.document.items() if k not in ("_id", "x")}
        assert after == {k: v for k, v in BEFORE.items() if k != "x"}
        assert image.rev == 3
        assert image.keys == {"username": "bob"}
        await w.users.insert({"username": "ROBERT"})


@pytest.mark.parametrize("phase", ["dual_write", "postgres_read"])
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_postgres_fails_and_mongo_is_undone(open_world, postgres_proxy, phase, operation):
    w = await open_world(phase, postgres=postgres_proxy)
    id_ = await prepared(w, operation)
    postgres_proxy.refuse()
    with pytest.raises(Undone) as undone:
        await write(w, operation, id_)
    assert undone.value.__cause__ is not None
    assert (w.document(id_) is None) == (operation == "insert")
    postgres_proxy.pass_through()
    await check_undone(w, operation, id_)


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_postgres_acted_and_did_not_say_so_and_both_are_undone(open_world, postgres_proxy, operation):
    w = await open_world("dual_write", postgres=postgres_proxy)
    id_ = await prepared(w, operation)
    postgres_proxy.cut_after_request(when=lambda r: b"COMMIT" in r)
    with pytest.raises(Undone):
        await write(w, operation, id_)
    await check_undone(w, operation, id_)


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_mongo_fails_and_postgres_the_primary_is_undone(open_world, mongo_proxy, operation):
    w = await open_world("postgres_primary", mongo=mongo_proxy)
    id_ = await prepared(w, operation)
    mongo_proxy.refuse()
    with pytest.raises(Undone):
        await write(w, operation, id_)
    assert (await w.row(id_) is None) == (operation == "insert")
    mongo_proxy.pass_through()
    await check_undone(w, operation, id_)


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_mongo_acted_and_did_not_say_so_and_both_are_undone(open_world, mongo_proxy, operation):
    w = await open_world("postgres_primary", mongo=mongo_proxy)
    id_ = await prepared(w, operation)
    sent = {"insert": "insert", "update": "update", "delete": "delete"}[operation]
    mongo_proxy.cut_after_request(when=command(sent))
    with pytest.raises(Undone):
        await write(w, operation, id_)
    await check_undone(w, operation, id_)


async def test_a_rule_of_the_secondary_undoes_the_write(open_world):
    w = await open_world("dual_write")
    id_ = await prepared(w, "update")
    with pytest.raises(Undone):
        await w.users.update(id_, {"n": 666}, strategy=ROLLBACK)
    await w.assert_equal()
    assert w.document(id_)["n"] == 1


async def test_a_row_above_the_primary_does_not_confirm(open_world):
    """Behind is not a confirmation: the row's content is not what the caller wrote."""
    from .test_images import apply, image_of

    w = await open_world("dual_write")
    id_ = await prepared(w, "update")
    await apply(w, image_of(id_, 9, n=99))
    try:
        await w.users.update(id_, {"n": 2}, strategy=ROLLBACK)
        told = 2
    except Undone:
        told = 1
    await w.reconcile()
    assert w.document(id_)["n"] == (await w.row(id_)).document["n"] == told
    await w.assert_equal()


@pytest.mark.parametrize("foreign", [{"n": 77}, {"other": 5}])
async def test_a_foreign_write_in_between_stays(open_world, postgres_proxy, foreign):
    w = await open_world("dual_write", postgres=postgres_proxy)
    id_ = await prepared(w, "update")
    await leave_open(w, "update", id_)
    w.documents.update_one({"_id": id_}, {"$set": foreign})
    await w.reconcile()
    document = w.document(id_)
    for name, value in foreign.items():
        assert document[name] == value
    # Everything else of the open write is taken back.
    assert document["username"] == "Bob"
    await w.m.reconciler.full_sweep()
    await w.assert_equal()


async def test_an_undo_brings_back_what_stood_there_at_the_write_and_not_at_the_look(
    open_world, postgres_proxy, monkeypatch
):
    """Another application, which counts no revision up, writes in between."""
    w = await open_world("dual_write", postgres=postgres_proxy)
    id_ = await prepared(w, "update")
    look = w.mongo.notes

    async def overtaken(*record, **how):
        monkeypatch.setattr(w.mongo, "notes", look)
        found = await look(*record, **how)
        w.documents.update_one({"_id": id_}, {"$set": {"n": 7}})
        return found

    monkeypatch.setattr(w.mongo, "notes", overtaken)
    postgres_proxy.refuse()
    with pytest.raises(Undone):
        await w.users.update(id_, {"n": 2}, strategy=ROLLBACK)
    assert w.document(id_)["n"] == 7
    postgres_proxy.pass_through()
    await w.reconcile()
    await w.assert_equal()


async def leave_open(w: World, operation, id_):
    """What a process leaves that dies between the tentative write and its confirmation."""
    epoch = Int64(w.control.epoch)
    op = new_operation()
    if operation == "insert":
        w.documents.insert_one(
            {"_id": id_, "username": "Eve", CF: {"rev": Int64(1), "op": op, "keys": {"username": "eve"},
             "debt": {"epoch": epoch, "tentative": {"kind": "insert"}}}}
        )  # fmt: skip
        return
    tentative = {"kind": operation}
    set_ = {f"{CF}.deleted": True}
    unset = {}
    if operation == "update":
        wrote = {"n": 2, "username": "Robert", "new": float("nan")}
        tentative |= {
            "before": {name: BEFORE[name] for name in ("n", "username", "flag")}, "wrote": wrote,
            "removed": ["flag"], "keys": {"username": "bob"},
        }  # fmt: skip
        set_, unset = {**wrote, f"{CF}.keys.username": "robert"}, {"$unset": {"flag": ""}}
    w.documents.update_one(
        {"_id": id_},
        {"$set": {**set_, f"{CF}.rev": Int64(2), f"{CF}.op": op,
                  f"{CF}.debt": {"epoch": epoch, "tentative": tentative}}, **unset},
    )  # fmt: skip


@pytest.mark.parametrize("postgres_had_it", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_what_a_dead_process_left_open_the_reconciler_undoes_whatever_postgres_did(
    open_world, operation, postgres_had_it
):
    w = await open_world("dual_write")
    id_ = await prepared(w, operation)
    await leave_open(w, operation, id_)
    if postgres_had_it:
        image = await w.image(id_)
        if operation == "delete":
            await w.postgres.apply_delete(
                w.entity, id_, rev=2, op=image.op, migration="accounts", epoch=w.control.epoch, timeout=5
            )
        else:
            await w.settler.bring(w.entity, image, w.control, timeout=5)
    await check_undone(w, operation, id_)


@pytest.mark.parametrize("operation", ["update", "delete"])
async def test_an_undo_that_comes_after_another_and_a_later_write_changes_nothing(open_world, operation):
    w = await open_world("dual_write")
    id_ = await prepared(w, operation)
    await leave_open(w, operation, id_)
    seen = await w.image(id_)
    assert await w.settler.undo(w.entity, seen, w.control) is Settled.CONFIRMED
    # The very values of the write that was undone: only its revision tells that this one is another.
    later = await w.users.update(id_, {"n": 2, "username": "Robert"})
    assert await w.settler.undo(w.entity, seen, w.control) is Settled.SUPERSEDED
    after = await w.image(id_)
    assert (after.rev, after.document["n"]) == (later.rev, 2)
    await w.reconcile()
    await w.assert_equal()


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_what_a_dead_process_left_open_in_postgres_is_undone(open_world, mongo_proxy, operation):
    w = await open_world("postgres_primary", mongo=mongo_proxy, secondary_deadline=5.0)
    other = await open_world("postgres_primary")
    id_ = await prepared(w, operation)
    mongo_proxy.swallow_answers()
    dying = asyncio.create_task(write(w, operation, id_))
    async with asyncio.timeout(10):
        while not any(tentative for _, _, tentative, _ in w.outbox()):  # noqa: ASYNC110 - in a server
            await asyncio.sleep(0.02)
    dying.cancel()
    await asyncio.gather(dying, return_exceptions=True)
    await check_undone(other, operation, id_)


async def test_a_write_that_another_worker_undoes_before_it_is_confirmed_is_told_as_undone(
    open_world, monkeypatch
):
    w, other = await open_world("postgres_primary"), await open_world("postgres_primary")
    id_ = await prepared(w, "update")
    deliver = w.settler.deliverer.deliver

    async def overtaken(owed, control, **how):
        monkeypatch.setattr(w.settler.deliverer, "deliver", deliver)
        settled = await deliver(owed, control, **how)
        await other.m.writer.postgres.undo(owed, other.control)
        return settled

    monkeypatch.setattr(w.settler.deliverer, "deliver", overtaken)
    with pytest.raises(Undone, match="not confirmed before its deadline"):
        await write(w, "update", id_)
    await check_undone(other, "update", id_)


@pytest.mark.parametrize("phase", ["dual_write", "postgres_primary"])
async def test_an_open_write_is_left_to_its_writer_until_its_deadline_or_until_nobody_writes(
    open_world, monkeypatch, phase
):
    w = await open_world(phase, tentative=30.0)
    id_ = await prepared(w, "update")
    if phase == "dual_write":
        await leave_open(w, "update", id_)
    else:

        async def dies(*_record, **_how):
            raise asyncio.CancelledError

        deliver = w.settler.deliverer.deliver
        monkeypatch.setattr(w.settler.deliverer, "deliver", dies)
        with pytest.raises(asyncio.CancelledError):
            await write(w, "update", id_)
        monkeypatch.setattr(w.settler.deliverer, "deliver", deliver)
    done = await w.m.reconciler.reconcile(wait_for_open=False)
    assert (done.open, done.settled, done.failed) == (1, 0, 0)
    assert [bool(debt.tentative) for debt in await w.owed()] == [True]
    primary = await w.row(id_) if phase == "postgres_primary" else await w.image(id_)
    assert (primary.rev, primary.document["n"]) == (2, 2)
    await w.m.reconciler.drain()
    await check_undone(w, "update", id_)


async def test_an_open_write_lets_no_other_in_and_those_wait_for_its_outcome(open_world):
    w = await open_world("dual_write")
    id_ = await prepared(w, "update")
    await leave_open(w, "update", id_)
    waiting = asyncio.create_task(w.users.update(id_, {"n": 5}))
    await asyncio.wait({waiting}, timeout=0.2)
    assert not waiting.done()
    await w.reconcile()
    assert (await waiting).rev == 4
    assert w.document(id_)["username"] == "Bob"
    await w.reconcile()
    await w.assert_equal()


async def test_a_write_that_waits_for_an_open_one_past_its_deadline_changes_nothing(open_world):
    w = await open_world("dual_write", primary_deadline=0.3)
    id_ = await prepared(w, "update")
    await leave_open(w, "update", id_)
    with pytest.raises(Busy):
        await w.users.update(id_, {"n": 5})
    assert w.document(id_)["n"] == 2


@pytest.mark.parametrize("phase", ["dual_write", "postgres_primary"])
async def test_a_write_that_waits_for_an_open_one_is_told_so_although_its_last_look_ends_late(
    open_world, mongo_proxy, postgres_proxy, phase
):
    """Nothing is wrong with the primary, and nothing was sent there that may stand."""
    w = await open_world(phase, tentative=60.0)
    id_ = await prepared(w, "update")
    if phase == "dual_write":
        await leave_open(w, "update", id_)
    else:
        w.sql(
            "INSERT INTO crossfade.outbox (entity, id, rev, op, epoch, base_digest, tentative)"
            " VALUES ('users', %s, 1, gen_random_uuid(), 1, NULL, '{\"kind\": \"update\"}')",
            str(id_),
        )
    slow = await open_world(phase, mongo=mongo_proxy, postgres=postgres_proxy, primary_deadline=2.0)
    for proxy in (mongo_proxy, postgres_proxy):
        proxy.delay(0.05)
    with pytest.raises(Busy):
        await slow.users.update(id_, {"n": 5})


async def test_the_undo_is_pending_when_the_primary_goes_too(open_world, mongo_proxy, postgres_proxy):
    w = await open_world("dual_write", mongo=mongo_proxy, postgres=postgres_proxy, primary_deadline=1.0)
    id_ = await prepared(w, "update")
    postgres_proxy.refuse()

    def dies_after(request):
        if command("findAndModify")(request):
            dies_after.seen += 1
        return dies_after.seen >= 2

    dies_after.seen = 0
    mongo_proxy.cut_before_request(n=10_000, when=dies_after)
    with pytest.raises(UndoPending):
        await write(w, "update", id_)
    mongo_proxy.pass_through()
    postgres_proxy.pass_through()
    await w.postgres_answers()
    await check_undone(w, "update", id_)


async def test_a_name_that_an_open_write_gave_up_is_not_taken_before_its_outcome(open_world):
    """Else the undo could not give it back."""
    w = await open_world("dual_write", tentative=30.0)
    id_ = await prepared(w, "update")
    found = asyncio.Event()
    asked = w.settler.bring

    async def hold(*args, **how):
        found.set()
        await asyncio.sleep(1.0)
        return await asked(*args, **how)

    w.settler.bring = hold  # the moment between the two stores, made longer
    renaming = asyncio.create_task(w.users.update(id_, {"username": "Robert"}, strategy=ROLLBACK))
    await found.wait()
    other = await open_world("dual_write")
    for name in ("bob", "ROBERT"):
        with pytest.raises(DuplicateKey):
            await other.users.insert({"username": name})
    await renaming
    assert w.notes(id_)["keys"] == {"username": "robert"}
    await other.users.insert({"username": "bob"})
    await other.settle()
    await w.assert_equal()


@pytest.mark.parametrize("outcome", ["undone", "confirmed"])
async def test_a_name_that_an_open_write_took_away_is_not_taken_before_its_outcome(open_world, outcome):
    w = await open_world("dual_write", tentative=30.0)
    id_ = await prepared(w, "update")
    found, released = asyncio.Event(), asyncio.Event()

    async def hold(*args, **how):
        found.set()
        await released.wait()
        return Settled.CONFIRMED if outcome == "confirmed" else Settled.PARKED

    w.settler.bring, asked = hold, w.settler.bring
    removing = asyncio.create_task(w.users.update(id_, unset=["username"], strategy=ROLLBACK))
    await found.wait()
    other = await open_world("dual_write")
    with pytest.raises(DuplicateKey):
        await other.users.insert({"username": "bob"})
    w.settler.bring = asked
    released.set()
    if outcome == "confirmed":
        await removing
        assert "username" not in w.notes(id_).get("keys", {})
        await other.users.insert({"username": "bob"})
        return
    with pytest.raises(Undone):
        await removing
    assert w.notes(id_)["keys"] == {"username": "bob"}
    await w.reconcile()
    await w.assert_equal()


async def test_a_name_given_up_in_postgres_waits_for_the_outcome_too(open_world, mongo_proxy):
    w = await open_world("postgres_primary", mongo=mongo_proxy, secondary_deadline=1.0)
    other = await open_world("postgres_primary", primary_deadline=10.0)
    id_ = await prepared(w, "update")
    mongo_proxy.swallow_answers()
    renaming = asyncio.create_task(w.users.update(id_, {"username": "Robert"}, strategy=ROLLBACK))
    async with asyncio.timeout(10):
        while not any(tentative for _, _, tentative, _ in w.outbox()):  # noqa: ASYNC110 - in a server
            await asyncio.sleep(0.02)
    taking = asyncio.create_task(other.users.insert({"username": "bob"}))
    with pytest.raises(Undone):
        await renaming
    with pytest.raises(DuplicateKey):
        await taking
    mongo_proxy.pass_through()
    await w.reconcile()
    assert (await w.row(id_)).document["username"] == "Bob"
    await w.assert_equal()


async def test_a_connection_lost_while_nothing_was_confirmed_or_undone_says_so_and_no_more(
    open_world, postgres_proxy
):
    w = await open_world("postgres_primary", postgres=postgres_proxy)
    made = await w.users.insert({"username": "Bob"})
    nobodys, writes = "0" * 32, [(w.entity, made.id, made.rev)]
    faults = postgres_proxy.counts.faults
    for ask in (
        lambda: w.postgres.confirm(writes, nobodys, timeout=PATIENCE),
        lambda: w.postgres.undo(
            writes, nobodys, migration="accounts", epoch=w.control.epoch, timeout=PATIENCE
        ),
    ):
        postgres_proxy.cut_before_request(when=lambda request: b"ROLLBACK" in request)
        assert await ask() is False
    assert postgres_proxy.counts.faults == faults + 2
    await w.settle()
    await w.assert_equal()


async def test_a_name_taken_from_a_record_whose_delete_is_open_does_not_carry_the_delete_out(
    open_world, postgres_proxy, monkeypatch
):
    """PostgreSQL has not heard yet that the record gave the name up before."""
    w = await open_world("dual_write", postgres=postgres_proxy, tentative=30.0)
    ann, bob = [(await w.users.insert({"username": name})).id for name in ("Ann", "Bob")]
    await w.settle()
    postgres_proxy.refuse()
    await w.users.update(bob, {"username": "Beth"})
    await w.users.update(ann, {"username": "Bob"})
    postgres_proxy.pass_through()
    await w.postgres_answers()
    other = await open_world("dual_write")
    apply_delete = w.postgres.apply_delete

    async def unanswered(*args, **how):
        monkeypatch.setattr(w.postgres, "apply_delete", apply_delete)
        assert await other.settler.settle_one(other.entity, ann, other.control) is Settled.CONFIRMED
        raise Unanswered("postgres", "no answer")

    monkeypatch.setattr(w.postgres, "apply_delete", unanswered)
    with pytest.raises(Undone):
        await w.users.delete(bob, strategy=ROLLBACK)
    assert (await w.users.get(bob))["username"] == "Beth"
    assert (await other.row(ann)).document["username"] == "Bob"
    await w.reconcile()
    await w.assert_equal()


async def test_a_foreign_rename_to_a_taken_name_does_not_keep_a_write_open(open_world):
    w = await open_world("dual_write")
    id_ = await prepared(w, "update")
    await w.users.insert({"username": "Eve"})
    await leave_open(w, "update", id_)
    w.documents.update_one({"_id": id_}, {"$set": {"username": "EVE"}})
    await w.reconcile()
    assert (w.document(id_)["username"], w.document(id_)["n"]) == ("EVE", 1)
    assert w.notes(id_)["keys"] == {"username": f"eve#{id_}"}
    assert (await w.users.update(id_, {"n": 5}))["n"] == 5
    await w.reconcile()
    await w.assert_equal()


async def test_an_undo_leaves_the_key_of_a_name_to_who_has_it_by_now(open_world):
    """Another application has renamed its holder, and given the name to the record whose write is taken back."""
    w = await open_world("dual_write", foreign_writers=True)
    id_ = await prepared(w, "update")
    eve = await w.users.insert({"username": "Eve"})
    await w.settle()
    await leave_open(w, "update", id_)
    w.documents.update_one({"_id": eve.id}, {"$set": {"username": "Eva"}})
    w.documents.update_one({"_id": id_}, {"$set": {"username": "EVE"}})
    await w.reconcile()
    await w.m.reconciler.full_sweep()
    assert (w.document(id_)["username"], w.document(id_)["n"]) == ("EVE", 1)
    assert w.notes(eve.id)["keys"] == {"username": "eva"}
    with pytest.raises(DuplicateKey):
        await w.users.insert({"username": "eve"})
    await w.assert_equal()


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_an_open_write_is_taken_back_although_the_secondary_is_away(
    open_world, postgres_proxy, operation
):
    """Until then the record takes no other write, and the primary alone decides the undo."""
    w = await open_world("dual_write", postgres=postgres_proxy, background=True)
    id_ = await prepared(w, operation)
    postgres_proxy.refuse()
    await leave_open(w, operation, id_)

    async def taken_back():
        document = w.document(id_)
        return document is None or not (document[CF].get("debt") or {}).get("tentative")

    await eventually(taken_back, timeout=10)
    if operation != "insert":
        assert (await w.users.update(id_, {"n": 5}))["username"] == "Bob"
    postgres_proxy.pass_through()
    await w.postgres_answers()
    await w.reconcile()
    await w.assert_equal()


async def test_what_was_taken_back_while_the_secondary_is_away_is_not_tried_again_then(
    open_world, postgres_proxy, monkeypatch
):
    """What is left of it waits for PostgreSQL, and open writes of others would wait behind it."""
    monkeypatch.setattr(board, "_SPARED", 3600)
    w = await open_world("dual_write", postgres=postgres_proxy, tentative=0.0)
    id_ = await prepared(w, "update")
    await leave_open(w, "update", id_)
    postgres_proxy.refuse()
    await w.m.board.mark_unreadable("x")
    await w.m.board.refresh()
    await w.m.reconciler._background_round()
    assert w.document(id_)["n"] == 1
    look = await w.m.board.refresh(spares=True)
    assert [bool(debt.tentative) for debt in look.owed] == [False]


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_an_open_write_in_postgres_is_taken_back_although_mongo_is_away(
    open_world, mongo_proxy, operation
):
    w = await open_world("postgres_primary", mongo=mongo_proxy, secondary_deadline=5.0)
    id_ = await prepared(w, operation)
    mongo_proxy.swallow_answers()
    dying = asyncio.create_task(write(w, operation, id_))

    async def is_open():
        return any(tentative for _, _, tentative, _ in w.outbox())

    await eventually(is_open)
    dying.cancel()
    await asyncio.gather(dying, return_exceptions=True)
    mongo_proxy.refuse()
    other = await open_world("postgres_primary", mongo=mongo_proxy, background=True)

    async def taken_back():
        return not await is_open()

    await eventually(taken_back, timeout=10)
    mongo_proxy.pass_through()
    await check_undone(other, operation, id_)


async def test_an_open_write_that_postgres_refuses_does_not_hold_its_record_until_the_next_attempt(
    open_world,
):
    """Its worker died between the refusal and the undo; an undo is not what was refused."""
    w = await open_world("dual_write", background=True, parked_retry=60.0)
    id_ = await prepared(w, "update")
    await leave_open(w, "update", id_)
    w.documents.update_one({"_id": id_}, {"$set": {f"{CF}.debt.parked": "users_n_allowed"}})

    async def taken_back():
        return not (w.debt(id_) or {}).get("tentative")

    await eventually(taken_back, timeout=10)
    await check_undone(w, "update", id_)


async def test_nothing_of_a_write_that_was_undone_stays_in_quarantine(open_world):
    w = await open_world("dual_write")
    id_ = await prepared(w, "update")
    with pytest.raises(Undone):
        await w.users.update(id_, {"username": 5}, strategy=ROLLBACK)
    await w.settle()
    await w.assert_equal()
    assert w.quarantined() == []


@pytest.mark.parametrize("how", ["reconcile", "prepare"])
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_what_was_left_open_before_a_step_back_to_phase_0_is_taken_back_there(
    open_world, operation, how
):
    w = await open_world("dual_write")
    id_ = await prepared(w, operation)
    await leave_open(w, operation, id_)
    await w.set_phase("mongo_only")
    await (w.m.prepare() if how == "prepare" else w.m.reconciler.reconcile())
    found = await w.users.get(id_)
    assert (found is None) if operation == "insert" else (found["username"], found["n"]) == ("Bob", 1)
    await w.set_phase("dual_write")
    await check_undone(w, operation, id_)


async def test_what_was_left_open_before_a_step_back_to_phase_0_holds_no_writer_there(open_world):
    w = await open_world("dual_write")
    id_ = await prepared(w, "update")
    await leave_open(w, "update", id_)
    await w.set_phase("mongo_only")
    written = await w.users.update(id_, {"n": 5})
    assert (written["username"], written["n"]) == ("Bob", 5)


async def test_of_two_writers_that_wait_for_it_in_phase_0_none_asks_postgres(
    open_world, postgres_proxy, monkeypatch
):
    """The other one has taken it back in the meantime; its debt stands for the day that PostgreSQL is owed it."""
    w = await open_world("dual_write", postgres=postgres_proxy, primary_deadline=PATIENCE)
    id_ = await prepared(w, "update")
    await leave_open(w, "update", id_)
    await w.set_phase("mongo_only")
    other = await open_world("mongo_only", primary_deadline=PATIENCE)
    read_owed = w.mongo.read_owed

    async def overtaken(*record, **how):
        monkeypatch.setattr(w.mongo, "read_owed", read_owed)
        assert (await other.users.update(id_, {"n": 3}))["username"] == "Bob"
        return await read_owed(*record, **how)

    monkeypatch.setattr(w.mongo, "read_owed", overtaken)
    postgres_proxy.refuse()
    assert (await w.users.update(id_, {"n": 5}))["username"] == "Bob"


@pytest.mark.parametrize("postgres_answers", [True, False])
async def test_what_a_foreign_writer_puts_in_the_place_of_an_open_write_is_in_both_stores_when_undone_is_told(
    open_world, postgres_answers
):
    w = await open_world("postgres_read", foreign_writers=True)
    id_ = await prepared(w, "update")
    bring = w.settler.bring

    async def replaced(*args, **how):
        w.settler.bring = bring
        settled = await bring(*args, **how)
        w.documents.replace_one({"_id": id_}, {"username": "Mallory", "n": 1})
        return settled if postgres_answers else Settled.SUPERSEDED

    w.settler.bring = replaced
    with pytest.raises(Undone):
        await w.users.update(id_, {"n": 2}, strategy=ROLLBACK)
    await w.settle()
    await w.m.board.refresh()
    assert (await w.users.get(id_)).document == {"_id": id_, "username": "Mallory", "n": 1}
    await w.reconcile()
    await w.assert_equal()


async def test_what_a_foreign_writer_deletes_while_its_write_is_open_is_gone_from_both_stores_when_undone_is_told(
    open_world,
):
    w = await open_world("postgres_read", foreign_writers=True)
    id_ = await prepared(w, "update")
    bring = w.settler.bring

    async def deleted(*args, **how):
        w.settler.bring = bring
        settled = await bring(*args, **how)
        w.documents.delete_one({"_id": id_})
        return settled

    w.settler.bring = deleted
    with pytest.raises(Undone):
        await w.users.update(id_, {"n": 2}, strategy=ROLLBACK)
    await w.m.board.refresh()
    assert await w.users.get(id_) is None
    await w.reconcile()
    await w.assert_equal()


@pytest.mark.parametrize("phase", ["dual_write", "postgres_read"])
async def test_an_insert_is_taken_back_in_time_while_postgres_is_silent(open_world, postgres_proxy, phase):
    w = await open_world(phase, postgres=postgres_proxy)
    postgres_proxy.swallow_answers()
    # Far from what its deadlines add up to, and from that of what nobody waits for.
    async with asyncio.timeout(PATIENCE / 2):
        with pytest.raises(Undone):
            await w.users.insert({"username": "Bob"}, strategy=ROLLBACK)
    assert w.documents.count_documents({}) == 0


async def test_what_a_foreign_writer_deletes_while_its_write_is_open_is_read_nowhere_although_postgres_goes_silent(
    open_world, postgres_proxy
):
    w = await open_world("postgres_read", postgres=postgres_proxy, foreign_writers=True)
    id_ = await prepared(w, "update")
    bring = w.settler.bring

    async def deleted(*args, **how):
        w.settler.bring = bring
        settled = await bring(*args, **how)
        w.documents.delete_one({"_id": id_})
        postgres_proxy.swallow_answers()
        return settled

    w.settler.bring = deleted
    async with asyncio.timeout(PATIENCE / 2):
        with pytest.raises(Undone):
            await w.users.update(id_, {"n": 2}, strategy=ROLLBACK)
    postgres_proxy.pass_through()
    await w.postgres_answers()
    await w.m.board.refresh()
    assert await w.users.get(id_) is None
    await w.reconcile()
    await w.assert_equal()


@pytest.mark.parametrize("operation", ["insert", "delete"])
async def test_a_name_is_free_from_the_moment_on_in_which_its_record_is_told_to_be_gone(
    open_world, postgres_proxy, monkeypatch, operation
):
    """Whatever keeps the document from going at once."""
    w = await open_world(postgres=postgres_proxy)
    id_ = await prepared(w, operation)

    async def unheard(*args, **how):
        raise Unanswered("mongo", "not now")

    monkeypatch.setattr(w.mongo, "bury", unheard)
    if operation == "insert":
        postgres_proxy.refuse()
        with pytest.raises(Undone):
            await write(w, operation, id_)
        postgres_proxy.pass_through()
    else:
        await write(w, operation, id_)
    assert w.notes(id_)["deleted"], "it waits for a reconciler"
    other = await open_world()
    await other.users.insert({"username": "eve" if operation == "insert" else "bob"})
    monkeypatch.undo()
    await w.postgres_answers()
    await w.reconcile()
    await w.assert_equal()


@pytest.mark.parametrize(
    ("before", "foreign"),
    [("a", {"$set": {"x": ["a"]}}), (None, {"$unset": {"x": ""}})],
    ids=["array", "none"],
)
@pytest.mark.parametrize("moment", ["before the write", "before the undo"])
async def test_an_undo_takes_no_value_for_the_one_that_a_filter_finds_it_by(
    open_world, postgres_proxy, monkeypatch, before, foreign, moment
):
    """To a filter an array is each of its elements, and what is missing is null."""
    w = await open_world("dual_write", postgres=postgres_proxy)
    mine = "b" if moment == "before the write" else before
    made = await w.users.insert({"username": "Bob", "x": before if moment == "before the write" else "b"})
    await w.settle()
    asked, turns = w.mongo.compare_and_set, []

    async def overtaken(*record, **how):
        turns.append(1)
        if len(turns) == (1 if moment == "before the write" else 2):
            w.documents.update_one({"_id": made.id}, foreign)
        return await asked(*record, **how)

    monkeypatch.setattr(w.mongo, "compare_and_set", overtaken)
    postgres_proxy.refuse()
    with pytest.raises(Undone):
        await w.users.update(made.id, {"x": mine}, strategy=ROLLBACK)
    document = w.document(made.id)
    assert document.get("x", "none") == foreign.get("$set", {"x": "none"})["x"]
    postgres_proxy.pass_through()
    await w.postgres_answers()
    await w.reconcile()
    await w.assert_equal()
