"""Limits, lockout, hashes, keys, audit events and headers: what stands between an account and others."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import bcrypt
import httpx
import pytest
from argon2 import PasswordHasher

from crossfade.testing.proxy import FaultProxy
from scorekeeper.auth.tokens import Tokens, key_id
from scorekeeper.limits import network_of

from .conftest import SECRET, Serve, Service, assert_problem
from .test_accounts import administrator, person
from .test_users import eventually

WRONG = "not the password"


@contextlib.asynccontextmanager
async def at(service: Service, address: str) -> AsyncIterator[Service]:
    """The same worker, asked from another address."""
    transport = httpx.ASGITransport(service.app, client=(address, 1), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://service", timeout=60) as http:
        yield Service(http, service.app, service.documents, service.database_url)


def assert_limited(answer: httpx.Response) -> None:
    body = assert_problem(answer, 429)
    assert body["retryAfter"] == int(answer.headers["retry-after"]) >= 1


async def guess(service: Service, name: str, times: int) -> list[int]:
    return [(await service.log_in(name, WRONG)).status_code for _ in range(times)]


class TestLimits:
    async def test_too_many_wrong_passwords_have_to_wait_on_every_worker(self, serve: Serve) -> None:
        one, other = await serve(), await serve()
        await one.register("Ann")
        assert await guess(one, "Ann", 10) == [401] * 10
        for worker in (one, other):
            assert_limited(await worker.log_in("Ann", WRONG))
            assert_limited(await worker.log_in(" aNN ", "secret1"))

    async def test_an_unknown_name_is_limited_like_any_other(self, serve: Serve) -> None:
        service = await serve()
        assert await guess(service, "Nobody", 11) == [401] * 10 + [429]

    async def test_a_right_password_begins_the_count_anew(self, serve: Serve) -> None:
        service = await serve()
        await service.register("Ann")
        for _ in range(3):
            assert await guess(service, "Ann", 9) == [401] * 9
            assert (await service.log_in("Ann")).status_code == 200

    async def test_many_accounts_tried_from_one_address(self, serve: Serve) -> None:
        service = await serve(limit_login_address="5 per 5 minutes")
        for n in range(5):
            assert await guess(service, f"Nobody {n}", 1) == [401]
        assert_limited(await service.log_in("Nobody 6", WRONG))
        async with at(service, "203.0.113.7") as elsewhere:
            assert await guess(elsewhere, "Nobody 6", 1) == [401]

    async def test_nobody_is_locked_out_by_somebody_elses_guesses(self, serve: Serve) -> None:
        service = await serve(limit_login_account="5 per 1 hour")
        await service.register("Ann")
        async with at(service, "198.51.100.1") as home:
            assert (await home.log_in("Ann")).status_code == 200
            for n in range(8):
                async with at(service, f"203.0.113.{n}") as attacker:
                    await guess(attacker, "Ann", 2)
            # From home as ever, a typing mistake included, and from a new place at the first attempt.
            assert await guess(home, "Ann", 2) == [401, 401]
            assert (await home.log_in("Ann")).status_code == 200
        async with at(service, "198.51.100.2") as holiday:
            assert (await holiday.log_in("Ann")).status_code == 200
        # Whoever does not know the password has one guess per address now, not ten.
        async with at(service, "203.0.113.99") as attacker:
            assert await guess(attacker, "Ann", 2) == [401, 429]

    async def test_an_address_full_of_failures_keeps_out_nobody_who_is_known_there(
        self, serve: Serve
    ) -> None:
        service = await serve(limit_login_address="5 per 5 minutes")
        await service.register("Ann")
        assert (await service.log_in("Ann")).status_code == 200
        for n in range(6):
            await guess(service, f"Nobody {n}", 1)
        assert_limited(await service.log_in("Nobody", WRONG))
        assert (await service.log_in("Ann")).status_code == 200

    async def test_registrations_of_one_address(self, serve: Serve) -> None:
        service = await serve(limit_register_address="2 per 1 minute")
        assert [(await service.register(name)).status_code for name in ("Ann", "Bob")] == [201, 201]
        assert_limited(await service.register("Cid"))

    async def test_without_redis_they_hold_per_worker(self, serve: Serve, redis_proxy: FaultProxy) -> None:
        service = await serve(redis_url=redis_proxy.uri, cache_ttl=0.1)
        await service.register("Ann")
        redis_proxy.refuse()
        assert await guess(service, "Ann", 11) == [401] * 10 + [429]
        text = (await service.get("/metrics")).text
        assert 'scorekeeper_degraded_total{what="rate_limit"}' in text

    async def test_they_can_be_switched_off_for_a_load_test(self, serve: Serve) -> None:
        service = await serve(rate_limits=False)
        assert await guess(service, "Nobody", 15) == [401] * 15

    @pytest.mark.parametrize(
        ("address", "network"),
        [
            ("192.0.2.1", "192.0.2.1"),
            ("2001:db8::1", "2001:db8::"),
            ("2001:db8::ffff:2", "2001:db8::"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
            (None, "local"),
            ("a host", "local"),
        ],
    )
    def test_a_household_has_one_address(self, address: str | None, network: str) -> None:
        assert network_of(address) == network


class TestHashes:
    async def test_while_the_old_back_end_runs_hashes_are_bcrypt(self, serve: Serve) -> None:
        for phase in ("mongo_only", "dual_write"):
            service = await serve(phase, hash_scheme="auto")
            await service.register(f"In {phase}"[:20])
        for user in service.documents["users"].find():
            assert user["passwordHash"].startswith("$2b$04$")

    async def test_afterwards_a_log_in_replaces_them_by_argon2id(self, serve: Serve) -> None:
        service = await serve("postgres_primary")
        old = bcrypt.hashpw(b"secret1", bcrypt.gensalt(4, prefix=b"2a")).decode()
        users = service.app.state.accounts["users"]
        ann = await users.insert({"username": "Ann", "passwordHash": old, "role": "user"})
        for _ in range(2):
            assert (await service.log_in("Ann")).status_code == 200
            assert_problem(await service.log_in("Ann", WRONG), 401)
        held = (await users.get(ann.id))["passwordHash"]
        assert held.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
        assert PasswordHasher().verify(held, "secret1")
        events = await service.app.state.accounts["audit_events"].find({"event": "password.rehashed"})
        assert [event["userId"] for event in events] == [ann.id]

    async def test_a_long_password_goes_on_counting_by_its_first_72_bytes(self, serve: Serve) -> None:
        service = await serve("postgres_primary")
        long = "é" * 50
        assert (await service.register("Ann", long)).status_code == 201
        assert (await service.log_in("Ann", long)).status_code == 200
        assert (await service.log_in("Ann", "é" * 36 + "another end")).status_code == 200
        assert_problem(await service.log_in("Ann", "é" * 35), 401)

    async def test_an_old_back_end_to_forward_to_keeps_them_bcrypt(self, serve: Serve) -> None:
        service = await serve("postgres_primary", legacy_url="http://127.0.0.1:9")
        await service.register("Ann")
        [user] = await service.app.state.accounts["users"].find()
        assert user["passwordHash"].startswith("$2b$")


class TestKeys:
    async def test_a_replaced_secret_keeps_its_tokens_good(self, serve: Serve) -> None:
        before = await serve()
        ann = await person(before, "Ann")
        after = await serve(jwt_secret="a new secret of 36 bytes or so......", jwt_former_secrets=SECRET)
        assert (await after.get("/api/users/me", ann.token)).status_code == 200
        fresh = (await after.log_in("Ann")).json()["token"]
        assert (await after.get("/api/users/me", fresh)).status_code == 200
        # Who has only the old secret does not take the new one's tokens.
        assert_problem(await before.get("/api/users/me", fresh), 401)
        without = await serve(jwt_secret="a new secret of 36 bytes or so......")
        assert_problem(await without.get("/api/users/me", ann.token), 401)

    def test_a_token_without_kid_is_tried_with_every_secret_and_one_with_it_only_with_its_own(self) -> None:
        tokens = Tokens("new", former=["old", "older"])
        for secret in ("new", "old", "older"):
            assert tokens.read(Tokens(secret).issue("a" * 24, "Ann")).user_id == "a" * 24
        assert key_id("new") != key_id("old")


class TestAudit:
    async def events(self, service: Service) -> list[tuple[str, Any]]:
        found = await service.app.state.accounts["audit_events"].find(order_by="createdAt")
        return [
            (event["event"], None if event["userId"] is None else str(event["userId"])) for event in found
        ]

    @pytest.mark.parametrize("phase", ["mongo_only", "dual_write", "postgres_primary"])
    async def test_every_decision_leaves_an_event_in_both_stores(self, serve: Serve, phase: str) -> None:
        service = await serve(phase, hash_scheme="bcrypt")
        root, ann = await administrator(service), await person(service, "Ann")
        await service.log_in("Ann")
        await service.log_in("Ann", WRONG)
        await service.log_in("Nobody", WRONG)
        await service.get("/api/users/me", "no token")
        await ann.call("GET", "/admin/all")
        await root.call("PUT", f"/{ann.id}/role", {"role": "admin"})
        await ann.call("PATCH", f"/{ann.id}/name", {"name": "Anna"})
        await ann.call("DELETE", "/me")
        assert Counter(await self.events(service)) == Counter(
            [
                ("account.registered", root.id), ("account.registered", ann.id), ("login.accepted", ann.id),
                ("login.refused", ann.id), ("login.refused", None), ("token.refused", None),
                ("admin.refused", ann.id), ("account.role_changed", ann.id), ("account.renamed", ann.id),
                ("account.deleted", ann.id),
            ]
        )  # fmt: skip
        if phase == "mongo_only":
            return

        async def in_both() -> bool:
            rows = service.rows("SELECT count(*), count(address), count(request_id) FROM audit_events")
            return rows == [(10, 10, 10)] and service.documents["auditevents"].count_documents({}) == 10

        await eventually(in_both)
        changed = await service.app.state.accounts["audit_events"].find({"event": "account.role_changed"})
        assert str(changed[0]["by"]) == root.id
        assert changed[0]["details"] == {"before": "user", "after": "admin"}

    async def test_refused_tokens_of_one_address_fill_nothing(self, serve: Serve) -> None:
        service = await serve()
        await asyncio.gather(*(service.get("/api/users/me", f"forged {n}") for n in range(80)))
        # At most: on a busy machine a store may refuse one, and nobody waits for it.
        assert 1 <= len(await self.events(service)) <= 60


async def test_every_answer_has_the_security_headers(serve: Serve) -> None:
    service = await serve()
    for path in ("/api/users/me", "/api/nothing", "/api/health/live", "/api/users/lookup/x"):
        headers = (await service.get(path)).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert headers["x-request-id"]
    assert "content-security-policy" not in (await service.get("/docs")).headers
