"""Many writers, few records, connections cut at random: afterwards both stores are equal, and nothing is owed."""

import asyncio
import random
import time

import pytest
from bson import ObjectId

from crossfade import CrossfadeError, DuplicateKey, FailureStrategy, OutcomeUnknown

from .conftest import PATIENCE

SECONDS = 4.0


async def worker(w, seed, ids, ends, acknowledged):
    rng = random.Random(seed)
    number = 0
    while time.monotonic() < ends:
        id_ = rng.choice(ids)
        number += 1
        strategy = FailureStrategy.ROLLBACK_BOTH if rng.random() < 0.3 else None
        name = rng.choice("abcdefgh")
        try:
            match rng.choice(["insert", "update", "update", "rename", "delete", "get"]):
                case "insert":
                    done = await w.users.insert(
                        {"_id": id_, "username": name, "n": number}, strategy=strategy
                    )
                    acknowledged.append((id_, done.rev))
                case "update":
                    friends = [ObjectId() for _ in range(rng.randrange(3))]
                    done = await w.users.update(id_, {"n": number, "friends": friends}, strategy=strategy)
                    acknowledged.append((id_, done.rev))
                case "rename":
                    done = await w.users.update(id_, {"username": name}, strategy=strategy)
                    acknowledged.append((id_, done.rev))
                case "delete":
                    await w.users.delete(id_, strategy=strategy)
                case _:
                    await w.users.get(id_)
        except DuplicateKey:
            pass
        except CrossfadeError as told:
            # Whatever was told, nothing else may reach an application.
            if isinstance(told, OutcomeUnknown):
                await asyncio.sleep(0)


async def trouble(rng, proxies, ends):
    while time.monotonic() < ends:
        proxy = rng.choice(proxies)
        match rng.choice(["cut", "before", "after", "refuse", "calm"]):
            case "cut":
                proxy.cut()
            case "before":
                proxy.cut_before_request()
            case "after":
                proxy.cut_after_request()
            case "refuse":
                proxy.refuse()
                await asyncio.sleep(rng.random() * 0.3)
                proxy.pass_through()
        await asyncio.sleep(rng.random() * 0.2)


@pytest.mark.parametrize(("phase", "seed"), [("postgres_read", 11), ("postgres_primary", 12)])
async def test_after_a_storm_both_stores_are_equal(open_world, mongo_proxy, postgres_proxy, phase, seed):
    print(f"{seed=}")  # noqa: T201 - shown when it fails
    rng = random.Random(seed)
    random.seed(seed)
    calm = await open_world(phase)
    workers = [
        await open_world(
            phase, mongo=mongo_proxy, postgres=postgres_proxy, background=True, primary_deadline=1.5
        )
        for _ in range(3)
    ]
    ids = [ObjectId() for _ in range(5)]
    ends = time.monotonic() + SECONDS
    acknowledged: list = []
    async with asyncio.timeout(PATIENCE * 3):
        await asyncio.gather(
            trouble(rng, [mongo_proxy, postgres_proxy], ends),
            *(worker(w, seed + n, ids, ends, acknowledged) for n, w in enumerate(workers * 2)),
        )
        for proxy in (mongo_proxy, postgres_proxy):
            proxy.pass_through()
        for w in workers:
            await w.m.stop()
        await calm.reconcile()
    await calm.assert_equal()
    assert acknowledged, "the storm let nothing through"
    # No revision was told twice for one record: the primary alone numbers them.
    assert len(set(acknowledged)) == len(acknowledged)
    # No acknowledged revision is above what the stores ended with.
    for id_, rev in acknowledged:
        image = await calm.image(id_)
        buried = calm.tombstone_in_postgres(id_)
        assert max(image.rev if image else 0, buried or 0) >= rev
    assert await calm.owed() == ()
