"""The contract of `/api/users`, the same in every phase."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime
from typing import Any

import bcrypt
import pytest
from bson import ObjectId

from .conftest import PHASES, Serve, Service, assert_problem

ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture(params=PHASES)
async def service(request: pytest.FixtureRequest, serve: Serve) -> Service:
    return await serve(request.param)


async def test_registering_gives_an_account_and_a_token(service: Service) -> None:
    answer = await service.register("  Ann ", "secret1")
    assert answer.status_code == 201
    body = answer.json()
    user = body["user"]
    assert set(body) == {"message", "token", "user"}
    assert set(user) == {"id", "username", "role", "createdAt", "profilePicture"}
    assert (user["username"], user["role"], user["profilePicture"]) == ("Ann", "user", None)
    assert re.fullmatch(r"[0-9a-f]{24}", user["id"])
    assert ISO.fullmatch(user["createdAt"])
    me = await service.get("/api/users/me", body["token"])
    assert me.status_code == 200
    assert me.json()["user"]["id"] == user["id"]


@pytest.mark.parametrize("again", ["Ann", "ann", "ANN", " aNN "])
async def test_a_name_is_taken_in_any_letter_case(service: Service, again: str) -> None:
    assert (await service.register("Ann")).status_code == 201
    assert assert_problem(await service.register(again), 400)["error"] == "Username already exists"


async def test_logging_in_shows_the_user_with_identities(service: Service) -> None:
    registered = (await service.register("Ann")).json()["user"]
    answer = await service.log_in("Ann")
    assert answer.status_code == 200
    user = answer.json()["user"]
    identities = user.pop("identities")
    assert user == registered
    assert [i["displayName"] for i in identities] == ["Ann"]
    assert set(identities[0]) == {
        "_id", "displayName", "aliases", "nameHistory", "eloByGameType", "linkedIdentities",
    }  # fmt: skip
    token = answer.json()["token"]
    me = (await service.get("/api/users/me", token)).json()
    assert me == (await service.get("/api/users/profile", token)).json()
    assert me == {"user": {**user, "identities": identities}}


async def test_logging_in_ignores_letter_case_and_blanks(service: Service) -> None:
    await service.register("Ann")
    assert (await service.log_in(" ANN ")).json()["user"]["username"] == "Ann"


async def test_a_wrong_password_and_an_unknown_name_are_answered_alike(service: Service) -> None:
    await service.register("Ann")
    wrong, unknown = await service.log_in("Ann", "other password"), await service.log_in("Nobody")
    assert assert_problem(wrong, 401) == assert_problem(unknown, 401)


async def test_looking_up_a_name(service: Service) -> None:
    user = (await service.register("Ann")).json()["user"]
    found = await service.get("/api/users/lookup/aNN")
    assert found.json() == {
        "found": True,
        "user": {"id": user["id"], "username": "Ann", "createdAt": user["createdAt"]},
    }
    missing = await service.get("/api/users/lookup/nobody")
    assert missing.status_code == 404
    assert missing.json()["found"] is False
    assert missing.json()["message"] == "User not found"


async def test_a_name_with_a_slash_can_be_looked_up(service: Service) -> None:
    await service.register("AC/DC")
    assert (await service.get("/api/users/lookup/ac%2Fdc")).json()["user"]["username"] == "AC/DC"


@pytest.mark.parametrize(
    "body",
    [
        {"username": "ab", "password": "secret1"},
        {"username": "a" * 21, "password": "secret1"},
        {"username": "  ab  ", "password": "secret1"},
        {"username": "\U0001f600" * 11, "password": "secret1"},
        {"username": "nul\0name", "password": "secret1"},
        {"username": "line\nbreak", "password": "secret1"},
        {"username": "\ud800lone", "password": "secret1"},
        {"username": "Ann", "password": "short"},
        {"username": "Ann", "password": "\udfff123456"},
        {"username": "Ann"},
        {"password": "secret1"},
        {"username": 12345, "password": "secret1"},
        {"username": {"$ne": None}, "password": {"$gt": ""}},
        {"username": ["Ann"], "password": "secret1"},
        {"username": None, "password": None},
        [],
        "Ann",
        None,
    ],
)
async def test_what_cannot_be_registered_is_refused_and_leaves_nothing(serve: Serve, body: Any) -> None:
    service = await serve("dual_write")
    # httpx writes a lone surrogate as it is, a client in JavaScript as an escape.
    content = json.dumps(body).encode()
    answer = await service.http.post(
        "/api/users/register", content=content, headers={"Content-Type": "application/json"}
    )
    assert_problem(answer, 400)
    assert service.documents["users"].count_documents({}) == 0


async def test_a_name_of_ten_emoji_is_twenty_characters_as_javascript_counts(serve: Serve) -> None:
    service = await serve("dual_write")
    assert (await service.register("\U0001f600" * 10)).status_code == 201


class TestWhatTheStoresHold:
    @pytest.mark.parametrize("phase", ["dual_write", "postgres_read", "postgres_primary"])
    async def test_both_hold_the_account_under_one_id(self, serve: Serve, phase: str) -> None:
        service = await serve(phase)
        id_ = (await service.register("Ann")).json()["user"]["id"]

        async def both_hold_it() -> bool:
            document = service.documents["users"].find_one({"_id": ObjectId(id_)})
            rows = service.rows("SELECT username, role, password_hash FROM users WHERE id = %s", id_)
            return document is not None and rows == [("Ann", "user", document["passwordHash"])]

        await eventually(both_hold_it)

    async def test_the_document_is_as_the_old_back_end_writes_it(self, serve: Serve) -> None:
        service = await serve("dual_write")
        await service.register("Ann")
        document = service.documents["users"].find_one({"username": "Ann"})
        assert [name for name in document if name != "_cf"] == [
            "_id", "username", "passwordHash", "role", "guestMetadata", "lastLogin", "profilePicture",
            "friends", "createdAt", "updatedAt", "__v",
        ]  # fmt: skip
        assert document["createdAt"] == document["updatedAt"]
        assert document["__v"] == 0

    async def test_logging_in_stamps_the_time_in_both(self, serve: Serve) -> None:
        service = await serve("dual_write")
        await service.register("Ann")
        before = datetime.now(UTC)
        await service.log_in("Ann")
        document = service.documents["users"].find_one({"username": "Ann"})
        assert (document["lastLogin"] - before).total_seconds() > -0.01
        assert document["updatedAt"] == document["lastLogin"]

        async def stamped() -> bool:
            return service.rows("SELECT last_login FROM users") == [(document["lastLogin"],)]

        await eventually(stamped)


async def eventually(holds: Any, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not await holds():  # noqa: ASYNC110 - what it waits for is in a database
            await asyncio.sleep(0.05)


class TestUsersOfTheOldBackEnd:
    def old_user(self, **fields: Any) -> dict[str, Any]:
        hashed = bcrypt.hashpw(b"secret1", bcrypt.gensalt(4, prefix=b"2a")).decode()
        return {"_id": ObjectId(), "username": "Old Bob", "passwordHash": hashed, **fields}

    async def test_an_oldest_document_without_role_and_dates_is_a_user(
        self, serve: Serve, mongo_uri: str
    ) -> None:
        service = await serve("mongo_only")
        user = self.old_user()
        service.documents["users"].insert_one(user)
        shown = (await service.log_in("Old Bob")).json()["user"]
        assert shown["role"] == "user"
        assert "createdAt" not in shown
        assert shown["profilePicture"] is None

    async def test_a_long_old_name_logs_in(self, serve: Serve) -> None:
        service = await serve("mongo_only")
        service.documents["users"].insert_one(self.old_user(username="a" * 50))
        assert (await service.log_in("a" * 50)).status_code == 200

    async def test_two_names_equal_but_for_case_are_told_apart_by_spelling(self, serve: Serve) -> None:
        service = await serve("mongo_only")
        service.documents["users"].insert_many([self.old_user(username=name) for name in ("Bob", "bob")])
        for name in ("Bob", "bob"):
            assert (await service.log_in(name)).json()["user"]["username"] == name

    @pytest.mark.parametrize("prefix", ["2a", "2b"])
    async def test_hashes_of_other_tools_are_verified(self, serve: Serve, prefix: str) -> None:
        service = await serve("mongo_only", bcrypt_rounds=5)
        hashed = bcrypt.hashpw(b"secret1", bcrypt.gensalt(4, prefix=prefix.encode())).decode()
        service.documents["users"].insert_one(self.old_user(passwordHash=hashed))
        assert (await service.log_in("Old Bob")).status_code == 200

    async def test_the_picture_comes_back_to_the_letter(self, serve: Serve) -> None:
        service = await serve("mongo_only")
        picture = "data:image/png;base64,iVBORw0KGgo="
        service.documents["users"].insert_one(self.old_user(profilePicture=picture))
        assert (await service.log_in("Old Bob")).json()["user"]["profilePicture"] == picture


class TestGuests:
    def guest(self, service: Service, **identity: Any) -> dict[str, Any]:
        user = {"_id": ObjectId(), "username": "Gus", "passwordHash": None, "role": "guest"}
        service.documents["users"].insert_one(user)
        given = {
            "_id": ObjectId(), "displayName": "Gus", "normalizedName": "gus", "userId": user["_id"],
            "type": "guest", "isDeleted": False, **identity,
        }  # fmt: skip
        service.documents["playeridentities"].insert_one(given)
        return {"user": user["_id"], "identity": given["_id"]}

    async def test_a_guest_cannot_log_in(self, serve: Serve) -> None:
        service = await serve("mongo_only")
        self.guest(service)
        assert_problem(await service.log_in("Gus", ""), 401)

    async def test_registering_a_guests_name_claims_the_guest(self, serve: Serve) -> None:
        service = await serve("mongo_only")
        guest = self.guest(service)
        answer = await service.register("gus")
        assert answer.status_code == 201, answer.text
        assert answer.json()["user"]["id"] == str(guest["user"])
        user = (await service.log_in("gus")).json()["user"]
        assert [i["_id"] for i in user["identities"]] == [str(guest["identity"])]
        document = service.documents["playeridentities"].find_one({"_id": guest["identity"]})
        assert (document["type"], document["userId"]) == ("user", guest["user"])
        assert_problem(await service.register("Gus"), 400)

    @pytest.mark.parametrize(
        "claimed", [{"mergedInto": ObjectId()}, {"isDeleted": True}, {"userId": ObjectId()}, {"type": "user"}]
    )
    async def test_a_guest_whose_identity_is_not_free_keeps_the_name(
        self, serve: Serve, claimed: Any
    ) -> None:
        service = await serve("mongo_only")
        self.guest(service, **claimed)
        assert_problem(await service.register("Gus"), 400)

    async def test_a_free_identity_without_a_user_is_claimed(self, serve: Serve) -> None:
        service = await serve("mongo_only")
        identity = {
            "_id": ObjectId(),
            "displayName": "Gus",
            "normalizedName": "gus",
            "userId": None,
            "type": "guest",
        }
        service.documents["playeridentities"].insert_one(identity)
        id_ = (await service.register("Gus")).json()["user"]["id"]
        document = service.documents["playeridentities"].find_one({"_id": identity["_id"]})
        assert document["userId"] == ObjectId(id_)
        assert service.documents["playeridentities"].count_documents({}) == 1
