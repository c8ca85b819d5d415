"""``python -m scorekeeper.demo`` (what `crossfade demo` runs): a live migration under traffic, and its figures.

Exit status 0: nothing was lost and no request failed that the contract does not allow; 1 otherwise.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pymongo
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from crossfade import Crossfade, CrossfadeError, Migration, observe
from crossfade.embedded import EmbeddedError
from scorekeeper.demo.checks import first_foreign_lag, lost
from scorekeeper.demo.stage import DemoFailed, Stage, staged
from scorekeeper.demo.traffic import OldApplication, Traffic
from scorekeeper.legacy import generate
from scorekeeper.migration import accounts as account_entities
from scorekeeper.migration import name as migration_name

console = Console(stderr=True)


@dataclass
class Figures:
    """What the demo measured.

    Attributes:
        seconds: by step, in order.
        deepest_debt: most records in debt at one moment.
        drained: seconds from PostgreSQL's return until nothing was in debt; None: it was not killed.
        foreign_lag: seconds until a write of the old application was in PostgreSQL.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    deepest_debt: int = 0
    drained: float | None = None
    foreign_lag: float | None = None
    legacy_users: int = 0
    backfill: dict[str, Any] = field(default_factory=dict)
    verify: list[dict[str, Any]] = field(default_factory=list)
    quarantined: dict[str, int] = field(default_factory=dict)
    reads: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def verify_mismatches(self) -> int:
        """Records that differ at the end for no known reason."""
        return sum(int(report["counts"]["mismatches"]) for report in self.verify)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Announce a step, and keep the seconds that it took."""
        began = time.monotonic()
        console.print(f"[bold]{title}[/] ...", highlight=False)
        try:
            yield
        finally:
            self.seconds[title] = round(time.monotonic() - began, 2)


def demo(
    users: Annotated[int, typer.Option(min=50, help="Legacy users.")] = 20_000,
    dwell: Annotated[float, typer.Option(min=1, help="Seconds of traffic to measure in each stage.")] = 8.0,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running, to be looked at.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Move a legacy database to PostgreSQL while two workers and an old application use it."""
    observe.configure_logging("ERROR", json=False)
    folder = Path(tempfile.mkdtemp(prefix="crossfade-demo-"))
    # Servers may run as another user, who must be able to reach their folder.
    folder.chmod(0o711)
    try:
        status = asyncio.run(_play(folder, users, dwell, keep=keep, as_json=as_json))
    except (DemoFailed, EmbeddedError, CrossfadeError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}\nlogs: {folder}", highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started is stopped.")
        raise typer.Exit(130) from None
    if status == 0 and not keep:
        shutil.rmtree(folder, ignore_errors=True)
    raise typer.Exit(status)


async def _play(folder: Path, users: int, dwell: float, *, keep: bool, as_json: bool) -> int:
    figures = Figures()
    began = time.monotonic()
    stack = staged(folder, keep=keep)
    with figures.step("servers: MongoDB-compatible, PostgreSQL, Redis; schema at head"):
        stage = await asyncio.to_thread(stack.__enter__)
    try:
        traffic, old = await _migrate(stage, figures, users, dwell)
        figures.lost = await asyncio.to_thread(lost, stage, traffic, old)
        failed = bool(figures.lost or traffic.failures or figures.verify_mismatches())
        if as_json:
            print(json.dumps(_as_json(figures, traffic, old, time.monotonic() - began, failed=failed)))  # noqa: T201
        else:
            _show(figures, traffic, old, time.monotonic() - began, failed=failed)
        if failed:
            console.print(f"logs of the workers: {folder}", highlight=False)
        if keep:
            _say_how_to_look(stage)
        return 1 if failed else 0
    finally:
        with suppress(KeyboardInterrupt):
            await asyncio.to_thread(stack.__exit__, None, None, None)


async def _migrate(
    stage: Stage, figures: Figures, users: int, dwell: float
) -> tuple[Traffic, OldApplication]:
    with figures.step(f"a legacy database of {users:,} users, with all the dirt of real ones"):
        ids, names = await asyncio.to_thread(_fill, stage, figures, users)
    with figures.step("two workers of the service"):
        stage.start_workers()
        await stage.until_ready()
    client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(stage.mongo_uri)
    traffic = Traffic(stage.addresses, names)
    old = OldApplication(client.get_default_database(), ids[1:])
    watching = Crossfade(mongo_uri=stage.mongo_uri, database_url=stage.database_url, background=False)
    migration = watching.migration(migration_name, account_entities())
    running = [asyncio.create_task(traffic.run()), asyncio.create_task(old.run())]
    try:
        async with watching:
            watcher = asyncio.create_task(_watch(migration, figures))
            try:
                await _stages(stage, figures, traffic, migration, dwell, ids[0])
            finally:
                watcher.cancel()
                await asyncio.gather(watcher, return_exceptions=True)
        with figures.step("traffic ends; what is owed is settled; every record is compared once more"):
            traffic.stop()
            old.stop()
            await asyncio.gather(*running)
            # Background writes of the last requests, and the sweep for the old application's last ones.
            await stage.crossfade("reconcile", "--full", may_find=True)
            figures.verify = await _verify(stage)
        figures.quarantined = await asyncio.to_thread(_quarantined, stage)
        figures.reads = await _read_sources(stage)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        client.close()
    return traffic, old


async def _stages(
    stage: Stage, figures: Figures, traffic: Traffic, migration: Migration, dwell: float, probe: Any
) -> None:
    with figures.step("traffic on MongoDB alone, to compare with"):
        await asyncio.sleep(dwell)
    with figures.step("keys of old names stamped; an old application declared"):
        # Names equal but for case are found here: all are kept, which is why this may "find something".
        await stage.crossfade("init", may_find=True)
        await _old_application_declared(stage)
    with figures.step("phase dual_write"):
        await stage.crossfade("phase", "set", "dual_write")
        traffic.stage = "dual_write"
        await asyncio.sleep(dwell)
    with figures.step("backfill, under traffic"):
        traffic.stage = "backfill"
        figures.backfill = await stage.crossfade("backfill", may_find=True)
    with figures.step("verify, under traffic"):
        traffic.stage = "verify"
        await _until_clean(stage)
    if stage.servers.postgres.is_ours:
        with figures.step("PostgreSQL is killed, and comes back"):
            traffic.stage = "postgres dead"
            await _kill_postgres(stage, migration, figures, traffic)
    with figures.step("phases shadow_read, postgres_read"):
        traffic.stage = "verify"
        await _until_clean(stage)
        await stage.crossfade("phase", "set", "shadow_read")
        await stage.crossfade("phase", "set", "postgres_read")
    with figures.step("traffic, reading from PostgreSQL"):
        traffic.stage = "postgres_read"
        await asyncio.sleep(dwell)
        figures.foreign_lag = await asyncio.to_thread(first_foreign_lag, stage, probe, "Seen-In-Postgres")


async def _old_application_declared(stage: Stage) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from crossfade.cli.main import main; main()", "phase", "foreign-writers", "declared",
        env=stage.environment, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, err = await process.communicate()
    if process.returncode:
        raise DemoFailed(f"crossfade phase foreign-writers declared: {err.decode().strip()[-500:]}")


async def _until_clean(stage: Stage) -> None:
    """Verify; a write of the old application that no sweep has seen yet counts, so sweep and look again.

    Raises:
        DemoFailed: records differ three times in a row.
    """
    for _ in range(3):
        reports = await _verify(stage)
        if not any(report["counts"]["mismatches"] for report in reports):
            return
        await stage.crossfade("reconcile", "--full", may_find=True)
    raise DemoFailed(f"verify: records differ: {json.dumps(reports)[:1000]}")


async def _verify(stage: Stage) -> list[dict[str, Any]]:
    printed = await stage.crossfade("verify", may_find=True)
    reports = printed.get("result") or printed.get("reports") or printed.get("entities") or [printed]
    return list(reports.values()) if isinstance(reports, dict) else list(reports)


async def _kill_postgres(stage: Stage, migration: Migration, figures: Figures, traffic: Traffic) -> None:
    await asyncio.sleep(1.0)
    await asyncio.to_thread(stage.servers.postgres.kill)
    await asyncio.sleep(4.0)
    await asyncio.to_thread(stage.servers.postgres.start)
    back = time.monotonic()
    traffic.stage = "draining"
    while time.monotonic() - back < 60.0:
        with suppress(CrossfadeError):
            look = await migration.board.refresh()
            waiting = [debt for debt in look.debts if debt.parked is None]
            # Under traffic a few writes are always on their way: drained is when none is older than a moment.
            if look.postgres and not [debt for debt in waiting if migration.board.seen_for(debt) > 0.4]:
                figures.drained = round(time.monotonic() - back, 2)
                return
        await asyncio.sleep(0.2)
    raise DemoFailed("debts were not drained within a minute of PostgreSQL's return")


async def _watch(migration: Migration, figures: Figures) -> None:
    while True:
        with suppress(CrossfadeError):
            look = await migration.board.refresh()
            figures.deepest_debt = max(figures.deepest_debt, len(look.debts))
        await asyncio.sleep(0.5)


def _fill(stage: Stage, figures: Figures, users: int) -> tuple[list[Any], list[str]]:
    with (
        pymongo.MongoClient[dict[str, Any]](stage.mongo_uri) as client,
        Progress(
            TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.completed:,}/{task.total:,}"),
            TimeElapsedColumn(), console=console, transient=True,
        ) as bar,
    ):  # fmt: skip
        database = client.get_default_database()
        tasks: dict[str, Any] = {}

        def on_progress(collection: str, done: int, total: int) -> None:
            if collection not in tasks:
                tasks[collection] = bar.add_task(collection, total=total)
            bar.update(tasks[collection], completed=done, total=total)

        few = max(users // 20, 10)
        # The rest is there to be left alone; a quarter of the identities keeps the demo under three minutes.
        sizes = {**dict.fromkeys(("games", "wizard", "tablegames"), few), "playeridentities": users // 4}
        generate(database, users=users, sizes=sizes, on_progress=on_progress)
        figures.legacy_users = database["users"].count_documents({})
        clean = database["users"].find(
            {"username": {"$regex": "^[A-Za-z0-9]{3,20}$"}, "role": "user"}, {"username": 1}
        )
        chosen = [one for one in clean.limit(400) if not isinstance(one["_id"], str)]
        return [one["_id"] for one in chosen[:200]], [one["username"] for one in chosen[200:]]


def _quarantined(stage: Stage) -> dict[str, int]:
    import psycopg

    with psycopg.connect(stage.database_url) as connection:
        rows = connection.execute(
            "SELECT entity || ': ' || reason, count(*) FROM crossfade.quarantine GROUP BY 1 ORDER BY 2 DESC"
        ).fetchall()
    return {str(reason): int(number) for reason, number in rows}


async def _read_sources(stage: Stage) -> dict[str, int]:
    """Reads by the store that served them, of all workers."""
    import httpx

    found: dict[str, int] = {}
    async with httpx.AsyncClient(timeout=5.0) as http:
        for address in stage.addresses:
            text = (await http.get(f"{address}/metrics")).text
            for line in text.splitlines():
                if line.startswith("crossfade_reads_total{"):
                    source = line.split('source="')[1].split('"')[0]
                    found[source] = found.get(source, 0) + int(float(line.rsplit(" ", 1)[1]))
    return found


# --- the figures ----------------------------------------------------------------------------------------


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _latencies(traffic: Traffic) -> dict[str, dict[str, dict[str, float]]]:
    """By kind and stage: p50 and p99 in milliseconds, and how many."""
    shown: dict[str, dict[str, dict[str, float]]] = {}
    for (stage, kind), seconds in traffic.latencies.items():
        if len(seconds) >= 5:
            shown.setdefault(kind, {})[stage] = {
                "p50": round(statistics.median(seconds) * 1000, 1),
                "p99": round(_percentile(seconds, 0.99) * 1000, 1),
                "count": len(seconds),
            }
    return shown


def _as_json(
    figures: Figures, traffic: Traffic, old: OldApplication, seconds: float, *, failed: bool
) -> dict[str, Any]:
    return {
        "requests": dict(traffic.requests),
        "failures": dict(traffic.failures),
        "latency_ms": _latencies(traffic),
        "registered": len(traffic.accounts),
        "foreign_writes": old.writes,
        "legacy_users": figures.legacy_users,
        "backfill": figures.backfill,
        "verify": figures.verify,
        "quarantined": figures.quarantined,
        "deepest_debt": figures.deepest_debt,
        "drained_seconds": figures.drained,
        "foreign_lag_seconds": figures.foreign_lag,
        "reads": figures.reads,
        "lost": figures.lost,
        "seconds": figures.seconds,
        "total_seconds": round(seconds, 1),
        "ok": not failed,
    }


def _show(figures: Figures, traffic: Traffic, old: OldApplication, seconds: float, *, failed: bool) -> None:
    out = Console()
    # What it is called inside, and in a table that fits 80 columns.
    stages = {
        "mongo_only": "alone", "dual_write": "dual", "backfill": "backfill",
        "postgres dead": "pg dead", "draining": "drain", "postgres_read": "pg read",
    }  # fmt: skip
    latency = _latencies(traffic)
    table = Table(
        "request",
        "sent",
        *(f"{stage}" for stage in stages),
        title="milliseconds, p50 / p99, by what was going on",
    )
    for kind, by_stage in latency.items():
        cells = [
            f"{by_stage[s]['p50']:.0f}/{by_stage[s]['p99']:.0f}" if s in by_stage else "" for s in stages
        ]
        table.add_row(kind, str(traffic.requests[kind]), *cells)
    out.print(table)
    base, dual = (
        {kind: by[stage] for kind, by in latency.items() if stage in by}
        for stage in ("mongo_only", "dual_write")
    )
    facts = Table(show_header=False, title="the migration")
    facts.add_row("requests", f"{sum(traffic.requests.values()):,}")
    facts.add_row("failed requests", str(sum(traffic.failures.values())))
    for what, number in traffic.failures.most_common(5):
        facts.add_row("", f"[red]{number} x {escape(what)}[/]")
    if "register" in base and "register" in dual:
        more = {q: dual["register"][q] - base["register"][q] for q in ("p50", "p99")}
        facts.add_row(
            "added by dual write to a registration", f"p50 {more['p50']:+.1f} ms, p99 {more['p99']:+.1f} ms"
        )
    facts.add_row("registered through the service", f"{len(traffic.accounts):,}")
    facts.add_row("written by the old application", f"{old.writes:,}")
    for report in figures.verify:
        counts = report["counts"]
        facts.add_row(
            f"verified: {report['entity']}",
            f"{counts['documents']:,} documents, {counts['rows']:,} rows, {counts['equal']:,} equal, "
            f"{counts['mismatches']} mismatches, {counts['quarantined']} quarantined",
        )
    for reason, number in list(figures.quarantined.items())[:8]:
        facts.add_row("quarantined", f"{number} x {escape(reason[:110])}")
    facts.add_row("most records in debt", str(figures.deepest_debt))
    if figures.drained is not None:
        facts.add_row("debt drained after PostgreSQL's return", f"{figures.drained} s")
    if figures.foreign_lag is not None:
        facts.add_row("the old application's write in PostgreSQL after", f"{figures.foreign_lag:.2f} s")
    facts.add_row(
        "reads served by", ", ".join(f"{store} {number:,}" for store, number in figures.reads.items())
    )
    facts.add_row("lost", f"[red]{len(figures.lost)}[/]" if figures.lost else "nothing")
    for line in figures.lost[:10]:
        facts.add_row("", f"[red]{escape(line)}[/]")
    out.print(facts)
    times = Table("step", "seconds", title="time")
    for step, took in figures.seconds.items():
        times.add_row(step, f"{took:.1f}")
    times.add_row("in all", f"{seconds:.1f}")
    out.print(times)
    out.print("[bold red]failed[/]" if failed else "[bold green]nothing lost, no request failed[/]")


def _say_how_to_look(stage: Stage) -> None:
    """Print the addresses, and wait for Ctrl-C with everything running."""
    console.print("\nStill running:", highlight=False)
    for address in stage.addresses:
        console.print(f"  the service   {address}/docs", highlight=False)
    console.print(
        f"  export MONGO_URI='{stage.mongo_uri}' DATABASE_URL='{stage.database_url}'", highlight=False
    )
    console.print("  crossfade status; crossfade verify; crossfade quarantine list", highlight=False)
    console.print("Press Ctrl-C to stop it all.", highlight=False)
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    typer.run(demo)
