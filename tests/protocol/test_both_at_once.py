"""PostgreSQL gets what the document is going to be while MongoDB is asked, and shows it only once that is decided."""

import asyncio
import gc
import warnings

import pytest
from bson import ObjectId

from crossfade import DuplicateKey, FailureStrategy, StoreUnavailable, Undone
from crossfade.testing.failure_points import FailurePoints

from .conftest import eventually, users_entity

OPEN = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'"
SHORT_OF_TIME = {"primary_deadline": 10.0, "secondary_deadline": 0.2}


async def one_open(w):
    return w.sql(OPEN) == [(1,)]


async def nothing_open(w):
    return w.sql(OPEN) == [(0,)]


async def commands(w, operation):
    """What an operation asked of MongoDB, up to its answer."""
    points = FailurePoints(w.cf)
    await points.run(operation)
    return [point.call for point in points.points if point.store == "mongo"]


async def test_postgres_shows_nothing_before_mongo_has_decided(open_world, mongo_proxy):
    w = await open_world(mongo=mongo_proxy, primary_deadline=10.0, secondary_deadline=5.0)
    id_ = ObjectId()
    mongo_proxy.delay(0.5)
    inserting = asyncio.create_task(w.users.insert({"username": "Bob"}))
    await eventually(lambda: one_open(w))
    assert w.sql("SELECT id FROM users") == []
    mongo_proxy.delay(0)
    id_ = (await inserting).id
    assert (await w.row(id_)).document["username"] == "Bob"
    await w.assert_equal()


async def test_of_what_mongo_refuses_nothing_is_left_in_postgres(open_world):
    w = await open_world()
    # Only MongoDB knows this rule's other half: the record was not copied yet.
    w.documents.insert_one({"username": "Bob", "_cf": {"keys": {"username": "bob"}}})
    with pytest.raises(DuplicateKey):
        await w.users.insert({"username": "BOB"})
    await eventually(lambda: nothing_open(w))
    assert w.sql("SELECT id FROM users") == []


async def test_a_slow_mongo_keeps_nobody_from_the_record_in_postgres(open_world, mongo_proxy):
    w = await open_world(mongo=mongo_proxy, **SHORT_OF_TIME)
    mongo_proxy.delay(0.6)
    inserting = asyncio.create_task(w.users.insert({"username": "Bob"}))
    await eventually(lambda: one_open(w))

    await eventually(lambda: nothing_open(w))
    assert not inserting.done()
    record = await inserting
    mongo_proxy.delay(0)
    # The ordinary way, behind MongoDB's answer.
    assert (await w.row(record.id)).rev == 1
    await w.assert_equal()


async def test_a_stopped_worker_leaves_nothing_open_in_postgres(open_world, mongo_proxy):
    w = await open_world(mongo=mongo_proxy, **SHORT_OF_TIME)
    mongo_proxy.delay(5.0)
    inserting = asyncio.create_task(w.users.insert({"username": "Bob"}))
    await eventually(lambda: one_open(w))
    inserting.cancel()
    await asyncio.wait({inserting})
    await eventually(lambda: nothing_open(w))
    assert w.sql("SELECT id FROM users") == []
    mongo_proxy.delay(0)


@pytest.mark.parametrize("way", ["ask", "insert"])
async def test_a_loop_that_ends_leaves_nothing_of_postgres_that_was_never_awaited(open_world, way):
    w = await open_world()
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", RuntimeWarning)
        for turns in range(12):
            there = asyncio.all_tasks()
            caller = asyncio.create_task(
                w.postgres.ping() if way == "ask" else w.users.insert({"username": "Bob"})
            )
            for _ in range(turns):
                await asyncio.sleep(0)
            # As `asyncio.run` does it, whatever has had its first turn by then.
            begun = asyncio.all_tasks() - there
            for task in begun:
                task.cancel()
            await asyncio.gather(caller, *begun, return_exceptions=True)
            task = caller = begun = None
        await asyncio.sleep(0.6)  # a timer of the secondary's deadline knows it until then
        gc.collect()
    assert [str(complaint.message) for complaint in complaints] == []


async def asked(points, operation):
    """Which stores an operation asked, in the order in which it began to."""
    await points.run(operation)
    return list(dict.fromkeys(point.store for point in points.points))


async def test_of_what_postgres_lacked_last_both_are_asked_at_once(open_world):
    w = await open_world("dual_write")
    await w.cf.mongo.ping()  # its first connection takes turns of its own
    points = FailurePoints(w.cf)
    assert await asked(points, lambda: w.users.find_by_key("username", "nobody")) == ["postgres", "mongo"]
    assert await asked(points, lambda: w.users.find_by_key("username", "nobody")) == ["mongo", "postgres"]
    # That a name was asked for says nothing of ids.
    assert await asked(points, lambda: w.users.get(ObjectId())) == ["postgres", "mongo"]


async def test_what_postgres_lacked_eight_times_in_a_row_is_asked_of_mongo_alone_until_it_has_one(open_world):
    w = await open_world("dual_write")
    made = await w.users.insert({"username": "Bob"})
    for n in range(8):
        assert await w.users.find_by_key("username", f"nobody {n}") is None
    await w.owed()
    await w.m.board.refresh()
    points = FailurePoints(w.cf)
    assert await asked(points, lambda: w.users.find_by_key("username", "nobody")) == ["mongo"]
    assert (await w.users.find_by_key("username", "Bob")).source == "mongo"
    found = await w.users.find_by_key("username", "Bob")
    assert (found.id, found.source) == (made.id, "postgres")


async def test_asked_of_mongo_alone_its_failure_is_nothing_to_what_postgres_has(open_world, mongo_proxy):
    w = await open_world("dual_write", mongo=mongo_proxy, board_age=30.0, primary_deadline=0.5)
    made = await w.users.insert({"username": "Bob"})
    for n in range(8):
        assert await w.users.find_by_key("username", f"nobody {n}") is None
    await w.owed()
    await w.m.board.refresh()
    mongo_proxy.refuse()
    found = await w.users.find_by_key("username", "Bob")
    assert (found.id, found.source, found.stale) == (made.id, "postgres", False)
    mongo_proxy.pass_through()


async def test_asked_of_mongo_alone_nobody_waits_for_it_a_second_time(open_world, mongo_proxy):
    w = await open_world("dual_write", mongo=mongo_proxy, primary_deadline=1.0)
    for n in range(8):
        assert await w.users.find_by_key("username", f"nobody {n}") is None
    await w.m.board.refresh()
    mongo_proxy.delay(10.0)
    points = FailurePoints(w.cf)
    with pytest.raises(StoreUnavailable):
        await points.run(lambda: w.users.find_by_key("username", "nobody"))
    assert [point.call for point in points.points if point.store == "mongo"] == ["users.find"]
    mongo_proxy.delay(0)


async def test_asked_at_once_what_postgres_has_is_answered_by_it_and_asked_of_it_alone_from_then_on(
    open_world,
):
    w = await open_world("dual_write")
    made = await w.users.insert({"username": "Bob"})
    assert await w.users.find_by_key("username", "nobody") is None
    await w.owed()
    await w.m.board.refresh()
    found = await w.users.find_by_key("username", "Bob")
    assert (found.id, found.source) == (made.id, "postgres")
    points = FailurePoints(w.cf)
    assert await asked(points, lambda: w.users.find_by_key("username", "Bob")) == ["postgres"]


async def test_asked_at_once_mongos_failure_is_nothing_to_what_postgres_has(open_world, mongo_proxy):
    w = await open_world("dual_write", mongo=mongo_proxy, board_age=30.0, primary_deadline=0.5)
    made = await w.users.insert({"username": "Bob"})
    assert await w.users.find_by_key("username", "nobody") is None
    await w.owed()
    await w.m.board.refresh()
    mongo_proxy.refuse()
    assert (await w.users.find_by_key("username", "Bob")).id == made.id
    mongo_proxy.pass_through()


async def test_a_record_that_is_held_is_written_without_being_asked_for_again(open_world):
    w = await open_world()
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.settle()
    held = await w.users.get(made.id)
    asked = await commands(w, lambda: w.users.update(held.id, {"n": 2}))
    assert asked == ["users.find_one_and_update"]
    assert (await w.users.get(made.id)).rev == 2
    await w.assert_equal()


async def test_an_insert_that_is_refused_takes_no_place_of_the_record_that_is_held(open_world):
    w = await open_world()
    id_ = (await w.users.insert({"username": "Bob", "n": 1})).id
    await w.settle()
    held = await w.users.get(id_)
    with pytest.raises(DuplicateKey):
        await w.users.insert({"_id": held.id, "username": "Alice"})
    asked = await commands(w, lambda: w.users.update(held.id, {"n": 2}))
    assert asked == ["users.find_one_and_update"]
    await w.assert_equal()


@pytest.mark.parametrize("other", ["cf_rev = 1", "cf_op = gen_random_uuid()", "cf_digest = '\\x00'"])
async def test_an_update_upon_another_row_than_was_seen_brings_the_children_too(open_world, other):
    """PostgreSQL may come from a backup, or may not have got the last image yet."""
    w = await open_world()
    made = await w.users.insert({"username": "Bob"})
    held = await w.users.update(made.id, {"friends": [ObjectId(), ObjectId()]})
    await w.settle()
    w.sql("DELETE FROM user_friends")
    w.sql(f"UPDATE users SET {other}")
    await w.users.update(held.id, {"n": 1})
    assert w.sql("SELECT count(*) FROM user_friends") == [(2,)]
    await w.assert_equal()


async def test_an_update_upon_a_row_of_an_older_mapping_brings_the_children_too(open_world):
    w = await open_world()
    made = await w.users.insert({"username": "Bob", "friends": [ObjectId()]})
    await w.settle()
    newer = await open_world(entity=users_entity(mapping_version=2))
    held = await newer.users.get(made.id)
    # As the older mapping may have had it.
    w.sql("DELETE FROM user_friends")
    await newer.users.update(held.id, {"n": 1})
    assert w.sql("SELECT count(*) FROM user_friends") == [(1,)]
    await newer.assert_equal()


async def test_an_insert_over_a_row_that_mongo_has_no_document_of_leaves_none_of_its_children(open_world):
    w = await open_world()
    made = await w.users.insert({"username": "Bob", "friends": [ObjectId()]})
    await w.settle()
    w.documents.delete_one({"_id": made.id})
    again = await w.users.insert({"_id": made.id, "username": "Alice"})
    await w.reconcile()
    assert (await w.row(made.id)).document == again.document
    assert w.sql("SELECT count(*) FROM user_friends") == [(0,)]
    await w.assert_equal()


async def test_a_record_that_was_let_go_is_asked_for(open_world):
    w = await open_world()
    id_ = (await w.users.insert({"username": "Bob", "n": 1})).id
    await w.settle()
    assert await commands(w, lambda: w.users.update(id_, {"n": 2})) == [
        "users.find_one", "users.find_one_and_update",
    ]  # fmt: skip
    await w.assert_equal()


async def test_a_write_since_the_read_is_written_upon_and_not_replaced(open_world):
    reader, writer = await open_world(), await open_world()
    made = await writer.users.insert({"username": "Bob", "n": 1})
    held = await reader.users.get(made.id)
    await writer.users.update(made.id, {"other": 1})
    record = await reader.users.update(held.id, {"n": 2})
    assert record.rev == 3
    for store in (await reader.image(made.id), await reader.row(made.id)):
        assert (store.rev, store.document["n"], store.document["other"]) == (3, 2, 1)
    await writer.settle()
    await reader.assert_equal()


async def test_a_foreign_write_since_the_read_stays(open_world):
    w = await open_world()
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.settle()
    held = await w.users.get(made.id)
    w.documents.update_one({"_id": held.id}, {"$set": {"n": 2}})
    await w.users.update(held.id, {"other": 1})
    row = await w.row(made.id)
    assert (row.document["n"], row.document["other"]) == (2, 1)
    await w.assert_equal()


async def test_a_foreign_rename_since_the_read_gets_its_own_key(open_world):
    w = await open_world()
    made = await w.users.insert({"username": "Bob"})
    await w.settle()
    held = await w.users.get(made.id)
    w.documents.update_one({"_id": held.id}, {"$set": {"username": "Alice"}})
    await w.users.update(held.id, {"n": 1})
    assert w.notes(made.id)["keys"] == {"username": "alice"}
    assert (await w.users.find_by_key("username", "ALICE")).id == made.id
    await w.assert_equal()


async def test_what_the_application_does_to_its_copy_is_not_in_the_record(open_world):
    w = await open_world()
    made = await w.users.insert({"username": "Bob", "n": 1, "tags": ["a"]})
    await w.settle()
    held = await w.users.get(made.id)
    held.document["tags"].append("b")
    held.document["n"] = 7
    await w.users.update(held.id, {"other": 1})
    for store in (await w.image(made.id), await w.row(made.id)):
        assert (store.document["n"], store.document["tags"]) == (1, ["a"])
    await w.assert_equal()


async def test_two_writers_upon_one_read_are_both_there(open_world):
    w = await open_world()
    made = await w.users.insert({"username": "Bob"})
    await w.settle()
    held = await w.users.get(made.id)
    await asyncio.gather(*(w.users.update(held.id, {f"field{n}": n}) for n in range(8)))
    row = await w.row(made.id)
    assert [row.document[f"field{n}"] for n in range(8)] == list(range(8))
    assert row.rev == 9
    await w.reconcile()
    await w.assert_equal()


async def test_an_open_write_that_was_read_is_not_written_upon(open_world, postgres_proxy):
    """It may yet be taken back, and takes its own fields alone with it."""
    w = await open_world(postgres=postgres_proxy, tentative=5.0)
    reader = await open_world(tentative=5.0)
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.settle()
    postgres_proxy.swallow_answers()
    opening = asyncio.create_task(w.users.update(made.id, {"n": 2}, strategy=FailureStrategy.ROLLBACK_BOTH))

    async def is_open():
        return "tentative" in (w.debt(made.id) or {})

    await eventually(is_open)
    await reader.m.board.refresh()
    held = await reader.users.get(made.id)
    assert (held.rev, held["n"]) == (2, 2)
    await reader.users.update(held.id, {"other": 1})
    with pytest.raises(Undone):
        await opening
    postgres_proxy.pass_through()
    await w.postgres_answers()
    await reader.reconcile()
    document = w.document(made.id)
    assert (document["n"], document["other"]) == (1, 1)
    await reader.assert_equal()
