"""Generating on a real server, and the command that does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import bcrypt
import pymongo
import pytest
from bson.raw_bson import RawBSONDocument
from pymongo.collection import Collection
from pymongo.database import Database
from pymongo.errors import OperationFailure

from scorekeeper.legacy import RAW_OPTIONS, DirtRates, TargetNotEmpty, drop_collections, generate, users
from scorekeeper.legacy.deployment import INDEXES, OTHERS, documents_of, sizes_for
from scorekeeper.legacy.population import Population

from .test_documents import bson_of

RATES = DirtRates.all(0.04, near_limit_documents=1)


@pytest.fixture
def database(mongo_uri: str) -> Iterator[Database[Any]]:
    with pymongo.MongoClient[Any](mongo_uri, serverSelectionTimeoutMS=5000) as client:
        yield client.get_default_database()


def test_what_is_generated_is_what_is_stored(database: Database[Any]) -> None:
    seen: list[tuple[str, int, int]] = []
    summary = generate(database, seed=5, users=300, rates=RATES, on_progress=lambda *args: seen.append(args))
    population = Population(5, 300, RATES)
    refused = {(refusal.collection, refusal.what) for refusal in summary.refused}
    for name, n in sizes_for(300).items():
        wanted = {
            str(one.document["_id"]): bson_of(one.document)
            for one in documents_of(name, population, n)
            if (name, str(one.document["_id"])) not in refused
        }
        stored = database.get_collection(name, codec_options=RAW_OPTIONS).find()
        found = {str(document["_id"]): document.raw for document in stored}
        assert found == wanted
        assert summary.counts[name] == len(found)
        assert (name, n, n) in seen or name == "friendrequests"
    assert set(summary.counts) == {*INDEXES, *OTHERS}


def test_dirt_is_counted_with_examples(database: Database[Any]) -> None:
    few = {"playeridentities": 20, "friendrequests": 10}
    summary = generate(database, seed=5, users=400, rates=RATES, sizes=few)
    expected = [
        one for one in documents_of("users", Population(5, 400, RATES), 400) if "nul_in_name" in one.kinds
    ]
    assert summary.dirt["users"]["nul_in_name"] == len(expected)
    examples = summary.examples["users"]["nul_in_name"]
    assert examples == [one.document["_id"] for one in expected][:5]
    assert summary.dirt["users"]["near_limit_documents"] == 1
    assert json.loads(json.dumps(summary.as_dict()))["counts"]["playeridentities"] == 20


def test_logins_work_and_name_one_user_in_any_case(database: Database[Any]) -> None:
    rates = DirtRates.all(0.02, near_limit_documents=0)
    none = dict.fromkeys(["playeridentities", "friendrequests", "games", "wizard", "tablegames", *OTHERS], 0)
    summary = generate(database, seed=5, users=400, rates=rates, sizes=none)
    raw = database.get_collection("users", codec_options=RAW_OPTIONS)
    names = [document["username"].strip().casefold() for document in raw.find()]
    hashes = {document["username"]: document["passwordHash"] for document in raw.find()}
    assert len(summary.logins) > 50
    assert all(names.count(name.casefold()) == 1 for name, _ in summary.logins)
    assert set(summary.admin_logins) <= set(summary.logins)
    for name, password in summary.logins[:2]:
        assert bcrypt.checkpw(password.encode(), hashes[name].encode())


def test_every_index_is_there(database: Database[Any]) -> None:
    generate(database, users=0, sizes=dict.fromkeys(OTHERS, 0))
    for name, indexes in INDEXES.items():
        there = database[name].index_information()
        assert set(there) == {"_id_", *(index.document["name"] for index in indexes)}
    assert database["users"].index_information()["username_1"]["unique"]
    assert database["friendrequests"].index_information()["sender_1_receiver_1"]["unique"]
    assert database["tablegames"].index_information()["localId_1"]["unique"]
    assert database["wizard"].index_information()["shareId_1"]["sparse"]


def test_a_collection_that_holds_documents_is_left_alone(database: Database[Any]) -> None:
    database["wizard"].insert_one({"_id": 1})
    with pytest.raises(TargetNotEmpty, match=r"\.wizard holds documents"):
        generate(database, users=10)
    assert database["users"].count_documents({}) == 0
    database["sessions"].insert_one({"_id": 1})
    drop_collections(database)
    assert database.list_collection_names() == ["sessions"]


@pytest.mark.parametrize("fails_whole", [False, True])
def test_what_the_server_refuses_is_listed_and_takes_nothing_with_it(
    database: Database[Any], fails_whole: bool
) -> None:
    """A server that refuses invalid UTF-8: one document at a time, or by failing the whole command."""
    insert_many, insert_one = Collection.insert_many, Collection.insert_one

    def refuse(document: Mapping[str, Any]) -> None:
        if isinstance(document, RawBSONDocument):
            raise OperationFailure("invalid UTF-8", 22)

    def strict_one(self: Collection[Any], document: Any, **arguments: Any) -> Any:
        refuse(document)
        return insert_one(self, document, **arguments)

    def strict_many(self: Collection[Any], documents: list[Any], **arguments: Any) -> Any:
        if fails_whole:
            # Part of the batch arrives before the command fails.
            insert_many(self, documents[:20], **arguments)
            for document in documents:
                refuse(document)
            return insert_many(self, documents[20:], **arguments)
        problems = [i for i, each in enumerate(documents) if isinstance(each, RawBSONDocument)]
        good = [each for i, each in enumerate(documents) if i not in problems]
        result = insert_many(self, good, **arguments) if good else None
        if problems:
            errors = [{"index": i, "code": 22, "errmsg": "invalid UTF-8"} for i in problems]
            raise pymongo.errors.BulkWriteError({"writeErrors": errors})
        return result

    rates = DirtRates.all(0.03, near_limit_documents=0)
    none = dict.fromkeys(["playeridentities", "friendrequests", "games", "wizard", "tablegames", *OTHERS], 0)
    with (
        mock.patch.object(Collection, "insert_many", strict_many),
        mock.patch.object(Collection, "insert_one", strict_one),
    ):
        summary = generate(database, seed=2, users=2500, rates=rates, sizes=none)
    everyone = list(documents_of("users", Population(2, 2500, rates), 2500))
    raw = {str(one.document["_id"]) for one in everyone if isinstance(one.document, RawBSONDocument)}
    assert raw
    # The embedded server's text index refuses some valid texts now and then: that is listed, too.
    documents = [refusal for refusal in summary.refused if refusal.kinds]
    assert {refusal.what for refusal in documents} == raw
    assert len(documents) == len(raw)
    assert all("lone_surrogate" in refusal.kinds and "UTF-8" in refusal.cause for refusal in documents)
    assert database["users"].count_documents({}) == summary.counts["users"] == 2500 - len(raw)
    assert "lone_surrogate" not in summary.dirt["users"]


# --- the command ----------------------------------------------------------------------------------------


def run(*arguments: str, uri: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "MONGO_URI"}
    if uri is not None:
        environment["MONGO_URI"] = uri
    return subprocess.run(
        [sys.executable, "-m", "scorekeeper.legacy", *arguments],
        env=environment | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_command_fills_a_database_once(mongo_uri: str, database: Database[Any]) -> None:
    first = run("--users", "120", "--seed", "9", "--dirt", "0", "--json", uri=mongo_uri)
    assert first.returncode == 0, first.stderr
    summary = json.loads(first.stdout)
    assert summary["counts"]["users"] == database["users"].count_documents({}) == 120
    assert summary["refused"] == []
    assert database["users"].find_one({"username": next(iter(users(9, 1)))["username"]}) is not None
    second = run("--users", "120", uri=mongo_uri)
    assert second.returncode == 1
    assert "--drop" in second.stderr
    assert "Traceback" not in second.stderr
    third = run("--users", "50", "--dirt", "0.01", "--drop", uri=mongo_uri)
    assert third.returncode == 0, third.stderr
    assert database["users"].count_documents({}) == 50
    assert "can log in" in third.stdout


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        (None, "MONGO_URI is not set"),
        ("postgresql://127.0.0.1/x", "MONGO_URI cannot be used"),
        (
            "mongodb://u:hush-hush@127.0.0.1:1/x?serverSelectionTimeoutMS=300",
            "cannot reach MongoDB at 127.0.0.1:1",
        ),
    ],
)
def test_a_server_that_cannot_be_had_is_one_clear_line(uri: str | None, says: str) -> None:
    result = run(uri=uri)
    assert result.returncode == 1
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "hush-hush" not in result.stderr
    assert result.stdout == ""
