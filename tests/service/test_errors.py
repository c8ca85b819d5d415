"""Errors, CORS, bodies and the operations' routes: the same shape whatever went wrong."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.responses import Response

from crossfade import Busy, Options, OutcomeUnknown, StoreUnavailable, Undone, UndoPending
from crossfade.testing.proxy import FaultProxy
from scorekeeper import http
from scorekeeper.errors import too_many
from scorekeeper.http import LARGEST_BODY, SMALL_BODY

from .conftest import Serve, Service, assert_problem

JSON = {"Content-Type": "application/json"}
#: A store that is gone is noticed soon.
IMPATIENT = Options(primary_deadline=1.0, secondary_deadline=0.3)


@pytest.fixture
async def service(serve: Serve) -> Service:
    return await serve("dual_write")


@pytest.mark.parametrize("body", [b"{", b"{]", b"\xff\xfe", b'{"username": }', b"[" * 100_000, b"NaN,", b""])
async def test_malformed_json_is_400(service: Service, body: bytes) -> None:
    answer = await service.http.post("/api/users/login", content=body, headers=JSON)
    assert_problem(answer, 400)


async def test_an_unknown_route_is_404_and_a_wrong_method_405(service: Service) -> None:
    for path in ("/", "/api", "/api/nothing", "/api/users/../../etc/passwd"):
        assert_problem(await service.get(path), 404)
    answer = await service.http.delete("/api/users/register", headers=JSON)
    assert_problem(answer, 405)
    assert "POST" in answer.headers["allow"]


async def test_a_body_over_the_limit_is_413(service: Service) -> None:
    answer = await service.http.post("/api/users/login", content=b" " * (LARGEST_BODY + 1), headers=JSON)
    assert_problem(answer, 413)


async def test_a_body_over_the_limit_without_a_declared_length_is_413(service: Service) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent <= LARGEST_BODY:
            sent += 65_536
            yield b" " * 65_536

    assert_problem(await service.http.post("/api/users/login", content=chunks(), headers=JSON), 413)


async def test_a_body_of_exactly_the_limit_is_read(service: Service) -> None:
    body = b'{"profilePicture": "data:"}'.ljust(LARGEST_BODY)
    path = "/api/users/me/profile-picture"
    assert_problem(await service.http.put(path, content=body, headers=JSON), 401)
    assert_problem(await service.http.put(path, content=body + b" ", headers=JSON), 413)


async def test_where_only_names_are_taken_a_megabyte_is_the_limit(service: Service) -> None:
    body = b'{"username": "Ann", "password": "secret1"}'
    for size, status in ((SMALL_BODY, 401), (SMALL_BODY + 1, 413)):
        answer = await service.http.post("/api/users/login", content=body.ljust(size), headers=JSON)
        assert_problem(answer, status)


async def test_preflight_is_204_and_any_origin_may_read_errors_too(service: Service) -> None:
    origin = {"Origin": "https://client.example"}
    asked = {
        "Access-Control-Request-Method": "PUT",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    answer = await service.http.options("/api/users/me", headers=origin | asked)
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    refused = await service.http.get("/api/users/me", headers=origin)
    assert_problem(refused, 401)
    assert refused.headers["access-control-allow-origin"] == "*"


async def test_an_answer_depends_on_the_origin_and_says_so_whoever_asks(serve: Serve) -> None:
    client = "https://client.example"
    service = await serve(cors_origins=(client,))
    for origin, allowed in ((None, None), (client, client), ("https://other.example", None)):
        answer = await service.http.get("/api/health/live", headers={"Origin": origin} if origin else {})
        assert answer.headers.get("access-control-allow-origin") == allowed
        assert answer.headers["vary"] == "Origin"


async def test_what_nobody_expected_is_500_without_a_word_about_it(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError("psycopg says: password secret1")

    monkeypatch.setattr(service.app.state.profiles, "look_up", broken)
    answer = await service.http.get("/api/users/lookup/ann", headers={"Origin": "https://client.example"})
    assert_problem(answer, 500)
    assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    "error",
    [
        StoreUnavailable("mongo", "cannot reach db:27017 (refused)"),
        OutcomeUnknown("asked"),
        Busy("b"),
        Undone("u"),
        UndoPending("p"),
    ],
)
async def test_a_store_that_does_not_answer_is_503_with_retry_after(
    service: Service, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr(service.app.state.profiles, "look_up", failing)
    answer = await service.get("/api/users/lookup/ann")
    assert_problem(answer, 503)
    assert int(answer.headers["retry-after"]) > 0
    assert "27017" not in answer.text


def test_429_says_when_to_come_back() -> None:
    answer = too_many(12.3).response()
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "13"
    assert b'"retryAfter":13' in answer.body


async def test_a_request_id_goes_through_if_it_is_sane(service: Service) -> None:
    assert (await service.http.get("/api/health/live", headers={"X-Request-Id": "abc-1"})).headers[
        "x-request-id"
    ] == "abc-1"
    odd = await service.http.get("/api/health/live", headers={"X-Request-Id": "a b\tc"})
    assert len(odd.headers["x-request-id"]) == 32


async def test_health_shows_both_stores(service: Service) -> None:
    answer = await service.get("/api/health")
    assert answer.status_code == 200
    body = answer.json()
    assert body["status"] == "ok"
    assert body["database"]["active"] == "mongodb"
    for store in ("mongodb", "postgres"):
        assert body["database"][store]["healthy"] is True
        assert 0 < body["database"][store]["latency"] < 5000
    for part in ("live", "ready"):
        assert (await service.get(f"/api/health/{part}")).status_code == 200


async def test_metrics_count_decisions_and_routes_not_names(service: Service) -> None:
    await service.register("Metrica")
    await service.get("/api/users/lookup/Metrica")
    text = (await service.http.get("/metrics")).text
    assert 'scorekeeper_auth_total{outcome="accepted",step="register"}' in text
    assert 'route="/api/users/lookup/{username:path}"' in text
    assert "Metrica" not in text


async def test_the_api_documents_itself(service: Service) -> None:
    assert (await service.http.get("/docs")).status_code == 200
    paths = (await service.http.get("/openapi.json")).json()["paths"]
    assert "/api/users/register" in paths


class TestOutages:
    async def test_without_postgres_accounts_are_served_from_mongo(
        self, serve: Serve, postgres_proxy: FaultProxy
    ) -> None:
        service = await serve("dual_write", database_url=postgres_proxy.uri, options=IMPATIENT)
        await service.register("Ann")
        postgres_proxy.refuse()
        assert (await service.register("Bob")).status_code == 201
        answer = await service.log_in("Bob")
        assert answer.status_code == 200
        assert (await service.get("/api/users/me", answer.json()["token"])).status_code == 200
        assert_problem(await service.register("ann"), 400)
        health = await service.get("/api/health")
        assert (health.status_code, health.json()["status"]) == (200, "degraded")

    async def test_without_any_store_it_is_503_within_the_deadline(
        self, serve: Serve, mongo_proxy: FaultProxy, postgres_proxy: FaultProxy
    ) -> None:
        service = await serve(
            "dual_write", mongo_uri=mongo_proxy.uri, database_url=postgres_proxy.uri, options=IMPATIENT
        )
        await service.register("Ann")
        mongo_proxy.refuse()
        postgres_proxy.refuse()
        for answer in (await service.register("Bob"), await service.log_in("Ann")):
            assert_problem(answer, 503)
            assert answer.headers["retry-after"]
        health = await service.get("/api/health")
        assert health.status_code == 503
        assert health.headers["retry-after"]
        assert health.json()["database"]["mongodb"]["healthy"] is False
        assert (await service.get("/api/health/live")).status_code == 200

    async def test_without_redis_the_stores_are_asked(self, serve: Serve, redis_proxy: FaultProxy) -> None:
        service = await serve("dual_write", redis_url=redis_proxy.uri)
        token = (await service.register("Ann")).json()["token"]
        redis_proxy.refuse()
        answers: list[httpx.Response] = [await service.get("/api/users/me", token) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200] * 5


async def test_a_crowd_waits_for_its_turn_and_who_waits_too_long_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serving = most = 0
    may_end = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        nonlocal serving, most
        serving += 1
        most = max(most, serving)
        await asyncio.sleep(0.05)
        await may_end.wait()
        serving -= 1
        await Response(b"done")(scope, receive, send)

    transport = httpx.ASGITransport(http.Turns(slow))
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        may_end.set()
        answers = await asyncio.gather(*(client.get("/api/users/me") for _ in range(3 * http.AT_ONCE)))
        assert {answer.status_code for answer in answers} == {200}
        assert most == http.AT_ONCE

        may_end.clear()
        monkeypatch.setattr(http, "PATIENCE", 0.1)
        asked = [asyncio.create_task(client.get("/api/users/me")) for _ in range(2 * http.AT_ONCE)]
        crowded = [await answer for answer in itertools.islice(asyncio.as_completed(asked), http.AT_ONCE)]
        may_end.set()
        for answer in crowded:
            assert_problem(answer, 503)
        answers = await asyncio.gather(*asked)
        assert sum(answer.status_code == 200 for answer in answers) == http.AT_ONCE
        assert (await client.get("/api/health/live")).status_code == 200
