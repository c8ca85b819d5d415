"""A picture of megabytes does not travel with every small write, and is never the wrong one."""

import asyncio
import contextlib

import pytest
from bson import CodecOptions, ObjectId
from bson.int64 import Int64
from bson.raw_bson import RawBSONDocument

from crossfade import FailureStrategy, Undone
from crossfade.bulk.backfill import Backfill
from crossfade.bulk.findings import Finding
from crossfade.bulk.verify import Verify
from crossfade.errors import ConditionNotMet, PartLeftOut
from crossfade.record import CF, new_operation
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres
from crossfade.values import id_to_text

from .conftest import BOTH_PRIMARIES, MONGO_PHASES, PATIENCE, users_entity

OLD, NEW, FOREIGN = (letter * 200_000 for letter in (b"o", b"n", b"f"))
#: What a small write and its debt move in all, in bytes: far less than a picture.
SMALL = 60_000
both_directions = pytest.mark.parametrize("phase", BOTH_PRIMARIES)
mongo_decides = pytest.mark.parametrize("phase", MONGO_PHASES)


@pytest.fixture
def open_pictured(open_world):
    """Opens workers of users with pictures."""

    async def open_(phase, **how):
        return await open_world(phase, entity=users_entity(pictures=True), **how)

    return open_


async def with_picture(w, name="Bob", **fields):
    """A user with a picture that both stores hold, and that the secondary has confirmed."""
    made = await w.users.insert({"username": name, "picture": OLD, "n": 1, "friends": [], **fields})
    await w.reconcile()
    return made


class Moved:
    """How many bytes go through these proxies, in either direction."""

    def __init__(self, *proxies):
        self.proxies = proxies
        self.before = self.passed()

    def passed(self):
        return sum(proxy.counts.passed for proxy in self.proxies)

    def bytes(self):
        return self.passed() - self.before


def part_of_row(w, id_):
    """What PostgreSQL notes of a picture: the revision that brought it, and its length."""
    rows = w.sql("SELECT cf_rev, octet_length(data) FROM user_pictures WHERE user_id = %s", id_to_text(id_))
    return rows[0] if rows else None


def part_of_document(w, id_):
    return w.notes(id_).get("parts", {}).get("picture", {}).get("rev")


async def picture_in_postgres(w, id_):
    return (await w.row(id_)).document.get("picture")


# --- small writes are small -------------------------------------------------------------------------------


@both_directions
async def test_a_log_in_does_not_carry_the_picture(open_pictured, mongo_proxy, postgres_proxy, phase):
    w = await open_pictured(phase, mongo=mongo_proxy, postgres=postgres_proxy)
    made = await with_picture(w)
    moved = Moved(mongo_proxy, postgres_proxy)
    found = await w.users.find_by_key("username", "bob", parts=False)
    after = await w.users.update(found.id, {"n": 2})
    await w.settle()
    assert moved.bytes() < SMALL
    assert after.rev == 2
    await w.reconcile()
    await w.assert_equal()
    assert part_of_row(w, made.id) == (1, len(OLD))
    assert part_of_document(w, made.id) == 1
    assert (await w.users.get(made.id))["picture"] == OLD


@both_directions
async def test_a_record_that_was_read_without_its_picture_says_so(open_pictured, phase):
    w = await open_pictured(phase)
    made = await with_picture(w)
    without = await w.users.insert({"username": "Eve"})
    for record in (
        await w.users.get(made.id, parts=False),
        await w.users.find_by_key("username", "Bob", parts=False),
        (await w.users.find({"n": 1}, parts=False))[0],
        (await w.users.get_many([made.id], parts=False))[0],
        # Whether she has one is not known either.
        await w.users.get(without.id, parts=False),
    ):
        assert record.without == {"picture"}
        assert "picture" not in record.document
        for ask in (record.get, record.__getitem__):
            with pytest.raises(PartLeftOut, match="picture"):
                ask("picture")
        assert record["username"] in ("Bob", "Eve")
    whole = await w.users.get(made.id)
    assert (whole.without, whole["picture"]) == (frozenset(), OLD)
    assert (await w.users.get(without.id)).get("picture") is None


@both_directions
async def test_a_write_upon_a_record_that_is_held_is_small_too(
    open_pictured, mongo_proxy, postgres_proxy, phase
):
    w = await open_pictured(phase, mongo=mongo_proxy, postgres=postgres_proxy)
    await with_picture(w)
    held = await w.users.find_by_key("username", "Bob")
    assert held["picture"] == OLD
    moved = Moved(mongo_proxy, postgres_proxy)
    for n in range(2, 6):
        held = await w.users.update(held.id, {"n": n})
    await w.settle()
    assert moved.bytes() < SMALL
    await w.reconcile()
    await w.assert_equal()


@both_directions
async def test_a_friend_request_is_accepted_without_a_picture(
    open_pictured, mongo_proxy, postgres_proxy, phase
):
    w = await open_pictured(phase, mongo=mongo_proxy, postgres=postgres_proxy)
    bob, ann = await with_picture(w, "Bob", status="pending"), await with_picture(w, "Ann")
    moved = Moved(mongo_proxy, postgres_proxy)
    async with w.m.operation("Friend Accept") as op:
        op.update("users", bob.id, {"status": "accepted"}, where={"status": "pending"})
        op.also("users", ann.id, add={"friends": [bob.id]})
    await w.settle()
    assert moved.bytes() < 2 * SMALL
    await w.reconcile()
    await w.assert_equal()
    assert await picture_in_postgres(w, ann.id) == OLD


@both_directions
async def test_a_condition_on_a_picture_and_a_step_upon_one_see_its_value(open_pictured, phase):
    w = await open_pictured(phase)
    bob, ann = await with_picture(w, "Bob"), await with_picture(w, "Ann")
    await w.users.update(ann.id, {"picture": [OLD]})
    await w.reconcile()
    with pytest.raises(ConditionNotMet):
        await w.users.update(bob.id, {"n": 2}, where={"picture": NEW})
    async with w.m.operation("Paint") as op:
        op.update("users", bob.id, {"n": 3}, where={"picture": OLD})
        op.also("users", ann.id, add={"picture": [NEW]})
    assert (await w.users.get(bob.id))["n"] == 3
    assert (await w.users.get(ann.id))["picture"] == [OLD, NEW]
    await w.reconcile()
    await w.assert_equal()


@mongo_decides
@pytest.mark.parametrize("users", [3, 60], ids=["one by one", "together"])
async def test_debts_that_do_not_owe_the_picture_are_settled_without_it(
    open_pictured, mongo_proxy, postgres_proxy, phase, users
):
    w = await open_pictured(phase, mongo=mongo_proxy, postgres=postgres_proxy)
    made = [await with_picture(w, f"User{n}") for n in range(users)]
    postgres_proxy.refuse()
    for each in made:
        await w.users.update(each.id, {"n": 2})
        assert "parts" not in w.debt(each.id)
    postgres_proxy.pass_through()
    await w.postgres_answers()
    moved = Moved(mongo_proxy, postgres_proxy)
    await w.reconcile()
    assert moved.bytes() < users * SMALL
    await w.assert_equal()


@both_directions
async def test_whether_and_where_a_record_has_a_picture_is_kept_through_small_writes(open_pictured, phase):
    w = await open_pictured(phase)
    first = await w.users.insert({"picture": OLD, "username": "Ann", "a": 1, "b": [2], "n": 1})
    last = await w.users.insert({"username": "Bob", "n": 1, "picture": OLD})
    none = await w.users.insert({"username": "Eve", "n": 1, "picture": None, "a": 1})
    for made in (first, last, none):
        await w.reconcile()
        await w.users.update(made.id, {"n": 2, "c": "new"})
        await w.users.update(made.id, {"a": 3}, unset=["b", "n"])
        await w.users.update(made.id, {"n": 4})
        await w.reconcile()
        await w.assert_equal()
    expected = {"_id": first.id, "picture": OLD, "username": "Ann", "a": 3, "c": "new", "n": 4}
    assert list((await w.users.get(first.id)).document.items()) == list(expected.items())


# --- what is owed is brought ----------------------------------------------------------------------------------


@mongo_decides
@pytest.mark.parametrize("brought_by", ["the next write", "a reconciler"])
async def test_a_picture_in_debt_arrives_with_the_next_image(
    open_pictured, postgres_proxy, phase, brought_by
):
    w = await open_pictured(phase, postgres=postgres_proxy)
    made = await with_picture(w)
    postgres_proxy.refuse()
    await w.users.update(made.id, {"picture": NEW})
    await w.users.update(made.id, {"n": 2})
    assert w.debt(made.id)["parts"] == ["picture"]
    assert part_of_document(w, made.id) is None
    postgres_proxy.pass_through()
    await w.postgres_answers()
    if brought_by == "the next write":
        w.m.pair.postgres_breaker.succeeded()
        await w.users.update(made.id, {"n": 3})
        assert await picture_in_postgres(w, made.id) == NEW
    await w.reconcile()
    await w.assert_equal()
    assert part_of_document(w, made.id) == part_of_row(w, made.id)[0]


async def test_the_outbox_names_the_picture_until_mongo_has_it(open_pictured, mongo_proxy):
    w = await open_pictured("postgres_primary", mongo=mongo_proxy)
    made = await with_picture(w)
    mongo_proxy.refuse()
    await w.users.update(made.id, {"picture": NEW})
    await w.users.update(made.id, {"n": 2})
    assert w.sql("SELECT parts FROM crossfade.outbox") == [(["picture"],)]
    mongo_proxy.pass_through()
    await w.reconcile()
    await w.assert_equal()
    assert w.document(made.id)["picture"] == NEW
    assert part_of_document(w, made.id) == 2


@both_directions
async def test_a_picture_as_large_as_they_come_is_changed(open_pictured, phase):
    w = await open_pictured(phase, primary_deadline=PATIENCE, secondary_deadline=PATIENCE)
    made = await w.users.insert({"username": "Bob", "picture": b"o" * 10 * 2**20})
    await w.reconcile()
    new = b"n" * 10 * 2**20
    await w.users.update(made.id, {"picture": new})
    await w.reconcile()
    await w.assert_equal()
    assert w.document(made.id)["picture"] == new


async def test_a_record_that_is_too_large_for_mongo_is_parked_with_the_cause(open_world):
    w = await open_world("postgres_primary", primary_deadline=PATIENCE, secondary_deadline=PATIENCE)
    made = await w.users.insert({"username": "Bob"})
    await w.users.update(made.id, {"x": b"x" * (16 * 2**20 - 60)})
    [(_, rev, _, parked)] = w.outbox()
    assert (rev, parked.startswith("MongoDB cannot hold this document")) == (2, True)
    await w.users.update(made.id, {"x": b"x"})
    await w.reconcile()
    await w.assert_equal()
    assert w.document(made.id)["x"] == b"x"


@both_directions
@pytest.mark.parametrize("there", ["changed", "made null", "removed", "misfit"])
async def test_a_picture_is_changed_and_taken_away(open_pictured, phase, there):
    w = await open_pictured(phase)
    made = await with_picture(w)
    match there:
        case "changed":
            await w.users.update(made.id, {"picture": NEW})
        case "made null":
            await w.users.update(made.id, {"picture": None})
        case "removed":
            await w.users.update(made.id, unset=["picture"])
        case "misfit":  # bytea holds no text: it goes to `extra`, and travels
            await w.users.update(made.id, {"picture": "a text"})
    for n in (2, 3):
        await w.reconcile()
        await w.assert_equal()
        await w.users.update(made.id, {"n": n})
    await w.reconcile()
    await w.assert_equal()
    row = part_of_row(w, made.id)
    assert row == ((2, len(NEW)) if there == "changed" else None)
    assert part_of_document(w, made.id) == (2 if there == "changed" else None)


@mongo_decides
@pytest.mark.parametrize(
    "lacks",
    [
        "DELETE FROM user_pictures",
        "UPDATE user_pictures SET cf_rev = 0",
        "UPDATE user_pictures SET cf_digest = '\\x00', data = 'a fork'",
        "UPDATE user_pictures SET cf_rev = NULL, cf_digest = NULL",
    ],
)
async def test_a_row_that_does_not_hold_just_this_picture_gets_the_whole_image(open_pictured, phase, lacks):
    w = await open_pictured(phase)
    made = await with_picture(w)
    w.sql(lacks)
    await w.users.update(made.id, {"n": 2})
    assert await picture_in_postgres(w, made.id) == OLD
    await w.reconcile()
    await w.assert_equal()
    assert part_of_row(w, made.id)[1] == len(OLD)


async def test_a_small_image_that_a_row_does_not_take_is_not_left_to_a_later_writer(open_pictured):
    w, reader = [await open_pictured("postgres_read", board_age=PATIENCE) for _ in range(2)]
    made = await with_picture(w)
    w.sql("UPDATE users SET cf_mapping = 0")
    await reader.owed()
    read = w.mongo.read

    async def overtaken(entity, id_, **how):
        w.mongo.read = read
        # Its writer is killed before it has asked PostgreSQL.
        marks = {f"{CF}.rev": Int64(3), f"{CF}.op": new_operation(), f"{CF}.debt": {"epoch": 1}}
        await w.mongo.compare_and_set(entity, id_, rev=2, set_={"n": 3, **marks}, timeout=PATIENCE)
        return await read(entity, id_, **how)

    w.mongo.read = overtaken
    assert (await w.users.update(made.id, {"n": 2})).rev == 2
    assert w.notes(made.id)["rev"] == 3
    found = await reader.users.get(made.id)
    assert (found.source, found["n"]) == ("postgres", 3)
    await w.reconcile()
    await w.assert_equal()


async def test_rows_that_were_there_before_their_part_had_a_revision_are_written_whole(open_pictured):
    w = await open_pictured("postgres_primary")
    made = await with_picture(w)
    w.sql("UPDATE user_pictures SET cf_rev = NULL, cf_digest = NULL")
    w.documents.update_one({"_id": made.id}, {"$unset": {f"{CF}.parts": ""}})
    for n in (2, 3):
        await w.users.update(made.id, {"n": n})
        await w.reconcile()
        await w.assert_equal()
        assert part_of_row(w, made.id) == (2, len(OLD))


@mongo_decides
async def test_a_row_that_is_gone_comes_back_with_its_picture(open_pictured, phase):
    w = await open_pictured(phase)
    made = await with_picture(w)
    w.sql("DELETE FROM user_pictures")
    w.sql("DELETE FROM users")
    await w.users.update(made.id, {"n": 2})
    await w.reconcile()
    await w.assert_equal()
    assert await picture_in_postgres(w, made.id) == OLD


@mongo_decides
async def test_a_picture_written_in_phase_0_is_not_taken_for_the_one_that_postgres_has(open_pictured, phase):
    w = await open_pictured(phase)
    made = await with_picture(w)
    await w.set_phase("mongo_only")
    await w.users.update(made.id, {"picture": NEW})
    await w.set_phase(phase)
    await w.users.update(made.id, {"n": 2})
    await w.reconcile()
    await w.assert_equal()
    assert await picture_in_postgres(w, made.id) == NEW


@mongo_decides
async def test_a_picture_confirmed_while_it_is_being_replaced_is_not_taken_for_the_new_one(
    open_pictured, postgres_proxy, phase
):
    sound, troubled = await open_pictured(phase), await open_pictured(phase, postgres=postgres_proxy)
    postgres_proxy.refuse()
    made = await troubled.users.insert({"username": "Bob", "picture": OLD, "n": 1})
    look = troubled.mongo.notes

    async def confirmed_behind_the_look(*args, **how):
        seen = await look(*args, **how)
        await sound.reconcile()
        assert part_of_document(sound, made.id) == 1
        return seen

    troubled.mongo.notes = confirmed_behind_the_look
    await troubled.users.update(made.id, {"picture": NEW})
    troubled.mongo.notes = look
    assert part_of_document(sound, made.id) is None
    await sound.users.update(made.id, {"n": 2})
    await sound.reconcile()
    await sound.assert_equal()
    assert await picture_in_postgres(sound, made.id) == NEW


@both_directions
async def test_two_workers_one_of_whom_holds_an_older_picture(open_pictured, phase):
    w, other = await open_pictured(phase), await open_pictured(phase)
    made = await with_picture(w)
    held = await w.users.get(made.id)
    await other.users.update(made.id, {"picture": NEW})
    await w.users.update(held.id, {"n": 2})
    await w.reconcile()
    await w.assert_equal()
    assert (await w.users.get(made.id))["picture"] == NEW


# --- taken back, deleted, made again -----------------------------------------------------------------------


@both_directions
@pytest.mark.parametrize("change", [{"n": 2}, {"picture": NEW}, {"picture": NEW, "fresh": 1}], ids=str)
async def test_an_undo_leaves_the_picture_of_before(
    open_pictured, mongo_proxy, postgres_proxy, phase, change
):
    w = await open_pictured(phase, mongo=mongo_proxy, postgres=postgres_proxy)
    made = await with_picture(w)
    secondary = mongo_proxy if phase == "postgres_primary" else postgres_proxy
    secondary.refuse()
    with pytest.raises(Undone):
        await w.users.update(made.id, change, strategy=FailureStrategy.ROLLBACK_BOTH)
    secondary.pass_through()
    await w.postgres_answers()
    await w.reconcile()
    await w.assert_equal()
    record = await w.users.get(made.id)
    assert (record["picture"], record["n"], record.rev) == (OLD, 1, 3)
    await w.users.update(made.id, {"n": 5}, strategy=FailureStrategy.ROLLBACK_BOTH)
    await w.reconcile()
    await w.assert_equal()


@both_directions
async def test_an_id_that_is_made_again_has_no_older_picture(open_pictured, phase):
    w = await open_pictured(phase)
    made = await with_picture(w)
    await w.users.delete(made.id)
    await w.reconcile()
    assert part_of_row(w, made.id) is None
    again = await w.users.insert({"_id": made.id, "username": "Bob", "n": 1})
    await w.users.update(again.id, {"n": 2})
    await w.reconcile()
    await w.assert_equal()
    assert (await w.users.get(made.id)).get("picture") is None


@mongo_decides
async def test_a_row_ahead_of_the_primary_is_lifted_over_with_the_picture(open_pictured, phase):
    w = await open_pictured(phase)
    made = await with_picture(w)
    # A store restored from a backup: it holds a revision that MongoDB never had, and another picture.
    w.sql("UPDATE users SET cf_rev = 9, cf_digest = '\\x00'")
    w.sql("UPDATE user_pictures SET cf_rev = 9, data = %s", FOREIGN)
    await w.users.update(made.id, {"n": 2})
    await w.reconcile()
    await w.assert_equal()
    assert await picture_in_postgres(w, made.id) == OLD
    [(store, kept)] = w.conflicts()
    assert (store, kept["picture"]) == ("postgres", FOREIGN)


# --- other applications know nothing of it -------------------------------------------------------------------


async def verified(w, mongo_uri):
    """What a verify finds: how many of each kind."""
    source, target = BulkMongo(mongo_uri), await BulkPostgres.connect(w.database_url)
    try:
        report = await Verify(
            w.entity, source, target, migration="accounts", epoch=w.control.epoch, wait=0.0
        ).run(restart=True)
    finally:
        source.close()
        await target.close()
    return {name: count for name, count in report.counts.findings.items() if count}


@mongo_decides
@pytest.mark.parametrize("value", [FOREIGN, None, "a text"], ids=["another", "null", "misfit"])
async def test_a_picture_changed_by_another_application_is_found(open_pictured, mongo_uri, phase, value):
    w = await open_pictured(phase, foreign_writers=True)
    made = await with_picture(w)
    w.documents.update_one({"_id": made.id}, {"$set": {"picture": value}})
    await w.users.update(made.id, {"n": 2})  # without a look at it
    await w.settle()
    assert await picture_in_postgres(w, made.id) == OLD
    assert await verified(w, mongo_uri) == {Finding.FOREIGN_WRITE: 1}
    assert await w.m.reconciler.full_sweep() == 1
    await w.reconcile()
    await w.assert_equal()
    assert await verified(w, mongo_uri) == {}
    await w.users.update(made.id, {"n": 3})
    await w.reconcile()
    await w.assert_equal()


async def test_the_sweep_by_date_finds_a_picture_and_does_not_read_one_for_a_log_in(
    open_pictured, mongo_proxy
):
    from datetime import UTC, datetime

    w = await open_pictured("postgres_read", mongo=mongo_proxy, foreign_writers=True)
    made = await with_picture(w, updatedAt=datetime.now(UTC))
    await w.users.update(made.id, {"updatedAt": datetime.now(UTC)})
    await w.settle()
    moved = Moved(mongo_proxy)
    assert await w.m.reconciler.sweep() == 0
    assert moved.bytes() < SMALL
    w.documents.update_one({"_id": made.id}, {"$set": {"picture": FOREIGN, "updatedAt": datetime.now(UTC)}})
    assert await w.m.reconciler.sweep() == 1
    await w.reconcile()
    await w.assert_equal()
    assert await picture_in_postgres(w, made.id) == FOREIGN


async def test_a_picture_changed_by_another_application_while_postgres_decides_is_found(
    open_pictured, mongo_uri
):
    w = await open_pictured("postgres_primary")
    made = await with_picture(w)
    w.documents.update_one({"_id": made.id}, {"$set": {"picture": FOREIGN}})
    await w.users.update(made.id, {"n": 2})
    await w.reconcile()
    assert await verified(w, mongo_uri) == {Finding.FOREIGN_WRITE: 1}
    # The next delivery that brings a picture keeps the foreign one for a person.
    await w.users.update(made.id, {"picture": NEW})
    await w.reconcile()
    await w.assert_equal()
    [(store, kept)] = w.conflicts()
    assert (store, kept["picture"]) == ("mongo", FOREIGN)


async def test_a_full_delivery_brings_a_record_with_a_picture_once_and_mends_the_digest_of_its_row(
    open_pictured,
):
    w = await open_pictured("postgres_primary")
    await with_picture(w)
    assert await w.m.reconciler.full_delivery() == 0
    w.sql("UPDATE users SET cf_digest = 'x'")
    assert await w.m.reconciler.full_delivery() == 1
    assert await w.m.reconciler.full_delivery() == 0
    await w.reconcile()
    await w.assert_equal()


async def test_another_field_changed_by_another_application_while_postgres_decides_is_kept(open_pictured):
    w = await open_pictured("postgres_primary")
    made = await with_picture(w)
    w.documents.update_one({"_id": made.id}, {"$set": {"n": 7, "theirs": 1}})
    await w.users.update(made.id, {"username": "Robert"})
    await w.reconcile()
    await w.assert_equal()
    [(_, kept)] = w.conflicts()
    assert (kept["n"], kept["theirs"], kept["picture"]) == (7, 1, OLD)


async def test_what_another_application_writes_in_the_very_instant_of_a_small_delivery_is_kept(
    open_pictured, monkeypatch
):
    w = await open_pictured("postgres_primary")
    made = await with_picture(w)
    deliver_small = w.mongo.deliver_small

    async def late(*of, **how):
        monkeypatch.undo()
        w.documents.update_one({"_id": made.id}, {"$set": {"n": [1, 7]}})
        return await deliver_small(*of, **how)

    monkeypatch.setattr(w.mongo, "deliver_small", late)
    await w.users.update(made.id, {"username": "Robert"})
    await w.reconcile()
    await w.assert_equal()
    [(_, kept)] = w.conflicts()
    assert (kept["n"], kept["picture"]) == ([1, 7], OLD)


# --- the whole collection, the way there and back -------------------------------------------------------------


async def test_a_backfilled_picture_travels_with_the_first_write_and_not_with_the_second(
    open_pictured, mongo_uri, mongo_proxy, postgres_proxy
):
    w = await open_pictured("dual_write", mongo=mongo_proxy, postgres=postgres_proxy, foreign_writers=True)
    ids = [ObjectId() for _ in range(4)]
    w.documents.insert_many({"_id": id_, "username": f"Old{id_}", "picture": OLD, "n": 1} for id_ in ids)
    source, target = BulkMongo(mongo_uri), await BulkPostgres.connect(w.database_url)
    with contextlib.closing(source):
        report = await Backfill(w.entity, source, target, migration="accounts", epoch=w.control.epoch).run()
        await target.close()
    assert (report.counts.inserted, report.state) == (4, "complete")
    assert part_of_row(w, ids[0]) == (0, len(OLD))
    assert await verified(w, mongo_uri) == {}
    await w.users.update(ids[0], {"n": 2})
    await w.reconcile()
    assert part_of_row(w, ids[0]) == (part_of_document(w, ids[0]), len(OLD))
    moved = Moved(mongo_proxy, postgres_proxy)
    await w.users.update(ids[0], {"n": 3})
    await w.settle()
    assert moved.bytes() < SMALL
    await w.m.reconciler.full_sweep()
    await w.reconcile()
    await w.assert_equal()


async def test_a_picture_stays_where_it_is_through_the_switch_and_back(
    open_pictured, mongo_uri, mongo_proxy, postgres_proxy
):
    w = await open_pictured("postgres_read", mongo=mongo_proxy, postgres=postgres_proxy)
    made = await with_picture(w)
    moved = Moved(mongo_proxy, postgres_proxy)
    for n, phase in enumerate(("postgres_primary", "postgres_read", "postgres_primary", "postgres_read")):
        await w.set_phase(phase)
        await w.users.update(made.id, {"n": n + 2, f"of_{phase}_{n}": n})
        await w.reconcile()
        assert part_of_document(w, made.id) == part_of_row(w, made.id)[0] == 1
    assert moved.bytes() < 4 * SMALL
    await w.assert_equal()
    assert await verified(w, mongo_uri) == {}
    await w.users.update(made.id, {"picture": NEW})
    await w.set_phase("postgres_primary")
    await w.reconcile()
    await w.assert_equal()


@mongo_decides
async def test_a_record_in_quarantine_is_kept_with_its_picture(open_pictured, phase):
    import bson

    w = await open_pictured(phase)
    made = await with_picture(w)
    # A name that its column must have, and cannot: nothing of the record goes to PostgreSQL.
    w.documents.update_one({"_id": made.id}, {"$set": {"username": 5}})
    await w.users.update(made.id, {"n": 2})
    await w.reconcile()
    [(document,)] = w.sql("SELECT document FROM crossfade.quarantine")
    assert bson.decode(bytes(document))["picture"] == OLD
    w.documents.update_one({"_id": made.id}, {"$set": {"username": "Bob", "picture": NEW}})
    await w.reconcile(retry_parked=True)
    await w.assert_equal()
    assert await picture_in_postgres(w, made.id) == NEW


async def test_a_field_that_became_a_part_is_brought_anew_and_no_conflict(open_world):
    before = await open_world("dual_write", entity=users_entity())
    made = await before.users.insert({"username": "Bob", "picture": OLD, "n": 1})
    await before.settle()
    w = await open_world("dual_write", entity=users_entity(mapping_version=2, pictures=True))
    assert await w.m.reconciler.full_sweep() == 1
    await w.reconcile()
    await w.assert_equal()
    assert part_of_row(w, made.id)[1] == len(OLD)
    assert w.conflicts() == []


async def test_many_small_writers_and_painters_of_one_record(open_pictured):
    w = await open_pictured("dual_write", background=True)
    made = await with_picture(w)

    async def write(painter):
        for n in range(8):
            picture = {"picture": bytes([65 + n]) * 1_000} if painter else {}
            await w.users.update(made.id, {f"n{painter}": Int64(n), **picture})

    await asyncio.gather(*(write(painter) for painter in (0, 0, 1, 1)))
    await w.reconcile()
    await w.assert_equal()
    assert (await w.users.get(made.id)).rev == 33


@pytest.mark.parametrize("looked_at", ["for its name", "for its row"])
async def test_what_is_owed_beside_a_picture_that_cannot_be_read_is_parked_with_its_cause(
    open_pictured, postgres_proxy, looked_at
):
    """Another application broke it, and only who reads the document whole finds that; the others are settled."""
    w = await open_pictured("postgres_read", foreign_writers=True, postgres=postgres_proxy)
    made = await with_picture(w)
    eve = await w.users.insert({"username": "Eve"})
    postgres_proxy.refuse()
    for id_ in (made.id, eve.id):
        await w.users.update(id_, {"n": 2})
    postgres_proxy.pass_through()
    await w.postgres_answers()
    w.documents.update_one({"_id": made.id}, {"$unset": {"picture": ""}})
    if looked_at == "for its name":
        w.documents.update_one({"_id": made.id}, {"$set": {"username": "Robert"}})
    else:
        w.sql("DELETE FROM user_pictures")
    whole = w.documents.with_options(codec_options=CodecOptions(document_class=RawBSONDocument))
    body = whole.find_one({"_id": made.id}).raw[4:-1] + b"\x02picture\x00\x03\x00\x00\x00\xff\xfe\x00\x00"
    w.documents.delete_one({"_id": made.id})
    w.documents.insert_one(RawBSONDocument((len(body) + 4).to_bytes(4, "little") + body))
    await w.m.reconciler.reconcile()
    [debt] = await w.owed()
    assert debt.id == made.id
    assert "UTF-8" in debt.parked
    assert [id_ for id_, _ in w.quarantined()] == [id_to_text(made.id)]
    w.documents.update_one({"_id": made.id}, {"$set": {"picture": FOREIGN}})
    await w.reconcile(retry_parked=True)
    assert w.notes(made.id)["keys"] == {"username": w.document(made.id)["username"].lower()}
    assert w.quarantined() == []
    await w.assert_equal()
