"""How much the workers may work, by how fast the stores answer."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossfade.bulk.pace import FEWEST, MOST, SMALL, Pace
from crossfade.bulk.throttle import LEAST, Throttle
from crossfade.cli import jobs
from crossfade.cli.jobs import Live
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres
from crossfade.stores.postgres import PostgresStore
from crossfade.stores.runs import Steering
from scorekeeper.identities.entity import identities
from scorekeeper.users.entity import users

seconds = st.floats(0, 10)


@given(st.lists(st.tuples(seconds, seconds, seconds)), st.floats(0, 1), st.floats(0, 60))
def test_the_workers_always_work_a_part_of_their_time(looks, latency, lag):
    throttle = Throttle(latency, lag, 0)
    for mongo, postgres, behind in looks:
        throttle.heard({"MongoDB": mongo, "PostgreSQL": postgres}, behind)
        assert LEAST <= throttle.duty <= 1
        assert bool(throttle.reason) == (throttle.duty < 1)


def test_a_store_that_answers_late_slows_them_down_and_they_come_back_when_it_does_not():
    throttle = Throttle(0.1, 10, 0)
    for _ in range(10):
        throttle.heard({"MongoDB": 0.002, "PostgreSQL": 0.5})
    assert throttle.duty < 0.1
    assert throttle.reason == "PostgreSQL answers in 500 ms, at most 100 ms are wanted"
    for _ in range(40):
        throttle.heard({"MongoDB": 0.002, "PostgreSQL": 0.01})
    assert (throttle.duty, throttle.reason) == (1.0, "")


def test_one_slow_answer_is_no_trouble_yet():
    throttle = Throttle(0.1, 10, 0)
    throttle.heard({"PostgreSQL": 0.01})
    throttle.heard({"PostgreSQL": 0.2})
    assert throttle.duty == 1.0


def test_a_replica_that_falls_behind_counts_too():
    throttle = Throttle(0, 10, 0)
    throttle.heard({"PostgreSQL": 9.0}, 11)
    assert throttle.reason == "a replica is 11 s behind, at most 10 s are wanted"


def test_debts_that_pile_up_count_too():
    throttle = Throttle(0, 0, 10_000)
    throttle.heard({}, 0, 10_000)
    assert throttle.duty == 1.0
    throttle.heard({}, 0, throttle.enough_debts)
    assert throttle.reason == "more than 10,000 records are in debt"


@pytest.mark.parametrize(("duty", "rest"), [(1.0, 0.0), (0.5, 1.0), (0.25, 3.0)])
def test_who_may_work_half_of_the_time_rests_as_long_as_it_worked(duty, rest):
    pace = Pace()
    pace.took(1000, 1.0, Steering(duty=duty))
    rested = 0.0
    while part := pace.rest():
        rested += part
    assert rested == pytest.approx(rest)


def test_chunks_are_as_large_as_are_written_in_a_second_within_bounds():
    pace = Pace()
    for seconds, settled in ((0.001, MOST), (2.0, 500), (1000.0, FEWEST)):
        for _ in range(20):
            # A chunk of the size that was asked for, at a steady rate; only the second one fits the bounds.
            pace.took(1000, seconds, Steering())
        assert pace.count == pytest.approx(settled, abs=1)
    pace.took(1000, 1.0, Steering(chunk_size=7))
    assert pace.count == 7


def test_whoever_rests_makes_chunks_smaller_and_never_larger_but_as_a_person_asks():
    small, large = Pace(50), Pace(20_000)
    for pace in (small, large):
        pace.took(1000, 1.0, Steering(duty=0.5))
    assert (small.count, large.count) == (50, SMALL)
    large.took(1000, 1.0, Steering(duty=0.5, chunk_size=2000))
    assert large.count == 2000


def test_a_pool_that_makes_others_wait_counts_too():
    throttle = Throttle(0.05, 0, 0)
    throttle.heard({}, pool_wait=0.2)
    assert throttle.duty < 1
    assert "a connection is there in 200 ms" in throttle.reason


async def test_the_next_entity_is_slowed_down_too_while_the_stores_answer_late_all_the_time(
    stores, monkeypatch
):
    monkeypatch.setattr(jobs, "_PROBE", 0.01)
    source = BulkMongo(stores.mongo_uri)
    target, own = [await BulkPostgres.connect(stores.database_url) for _ in range(2)]
    live = Live("backfill", "accounts", own, asyncio.Event())
    # No answer is in time.
    throttle = Throttle(1e-9, 0, 0)
    throttling = asyncio.create_task(live.throttle(throttle, source, [], lambda: 0.0))
    try:
        for entity in (users, identities):
            run = await target.runs.begin(
                "accounts", entity, "backfill", epoch=1, settings={}, pieces=[(None, None)]
            )
            await live.follow(entity.name, run, 0, 0)
            async with asyncio.timeout(10):
                while throttle.duty > LEAST or (await target.runs.steering(run)).duty > 0.1:  # noqa: ASYNC110 - it is told by the database
                    await asyncio.sleep(0.01)
    finally:
        throttling.cancel()
        await asyncio.wait([throttling])
        for each in (target, own):
            await each.close()
        source.close()


async def test_how_long_a_connection_is_waited_for_is_known_once(database_url):
    store = PostgresStore(database_url, max_pool=1)
    await store.open()
    try:
        await store.ping(5.0)
        assert store.pool_wait() < 5.0
        async with store._connection(5.0):
            waiting = asyncio.create_task(store.ping(5.0))
            await asyncio.sleep(0.2)
        await waiting
        assert store.pool_wait() >= 0.05
        assert store.pool_wait() == 0.0
    finally:
        await store.close()
