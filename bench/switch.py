"""The primary goes forth and back under load: what held writes waited, what failed, and what was lost.

    python -m bench.switch [--switches 20] [--workers 4] [--rate 240]

Worker processes read, insert, update and delete users through the library, mixed, at a steady rate. Meanwhile the
primary is switched, forth and back. Every write puts a number of its own into its record, and all processes share one
clock; at the end both stores are compared, and the history of what everybody was told is judged: no acknowledged write
lost, no revision told twice, no later write under a lower revision, no read older than what was acknowledged before it.
Ends with a JSON line per figure.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

from bson import ObjectId
from tests.histories.history import Event, History

from bench import two_databases
from bench.write_latency import document
from crossfade import Crossfade, CrossfadeError, Migration, Phase, observe
from crossfade.switch import Changed, Pause
from crossfade.transition import change_phase
from scorekeeper.users.entity import users

USERS, CLIENTS = 400, 6
#: Seconds between two switches: held writes are through, and both directions have had traffic.
BETWEEN = 1.5
GOAL_P99, GOAL_MAX = 0.250, 1.0


def crossfade(mongo_uri: str, database_url: str, **how: Any) -> tuple[Crossfade, Migration]:
    cf = Crossfade(mongo_uri=mongo_uri, database_url=database_url, initial_phase=Phase.POSTGRES_READ, **how)
    return cf, cf.migration("accounts", [users])


# --- a worker: a process of its own ----------------------------------------------------------------------------


async def work(mongo_uri: str, database_url: str, number: int, rate: float) -> None:
    """Operations at this rate until a line comes on standard input; then one JSON line: the events."""
    cf, m = crossfade(mongo_uri, database_url)
    values, events, ended = itertools.count(number * 10_000_000), list[Event](), asyncio.Event()
    rng = random.Random(number)
    ids = [ObjectId(f"{n:024x}") for n in range(1, USERS + 1)]

    async def client() -> None:
        while not ended.is_set():
            began = time.monotonic()
            await tell(m, rng, ids, values, events)
            await asyncio.sleep(max(0.0, rng.uniform(0.5, 1.5) * CLIENTS / rate - (time.monotonic() - began)))

    async with cf:
        print("ready", flush=True)
        clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
        await asyncio.to_thread(sys.stdin.readline)
        ended.set()
        await asyncio.gather(*clients)
    print(json.dumps([asdict(event) | {"id": str(event.id)} for event in events]), flush=True)


async def tell(
    m: Migration, rng: random.Random, ids: list[ObjectId], values: Any, events: list[Event]
) -> None:
    """One operation, and what it was told."""
    id_ = rng.choice(ids)
    kind = rng.choices(["read", "update", "insert", "delete"], [50, 40, 6, 4])[0]
    value = next(values) if kind in ("insert", "update") else None
    event = Event(kind, id_, time.monotonic(), value=value)
    events.append(event)
    try:
        match kind:
            case "insert":
                done = await m.users.insert({"_id": id_, **document(f"user {id_}"), "n": value})
            case "update":
                done = await m.users.update(id_, {"n": value})
            case "delete":
                done = await m.users.delete(id_)
            case _:
                done = await m.users.get(id_)
                event.value = None if done is None else done["n"]
                event.stale = done is not None and done.stale
        event.rev = None if done is None else done.rev
        event.told = "acknowledged"
    except CrossfadeError as cause:
        event.told = type(cause).__name__
        if event.told not in ("DuplicateKey", "NotFound"):
            print(f"{time.monotonic():.3f} {kind}: {event.told}: {cause}", file=sys.stderr, flush=True)
    event.ended = time.monotonic()


# --- the switches ------------------------------------------------------------------------------------------------


async def play(mongo_uri: str, database_url: str, args: argparse.Namespace) -> bool:
    cf, m = crossfade(mongo_uri, database_url, background=False)
    await cf.postgres.open()
    await cf.postgres.prepare()
    async with cf:
        await prepare(m)
        print("starting the workers", flush=True)
        workers = [
            await asyncio.create_subprocess_exec(
                sys.executable, "-m", "bench.switch", "--worker", str(number), "--rate", str(args.rate / args.workers),
                mongo_uri, database_url,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**28,
            )
            for number in range(1, args.workers + 1)
        ]  # fmt: skip
        for process in workers:
            assert process.stdout is not None
            await process.stdout.readline()
        began = time.monotonic()
        switched = await switch_forth_and_back(m, args.switches)
        seconds = time.monotonic() - began
        events = [event for process in workers for event in await events_of(process)]
        await m.reconciler.reconcile()
        await m.reconciler.drain()
        final, unlike = await what_is_held(m)
    return report(switched, events, final, unlike, seconds)


async def prepare(m: Migration) -> None:
    """The evidence that the guard wants."""
    timeout = 60.0
    for n in range(1, USERS + 1):
        await m.users.insert({"_id": ObjectId(f"{n:024x}"), **document(f"user {n:024x}"), "n": -n})
    await m.settler.eraser.join()
    assert (await m.record.look(timeout=timeout)).decisive


async def switch_forth_and_back(m: Migration, switches: int) -> list[Changed]:
    switched = []
    for number in range(switches):
        await asyncio.sleep(BETWEEN)
        target = Phase.POSTGRES_READ if m.phase is Phase.POSTGRES_PRIMARY else Phase.POSTGRES_PRIMARY
        done = await change_phase(
            m, target, by="bench", reason="bench", force=("verify",) if number % 2 == 0 else ()
        )
        switched.append(done)
        pause = done.pause
        print(
            f"{number + 1:2} to {done.after.phase.rules.primary:8} held {pause.whole * 1000:4.0f} ms: {pause.writes:3} "
            f"writes, p99 {pause.p99 * 1000:4.0f} ms, at most {pause.longest * 1000:4.0f} ms, {pause.failed} failed; "
            f"{done.drained} debts drained, {done.compared} compared, {done.adopted} adopted, silent {done.silent}",
            flush=True,
        )
    await asyncio.sleep(BETWEEN)
    return switched


async def events_of(process: asyncio.subprocess.Process) -> list[Event]:
    told, _ = await process.communicate(b"end\n")
    return [Event(**event) for event in json.loads(told.splitlines()[-1])]


async def what_is_held(m: Migration) -> tuple[dict[str, tuple[int, int | None] | None], int]:
    """By id, revision and value that both stores hold; how many records are not the same in both."""
    final: dict[str, tuple[int, int | None] | None] = {}
    unlike = 0
    for n in range(1, USERS + 1):
        id_ = ObjectId(f"{n:024x}")
        row = await m.pair.postgres.read(users, id_, timeout=10)
        found = await m.pair.mongo.read(users, id_, timeout=10)
        unlike += (row and (row.rev, row.digest)) != (found and (found.rev, found.digest))
        final[str(id_)] = None if row is None else (row.rev, row.document.get("n"))
    return final, unlike


def report(
    switched: list[Changed], events: list[Event], final: dict[str, Any], unlike: int, seconds: float
) -> bool:
    events += [Event("insert", f"{n:024x}", 0.0, 0.0, -n, "acknowledged", 1) for n in range(1, USERS + 1)]
    violations = History(events).violations(final)
    for violation in violations[:20]:
        print(violation)
    told = Counter(event.told for event in events)
    failed = sum(
        count for name, count in told.items() if name not in ("acknowledged", "DuplicateKey", "NotFound")
    )
    print(f"told: {dict(told)}; {len(events) / seconds:.0f} operations a second")
    pauses = [done.pause for done in switched]
    together = Pause(tuple(sorted(wait for pause in pauses for wait in pause.waits)))
    figures = [
        ("switch_rate", len(events) / seconds, "operations/s", "load", 200.0, len(events) / seconds >= 200),
        ("switch_failed", failed, "requests", f"{len(switched)} switches", 0, failed == 0),
        ("switch_lost", len(violations) + unlike, "violations of history, unlike records", "-", 0,
         not violations and not unlike),
        ("switch_held_p50", together.p50, "s", f"{together.writes} held writes", None, True),
        ("switch_held_p99", together.p99, "s", f"{together.writes} held writes", GOAL_P99, together.p99 < GOAL_P99),
        ("switch_held_max", together.longest, "s", "all switches", GOAL_MAX, together.longest < GOAL_MAX),
    ]  # fmt: skip
    for figure, value, unit, against, goal, holds in figures:
        line = {"figure": figure, "value": round(value, 4), "unit": unit, "against": against, "goal": goal}
        print(json.dumps(line | {"holds": holds}))
    return all(holds for *_, holds in figures)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--switches", type=int, default=20)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rate", type=float, default=240.0, help="operations a second, of all workers")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("stores", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    observe.configure_logging("ERROR")
    if args.worker is not None:
        asyncio.run(work(*args.stores, args.worker, args.rate))
        return 0
    with two_databases("crossfade_switch") as (mongo_uri, database_url):
        return 0 if asyncio.run(play(mongo_uri, database_url, args)) else 1


if __name__ == "__main__":
    sys.exit(main())
