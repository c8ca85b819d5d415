import asyncio
import threading
import time

import pytest
from bson import Decimal128, Int64

from crossfade.bulk import verify
from crossfade.stores import runs
from crossfade.values import id_to_text


def key(document):
    return id_to_text(document["_id"])


@pytest.fixture
async def moved(stores, user):
    """20 users in both stores."""
    documents = [user(n) for n in range(20)]
    stores.collection.insert_many(documents)
    await stores.backfill()
    return documents


def findings(report):
    return [(one["id"], one["finding"], one["fields"]) for one in report.samples]


@pytest.mark.parametrize("chunk", [1, 3, 20, 2000])
async def test_equal_stores_have_no_mismatch(stores, moved, chunk):
    report = await stores.verify(chunk=chunk)
    assert (report.counts.documents, report.counts.rows, report.counts.equal) == (20, 20, 20)
    assert not report.found
    [[state, kind, counts]] = stores.rows(
        "SELECT state, kind, counts FROM crossfade.runs WHERE kind = 'verify' AND epoch = 1"
    )
    assert (state, kind, counts["equal"], counts["mismatches"]) == ("complete", "verify", 20, 0)


async def test_a_missing_row_is_found(stores, moved):
    for table, column in (("user_friends", "user_id"), ("users", "id")):
        stores.sql.execute(f"DELETE FROM {table} WHERE {column} = %s", [key(moved[5])])
    report = await stores.verify(chunk=3)
    assert findings(report) == [(key(moved[5]), "missing", [])]
    assert (report.counts.equal, report.counts.mismatches, report.found) == (19, 1, True)


@pytest.mark.parametrize("number", [0, 7, 19])
async def test_a_row_too_many_is_found(stores, moved, number):
    stores.collection.delete_one({"_id": moved[number]["_id"]})
    report = await stores.verify(chunk=3)
    assert findings(report) == [(key(moved[number]), "tombstone_missing", [])]


async def test_rows_of_an_empty_collection_are_all_extra(stores, moved):
    stores.collection.delete_many({})
    report = await stores.verify(chunk=3)
    assert report.counts.findings["tombstone_missing"] == 20


async def test_among_rows_without_documents_it_stops_and_goes_on_too(stores, moved):
    stores.collection.delete_many({})
    states, stop = [], asyncio.Event()
    for _ in range(20):
        stop.clear()
        report = await stores.verify(chunk=3, stop=stop, on_progress=lambda _: stop.set())
        states.append(report.state)
        if report.state == "complete":
            break
    assert len(states) > 3
    assert (report.counts.rows, report.counts.findings["tombstone_missing"]) == (20, 20)


async def test_many_differences_take_no_longer_than_a_lease(stores, moved, monkeypatch):
    monkeypatch.setattr(runs, "LEASE", 1.0)
    monkeypatch.setattr(verify, "SUSPECTS", 1)
    stores.collection.update_many({}, {"$set": {"role": "admin"}})
    # A second one takes the only piece from the first one as soon as it may, and the first one from that.
    async with asyncio.timeout(30):
        reports = await asyncio.gather(*(stores.verify(wait=0.2) for _ in range(2)))
    assert [(r.state, r.counts.findings["foreign_write"]) for r in reports] == [("complete", 20)] * 2


async def test_a_row_with_an_odd_id_too_many_is_found(stores, moved, user):
    stores.collection.insert_many([user(50, _id=12), user(51, _id="text"), user(52, _id=None)])
    await stores.backfill()
    assert not (await stores.verify()).found
    stores.collection.delete_many({"_id": {"$in": [12, "text"]}})
    report = await stores.verify()
    assert sorted(findings(report)) == [
        ("j:12", "tombstone_missing", []),
        ("s:text", "tombstone_missing", []),
    ]


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ("UPDATE users SET role = 'admin' WHERE id = %s", ["role"]),
        ("UPDATE users SET last_login = last_login + interval '1 ms' WHERE id = %s", ["lastLogin"]),
        ("UPDATE users SET extra = '{\"more\": 1}' WHERE id = %s", ["more"]),
        ("UPDATE user_friends SET position = 9 - position WHERE user_id = %s", ["friends"]),
        ("DELETE FROM user_friends WHERE user_id = %s AND position = 0", ["friends"]),
        ("UPDATE users SET username_norm = 'other' WHERE id = %s", ["username_norm"]),
        ("UPDATE users SET cf_digest = '\\x00' WHERE id = %s", ["cf_digest"]),
        ("UPDATE users SET cf_shape = '\"nonsense\"' WHERE id = %s", ["(unreadable)"]),
    ],
)
async def test_other_content_is_found_with_its_fields_whatever_the_stored_digest_says(
    stores, moved, change, fields
):
    stores.sql.execute(change, [key(moved[7])])
    report = await stores.verify(chunk=3)
    assert findings(report) == [(key(moved[7]), "different", fields)]


async def test_another_order_of_fields_is_another_document(stores, moved):
    old = moved[3]
    stores.collection.replace_one({"_id": old["_id"]}, dict(sorted(old.items(), reverse=True)))
    report = await stores.verify()
    assert findings(report) == [(key(old), "foreign_write", ["(order)"])]


async def test_a_number_of_another_width_is_another_value(stores, moved):
    stores.collection.update_one({"_id": moved[3]["_id"]}, {"$set": {"__v": 0.0}})
    assert findings(await stores.verify()) == [(key(moved[3]), "foreign_write", ["__v"])]


async def test_a_row_behind_and_one_ahead_are_told_apart(stores, moved):
    stores.collection.update_one(
        {"_id": moved[3]["_id"]}, {"$set": {"_cf": {"rev": Int64(4)}, "role": "admin"}}
    )
    stores.sql.execute("UPDATE users SET cf_rev = 2 WHERE id = %s", [key(moved[4])])
    assert findings(await stores.verify()) == [
        (key(moved[3]), "behind", ["role"]),
        (key(moved[4]), "ahead", []),
    ]


async def test_records_in_debt_are_no_mismatch(stores, moved):
    owed = {"_cf": {"rev": Int64(4), "op": "1" * 32, "debt": {"epoch": Int64(1)}}, "role": "admin"}
    stores.collection.update_one({"_id": moved[3]["_id"]}, {"$set": owed})
    # A delete that PostgreSQL does not know of yet.
    stores.collection.delete_one({"_id": moved[5]["_id"]})
    stores.collection.database["crossfade_tombstones"].insert_one(
        {"_id": {"entity": "users", "id": key(moved[5])}, "rev": Int64(1), "op": "2" * 32, "debt": True}
    )
    report = await stores.verify()
    assert findings(report) == [(key(moved[3]), "in_debt", ["role"]), (key(moved[5]), "in_debt", [])]
    assert not report.found


async def test_quarantined_documents_are_no_mismatch_unless_they_changed(stores, moved, user):
    bad = user(30)
    del bad["username"]
    stores.collection.insert_one(bad)
    assert findings(await stores.verify()) == [(key(bad), "missing", [])]
    await stores.backfill()
    report = await stores.verify()
    assert findings(report) == [(key(bad), "quarantined", [])]
    assert not report.found
    stores.collection.update_one({"_id": bad["_id"]}, {"$set": {"role": "admin"}})
    assert findings(await stores.verify()) == [(key(bad), "missing", [])]


@pytest.mark.parametrize("fast", [False, True])
async def test_a_document_whose_id_has_no_text_is_missing_until_it_is_in_quarantine(
    stores, moved, user, fast
):
    stores.collection.insert_one(user(30, _id="too long for an index " * 100))
    report = await stores.verify(fast=fast)
    [(text, finding, _)] = findings(report)
    assert (finding, report.found) == ("missing", True)
    await stores.backfill()
    report = await stores.verify(fast=fast)
    assert findings(report) == [(text, "quarantined", [])]
    assert not report.found
    # Changed, it is still one document in quarantine.
    stores.collection.update_one({"username": "Name30"}, {"$set": {"role": "admin"}})
    await stores.backfill(restart=True)
    assert stores.rows("SELECT id FROM crossfade.quarantine") == [(text,)]


async def test_a_document_put_back_under_a_tombstone_is_found(stores, moved):
    stores.sql.execute(
        "INSERT INTO crossfade.tombstones (entity, id, rev) VALUES ('users', %s, 3)", [key(moved[2])]
    )
    stores.sql.execute("DELETE FROM user_friends WHERE user_id = %s", [key(moved[2])])
    stores.sql.execute("DELETE FROM users WHERE id = %s", [key(moved[2])])
    assert findings(await stores.verify()) == [(key(moved[2]), "tombstoned", [])]


async def test_a_decided_delete_counts_as_gone(stores, moved):
    stores.collection.update_one({"_id": moved[2]["_id"]}, {"$set": {"_cf": {"deleted": True}}})
    assert findings(await stores.verify()) == [(key(moved[2]), "extra", [])]


async def test_a_record_in_flight_is_no_mismatch(stores, moved):
    stores.collection.update_one({"_id": moved[3]["_id"]}, {"$set": {"_cf": {"rev": Int64(1)}}})

    def arrive():
        time.sleep(0.3)
        stores.sql.execute("UPDATE users SET cf_rev = 1 WHERE id = %s", [key(moved[3])])

    late = threading.Thread(target=arrive)
    late.start()
    report = await stores.verify(wait=0.4, looks=3)
    late.join()
    assert not report.found
    assert report.counts.equal == 20


async def test_verify_changes_nothing_but_its_own_record(stores, moved):
    stores.sql.execute("UPDATE users SET role = 'admin' WHERE id = %s", [key(moved[7])])
    before = stores.content(), list(stores.collection.find())
    await stores.verify()
    assert (stores.content(), list(stores.collection.find())) == before


async def test_ids_that_are_numbers_of_any_type_are_verified_and_one_that_comes_back_in_another_type_is_found(
    stores, user
):
    ids = [5, Int64(6), 7.0, Decimal128("8.0")]
    stores.collection.insert_many(user(n, _id=id_, friends=[]) for n, id_ in enumerate(ids))
    await stores.backfill()
    report = await stores.verify()
    assert (report.counts.equal, report.found) == (4, False)
    again = stores.collection.find_one({"_id": 5})
    stores.collection.delete_one({"_id": 5})
    stores.collection.insert_one({**again, "_id": 5.0})
    report = await stores.verify()
    assert sorted(found[:2] for found in findings(report)) == [
        ("j:5", "tombstone_missing"),
        ("j:5.0", "missing"),
    ]
