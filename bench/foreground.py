"""The reference service while a backfill runs beside it: how much longer its slowest answers take.

    python -m bench.foreground [--users 10000] [--seconds 20] [--throttle '--max-latency 20']

One process of the service and eight clients of it, the demo's, at a steady pace: registrations, log-ins, profiles,
look-ups. First alone, then while `crossfade backfill` copies every user over and over: throttled, and as fast as it
goes for comparison. p99 of all answers. Ends with a JSON line per figure.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from contextlib import suppress

import psycopg
import pymongo

from bench import Figure, report
from scorekeeper.demo.stage import DemoFailed, Stage, staged
from scorekeeper.demo.traffic import Traffic
from scorekeeper.legacy import DirtRates, generate

GOAL = 2.0
ALONE, THROTTLED, FREE = "alone", "beside a throttled backfill", "beside one as fast as it goes"
#: Requests a second: what leaves the processors of a small machine half idle.
RATE = 30.0


def p99(traffic: Traffic, stage: str) -> float:
    """Seconds in which all but one in a hundred requests of a stage were answered."""
    took = [seconds for (at, _), its in traffic.latencies.items() if at == stage for seconds in its]
    return statistics.quantiles(took, n=100)[98]


async def copy_over_and_over(stage: Stage, seconds: float, *words: str) -> None:
    """Backfill after backfill, the last one stopped."""
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        begun = asyncio.create_task(
            stage.crossfade("backfill", "--entity", "users", "--restart", *words, may_find=True)
        )
        await asyncio.wait({begun}, timeout=left)
        with suppress(DemoFailed):  # that it was interrupted, or had just ended by itself
            if not begun.done():
                await stage.crossfade("stop")
        with suppress(DemoFailed):
            await begun


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
        made = generate(database, seed=1, users=users, sizes=sizes, rates=DirtRates.none())
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
        traffic.stage, before = part, copied(stage)
        if words is None:
            await asyncio.sleep(seconds)
        else:
            await copy_over_and_over(stage, seconds, *words)
        print(
            f"{part}: p99 {p99(traffic, part) * 1000:.0f} ms, {copied(stage) - before:,} users copied",
            flush=True,
        )
        traffic.stage = "between"
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
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each part")
    parser.add_argument("--throttle", default="--max-latency 20", help="options of the throttled backfill")
    arguments = parser.parse_args()
    return 0 if run(arguments.users, arguments.seconds, arguments.throttle.split()) else 1


if __name__ == "__main__":
    sys.exit(main())
