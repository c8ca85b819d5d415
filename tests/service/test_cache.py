"""The cache never serves what was before an acknowledged change, and asks the stores once for many."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from bson import ObjectId

from crossfade import NotFound
from crossfade.testing.proxy import FaultProxy
from scorekeeper import cache as cache_module
from scorekeeper.cache import LEASE, Loaded, UserCache

from .conftest import ADMINISTRATOR, Serve, assert_problem

OLD, NEW = b'{"v": "old"}', b'{"v": "new"}'


class Stores:
    """Something to ask, that counts and can be held."""

    def __init__(self, value: bytes | None = OLD) -> None:
        self.value = value
        self.asked = 0
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self) -> Loaded:
        self.asked += 1
        seen = self.value
        await self.open.wait()
        return Loaded(seen)


def cache_on(url: str, ttl: float = 5.0) -> UserCache:
    return UserCache.connect(url, prefix="test", ttl=ttl)


async def test_the_second_look_up_comes_from_redis_on_another_worker_too(redis_url: str) -> None:
    one, other, stores = cache_on(redis_url), cache_on(redis_url), Stores()
    assert await one.get("u", stores) == await other.get("u", stores) == OLD
    assert stores.asked == 1
    await one.close()
    await other.close()


async def test_of_many_who_miss_at_once_one_asks(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Who waits too long asks for himself, and on a busy machine anybody may.
    monkeypatch.setattr(cache_module, "PATIENCE", 30.0)
    monkeypatch.setattr(cache_module, "COMMAND_DEADLINE", 10.0)
    one, other, stores = cache_on(redis_url), cache_on(redis_url), Stores()
    # The first command of a worker also connects; that is not what is measured.
    assert await one.answers()
    assert await other.answers()
    stores.open.clear()
    asking = [asyncio.create_task(cache.get("u", stores)) for cache in (one, other) for _ in range(15)]
    await asyncio.sleep(0.1)
    stores.open.set()
    assert await asyncio.gather(*asking) == [OLD] * 30
    assert stores.asked == 1
    await one.close()
    await other.close()


async def test_look_ups_of_one_turn_are_one_command_and_who_goes_away_takes_no_answer_along(
    redis_proxy: FaultProxy,
) -> None:
    cache, stores = cache_on(redis_proxy.uri, ttl=60.0), Stores()
    for user in "uvw":
        await cache.get(user, stores)
    before = redis_proxy.counts.requests
    asking = [asyncio.create_task(cache.get(user, stores)) for user in "uvwuvw"]
    await asyncio.sleep(0)
    asking[0].cancel()
    assert await asyncio.gather(*asking[1:]) == [OLD] * 5
    assert redis_proxy.counts.requests - before == 1
    assert stores.asked == 3
    await cache.close()


async def test_a_fill_that_began_before_a_change_is_not_kept(redis_url: str) -> None:
    reader, writer, stores = cache_on(redis_url), cache_on(redis_url), Stores()
    stores.open.clear()
    late = asyncio.create_task(reader.get("u", stores))
    while not stores.asked:  # noqa: ASYNC110 - what it waits for has no event
        await asyncio.sleep(0.005)
    stores.value = NEW
    await writer.forget("u")
    # Begun after the change: the one that was under way is of no use to it.
    after = asyncio.create_task(reader.get("u", stores))
    await asyncio.sleep(0.05)
    stores.open.set()
    assert await late == OLD
    assert await after == NEW
    assert await reader.get("u", stores) == NEW
    await reader.close()
    await writer.close()


async def test_an_entry_near_its_end_is_refreshed_while_it_serves(redis_url: str) -> None:
    cache, stores = cache_on(redis_url, ttl=1.0), Stores()
    await cache.get("u", stores)
    stores.value = NEW
    await asyncio.sleep(0.8)
    assert await cache.get("u", stores) == OLD
    await asyncio.sleep(0.1)
    assert await cache.get("u", stores) == NEW
    assert stores.asked == 2
    await cache.close()


async def test_absence_is_not_kept(redis_url: str) -> None:
    cache, stores = cache_on(redis_url), Stores(None)
    assert await cache.get("u", stores) is None
    stores.value = NEW
    assert await cache.get("u", stores) == NEW
    await cache.close()


async def test_a_failed_load_holds_nobody_up(redis_url: str) -> None:
    cache, stores = cache_on(redis_url), Stores()

    async def failing() -> Loaded:
        raise NotFound("gone")

    with pytest.raises(NotFound):
        await cache.get("u", failing)
    began = time.monotonic()
    assert await cache.get("u", stores) == OLD
    assert time.monotonic() - began < 0.4
    await cache.close()


async def test_a_change_that_redis_missed_is_acknowledged_when_no_entry_can_be_older(
    redis_url: str, redis_proxy: FaultProxy
) -> None:
    ttl = 0.5
    reader, writer, stores = cache_on(redis_url, ttl), cache_on(redis_proxy.uri, ttl), Stores()
    await reader.get("u", stores)
    redis_proxy.refuse()
    stores.value = NEW
    began = time.monotonic()
    await writer.forget("u")
    assert time.monotonic() - began >= ttl + LEASE - 0.1
    assert await reader.get("u", stores) == NEW
    await reader.close()
    await writer.close()


async def test_a_redis_that_hangs_is_left_aside(redis_url: str, redis_proxy: FaultProxy) -> None:
    cache, stores = cache_on(redis_proxy.uri), Stores()
    redis_proxy.swallow_answers()
    began = time.monotonic()
    for _ in range(20):
        assert await cache.get("u", stores) == OLD
    assert time.monotonic() - began < 3
    await cache.close()


async def test_no_look_up_waits_to_find_out_whether_redis_is_back_and_one_that_is_back_is_used(
    redis_url: str, redis_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "SILENCE", 0.0)
    cache, stores = cache_on(redis_proxy.uri), Stores()
    redis_proxy.swallow_answers()
    await cache.get("u", stores)
    before = redis_proxy.counts.requests
    for _ in range(50):
        assert await cache.get("u", stores) == OLD
    # The cache's own questions alone, each of which waits for its answer.
    assert redis_proxy.counts.requests - before < 25
    assert stores.asked == 51
    redis_proxy.pass_through()
    assert cache._silence is not None
    await cache._silence
    for _ in range(2):
        await cache.get("u", stores)
    assert stores.asked == 52
    await cache.close()


async def test_a_spoilt_entry_is_a_miss(redis_url: str) -> None:
    import redis

    cache, stores = cache_on(redis_url), Stores()
    with redis.Redis.from_url(redis_url) as client:
        # The last is how an earlier release wrote it.
        for spoilt in (
            b"",
            b"sk2\n",
            b"sk1\n" + bytes(24) + OLD,
            b'{"until": 1e12, "stamp": "", "user": {"v": "old"}}',
        ):
            client.set("test:user:u", spoilt)
            client.delete("test:lease:u")
            assert await cache.get("u", stores) == OLD
    await cache.close()


@pytest.mark.parametrize("phase", ["mongo_only", "dual_write", "postgres_primary"])
async def test_a_role_and_a_deletion_hold_on_the_very_next_request_of_every_worker(
    serve: Serve, phase: str
) -> None:
    workers = [await serve(phase), await serve(phase)]
    body = (await workers[0].register("Ann")).json()
    id_, token = body["user"]["id"], body["token"]

    async def role(worker: Any) -> str:
        return str((await worker.app.state.authenticator.user_of(f"Bearer {token}")).role)

    assert [await role(worker) for worker in workers] == ["user", "user"]
    for turn in range(6):
        wanted = "admin" if turn % 2 == 0 else "user"
        await workers[turn % 2].app.state.account_changes.set_role(ADMINISTRATOR, id_, wanted)
        assert [await role(worker) for worker in workers] == [wanted, wanted]
    await workers[1].app.state.account_changes.remove(ADMINISTRATOR, id_)
    for worker in workers:
        assert_problem(await worker.get("/api/users/me", token), 401)
    assert_problem(await workers[0].log_in("Ann"), 401)


async def test_a_foreign_change_is_seen_within_the_caches_life(serve: Serve) -> None:
    service = await serve("mongo_only", cache_ttl=0.3)
    body = (await service.register("Ann")).json()
    await service.get("/api/users/me", body["token"])
    service.documents["users"].delete_one({"_id": ObjectId(body["user"]["id"])})
    await asyncio.sleep(0.4)
    assert_problem(await service.get("/api/users/me", body["token"]), 401)
