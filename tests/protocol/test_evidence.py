"""What speaks for the next phase is of this mapping; a step that nobody could check again is not made."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from crossfade import Phase, StoreUnavailable
from crossfade.bulk.backfill import Backfill
from crossfade.bulk.verify import Verify
from crossfade.guard import guard
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres
from crossfade.transition import change_phase

from .conftest import World, users_entity


async def bulk(w: World, kind: Any, mongo_uri: str, database_url: str, **how: Any) -> Any:
    """A run of ``Backfill`` or ``Verify`` under the mapping of this worker."""
    source, target = BulkMongo(mongo_uri), await BulkPostgres.connect(database_url)
    try:
        made = kind(w.entity, source, target, migration="accounts", epoch=w.control.epoch, **how)
        return await made.run()
    finally:
        await target.close()
        await asyncio.to_thread(source.close)


async def holds(w: World, target: Phase) -> dict[str, bool]:
    return {statement.name: statement.holds for statement in await guard(w.m, target)}


async def test_a_verify_and_a_backfill_speak_for_the_mapping_that_they_were_made_under(
    open_world, mongo_uri, database_url
):
    w = await open_world("dual_write")
    await w.users.insert({"username": "Bob"})
    await bulk(w, Backfill, mongo_uri, database_url)
    await bulk(w, Verify, mongo_uri, database_url, wait=0.01)
    assert {name: held for name, held in (await holds(w, Phase.SHADOW_READ)).items() if not held} == {}
    corrected = await open_world("dual_write", entity=users_entity(2))
    found = await holds(corrected, Phase.SHADOW_READ)
    assert (found["backfill"], found["verify"]) == (False, False)
    await bulk(corrected, Backfill, mongo_uri, database_url)
    await bulk(corrected, Verify, mongo_uri, database_url, wait=0.01)
    assert all((await holds(corrected, Phase.SHADOW_READ)).values())


async def test_a_step_whose_guard_cannot_be_asked_again_is_taken_back(
    open_world, mongo_uri, database_url, postgres_proxy
):
    w = await open_world("dual_write", postgres=postgres_proxy, primary_deadline=1.0)
    await w.users.insert({"username": "Bob"})
    await bulk(w, Backfill, mongo_uri, database_url)
    await bulk(w, Verify, mongo_uri, database_url, wait=0.01)

    def lose(step: str) -> None:
        if step.startswith("waiting"):
            postgres_proxy.refuse()

    with pytest.raises(StoreUnavailable):
        await change_phase(w.m, Phase.SHADOW_READ, by="a test", reason="a test", on_step=lose)
    assert (await w.m.board.refresh()).control.phase is Phase.DUAL_WRITE
