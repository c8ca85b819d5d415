"""Phase 5: the way back while MongoDB is fed, and its end as an archive."""

import pytest

from crossfade import NotAllowedInPhase, Phase
from crossfade import retire as retiring
from crossfade.record import CF
from crossfade.retire import retire, what_is_left
from crossfade.transition import change_phase

from .conftest import World, eventually

TOMORROW, LONG_AGO = "2999-01-01T00:00:00+00:00", "2020-01-01T00:00:00+00:00"


async def in_phase_5(open_world, *, until: str = TOMORROW, **options) -> World:
    w = await open_world("postgres_primary", **options)
    await w.set_phase("postgres_only", feeding=True, feed_until=until)
    return w


async def test_phase_5_still_feeds_mongo_behind_the_callers_back(open_world):
    w = await in_phase_5(open_world)
    bob = await w.users.insert({"username": "Bob", "n": 1})
    assert w.document(bob.id) is None, "nobody waits for the archive"
    assert len(w.outbox()) == 1
    await w.reconcile()
    assert w.document(bob.id)["n"] == 1
    await w.users.update(bob.id, {"n": 2})
    await w.users.delete((await w.users.insert({"username": "Al"})).id)
    await w.reconcile()
    assert [d["n"] for d in w.documents.find({})] == [2]


async def test_the_way_back_is_open_while_mongo_is_fed(open_world):
    w = await in_phase_5(open_world, lease=0.3, background=True)
    bob = await w.users.insert({"username": "Bob", "n": 1})
    await change_phase(w.m, Phase.POSTGRES_PRIMARY, by="a test", reason="a test")
    assert w.control.phase is Phase.POSTGRES_PRIMARY
    await w.users.update(bob.id, {"n": 2})
    await w.reconcile()
    await w.assert_equal()


async def test_feeding_ends_with_its_time_and_the_way_back_with_it(open_world):
    w = await in_phase_5(open_world, until=LONG_AGO, sweep=0.05, background=True)

    async def ended() -> bool:
        return not w.control.feeding

    await eventually(ended)
    await w.users.insert({"username": "Bob"})
    assert w.outbox() == []
    with pytest.raises(NotAllowedInPhase, match="MongoDB is no longer fed"):
        await change_phase(w.m, Phase.POSTGRES_PRIMARY, by="a test", reason="a test")


async def test_phase_5_that_was_never_fed_has_no_way_back(open_world):
    w = await open_world("postgres_primary")
    await w.set_phase("postgres_only")
    await w.users.insert({"username": "Bob"})
    assert w.outbox() == []
    with pytest.raises(NotAllowedInPhase, match="MongoDB is no longer fed"):
        await change_phase(w.m, Phase.POSTGRES_PRIMARY, by="a test", reason="a test")


async def test_mongo_is_retired_in_phase_5_only(open_world):
    w = await open_world("postgres_primary")
    with pytest.raises(NotAllowedInPhase, match="postgres_primary"):
        await retire(w.m, by="a test", rate=1e9)


async def test_after_retiring_nothing_of_crossfades_is_in_mongo_and_records_live_on(open_world):
    w = await in_phase_5(open_world, lease=0.2, background=True)
    kept, gone = [await w.users.insert({"username": name, "n": 1}) for name in ("kept", "gone")]
    await w.users.delete(gone.id)
    await retire(w.m, by="a test", rate=1e9)
    assert (await what_is_left(w.m)).is_nothing
    assert w.document(kept.id) == {"_id": kept.id, "username": "kept", "n": 1}
    names = w.documents.database.list_collection_names()
    assert not [name for name in names if name.startswith("crossfade")]
    assert w.sql("SELECT count(*) FROM crossfade.tombstones") == [(0,)]

    other = await open_world("postgres_only")
    await other.users.update(kept.id, {"n": 2})
    await w.users.insert({"username": "new"})
    assert [record["n"] for record in await w.users.find({"username": "kept"})] == [2]
    # Neither worker has put a control record back, and neither feeds.
    await w.m.board.refresh()
    await other.m.board.refresh()
    assert (await what_is_left(w.m)).is_nothing
    assert w.document(kept.id)["n"] == 1
    with pytest.raises(NotAllowedInPhase):
        await change_phase(w.m, Phase.POSTGRES_PRIMARY, by="a test", reason="a test")


async def test_a_retirement_that_was_killed_goes_on(open_world, monkeypatch):
    w = await in_phase_5(open_world, lease=0.2, background=True)
    for n in range(7):
        await w.users.insert({"username": f"u{n}"})
    monkeypatch.setattr(retiring, "BATCH", 2)

    def killed(_, done: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await retire(w.m, by="a test", rate=1e9, on_progress=killed)
    assert w.documents.count_documents({CF: {"$exists": True}}) == 3
    await retire(w.m, by="a test", rate=1e9)
    assert (await what_is_left(w.m)).is_nothing
    assert w.documents.count_documents({}) == 7


@pytest.mark.parametrize("deleted", [False, True], ids=["updated", "deleted"])
async def test_what_mongo_was_owed_when_feeding_ended_and_is_written_since_does_not_keep_it_from_being_retired(
    open_world, deleted
):
    w = await in_phase_5(open_world, lease=0.2, background=True, reconcile_age=600.0)
    bob = await w.users.insert({"username": "Bob", "n": 1})
    await w.set_phase("postgres_only", feeding=False)
    if deleted:
        await w.users.delete(bob.id)
    else:
        await w.users.update(bob.id, {"n": 2})
    await retire(w.m, by="a test", rate=1e9)
    assert (await what_is_left(w.m)).is_nothing
    assert w.document(bob.id) == (None if deleted else {"_id": bob.id, "username": "Bob", "n": 2})
