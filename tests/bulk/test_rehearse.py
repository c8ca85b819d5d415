import asyncio

from crossfade.bulk.rehearse import Rehearsal
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres
from crossfade.values import id_to_text
from scorekeeper.users.entity import users


def key(document):
    return id_to_text(document["_id"])


async def rehearse(stores, **arguments):
    source, target = BulkMongo(stores.mongo_uri), await BulkPostgres.connect(stores.database_url)
    try:
        return await Rehearsal(users, source, target, **arguments).run()
    finally:
        await target.close()
        await asyncio.to_thread(source.close)


async def test_a_rehearsal_says_what_would_happen_and_writes_nothing(stores, user):
    documents = [user(n) for n in range(30)]
    documents[4]["username"] = "NAME5"
    documents[9]["__v"] = 1.0
    documents[10]["more"] = {"a": 1}
    del documents[12]["username"]
    stores.collection.insert_many(documents)
    tables = "SELECT relname FROM pg_class WHERE relnamespace IN ('public'::regnamespace, 'crossfade'::regnamespace)"
    before = sorted(stores.rows(tables)), stores.content(), list(stores.collection.find())

    report = await rehearse(stores, batch_size=7)
    assert (report.state, report.read, report.convertible, report.quarantined) == ("complete", 30, 29, 1)
    [(reason, entry)] = report.reasons.items()
    assert "username" in reason
    assert (entry["count"], entry["field"], entry["ids"]) == (1, "username", [key(documents[12])])
    assert report.odd == {"__v": 1}
    assert report.collisions == 1
    assert report.twins == [
        {"rule": "username", "key": "name5", "ids": [key(documents[4]), key(documents[5])]}
    ]
    assert report.child_rows["user_friends"] == sum(
        len(d["friends"]) for n, d in enumerate(documents) if n != 12
    )
    assert report.found

    assert (sorted(stores.rows(tables)), stores.content(), list(stores.collection.find())) == before
    for table in ("runs", "quarantine"):
        assert stores.rows(f"SELECT count(*) FROM crossfade.{table}") == [(0,)]


async def test_stamped_keys_do_not_hide_a_collision(stores, user):
    stores.collection.insert_many([user(1, username="Bob", _cf={"keys": {"username": "bob"}}),
                                   user(2, username="bob", _cf={"keys": {"username": "bob~2"}})])  # fmt: skip
    assert (await rehearse(stores)).collisions == 1


async def test_clean_data_finds_nothing(stores, user):
    stores.collection.insert_many([user(n) for n in range(5)])
    report = await rehearse(stores)
    assert (report.found, report.convertible, report.odd) == (False, 5, {})
