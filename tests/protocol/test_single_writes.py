"""What a write leaves in both stores, whichever is primary and whatever the strategy."""

import asyncio
import contextlib
import re
from datetime import UTC, datetime

import pytest
from bson import DBRef, ObjectId, Regex

from crossfade import (
    ConditionNotMet,
    ConfigurationError,
    CrossfadeError,
    DuplicateKey,
    FailureStrategy,
    NotAllowedInPhase,
    NotFound,
    OutcomeUnknown,
    Quarantined,
    StaleRevision,
)

from .conftest import BOTH_PRIMARIES, eventually

WAYS = [(phase, strategy) for phase in BOTH_PRIMARIES for strategy in (None, FailureStrategy.ROLLBACK_BOTH)]
ways = pytest.mark.parametrize(
    ("phase", "strategy"), WAYS, ids=[f"{p}-{s.value if s else 'default'}" for p, s in WAYS]
)
phases = pytest.mark.parametrize("phase", BOTH_PRIMARIES)


@ways
async def test_insert_update_delete_and_recreate_number_revisions_without_a_gap(open_world, phase, strategy):
    w = await open_world(phase)
    friends = [ObjectId(), ObjectId()]
    made = await w.users.insert(
        {"username": "Bob", "n": 1, "friends": friends, "address": {"b": 1, "a": [None, 2.0]}},
        strategy=strategy,
    )
    assert made.rev == 1
    await w.assert_equal()
    assert (await w.row(made.id)).document["friends"] == friends

    changed = await w.users.update(
        made.id, {"n": 2, "friends": friends[:1]}, unset=["address"], strategy=strategy
    )
    assert changed.rev == 2
    assert changed.document == {"_id": made.id, "username": "Bob", "n": 2, "friends": friends[:1]}
    await w.assert_equal()

    await w.users.delete(made.id, strategy=strategy)
    assert await w.users.get(made.id) is None
    assert w.document(made.id) is None
    await w.assert_equal()
    # The delete was revision 3 and a confirmation is none, so the id comes back at 4.
    again = await w.users.insert({"_id": made.id, "username": "Bob"}, strategy=strategy)
    assert again.rev == 4
    assert (await w.users.get(made.id)).document == {"_id": made.id, "username": "Bob"}
    await w.assert_equal()


@phases
async def test_a_taken_name_is_refused_by_the_primary_and_leaves_nothing_behind(open_world, phase):
    w = await open_world(phase)
    await w.users.insert({"username": "Bob"})
    other = await w.users.insert({"username": "Eve"})
    before = await w.contents()
    for write in (
        w.users.insert({"username": "bOB "}),
        w.users.update(other.id, {"username": "BOB"}),
        w.users.insert({"username": "bob"}, strategy=FailureStrategy.ROLLBACK_BOTH),
    ):
        with pytest.raises(DuplicateKey) as refused:
            await write
        assert refused.value.rule == "username"
    assert await w.contents() == before
    assert w.m.pair.postgres_breaker.failures == w.m.pair.mongo_breaker.failures == 0
    await w.assert_equal()


async def test_what_a_rule_of_postgres_refuses_for_itself_is_not_told_as_taken_by_another(open_world):
    w = await open_world("postgres_primary")
    other = await w.users.insert({"username": "Eve", "n": 1})
    await w.settle()
    before = await w.contents()
    for strategy in (FailureStrategy.PRIORITIZE_POSTGRES, FailureStrategy.ROLLBACK_BOTH):
        for write in (
            w.users.insert({"username": "Bob", "n": 666}, strategy=strategy),
            w.users.update(other.id, {"n": 666}, strategy=strategy),
        ):
            with pytest.raises(Quarantined, match="users_n_allowed"):
                await write
    assert await w.contents() == before
    assert w.outbox() == []


@phases
async def test_an_id_is_taken_once(open_world, phase):
    w = await open_world(phase)
    made = await w.users.insert({"username": "Bob"})
    with pytest.raises(DuplicateKey) as refused:
        await w.users.insert({"_id": made.id, "username": "Eve"})
    assert refused.value.rule == "_id"
    await w.assert_equal()


@phases
async def test_an_absent_or_deleted_record_takes_no_write(open_world, phase):
    w = await open_world(phase)
    gone = await w.users.insert({"username": "Bob"})
    await w.users.delete(gone.id)
    for id_ in (gone.id, ObjectId()):
        with pytest.raises(NotFound):
            await w.users.update(id_, {"n": 1})
        with pytest.raises(NotFound):
            await w.users.delete(id_)
    await w.assert_equal()


@phases
async def test_a_write_bound_to_a_revision_is_refused_at_another(open_world, phase):
    w = await open_world(phase)
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.users.update(made.id, {"n": 2}, if_revision=1)
    with pytest.raises(StaleRevision, match="revision 2, not 1"):
        await w.users.update(made.id, {"n": 3}, if_revision=1)
    assert (await w.users.get(made.id))["n"] == 2


@phases
async def test_a_freed_name_may_be_taken_in_both_stores(open_world, phase):
    w = await open_world(phase)
    bob = await w.users.insert({"username": "Bob"})
    await w.users.update(bob.id, {"username": "Robert"})
    await w.users.insert({"username": "BOB"})
    await w.assert_equal()
    assert (await w.users.find_by_key("username", "robert")).id == bob.id


@phases
async def test_two_writers_of_one_record_lose_neither_write(open_world, phase):
    import asyncio

    w, other = await open_world(phase), await open_world(phase)
    made = await w.users.insert({"username": "Bob"})
    await asyncio.gather(
        *(worker.users.update(made.id, {f"f{n}": n}) for n, worker in enumerate([w, other] * 5))
    )
    record = await w.users.get(made.id)
    assert record.rev == 11
    assert {record.get(f"f{n}") for n in range(10)} == set(range(10))
    await w.reconcile()
    await w.assert_equal()


@pytest.mark.parametrize(
    ("phase", "strategy"),
    [
        ("mongo_only", FailureStrategy.ROLLBACK_BOTH),
        ("dual_write", FailureStrategy.PRIORITIZE_POSTGRES),
        ("postgres_primary", FailureStrategy.PRIORITIZE_MONGO),
    ],
)
async def test_a_strategy_that_lets_the_other_store_decide_is_refused(open_world, phase, strategy):
    w = await open_world(phase)
    with pytest.raises(NotAllowedInPhase, match=rf"{strategy.name} is not allowed in phase {phase}"):
        await w.users.insert({"username": "Bob"}, strategy=strategy)
    assert w.documents.count_documents({}) == 0


@phases
async def test_async_with_rollback_both_is_refused(open_world, phase):
    w = await open_world(phase)
    with pytest.raises(NotAllowedInPhase, match="async"):
        await w.users.insert({"username": "Bob"}, strategy=FailureStrategy.ROLLBACK_BOTH, mode="async")


@phases
async def test_an_asynchronous_write_reaches_the_other_store(open_world, phase):
    w = await open_world(phase)
    made = await w.users.insert({"username": "Bob"})
    await w.users.update(made.id, {"n": 7}, mode="async")
    await w.reconcile()
    assert (await w.row(made.id)).document["n"] == w.document(made.id)["n"] == 7
    await w.assert_equal()


async def test_in_phase_0_postgres_is_not_touched(open_world):
    w = await open_world("mongo_only")
    made = await w.users.insert({"username": "Bob"})
    await w.users.update(made.id, {"n": 1})
    assert w.debt(made.id) is None
    await w.users.delete(made.id)
    assert w.document(made.id) is None
    assert w.sql("SELECT * FROM users") == []


async def test_a_delete_of_phase_0_is_owed_from_phase_1_on(open_world):
    w = await open_world("mongo_only")
    await w.m.prepare()
    made = await w.users.insert({"username": "Bob"})
    await w.users.delete(made.id)
    assert (await w.owed(), await w.m.reconciler.owed()) == ((), 0)
    await w.set_phase("dual_write")
    assert (len(await w.owed()), await w.m.reconciler.owed()) == (1, 1)
    await w.reconcile()
    await w.assert_equal()


async def test_a_record_deleted_in_phase_0_may_be_made_again(open_world):
    w = await open_world("mongo_only")
    made = await w.users.insert({"username": "Bob"})
    await w.users.delete(made.id)
    assert (await w.users.insert({"_id": made.id, "username": "Bob"})).rev == 3


async def test_an_id_that_was_made_and_deleted_meanwhile_is_made_above_that(open_world, monkeypatch):
    w, other = await open_world(), await open_world()
    id_, look = ObjectId(), w.mongo.tombstone

    async def overtaken(entity, id_, **how):
        """Between the look for a tombstone and the insert another worker makes and deletes the record."""
        found = await look(entity, id_, **how)
        monkeypatch.setattr(w.mongo, "tombstone", look)
        await other.users.insert({"_id": id_, "username": "Bob"})
        await other.users.delete(id_)
        return found

    monkeypatch.setattr(w.mongo, "tombstone", overtaken)
    record = await w.users.insert({"_id": id_, "username": "Alice"})
    assert record.rev == w.notes(id_)["rev"] == 3, "revisions 1 and 2 were told before"
    await w.reconcile()
    await w.assert_equal()


async def test_nobody_sees_or_writes_upon_an_insert_that_a_delete_overtook(open_world, monkeypatch):
    """Its revision was told before: until it is made anew above the tombstone, there is no record."""
    w, other = await open_world(), await open_world()
    id_, look, insert = ObjectId(), w.mongo.tombstone, w.mongo.insert
    seen: dict[str, object] = {}

    async def overtaken(entity, id_, **how):
        """Between the look for a tombstone and the insert another worker makes and deletes the record."""
        found = await look(entity, id_, **how)
        monkeypatch.setattr(w.mongo, "tombstone", look)
        await other.users.insert({"_id": id_, "username": "Bob"})
        await other.users.delete(id_)
        return found

    async def watched(entity, document, **how):
        await insert(entity, document, **how)
        monkeypatch.setattr(w.mongo, "insert", insert)
        assert w.document(id_) is not None
        seen["read"] = await other.users.get(id_)
        seen["by name"] = await other.users.find_by_key("username", "Alice")
        seen["found"] = await other.users.find({"username": "Alice"})
        for name, write in (
            ("update", lambda: other.users.update(id_, {"n": 1})),
            ("delete", lambda: other.users.delete(id_)),
        ):
            with pytest.raises(NotFound):
                seen[name] = await write()

    monkeypatch.setattr(w.mongo, "tombstone", overtaken)
    monkeypatch.setattr(w.mongo, "insert", watched)
    record = await w.users.insert({"_id": id_, "username": "Alice"})
    assert seen == {"read": None, "by name": None, "found": []}
    assert record.rev == 3
    assert (await other.users.get(id_)).rev == 3
    await w.reconcile()
    await w.assert_equal()


async def test_an_insert_that_was_lifted_before_its_own_look_does_not_tell_its_old_revision(
    open_world, monkeypatch
):
    w, other = await open_world(), await open_world()
    id_, look, insert = ObjectId(), w.mongo.tombstone, w.mongo.insert

    async def overtaken(entity, id_, **how):
        found = await look(entity, id_, **how)
        monkeypatch.setattr(w.mongo, "tombstone", look)
        await other.users.insert({"_id": id_, "username": "Bob"})
        await other.users.delete(id_)
        return found

    async def lifted(entity, document, **how):
        await insert(entity, document, **how)
        monkeypatch.setattr(w.mongo, "insert", insert)
        await other.reconcile()

    monkeypatch.setattr(w.mongo, "tombstone", overtaken)
    monkeypatch.setattr(w.mongo, "insert", lifted)
    with pytest.raises(OutcomeUnknown):
        await w.users.insert({"_id": id_, "username": "Alice"})
    assert (await w.users.get(id_)).rev > 2
    await w.reconcile()
    await w.assert_equal()


async def test_an_insert_that_a_delete_overtook_and_whose_worker_died_goes_above_the_tombstone(
    open_world, monkeypatch
):
    w, other = await open_world(), await open_world()
    id_, look, insert, apply = ObjectId(), w.mongo.tombstone, w.mongo.insert, other.postgres.apply
    brought: list[int] = []

    async def overtaken(entity, id_, **how):
        found = await look(entity, id_, **how)
        monkeypatch.setattr(w.mongo, "tombstone", look)
        await other.users.insert({"_id": id_, "username": "Bob"})
        await other.users.delete(id_)
        return found

    async def dies(entity, document, **how):
        await insert(entity, document, **how)
        raise asyncio.CancelledError

    async def watched(images, **how):
        brought.extend(image.rev for _, image, rows in images if rows is not None)
        return await apply(images, **how)

    monkeypatch.setattr(w.mongo, "tombstone", overtaken)
    monkeypatch.setattr(w.mongo, "insert", dies)
    with pytest.raises(asyncio.CancelledError):
        await w.users.insert({"_id": id_, "username": "Alice"})
    monkeypatch.setattr(other.postgres, "apply", watched)
    await other.reconcile()
    assert brought == [3], "revisions 1 and 2 were told before"
    assert (await other.users.get(id_)).rev == 3
    await other.assert_equal()


async def test_what_goes_on_in_the_background_is_not_what_the_caller_makes_of_its_copy(open_world):
    w = await open_world()
    record = await w.users.insert({"username": "Bob", "tags": ["a"]}, mode="async")
    record.document["tags"].append("b")

    async def arrived():
        return await w.row(record.id) is not None

    await eventually(arrived)
    assert (await w.row(record.id)).document["tags"] == ["a"]
    await w.settle()
    await w.assert_equal()


async def test_what_another_application_wrote_is_not_changed_on_its_way_in_the_background(open_world):
    w = await open_world()
    # PyMongo takes it for a DBRef, whose fields have an order of their own.
    like_a_reference = {"$id": 1, "$ref": "users"}
    id_ = w.documents.insert_one({"username": "Bob", "like": like_a_reference}).inserted_id
    await w.users.update(id_, {"n": 1}, mode="async")

    async def arrived():
        return await w.row(id_) is not None

    await eventually(arrived)
    assert (await w.row(id_)).document["like"] == like_a_reference
    await w.settle()
    await w.assert_equal()


@pytest.mark.parametrize("phase", ["mongo_only", "dual_write", "postgres_primary"])
@pytest.mark.parametrize(
    "odd",
    [{"$gt": ""}, {"$ne": None}, re.compile("."), Regex("."), [1], "\ud800", DBRef("users", 1)],
    ids=ascii,
)
async def test_a_condition_is_nobodys_id(open_world, phase, odd):
    """What an application was sent as JSON and handed on."""
    w = await open_world(phase)
    made = await w.users.insert({"_id": "bob", "username": "Bob", "n": 1})
    assert await w.users.get(odd) is None
    assert [record.id for record in await w.users.get_many([odd, made.id])] == [made.id]
    for write in (
        w.users.update(odd, {"n": 2}),
        w.users.delete(odd),
        w.users.insert({"_id": odd, "username": "Ann"}),
    ):
        with pytest.raises(ConfigurationError):
            await write
    assert (await w.users.get("bob"))["n"] == 1


@pytest.mark.parametrize("phase", ["mongo_only", "dual_write", "postgres_primary"])
async def test_text_that_no_store_can_hold_is_nobodys_and_an_error_of_crossfades(open_world, phase):
    w = await open_world(phase)
    made = await w.users.insert({"username": "Bob", "n": 1})
    assert await w.users.find_by_key("username", "\ud800") is None
    for asked in (
        w.users.find({"username": "\ud800"}),
        w.users.update(made.id, {"n": "\ud800"}),
        w.users.update(made.id, unset=["\ud800"]),
        w.users.get_many(["x" * 3_000]),
    ):
        with contextlib.suppress(CrossfadeError):
            await asked
    assert (await w.users.get(made.id))["n"] == 1


async def test_an_id_that_was_deleted_in_phase_0_may_be_made_again_when_postgres_decides(open_world):
    w = await open_world("mongo_only")
    await w.m.prepare()
    await w.users.insert({"_id": "bob", "username": "Bob"})
    await w.users.delete("bob")
    for phase in ("dual_write", "postgres_primary"):
        await w.set_phase(phase)
        await w.reconcile()
    made = await w.users.insert({"_id": "bob", "username": "Bob"})
    assert made.rev == 3, "revisions 1 and 2 were told before"
    await w.reconcile()
    await w.assert_equal()


@phases
@pytest.mark.parametrize(
    ("there", "wanted", "holds"),
    [
        (0, False, False),
        (True, 1, False),
        ([1, True], [1, 1], False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, False),
        (1, 1.0, True),
        (float("nan"), float("nan"), True),
        (datetime(2026, 1, 2, 3, 4, 5, 678901, UTC), datetime(2026, 1, 2, 3, 4, 5, 678901, UTC), True),
    ],
    ids=repr,
)
async def test_a_condition_asks_for_the_same_whichever_store_decides(open_world, phase, there, wanted, holds):
    """As a filter of MongoDB does: a number is no bool, and the order of fields counts."""
    w = await open_world(phase)
    made = await w.users.insert({"username": "Bob", "there": there})
    if holds:
        assert (await w.users.update(made.id, {"n": 2}, where={"there": wanted}))["n"] == 2
        return
    with pytest.raises(ConditionNotMet):
        await w.users.update(made.id, {"n": 2}, where={"there": wanted})
    assert (await w.users.get(made.id)).get("n") is None


@pytest.mark.parametrize(
    ("there", "foreign"),
    [("a", {"$set": {"x": ["a"]}}), (None, {"$unset": {"x": ""}})],
    ids=["array", "none"],
)
async def test_a_condition_is_not_met_by_what_a_filter_takes_for_its_value(
    open_world, monkeypatch, there, foreign
):
    """Another application writes between the look and the write."""
    w = await open_world()
    made = await w.users.insert({"username": "Bob", "x": there})
    write = w.mongo.compare_and_set

    async def overtaken(*record, **how):
        w.documents.update_one({"_id": made.id}, foreign)
        return await write(*record, **how)

    monkeypatch.setattr(w.mongo, "compare_and_set", overtaken)
    with pytest.raises(ConditionNotMet):
        await w.users.update(made.id, {"n": 2}, where={"x": there})
    assert "n" not in w.document(made.id)
