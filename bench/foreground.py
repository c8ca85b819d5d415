"""The reference service while a backfill runs beside it: how much longer its slowest answers take.

    python -m bench.foreground [--users 10000] [--seconds 25]

One process of the service and eight clients of it, the demo's, at a steady pace: registrations, log-ins, profiles,
look-ups. First alone, then while `crossfade backfill` copies every user over and over, throttled as it is by default.
p99 of all answers. Ends with a JSON line per figure.
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
ALONE, BESIDE = "alone", "beside a backfill"
#: Requests a second: what leaves the processors of a small machine half idle.
RATE = 30.0


def p99(traffic: Traffic, stage: str) -> float:
    """Seconds in which all but one in a hundred requests of a stage were answered."""
    took = [seconds for (at, _), its in traffic.latencies.items() if at == stage for seconds in its]
    return statistics.quantiles(took, n=100)[98]


async def play(stage: Stage, users: int, seconds: float) -> tuple[Traffic, int]:
    """Both halves; the clients, and how many documents were copied in the second one."""
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
    traffic.stage = ALONE
    await asyncio.sleep(seconds)
    traffic.stage, ends = BESIDE, time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        begun = asyncio.create_task(
            stage.crossfade("backfill", "--entity", "users", "--restart", may_find=True)
        )
        await asyncio.wait({begun}, timeout=left)
        with suppress(DemoFailed):  # that it was interrupted, or had just ended by itself
            if not begun.done():
                await stage.crossfade("stop")
            await begun
    await asyncio.wait({begun})
    traffic.stage = "over"
    traffic.stop()
    await running
    with psycopg.connect(stage.database_url) as connection:
        [copied] = connection.execute(
            "SELECT sum((counts->>'read')::int) FROM crossfade.ranges"
        ).fetchone() or (0,)
    return traffic, int(copied)


def run(users: int, seconds: float) -> bool:
    with staged(keep=False) as stage:
        del stage.ports[1:]
        stage.start_workers()
        traffic, copied = asyncio.run(play(stage, users, seconds))
    alone, beside = p99(traffic, ALONE), p99(traffic, BESIDE)
    print(
        f"{traffic.total:,} requests, {traffic.failed} failed; {copied:,} users copied in {seconds:.0f} s; "
        f"p99 {alone * 1000:.0f} ms alone, {beside * 1000:.0f} ms beside the backfill",
        flush=True,
    )
    return (
        report(Figure("p99 of the service beside a backfill", beside / alone, "the service alone", most=GOAL))
        and not traffic.failed
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=25.0, help="of either half")
    arguments = parser.parse_args()
    return 0 if run(arguments.users, arguments.seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
