"""An old application, or a person with a shell, writes to MongoDB without a word; the sweep adopts it."""

import asyncio
import collections
import contextlib
import itertools
from datetime import UTC, datetime, timedelta

import bson
import pytest
from bson import ObjectId
from bson.raw_bson import RawBSONDocument

from crossfade import FailureStrategy, Undone
from crossfade.errors import ConditionNotMet, CrossfadeError, DuplicateKey, Quarantined
from crossfade.record import CF
from crossfade.testing.failure_points import Failure, FailurePoints, Killed
from crossfade.values import Unmappable

from .conftest import PATIENCE, World


@pytest.fixture
async def w(open_world) -> World:
    return await open_world("postgres_read", foreign_writers=True)


async def swept(w: World) -> int:
    adopted = await w.m.reconciler.full_sweep()
    await w.reconcile()
    await w.assert_equal()
    return adopted


async def quarantined_by_a_backfill(w: World, id_):
    """It writes to PostgreSQL alone."""
    await w.postgres.quarantine(
        w.entity, await w.image(id_), reason="no username", field="username", timeout=PATIENCE
    )


async def inserted(w: World, document):
    """Made by us, and settled: what follows is a foreign writer's alone."""
    made = await w.users.insert(document)
    await w.settle()
    return made


async def test_a_document_changed_behind_our_back_is_adopted(w):
    made = await inserted(w, {"username": "Bob", "n": 1})
    w.documents.update_one({"_id": made.id}, {"$set": {"n": 2}, "$push": {"friends": ObjectId()}})
    assert await swept(w) == 1
    assert (await w.row(made.id)).document == {k: v for k, v in w.document(made.id).items() if k != CF}
    assert await swept(w) == 0


async def test_a_document_made_behind_our_back_is_adopted(w):
    id_ = w.documents.insert_one({"username": "Bob"}).inserted_id
    assert await swept(w) == 1
    assert (await w.row(id_)).document["username"] == "Bob"
    assert w.notes(id_)["keys"] == {"username": "bob"}


async def test_a_sweep_keeps_callers_of_the_same_process_waiting_for_a_few_documents_at_most(w):
    w.documents.insert_many([{"username": f"u{n}"} for n in range(200)])
    turns = 0

    async def caller():
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.create_task(caller())
    found = [turns async for _ in w.mongo.scan(w.entity, batch=1000, timeout=PATIENCE)]
    task.cancel()
    assert len(found) == 200
    assert max(collections.Counter(found).values()) <= 16


async def test_a_document_replaced_whole_gets_the_revision_after_the_rows(w):
    made = await inserted(w, {"username": "Bob", "n": 1})
    await w.users.update(made.id, {"n": 2})
    w.documents.replace_one({"_id": made.id}, {"username": "Robert"})
    assert await swept(w) == 1
    assert (await w.row(made.id)).document == {"_id": made.id, "username": "Robert"}
    assert w.notes(made.id)["rev"] == 3
    # A late image of the time before does not bring the old content back.
    await w.users.update(made.id, {"n": 5})
    assert (await w.row(made.id)).rev == 4


async def test_a_document_made_again_after_our_delete_gets_the_revision_after_the_tombstones(w):
    made = await inserted(w, {"username": "Bob"})
    await w.users.delete(made.id)
    w.documents.insert_one({"_id": made.id, "username": "Bob"})
    await swept(w)
    assert w.notes(made.id)["rev"] == 3


async def test_a_document_made_again_goes_above_a_tombstone_that_postgres_has_not_heard_of(open_world):
    w = await open_world("mongo_only")
    made = await w.users.insert({"username": "Bob"})
    await w.users.delete(made.id)
    await w.m.prepare()
    await w.set_phase("dual_write")
    w.documents.insert_one({"_id": made.id, "username": "Bob"})
    assert w.tombstone_in_postgres(made.id) is None
    assert await w.m.reconciler.full_sweep() == 1
    # At once, and not when the tombstone is brought: nobody gets a revision that was told before.
    assert w.notes(made.id)["rev"] == (await w.row(made.id)).rev == 3
    await w.reconcile()
    await w.assert_equal()


async def test_a_foreign_rename_restamps_the_key(w):
    made = await inserted(w, {"username": "Bob"})
    w.documents.update_one({"_id": made.id}, {"$set": {"username": "Robert"}})
    await swept(w)
    assert w.notes(made.id)["keys"] == {"username": "robert"}
    await inserted(w, {"username": "BOB"})
    await w.reconcile()
    await w.assert_equal()


async def test_a_foreign_rename_to_a_taken_name_keeps_the_name_and_gets_a_key_of_its_own(w):
    bob, eve = [(await inserted(w, {"username": name})).id for name in ("Bob", "Eve")]
    w.documents.update_one({"_id": eve}, {"$set": {"username": "BOB"}})
    await swept(w)
    assert w.notes(bob)["keys"] == {"username": "bob"}
    assert w.notes(eve)["keys"]["username"] == f"bob#{eve}"
    assert (await w.row(eve)).document["username"] == "BOB"


async def test_a_foreign_swap_of_names_reaches_postgres(w):
    a, b = [(await inserted(w, {"username": name})).id for name in ("a", "b")]
    w.documents.update_one({"_id": a}, {"$set": {"username": "b"}})
    w.documents.update_one({"_id": b}, {"$set": {"username": "a"}})
    await swept(w)
    assert dict(w.sql("SELECT id, username FROM users")) == {str(a): "b", str(b): "a"}


async def test_a_document_deleted_behind_our_back_is_found_by_the_full_pass(w):
    kept, gone = [await inserted(w, {"username": name}) for name in ("kept", "gone")]
    w.documents.delete_one({"_id": gone.id})
    assert await swept(w) == 1
    assert await w.row(gone.id) is None
    assert await w.row(kept.id) is not None
    assert w.tombstone_in_postgres(gone.id) == 2
    await w.m.board.refresh()
    assert await w.users.get(gone.id) is None


async def test_a_document_that_is_there_at_the_second_look_was_not_deleted(w):
    made = await inserted(w, {"username": "Bob"})
    assert not await w.settler.adopt_delete(w.entity, made.id, made.rev, w.control)
    assert (w.tombstone_in_mongo(made.id), w.tombstone_in_postgres(made.id)) == (None, None)
    assert (w.notes(made.id)["rev"], (await w.row(made.id)).rev) == (1, 1)
    await w.assert_equal()


async def test_the_sweep_by_date_adopts_what_was_changed_lately(w):
    now = datetime.now(UTC)
    new, old = [await inserted(w, {"username": name, "updatedAt": now}) for name in ("new", "old")]
    w.documents.update_one({"_id": new.id}, {"$set": {"n": 2, "updatedAt": now}})
    w.documents.update_one({"_id": old.id}, {"$set": {"n": 2, "updatedAt": now - timedelta(hours=1)}})
    assert await w.m.reconciler.sweep() == 1
    assert (await w.row(new.id)).document["n"] == 2
    assert (await w.row(old.id)).document.get("n") is None  # left to the full pass
    assert await swept(w) == 1


async def test_our_own_write_brings_a_foreign_one_along(w):
    made = await inserted(w, {"username": "Bob", "n": 1})
    w.documents.update_one({"_id": made.id}, {"$set": {"n": 2}})
    await w.users.update(made.id, {"other": 1})
    assert (await w.row(made.id)).document["n"] == 2
    await w.assert_equal()


async def test_a_sweep_leaves_equal_records_alone(w):
    made = await inserted(w, {"username": "Bob"})
    await w.settle()
    before = w.document(made.id)
    assert await swept(w) == 0
    assert w.document(made.id) == before


# --- what PostgreSQL cannot hold ---


async def test_a_document_that_cannot_be_mapped_is_quarantined_whole_with_the_reason(w):
    id_ = w.documents.insert_one({"username": None, "n": 1}).inserted_id  # the column must have a value
    other = w.documents.insert_one({"username": "Bob"}).inserted_id
    await w.m.reconciler.full_sweep()
    [(key, reason)] = w.quarantined()
    assert key == str(id_)
    assert "username" in reason
    assert await w.row(id_) is None
    assert await w.row(other) is not None
    # Readers get it from MongoDB, and nobody is told that it does not exist.
    await w.m.board.refresh()
    assert (await w.users.get(id_)).source == "mongo"


async def test_a_document_that_is_in_quarantine_as_it_is_takes_no_revision_from_a_sweep(w):
    id_ = w.documents.insert_one({"username": "B\0b"}).inserted_id
    await quarantined_by_a_backfill(w, id_)
    before = w.document(id_)
    assert await w.m.reconciler.full_sweep() == 0
    assert w.document(id_) == before == {"_id": id_, "username": "B\0b"}


async def test_an_older_row_is_not_read_for_a_document_that_a_backfill_put_in_quarantine(w):
    made = await inserted(w, {"username": "Bob", "n": 1})
    w.documents.update_one({"_id": made.id}, {"$set": {"username": None, "n": 2}})
    await quarantined_by_a_backfill(w, made.id)
    for rev in (2, 2):
        await w.m.reconciler.full_sweep()
        await w.m.board.refresh()
        found = await w.users.get(made.id)
        assert (found.source, found.rev, found["n"]) == ("mongo", rev, 2)
    w.documents.update_one({"_id": made.id}, {"$set": {"username": "Bob"}})
    await swept(w)
    assert w.quarantined() == []


async def test_an_older_row_is_not_read_for_bytes_that_a_backfill_put_in_quarantine(w):
    made = await inserted(w, {"username": "Bob"})
    raw = bson.encode({"_id": made.id, "username": "Bob?"}).replace(b"Bob?", b"Bob\xff")
    w.documents.delete_one({"_id": made.id})
    w.documents.insert_one(RawBSONDocument(raw))
    await w.settler._quarantine_bytes(w.entity, made.id, raw, Unmappable("not Unicode"))
    for _ in range(2):
        await w.m.reconciler.full_sweep()
        await w.m.board.refresh()
        with pytest.raises(Quarantined):
            await w.users.get(made.id)
    w.documents.update_one({"_id": made.id}, {"$set": {"username": "Robert"}})
    await w.reconcile()
    await w.assert_equal()


async def test_an_older_row_is_not_read_for_what_was_written_to_mongo_alone_and_postgres_cannot_hold(w):
    made = await inserted(w, {"username": "Bob", "n": 1})
    await w.set_phase("mongo_only")
    await w.users.update(made.id, {"username": 5})
    await w.set_phase("postgres_read")
    for _ in range(2):
        await w.m.reconciler.full_sweep()
        await w.m.board.refresh()
        found = await w.users.get(made.id)
        assert (found.source, found.rev, found["username"]) == ("mongo", 3, 5)
    await w.users.update(made.id, {"username": "Bob"})
    await swept(w)
    assert w.quarantined() == []


async def test_a_quarantined_document_is_released_when_it_is_mended(w):
    id_ = w.documents.insert_one({"username": None}).inserted_id
    await w.m.reconciler.full_sweep()
    w.documents.update_one({"_id": id_}, {"$set": {"username": "Bob"}})
    await swept(w)
    assert w.quarantined() == []
    assert (await w.row(id_)).document["username"] == "Bob"


async def test_a_write_that_postgres_cannot_hold_stays_in_mongo_parked_and_its_mending_releases_it(w):
    made = await inserted(w, {"username": "Bob", "n": 1})
    record = await w.users.update(made.id, {"username": 5})
    assert record["username"] == 5
    assert w.debt(made.id)["parked"].startswith("quarantined")
    assert [key for key, _ in w.quarantined()] == [str(made.id)]
    assert (await w.users.get(made.id))["username"] == 5  # not the older row
    await w.m.board.refresh()
    await w.users.update(made.id, {"username": "Bob"})
    assert w.quarantined() == []
    await w.assert_equal()


async def test_what_was_mended_before_anybody_had_heard_of_it_does_not_stay_in_quarantine(w):
    made = await inserted(w, {"username": "Bob", "n": 1})
    await w.users.update(made.id, {"username": 5})
    await w.users.update(made.id, {"username": "Bob"})
    await w.assert_equal()
    assert await swept(w) == 0
    assert w.quarantined() == []


async def test_a_document_whose_bytes_cannot_be_read_is_quarantined_and_holds_up_nobody(w):
    """A deprecated type that no driver gives back the same."""
    id_, other = ObjectId(), ObjectId()
    symbol = b"\x0es\x00\x02\x00\x00\x00x\x00"
    head = b"\x07_id\x00" + id_.binary + b"\x02username\x00\x04\x00\x00\x00Sym\x00"
    body = head + symbol + b"\x00"
    raw = (len(body) + 4).to_bytes(4, "little") + body
    try:
        w.documents.insert_one(RawBSONDocument(raw))
    except Exception:
        pytest.skip("this server does not take the deprecated type")
    w.documents.insert_one({"_id": other, "username": "Bob"})
    await w.m.reconciler.full_sweep()
    if not w.quarantined():
        pytest.skip("this server gives another type back")
    assert [key for key, _ in w.quarantined()] == [str(id_)]
    assert await w.row(other) is not None


@pytest.mark.parametrize(
    "odd",
    [
        {"n": "text in a column of numbers"},
        {"note": "NUL \0 in text"},
        {"x": float("nan"), "y": -0.0},
        {"friends": ["not an id", 5]},
        {"updatedAt": datetime(1, 1, 1, tzinfo=UTC)},
    ],
)
async def test_what_a_column_cannot_hold_is_carried_unchanged_all_the_same(w, odd):
    made = await inserted(w, {"username": "Bob", **odd})
    await w.assert_equal()
    assert w.debt(made.id) is None


async def test_a_document_that_has_no_room_for_a_note_holds_up_nobody(w):
    full, other = ObjectId(), ObjectId()
    document = {"_id": full, "username": "Bob", "x": b""}
    document["x"] = b"x" * (16 * 2**20 - len(bson.encode(document)))
    w.documents.insert_one(document)
    w.documents.insert_one({"_id": other, "username": "Ann"})
    await w.m.reconciler.full_sweep()
    assert await w.row(other) is not None
    assert [key for key, _ in w.quarantined()] == [str(full)]


async def test_a_document_restored_from_a_backup_goes_above_all_that_postgres_has_seen(w):
    made = await inserted(w, {"username": "Bob", "n": 0})
    saved = w.document(made.id)
    for n in range(1, 21):
        await w.users.update(made.id, {"n": n})
    await w.settle()
    w.documents.replace_one({"_id": made.id}, saved)
    assert await swept(w) == 1
    # MongoDB decides, so the backup stands; what is gone with it is kept for a person.
    assert (w.notes(made.id)["rev"], (await w.row(made.id)).document["n"]) == (22, 0)
    assert [(store, document["n"]) for store, document in w.conflicts()] == [("postgres", 20)]


async def test_rows_restored_from_a_backup_are_brought_up_to_date(w):
    ids = [(await inserted(w, {"username": name, "n": 0})).id for name in ("kept", "gone", "new")]
    w.sql("CREATE TABLE backup AS SELECT * FROM users WHERE username <> 'new'")
    for n in (1, 2):
        await w.users.update(ids[0], {"n": n})
    await w.users.delete(ids[1])
    await w.settle()
    w.sql("DELETE FROM users")
    w.sql("DELETE FROM crossfade.tombstones")
    w.sql("INSERT INTO users SELECT * FROM backup")
    await swept(w)
    assert [(row and row.rev) for row in [await w.row(id_) for id_ in ids]] == [3, None, 1]
    assert w.conflicts() == []


async def test_a_document_that_nobody_ever_wrote_through_us_is_updated_with_postgres_deciding(w):
    id_ = w.documents.insert_one({"username": "Bob", "n": 1, "other": [1]}).inserted_id
    image = await w.image(id_)
    # As a backfill brings it.
    await w.postgres.apply(
        [(w.entity, image, w.entity.to_rows(image.document, {"username": "bob"}))],
        migration="accounts", epoch=w.control.epoch, timeout=PATIENCE,
    )  # fmt: skip
    await w.set_phase("postgres_primary")
    record = await w.users.update(id_, {"n": 2})
    assert record.rev == w.notes(id_)["rev"] == 1
    assert w.document(id_)["n"] == 2
    assert w.conflicts() == []
    await w.assert_equal()


@pytest.mark.parametrize("failure", [Failure.KILLED_AFTER, Failure.ANSWER_LOST])
async def test_an_adoption_that_ends_anywhere_is_owed_as_soon_as_it_is_begun(w, open_world, failure):
    for number in itertools.count():
        made = await inserted(w, {"username": f"user {number}", "n": 1})
        w.documents.update_one({"_id": made.id}, {"$set": {"n": 2}})
        worker = await open_world("postgres_read", foreign_writers=True)
        points = FailurePoints(worker.cf)
        points.plan({number: failure})
        with contextlib.suppress(Killed, CrossfadeError):
            await points.run(worker.m.reconciler.full_sweep)
        points.end()
        # No sweep any more: what was begun is finished by what it left in debt.
        begun = w.notes(made.id)["rev"] > 1
        await w.reconcile()
        assert (await w.row(made.id)).document["n"] == (2 if begun else 1), points.points[-1]
        if number >= len(points.points):
            assert begun
            assert number > 5, "the points were not counted"
            break
        await swept(w)


async def test_a_condition_that_another_application_breaks_before_the_write_is_not_met(
    open_world, monkeypatch
):
    """Such a writer counts no revision up, so only the condition itself in the update's filter notices it."""
    w = await open_world()
    bob = await w.users.insert({"username": "Bob", "n": 1})
    id_, look = bob.id, w.mongo.notes
    await w.settle()

    async def overtaken(entity, id_, fields, **how):
        found = await look(entity, id_, fields, **how)
        monkeypatch.setattr(w.mongo, "notes", look)
        w.documents.update_one({"_id": id_}, {"$set": {"n": 2}})
        return found

    monkeypatch.setattr(w.mongo, "notes", overtaken)
    with pytest.raises(ConditionNotMet, match="in n by now"):
        await w.users.update(id_, {"won": True}, where={"n": 1})
    assert (w.document(id_)["n"], "won" in w.document(id_)) == (2, False)


@pytest.mark.parametrize("phase", ["mongo_only", "dual_write", "postgres_read"])
@pytest.mark.parametrize("made", [True, False])
async def test_a_name_that_another_application_took_twice_keeps_off_no_write_of_other_fields(
    open_world, phase, made
):
    w = await open_world(phase, foreign_writers=True)
    bob = await inserted(w, {"username": "Bob"})
    if made:
        other = w.documents.insert_one({"username": "BOB"}).inserted_id
    else:
        other = (await inserted(w, {"username": "Eve"})).id
        w.documents.update_one({"_id": other}, {"$set": {"username": "BOB"}})
    # No sweep has come by: in `mongo_only` none ever does.
    await w.users.update(other, {"n": 1})
    assert w.document(other)["n"] == 1
    assert w.notes(other)["keys"]["username"] == f"bob#{other}"
    assert w.notes(bob.id)["keys"]["username"] == "bob"
    # Who takes it is told so.
    eve = await inserted(w, {"username": "eve"})
    with pytest.raises(DuplicateKey):
        await w.users.update(eve.id, {"username": "bob"})
    if phase != "mongo_only":
        await w.assert_equal()


@pytest.mark.parametrize("names", [("Bob", "Xavier"), ("Bob", "Yves")])
async def test_a_name_that_another_application_moved_on_is_still_held_by_who_has_it(w, names):
    y, x = [(await inserted(w, {"username": name})).id for name in ("Yves", "Bob")]
    for id_, name in zip((y, x), names, strict=True):
        w.documents.update_one({"_id": id_}, {"$set": {"username": name}})
    # Who takes the name is looked at first, while who has left it is still stamped with it.
    await swept(w)
    for name in names:
        with pytest.raises(DuplicateKey):
            await w.users.insert({"username": name.upper()})
    assert w.notes(y)["keys"] == {"username": "bob"}


@pytest.mark.parametrize("phase", ["mongo_only", "dual_write", "postgres_read"])
async def test_a_name_that_another_application_gave_up_is_free_before_a_sweep(open_world, phase):
    w = await open_world(phase, foreign_writers=True)
    bob = await inserted(w, {"username": "Bob"})
    w.documents.update_one({"_id": bob.id}, {"$set": {"username": "Robert"}})
    await inserted(w, {"username": "BOB"})
    assert w.notes(bob.id)["keys"] == {"username": "robert"}
    with pytest.raises(DuplicateKey):
        await w.users.insert({"username": "ROBERT"})
    if phase != "mongo_only":
        await swept(w)


@pytest.mark.parametrize("many", [False, True])
async def test_a_foreign_rename_of_what_is_owed_restamps_the_key(open_world, postgres_proxy, many):
    w = await open_world("postgres_read", foreign_writers=True, postgres=postgres_proxy)
    made = [await inserted(w, {"username": name}) for name in ("Bob", *map(str, range(60 if many else 0)))]
    postgres_proxy.refuse()
    for record in made:
        await w.users.update(record.id, {"n": 1})
    w.documents.update_one({"_id": made[0].id}, {"$set": {"username": "Robert"}})
    postgres_proxy.pass_through()
    await w.postgres_answers()
    await w.reconcile()
    await w.assert_equal()
    assert w.notes(made[0].id)["keys"] == {"username": "robert"}
    await w.users.insert({"username": "BOB"})
    await swept(w)


@pytest.mark.parametrize("seen", [True, False])
async def test_a_foreign_rename_between_the_look_and_the_write_restamps_the_key(w, monkeypatch, seen):
    bob = await inserted(w, {"username": "Bob"})
    set_ = w.mongo.compare_and_set

    async def renamed_before(entity, id_, **how):
        monkeypatch.setattr(w.mongo, "compare_and_set", set_)
        w.documents.update_one({"_id": id_}, {"$set": {"username": "Robert"}})
        return await set_(entity, id_, **how)

    id_ = bob.id
    if not seen:
        del bob
    monkeypatch.setattr(w.mongo, "compare_and_set", renamed_before)
    await w.users.update(id_, {"n": 1})
    assert w.document(id_)["n"] == 1
    assert w.notes(id_)["keys"] == {"username": "robert"}
    await swept(w)


async def test_a_step_upon_what_another_application_renamed_leaves_the_key_to_who_stamps_it(w):
    bob, eve = [(await inserted(w, {"username": name})).id for name in ("Bob", "Eve")]
    w.documents.update_one({"_id": bob}, {"$set": {"username": "Robert"}})
    async with w.m.operation("Test") as op:
        op.update("users", eve, {"n": 1})
        op.also("users", bob, {"n": 1})
    await w.settle()
    await w.reconcile()  # it is in debt still: no sweep has to come by
    assert w.notes(bob)["keys"] == {"username": "robert"}


async def test_a_sweep_stamps_what_another_application_named_before_a_backfill_copied_it(open_world):
    w = await open_world("mongo_only", foreign_writers=True)
    bob = w.documents.insert_one({"username": "Bob"}).inserted_id
    await w.m.prepare()
    w.documents.update_one({"_id": bob}, {"$set": {"username": "Robert"}})
    eve = w.documents.insert_one({"username": "Eve"}).inserted_id
    await w.set_phase("dual_write")
    for id_ in (bob, eve):
        image = await w.image(id_)
        rows = w.entity.to_rows(image.document, image.keys or None)
        await w.postgres.apply(
            [(w.entity, image, rows)], migration="accounts", epoch=w.control.epoch, timeout=PATIENCE
        )
    await swept(w)
    assert await swept(w) == 0
    assert [w.notes(id_)["keys"]["username"] for id_ in (bob, eve)] == ["robert", "eve"]
    for name in ("ROBERT", "EVE"):
        with pytest.raises(DuplicateKey):
            await w.users.insert({"username": name})
    assert (await w.users.find_by_key("username", "ROBERT")).id == bob
    await inserted(w, {"username": "BOB"})


async def test_a_sweep_leaves_the_key_of_a_rule_that_only_another_release_has(open_world):
    """Else workers of two releases would lift the same records against each other."""
    w = await open_world()
    made = await inserted(w, {"username": "Bob"})
    w.documents.update_one({"_id": made.id}, {"$set": {f"{CF}.keys.email": "bob@example.org"}})
    assert await swept(w) == 0
    assert w.notes(made.id)["keys"] == {"username": "bob", "email": "bob@example.org"}


@pytest.mark.parametrize("how", ["update", "lift", "rollback", "undo"])
async def test_a_write_leaves_the_key_of_a_rule_that_only_another_release_has(open_world, how):
    """Else others could take the name from workers of that release, until their sweep comes by."""
    w = await open_world()
    made = await inserted(w, {"username": "Bob"})
    w.documents.update_one({"_id": made.id}, {"$set": {f"{CF}.keys.email": "bob@example.org"}})
    if how == "lift":
        await w.settler.lift(w.entity, made.id, above=0, control=w.control)
    else:
        strategy = None if how == "update" else FailureStrategy.ROLLBACK_BOTH
        n = 666 if how == "undo" else 1  # which PostgreSQL alone refuses
        with pytest.raises(Undone) if how == "undo" else contextlib.nullcontext():
            await w.users.update(made.id, {"username": "Robert", "n": n}, strategy=strategy)
    await w.reconcile()
    assert w.notes(made.id)["keys"]["email"] == "bob@example.org"
    await w.assert_equal()


async def test_init_gives_a_name_that_another_application_moved_on_to_who_has_it(open_world):
    w = await open_world("mongo_only", foreign_writers=True)
    x = w.documents.insert_one({"username": "Bob"}).inserted_id
    await w.m.prepare()
    w.documents.update_one({"_id": x}, {"$set": {"username": "Xavier"}})
    y = w.documents.insert_one({"username": "Bob"}).inserted_id
    assert (await w.m.prepare()).colliding == {"username": []}
    assert [w.notes(id_)["keys"]["username"] for id_ in (x, y)] == ["xavier", "bob"]
    with pytest.raises(DuplicateKey):
        await w.users.insert({"username": "BOB"})


@pytest.mark.parametrize("phase", ["mongo_only", "postgres_read"])
async def test_a_name_that_is_given_away_before_its_holder_takes_it_back_is_the_others(
    open_world, monkeypatch, phase
):
    w = await open_world(phase, foreign_writers=True)
    bob = (await inserted(w, {"username": "Bob"})).id
    w.documents.update_one({"_id": bob}, {"$set": {"username": "Robert"}})
    set_ = w.mongo.compare_and_set

    async def given_away_before(entity, id_, **how):
        monkeypatch.setattr(w.mongo, "compare_and_set", set_)
        await w.users.insert({"username": "BOB"})
        return await set_(entity, id_, **how)

    monkeypatch.setattr(w.mongo, "compare_and_set", given_away_before)
    with pytest.raises(DuplicateKey):
        await w.users.update(bob, {"username": "bob"})
    assert w.document(bob)["username"] == "Robert"
    assert w.notes(bob)["keys"] == {"username": "robert"}
    if phase != "mongo_only":
        await w.settle()
        await swept(w)


async def test_a_key_that_was_stamped_anew_for_another_who_then_died_is_brought_to_postgres(
    open_world, monkeypatch
):
    w = await open_world("mongo_only", foreign_writers=True)
    bob = w.documents.insert_one({"username": "Bob"}).inserted_id
    await w.m.prepare()
    w.documents.update_one({"_id": bob}, {"$set": {"username": "Robert"}})
    await w.set_phase("postgres_read")
    image = await w.image(bob)  # as a backfill copies it
    rows = w.entity.to_rows(image.document, image.keys)
    await w.postgres.apply(
        [(w.entity, image, rows)], migration="accounts", epoch=w.control.epoch, timeout=PATIENCE
    )
    insert, dying = w.mongo.insert, []

    async def dies(*of, **how):
        if dying:
            raise asyncio.CancelledError
        dying.append(True)
        await insert(*of, **how)

    monkeypatch.setattr(w.mongo, "insert", dies)
    with pytest.raises(asyncio.CancelledError):
        await w.users.insert({"username": "BOB"})
    monkeypatch.undo()
    await swept(w)
    assert w.notes(bob)["keys"] == {"username": "robert"}
    assert (await w.row(bob)).keys == {"username": "robert"}


@pytest.mark.parametrize("phase", ["mongo_only", "postgres_read"])
async def test_a_key_that_was_made_unique_is_not_free_to_a_name_that_is_spelt_like_it(open_world, phase):
    w = await open_world(phase, foreign_writers=True)
    await inserted(w, {"username": "Bob"})
    other = w.documents.insert_one({"username": "BOB"}).inserted_id
    await w.users.update(other, {"n": 1})
    own = {"username": f"bob#{other}"}
    assert w.notes(other)["keys"] == own
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(DuplicateKey):
            await w.users.insert(own)
    assert w.notes(other)["keys"] == own
    if phase != "mongo_only":
        await w.settle()
        await swept(w)
