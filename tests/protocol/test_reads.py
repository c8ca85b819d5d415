"""Found, absent and failed are kept apart, and nobody is served an older row than was acknowledged."""

import asyncio
from typing import Any

import psycopg
import pymongo
import pytest
from bson import ObjectId

from crossfade import Phase, StoreUnavailable
from crossfade.record import CF
from crossfade.stores import mongo
from crossfade.transition import change_phase

from .conftest import PATIENCE, World, eventually, requests_entity
from .test_images import apply, image_of


async def test_found_comes_from_the_store_that_the_phase_names(open_world):
    w = await open_world("mongo_only")
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.m.prepare()
    for phase, source in (
        ("dual_write", "mongo"),
        ("shadow_read", "mongo"),
        ("postgres_read", "postgres"),
        ("postgres_primary", "postgres"),
    ):
        await w.set_phase(phase)
        if phase == "dual_write":
            await w.m.reconciler.full_sweep()
        await w.owed()
        record = await w.users.get(made.id)
        assert (record.source, record["n"], record.stale) == (source, 1, False)


async def test_who_has_not_been_copied_yet_is_found_in_mongo(open_world):
    """Falling back on errors alone would lock them all out."""
    w = await open_world("postgres_read", foreign_writers=True)
    id_ = ObjectId()
    w.documents.insert_one({"_id": id_, "username": "Bob", "_cf": {"keys": {"username": "bob"}}})
    assert (await w.users.get(id_)).source == "mongo"
    assert (await w.users.find_by_key("username", "BOB")).id == id_
    assert await w.users.get(ObjectId()) is None


async def test_absence_is_final_only_where_nobody_else_writes_and_nothing_is_owed(open_world, mongo_proxy):
    w = await open_world("postgres_read", mongo=mongo_proxy, board_age=30.0)
    mongo_proxy.refuse()
    assert await w.users.get(ObjectId()) is None  # PostgreSQL alone may say so
    mongo_proxy.pass_through()

    async def back() -> bool:
        return (await w.cf.health())["mongo"][0]

    await eventually(back)
    id_ = ObjectId()
    w.sql(
        "INSERT INTO crossfade.quarantine (entity, id, reason, rev, digest, document) "
        "VALUES ('users', %s, 'x', 0, '', '')", str(id_),
    )  # fmt: skip
    w.documents.insert_one({"_id": id_, "username": "Bob"})
    await w.m.board.refresh()
    assert (await w.users.get(id_)).source == "mongo"


async def test_failed_is_not_absent(open_world, mongo_proxy, postgres_proxy):
    w = await open_world("postgres_read", mongo=mongo_proxy, postgres=postgres_proxy, primary_deadline=0.5)
    made = await w.users.insert({"username": "Bob"})
    mongo_proxy.refuse()
    postgres_proxy.refuse()
    for read in (w.users.get(made.id), w.users.find_by_key("username", "bob"), w.users.count()):
        with pytest.raises(StoreUnavailable):
            await read


async def test_a_record_in_debt_is_read_from_the_primary(open_world):
    w = await open_world("postgres_read", board_age=30.0)
    made, other = [await w.users.insert({"username": name, "n": 1}) for name in ("a", "b")]
    await w.settle()
    w.documents.update_one({"_id": made.id}, {"$set": {"n": 2, "_cf.rev": 2, "_cf.debt": {"epoch": 1}}})
    await w.m.board.refresh()
    assert [(await w.users.get(one.id)).source for one in (made, other)] == ["mongo", "postgres"]
    assert (await w.users.get(made.id))["n"] == 2
    # Found by anything but its id, it could be any record: the whole entity is read from the primary.
    assert [r.source for r in await w.users.find({"n": 2})] == ["mongo"]
    assert await w.users.count({"n": 1}) == 1


async def test_who_owes_nothing_is_found_by_name_in_postgres_whatever_others_owe(open_world):
    w = await open_world("postgres_read", board_age=30.0)
    made = {name: await w.users.insert({"username": name}) for name in ("Ann", "Beth", "Carl")}
    await w.settle()
    owed = {"_cf.rev": 2, "_cf.debt": {"epoch": 1}}
    for name, new in (("Ann", "Dora"), ("Beth", "Ann")):
        keys = {"username": new, "_cf.keys.username": new.lower()}
        w.documents.update_one({"_id": made[name].id}, {"$set": owed | keys})
    await w.m.board.refresh()
    found = {
        name: await w.users.find_by_key("username", name) for name in ("Ann", "Beth", "Carl", "Dora", "CARL")
    }
    assert {name: one and (one.id, one.source) for name, one in found.items()} == {
        # PostgreSQL has this name still with its last holder, who owes its rename.
        "Ann": (made["Beth"].id, "mongo"),
        "Beth": None,
        "Carl": (made["Carl"].id, "postgres"),
        "Dora": (made["Ann"].id, "mongo"),
        # Somebody in debt may be spelt just so, and would come first.
        "CARL": (made["Carl"].id, "mongo"),
    }  # fmt: skip


async def test_nobody_is_found_by_name_in_postgres_while_somebody_is_in_quarantine(open_world):
    """Of whom no board tells."""
    w = await open_world("postgres_read", board_age=30.0)
    await w.users.insert({"username": "Ann"})
    await w.settle()
    w.sql(
        "INSERT INTO crossfade.quarantine (entity, id, rev, reason, document, digest) VALUES "
        "('users', 'o:' || repeat('0', 24), 0, 'a test', '', '')"
    )
    await w.m.board.refresh()
    assert (await w.users.find_by_key("username", "Ann")).source == "mongo"


async def test_a_board_too_old_sends_readers_to_the_primary(open_world):
    w = await open_world("postgres_read", board_age=0.3)
    made = await w.users.insert({"username": "Bob"})
    await w.settle()
    await w.m.board.refresh()
    assert (await w.users.get(made.id)).source == "postgres"
    await asyncio.sleep(0.35)
    assert (await w.users.get(made.id)).source == "mongo"


async def test_more_debts_than_the_board_holds_send_the_entity_to_the_primary(open_world, postgres_proxy):
    w = await open_world("postgres_read", postgres=postgres_proxy, board_limit=2)
    made = [await w.users.insert({"username": str(n)}) for n in range(4)]
    await w.settle()
    w.documents.update_many({"username": {"$in": ["0", "1"]}}, {"$set": {"_cf.debt": {"epoch": 1}}})
    await w.m.board.refresh()
    assert (await w.users.get(made[3].id)).source == "mongo"


async def test_no_worker_serves_an_older_row_after_an_acknowledgement(open_world, postgres_proxy):
    """The writer cannot reach PostgreSQL; the reader can, and PostgreSQL holds the old row."""
    writer = await open_world("postgres_read", postgres=postgres_proxy, background=True)
    reader = await open_world("postgres_read", background=True)
    made = await writer.users.insert({"username": "Bob", "n": 0})
    await writer.settle()
    await reader.m.board.refresh()
    assert (await reader.users.get(made.id)).source == "postgres"
    writer.m.reconciler._task.cancel()  # nobody settles while the point is made
    reader.m.reconciler._task.cancel()
    postgres_proxy.refuse()
    for n in range(1, 12):
        await writer.users.update(made.id, {"n": n})
        assert (await reader.users.get(made.id))["n"] == n
        assert (await reader.users.find({"username": "Bob"}))[0]["n"] == n
    assert (await reader.row(made.id)).document["n"] == 0
    await reader.m.board.refresh()
    assert reader.control.unreadable is not None


async def test_two_writers_that_fail_at_once_both_wait_out_the_boards_of_others(open_world, postgres_proxy):
    """Whoever only sees the flag of another has not waited yet."""
    reader = await open_world("postgres_read", board_age=1.5)
    one, two = [await open_world("postgres_read", postgres=postgres_proxy, board_age=1.5) for _ in range(2)]
    a, b = [(await reader.users.insert({"username": name, "n": 0})).id for name in "ab"]
    postgres_proxy.refuse()
    await reader.settle()
    first = asyncio.create_task(one.users.update(a, {"n": 1}))
    await reader.m.board.refresh()  # before the flag stands: this board may be used for a while
    began = reader.m.board.look.began

    async def flagged() -> bool:
        return (await two.m.board.refresh()).control.unreadable is not None

    if reader.control.unreadable is None:
        await eventually(flagged)
        await two.users.update(b, {"n": 1})
        assert reader.m.board.look.began == began
        assert (await reader.users.get(b))["n"] == 1
    await first
    assert (await reader.users.get(a))["n"] == 1


async def test_the_reconciler_lifts_the_flag_once_postgres_answers_even_under_writes(
    open_world, postgres_proxy
):
    w = await open_world("postgres_read", postgres=postgres_proxy, background=True)
    reader = await open_world("postgres_read", background=True)
    made = await w.users.insert({"username": "Bob", "n": 0})
    postgres_proxy.refuse()
    await w.users.update(made.id, {"n": 1})
    assert (await reader.m.board.refresh()).control.unreadable is not None
    postgres_proxy.pass_through()
    n = 1

    async def lifted() -> bool:
        nonlocal n
        n += 1
        await w.users.update(made.id, {"n": n})
        assert (await reader.users.get(made.id))["n"] == n
        return w.control.unreadable is None and reader.control.unreadable is None

    await eventually(lifted)

    async def from_postgres() -> bool:
        return (await reader.users.get(made.id)).source == "postgres"

    await eventually(from_postgres)


async def test_a_flag_set_anew_while_it_is_being_lifted_stays(open_world):
    w = await open_world("postgres_read", board_age=0.2)
    await w.m.board.mark_unreadable("first")
    await w.m.board.refresh()
    other = await open_world("postgres_read", board_age=0.2)

    async def fails_meanwhile() -> bool:
        await other.m.board.refresh()
        assert other.control.lifting
        await other.m.board.mark_unreadable("second")
        return True

    assert not await w.m.board.lift_unreadable(fails_meanwhile)
    look = await w.m.board.refresh()
    assert (look.control.unreadable, look.control.lifting) == ("second", False)


async def test_nobody_reads_postgres_while_the_flag_stands(open_world):
    w = await open_world("postgres_read", board_age=30.0)
    made = await w.users.insert({"username": "Bob"})
    await w.settle()
    for flag, source in ((None, "postgres"), ("x", "mongo")):
        await w.set_phase("postgres_read", unreadable=flag)
        assert await w.owed() == ()
        assert (await w.users.get(made.id)).source == source
        assert [record.source for record in await w.users.find({"username": "Bob"})] == [source]


async def test_the_flag_stands_until_postgres_has_taken_what_it_is_owed(open_world, monkeypatch):
    w = await open_world("postgres_read", board_age=0.2)
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.settle()
    w.documents.update_one({"_id": made.id}, {"$set": {"n": 2, "_cf.rev": 2, "_cf.debt": {"epoch": 1}}})
    await w.m.board.mark_unreadable("x")
    await w.m.board.refresh()

    async def fails(*_images, **_how):
        raise StoreUnavailable("postgres", "does not take it")

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(w.postgres, "apply", fails)
        assert not await w.m.board.lift_unreadable(w.m.reconciler._settle_everything)
    assert (await w.m.board.refresh()).control.unreadable == "x"
    assert await w.m.board.lift_unreadable(w.m.reconciler._settle_everything)
    assert (await w.m.board.refresh()).control.unreadable is None
    assert (await w.row(made.id)).document["n"] == 2
    await w.assert_equal()


async def test_in_phase_4_with_postgres_down_mongo_serves_marked_stale_but_not_what_is_owed(
    open_world, postgres_proxy
):
    w = await open_world("postgres_primary", postgres=postgres_proxy, primary_deadline=0.5)
    made, owed = [await w.users.insert({"username": name}) for name in ("a", "b")]
    w.sql(
        "INSERT INTO crossfade.outbox (entity, id, rev, op, epoch) VALUES ('users', %s, 1, gen_random_uuid(), 1)",
        str(owed.id),
    )
    await w.m.board.refresh()
    postgres_proxy.refuse()
    record = await w.users.get(made.id)
    assert (record.source, record.stale) == ("mongo", True)
    with pytest.raises(StoreUnavailable):
        await w.users.get(owed.id)


async def test_in_phase_4_with_postgres_down_nobody_is_told_that_a_record_is_absent(
    open_world, postgres_proxy, mongo_proxy
):
    """MongoDB may not have heard of it yet, and neither "none" nor a number can say that it may be old."""
    reader = await open_world("postgres_primary", postgres=postgres_proxy, primary_deadline=0.5)
    writer = await open_world("postgres_primary", mongo=mongo_proxy)
    await reader.m.board.refresh()
    mongo_proxy.refuse()
    made = await writer.users.insert({"username": "Bob"})
    assert reader.document(made.id) is None
    postgres_proxy.refuse()
    for read in (
        reader.users.get(made.id),
        reader.users.find_by_key("username", "bob"),
        reader.users.find({"username": "Bob"}),
        reader.users.count(),
    ):
        with pytest.raises(StoreUnavailable):
            await read


def board_is_too_old(w):
    async def is_so():
        return w.m.board.age > w.m.pair.options.board_age

    return is_so


async def test_in_phase_3_with_mongo_down_postgres_serves_marked_stale(open_world, mongo_proxy):
    w = await open_world("postgres_read", mongo=mongo_proxy, primary_deadline=0.5)
    made = await w.users.insert({"username": "Bob"})
    await w.settle()
    await w.m.board.refresh()
    mongo_proxy.refuse()
    await eventually(board_is_too_old(w))  # MongoDB would be asked first
    record = await w.users.get(made.id)
    assert (record.source, record.stale) == ("postgres", True)


@pytest.mark.parametrize("phase", ["shadow_read", "postgres_read"])
async def test_with_mongo_down_nobody_is_served_a_row_that_may_be_older_than_was_acknowledged(
    open_world, mongo_proxy, phase
):
    """Before phase 3, any; in it, one of a record that is owed."""
    w = await open_world(phase, mongo=mongo_proxy, primary_deadline=0.5)
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.settle()
    if phase == "postgres_read":
        w.documents.update_one({"_id": made.id}, {"$set": {"n": 2, "_cf.rev": 2, "_cf.debt": {"epoch": 1}}})
    await w.m.board.refresh()
    mongo_proxy.refuse()
    with pytest.raises(StoreUnavailable):
        await w.users.get(made.id)


async def test_in_phase_3_with_mongo_down_nobody_is_told_that_a_record_is_absent(open_world, mongo_proxy):
    """PostgreSQL may not have heard of it yet, and neither "none" nor a number can say that it may be old."""
    w = await open_world("postgres_read", mongo=mongo_proxy, primary_deadline=0.5)
    await w.m.board.refresh()
    mongo_proxy.refuse()
    await eventually(board_is_too_old(w))  # what MongoDB holds beside it is not known
    answers = await asyncio.gather(
        w.users.get(ObjectId()),
        w.users.find_by_key("username", "nobody"),
        w.users.find({"username": "nobody"}),
        w.users.count(),
        return_exceptions=True,
    )
    assert [isinstance(answer, StoreUnavailable) for answer in answers] == [True] * 4


async def test_a_deleted_record_is_absent_for_every_way_of_asking(open_world):
    w = await open_world("dual_write")
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.settle()
    w.documents.update_one(
        {"_id": made.id}, {"$set": {"_cf.deleted": True, "_cf.rev": 2, "_cf.debt": {"epoch": 1}}}
    )
    await w.m.board.refresh()
    assert await w.users.get(made.id) is None
    assert await w.users.find_by_key("username", "bob") is None
    assert await w.users.find({"n": 1}) == []
    assert await w.users.count({"n": 1}) == 0


async def test_the_exact_spelling_is_tried_before_the_normal_form(open_world):
    w: World = await open_world("postgres_read")
    plain, own = ObjectId(), ObjectId()
    for id_, name, key in ((plain, "Bob", "bob"), (own, "bob", f"bob#{own}")):
        image = image_of(id_, 1)
        image.document["username"] = name
        image.keys["username"] = key
        await apply(w, image)
    await w.m.board.refresh()
    found = [(await w.users.find_by_key("username", name)).id for name in ("Bob", "bob", "BOB")]
    assert found == [plain, own, plain]


async def test_of_documents_that_are_together_larger_than_an_answer_none_is_missed(open_world):
    w = await open_world("dual_write")
    large = b"x" * 7_000_000
    ids = {w.documents.insert_one({"username": name, "other": large}).inserted_id for name in ("a", "b", "c")}
    found = await w.mongo.look_up(w.entity, [{"username": name} for name in ("a", "b", "c")], timeout=20.0)
    assert {image.id for image in found} == ids


async def test_the_primary_is_asked_for_its_newest_state_whatever_the_servers_default_is(
    open_world, monkeypatch
):
    """An unanswered write that is read as it was before would be made a second time."""
    w = await open_world("dual_write")
    made = await w.users.insert({"username": "Bob"})
    asked = []
    send = pymongo.message._op_msg

    def sent(flags, command, *how, **also):
        asked.append(command)
        return send(flags, command, *how, **also)

    monkeypatch.setattr(pymongo.message, "_op_msg", sent)
    await w.mongo.read(w.entity, made.id, timeout=2.0)
    await w.mongo.look_up(w.entity, [{"username": "Bob"}], timeout=2.0)
    finds = [command for command in asked if "find" in command]
    assert [command.get("readConcern") for command in finds] == [{"level": "local"}] * 2


@pytest.mark.parametrize("phase", ["postgres_read", "postgres_primary"])
async def test_where_the_board_is_full_nothing_is_said_to_be_settled(open_world, mongo_proxy, phase):
    """Of tombstones, and of deliveries, it shows so many of all entities together."""
    w = await open_world(phase, others=[requests_entity()], board_limit=3, mongo=mongo_proxy)
    bob = await w.users.insert({"username": "Bob"})
    asked = [
        await w.m.friend_requests.insert({"sender": bob.id, "receiver": bob.id, "status": "pending"})
        for _ in range(2)
    ]
    others = [await w.users.insert({"username": name}) for name in ("Ann", "Eve")]
    await w.reconcile()
    if phase == "postgres_primary":
        mongo_proxy.refuse()
        for record in others:
            await w.users.update(record.id, {"n": 2})
        for record in asked:
            await w.m.friend_requests.update(record.id, {"status": "accepted"})
        mongo_proxy.pass_through()

        async def answers() -> bool:
            return (await w.cf.health())["mongo"][0]

        await eventually(answers)
    else:
        for record in others:
            await w.users.delete(record.id)
        for record in asked:
            await w.m.friend_requests.delete(record.id)
        await w.settle()
        w.documents.database["crossfade_tombstones"].update_many({}, {"$set": {"debt": True}})
    look = await w.m.board.refresh()
    assert len(look.debts) == 3
    assert look.overflown == look.owed_entities == {"users", "friend_requests"}
    await w.m.reconciler.reconcile()
    assert await w.owed() == ()


async def test_debts_are_found_by_a_server_that_cannot_put_collections_together(open_world, monkeypatch):
    w = await open_world("dual_write", others=[requests_entity()])
    kept, gone = [await w.users.insert({"username": name}) for name in ("Kept", "Gone")]
    await w.users.delete(gone.id)
    await w.settle()
    w.documents.update_one({"_id": kept.id}, {"$set": {f"{CF}.debt": {"epoch": 1}}})
    tombstones = w.documents.database["crossfade_tombstones"]
    tombstones.update_one({"_id.id": str(gone.id)}, {"$set": {"debt": True}})
    asked = {"limit": 10, "timeout": PATIENCE}
    united = await w.mongo.debts(w.m.entities.values(), **asked)
    assert {(debt.id, debt.tombstone) for debt in united} == {(kept.id, False), (gone.id, True)}
    monkeypatch.setattr(mongo, "_UNION", "$noSuchStage")
    assert await w.mongo.debts(w.m.entities.values(), **asked) == united
    assert not w.mongo._unites


@pytest.mark.parametrize("fails", ["fenced", "down"])
async def test_a_write_by_who_has_not_heard_that_postgres_is_read_by_now_is_seen_by_those_who_have(
    open_world, postgres_proxy, fails
):
    w, reader = await open_world("shadow_read", postgres=postgres_proxy), await open_world("shadow_read")
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.owed()
    await reader.set_phase("postgres_read")
    if fails == "down":
        postgres_proxy.refuse()
    await w.users.update(made.id, {"n": 2})
    assert w.debt(made.id) is not None
    assert (await reader.users.get(made.id))["n"] == 2


async def test_what_was_written_to_mongo_alone_while_others_wrote_to_both_is_not_hidden_by_their_rows(
    open_world,
):
    w, other = await open_world("mongo_only"), await open_world("mongo_only")
    step = asyncio.create_task(change_phase(other.m, Phase.DUAL_WRITE, by="a test", reason="a test"))

    async def both_are_written() -> bool:
        return (await other.m.board.refresh()).control.phase is Phase.DUAL_WRITE

    await eventually(both_are_written)
    bob, ann = [await other.users.insert({"username": name, "n": 1}) for name in ("Bob", "Ann")]
    await other.owed()
    # It has not heard of the step yet.
    await w.users.update(bob.id, {"n": 2})
    await w.users.delete(ann.id)
    assert w.debt(bob.id) is None
    for hears in (False, True):
        if hears:
            await w.m.board.refresh()
            await step
        await other.owed()
        assert (await other.users.get(bob.id))["n"] == 2
        assert await other.users.get(ann.id) is None
    assert other.control.postgres_first
    await w.reconcile()  # the tombstone is owed, by whoever made it
    await w.assert_equal()


@pytest.mark.parametrize("to", ["mongo_only", "shadow_read"])
async def test_who_has_not_heard_of_a_step_back_serves_no_row_older_than_what_was_acknowledged_since(
    open_world, postgres_proxy, to
):
    w = await open_world("postgres_read", postgres=postgres_proxy, board_age=3.0)
    reader = await open_world("postgres_read", board_age=3.0, enlisted=False)
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.owed()
    stepping = asyncio.create_task(change_phase(w.m, Phase.parse(to), by="a test", reason="a test"))
    while w.m.board.control.phase is Phase.POSTGRES_READ:
        await reader.m.board.refresh()
        await w.m.board.refresh()
    await stepping
    postgres_proxy.refuse()
    await w.users.update(made.id, {"n": 2})
    assert (await reader.users.get(made.id))["n"] == 2


async def test_a_list_misses_no_record_that_moves_while_it_is_read(open_world, monkeypatch):
    w = await open_world("postgres_primary")
    ann = await w.users.insert({"username": "Ann"})
    bob = await w.users.insert({"username": "Bob", "n": 1})
    await w.owed()
    execute, moved = psycopg.AsyncConnection.execute, []

    async def held(self: Any, query: Any, *more: Any, **how: Any) -> Any:
        if " IS NOT NULL)" in repr(query) and not moved:
            moved.append(True)
            await w.users.update(bob.id, {"n": None})
        return await execute(self, query, *more, **how)

    monkeypatch.setattr(psycopg.AsyncConnection, "execute", held)
    found = await w.users.find(order_by="n", after=(None, ann.id))
    assert moved
    assert [one.id for one in found] == [bob.id]


async def test_a_command_that_steps_back_outlasts_the_oldest_board_that_a_worker_accepts(
    open_world, postgres_proxy
):
    w = await open_world("postgres_read", postgres=postgres_proxy)
    reader = await open_world("postgres_read", board_age=4.0)
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.owed()
    await reader.m.board.refresh()
    stepping = asyncio.create_task(change_phase(w.m, Phase.SHADOW_READ, by="a test", reason="a test"))
    while w.m.board.control.phase is Phase.POSTGRES_READ:
        await asyncio.sleep(0.02)
        await w.m.board.refresh()
    postgres_proxy.refuse()
    await w.users.update(made.id, {"n": 2})
    assert (await reader.users.get(made.id))["n"] == 2
    await reader.m.board.refresh()
    await stepping


@pytest.mark.parametrize("phase", ["postgres_read", "postgres_primary"])
async def test_who_is_in_no_registry_reads_no_store_as_the_primary_that_it_no_longer_is(
    open_world, mongo_proxy, postgres_proxy, phase
):
    first, proxy = ("mongo", mongo_proxy) if phase == "postgres_read" else ("postgres", postgres_proxy)
    w = await open_world(phase, **{first: proxy})
    reader = await open_world(phase, enlisted=False, board_age=0.01)
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.owed()
    await reader.m.board.refresh()
    target = Phase.POSTGRES_PRIMARY if phase == "postgres_read" else Phase.POSTGRES_READ
    force = ("verify",) if target is Phase.POSTGRES_PRIMARY else ()
    await change_phase(w.m, target, by="a test", reason="a test", force=force)
    proxy.refuse()
    await w.users.update(made.id, {"n": 2})
    assert (await reader.users.get(made.id))["n"] == 2


async def test_who_has_not_been_copied_yet_is_in_lists_and_counted(open_world, mongo_proxy):
    w = await open_world("mongo_only", mongo=mongo_proxy)
    bob, _ = [(await w.users.insert({"username": name, "n": 1})).id for name in ("Bob", "Ann")]
    await change_phase(w.m, Phase.DUAL_WRITE, by="a test", reason="a test")
    assert w.control.postgres_first
    await w.users.update(bob, {"friends": []})  # he is in PostgreSQL now
    await w.owed()
    assert {found["username"] for found in await w.users.find({"n": 1})} == {"Bob", "Ann"}
    assert await w.users.count({"n": 1}) == 2
    assert (await w.users.find_one({"username": "Ann"}))["n"] == 1
    mongo_proxy.refuse()
    with pytest.raises(StoreUnavailable):
        await w.users.find({"n": 1})


async def test_who_has_not_been_copied_yet_is_found_just_as_spelt(open_world):
    w = await open_world("mongo_only")
    older, bob = ObjectId(), ObjectId()
    w.documents.insert_many([{"_id": older, "username": "Bob"}, {"_id": bob, "username": "bob"}])
    await change_phase(w.m, Phase.DUAL_WRITE, by="a test", reason="a test")
    assert w.control.postgres_first
    await w.users.update(older, {"n": 1})  # in PostgreSQL now, under the normalised key
    await w.owed()
    assert (await w.users.find_by_key("username", "Bob")).source == "postgres"
    assert (await w.users.find_by_key("username", "bob")).id == bob


@pytest.mark.parametrize("phase", ["dual_write", "postgres_read", "postgres_primary"])
async def test_a_name_that_is_longer_than_a_key_is_found_in_another_spelling(open_world, phase):
    w = await open_world(phase)
    made = await w.users.insert({"username": "Bob " * 200})
    await w.owed()
    assert (await w.users.find_by_key("username", "bob " * 200)).id == made.id
    assert await w.users.find_by_key("username", "bob " * 199) is None
