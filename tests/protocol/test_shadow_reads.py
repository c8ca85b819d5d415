"""Reads are compared behind the caller's back; only what differs at rest is a mismatch."""

import asyncio

import pytest
from bson import ObjectId

from crossfade import Phase, StoreUnavailable
from crossfade.guard import guard
from crossfade.shadow import mapping_of

from .conftest import World, eventually, users_entity

#: Everything is compared, and looked at again soon.
EAGER = {
    "shadow_sample": 1.0,
    "shadow_looks": (0.05, 0.1),
    "shadow_flush": 3600.0,
    "shadow_deadline": 10.0,
    "background": True,
}
OUTCOMES = ("equal", "mismatch", "unsettled", "dropped", "failed")


async def counted(w: World) -> dict[str, int]:
    """What all workers have counted, whatever the phase and the mapping."""
    await w.m.shadow.flush()
    sums = ", ".join(f"coalesce(sum({name}), 0)" for name in OUTCOMES)
    [row] = w.sql(f"SELECT {sums} FROM crossfade.shadow")
    return {name: int(number) for name, number in zip(OUTCOMES, row, strict=True)}


async def all_compared(w: World, number: int) -> dict[str, int]:
    """Wait until so many reads were compared, however that ended."""

    async def done() -> bool:
        return sum((await counted(w)).values()) >= number

    await eventually(done)
    return await counted(w)


def mismatches(w: World) -> list[tuple]:
    return w.sql("SELECT entity, id, cause, fields FROM crossfade.mismatches ORDER BY id")


async def made(w: World, *names: str) -> list:
    """Records that nothing is owed of."""
    records = [await w.users.insert({"username": name, "n": 1}) for name in names]
    await w.settle()
    return records


async def test_every_kind_of_read_is_compared_and_equal_answers_are_no_mismatch(open_world):
    w = await open_world("shadow_read", **EAGER)
    [bob] = await made(w, "Bob")
    assert (await w.users.get(bob.id)).source == "mongo"
    await w.users.get(ObjectId())
    await w.users.find_by_key("username", "BOB")
    await w.users.find({"n": 1})
    assert await w.users.count({"n": 1}) == 1
    assert await all_compared(w, 5) == {"equal": 5, "mismatch": 0, "unsettled": 0, "dropped": 0, "failed": 0}
    assert mismatches(w) == []


@pytest.mark.parametrize("question", ["get", "find_by_key", "find"])
async def test_a_row_that_was_changed_is_found_by_every_kind_of_read(open_world, question):
    w = await open_world("shadow_read", **EAGER)
    [bob] = await made(w, "Bob")
    w.sql("UPDATE users SET n = 99")
    read = {
        "get": lambda: w.users.get(bob.id),
        "find_by_key": lambda: w.users.find_by_key("username", "bob"),
        "find": lambda: w.users.find({"n": 1}),
    }[question]
    await read()
    assert (await all_compared(w, 1))["mismatch"] == 1
    assert mismatches(w) == [("users", str(bob.id), "different", ["n"])]
    await read()
    await all_compared(w, 2)
    [(seen, in_order)] = w.sql("SELECT seen, first_seen < last_seen FROM crossfade.mismatches")
    assert (seen, in_order) == (2, True)


async def test_the_cause_is_told(open_world):
    w = await open_world("shadow_read", **EAGER)
    missing, behind, foreign, torn = await made(w, "missing", "behind", "foreign", "torn")
    w.sql("DELETE FROM users WHERE username = 'missing'")
    w.sql("UPDATE users SET cf_rev = 0 WHERE username = 'behind'")
    w.documents.update_one({"_id": foreign.id}, {"$set": {"n": 2}})
    w.sql("UPDATE users SET extra = '{\"x\": {\"$oid\": 5}}' WHERE username = 'torn'")
    extra = ObjectId()
    w.sql(
        "INSERT INTO users (id, username, username_norm, cf_rev, cf_digest, cf_mapping) "
        "VALUES (%s, 'extra', 'extra', 1, '', 1)",
        str(extra),
    )
    for id_ in (missing.id, behind.id, foreign.id, torn.id, extra):
        await w.users.get(id_)
    assert (await all_compared(w, 5))["mismatch"] == 5
    assert {(id_, cause) for _, id_, cause, _ in mismatches(w)} == {
        (str(missing.id), "missing"),
        (str(behind.id), "behind"),
        (str(foreign.id), "foreign_write"),
        (str(torn.id), "different"),
        (str(extra), "extra"),
    }


async def test_a_key_that_is_wrong_in_one_store_is_found_by_the_look_up_alone(open_world):
    w = await open_world("shadow_read", **EAGER)
    [bob] = await made(w, "Bob")
    w.sql("UPDATE users SET username_norm = 'other'")
    await w.users.get(bob.id)
    await w.users.find_by_key("username", "BOB")
    assert (await all_compared(w, 2))["mismatch"] == 1
    assert mismatches(w) == [("users", str(bob.id), "found_otherwise", [])]


async def test_a_different_number_is_noted_under_its_question_without_values(open_world):
    w = await open_world("shadow_read", **EAGER)
    await made(w, "a", "b")
    w.sql("UPDATE users SET n = 2 WHERE username = 'a'")
    assert await w.users.count({"n": 1}) == 2
    assert (await all_compared(w, 1))["mismatch"] == 1
    assert mismatches(w) == [("users", "(count by n)", "counted_otherwise", [])]


async def test_a_record_in_debt_is_no_mismatch(open_world, postgres_proxy):
    w = await open_world("shadow_read", **EAGER, reconcile_age=60.0, board_age=0.4)
    [bob] = await made(w, "Bob")
    w.documents.update_one({"_id": bob.id}, {"$set": {"n": 2, "_cf.rev": 2, "_cf.debt": {"epoch": 1}}})
    assert (await w.users.get(bob.id))["n"] == 2
    await w.users.find({"n": 2})
    assert (await all_compared(w, 2))["unsettled"] == 2
    assert mismatches(w) == []


async def test_a_document_in_quarantine_differs_for_a_known_reason(open_world):
    w = await open_world("shadow_read", **EAGER)
    [bob] = await made(w, "Bob")
    w.documents.update_one({"_id": bob.id}, {"$set": {"n": 2}})
    image = await w.image(bob.id)
    await w.postgres.quarantine(w.entity, image, reason="a test", field="n", timeout=5)
    await w.users.get(bob.id)
    assert (await all_compared(w, 1))["unsettled"] == 1
    assert mismatches(w) == []


async def test_a_foreign_write_that_a_sweep_adopts_in_time_is_no_mismatch(open_world):
    w = await open_world("shadow_read", **EAGER | {"shadow_looks": (0.05, 2.0)})
    [bob] = await made(w, "Bob")
    w.documents.update_one({"_id": bob.id}, {"$set": {"n": 2}})
    await w.users.get(bob.id)

    async def has_been_looked_at() -> bool:
        return w.m.shadow._waiting > 0

    await eventually(has_been_looked_at)
    await w.m.reconciler.full_sweep()
    assert (await all_compared(w, 1))["equal"] == 1


async def test_writers_at_work_make_no_mismatch(open_world):
    w = await open_world("shadow_read", **EAGER)
    other = await open_world("shadow_read", **EAGER)
    records = await made(w, *"abcdef")

    async def write(worker: World, start: int) -> None:
        for n in range(start, start + 25):
            await worker.users.update(records[n % 5].id, {"n": n})
        if start:
            await worker.users.delete(records[5].id)

    async def read(worker: World) -> None:
        for n in range(60):
            await worker.users.get(records[n % 6].id)
            await worker.users.find_by_key("username", "abcdef"[n % 6])
            await worker.users.find({"n": n})
            await worker.users.count()
            await asyncio.sleep(0.005)

    await asyncio.gather(write(w, 0), write(other, 100), read(w), read(other))
    await other.m.shadow.flush()
    result = await all_compared(w, 200)
    await eventually(lambda: _is_idle(w, other))
    await other.m.shadow.flush()
    assert mismatches(w) == []
    assert (await counted(w))["equal"] > 100, result


async def _is_idle(*worlds: World) -> bool:
    return all(not w.m.shadow._waiting and w.m.shadow._queue.empty() for w in worlds)


async def test_the_caller_waits_for_no_comparison_and_what_does_not_fit_is_dropped(
    open_world, postgres_proxy
):
    w = await open_world(
        "shadow_read",
        **EAGER | {"shadow_queue": 3, "shadow_deadline": 2.0},
        postgres=postgres_proxy,
        lease=60.0,
    )
    [bob] = await made(w, "Bob")
    postgres_proxy.delay(30.0)
    for _ in range(20):
        assert (await w.users.get(bob.id))["n"] == 1
    # All were answered, and not one comparison has had its answer.
    counts = w.m.shadow._counts
    assert [set(each) for each in counts.values()] == [{"dropped"}]
    assert sum(each["dropped"] for each in counts.values()) >= 20 - 3 - 2
    postgres_proxy.pass_through()

    async def failed() -> bool:
        return sum(each["failed"] for each in counts.values()) > 0

    await eventually(failed)


async def test_a_comparison_that_raises_never_touches_the_answer(open_world, monkeypatch):
    w = await open_world("shadow_read", **EAGER)
    [bob] = await made(w, "Bob")

    def broken(*_, **__):
        raise RuntimeError("in the comparer")

    monkeypatch.setattr("crossfade.shadow._told", broken)
    assert (await w.users.get(bob.id))["n"] == 1
    monkeypatch.undo()
    monkeypatch.setattr(w.m.shadow, "_look", broken)
    assert (await w.users.get(bob.id))["n"] == 1
    assert (await all_compared(w, 1))["failed"] == 1
    monkeypatch.undo()
    assert (await w.users.get(bob.id))["n"] == 1
    assert (await all_compared(w, 2))["equal"] == 1


async def test_only_a_sample_is_compared(open_world):
    w = await open_world("shadow_read", **EAGER | {"shadow_sample": 0.0})
    [bob] = await made(w, "Bob")
    for _ in range(20):
        await w.users.get(bob.id)
    assert sum((await counted(w)).values()) == 0


@pytest.mark.parametrize("phase", ["dual_write", "postgres_read"])
async def test_other_phases_compare_nothing(open_world, phase):
    w = await open_world(phase, **EAGER)
    [bob] = await made(w, "Bob")
    await w.users.get(bob.id)
    assert sum((await counted(w)).values()) == 0


async def test_with_postgres_serving_mongo_is_compared_where_that_is_asked_for(open_world):
    w = await open_world("postgres_read", **EAGER, shadow_postgres_read=True, board_age=30.0)
    [bob] = await made(w, "Bob")
    await w.m.board.refresh()
    assert (await w.users.get(bob.id)).source == "postgres"
    assert (await all_compared(w, 1))["equal"] == 1
    w.sql("UPDATE users SET n = 99")
    assert (await w.users.get(bob.id))["n"] == 99
    assert (await all_compared(w, 2))["mismatch"] == 1


# --- evidence ---------------------------------------------------------------------------------------------


async def shadow_guard(w: World):
    return next(s for s in await guard(w.m, Phase.POSTGRES_READ) if s.name == "shadow")


async def test_postgres_is_read_only_after_enough_comparisons_without_a_mismatch(open_world):
    w = await open_world("shadow_read", **EAGER, shadow_comparisons=3)
    other = await open_world("shadow_read", **EAGER)
    [bob] = await made(w, "Bob")
    for worker in (w, other):
        await worker.users.get(bob.id)
    await other.m.shadow.flush()
    await all_compared(other, 1)
    await all_compared(w, 2)
    lacking = await shadow_guard(w)
    assert not lacking.holds
    assert lacking.why.startswith("2 of 3")
    await other.users.get(bob.id)
    await all_compared(other, 3)
    assert (await shadow_guard(w)).holds
    w.sql("UPDATE users SET n = 99")
    await w.users.get(bob.id)
    await all_compared(w, 4)
    differs = await shadow_guard(w)
    assert not differs.holds
    assert "crossfade mismatches" in differs.mend


async def test_comparisons_count_from_the_entry_into_the_phase_and_for_one_mapping_only(open_world):
    w = await open_world("shadow_read", **EAGER, shadow_comparisons=1)
    [bob] = await made(w, "Bob")
    await w.users.get(bob.id)
    await all_compared(w, 1)
    assert (await shadow_guard(w)).holds
    corrected = await open_world("shadow_read", **EAGER, shadow_comparisons=1, entity=users_entity(2))
    assert mapping_of([corrected.entity]) != mapping_of([w.entity])
    assert not (await shadow_guard(corrected)).holds
    await w.set_phase("dual_write")
    await w.set_phase("shadow_read")
    assert not (await shadow_guard(w)).holds


async def test_counts_wait_for_a_postgres_that_is_away(open_world, postgres_proxy):
    w = await open_world("shadow_read", **EAGER, postgres=postgres_proxy, lease=60.0, bulk_deadline=0.5)
    [bob] = await made(w, "Bob")
    await w.users.get(bob.id)

    async def looked() -> bool:
        return any(each["equal"] for each in w.m.shadow._counts.values())

    await eventually(looked)
    postgres_proxy.refuse()
    with pytest.raises(StoreUnavailable):
        await w.m.shadow.flush()
    postgres_proxy.pass_through()
    await w.postgres_answers()
    assert (await counted(w))["equal"] == 1
