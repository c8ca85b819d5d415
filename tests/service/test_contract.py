"""The contract where phases, old documents and odd requests meet; the plain paths are in `test_users`."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import bcrypt
import pytest
from bson import ObjectId
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crossfade import Options, Phase
from crossfade.testing.proxy import FaultProxy
from scorekeeper.auth.passwords import Passwords, cost_of
from scorekeeper.legacy.passwords import FOREIGN_PASSWORDS, PASSWORDS

from .conftest import ADMINISTRATOR, PHASES, SECRET, Serve, Service, assert_problem
from .test_tokens import claims, signed

IMPATIENT = Options(primary_deadline=1.5, secondary_deadline=0.3)
JSON = {"Content-Type": "application/json"}
PASSWORD, OLD_HASH = next(iter(PASSWORDS.items()))
FOREIGN_PASSWORD, FOREIGN_HASH = next(iter(FOREIGN_PASSWORDS.items()))


async def stored(service: Service, entity: str, document: dict[str, Any]) -> str:
    """Put a document of the old back end where the phase expects it, mapped as a backfill maps it."""
    record = await service.app.state.accounts[entity].insert({"_id": ObjectId(), **document})
    return str(record.id)


@pytest.fixture(params=PHASES)
async def service(request: pytest.FixtureRequest, serve: Serve) -> Service:
    return await serve(request.param)


class TestInEveryPhase:
    async def test_health_names_the_store_that_decides(self, service: Service) -> None:
        answer = await service.get("/api/health")
        body = answer.json()
        assert answer.status_code == 200
        assert set(body) == {"status", "message", "database"}
        assert set(body["database"]) == {"active", "mongodb", "postgres"}
        decides = service.app.state.accounts.phase.rules.primary
        assert body["database"]["active"] == {"mongo": "mongodb", "postgres": "postgres"}[decides]
        for store in ("mongodb", "postgres"):
            assert set(body["database"][store]) == {"healthy", "latency"}

    async def test_the_oldest_accounts_log_in_and_lack_what_they_never_had(self, service: Service) -> None:
        id_ = await stored(service, "users", {"username": "Old Bob", "passwordHash": OLD_HASH})
        other = await stored(service, "users", {"username": "Imported", "passwordHash": FOREIGN_HASH})
        assert (await service.log_in("imported", FOREIGN_PASSWORD)).json()["user"]["id"] == other
        answer = await service.log_in("OLD BOB", PASSWORD)
        assert answer.status_code == 200, answer.text
        user = answer.json()["user"]
        identities = user.pop("identities")
        # No createdAt: absent, not null.
        assert user == {"id": id_, "username": "Old Bob", "role": "user", "profilePicture": None}
        # The first log-in made up for the identity that the account lacked.
        assert [identity["displayName"] for identity in identities] == ["Old Bob"]
        assert all(set(identity) >= {"_id", "aliases", "nameHistory"} for identity in identities)
        me = (await service.get("/api/users/profile", answer.json()["token"])).json()["user"]
        assert me == {**user, "identities": identities}
        found = await service.get("/api/users/lookup/old%20bob")
        assert found.json() == {"found": True, "user": {"id": id_, "username": "Old Bob"}}

    async def test_a_guest_has_no_password_and_its_name_is_claimed_by_registering(
        self, service: Service
    ) -> None:
        guest = {"username": "Gus", "passwordHash": None, "role": "guest"}
        id_ = await stored(service, "users", guest)
        identity = {"displayName": "Gus", "normalizedName": "gus", "type": "guest", "isDeleted": False}
        claimed = await stored(service, "identities", {**identity, "userId": ObjectId(id_)})
        for guess in ("", "null", "None", "secret1"):
            assert_problem(await service.log_in("Gus", guess), 401)
        registered = await service.register("GUS")
        assert registered.status_code == 201, registered.text
        user = (await service.log_in("gus")).json()["user"]
        assert (user["id"], user["username"], user["role"]) == (id_, "GUS", "user")
        assert [i["_id"] for i in user["identities"]] == [claimed]
        assert_problem(await service.register("Gus"), 400)

    async def test_letters_are_compared_as_the_old_back_end_compares_them(self, service: Service) -> None:
        taken = {
            "Zoë": "ZOË", "İstanbul": "i̇stanbul", "ΟΔΟΣ": "οδος", "ÅSA": "åsa", "\ufeffTom\u00a0": "tom",
        }  # fmt: skip
        for name, again in taken.items():
            answer = await service.register(name)
            assert answer.status_code == 201, (name, answer.text)
            assert answer.json()["user"]["username"] == name.strip("\ufeff\u00a0")
            assert_problem(await service.register(again), 400)
            assert (await service.log_in(again)).json()["user"]["id"] == answer.json()["user"]["id"]
        # Lower-cased, not case-folded: two people.
        assert (await service.register("Strauß")).status_code == 201
        assert (await service.register("STRAUSS")).status_code == 201

    async def test_what_a_client_adds_to_a_registration_is_not_taken(self, service: Service) -> None:
        mine = {"role": "admin", "_id": "0" * 24, "passwordHash": OLD_HASH, "_cf": {"rev": 9}, "friends": [1]}
        body = {"username": "Eve", "password": "secret1", **mine}
        answer = await service.http.post("/api/users/register", json=body)
        assert answer.status_code == 201
        assert answer.json()["user"]["role"] == "user"
        assert answer.json()["user"]["id"] != "0" * 24
        assert_problem(await service.log_in("Eve", PASSWORD), 401)
        forged = signed(claims(userId=answer.json()["user"]["id"], role="admin"))
        assert (await service.get("/api/users/me", forged)).json()["user"]["role"] == "user"

    async def test_refusals_of_a_log_in_do_equal_work(self, service: Service) -> None:
        cost = 6
        rounds: list[int] = []

        def check(password: bytes, hashed: bytes) -> bool:
            rounds.append(2 ** (cost_of(hashed.decode()) or 99))
            return bcrypt.checkpw(password, hashed)

        hashes = {"Ann": bcrypt.hashpw(b"secret1", bcrypt.gensalt(cost)).decode(), "Gus": None, "Odd": "?"}
        for name, hashed in hashes.items():
            await stored(service, "users", {"username": name, "passwordHash": hashed})
        async with Passwords(cost, 1, check) as passwords:
            service.app.state.users._passwords = passwords
            for name in ("Ann", "ann", "Nobody", "Gus", "Odd", "x" * 300, "a\0b", "\n", ""):
                rounds.clear()
                answer = await service.log_in(name, "wrong password")
                assert_problem(answer, 401)
                assert answer.json()["error"] == "Invalid username or password"
                assert sum(rounds) == 2**cost, name

    async def test_a_password_counts_by_its_first_72_bytes(self, service: Service) -> None:
        assert (await service.register("Ann", "é" * 60)).status_code == 201
        assert (await service.log_in("Ann", "é" * 60)).status_code == 200
        # bcrypt reads 72 bytes; the old back end accepts this too, and must not lock anybody out here.
        assert (await service.log_in("Ann", "é" * 36 + "other")).status_code == 200
        assert_problem(await service.log_in("Ann", "é" * 35), 401)
        assert_problem(await service.register("Bob", "x" * 5000), 400)


class TestOddRequests:
    @pytest.fixture
    async def service(self, serve: Serve) -> Service:
        return await serve("dual_write")

    async def test_a_name_that_cannot_be_is_not_found(self, service: Service) -> None:
        for name in (
            "%00",
            "a%00b",
            "%FF%FE",
            "%ED%A0%80",
            "x" * 2000,
            "%20",
            "%7B%22%24ne%22%3Anull%7D",
            "",
        ):
            body = assert_problem(await service.get(f"/api/users/lookup/{name}"), 404)
            if name:
                assert (body["found"], body["message"]) == (False, "User not found")

    async def test_a_path_with_a_slash_too_many_is_404_and_no_redirect(self, service: Service) -> None:
        for path in ("/api/users/me/", "/api/users//me", "/api/health/", "/api/users/register/"):
            assert_problem(await service.get(path), 404)

    @pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
    async def test_a_body_that_is_not_declared_as_json_is_400(
        self, service: Service, kind: str | None
    ) -> None:
        headers = {"Content-Type": kind} if kind else {}
        body = b"username=Ann&password=secret1"
        assert_problem(await service.http.post("/api/users/login", content=body, headers=headers), 400)

    async def test_the_old_back_end_accepts_our_tokens(self, service: Service) -> None:
        token = (await service.register("Zoë >?~")).json()["token"]
        head, payload, signature = token.split(".")
        told = base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
        assert set(json.loads(told)) == {"userId", "username", "iat", "exp"}
        assert json.loads(base64.b64decode(head + "=" * (-len(head) % 4)))["alg"] == "HS256"
        made = hmac.new(SECRET.encode(), f"{head}.{payload}".encode(), hashlib.sha256).digest()
        assert base64.urlsafe_b64encode(made).rstrip(b"=").decode() == signature

    async def test_a_document_that_the_old_back_end_has_just_written_keeps_its_name(
        self, service: Service
    ) -> None:
        moment = datetime.now(UTC)
        old = {"username": "Old Bob", "passwordHash": OLD_HASH, "createdAt": moment, "updatedAt": moment}
        service.documents["users"].insert_one(old)
        assert_problem(await service.register("Old Bob"), 400)

        async def stamped() -> bool:
            return service.documents["users"].find_one({"_cf.keys.username": "old bob"}) is not None

        # Another letter case is noticed from the next sweep on: every 2 s.
        await eventually(stamped)
        assert_problem(await service.register("OLD BOB"), 400)
        assert (await service.log_in("old bob", PASSWORD)).status_code == 200

    async def test_only_a_listed_origin_may_read(self, serve: Serve) -> None:
        service = await serve("mongo_only", cors_origins="https://one.example, https://two.example")
        for origin, allowed in (
            ("https://two.example", "https://two.example"),
            ("https://evil.example", None),
        ):
            answer = await service.http.get("/api/health/live", headers={"Origin": origin})
            assert answer.headers.get("access-control-allow-origin") == allowed


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
    | st.sampled_from(["Ann", "secret1", "\0", "\ud800", "a" * 20, "$ne", "__proto__"])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
bodies = values | st.fixed_dictionaries({}, optional={"username": values, "password": values})


@pytest.fixture
async def dual_writing(serve: Serve) -> Service:
    return await serve("dual_write")


# bcrypt of the least cost and three stores: some milliseconds each.
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=bodies)
async def test_whatever_json_is_sent_the_answer_is_one_of_the_contracts(
    dual_writing: Service, body: Any
) -> None:
    content = json.dumps(body).encode()
    for path, refusals in (("register", {400}), ("login", {400, 401})):
        answer = await dual_writing.http.post(f"/api/users/{path}", content=content, headers=JSON)
        if answer.status_code not in (200, 201):
            assert answer.status_code in refusals, answer.text
            assert_problem(answer, answer.status_code)


class TestStores:
    @pytest.mark.parametrize("phase", ["postgres_read", "postgres_primary"])
    async def test_the_store_that_only_follows_may_be_gone(
        self, serve: Serve, phase: str, mongo_proxy: FaultProxy, postgres_proxy: FaultProxy
    ) -> None:
        service = await serve(
            phase, mongo_uri=mongo_proxy.uri, database_url=postgres_proxy.uri, options=IMPATIENT
        )
        await service.register("Ann")
        (mongo_proxy if phase == "postgres_primary" else postgres_proxy).refuse()
        assert (await service.register("Bob")).status_code == 201
        for name in ("Ann", "Bob"):
            answer = await service.log_in(name)
            assert answer.status_code == 200, answer.text
            me = await service.get("/api/users/me", answer.json()["token"])
            assert me.json()["user"]["username"] == name
        assert_problem(await service.register("bOB"), 400)
        (mongo_proxy if phase == "postgres_primary" else postgres_proxy).pass_through()

        async def both_hold_bob() -> bool:
            document = service.documents["users"].find_one({"username": "Bob"})
            rows = service.rows("SELECT id FROM users WHERE username = 'Bob'")
            return document is not None and rows == [(str(document["_id"]),)]

        await eventually(both_hold_bob)

    async def test_an_account_stays_the_same_while_the_phase_changes_under_it(self, serve: Serve) -> None:
        # Two workers; neither is restarted.
        one, other = await serve("dual_write"), await serve("dual_write")
        registered = (await one.register("Ann")).json()
        expected = (await one.log_in("Ann")).json()["user"]
        for phase in ("shadow_read", "postgres_read", "postgres_primary", "postgres_read", "dual_write"):
            await change_phase(one, phase)
            await other.app.state.accounts.board.refresh()
            for worker in (one, other):
                me = await worker.get("/api/users/me", registered["token"])
                assert me.json() == {"user": expected}, phase
            name = f"Of {phase}"[:20]
            first, second = await asyncio.gather(one.register(name), other.register(name.upper()))
            assert {first.status_code, second.status_code} <= {201, 400}, phase
            assert (await other.log_in("aNN")).status_code == 200
        assert (await one.log_in("Of postgres_primary")).status_code == 200

    async def test_with_redis_dead_a_role_still_holds_on_the_next_request(
        self, serve: Serve, redis_proxy: FaultProxy
    ) -> None:
        workers = [await serve(redis_url=redis_proxy.uri, cache_ttl=0.1) for _ in range(2)]
        body = (await workers[0].register("Ann")).json()
        for worker in workers:
            await worker.get("/api/users/me", body["token"])
        redis_proxy.refuse()
        # Acknowledged only when no entry from before can be alive, not even for one who still reaches Redis.
        await workers[0].app.state.account_changes.set_role(ADMINISTRATOR, body["user"]["id"], "admin")
        redis_proxy.pass_through()
        for worker in workers:
            me = await worker.get("/api/users/me", body["token"])
            assert me.json()["user"]["role"] == "admin"
            current = await worker.app.state.authenticator.user_of(f"Bearer {body['token']}")
            assert current.role == "admin"


async def change_phase(service: Service, phase: str) -> None:
    accounts = service.app.state.accounts
    old = (await accounts.board.refresh()).control
    new = old.changed(by="a test", reason="a test", phase=Phase(phase))
    assert await accounts.record.change(old, new, timeout=10)
    await accounts.board.refresh()


async def eventually(holds: Callable[[], Any], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not await holds():  # noqa: ASYNC110 - what it waits for is in a database
            await asyncio.sleep(0.05)
