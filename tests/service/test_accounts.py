"""Changing an account, in every phase: picture, name, role, deletion; and what others see of it."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from bson import ObjectId
from PIL import Image

from crossfade import StoreUnavailable
from scorekeeper.routing import streamed

from .conftest import PHASES, Serve, Service, assert_problem
from .test_users import eventually

UNKNOWN = "0123456789abcdef01234567"


def picture(kind: str = "PNG", subtype: str | None = None, size: tuple[int, int] = (40, 30)) -> str:
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(file, kind)
    return f"data:image/{subtype or kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


class Person:
    """Somebody who is signed in."""

    def __init__(self, service: Service, answer: dict[str, Any]) -> None:
        self.service, self.id, self.token = service, answer["user"]["id"], answer["token"]

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        signed = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json", **headers}
        content = None if body is None else json.dumps(body).encode()
        return await self.service.http.request(method, f"/api/users{path}", content=content, headers=signed)


async def person(service: Service, name: str) -> Person:
    return Person(service, (await service.register(name)).json())


async def administrator(service: Service, name: str = "Root") -> Person:
    made = await person(service, name)
    await service.app.state.accounts["users"].update(ObjectId(made.id), {"role": "admin"})
    await service.app.state.cache.forget(made.id)
    return made


@pytest.fixture(params=PHASES)
async def service(request: pytest.FixtureRequest, serve: Serve) -> Service:
    return await serve(request.param)


class TestPictures:
    @pytest.mark.parametrize(
        ("kind", "subtype"), [("PNG", None), ("JPEG", None), ("JPEG", "jpg"), ("GIF", None), ("WEBP", None)]
    )
    async def test_a_picture_comes_back_to_the_letter(
        self, serve: Serve, kind: str, subtype: str | None
    ) -> None:
        service = await serve("dual_write")
        ann = await person(service, "Ann")
        url = picture(kind, subtype)
        answer = await ann.call("PUT", "/me/profile-picture", {"profilePicture": url})
        assert answer.status_code == 200, answer.text
        assert set(answer.json()) == {"message", "user"}
        assert set(answer.json()["user"]) == {"id", "username", "createdAt", "profilePicture"}
        assert answer.json()["user"]["profilePicture"] == url
        assert (await ann.call("GET", "/me/profile-picture")).json() == {"profilePicture": url}
        assert (await ann.call("GET", "/me")).json()["user"]["profilePicture"] == url

    async def test_it_is_bytes_in_a_table_of_its_own_and_text_in_the_document(self, service: Service) -> None:
        ann = await person(service, "Ann")
        url = picture()
        await ann.call("PUT", "/me/profile-picture", {"profilePicture": url})
        phase = service.app.state.accounts.phase.value

        async def whoever_should_holds_it() -> bool:
            held = service.documents["users"].find_one({"username": "Ann"})
            rows = (
                service.rows("SELECT content_type, data FROM user_pictures") if phase != "mongo_only" else []
            )
            bytes_ = base64.b64decode(url.partition(",")[2])
            in_mongo = phase == "postgres_only" or (held is not None and held["profilePicture"] == url)
            return in_mongo and (phase == "mongo_only" or rows == [("image/png", bytes_)])

        await eventually(whoever_should_holds_it)

    async def test_white_space_is_removed(self, serve: Serve) -> None:
        ann = await person(await serve("dual_write"), "Ann")
        url = picture()
        broken = "\n".join(url[at : at + 60] for at in range(0, len(url), 60)) + " \t\n"
        answer = await ann.call("PUT", "/me/profile-picture", {"profilePicture": broken})
        assert answer.json()["user"]["profilePicture"] == url

    async def test_it_can_be_removed_more_than_once(self, service: Service) -> None:
        ann = await person(service, "Ann")
        assert (await ann.call("GET", "/me/profile-picture")).json() == {"profilePicture": None}
        await ann.call("PUT", "/me/profile-picture", {"profilePicture": picture()})
        for _ in range(2):
            answer = await ann.call("DELETE", "/me/profile-picture")
            assert (answer.status_code, answer.json()["user"]["profilePicture"]) == (200, None)
        assert (await ann.call("GET", "/me/profile-picture")).json() == {"profilePicture": None}

    async def test_a_client_that_has_it_is_not_sent_it_again(self, serve: Serve) -> None:
        ann = await person(await serve("dual_write"), "Ann")
        await ann.call("PUT", "/me/profile-picture", {"profilePicture": picture()})
        first = await ann.call("GET", "/me/profile-picture")
        tag = first.headers["etag"]
        again = await ann.call("GET", "/me/profile-picture", **{"If-None-Match": tag})
        assert (again.status_code, again.content) == (304, b"")
        await ann.call("PUT", "/me/profile-picture", {"profilePicture": picture("GIF")})
        other = await ann.call("GET", "/me/profile-picture", **{"If-None-Match": tag})
        assert other.status_code == 200
        assert other.headers["etag"] != tag

    @pytest.mark.parametrize(
        "url",
        [
            "x" * 200,
            "data:image/png;base64,iVBORw0KGgo=",
            "data:image/svg+xml;base64," + "A" * 200,
            "data:text/html;base64," + "A" * 200,
            "data:image/png;base64," + "A" * 200,
            "data:image/png;base64," + "A" * 201,
            "data:image/png;base64," + "*" * 200,
            picture("JPEG").replace("image/jpeg", "image/png"),
            picture("PNG")[:-40],
            "\ud800" * 200,
        ],
        ids=lambda url: url[:30].encode("ascii", "replace").decode(),
    )
    async def test_what_is_no_such_image_is_refused(self, serve: Serve, url: str) -> None:
        ann = await person(await serve("dual_write"), "Ann")
        assert_problem(await ann.call("PUT", "/me/profile-picture", {"profilePicture": url}), 400)
        assert (await ann.call("GET", "/me/profile-picture")).json() == {"profilePicture": None}

    async def test_a_small_file_that_is_a_vast_image_is_refused_undecoded(self, serve: Serve) -> None:
        ann = await person(await serve("dual_write"), "Ann")

        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        for side in (6_000, 12_000, 60_000):
            head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
            bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
            url = f"data:image/png;base64,{base64.b64encode(bomb.ljust(120, b'.')).decode()}"
            refused = assert_problem(
                await ann.call("PUT", "/me/profile-picture", {"profilePicture": url}), 400
            )
            assert "pixels" in refused["error"]

    async def test_megabytes_of_picture_pass(self, serve: Serve) -> None:
        ann = await person(await serve("dual_write"), "Ann")
        noise = Image.effect_noise((1800, 1800), 100)
        file = io.BytesIO()
        noise.save(file, "PNG", compress_level=0)
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        assert len(url) > 4_000_000
        answer = await ann.call("PUT", "/me/profile-picture", {"profilePicture": url})
        assert answer.status_code == 200, answer.text
        assert (await ann.call("GET", "/me/profile-picture")).json() == {"profilePicture": url}


class TestNames:
    async def test_a_new_name_comes_with_a_token_and_the_old_token_stays_valid(
        self, service: Service
    ) -> None:
        ann = await person(service, "Ann")
        await ann.call("GET", "/me")
        answer = await ann.call("PATCH", f"/{ann.id}/name", {"name": "  Anna "})
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert set(body) == {"message", "token", "user"}
        assert (body["user"]["id"], body["user"]["username"]) == (ann.id, "Anna")
        for token in (ann.token, body["token"]):
            assert (await service.get("/api/users/me", token)).json()["user"]["username"] == "Anna"
        assert (await service.log_in("anna")).status_code == 200
        assert_problem(await service.log_in("Ann"), 401)
        assert (await service.register("Ann")).status_code == 201

    async def test_the_identity_remembers_its_names(self, service: Service) -> None:
        ann = await person(service, "Ann")
        for name in ("Anna", "Annabel"):
            assert (await ann.call("PATCH", f"/{ann.id}/name", {"name": name})).status_code == 200

        async def remembered() -> bool:
            [identity] = (await ann.call("GET", "/me")).json()["user"]["identities"]
            past = [(each["name"], each["changedBy"]) for each in identity["nameHistory"]]
            return identity["displayName"] == "Annabel" and past == [("Ann", ann.id), ("Anna", ann.id)]

        await eventually(remembered)

    @pytest.mark.parametrize("name", ["Bob", "bOB", " BOB ", "ab", "a" * 21, "line\nbreak", "", "\ud800lone"])
    async def test_a_name_that_cannot_be_or_is_taken_is_refused(self, serve: Serve, name: str) -> None:
        service = await serve("dual_write")
        ann, _bob = await person(service, "Ann"), await person(service, "Bob")
        assert_problem(await ann.call("PATCH", f"/{ann.id}/name", {"name": name}), 400)
        assert (await ann.call("GET", "/me")).json()["user"]["username"] == "Ann"

    async def test_ones_own_name_in_another_letter_case_is_free(self, service: Service) -> None:
        ann = await person(service, "Ann")
        answer = await ann.call("PATCH", f"/{ann.id}/name", {"name": "ANN"})
        assert answer.json()["user"]["username"] == "ANN"

    async def test_another_players_alias_is_refused_and_ones_own_is_not(self, service: Service) -> None:
        ann, bob = await person(service, "Ann"), await person(service, "Bob")
        identities = service.app.state.accounts["identities"]
        [of_bob] = await identities.find({"userId": ObjectId(bob.id)})
        alias = {"name": "Bobby", "normalizedName": "bobby", "addedAt": None, "addedBy": None}
        await identities.update(of_bob.id, {"aliases": [alias]})
        assert_problem(await ann.call("PATCH", f"/{ann.id}/name", {"name": "BOBBY"}), 400)
        assert (await bob.call("PATCH", f"/{bob.id}/name", {"name": "Bobby"})).status_code == 200

    async def test_somebody_elses_name_is_not_for_me_to_change(self, serve: Serve) -> None:
        service = await serve("dual_write")
        ann, bob = await person(service, "Ann"), await person(service, "Bob")
        for id_ in (bob.id, UNKNOWN, "x"):
            assert_problem(await ann.call("PATCH", f"/{id_}/name", {"name": "Zed"}), 403)
        assert_problem(await ann.call("PUT", f"/{ann.id}/username", {"username": "Zed"}), 403)

    async def test_an_administrator_may_change_anybodys(self, service: Service) -> None:
        root, ann = await administrator(service), await person(service, "Ann")
        answer = await root.call("PUT", f"/{ann.id}/username", {"username": "Anna"})
        assert answer.status_code == 200, answer.text
        user = answer.json()["user"]
        assert set(user) == {"_id", "username", "role", "createdAt"}
        assert (user["_id"], user["username"], user["role"]) == (ann.id, "Anna", "user")
        assert (await ann.call("GET", "/me")).json()["user"]["username"] == "Anna"
        assert_problem(await root.call("PUT", f"/{ann.id}/username", {"username": "root"}), 400)
        assert_problem(await root.call("PUT", f"/{UNKNOWN}/username", {"username": "Zed"}), 404)


class TestRoles:
    async def test_a_role_holds_on_the_very_next_request_on_every_worker(self, serve: Serve) -> None:
        one, other = await serve("dual_write"), await serve("dual_write")
        root, ann = await administrator(one), await person(one, "Ann")
        on_other = Person(other, {"user": {"id": ann.id}, "token": ann.token})
        for role, status in (("admin", 200), ("user", 403), ("admin", 200)):
            answer = await root.call("PUT", f"/{ann.id}/role", {"role": role})
            assert set(answer.json()["user"]) == {"_id", "username", "role", "createdAt"}
            for who in (on_other, ann):
                assert (await who.call("GET", "/admin/all")).status_code == status

    @pytest.mark.parametrize("role", ["guest", "root", "", None, 1, {"$ne": 1}])
    async def test_there_are_two_roles_to_give(self, serve: Serve, role: Any) -> None:
        service = await serve("dual_write")
        root, ann = await administrator(service), await person(service, "Ann")
        assert_problem(await root.call("PUT", f"/{ann.id}/role", {"role": role}), 400)

    async def test_only_an_administrator_may(self, serve: Serve) -> None:
        service = await serve("dual_write")
        root, ann = await administrator(service), await person(service, "Ann")
        assert_problem(await ann.call("PUT", f"/{ann.id}/role", {"role": "admin"}), 403)
        assert_problem(await root.call("PUT", f"/{UNKNOWN}/role", {"role": "admin"}), 404)
        assert_problem(await service.http.put(f"/api/users/{ann.id}/role", json={"role": "admin"}), 401)


class TestDeletion:
    async def test_nothing_names_a_deleted_account_any_more(self, service: Service) -> None:
        ann, bob, cid = [await person(service, name) for name in ("Ann", "Bob", "Cid")]
        asked = await bob.call("POST", f"/{bob.id}/friend-requests", {"receiverId": ann.id})
        request = asked.json()["friendRequest"]["id"]
        assert (await ann.call("POST", f"/{ann.id}/friend-requests/{request}/accept")).status_code == 200
        await ann.call("POST", f"/{ann.id}/friend-requests", {"receiverId": cid.id})
        answer = await ann.call("DELETE", "/me")
        assert (answer.status_code, set(answer.json())) == (200, {"message"})
        assert_problem(await ann.call("GET", "/me"), 401)
        assert_problem(await ann.call("DELETE", "/me"), 401)
        assert_problem(await service.log_in("Ann"), 401)
        accounts = service.app.state.accounts
        id_ = ObjectId(ann.id)

        async def gone() -> bool:
            of_bob = await accounts["users"].get(ObjectId(bob.id))
            requests = [
                await accounts["friend_requests"].find({side: id_}) for side in ("sender", "receiver")
            ]
            return of_bob["friends"] == [] and requests == [[], []]

        await eventually(gone)

        async def in_neither_store() -> bool:
            rows = service.rows("SELECT id FROM users WHERE id = %s", ann.id)
            return not rows and service.documents["users"].find_one({"_id": id_}) is None

        await eventually(in_neither_store)

    async def test_its_identity_stays_in_its_games_and_the_name_can_be_registered_anew(
        self, service: Service
    ) -> None:
        ann = await person(service, "Ann")
        identities = service.app.state.accounts["identities"]
        [before] = await identities.find({"userId": ObjectId(ann.id)})
        await ann.call("DELETE", "/me")
        again = await person(service, "Ann")
        assert again.id != ann.id

        async def is_nobodys() -> bool:
            left = await identities.get(before.id)
            return (left["userId"], left["type"], left["displayName"]) == (None, "imported", "Ann")

        await eventually(is_nobodys)
        [after] = await identities.find({"userId": ObjectId(again.id)})
        assert after.id != before.id

    async def test_an_administrator_may_delete_anybody(self, service: Service) -> None:
        root, ann = await administrator(service), await person(service, "Ann")
        assert_problem(await ann.call("DELETE", f"/{root.id}"), 403)
        assert (await root.call("DELETE", f"/{ann.id}")).status_code == 200
        assert_problem(await ann.call("GET", "/me"), 401)
        assert_problem(await root.call("DELETE", f"/{ann.id}"), 404)


class TestLists:
    async def test_all_accounts_by_name_without_guests(self, service: Service) -> None:
        cid, ann = await person(service, "Cid"), await person(service, "Ann")
        root = await administrator(service, "Bob")
        users = service.app.state.accounts["users"]
        await users.insert({"username": "Gus", "role": "guest", "passwordHash": None})
        await users.insert({"username": "Old Eve"})  # as old as the first documents
        answer = await cid.call("GET", "/all")
        assert answer.status_code == 200, answer.text
        listed = answer.json()["users"]
        assert [(user["username"], user["role"]) for user in listed] == [
            ("Ann", "user"), ("Bob", "admin"), ("Cid", "user"), ("Old Eve", "user"),
        ]  # fmt: skip
        assert set(listed[0]) == {"id", "username", "createdAt", "profilePicture", "role"}
        assert "createdAt" not in listed[3]
        assert_problem(await ann.call("GET", "/admin/all"), 403)
        all_ = (await root.call("GET", "/admin/all")).json()["users"]
        assert [user["username"] for user in all_] == ["Ann", "Bob", "Cid", "Gus", "Old Eve"]
        assert set(all_[0]) == {
            "id", "_id", "username", "email", "role", "createdAt", "lastLogin", "profilePicture",
        }  # fmt: skip

    async def test_a_list_is_whole_however_many_portions_it_takes(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("scorekeeper.users.repository.PORTION", 3)
        names = sorted(f"User {n}" for n in range(9))
        people = [await person(service, name) for name in names]
        listed = (await people[0].call("GET", "/all")).json()["users"]
        assert [user["username"] for user in listed] == names


class TestProfiles:
    async def test_a_profile_is_found_by_id_and_by_name(self, service: Service) -> None:
        ann = await person(service, "Ann")
        for key in (ann.id, "Ann", "ann", "%20ANN%20"):
            answer = await service.get(f"/api/users/{key}/profile")
            assert answer.status_code == 200, key
            assert answer.headers["cache-control"] == "no-store"
            body = answer.json()
            assert set(body) == {
                "id", "_id", "username", "createdAt", "profilePicture", "isRegisteredUser", "totalGames",
                "totalWins", "identities", "primaryIdentityId", "games",
            }  # fmt: skip
            assert (body["id"], body["_id"], body["username"]) == (ann.id, ann.id, "Ann")
            assert (body["isRegisteredUser"], body["identities"]) == (True, ["Ann"])
        for key in ("Nobody", UNKNOWN, "%00", "a" * 400, "%ED%A0%80"):
            assert_problem(await service.get(f"/api/users/{key}/profile"), 404)

    async def test_a_guest_who_was_merged_into_an_account_is_that_account(self, service: Service) -> None:
        ann = await person(service, "Ann")
        identities = service.app.state.accounts["identities"]
        [own] = await identities.find({"userId": ObjectId(ann.id)})
        between = await identities.insert(player("Middle", own.id))
        await identities.insert(player("Gus", between.id))
        assert (await service.get("/api/users/gus/profile")).json()["id"] == ann.id

    async def test_a_circle_of_merges_ends_in_nobody(self, service: Service) -> None:
        identities = service.app.state.accounts["identities"]
        first = await identities.insert(player("Gus", None))
        other = await identities.insert(player("Hal", first.id))
        await identities.update(first.id, {"mergedInto": other.id})
        assert_problem(await service.get("/api/users/gus/profile"), 404)


def player(name: str, merged_into: Any) -> dict[str, Any]:
    return {
        "displayName": name, "normalizedName": name.lower(), "userId": None, "type": "imported",
        "mergedInto": merged_into, "isDeleted": False,
    }  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 12])
async def test_a_long_list_is_sent_while_it_is_read(count: int) -> None:
    read = 0

    async def items() -> AsyncIterator[dict[str, Any]]:
        nonlocal read
        for read in range(1, count + 1):
            yield {"id": str(read), "profilePicture": "x" * 30_000}

    answer = await streamed("users", items())
    assert read == min(count, 1)
    pieces, read_at = [], []
    async for piece in answer.body_iterator:
        pieces.append(bytes(piece))
        read_at.append(read)
    assert [user["id"] for user in json.loads(b"".join(pieces))["users"]] == [
        str(n) for n in range(1, count + 1)
    ]
    assert read_at == sorted(read_at)
    assert len(pieces) == 1 + count // 3
    assert max(map(len, pieces)) < 100_000


async def test_a_list_that_cannot_be_read_is_an_error_and_no_answer() -> None:
    async def items() -> AsyncIterator[dict[str, Any]]:
        raise StoreUnavailable("mongo", "it does not answer")
        yield {}

    with pytest.raises(StoreUnavailable):
        await streamed("users", items())
