"""A whole round of the phases and back under traffic, every guard asked, verify clean at each phase.

``SOAK=1800 pytest tests/protocol/test_round.py`` goes round and round for that many seconds (``make soak``).
"""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from crossfade import Phase
from crossfade.bulk.backfill import Backfill
from crossfade.bulk.verify import Verify
from crossfade.guard import guard
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres
from crossfade.transition import change_phase, next_phase, phase_before

from .conftest import World, eventually, users_entity
from .test_switch import Writing

SOAK = float(os.environ.get("SOAK", "0"))
LAST = Phase.POSTGRES_ONLY


class Evidence:
    """What a person does between two phases."""

    def __init__(self, w: World, mongo_uri: str) -> None:
        self.w, self.mongo_uri = w, mongo_uri

    async def run(self, work: type[Backfill] | type[Verify], epoch: int) -> Any:
        source, target = BulkMongo(self.mongo_uri), await BulkPostgres.connect(self.w.database_url)
        try:
            made = work(users_entity(), source, target, migration="accounts", epoch=epoch)  # type: ignore[call-arg]
            return await made.run(restart=True)
        finally:
            await target.close()
            source.close()

    async def is_compared(self, worker: World, id_: Any) -> bool:
        """Whether the shadow reads that phase 3 wants have been made, by one more."""
        await worker.users.get(id_)
        return all(statement.holds for statement in await guard(self.w.m, Phase.POSTGRES_READ))

    async def is_clean(self) -> bool:
        control = (await self.w.m.board.refresh()).control
        return not (await self.run(Verify, control.epoch)).counts.mismatches


@pytest.mark.long
@pytest.mark.timeout(SOAK + 300)
async def test_a_round_of_the_phases_under_traffic_is_clean_at_each(open_world, mongo_uri):
    # Tables are there, and nothing else: the migration begins before Crossfade has been heard of.
    much = {
        "primary_deadline": 30.0,
        "lease": 30.0,
        "board_age": 1.0,
        "shadow_sample": 1.0,
        "shadow_comparisons": 5,
    }
    workers = [await open_world("mongo_only", background=True, **much) for _ in range(2)]
    w = await open_world("mongo_only", enlisted=False, **much)
    writing = [
        Writing(each, (await each.users.insert({"username": f"user {number}"})).id, pace=0.02)
        for number, each in enumerate(workers)
    ]
    evidence = Evidence(w, mongo_uri)
    began, rounds = time.monotonic(), 0
    while not rounds or time.monotonic() - began < SOAK:
        while w.m.phase is not LAST:
            await change_phase(w.m, next_phase(w.m.phase), by="a test", reason="on", limit=15.0)
            if w.m.phase is Phase.DUAL_WRITE:
                await evidence.run(Backfill, w.control.epoch)
            assert await evidence.is_clean(), w.m.phase
            if w.m.phase is Phase.SHADOW_READ:
                await eventually(lambda: evidence.is_compared(workers[0], writing[1].id))
        while w.m.phase is not Phase.MONGO_ONLY:
            await change_phase(w.m, phase_before(w.m.phase), by="a test", reason="back", limit=15.0)
            assert w.m.phase is Phase.MONGO_ONLY or await evidence.is_clean(), w.m.phase
        rounds += 1
    for each in writing:
        last = await each.end()
        assert (await w.users.get(each.id))["n"] == last
    print(f"{rounds} rounds in {time.monotonic() - began:.0f} s")  # noqa: T201


async def test_what_postgres_owes_mongo_is_in_debt_and_no_mismatch(open_world, mongo_uri):
    w = await open_world("postgres_primary")
    changed, deleted = [(await w.users.insert({"username": name})).id for name in ("changed", "deleted")]
    await w.set_phase("postgres_only", feeding=True, feed_until="2999-01-01T00:00:00+00:00")
    await w.users.insert({"username": "new"})
    await w.users.update(changed, {"n": 1})
    await w.users.delete(deleted)
    evidence = Evidence(w, mongo_uri)
    counts = (await evidence.run(Verify, w.control.epoch)).counts
    assert (counts.findings["in_debt"], counts.mismatches) == (3, 0)
    await w.reconcile()
    counts = (await evidence.run(Verify, w.control.epoch)).counts
    assert (counts.equal, counts.findings["in_debt"], counts.mismatches) == (2, 0, 0)
