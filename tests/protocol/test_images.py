"""Images at the secondary: idempotent, in any order, guarded by revision and tombstone."""

import asyncio
import contextlib
import itertools
from dataclasses import replace
from datetime import UTC, datetime

import psycopg
import pytest
from bson import ObjectId

from crossfade import StoreUnavailable
from crossfade.record import CF, Applied, DebtKey, Image, Settled, new_operation
from crossfade.stores.errors import Fenced
from crossfade.testing.failure_points import Failure, FailurePoints, Killed
from crossfade.values import id_to_text

from .conftest import PATIENCE, World, eventually, users_entity


def image_of(id_, rev, *, op=None, **fields):
    document = {"_id": id_, "username": "Bob", **fields, CF: {"rev": rev, "op": op or new_operation()}}
    return Image.from_document(document)


async def apply(w: World, image: Image, *, epoch=None):
    [(verdict, held)] = await w.postgres.apply(
        [(w.entity, image, w.entity.to_rows(image.document, image.keys))],
        migration="accounts",
        epoch=w.control.epoch if epoch is None else epoch,
        timeout=PATIENCE,
    )
    return verdict, held


async def apply_delete(w: World, id_, rev):
    return await w.postgres.apply_delete(
        w.entity,
        id_,
        rev=rev,
        op=new_operation(),
        migration="accounts",
        epoch=w.control.epoch,
        timeout=PATIENCE,
    )


async def test_a_late_image_never_replaces_a_newer_one(open_world):
    w = await open_world()
    id_ = ObjectId()
    friends = [ObjectId() for _ in range(3)]
    images = [image_of(id_, rev, n=rev, friends=friends[:rev]) for rev in (1, 2, 3)]
    for order in itertools.permutations(images):
        w.sql("DELETE FROM user_friends")
        w.sql("DELETE FROM users")
        for image in order:
            await apply(w, image)
        assert (await w.row(id_)).document == images[-1].document


ODD = [
    {}, {"n": None}, {"n": 2**40}, {"n": 1.5}, {"n": "seven"}, {"n": True}, {"friends": []},
    {"friends": [ObjectId()] * 2},
    {"friends": [ObjectId(), "not an id", None]}, {"friends": "none"}, {"updatedAt": datetime(1, 1, 1, tzinfo=UTC)},
    {"updatedAt": "yesterday"}, {"username": 'a "quoted" \\ name, {with} NULL'}, {"username": "NULL"}, {"username": ""},
    {"other": {"nested": [1, 2.0, None, {"x": b"\0"}]}}, {"n": 7, "friends": [ObjectId() for _ in range(40)]},
]  # fmt: skip


async def test_images_applied_together_are_what_they_are_one_by_one(open_world):
    w = await open_world()
    seen = {}
    for way in ("together", "one by one"):
        images = []
        for number, fields in enumerate([*ODD, *ODD]):
            named = {"username": f"user {number}", **({"n": 1} if number % 2 else {}), **fields}
            document = {"_id": ObjectId(), **named, CF: {"rev": 3, "op": new_operation()}}
            image = Image.from_document(document)
            keys = {"username": f"key {number}"}
            images.append(replace(image, keys=keys))
        # What stands there already: older, newer, a fork, a tombstone below and above.
        for number, image in enumerate(images):
            before = replace(
                image, op=new_operation(), digest=b"another content.", keys={"username": f"k{number}"}
            )
            match number % 6:
                case 1:
                    await apply(w, replace(before, rev=2))
                case 2:
                    await apply(w, replace(before, rev=4))
                case 3:
                    await apply(w, before)
                case 4:
                    await apply_delete(w, image.id, 2)
                case 5:
                    await apply_delete(w, image.id, 3)
        given = [(w.entity, image, w.entity.to_rows(image.document, image.keys)) for image in images]
        together = [given] if way == "together" else [[each] for each in given]
        answers = [
            answer
            for some in together
            for answer in await w.postgres.apply(
                some, migration="accounts", epoch=w.control.epoch, timeout=PATIENCE
            )
        ]
        rows = [await w.row(image.id) for image in images]
        shown = [
            None if row is None else (row.rev, row.digest == image.digest, {**row.document, "_id": 0})
            for row, image in zip(rows, images, strict=True)
        ]
        verdicts = [
            (verdict, held.rev, held.tombstone, held.digest == image.digest)
            for (verdict, held), image in zip(answers, images, strict=True)
        ]
        seen[way] = (verdicts, shown)
        w.sql("TRUNCATE users CASCADE")
    assert seen["together"] == seen["one by one"]
    assert {verdict for verdict, *_ in seen["together"][0]} == {Applied.APPLIED, Applied.BEHIND}


async def test_an_image_is_applied_once_and_then_the_same(open_world):
    w = await open_world()
    image = image_of(ObjectId(), 4)
    assert (await apply(w, image))[0] is Applied.APPLIED
    assert (await apply(w, image))[0] in (Applied.APPLIED, Applied.SAME)
    retry = image_of(image.id, 4)
    assert (await apply(w, retry))[0] is Applied.SAME


async def test_equal_revision_and_other_content_is_behind_and_changes_nothing(open_world):
    w = await open_world()
    image = image_of(ObjectId(), 4, n=1)
    await apply(w, image)
    verdict, held = await apply(w, image_of(image.id, 4, n=2))
    assert verdict is Applied.BEHIND
    assert (held.rev, held.digest) == (4, image.digest)
    assert (await w.row(image.id)).document == image.document


async def test_an_equal_digest_under_an_older_mapping_is_applied_again(open_world):
    w = await open_world()
    image = image_of(ObjectId(), 4)
    await apply(w, image)
    newer = await open_world(entity=users_entity(mapping_version=2))
    assert (await apply(newer, image))[0] is not Applied.BEHIND
    assert w.sql("SELECT cf_mapping FROM users") == [(2,)]
    # A worker of the older release confirms it, and does not take it back.
    assert (await apply(w, image))[0] is not Applied.BEHIND
    assert w.sql("SELECT cf_mapping FROM users") == [(2,)]


async def test_a_sweep_brings_rows_of_an_older_mapping_anew_under_their_revision(open_world):
    w = await open_world()
    made = await w.users.insert({"username": "Bob"})
    await w.settle()
    newer = await open_world(entity=users_entity(mapping_version=2))
    assert await newer.m.reconciler.full_sweep() == 1
    assert w.sql("SELECT cf_mapping, cf_rev FROM users") == [(2, made.rev)]
    assert await newer.m.reconciler.full_sweep() == 0
    await newer.assert_equal()


async def test_no_image_at_or_under_a_tombstone_comes_back(open_world):
    w = await open_world()
    id_ = ObjectId()
    await apply(w, image_of(id_, 4))
    await apply_delete(w, id_, 5)
    for rev in (1, 4, 5):
        verdict, held = await apply(w, image_of(id_, rev))
        assert verdict is Applied.BEHIND
        assert held.tombstone == 5
        assert await w.row(id_) is None
    assert (await apply(w, image_of(id_, 6)))[0] is Applied.APPLIED
    assert (await w.row(id_)).rev == 6


async def test_a_late_delete_leaves_a_newer_record_alone(open_world):
    w = await open_world()
    id_ = ObjectId()
    await apply(w, image_of(id_, 7))
    verdict, _ = await apply_delete(w, id_, 5)
    assert verdict is Applied.BEHIND
    assert (await w.row(id_)).rev == 7


@pytest.mark.parametrize("row_before", [True, False], ids=["row there", "no row yet"])
async def test_an_image_that_races_a_delete_leaves_no_row_under_the_tombstone(
    open_world, database_url, row_before
):
    """Of two transactions that cannot see each other's rows, each is right and both together are wrong."""
    w = await open_world()
    id_ = ObjectId()
    key = id_to_text(id_)
    if row_before:
        await apply(w, image_of(id_, 2))
    async with await psycopg.AsyncConnection.connect(database_url) as deleting:
        # The delete at revision 4, held open before its commit.
        await deleting.execute(
            "INSERT INTO crossfade.tombstones (entity, id, rev, op) VALUES ('users', %s, 4, gen_random_uuid())",
            [key],
        )
        await deleting.execute("DELETE FROM users WHERE id = %s", [key])
        if not row_before:
            # Makes the image wait at the same point: its snapshot is taken, its row is not in yet.
            await deleting.execute(
                "INSERT INTO users (id, username, username_norm, extra, cf_rev, cf_digest, cf_mapping) "
                "VALUES (%s, 'x', 'x', '{}', 0, '', 0)",
                [key],
            )
            await deleting.execute("DELETE FROM users WHERE id = %s", [key])
        late = asyncio.create_task(apply(w, image_of(id_, 3)))

        async def waits() -> bool:
            return bool(
                w.sql(
                    "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
                )
            )

        await eventually(waits)
        await deleting.commit()
    await late
    assert await w.row(id_) is None


async def test_a_row_above_the_primary_is_not_a_confirmation_the_primary_is_lifted_over_it(open_world):
    w = await open_world()
    made = await w.users.insert({"username": "Bob", "n": 1})
    stray = image_of(made.id, 9, n=99)
    await apply(w, stray)
    changed = await w.users.update(made.id, {"n": 2})
    assert changed.rev == 2
    await w.reconcile()
    assert w.document(made.id)["n"] == (await w.row(made.id)).document["n"] == 2
    assert (await w.row(made.id)).rev > 9
    # What no revision of the primary ever held is kept for a person.
    assert w.conflicts() == [("postgres", stray.document)]
    await w.assert_equal()


async def test_a_fork_at_equal_revision_is_reported_and_lifted(open_world):
    w = await open_world()
    made = await w.users.insert({"username": "Bob", "n": 1})
    fork = image_of(made.id, 2, n=99)
    await apply(w, fork)
    await w.users.update(made.id, {"n": 2})
    await w.reconcile()
    assert (await w.row(made.id)).document["n"] == 2
    assert w.conflicts() == [("postgres", fork.document)]
    await w.assert_equal()


async def test_a_row_above_a_delete_is_journaled_and_goes(open_world):
    w = await open_world()
    made = await w.users.insert({"username": "Bob"})
    stray = image_of(made.id, 9, n=99)
    await apply(w, stray)
    await w.users.delete(made.id)
    await w.reconcile()
    assert await w.row(made.id) is None
    assert w.conflicts() == [("postgres", stray.document)]
    await w.assert_equal()


async def test_settling_matches_revision_operation_and_sending(open_world):
    w = await open_world()
    made = await w.users.insert({"username": "Bob"})
    await w.settle()
    w.documents.update_one({"_id": made.id}, {"$set": {f"{CF}.debt": {"epoch": 1, "sending": "a"}}})
    right = DebtKey(made.id, 1, w.notes(made.id)["op"], "a")
    for wrong in ({"rev": 2}, {"op": new_operation()}, {"sending": "b"}, {"sending": None}):
        await w.mongo.settle(w.entity, [right._replace(**wrong)], timeout=PATIENCE)
        assert w.debt(made.id) is not None
    await w.mongo.settle(w.entity, [right], timeout=PATIENCE)
    assert w.debt(made.id) is None


async def test_a_debt_stands_until_what_goes_on_behind_the_commit_has_succeeded(open_world, monkeypatch):
    w = await open_world()
    look_again = w.postgres._look_again

    async def fails(*_about, **_how):
        monkeypatch.setattr(w.postgres, "_look_again", look_again)
        raise StoreUnavailable("postgres", "gone behind the commit")

    monkeypatch.setattr(w.postgres, "_look_again", fails)
    made = await w.users.insert({"username": "Bob"})
    await w.settle()
    assert (await w.row(made.id)).rev == 1
    assert w.debt(made.id) is not None
    await w.reconcile()
    assert w.debt(made.id) is None
    await w.assert_equal()


async def test_an_image_of_another_epoch_is_refused_and_its_debt_stays(open_world):
    w = await open_world()
    with pytest.raises(Fenced):
        await apply(w, image_of(ObjectId(), 1), epoch=w.control.epoch - 1)
    with pytest.raises(Fenced):
        await w.postgres.apply_delete(
            w.entity, ObjectId(), rev=1, op=new_operation(), migration="accounts",
            epoch=w.control.epoch + 1, timeout=PATIENCE,
        )  # fmt: skip
    assert w.sql("SELECT * FROM users") == w.sql("SELECT * FROM crossfade.tombstones") == []


# --- a delete that stopped half way ---


async def decided(w: World, id_):
    """The first step of a delete alone: as left by a worker that died after it."""
    rev = w.notes(id_)["rev"] + 1
    op = new_operation()
    image = await w.mongo.compare_and_set(
        w.entity, id_, rev=rev - 1,
        set_={f"{CF}.rev": rev, f"{CF}.op": op, f"{CF}.deleted": True, f"{CF}.debt": {"epoch": w.control.epoch}},
        timeout=PATIENCE,
    )  # fmt: skip
    assert image is not None
    return rev, op


async def bury(w, id_, rev, op):
    await w.mongo.bury(w.entity, id_, rev=rev, op=op, owed=True, timeout=PATIENCE)


async def remove(w, id_, rev, op):
    assert await w.mongo.remove(w.entity, id_, rev=rev, op=op, timeout=PATIENCE)


async def to_postgres(w, id_, rev, op):
    await w.postgres.apply_delete(
        w.entity, id_, rev=rev, op=op, migration="accounts", epoch=w.control.epoch, timeout=PATIENCE
    )


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
async def test_a_decided_delete_is_finished_by_the_reconciler_from_wherever_it_stopped(open_world, steps):
    w = await open_world()
    made = await w.users.insert({"username": "Bob", "friends": [ObjectId()]})
    await w.settle()
    rev, op = await decided(w, made.id)
    for step in (bury, remove, to_postgres)[:steps]:
        await step(w, made.id, rev, op)
    await w.m.board.refresh()
    assert await w.users.get(made.id) is None  # gone for readers from the moment it was decided
    await w.reconcile()
    assert w.document(made.id) is None
    assert await w.row(made.id) is None
    assert w.sql("SELECT * FROM user_friends") == []
    assert w.tombstone_in_postgres(made.id) == rev
    await w.assert_equal()


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
async def test_an_id_whose_delete_is_half_done_may_be_made_again_above_its_tombstone(open_world, steps):
    w = await open_world()
    made = await w.users.insert({"username": "Bob"})
    await w.settle()
    rev, op = await decided(w, made.id)
    for step in (bury, remove, to_postgres)[:steps]:
        await step(w, made.id, rev, op)
    again = await w.users.insert({"_id": made.id, "username": "Bob", "n": 2})
    assert again.rev > rev
    await w.reconcile()
    assert (await w.row(made.id)).document["n"] == 2
    await w.assert_equal()


async def test_a_name_is_free_as_soon_as_its_delete_is_decided(open_world):
    """Whoever decided it has died behind that; in PostgreSQL the row still holds the name."""
    w, dying = await open_world(), await open_world()
    gone, other = await w.users.insert({"username": "Bob"}), await w.users.insert({"username": "Eve"})
    await w.settle()
    points = FailurePoints(dying.cf)
    await points.run(lambda: dying.users.delete(other.id))
    decides = next(point for point in points.points if point.call.endswith("find_one_and_update"))
    points.plan({decides.place: Failure.KILLED_AFTER})
    with contextlib.suppress(Killed):
        await points.run(lambda: dying.users.delete(gone.id))
    points.end()
    assert w.notes(gone.id)["deleted"]
    again = await w.users.insert({"username": "bob"})
    assert again.id != gone.id
    # At once, and not by a reconciler's luck with the order.
    assert await w.row(again.id) is not None
    assert "parked" not in (w.debt(again.id) or {})
    await w.reconcile()
    assert [name for (name,) in w.sql("SELECT username FROM users")] == ["bob"]
    await w.assert_equal()


async def test_a_document_made_under_an_unsettled_tombstone_is_lifted_above_it(open_world):
    """A foreign writer makes the id again between the removal and the second look."""
    w = await open_world()
    made = await w.users.insert({"username": "Bob"})
    await w.settle()
    rev, op = await decided(w, made.id)
    await bury(w, made.id, rev, op)
    await remove(w, made.id, rev, op)
    w.documents.insert_one({"_id": made.id, "username": "Bob", "n": 5})
    settled = await w.settler.bring_tombstone(w.entity, made.id, w.control, timeout=PATIENCE)
    assert settled is Settled.CONFIRMED
    await w.reconcile()
    assert (await w.row(made.id)).document["n"] == 5
    assert w.notes(made.id)["rev"] > rev
    await w.assert_equal()


async def test_a_late_image_of_a_deleted_record_is_superseded_and_does_not_bring_it_back(open_world):
    w = await open_world()
    made = await w.users.insert({"username": "Bob"})
    late = await w.image(made.id)
    await w.users.delete(made.id)
    assert await w.settler.bring(w.entity, late, w.control, timeout=PATIENCE) is Settled.SUPERSEDED
    await w.assert_equal()
    assert await w.row(made.id) is None


async def test_an_insert_that_arrives_again_while_its_tombstone_is_brought_does_not_come_back(
    open_world, monkeypatch
):
    w = await open_world()
    made = await w.users.insert({"username": "Bob"})
    late, apply_delete = w.document(made.id), w.postgres.apply_delete
    await w.users.delete(made.id)

    async def overtaken(*record, **how):
        monkeypatch.setattr(w.postgres, "apply_delete", apply_delete)
        answer = await apply_delete(*record, **how)
        w.documents.insert_one(late)
        return answer

    monkeypatch.setattr(w.postgres, "apply_delete", overtaken)
    settled = await w.settler.bring_tombstone(w.entity, made.id, w.control, timeout=PATIENCE)
    assert settled is Settled.CONFIRMED
    assert w.document(made.id) is None
    assert await w.row(made.id) is None
    await w.assert_equal()
