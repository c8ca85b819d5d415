"""Foreign keys and further indexes of empty tables are put aside for a backfill, and are there again at its end."""

import asyncio

import pytest
from bson import ObjectId

from crossfade import errors
from crossfade.stores import loading
from crossfade.stores.bulk_postgres import BulkPostgres
from crossfade.values import id_to_text
from scorekeeper.users.entity import users

CONSTRAINTS = (
    "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid), convalidated FROM pg_constraint "
    "WHERE conrelid::regclass::text LIKE 'user%%' ORDER BY 1, 2"
)
INDEXES = (
    "SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid), indisvalid FROM pg_index "
    "WHERE indrelid::regclass::text LIKE 'user%%' ORDER BY 1"
)
FOREIGN_KEYS = (
    "SELECT count(*) FROM pg_constraint WHERE conrelid = 'user_friends'::regclass AND contype = 'f'"
)


def schema(stores):
    return stores.rows(CONSTRAINTS), stores.rows(INDEXES)


@pytest.fixture
def users_with_friends(stores, user):
    """60 users; number 7 has a friend who never was."""
    documents = [user(n) for n in range(60)]
    documents[7]["friends"].append(ObjectId())
    stores.collection.insert_many(documents)
    return documents


async def test_what_is_put_aside_is_made_anew_as_it_was(stores, users_with_friends):
    before, without = schema(stores), []
    report = await stores.backfill(
        loading=True, batch_size=20, on_progress=lambda _: without.append(stores.rows(FOREIGN_KEYS))
    )
    assert without == [[(0,)]] * 3
    assert schema(stores) == before
    assert report.restored > 2
    assert stores.rows("SELECT count(*) FROM crossfade.aside") == [(0,)]
    # Every friend that is there is linked, whoever came first, and no other.
    assert stores.rows("SELECT user_id FROM user_friends WHERE friend_ref IS NULL") == [
        (id_to_text(users_with_friends[7]["_id"]),)
    ]
    assert not (await stores.verify()).found


async def test_a_load_that_was_interrupted_goes_on_and_restores(stores, users_with_friends):
    before, stop = schema(stores), asyncio.Event()
    report = await stores.backfill(loading=True, batch_size=20, stop=stop, on_progress=lambda _: stop.set())
    assert (report.state, report.restored) == ("interrupted", 0)
    assert stores.rows("SELECT count(*) > 2 FROM crossfade.aside") == [(True,)]
    # The same command finds the tables no longer empty, and knows all the same.
    report = await stores.backfill(batch_size=20)
    assert (report.state, report.counts.inserted) == ("complete", 60)
    assert schema(stores) == before
    assert not (await stores.verify()).found


async def test_a_load_that_dies_while_it_restores_is_not_complete_and_the_next_one_restores(
    stores, users_with_friends
):
    before = schema(stores)

    def die(number, _of, _what):
        if number == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        await stores.backfill(loading=True, batch_size=20, on_step=die)
    assert schema(stores) != before
    # No guard may pass over what is not there again.
    assert stores.rows("SELECT state FROM crossfade.runs") == [("running",)]
    report = await stores.backfill(batch_size=20)
    assert (report.state, report.counts.read, report.counts.inserted) == ("complete", 60, 60)
    assert stores.rows("SELECT state FROM crossfade.runs") == [("complete",)]
    assert schema(stores) == before


async def test_of_two_that_end_a_load_at_once_one_makes_everything(stores, users_with_friends):
    before, stop = schema(stores), asyncio.Event()
    await stores.backfill(loading=True, batch_size=20, stop=stop, on_progress=lambda _: stop.set())
    [[number]] = stores.rows("SELECT count(*) FROM crossfade.aside")
    targets = [await BulkPostgres.connect(stores.database_url) for _ in range(2)]
    steps = []
    made = await asyncio.gather(
        *(target.loading.restore(users, lambda *step: steps.append(step)) for target in targets)
    )
    assert sorted(made) == [0, number]
    # One after the other, each told before it was made, the last word being that all are.
    assert [(n, of) for n, of, _ in steps] == [(n, len(steps) - 1) for n in range(len(steps))]
    assert schema(stores) == before
    for target in targets:
        await target.close()


async def test_who_is_deleted_while_tables_are_loaded_leaves_no_link(stores, users_with_friends):
    gone = id_to_text(users_with_friends[1]["_id"])
    friends = stores.collection.count_documents({"friends": users_with_friends[1]["_id"]})
    assert friends > 5

    def delete(counts):
        if counts.read == 40:
            stores.sql.execute("DELETE FROM user_friends WHERE user_id = %s", [gone])
            stores.sql.execute("DELETE FROM users WHERE id = %s", [gone])

    await stores.backfill(loading=True, batch_size=20, on_progress=delete)
    assert stores.rows(
        "SELECT count(*) FROM user_friends WHERE friend_id = %s AND friend_ref IS NULL", gone
    ) == [(friends,)]
    assert stores.rows("SELECT bool_and(convalidated) FROM pg_constraint WHERE contype = 'f'") == [(True,)]


async def test_tables_with_rows_in_them_keep_what_they_have(stores, users_with_friends, monkeypatch):
    monkeypatch.setattr(loading, "NEARLY_NONE", 0)
    await stores.backfill()
    seen = []
    stores.sql.execute("UPDATE crossfade.control SET epoch = 2")
    await stores.backfill(epoch=2, loading=True, on_progress=lambda _: seen.append(stores.rows(FOREIGN_KEYS)))
    assert seen[0][0][0] > 0


async def test_a_table_that_others_hold_is_waited_for_and_then_named(stores, users_with_friends, monkeypatch):
    monkeypatch.setattr(loading, "_TRIES", 2)
    monkeypatch.setattr(loading, "_LOCK_SECONDS", 0.1)
    before = schema(stores)
    stores.sql.execute("BEGIN")
    stores.sql.execute("SELECT FROM user_friends")
    with pytest.raises(errors.Busy, match=r"others hold the table.*--keep-indexes"):
        await stores.backfill(loading=True)
    stores.sql.execute("ROLLBACK")
    report = await stores.backfill(loading=True)
    assert report.state == "complete"
    assert schema(stores) == before
