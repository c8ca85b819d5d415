"""The stand-in for the old back end writes as Mongoose does."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pymongo
import pytest
from bson import ObjectId
from pymongo.collection import Collection
from pymongo.errors import DuplicateKeyError

from scorekeeper.legacy import PASSWORDS, LegacyApplication, generate
from scorekeeper.legacy.deployment import OTHERS

HASH = PASSWORDS["four-aces"]
START = datetime(2026, 2, 1, tzinfo=UTC)


class Clock:
    """A clock that each reading moves by a second."""

    def __init__(self) -> None:
        self.at = START

    def __call__(self) -> datetime:
        self.at += timedelta(seconds=1)
        return self.at


@pytest.fixture
def collection(mongo_uri: str) -> Iterator[Collection[Any]]:
    with pymongo.MongoClient[Any](mongo_uri, tz_aware=True, serverSelectionTimeoutMS=5000) as client:
        database = client.get_default_database()
        generate(database, users=0, sizes=dict.fromkeys(OTHERS, 0))
        yield database["users"]


@pytest.fixture
def application(collection: Collection[Any]) -> LegacyApplication:
    return LegacyApplication(collection.database, now=Clock())


def read(collection: Collection[Any], user_id: ObjectId) -> dict[str, Any]:
    document = collection.find_one({"_id": user_id})
    assert document is not None
    return document


def test_a_registered_user_has_every_default(
    collection: Collection[Any], application: LegacyApplication
) -> None:
    user = read(collection, application.register("Bob", HASH))
    assert list(user) == [
        "_id",
        "username",
        "passwordHash",
        "role",
        "guestMetadata",
        "lastLogin",
        "profilePicture",
        "friends",
        "createdAt",
        "updatedAt",
        "__v",
    ]
    assert (user["role"], user["friends"], user["__v"]) == ("user", [], 0)
    assert user["createdAt"] == user["updatedAt"] == START + timedelta(seconds=1)
    assert read(collection, application.register("Guest", None))["role"] == "guest"


def test_a_name_is_taken_in_its_own_case_only(application: LegacyApplication) -> None:
    application.register("Bob", HASH)
    application.register("bob", HASH)
    with pytest.raises(DuplicateKeyError):
        application.register("Bob", HASH)


def test_updates_set_their_field_and_leave_the_rest_alone(
    collection: Collection[Any], application: LegacyApplication
) -> None:
    user_id = application.register("Bob", HASH)
    mark = {"rev": 7, "debt": {"op": "x"}}
    collection.update_one({"_id": user_id}, {"$set": {"_cf": mark, "settings": {"theme": "dark"}}})
    before = read(collection, user_id)
    assert application.rename(user_id, "Robert")
    assert application.touch_last_login(user_id)
    assert application.change_role(user_id, "admin")
    after = read(collection, user_id)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"username", "lastLogin", "role", "updatedAt"}
    assert (after["username"], after["role"], after["_cf"]) == ("Robert", "admin", mark)
    assert after["updatedAt"] > after["lastLogin"] > before["updatedAt"]


def test_a_friend_is_pushed_once_on_both_sides(
    collection: Collection[Any], application: LegacyApplication
) -> None:
    bob, eve = application.register("Bob", HASH), application.register("Eve", HASH)
    assert application.add_friend(bob, eve)
    first, second = read(collection, bob), read(collection, eve)
    assert (first["friends"], second["friends"]) == ([eve], [bob])
    assert (first["__v"], second["__v"]) == (1, 1)
    assert first["updatedAt"] > first["createdAt"]
    assert not application.add_friend(bob, eve)
    assert read(collection, bob) == first


def test_a_friend_is_pushed_to_the_oldest_documents_too(
    collection: Collection[Any], application: LegacyApplication
) -> None:
    bob, old = application.register("Bob", HASH), ObjectId()
    collection.insert_one({"_id": old, "username": "Old", "passwordHash": HASH})
    assert application.add_friend(bob, old)
    assert read(collection, old)["friends"] == [bob]


def test_a_user_who_is_gone_is_told(collection: Collection[Any], application: LegacyApplication) -> None:
    bob, eve = application.register("Bob", HASH), application.register("Eve", HASH)
    application.add_friend(bob, eve)
    assert application.delete(bob)
    assert collection.find_one({"_id": bob}) is None
    assert read(collection, eve)["friends"] == [bob]
    assert not application.delete(bob)
    assert not application.rename(bob, "Ghost")
    assert not application.touch_last_login(bob)
    assert not application.change_role(bob, "admin")
