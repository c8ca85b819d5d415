"""Documents that cannot be carried: tried again, waived by name, mended in a file."""

import json

import bson
import pytest
from bson import DatetimeMS, Int64
from bson.raw_bson import RawBSONDocument

from crossfade.values import id_to_text

from .conftest import of_users

pytestmark = pytest.mark.long


def key(document):
    return id_to_text(document["_id"])


@pytest.fixture
def nameless(user):
    document = user(1)
    del document["username"]
    return document


@pytest.fixture
def invalid(user):
    """As another language's driver could write it; Python's refuses to."""
    raw = bson.encode({**user(2), "username": "half X\ue000 pair"})
    return RawBSONDocument(raw.replace("\ue000".encode(), b"\xed\xa0\x80"))


@pytest.fixture
def quarantined(stores, in_dual_write, user, nameless, invalid):
    stores.collection.insert_many([user(0), nameless, user(3)])
    stores.collection.insert_one(invalid)
    in_dual_write("backfill", "--entity", "users", "--json", status=1)
    listed = in_dual_write("quarantine", "list", "--json", status=1)["quarantine"]
    assert {one["id"] for one in listed} == {key(nameless), key(user(2))}
    assert all(one["first_seen"] and one["last_seen"] for one in listed)


def test_what_can_be_carried_by_now_leaves_and_what_is_gone_too(
    stores,
    in_dual_write,
    quarantined,
    nameless,
    user,
):
    tried = in_dual_write("quarantine", "retry", "--json", status=1)
    assert (tried["carried"], tried["gone"], len(tried["stay"])) == (0, 0, 2)
    stores.collection.update_one({"_id": nameless["_id"]}, {"$set": {"username": "Ann"}})
    stores.collection.delete_one({"_id": user(2)["_id"]})
    tried = in_dual_write("quarantine", "retry", "--json")
    assert (tried["carried"], tried["gone"], tried["stay"]) == (1, 1, [])
    assert key(nameless) in stores.ids()
    assert in_dual_write("quarantine", "list", "--json")["quarantine"] == []


def test_what_is_noted_of_a_debt_makes_no_other_document_of_one_that_cannot_be_read(
    stores, in_dual_write, quarantined, user
):
    in_dual_write("quarantine", "waive", "users", key(user(2)), "--reason", "nobody knows who it is")
    # Tried again, it is in debt from now on.
    in_dual_write("quarantine", "retry", "--json", status=1)
    assert stores.collection.count_documents({"_id": user(2)["_id"], "_cf.debt": {"$exists": True}}) == 1
    verified = of_users(in_dual_write("verify", "--entity", "users", "--json"))
    assert (verified["counts"]["quarantined"], verified["counts"]["mismatches"]) == (2, 0)
    listed = in_dual_write("quarantine", "list", "--json", status=1)["quarantine"]
    assert [one["id"] for one in listed if one["waived_by"]] == [key(user(2))]


def test_a_document_whose_id_has_no_text_does_not_end_a_sweep(stores, in_dual_write, user):
    stores.collection.insert_many([user(0), user(1, _id="too long for an index " * 100), user(2)])
    swept = in_dual_write("reconcile", "--full", "--json")
    assert swept["adopted"] == 2
    assert len(stores.ids()) == 2


def test_a_waiver_holds_for_the_content_that_was_waived_only(stores, in_dual_write, quarantined, nameless):
    words = ["quarantine", "waive", "users", key(nameless), "--reason", "a test account", "--by", "Ann"]
    in_dual_write(*words)
    listed = {
        one["id"]: one["waived_by"]
        for one in in_dual_write("quarantine", "list", "--json", status=1)["quarantine"]
    }
    assert listed[key(nameless)] == "Ann"
    assert in_dual_write("status", "--json")["quarantined"] == 1
    in_dual_write("quarantine", "unwaive", "users", key(nameless))
    assert in_dual_write("status", "--json")["quarantined"] == 2
    in_dual_write(*words)
    stores.collection.update_one({"_id": nameless["_id"]}, {"$set": {"role": "admin"}})
    in_dual_write("quarantine", "retry", "--json", status=1)
    assert in_dual_write("status", "--json")["quarantined"] == 2
    assert "no document" in in_dual_write("quarantine", "unwaive", "users", "x", "--json", status=2)["error"]


def test_what_is_waived_stands_in_the_way_of_no_switch_although_it_is_owed(
    stores, in_dual_write, quarantined, nameless
):
    # As an application's write leaves it.
    debt = {"rev": Int64(1), "op": "1" * 32, "debt": {"epoch": Int64(2)}}
    stores.collection.update_one({"_id": nameless["_id"]}, {"$set": {"_cf": debt}})
    in_dual_write("reconcile", status=1)
    [owed] = in_dual_write("debts", "--json", status=1)["debts"]
    assert owed["parked"].startswith("quarantined")

    in_dual_write("backfill", status=1)
    in_dual_write("verify")
    in_dual_write("phase", "set", "shadow_read")
    in_dual_write("phase", "set", "postgres_read", "--force", "shadow")
    told = in_dual_write("phase", "set", "postgres_primary", "--dry-run", "--json", status=1)
    assert {one["name"] for one in told if not one["holds"]} == {"parked", "quarantine"}
    for one in in_dual_write("quarantine", "list", "--json", status=1)["quarantine"]:
        in_dual_write("quarantine", "waive", "users", one["id"], "--reason", "a test account", "--by", "Ann")
    in_dual_write("phase", "set", "postgres_primary")
    assert in_dual_write("status", "--json")["phase"] == "postgres_primary"


def test_what_a_person_mends_in_a_file_is_carried(
    stores,
    in_dual_write,
    quarantined,
    nameless,
    user,
    tmp_path,
):
    file = tmp_path / "bad.jsonl"
    assert in_dual_write("quarantine", "export", str(file), "--json")["exported"] == 2
    assert "--force" in in_dual_write("quarantine", "export", str(file), "--json", status=2)["error"]
    lines = {line["id"]: line for line in map(json.loads, file.read_text().splitlines())}

    def taken(*words, status=0):
        file.write_text("\n".join(json.dumps(line) for line in lines.values()))
        return in_dual_write("quarantine", "import", str(file), "--json", *words, status=status)

    # Nothing was mended: what is still bad is refused by its line, and nothing is written.
    refused = taken(status=1)
    assert (refused["taken"], refused["unchanged"]) == (0, 1)
    assert "cannot be carried yet" in refused["refused"][0]

    lines[key(nameless)]["document"]["username"] = "Ann"
    assert lines[key(user(2))]["document"]["username"].startswith("half X")
    lines[key(user(2))]["document"]["username"] = "half X pair"
    assert taken("--dry-run")["taken"] == 2
    assert len(stores.ids()) == 2
    assert taken()["taken"] == 2
    assert stores.collection.find_one({"_id": nameless["_id"]})["username"] == "Ann"
    assert len(stores.ids()) == 4
    assert in_dual_write("quarantine", "list", "--json")["quarantine"] == []
    in_dual_write("verify", "--entity", "users")
    # The same file once more: MongoDB holds other documents than the ones that were exported.
    assert "since its export" in taken(status=1)["refused"][0]


def test_what_a_file_cannot_give_back_as_it_is_stays_out_of_a_persons_hands(
    stores, in_dual_write, user, tmp_path
):
    """A date that Python does not have, and a field that Extended JSON would take for a number."""
    late, odd, strange = ({**user(n), **of} for n, of in enumerate(
        ({"lastLogin": DatetimeMS(10**15)}, {"more": {"$numberInt": "5"}}, {"_cf": "nothing of ours"})
    ))  # fmt: skip
    for document in (late, odd, strange):
        del document["username"]
    stores.collection.insert_many([late, odd, strange])
    in_dual_write("backfill", "--entity", "users", status=1)
    file = tmp_path / "mend.jsonl"
    in_dual_write("quarantine", "export", str(file), "--json")
    lines = {line["id"]: line for line in map(json.loads, file.read_text().splitlines())}
    assert "document" not in lines[key(odd)]
    assert bson.decode(bytes.fromhex(lines[key(odd)]["hex"]))["more"] == {"$numberInt": "5"}
    for number, document in enumerate((late, strange)):
        lines[key(document)]["document"]["username"] = f"mended {number}"
    file.write_text("\n".join(map(json.dumps, lines.values())))
    taken = in_dual_write("quarantine", "import", str(file), "--json")
    assert (taken["taken"], taken["refused"]) == (2, [])
    assert stores.ids() == sorted([key(late), key(strange)])
    assert stores.collection.find_one({"_id": late["_id"]})["lastLogin"] == DatetimeMS(10**15)


def test_a_document_that_was_changed_since_its_export_is_left_alone(
    stores,
    in_dual_write,
    quarantined,
    nameless,
    tmp_path,
):
    file = tmp_path / "bad.jsonl"
    in_dual_write("quarantine", "export", str(file))
    stores.collection.update_one({"_id": nameless["_id"]}, {"$set": {"username": "Bob"}})
    [line] = [line for line in map(json.loads, file.read_text().splitlines()) if line["id"] == key(nameless)]
    line["document"]["username"] = "Ann"
    other = {**line, "document": {**line["document"], "_id": {"$oid": "0" * 24}}}
    file.write_text("\n".join([json.dumps(line), "nonsense", json.dumps(other)]))
    told = in_dual_write("quarantine", "import", str(file), "--json", status=1)
    assert told["taken"] == 0
    assert sorted(each[:6] for each in told["refused"]) == ["line 1", "line 2", "line 3"]
    assert stores.collection.find_one({"_id": nameless["_id"]})["username"] == "Bob"
