import asyncio
import itertools
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import bson
import psycopg
import pytest
from bson import Binary, Decimal128, Int64, ObjectId, Timestamp
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Double,
    Enum,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    SmallInteger,
    String,
    Table,
    Text,
    Uuid,
    create_engine,
)
from sqlalchemy.dialects.postgresql import CITEXT, JSONB

from crossfade import DocumentId, Entity, column, errors, record_columns
from crossfade.bulk import pieces
from crossfade.bulk.backfill import Backfill
from crossfade.bulk.verify import Verify
from crossfade.stores import bulk_postgres
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres
from crossfade.stores.errors import Fenced
from crossfade.stores.postgres import PostgresStore
from crossfade.values import id_to_text
from scorekeeper.legacy import generate
from scorekeeper.users.entity import users

SCRIPT = Path(__file__).with_name("run_backfill.py")


def key(document):
    return id_to_text(document["_id"])


# --- being killed ---------------------------------------------------------------------------------------


def run_until_killed(stores, chunks, delay):
    """A backfill in a process of its own, killed `delay` seconds after it wrote `chunks` chunks."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), stores.mongo_uri, stores.database_url, "20"],
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(chunks):
        assert process.stdout.readline() == "chunk\n"
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize(("chunks", "delay"), [(1, 0), (3, 0.002), (8, 0.005), (13, 0.008), (18, 0.011)])
async def test_a_killed_run_goes_on_where_it_was(stores, user, chunks, delay):
    documents = [user(n) for n in range(600)]
    stores.collection.insert_many(documents)
    run_until_killed(stores, chunks, delay)
    done = len(stores.ids())
    assert chunks * 20 <= done < 600
    [[position]] = stores.rows("SELECT position FROM crossfade.ranges")
    assert id_to_text(bson.decode(position)["_id"]) == stores.ids()[-1]

    report = await stores.backfill()
    assert report.state == "complete"
    assert report.resumed == done
    assert (report.counts.read, report.counts.inserted, report.counts.same) == (600, 600, 0)
    assert stores.ids() == sorted(key(d) for d in documents)
    assert stores.rows("SELECT count(*) FROM crossfade.runs WHERE state = 'complete'") == [(1,)]
    assert (await stores.verify()).counts.mismatches == 0


async def test_a_run_killed_behind_its_commit_still_looks_again(stores, user):
    documents = [user(n) for n in range(50)]
    stores.collection.insert_many(documents)
    buried = key(documents[7])
    done = subprocess.run(  # noqa: ASYNC221
        [sys.executable, str(SCRIPT), stores.mongo_uri, stores.database_url, "20", "bury-and-die", buried],
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert buried in stores.ids()
    stores.collection.delete_one({"_id": documents[7]["_id"]})
    report = await stores.backfill()
    assert buried not in stores.ids()
    assert stores.rows("SELECT count(*) FROM user_friends WHERE user_id = %s", buried) == [(0,)]
    assert report.counts.removed == 1
    assert len(stores.ids()) == 49


async def test_who_begins_anew_behind_a_kill_removes_what_the_dead_one_put_back(stores, user):
    documents = [user(n) for n in range(50)]
    stores.collection.insert_many(documents)
    buried = key(documents[19])  # the last one of its chunk: no other chunk reaches over it
    done = subprocess.run(  # noqa: ASYNC221
        [sys.executable, str(SCRIPT), stores.mongo_uri, stores.database_url, "20", "bury-and-die", buried],
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert buried in stores.ids()
    stores.collection.delete_one({"_id": documents[19]["_id"]})
    report = await stores.backfill(restart=True, batch_size=19)
    assert report.state == "complete"
    assert buried not in stores.ids()
    assert len(stores.ids()) == 49


async def test_stopping_ends_after_a_whole_chunk_and_the_same_command_goes_on(stores, user):
    stores.collection.insert_many([user(n) for n in range(100)])
    stop = asyncio.Event()
    report = await stores.backfill(batch_size=10, stop=stop, on_progress=lambda _: stop.set())
    assert (report.state, report.counts.read) == ("interrupted", 10)
    report = await stores.backfill(batch_size=10)
    assert (report.state, report.resumed, report.counts.inserted) == ("complete", 10, 100)


# --- never backwards ------------------------------------------------------------------------------------


async def test_running_again_changes_nothing(stores, user):
    stores.collection.insert_many(
        [user(n, profilePicture="data:image/png;base64,iVBORw0KGgo=") for n in range(30)]
    )
    await stores.backfill()
    before = stores.content()
    report = await stores.backfill()
    assert (report.counts.same, report.counts.inserted, report.counts.updated) == (30, 0, 0)
    assert stores.content() == before


async def test_a_newer_row_is_never_replaced(stores, user):
    documents = [user(n) for n in range(20)]
    stores.collection.insert_many(documents)
    await stores.backfill()
    stores.sql.execute("UPDATE users SET cf_rev = 5, username = 'newer' WHERE id = %s", [key(documents[3])])
    before = stores.content()
    lifted = []

    async def on_behind(entity, ids):
        lifted.extend(ids)

    report = await stores.backfill(on_behind=on_behind)
    assert stores.content() == before
    assert (report.counts.behind, report.counts.same) == (1, 19)
    assert lifted == [documents[3]["_id"]]


async def test_equal_revision_with_other_content_is_behind_not_confirmed(stores, user):
    document = user(1)
    stores.collection.insert_one(document)
    await stores.backfill()
    stores.collection.update_one({"_id": document["_id"]}, {"$set": {"role": "admin"}})
    lifted = []

    async def on_behind(entity, ids):
        lifted.extend(ids)

    report = await stores.backfill(on_behind=on_behind)
    assert (report.counts.behind, report.counts.updated) == (1, 0)
    assert lifted == [document["_id"]]


async def test_a_newer_document_replaces_row_and_children(stores, user):
    documents = [user(n) for n in range(8)]
    stores.collection.insert_many(documents)
    await stores.backfill()
    notes = {"rev": Int64(3), "op": "0" * 31 + "a", "keys": {"username": "name3"}}
    stores.collection.update_one(
        {"_id": documents[3]["_id"]},
        {"$set": {"_cf": notes, "friends": [documents[7]["_id"]], "role": "admin"}},
    )
    report = await stores.backfill()
    assert (report.counts.updated, report.counts.same) == (1, 7)
    assert stores.rows("SELECT cf_rev, role, cf_op::text FROM users WHERE id = %s", key(documents[3])) == [
        (3, "admin", "00000000-0000-0000-0000-00000000000a")
    ]
    assert stores.rows(
        "SELECT position, friend_id FROM user_friends WHERE user_id = %s", key(documents[3])
    ) == [(0, key(documents[7]))]
    assert (await stores.verify()).counts.mismatches == 0


@pytest.fixture
def newer_than_its_rows(stores, user):
    """Two documents, each newer than its row."""

    async def made():
        documents = [user(n) for n in range(2)]
        stores.collection.insert_many(documents)
        await stores.backfill()
        for number, document in enumerate(documents):
            notes = {"rev": Int64(3), "op": "0" * 31 + "a", "keys": {"username": f"name{number}"}}
            stores.collection.update_one({"_id": document["_id"]}, {"$set": {"_cf": notes, "role": "admin"}})
        return sorted(map(key, documents))

    return made


async def test_a_chunk_that_waits_for_a_row_lets_go_of_all_others(stores, newer_than_its_rows, database_url):
    first, last = await newer_than_its_rows()
    with psycopg.connect(database_url) as holder, psycopg.connect(database_url, autocommit=True) as other:
        holder.execute("SELECT FROM users WHERE id = %s FOR UPDATE", [last])
        running = asyncio.create_task(stores.backfill())
        await asyncio.to_thread(stores.wait_until, "SELECT FROM pg_locks WHERE NOT granted")
        other.execute("SET lock_timeout = '10s'")
        # The chunk has locked it, and waits for what somebody else holds.
        await asyncio.to_thread(other.execute, "UPDATE users SET last_login = now() WHERE id = %s", [first])
        assert not running.done()
        holder.rollback()
        report = await running
    assert (report.state, report.counts.updated) == ("complete", 2)


async def test_what_others_never_let_go_of_is_one_clear_error(
    stores, newer_than_its_rows, database_url, monkeypatch
):
    monkeypatch.setattr(bulk_postgres, "LOCK_TRIES", 2)
    first, last = await newer_than_its_rows()
    with psycopg.connect(database_url) as holder:
        holder.execute("SELECT FROM users WHERE id = %s FOR UPDATE", [last])
        with pytest.raises(errors.Busy, match=r"others hold rows .*End long transactions"):
            await stores.backfill()
    assert stores.rows("SELECT id, cf_rev FROM users ORDER BY id") == [(first, 0), (last, 0)]
    report = await stores.backfill()
    assert (report.state, report.counts.updated) == ("complete", 2)


async def test_a_run_waits_for_the_commit_of_who_steers_it(stores, user, database_url):
    stores.collection.insert_many([user(n) for n in range(3)])
    with psycopg.connect(database_url) as steering:

        def steer(_counts):
            steering.execute("UPDATE crossfade.runs SET steering = steering")
            # Longer than a chunk waits for a row, as a commit is where the disk is busy.
            threading.Timer(bulk_postgres.LOCK_SECONDS + 1, steering.rollback).start()

        report = await stores.backfill(on_progress=steer)
    assert (report.state, report.counts.inserted) == ("complete", 3)


async def test_a_deleted_record_does_not_come_back(stores, user):
    documents = [user(n) for n in range(5)]
    stores.collection.insert_many(documents)
    stores.sql.execute(
        "INSERT INTO crossfade.tombstones (entity, id, rev) VALUES ('users', %s, 0)", [key(documents[2])]
    )
    report = await stores.backfill()
    assert key(documents[2]) not in stores.ids()
    assert (report.counts.inserted, report.counts.behind) == (4, 1)


async def test_a_delete_that_commits_while_a_chunk_is_written_wins(stores, user):
    documents = [user(n) for n in range(5)]
    stores.collection.insert_many(documents)
    buried = key(documents[3])

    def hook(target):
        original = target._stage

        async def stage(tables, rows):
            await original(tables, rows)
            # Committed by another transaction, and found nothing to delete yet.
            stores.sql.execute("DELETE FROM users WHERE id = %s", [buried])

        put = target._put_at_once

        async def put_at_once(*arguments):
            outcome = await put(*arguments)
            stores.sql.execute(
                "INSERT INTO crossfade.tombstones (entity, id, rev) VALUES ('users', %s, 0)", [buried]
            )
            return outcome

        target._stage, target._put_at_once = stage, put_at_once

    report = await stores.backfill(hook=hook)
    assert buried not in stores.ids()
    assert report.counts.removed == 1


@pytest.mark.parametrize("late", [False, True], ids=["before the chunk looks", "after it has looked"])
async def test_nobody_reads_what_was_deleted_while_its_chunk_was_written(stores, user, database_url, late):
    """A worker tells its caller of a delete once PostgreSQL has committed it, and readers go by the row."""
    documents = [user(n) for n in range(5)]
    stores.collection.insert_many(documents)
    id_ = documents[3]["_id"]
    live, seen = PostgresStore(database_url), []

    async def delete():
        await live.apply_deletes(users, [(id_, 1, None)], migration="accounts", epoch=1, timeout=30.0)
        seen.append(key(documents[3]) in stores.ids())

    def hook(target):
        put, checkpoint, deleting = target._put_at_once, target.runs.checkpoint, []

        async def put_at_once(*arguments):
            outcome = await put(*arguments)
            if not late:
                await delete()
            return outcome

        async def noted(*arguments, **how):
            if late and not deleting:
                deleting.append(asyncio.create_task(delete()))
                await asyncio.wait(deleting, timeout=0.5)
            return await checkpoint(*arguments, **how)

        async def look_again(*arguments):
            await asyncio.gather(*deleting)
            seen.append(key(documents[3]) in stores.ids())
            return 0

        target._put_at_once, target.runs.checkpoint, target.look_again = put_at_once, noted, look_again

    await live.open()
    await stores.backfill(hook=hook)
    await live.close()
    assert seen == [False, False]


async def test_a_decided_delete_is_left_to_its_own_debt(stores, user):
    document = user(1, _cf={"rev": Int64(2), "op": "1" * 32, "deleted": True, "debt": {"epoch": Int64(1)}})
    stores.collection.insert_many([document, user(2)])
    report = await stores.backfill()
    assert (report.counts.deleted, report.counts.inserted) == (1, 1)
    assert stores.ids() == [key(user(2))]


async def test_another_epoch_ends_the_run_and_writes_nothing(stores, user):
    stores.collection.insert_many([user(n) for n in range(5)])
    stores.sql.execute("UPDATE crossfade.control SET epoch = 2")
    with pytest.raises(Fenced, match="from epoch 1 to 2"):
        await stores.backfill(epoch=1)
    assert stores.ids() == []
    # What an older epoch has done is not relied upon.
    report = await stores.backfill(epoch=2)
    assert (report.resumed, report.counts.inserted) == (0, 5)


async def test_a_worker_that_comes_after_another_epoch_began_writes_nothing_for_the_old_run(stores, user):
    stores.collection.insert_many([user(n) for n in range(5)])
    source, target = BulkMongo(stores.mongo_uri), await BulkPostgres.connect(stores.database_url)
    leader, worker = (Backfill(users, source, target, migration="accounts", epoch=epoch) for epoch in (1, 2))
    try:
        begun = await leader.begin()
        # Nobody has asked whether this one wants a backfill.
        stores.sql.execute("UPDATE crossfade.control SET epoch = 2")
        with pytest.raises(Fenced, match="from epoch 1 to 2"):
            await worker.run(begun, alone=False)
    finally:
        await target.close()
        source.close()
    assert stores.ids() == []


async def test_who_begins_anew_while_another_works_is_refused(stores, user):
    stores.collection.insert_many([user(n) for n in range(3)])

    async def second(_entity, _ids):
        await stores.backfill(restart=True)

    stores.sql.execute(
        "INSERT INTO crossfade.tombstones (entity, id, rev) VALUES ('users', %s, 0)", [key(user(0))]
    )
    with pytest.raises(errors.Busy, match="another backfill of users"):
        await stores.backfill(on_behind=second)


# --- several at once ------------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 20)


async def test_several_share_the_pieces_and_nothing_is_counted_twice(stores, user, small_pieces):
    documents = [user(n) for n in range(300)] + [user(2000 + n, _id=n) for n in range(50)]
    documents += [user(1000 + n, _id=f"id {n:03d}") for n in range(50)]
    stores.collection.insert_many(documents)
    reports = await asyncio.gather(*(stores.backfill(batch_size=7) for _ in range(3)))
    assert [(r.state, r.counts.read, r.counts.inserted) for r in reports] == [("complete", 400, 400)] * 3
    assert sorted(stores.ids()) == sorted(key(d) for d in documents)
    assert stores.rows("SELECT count(*) > 5, bool_and(state = 'complete') FROM crossfade.ranges") == [
        (True, True)
    ]
    verified = await asyncio.gather(*(stores.verify(chunk=9) for _ in range(3)))
    assert [(r.state, r.counts.documents, r.counts.rows, r.counts.equal) for r in verified] == [
        ("complete", 400, 400, 400)
    ] * 3


async def test_who_slept_over_its_lease_undoes_its_chunk(stores, user):
    """Another one has the piece by then: its chunk counts, and not that of the sleeper."""
    stores.collection.insert_many([user(n) for n in range(30)])
    slept = asyncio.Event()
    others = []

    def falls_asleep(target):
        write_chunk = target.write_chunk

        async def overslept(*arguments, checkpoint, **more):
            async def late(written):
                if not slept.is_set():
                    slept.set()
                    # Its lease has run out, although its session is there.
                    stores.sql.execute("UPDATE crossfade.ranges SET leased_until = now() - interval '1 s'")
                    others.append(asyncio.create_task(stores.backfill(batch_size=10)))
                    free = "SELECT leased_until < now() FROM crossfade.ranges"
                    while stores.rows(free) == [(True,)]:  # noqa: ASYNC110 - it is told by the database
                        await asyncio.sleep(0.02)
                await checkpoint(written)

            return await write_chunk(*arguments, checkpoint=late, **more)

        target.write_chunk = overslept

    report = await stores.backfill(batch_size=10, hook=falls_asleep)
    assert (report.state, report.counts.read, report.counts.inserted) == ("complete", 30, 30)
    [other] = await asyncio.gather(*others)
    assert other.counts.read == 30


async def test_an_idle_worker_waits_for_what_another_has_and_takes_what_it_leaves(stores, user):
    stores.collection.insert_many([user(n) for n in range(40)])
    stop, begun = asyncio.Event(), asyncio.Event()

    def leave(_counts):
        stop.set()
        begun.set()

    first = asyncio.create_task(stores.backfill(batch_size=10, stop=stop, on_progress=leave))
    await begun.wait()
    second = await stores.backfill(batch_size=10)
    assert (await first).state in ("interrupted", "complete")
    assert (second.state, second.counts.read, second.counts.inserted) == ("complete", 40, 40)


async def test_what_is_asked_of_a_run_is_done_while_it_goes_on(stores, user):
    stores.collection.insert_many([user(n) for n in range(60)])
    seen = []

    def steer(counts):
        seen.append(counts.read)
        stores.sql.execute("UPDATE crossfade.runs SET steering = '{\"chunk_size\": 25}'")

    await stores.backfill(batch_size=5, on_progress=steer)
    assert seen[0] == 5
    assert 25 in [b - a for a, b in itertools.pairwise(seen)]
    stores.sql.execute("UPDATE crossfade.control SET epoch = 2")

    def stop(_counts):
        stores.sql.execute("UPDATE crossfade.runs SET steering = '{\"stopped\": true}' WHERE epoch = 2")

    report = await stores.backfill(epoch=2, batch_size=5, on_progress=stop)
    assert report.state == "interrupted"
    assert report.counts.read < 60


# --- one bad row and its neighbours ---------------------------------------------------------------------


async def test_a_row_that_the_table_refuses_does_not_stop_its_neighbours(stores, user):
    documents = [user(n) for n in range(100)]
    documents[41]["username"] = documents[77]["username"] = "forbidden"
    documents[77]["_cf"] = {"keys": {"username": "other"}}
    stores.collection.insert_many(documents)
    stores.sql.execute("ALTER TABLE users ADD CONSTRAINT no_such_name CHECK (username <> 'forbidden')")
    report = await stores.backfill()
    assert (report.counts.inserted, report.counts.quarantined) == (98, 2)
    found = stores.rows("SELECT id, reason, document FROM crossfade.quarantine ORDER BY id")
    assert [row[0] for row in found] == [key(documents[41]), key(documents[77])]
    assert "no_such_name" in found[0][1]
    assert bson.decode(found[0][2])["username"] == "forbidden"
    # The children of those that went in are there, of the others none.
    assert stores.rows("SELECT count(*) FROM user_friends") == [
        (sum(len(d["friends"]) for n, d in enumerate(documents) if n not in (41, 77)),)
    ]


@pytest.mark.parametrize(
    ("rule", "most"),
    [
        # Colliding keys are found by joins: once all, once to find them, once the others.
        ("CREATE UNIQUE INDEX one_hash ON users (password_hash)", 3),
        # What else the server refuses is halved until it is found: all once, then both halves of what holds it.
        ("ALTER TABLE users ADD CONSTRAINT no_such_name CHECK (username <> 'Name700')", 4),
    ],
    ids=["a key that another has", "a value that is refused"],
)
async def test_one_bad_row_makes_its_chunk_a_few_times_as_much_work_and_no_more(stores, user, rule, most):
    documents = [user(n, passwordHash=f"hash {n if n != 700 else 3}") for n in range(1000)]
    stores.collection.insert_many(documents)
    stores.sql.execute(rule)
    staged = []

    def hook(target):
        stage = target._stage

        async def counted(tables, rows):
            staged.append(len(rows))
            await stage(tables, rows)

        target._stage = counted

    report = await stores.backfill(hook=hook)
    assert report.counts.inserted == 999
    assert sum(staged) <= most * 1000


async def test_rows_that_leave_quarantine_are_struck_off(stores, user):
    stores.collection.insert_many([user(n) for n in range(3)])
    stores.sql.execute("ALTER TABLE users ADD CONSTRAINT no_such_name CHECK (username <> 'Name1')")
    await stores.backfill()
    stores.sql.execute("ALTER TABLE users DROP CONSTRAINT no_such_name")
    report = await stores.backfill()
    assert report.counts.inserted == 1
    assert stores.rows("SELECT count(*) FROM crossfade.quarantine") == [(0,)]


@pytest.mark.parametrize("batch_size", [2, 5000])
async def test_colliding_names_are_settled_one_by_one(stores, user, batch_size):
    documents = [user(1, username="Bob"), user(2), user(3, username="bob"), user(4), user(5, username="BOB")]
    stores.collection.insert_many(documents)
    settled = []

    async def settle_one(entity, id_):
        settled.append(id_)
        raise errors.CrossfadeError("held by another")

    report = await stores.backfill(batch_size=batch_size, settle_one=settle_one)
    assert stores.ids() == [key(documents[n]) for n in (0, 1, 3)]
    assert settled == [documents[2]["_id"], documents[4]["_id"]]
    assert (report.counts.violations, report.counts.parked) == (2, 2)
    assert report.parked[0] == {"id": key(documents[2]), "rule": "username", "why": "held by another"}


async def test_stamped_keys_keep_colliding_names_apart(stores, user):
    documents = [user(1, username="Bob", _cf={"keys": {"username": "bob"}}),
                 user(2, username="bob", _cf={"keys": {"username": "bob~2"}})]  # fmt: skip
    stores.collection.insert_many(documents)
    report = await stores.backfill()
    assert (report.counts.inserted, report.counts.violations) == (2, 0)
    assert stores.rows("SELECT username_norm FROM users ORDER BY id") == [("bob",), ("bob~2",)]


async def test_quarantine_keeps_the_bytes_as_found(stores, user):
    documents = [user(n) for n in range(4)]
    del documents[2]["username"]
    stores.collection.insert_many(documents)
    report = await stores.backfill()
    assert (report.counts.inserted, report.counts.quarantined) == (3, 1)
    [batch] = stores.collection.find_raw_batches({"_id": documents[2]["_id"]})
    [[reason, field, document]] = stores.rows("SELECT reason, field, document FROM crossfade.quarantine")
    assert document == batch
    assert field == "username"
    assert report.quarantined == [{"id": key(documents[2]), "reason": reason, "field": "username"}]


# --- reading everything ---------------------------------------------------------------------------------

ODD_IDS = [
    None, -1.5, 3, Int64(2**40), Decimal128("7.25"), "", "a string", "z", {"a": 1, "b": 2}, b"bytes",
    Binary(b"0123456789abcdef", 4), False, True, datetime(2024, 1, 1, tzinfo=UTC), Timestamp(5, 6),
]  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 4, 5000])
async def test_ids_of_other_types_are_not_missed_also_after_interruptions(stores, user, batch_size):
    documents = [user(n) for n in range(6)]
    documents += [user(100 + n, _id=id_) for n, id_ in enumerate(ODD_IDS)]
    stores.collection.insert_many(documents)
    for _ in range(100):
        stop = asyncio.Event()
        report = await stores.backfill(
            batch_size=batch_size, stop=stop, on_progress=lambda _, s=stop: s.set()
        )
        if report.state == "complete":
            break
    assert stores.ids() == sorted(key(d) for d in documents)
    assert report.counts.read == report.counts.inserted == len(documents)
    verified = await stores.verify(chunk=3)
    assert (verified.counts.equal, verified.counts.mismatches) == (len(documents), 0)


async def test_a_column_of_every_type_is_loaded_and_written_over(stores):
    every = Table(
        "every",
        MetaData(),
        Column("id", DocumentId, primary_key=True),
        Column("text", Text),
        Column("short", String(5)),
        Column("choice", Enum("a", "b", name="choice")),
        Column("tag", CITEXT),
        Column("at", DateTime(timezone=True)),
        Column("tiny", SmallInteger),
        Column("int", Integer),
        Column("long", BigInteger),
        Column("double", Double),
        Column("price", Numeric(10, 2)),
        Column("number", Numeric),
        Column("flag", Boolean),
        Column("data", LargeBinary),
        Column("uuid", Uuid),
        Column("any", JSONB),
        Column("ref", DocumentId),
        *record_columns(),
    )
    fields = [c.name for c in every.columns][1:17]
    entity = Entity("every", collection="every", table=every, columns=[column(f) for f in fields])
    # As the extension makes it, which not every server has.
    stores.sql.execute("CREATE TYPE citext")
    for use, given, returned in [("in", "cstring", "citext"), ("out", "citext", "cstring"),
                                 ("recv", "internal", "citext"), ("send", "citext", "bytea")]:  # fmt: skip
        stores.sql.execute(
            f"CREATE FUNCTION citext{use}({given}) RETURNS {returned} AS 'text{use}' LANGUAGE internal STRICT"
        )
    stores.sql.execute(
        "CREATE TYPE citext (INPUT = citextin, OUTPUT = citextout, RECEIVE = citextrecv, SEND = citextsend, "
        "LIKE = text)"
    )
    engine = create_engine(stores.database_url.replace("postgresql://", "postgresql+psycopg://", 1))
    every.metadata.create_all(engine)
    engine.dispose()
    documents = [
        {
            "_id": n, "text": "x", "short": "12345", "choice": "a", "tag": "T",
            "at": datetime(2024, 1, 1, tzinfo=UTC), "tiny": 1, "int": 2, "long": Int64(3), "double": -0.0,
            "price": Decimal128("-12.50"), "number": Decimal128("1234567890123456789012345678901234"), "flag": True,
            "data": b"x", "uuid": Binary(bytes(16), 4), "any": {"a": 1}, "ref": ObjectId(),
        }
        for n in range(3)
    ]  # fmt: skip
    documents.append({"_id": 3})
    documents.append({"_id": 4, "price": Decimal128("NaN"), "number": 5, "double": Decimal128("5")})
    collection = stores.collection.database["every"]
    collection.insert_many(documents)
    source, target = BulkMongo(stores.mongo_uri), await BulkPostgres.connect(stores.database_url)
    try:
        report = await Backfill(entity, source, target, migration="accounts", epoch=1).run()
        assert (report.counts.inserted, report.counts.quarantined) == (5, 0)
        collection.update_many({}, {"$set": {"price": Decimal128("0.10"), "_cf.rev": 7}})
        report = await Backfill(entity, source, target, migration="accounts", epoch=1).run(restart=True)
        assert (report.counts.updated, report.counts.quarantined) == (5, 0)
        report = await Verify(entity, source, target, migration="accounts", epoch=1, wait=0.01, looks=2).run()
        assert (report.counts.equal, report.counts.mismatches) == (5, 0)
    finally:
        await target.close()
        await asyncio.to_thread(source.close)
    assert stores.rows("SELECT DISTINCT price FROM every") == [(Decimal("0.10"),)]
    assert stores.rows("SELECT number FROM every WHERE id = 'j:4'") == [(5,)]


async def test_chunks_end_at_a_number_of_bytes_too(stores, user):
    picture = "data:image/png;base64," + "A" * 400_000
    stores.collection.insert_many([user(n, profilePicture=picture) for n in range(12)])
    seen = []
    await stores.backfill(batch_bytes=1_000_000, on_progress=lambda counts: seen.append(counts.read))
    assert seen == [2, 4, 6, 8, 10, 12]
    assert stores.rows("SELECT count(*), min(length(data)) FROM user_pictures") == [(12, 300_000)]


async def test_missing_tables_are_named(stores, user):
    stores.sql.execute("DROP TABLE user_pictures")
    with pytest.raises(errors.SchemaNotReady, match=r"user_pictures.*alembic upgrade head"):
        await stores.backfill()


async def test_a_column_that_pads_its_text_is_named(stores, user):
    stores.collection.insert_one(user(1))
    stores.sql.execute("CREATE DOMAIN padded AS char(40)")
    stores.sql.execute("CREATE DOMAIN padded_too AS padded")
    stores.sql.execute("ALTER TABLE users ALTER COLUMN username TYPE padded_too")
    with pytest.raises(errors.SchemaNotReady, match=r"users\.username.*char\(n\)"):
        await stores.backfill()


async def test_a_domain_over_a_domain_is_what_it_is_made_of(stores, user):
    stores.collection.insert_one(user(1))
    stores.sql.execute("CREATE DOMAIN any_name AS text")
    stores.sql.execute("CREATE DOMAIN short_name AS any_name")
    stores.sql.execute("ALTER TABLE users ALTER COLUMN username TYPE short_name")
    report = await stores.backfill()
    assert (report.counts.inserted, report.counts.quarantined) == (1, 0)
    assert (await stores.verify()).counts.equal == 1


async def test_a_batch_of_nothing_is_refused(stores, user):
    with pytest.raises(errors.ConfigurationError, match="at least 1"):
        await stores.backfill(batch_size=0)


async def test_an_unreachable_mongodb_is_one_error(stores, user, monkeypatch):
    from crossfade.stores import bulk_mongo

    monkeypatch.setattr(bulk_mongo, "ATTEMPTS", 1)
    stores.mongo_uri = "mongodb://127.0.0.1:9/none?serverSelectionTimeoutMS=200"
    with pytest.raises(errors.StoreUnavailable, match=r"cannot read MongoDB at 127\.0\.0\.1:9"):
        await stores.backfill()


async def test_every_kind_of_dirt_is_moved_set_aside_or_named(stores):
    sizes = dict.fromkeys(("playeridentities", "friendrequests", "games", "wizard", "tablegames"), 0)
    generate(stores.client.get_default_database(), seed=5, users=3000, sizes=sizes)
    report = await stores.backfill(batch_size=700)
    counts = report.counts
    assert counts.read == 3000
    assert counts.quarantined > 0
    assert counts.parked > 0
    assert counts.inserted + counts.quarantined + counts.parked == 3000
    verified = await stores.verify()
    # Nothing stamped the keys and nobody settles here, so the colliding names are not in PostgreSQL.
    assert verified.counts.findings["missing"] == verified.counts.mismatches == counts.parked
    assert verified.counts.findings["quarantined"] == counts.quarantined
    assert verified.counts.equal == counts.inserted


async def test_friends_are_linked_whichever_is_copied_first(stores, user):
    people = [user(number) for number in range(60)]
    ids = [person["_id"] for person in people]
    for at, person in enumerate(people):
        person["friends"] = [ids[-at - 1], ids[at * 7 % 60], ObjectId()]
    stores.collection.insert_many(people)
    await stores.backfill(batch_size=8)
    rows = stores.rows("SELECT friend_id, friend_ref FROM user_friends")
    there = set(stores.ids())
    assert len(rows) == 180
    assert all(ref == (friend if friend in there else None) for friend, ref in rows)


async def test_what_comes_after_its_target_arrives_with_its_link(stores, user):
    ids = [ObjectId() for _ in range(4)]
    documents = [user(n, _id=ids[n], friends=[ids[n - 1]] if n else [ids[3]]) for n in range(4)]
    stores.collection.insert_many(documents)

    def hook(target):
        async def links_nothing(*_):
            pass

        target.link = links_nothing

    await stores.backfill(hook=hook, batch_size=2)
    linked = stores.rows("SELECT friend_ref FROM user_friends ORDER BY user_id")
    assert linked == [(None,), *((key({"_id": id_}),) for id_ in ids[:3])]


async def test_links_are_set_while_the_next_chunk_is_written_and_by_the_next_run_if_that_fails(stores, user):
    ids = [ObjectId() for _ in range(6)]
    stores.collection.insert_many([user(n, _id=ids[n], friends=[ids[2]]) for n in range(6)])
    written, linked = [], []
    first_is_linked, last_is_written = asyncio.Event(), asyncio.Event()

    def hook(target):
        link, write_chunk = target.link, target.write_chunk

        async def says_when_the_last_is_written(*arguments, **options):
            if written:
                await first_is_linked.wait()  # or it would find what comes now
            written.append(await write_chunk(*arguments, **options))
            if len(written) == 3:
                last_is_written.set()
            return written[-1]

        async def fails_behind_the_second(*arguments):
            linked.append(arguments)
            if len(linked) == 2:
                await last_is_written.wait()
                raise errors.StoreUnavailable("postgres", "gone")
            await link(*arguments)
            first_is_linked.set()

        target.write_chunk, target.link = says_when_the_last_is_written, fails_behind_the_second

    with pytest.raises(errors.StoreUnavailable, match="gone"):
        await stores.backfill(hook=hook, batch_size=2)
    waiting = "SELECT count(*) FROM user_friends WHERE friend_ref IS NULL"
    assert stores.rows(waiting) == [(2,)]
    report = await stores.backfill(batch_size=2)
    assert (report.state, report.counts.inserted, report.resumed) == ("complete", 6, 6)
    assert stores.rows(waiting) == [(0,)]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
async def test_a_document_that_is_deleted_while_its_chunk_is_written_is_not_in_quarantine(
    stores, user, before
):
    nameless = user(1)
    del nameless["username"]
    stores.collection.insert_many([user(0), nameless])

    def delete():
        # As a delete does, from its decision to its end.
        stores.collection.delete_one({"_id": nameless["_id"]})
        stores.sql.execute(
            "INSERT INTO crossfade.tombstones (entity, id, rev) VALUES ('users', %s, 1)", [key(nameless)]
        )
        stores.sql.execute("DELETE FROM crossfade.quarantine WHERE id = %s", [key(nameless)])

    def hook(target):
        quarantine = target._quarantine

        async def held(*arguments):
            if before:
                delete()
            await quarantine(*arguments)
            if not before:
                delete()

        target._quarantine = held

    await stores.backfill(hook=hook)
    assert stores.rows("SELECT id FROM crossfade.quarantine") == []
