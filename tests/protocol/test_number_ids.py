"""To MongoDB 5, 5.0 and a decimal 5.00 are one id: no other answer, and no second row, from either store."""

import asyncio

import pytest
from bson import Decimal128, Int64

from crossfade import DuplicateKey, FailureStrategy, NotFound, any_of
from crossfade.query import query

from .conftest import BOTH_PRIMARIES, requests_entity

FIVES = [5, Int64(5), 5.0, Decimal128("5"), Decimal128("5.00"), Decimal128("0.5E+1")]
phases = pytest.mark.parametrize("phase", ["mongo_only", "shadow_read", *BOTH_PRIMARIES, "postgres_only"])
kept_as = pytest.mark.parametrize("kept", [5, 5.0, Decimal128("5.00")], ids=repr)


async def made(open_world, phase, kept):
    w = await open_world(phase, board_age=60.0)
    await w.users.insert({"_id": kept, "username": "Bob", "n": 0})
    await w.settle()
    await w.m.board.refresh()
    return w


def is_kept(record, kept):
    return record is not None and type(record.id) is type(kept) and str(record.id) == str(kept)


@kept_as
@phases
async def test_a_record_is_found_by_its_number_in_any_type(open_world, phase, kept):
    w = await made(open_world, phase, kept)
    for five in FIVES:
        assert is_kept(await w.users.get(five), kept)
        assert is_kept(await w.users.find_one({"_id": five}), kept)
        [one] = await w.users.get_many([five, 6, 5])
        assert is_kept(one, kept)
        assert await w.users.count({"_id": any_of([five, 5, 6.5])}) == 1
    for other in (6, 5.5, True, "5", Decimal128("5.01")):
        assert await w.users.get(other) is None


@kept_as
@pytest.mark.parametrize("strategy", [None, FailureStrategy.ROLLBACK_BOTH])
@pytest.mark.parametrize("phase", BOTH_PRIMARIES)
async def test_a_record_is_written_by_its_number_in_any_type_and_there_is_no_second_one(
    open_world, phase, strategy, kept
):
    w = await made(open_world, phase, kept)
    for n, five in enumerate(FIVES, 1):
        with pytest.raises(DuplicateKey, match="'_id'"):
            await w.users.insert({"_id": five, "username": f"other {n}"}, strategy=strategy)
        changed = await w.users.update(five, {"n": n}, strategy=strategy)
        assert is_kept(changed, kept)
        assert changed.rev == n + 1
    async with w.m.operation("Count", strategy=strategy) as op:
        op.insert("users", {"_id": 6, "username": "Ann"})
        op.also("users", Decimal128("5"), {"n": 99})
    assert (await w.users.get(5))["n"] == 99
    await w.assert_equal()
    for gone in (5.0, 6.0):
        await w.users.delete(gone, strategy=strategy)
    await w.assert_equal()
    with pytest.raises(NotFound):
        await w.users.delete(5, strategy=strategy)
    # Free again, in whatever type.
    assert is_kept(await w.users.insert({"_id": Int64(5), "username": "Bob"}, strategy=strategy), Int64(5))
    await w.assert_equal()
    assert len(w.sql("SELECT id FROM users")) == w.documents.count_documents({}) == 1


@pytest.mark.parametrize("phase", BOTH_PRIMARIES)
async def test_of_inserts_of_one_number_at_once_one_is_made(open_world, phase):
    w = await open_world(phase)
    told = await asyncio.gather(
        *(w.users.insert({"_id": five, "username": str(n)}) for n, five in enumerate(FIVES)),
        return_exceptions=True,
    )
    assert sum(not isinstance(answer, BaseException) for answer in told) == 1, told
    assert {type(answer) for answer in told if isinstance(answer, BaseException)} == {DuplicateKey}
    await w.assert_equal()


async def test_a_number_is_not_made_anew_in_another_type_while_mongo_holds_the_deleted_one(
    open_world, mongo_proxy
):
    """The delete, which comes later, would take the new document for it."""
    w = await open_world("postgres_primary", mongo=mongo_proxy, primary_deadline=1.0)
    await w.users.insert({"_id": 5, "username": "Bob"})
    mongo_proxy.refuse()
    await w.users.delete(5)
    with pytest.raises(Exception, match="number of another type, is not in MongoDB yet"):
        await w.users.insert({"_id": 5.0, "username": "Bob"})
    mongo_proxy.pass_through()
    await w.reconcile()
    await w.users.insert({"_id": 5.0, "username": "Bob"})
    await w.reconcile()
    await w.assert_equal()


async def test_a_debt_is_seen_whatever_type_its_number_is_asked_by(open_world, postgres_proxy):
    w = await made(open_world, "postgres_read", 5)
    w.documents.update_one({"_id": 5}, {"$set": {"n": 1, "_cf.rev": 2, "_cf.debt": {"epoch": 1}}})
    await w.m.board.refresh()
    for five in FIVES:
        found = await w.users.get(five)
        assert (found.source, found["n"]) == ("mongo", 1)


async def test_a_number_that_a_foreign_writer_made_anew_in_another_type_has_one_row(open_world):
    w = await made(open_world, "dual_write", 5)
    w.documents.delete_one({"_id": 5})
    w.documents.insert_one({"_id": 5.0, "username": "Bob", "n": 7})
    for _ in range(2):
        await w.m.reconciler.full_sweep()
        await w.reconcile()
    await w.assert_equal()
    assert w.sql("SELECT id, n FROM users") == [("j:5.0", 7)]


async def test_references_are_found_by_their_number_in_any_type(open_world):
    w = await open_world("dual_write", others=[requests_entity()])
    await w.users.insert({"username": "Bob", "friends": [5, 6.0]})
    await w.m["friend_requests"].insert({"sender": 5, "receiver": 6.0, "status": "pending"})
    await w.settle()
    for name, field in (("users", "friends"), ("friend_requests", "sender")):
        for five in FIVES:
            asked = query(name, {field: five}, order_by="_id", after=None, limit=9, skip=0)
            for store in (w.mongo, w.postgres):
                assert len(await store.find(w.m.entities[name], asked, timeout=5.0)) == 1, (
                    store,
                    field,
                    five,
                )


async def test_a_document_of_a_number_in_another_type_gives_way_to_the_one_that_is_delivered(open_world):
    w = await open_world("postgres_primary")
    w.documents.insert_one({"_id": 5.0, "username": "Ann"})
    await w.users.insert({"_id": 5, "username": "Bob"})
    await w.reconcile()
    assert is_kept(await w.users.get(5), 5)
    assert [document["username"] for _, document in w.conflicts()] == ["Ann"]
    await w.assert_equal()
