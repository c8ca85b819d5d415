"""Every way in which a record can differ is found by its name, and repaired from the primary or kept by policy."""

import bson
import pytest
from bson import Int64

from crossfade.values import id_to_text

from .conftest import of_users

pytestmark = pytest.mark.long

MENDED = ["ahead", "behind", "different", "foreign_write", "mapping_changed", "missing"]
DECIDED = ["extra", "tombstone_missing", "tombstoned"]


def key(document):
    return id_to_text(document["_id"])


@pytest.fixture
def different(stores, in_dual_write, user):
    """{finding: id text} of records that differ in each way, among others that do not; verified."""
    documents = [user(n) for n in range(24)]
    stores.collection.insert_many(documents)
    in_dual_write("init")  # else a sweep has their keys to stamp
    in_dual_write("backfill", "--entity", "users")

    def drop_row(document):
        for table, column in (("user_friends", "user_id"), ("users", "id")):
            stores.sql.execute(f"DELETE FROM {table} WHERE {column} = %s", [key(document)])

    def change(document, query):
        stores.sql.execute(f"UPDATE users SET {query} WHERE id = %s", [key(document)])

    names = ["missing", "tombstone_missing", "extra", "foreign_write", "mapping_changed", "behind", "ahead",
             "different", "tombstoned", "in_debt"]  # fmt: skip
    of = dict(zip(names, documents, strict=False))
    drop_row(of["missing"])
    stores.collection.delete_one({"_id": of["tombstone_missing"]["_id"]})
    stores.collection.delete_one({"_id": of["extra"]["_id"]})
    change(of["extra"], "role = 'admin'")
    stores.collection.update_one({"_id": of["foreign_write"]["_id"]}, {"$set": {"role": "admin"}})
    change(of["mapping_changed"], "cf_mapping = 0")
    notes = {"rev": Int64(4), "op": "1" * 32, "keys": {"username": of["behind"]["username"].lower()}}
    stores.collection.update_one({"_id": of["behind"]["_id"]}, {"$set": {"_cf": notes, "role": "admin"}})
    change(of["ahead"], "cf_rev = 2")
    change(of["different"], "role = 'admin'")
    drop_row(of["tombstoned"])
    stores.sql.execute(
        "INSERT INTO crossfade.tombstones (entity, id, rev) VALUES ('users', %s, 3)", [key(of["tombstoned"])]
    )
    owed = {"rev": Int64(5), "op": "2" * 32, "debt": {"epoch": Int64(2)}, "keys": {"username": "name9"}}
    stores.collection.update_one({"_id": of["in_debt"]["_id"]}, {"$set": {"_cf": owed, "role": "admin"}})
    return {name: key(document) for name, document in of.items()}


def counted(report, name):
    return {finding: number for finding, number in report[name].items() if number}


def test_every_kind_is_found_by_its_name_and_mended_or_kept(stores, in_dual_write, different):
    verified = of_users(in_dual_write("verify", "--entity", "users", "--json", status=1))
    assert {one["finding"]: one["id"] for one in verified["samples"]} == different

    before = stores.content(), list(stores.collection.find())
    planned = of_users(in_dual_write("repair", "--entity", "users", "--json", status=1))
    assert counted(planned, "to_do") == dict.fromkeys(MENDED, 1)
    assert counted(planned, "kept") == dict.fromkeys([*DECIDED, "in_debt"], 1)
    assert (stores.content(), list(stores.collection.find())) == before

    words = ["repair", "--entity", "users", "--apply", "--by", "Ann", "--json"]
    mended = of_users(in_dual_write(*words, status=1))
    assert counted(mended, "repaired") == dict.fromkeys(MENDED, 1)
    assert counted(mended, "left") == {}
    # What is mended already is only looked at; what nobody can decide but a person is decided now.
    in_dual_write("reconcile")
    decided = of_users(in_dual_write(*words, "--extra", "delete", "--tombstoned", "lift"))
    assert counted(decided, "repaired") == dict.fromkeys(DECIDED, 1)
    assert decided["equal"] == len(MENDED) + 1

    verified = of_users(in_dual_write("verify", "--entity", "users", "--json"))
    assert verified["counts"]["mismatches"] == verified["counts"]["in_debt"] == 0
    assert stores.rows("SELECT count(*) FROM users WHERE id = ANY(%s)", [different[n] for n in DECIDED]) == [
        (1,)
    ]
    audit = {
        finding: (id_, by, before and bson.decode(before), after and bson.decode(after))
        for finding, id_, by, before, after in stores.rows(
            "SELECT finding, id, done_by, before, after FROM crossfade.repairs"
        )
    }
    assert {finding: id_ for finding, (id_, *_) in audit.items()} == {
        finding: id_ for finding, id_ in different.items() if finding != "in_debt"
    }
    assert {by for _, by, _, _ in audit.values()} == {"Ann"}
    assert [audit["different"][n]["role"] for n in (2, 3)] == ["admin", "user"]
    assert [audit["foreign_write"][n]["role"] for n in (2, 3)] == ["user", "admin"]
    assert (audit["missing"][2], audit["extra"][3]) == (None, None)


def test_what_the_application_wrote_since_is_not_undone(stores, in_dual_write, different):
    in_dual_write("verify", "--entity", "users", "--json", status=1)
    # Written and settled by then, as the application would.
    stores.collection.update_one({"username": "Name3"}, {"$set": {"passwordHash": "new"}})
    in_dual_write("reconcile", "--full")
    report = of_users(in_dual_write("repair", "--entity", "users", "--apply", "--json"))
    # A sweep trusts stored digests, so it does not see what was changed under one.
    assert report["repaired"] == {"different": 1}
    assert report["equal"] == report["looked_at"] - 1
    [[stored]] = stores.rows("SELECT password_hash FROM users WHERE id = %s", different["foreign_write"])
    assert stored == "new"


def test_with_postgres_primary_the_rows_decide(stores, in_dual_write, user):
    documents = [user(n) for n in range(6)]
    stores.collection.insert_many(documents)
    in_dual_write("backfill")
    in_dual_write("verify")
    in_dual_write("phase", "set", "shadow_read")
    in_dual_write("phase", "set", "postgres_read", "--force", "shadow")
    in_dual_write("phase", "set", "postgres_primary")
    stores.collection.update_one({"_id": documents[1]["_id"]}, {"$set": {"role": "admin"}})
    stores.collection.delete_one({"_id": documents[2]["_id"]})
    stores.sql.execute("DELETE FROM user_friends WHERE user_id = %s", [key(documents[3])])
    stores.sql.execute("DELETE FROM users WHERE id = %s", [key(documents[3])])
    in_dual_write("verify", "--entity", "users", "--json", status=1)
    report = of_users(in_dual_write("repair", "--entity", "users", "--apply", "--json", status=1))
    assert sum(report["repaired"].values()) == 2
    # What PostgreSQL does not hold it cannot bring: a person decides.
    assert counted(report, "kept") == {"missing": 1}
    assert stores.collection.find_one({"_id": documents[1]["_id"]})["role"] == "user"
    assert stores.collection.find_one({"_id": documents[2]["_id"]})["username"] == "Name2"


def test_without_a_verify_there_is_nothing_to_go_by(stores, in_dual_write, user):
    stores.collection.insert_one(user(1))
    report = of_users(in_dual_write("repair", "--entity", "users", "--json", status=1))
    assert report["state"] == "never verified"


def test_a_row_whose_content_was_changed_under_its_digest_is_written_anew(stores, in_dual_write, user):
    # Known to Crossfade already: nothing but the content tells the rows from what they should be.
    documents = [
        user(
            n,
            profilePicture="data:image/png;base64,iVBORw0KGgo=",
            _cf={"rev": Int64(3), "op": f"{n:032x}", "keys": {"username": f"name{n}"}},
        )
        for n in range(5)
    ]
    stores.collection.insert_many(documents)
    in_dual_write("backfill", "--entity", "users")
    verified = of_users(in_dual_write("verify", "--entity", "users", "--json"))
    assert verified["counts"]["equal"] == len(documents)
    for query, document in zip(
        (
            "UPDATE users SET role = 'admin' WHERE id = %s",
            "UPDATE users SET username_norm = 'nobody' WHERE id = %s",
            "UPDATE user_pictures SET data = '\\x00' WHERE user_id = %s",
            "DELETE FROM user_friends WHERE user_id = %s",
        ),
        documents,
        strict=False,
    ):
        stores.sql.execute(query, [key(document)])
    of_users(in_dual_write("verify", "--entity", "users", "--json", status=1))

    mended = of_users(in_dual_write("repair", "--entity", "users", "--apply", "--json"))
    assert mended["repaired"] == {"different": 4}
    verified = of_users(in_dual_write("verify", "--entity", "users", "--json"))
    assert (verified["counts"]["equal"], verified["counts"]["in_debt"]) == (len(documents), 0)
    # Above the damaged row, so that no late image brings it back; what was not damaged stays as it was.
    revisions = [document["_cf"]["rev"] for document in stores.collection.find().sort("_id", 1)]
    assert revisions == [4, 4, 4, 4, 3]
