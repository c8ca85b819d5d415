"""Foreign keys between records that come and go in any order: nobody waits, nothing is lost, what is missing shows."""

import asyncio

import psycopg
import pytest
from bson import ObjectId
from sqlalchemy import Column, MetaData, Table

from crossfade import ConfigurationError, DocumentId, Entity, record_columns, reference
from crossfade.cli.phases import gather_status
from crossfade.values import id_to_text

from .conftest import BOTH_PRIMARIES, PATIENCE, eventually, requests_entity
from .test_images import apply, apply_delete, image_of


async def links(w):
    """{(owner, friend): the link is set}, and that a link never differs from the id that it follows."""
    await w.settle()  # they are set behind the commit
    rows = w.sql("SELECT user_id, friend_id, friend_ref FROM user_friends")
    assert all(ref in (None, friend) for _, friend, ref in rows)
    return {(owner, friend): ref is not None for owner, friend, ref in rows}


def pair(owner, friend):
    return id_to_text(owner), id_to_text(friend)


@pytest.mark.parametrize("phase", BOTH_PRIMARIES)
async def test_a_friend_who_is_there_is_linked_at_once(open_world, phase):
    w = await open_world(phase)
    ann = (await w.users.insert({"username": "Ann"})).id
    bob = (await w.users.insert({"username": "Bob", "friends": [ann]})).id
    assert await links(w) == {pair(bob, ann): True}
    await w.assert_equal()


@pytest.mark.parametrize("phase", BOTH_PRIMARIES)
async def test_a_friend_who_is_not_there_yet_is_linked_when_he_comes(open_world, phase):
    w = await open_world(phase)
    ann = ObjectId()
    bob = (await w.users.insert({"username": "Bob", "friends": [ann]})).id
    assert await links(w) == {pair(bob, ann): False}
    assert await w.postgres.waiting_references(w.m.entities.values(), timeout=PATIENCE) == {
        "user_friends.friend_ref": 1
    }
    await w.users.insert({"_id": ann, "username": "Ann"})
    assert await links(w) == {pair(bob, ann): True}
    assert await w.postgres.waiting_references(w.m.entities.values(), timeout=PATIENCE) == {}
    await w.assert_equal()


@pytest.mark.parametrize("phase", BOTH_PRIMARIES)
async def test_a_friend_who_goes_leaves_his_name_and_no_link_until_he_is_back(open_world, phase):
    w = await open_world(phase)
    ann = (await w.users.insert({"username": "Ann"})).id
    bob = (await w.users.insert({"username": "Bob", "friends": [ann]})).id
    await w.users.delete(ann)
    assert await links(w) == {pair(bob, ann): False}
    assert (await w.users.get(bob))["friends"] == [ann], "what the record says is not changed"
    await w.users.insert({"_id": ann, "username": "Ann"})
    assert await links(w) == {pair(bob, ann): True}
    await w.assert_equal()


@pytest.mark.parametrize("phase", BOTH_PRIMARIES)
async def test_an_exchanged_friend_exchanges_the_link(open_world, phase):
    w = await open_world(phase)
    ann = (await w.users.insert({"username": "Ann"})).id
    nobody = ObjectId()
    bob = (await w.users.insert({"username": "Bob", "friends": [ann, ann]})).id
    await w.users.update(bob, {"friends": [nobody, ann]})
    assert await links(w) == {pair(bob, nobody): False, pair(bob, ann): True}
    await w.users.update(bob, {"friends": [bob]})
    assert await links(w) == {pair(bob, bob): True}
    await w.assert_equal()


@pytest.mark.parametrize("phase", BOTH_PRIMARIES)
async def test_a_record_is_linked_by_its_own_columns_too(open_world, phase):
    w = await open_world(phase, others=[requests_entity()])
    ann, nobody = (await w.users.insert({"username": "Ann"})).id, ObjectId()
    made = await w.m["friend_requests"].insert({"sender": ann, "receiver": nobody, "status": "pending"})

    async def linked():
        await w.settle()
        return w.sql("SELECT sender_ref, receiver_ref FROM friend_requests")

    assert await linked() == [(id_to_text(ann), None)]
    await w.m["friend_requests"].update(made.id, {"sender": nobody, "receiver": ann})
    assert await linked() == [(None, id_to_text(ann))]
    await w.m["friend_requests"].update(made.id, {"status": "accepted"})
    assert await linked() == [(None, id_to_text(ann))], "a change of something else leaves it alone"
    await w.users.delete(ann)
    assert await linked() == [(None, None)]
    await w.users.insert({"_id": nobody, "username": "Cat"})
    assert await linked() == [(id_to_text(nobody), None)]


async def test_two_who_name_each_other_are_linked_whatever_the_order(open_world):
    """Both are written at once, again and again: of two transactions that cannot see each other one links both."""
    w = await open_world()
    for _ in range(15):
        ann, bob = ObjectId(), ObjectId()
        await asyncio.gather(
            apply(w, image_of(ann, 1, friends=[bob], username=str(ann))),
            apply(w, image_of(bob, 1, friends=[ann], username=str(bob))),
        )
        found = await links(w)
        assert (found[pair(ann, bob)], found[pair(bob, ann)]) == (True, True)


async def test_two_who_name_each_other_go_at_once(open_world, database_url):
    """Each delete clears the link in the rows of the other, which that one removes: neither waits in a circle."""
    w = await open_world()
    ann, bob = ObjectId(), ObjectId()
    await apply(w, image_of(ann, 1, friends=[bob], username="Ann"))
    await apply(w, image_of(bob, 1, friends=[ann], username="Bob"))
    async with await psycopg.AsyncConnection.connect(database_url) as other:
        # Both are well on their way before either can end.
        await other.execute("SELECT FROM users FOR UPDATE")
        both = asyncio.gather(apply_delete(w, ann, 2), apply_delete(w, bob, 2))
        await asyncio.sleep(0.3)
        await other.rollback()
        await both
    assert await links(w) == {}


async def test_a_friend_whose_row_is_locked_keeps_nobody_waiting(open_world, database_url):
    w = await open_world()
    ann = (await w.users.insert({"username": "Ann"})).id
    await w.settle()
    async with await psycopg.AsyncConnection.connect(database_url) as other:
        await other.execute("SELECT FROM users WHERE id = %s FOR UPDATE", [id_to_text(ann)])
        bob = (await w.users.insert({"username": "Bob", "friends": [ann]})).id
        await w.settle()
        assert w.debt(bob) is None, "written without waiting"
        assert await links(w) == {pair(bob, ann): False}
    assert await w.m.reconciler.link() == 1
    assert await links(w) == {pair(bob, ann): True}
    await w.assert_equal()


async def test_what_a_crash_left_unlinked_the_sweep_links(open_world):
    w = await open_world(background=True, full_sweep=0.2)
    ann = (await w.users.insert({"username": "Ann"})).id
    bob = (await w.users.insert({"username": "Bob", "friends": [ann]})).id
    w.sql("UPDATE user_friends SET friend_ref = NULL")

    async def linked():
        return await links(w) == {pair(bob, ann): True}

    await eventually(linked)


async def test_a_friend_in_quarantine_is_missing_and_shown_until_he_is_mended(open_world):
    w = await open_world()
    ann = ObjectId()
    bob = (await w.users.insert({"username": "Bob", "friends": [ann]})).id
    w.documents.insert_one({"_id": ann, "username": 5})
    await w.m.reconciler.full_sweep()
    status = await gather_status(w.m)
    assert status["waiting_references"] == {"user_friends.friend_ref": 1}
    w.documents.update_one({"_id": ann}, {"$set": {"username": "Ann"}})
    await w.m.reconciler.full_sweep()
    assert await links(w) == {pair(bob, ann): True}
    assert (await gather_status(w.m))["waiting_references"] == {}


def test_a_reference_follows_a_column_that_there_is():
    table = Table(
        "notes",
        MetaData(),
        Column("id", DocumentId, primary_key=True),
        reference("writer_ref", "users.id", of="writer"),
        *record_columns(),
    )
    with pytest.raises(ConfigurationError, match=r"notes\.writer_ref refers to what writer names"):
        Entity("notes", collection="notes", table=table, columns=[])


async def test_a_row_that_was_locked_by_a_write_whose_caller_gave_up_is_linked_all_the_same(
    open_world, mongo_proxy
):
    """Whoever comes meanwhile leaves it to that write, and no debt says that it was left."""
    requests = requests_entity()
    w = await open_world(mongo=mongo_proxy, others=[requests], primary_deadline=10.0, secondary_deadline=5.0)
    other = await open_world(others=[requests])
    ann = ObjectId()
    held = await w.m["friend_requests"].insert({"sender": ann, "receiver": ObjectId(), "status": "pending"})
    await w.settle()
    mongo_proxy.delay(5.0)
    updating = asyncio.create_task(w.m["friend_requests"].update(held.id, {"status": "accepted"}))

    async def is_locked():
        [(locked,)] = w.sql(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND state = 'idle in transaction'"
        )
        return locked == 1

    await eventually(is_locked)
    await other.users.insert({"_id": ann, "username": "Ann"})
    await other.settle()
    updating.cancel()
    await asyncio.wait({updating})
    mongo_proxy.delay(0)

    async def is_linked():
        return w.sql("SELECT sender_ref FROM friend_requests") == [(id_to_text(ann),)]

    await eventually(is_linked, timeout=5.0)
