"""The reference service while a backfill runs beside it: how much longer its slowest answers take.

    python -m bench.foreground [--users 60000] [--seconds 20] [--throttle '--max-latency 5']

One process of the service and eight clients of it, the demo's, at a steady pace: registrations, log-ins, profiles,
look-ups. First alone, then while `crossfade backfill` copies every user, over and over where there is time for that:
throttled, and as fast as it goes for comparison. A part begins when the first users have been copied. p99 of all
answers. Ends with a JSON line per figure.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress

import psycopg
import pymongo

from bench import Figure, report
from bench.backfill import insert_users
from scorekeeper.demo.stage import DemoFailed, Stage, staged
from scorekeeper.demo.traffic import Traffic
from scorekeeper.legacy import DirtRates, generate

GOAL = 2.0
ALONE, THROTTLED, FREE = "alone", "beside a throttled backfill", "beside one as fast as it goes"
#: Requests a second: what leaves the processors of a small machine half idle.
RATE = 30.0
#: Users that can log in.
KNOWN = 1_000


def p99(traffic: Traffic, stage: str) -> float:
    """Seconds in which all but one in a hundred requests of a stage were answered."""
    took = [seconds for (at, _), its in traffic.latencies.items() if at == stage for seconds in its]
    return statistics.quantiles(took, n=100)[98]


@asynccontextmanager
async def copying(stage: Stage, *words: str) -> AsyncIterator[None]:
    """Backfill after backfill, under way until the block ends."""
    over = asyncio.Event()

    async def copy_over_and_over() -> None:
        while not over.is_set():
            with suppress(DemoFailed):  # that it was interrupted
                await stage.crossfade("backfill", "--entity", "users", "--restart", *words, may_find=True)

    before = copied(stage)
    running = asyncio.create_task(copy_over_and_over())
    try:
        for _ in range(600):
            await asyncio.sleep(0.1)
            if copied(stage) != before:
                break
        yield
    finally:
        over.set()
        with suppress(DemoFailed):  # that it had just ended by itself
            await stage.crossfade("stop")
        await running


def copied(stage: Stage) -> int:
    """Documents that all backfills so far have read."""
    with psycopg.connect(stage.database_url) as connection:
        query = "SELECT coalesce(sum((counts->>'read')::int), 0) FROM crossfade.ranges"
        [number] = connection.execute(query).fetchone() or (0,)
    return int(number)


async def play(stage: Stage, users: int, seconds: float, throttle: list[str]) -> Traffic:
    """The three parts; the clients afterwards."""
    print(f"making {users:,} users ...", flush=True)
    sizes = dict.fromkeys(("playeridentities", "friendrequests", "games", "wizard", "tablegames"), 0)
    with pymongo.MongoClient[dict[str, object]](stage.mongo_uri) as client:
        database = client.get_default_database()
        made = generate(database, seed=1, users=KNOWN, sizes=sizes, rates=DirtRates.none())
        insert_users(database["users"], users - KNOWN)
        known = [(each["username"], str(each["_id"])) for each in database["users"].find().limit(200)]
    await stage.crossfade("init")
    await stage.crossfade("phase", "set", "dual_write")
    await stage.until_ready()
    traffic = Traffic(stage.addresses, known, made.logins, rate=RATE, old_logins=2.0)
    await traffic.sign_in_old_accounts(10)
    running = asyncio.create_task(traffic.run())
    await asyncio.sleep(5)  # caches are warm, and there are accounts to ask for
    for part, words in (
        (ALONE, None),
        (THROTTLED, throttle),
        (FREE, ["--max-latency", "0", "--max-debts", "0"]),
    ):
        async with nullcontext() if words is None else copying(stage, *words):
            traffic.stage, before = part, copied(stage)
            await asyncio.sleep(seconds)
            traffic.stage, number = "between", copied(stage) - before
        print(
            f"{part}: p99 {p99(traffic, part) * 1000:.0f} ms, {number / seconds:,.0f} users a second copied",
            flush=True,
        )
    traffic.stop()
    await running
    return traffic


def run(users: int, seconds: float, throttle: list[str]) -> bool:
    with staged(keep=False) as stage:
        del stage.ports[1:]
        stage.start_workers()
        traffic = asyncio.run(play(stage, users, seconds, throttle))
    print(f"{traffic.total:,} requests, {traffic.failed} failed", flush=True)
    alone = p99(traffic, ALONE)
    return (
        report(
            Figure(f"p99 of the service, {THROTTLED}", p99(traffic, THROTTLED) / alone, "alone", most=GOAL),
            Figure(f"p99 of the service, {FREE}", p99(traffic, FREE) / alone, "alone"),
        )
        and not traffic.failed
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--users", type=int, default=60_000)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each part")
    parser.add_argument("--throttle", default="--max-latency 5", help="options of the throttled backfill")
    arguments = parser.parse_args()
    return 0 if run(arguments.users, arguments.seconds, arguments.throttle.split()) else 1


if __name__ == "__main__":
    sys.exit(main())
