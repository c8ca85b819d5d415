"""`crossfade backfill` and `verify`: whole collections at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.markup import escape
from rich.table import Table

from crossfade.bulk.backfill import Backfill
from crossfade.bulk.backfill import Counts as BackfillCounts
from crossfade.bulk.backfill import Report as BackfillReport
from crossfade.bulk.pieces import in_dependency_order
from crossfade.bulk.rehearse import Rehearsal
from crossfade.bulk.rehearse import Report as RehearsalReport
from crossfade.bulk.throttle import Throttle
from crossfade.bulk.verify import Counts as VerifyCounts
from crossfade.bulk.verify import Report as VerifyReport
from crossfade.bulk.verify import Verify
from crossfade.cli.bars import Show, bars
from crossfade.cli.context import (
    AppOption,
    EndedElsewhere,
    Exit,
    JsonOption,
    as_json_text,
    console,
    fail,
    find_application,
    open_migration,
    problems,
    run,
)
from crossfade.cli.crew import (
    ExecutorFactory,
    Order,
    Outcome,
    backfill_of,
    bulk_stores,
    dask,
    give_way,
    lead,
    pool,
    verify_of,
)
from crossfade.cli.jobs import Live
from crossfade.clock import boot_clock
from crossfade.entity import Entity
from crossfade.errors import ConfigurationError, NotAllowedInPhase
from crossfade.migration import Migration
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres
from crossfade.stores.runs import Steering
from crossfade.transition import until_all_have_read

EntityOption = Annotated[
    list[str] | None,
    typer.Option(
        "--entity", help="Only this one; may be repeated.", show_default="every entity of the migration"
    ),
]
ReportOption = Annotated[
    Path | None,
    typer.Option("--report", help="Write the whole report to this file, as JSON.", dir_okay=False),
]


#: Documents below which one process is done sooner than others have begun.
_WORTH_A_CREW = 50_000

WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        max=256,
        help="Processes at work.",
        show_default="one for each core, few for few documents",
    ),
]
MaxRateOption = Annotated[
    int | None,
    typer.Option(
        "--max-rate", min=1, help="Records a second of all workers together; `crossfade rate N` changes it live.",
        show_default="as many as the stores take",
    ),
]  # fmt: skip
MaxLatencyOption = Annotated[
    int,
    typer.Option(
        "--max-latency",
        min=0,
        metavar="MS",
        help="Slow down when a store takes longer for a small read; 0: never.",
    ),
]
MaxLagOption = Annotated[
    int,
    typer.Option(
        "--max-lag",
        min=0,
        metavar="SECONDS",
        help="Slow down when a replica of PostgreSQL is further behind; 0: never.",
    ),
]
MaxDebtsOption = Annotated[
    int,
    typer.Option(
        "--max-debts",
        min=0,
        metavar="N",
        help="Slow down when more records are in debt: the application's own writes come first; 0: never.",
    ),
]
DaskOption = Annotated[
    str | None,
    typer.Option(
        "--dask",
        metavar="ADDRESS",
        help="Work on this Dask cluster instead (tcp://scheduler:8786); its workers need MONGO_URI and DATABASE_URL "
        "in their own environment. See docs/scale.md.",
        show_default=False,
    ),
]


def backfill(
    entity: EntityOption = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, max=100_000, help="Documents in one transaction.", show_default="as many as take a second"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Convert everything, write nothing.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin at the beginning.")] = False,
    keep_indexes: Annotated[
        bool,
        typer.Option(
            "--keep-indexes",
            help="Do not put aside foreign keys and further indexes of tables that are empty; they are made anew at "
            "the end, without standing in anybody's way.",
        ),
    ] = False,
    workers: WorkersOption = None,
    dask_address: DaskOption = None,
    max_rate: MaxRateOption = None,
    max_latency: MaxLatencyOption = 100,
    max_lag: MaxLagOption = 10,
    max_debts: MaxDebtsOption = 10_000,
    report: ReportOption = None,
    application: AppOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy every document to PostgreSQL while the application keeps writing. Run again, it goes on.

    The same command on another machine, at the same time, helps.

    Exit status: 0 complete, 1 complete, and something needs a person (quarantine, broken rules), 2 wrong use,
    3 a store cannot be reached, 130 interrupted; in both of the last cases run it again.
    """

    async def work() -> Exit:
        reports: Sequence[BackfillReport | RehearsalReport]
        if dry_run:
            _, entities = find_application(application)
            chosen = chosen_entities(entities, entity)
            reports = await _rehearse(chosen, batch_size, as_json=as_json)
        else:
            async with open_migration(application, begin=False) as migration:
                _assert_backfill_may_run(migration)
                # Whoever is still in phase 0 leaves no debt of what is written behind the copy of it.
                await until_all_have_read(migration, migration.control, boot_clock())
                job = Job(
                    "backfill", migration, application, workers, dask_address, batch_size, restart, as_json,
                    keep_indexes, max_rate, max_latency, max_lag, max_debts,
                )  # fmt: skip
                chosen = chosen_entities(list(migration.entities.values()), entity)
                reports = await job.run(chosen)
        return _conclude(reports, len(chosen), report, "backfill", as_json=as_json)

    run(work, as_json=as_json)


def verify(
    entity: EntityOption = None,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="Compare ids and revisions alone; this is no evidence for a switch."),
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin at the beginning.")] = False,
    workers: WorkersOption = None,
    dask_address: DaskOption = None,
    max_rate: MaxRateOption = None,
    max_latency: MaxLatencyOption = 100,
    max_lag: MaxLagOption = 10,
    max_debts: MaxDebtsOption = 10_000,
    report: ReportOption = None,
    application: AppOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare every record in both stores, both ways, and keep the result as evidence. Interrupted, it goes on.

    Exit status: 0 nothing differs, or only for a known reason (debt, quarantine), 1 mismatches, 2 wrong use,
    3 a store cannot be reached, 130 interrupted.
    """

    async def work() -> Exit:
        async with open_migration(application, begin=False) as migration:
            kind = "verify_fast" if fast else "verify"
            job = Job(
                kind, migration, application, workers, dask_address, None, restart, as_json,
                max_rate=max_rate, max_latency=max_latency, max_lag=max_lag, max_debts=max_debts,
            )  # fmt: skip
            chosen = chosen_entities(list(migration.entities.values()), entity)
            reports = await job.run(chosen)
        return _conclude(reports, len(chosen), report, "verify", as_json=as_json)

    run(work, as_json=as_json)


def add_to(main: typer.Typer) -> None:
    """Put these commands into the main one."""
    main.command()(backfill)
    main.command()(verify)


# --- the work -----------------------------------------------------------------------------------------------


def _assert_backfill_may_run(migration: Migration) -> None:
    rules = migration.control.phase.rules
    if not rules.dual or rules.primary != "mongo":
        raise NotAllowedInPhase(
            f"migration {migration.name!r} is in phase {migration.control.phase.value}: a backfill needs writes to go "
            "to both stores with MongoDB deciding. Run `crossfade phase set dual_write` first, or try --dry-run"
        )


@dataclass(frozen=True, slots=True)
class Job:
    """One command at work: entity after entity, by one process or many.

    Attributes:
        kind: "backfill", "verify" or "verify_fast".
        application: as of ``--app``.
        workers, dask, batch_size, restart, as_json, keep_indexes, max_rate, max_latency, max_lag, max_debts: as
            of the options.
    """

    kind: str
    migration: Migration
    application: str | None
    workers: int | None
    dask: str | None
    batch_size: int | None
    restart: bool
    as_json: bool
    keep_indexes: bool = True
    max_rate: int | None = None
    max_latency: int = 100
    max_lag: int = 10
    max_debts: int = 10_000

    async def run(self, chosen: Sequence[Entity]) -> list[Any]:
        """The report for each entity, up to the one where it was interrupted."""
        reports = []
        give_way()
        totals = await _totals(chosen)
        with stopping() as stop, bars(self.as_json, totals) as bar, self._crew() as crew:
            async with self._live(stop) as live:
                for entity in in_dependency_order(chosen):
                    async with bulk_stores() as (source, target):
                        total = totals[entity.name]
                        # A process takes seconds to begin; who names a number gets it.
                        asked = self.workers is not None or self.dask is not None
                        workers = crew.most if asked or total >= _WORTH_A_CREW else 1
                        one = _One(entity, source, target, total, workers, bar(entity.name, total))
                        reports.append(await self._one(one, crew, live, stop))
                    if stop.is_set():
                        break
        return reports

    @asynccontextmanager
    async def _live(self, stop: asyncio.Event) -> AsyncIterator[Live]:
        async with bulk_stores() as (source, target):
            live = Live(self.kind, self.migration.name, target, stop, max_rate=self.max_rate)
            throttle = Throttle(self.max_latency / 1000, self.max_lag, self.max_debts)
            entities = list(self.migration.entities.values())
            waited = self.migration.pair.postgres.pool_wait
            throttling = asyncio.create_task(live.throttle(throttle, source, entities, waited))
            try:
                async with live.listening():
                    yield live
            finally:
                throttling.cancel()
                await asyncio.wait([throttling])

    @contextmanager
    def _crew(self) -> Iterator[_Crew]:
        if self.dask is None:
            most = self.workers or len(os.sched_getaffinity(0))
            yield _Crew(lambda: pool(most), most, lambda: True)
            return
        with dask(self.dask) as (executor, there, is_manned):
            yield _Crew(lambda: nullcontext(executor), self.workers or there, is_manned)

    async def _one(
        self, one: _One, crew: _Crew, live: Live, stop: asyncio.Event
    ) -> BackfillReport | VerifyReport:
        entity, source, target, show = one.entity, one.source, one.target, one.show
        made: Backfill | Verify
        if self.kind == "backfill":
            made = backfill_of(
                self.migration, entity, source, target, batch_size=self.batch_size,
                on_progress=lambda counts: show(counts.read, _said(counts)),
                loading=not self.keep_indexes and one.total >= _WORTH_A_CREW,
                on_step=show.step,
            )  # fmt: skip
        else:
            made = verify_of(
                self.migration, entity, source, target, fast=self.kind == "verify_fast",
                on_progress=lambda counts: show(counts.documents, _said(counts)),
            )  # fmt: skip
        begun = await made.begin(restart=self.restart, workers=one.workers)
        if not await target.runs.is_busy(begun):
            # What an earlier command was told is over with it.
            await target.runs.steer(begun, dict.fromkeys(Steering.__slots__))
        totals = await target.runs.totals(begun)
        await live.follow(entity.name, begun, one.total, totals.get("read", totals.get("documents", 0)))
        workers = min(one.workers, await target.runs.open_pieces(begun))
        outcomes: list[Outcome] = []
        if workers > 1 or (self.dask is not None and workers):

            async def look() -> None:
                if stop.is_set():
                    await target.runs.steer(begun, {"stopped": True})
                made.heard(await target.runs.totals(begun))

            order = Order(self.kind, self.application, entity.name, str(begun.run), self.batch_size)
            outcomes = await lead(crew.executor, workers, order, look, crew.is_manned)
        for outcome in outcomes:
            if outcome.error:
                raise EndedElsewhere(outcome.error, outcome.status)
        # What is left: all of it where it is little, or what a worker left that died.
        report: Any = await made.run(begun, stop=stop)
        for outcome in outcomes:
            for name, samples in outcome.samples.items():
                getattr(report, name).extend(samples)
        return cast(BackfillReport | VerifyReport, report)


@dataclass(frozen=True, slots=True)
class _Crew:
    """Who works: what makes an executor, how many workers at most, and whether there are any."""

    executor: ExecutorFactory
    most: int
    is_manned: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class _One:
    """What a job does with one entity: its stores, how many documents about, and for how many workers."""

    entity: Entity
    source: BulkMongo
    target: BulkPostgres
    total: int
    workers: int
    show: Show


async def _totals(entities: Sequence[Entity]) -> dict[str, int]:
    """About how many documents each has."""
    async with bulk_stores() as (source, _):
        return {entity.name: await asyncio.to_thread(source.count, entity) for entity in entities}


def _said(counts: BackfillCounts | VerifyCounts) -> str:
    if isinstance(counts, VerifyCounts):
        return f"{counts.mismatches} mismatches"
    return f"{counts.quarantined} quarantined, {counts.errors} errors"


async def _rehearse(
    chosen: Sequence[Entity], batch_size: int | None, *, as_json: bool
) -> list[RehearsalReport]:
    reports = []
    totals = await _totals(chosen)
    with stopping() as stop, bars(as_json, totals) as bar:
        for entity in chosen:
            async with bulk_stores() as (source, target):
                show = bar(entity.name, totals[entity.name])
                made = Rehearsal(
                    entity,
                    source,
                    target,
                    batch_size=batch_size or 5_000,
                    on_progress=lambda r, show=show: show(  # type: ignore[misc]
                        r.read, f"{r.quarantined} would be quarantined"
                    ),
                )
                reports.append(await made.run(stop=stop))
            if stop.is_set():
                break
    return reports


def chosen_entities(entities: Sequence[Entity], names: Sequence[str] | None) -> list[Entity]:
    """Those that ``--entity`` names, or all.

    Raises:
        crossfade.errors.ConfigurationError: there is none of a name.
    """
    by_name = {entity.name: entity for entity in entities}
    unknown = [name for name in names or () if name not in by_name]
    if unknown:
        raise ConfigurationError(f"no entity {unknown[0]!r}; the migration has: {', '.join(by_name)}")
    return [by_name[name] for name in names] if names else list(entities)


def _conclude(
    reports: Sequence[BackfillReport | VerifyReport | RehearsalReport],
    wanted: int,
    path: Path | None,
    command: str,
    *,
    as_json: bool,
) -> Exit:
    """Show and store the reports, of as many entities as were ``wanted``; the exit status that they ask for."""
    interrupted = len(reports) < wanted or any(report.state != "complete" for report in reports)
    found = any(report.found for report in reports)
    whole = {
        "command": command,
        "state": "interrupted" if interrupted else "complete",
        "found": found,
        "entities": [report.to_json() for report in reports],
    }
    if path is not None:
        try:
            path.write_text(json.dumps(whole, indent=2, default=str) + "\n", encoding="utf-8")
        except OSError as cause:
            fail(f"cannot write the report {path}: {cause.strerror}", Exit.WRONG_USE, as_json=as_json)
    if as_json:
        print(as_json_text(whole))
    else:
        for report in reports:
            _show(report)
        if interrupted:
            problems.print(f"interrupted; the same {command} goes on behind the last chunk", highlight=False)
    if interrupted:
        return Exit.INTERRUPTED
    return Exit.FOUND if found else Exit.DONE


def _show(report: BackfillReport | VerifyReport | RehearsalReport) -> None:
    table = Table(title=f"{report.entity}: {report.state} after {report.seconds:.1f} s", show_header=False)
    for name, value in _numbers(report).items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    console.print(table)
    for line in _lines(report):
        console.print("  " + escape(line), highlight=False, soft_wrap=True)


def _numbers(report: BackfillReport | VerifyReport | RehearsalReport) -> dict[str, int]:
    if isinstance(report, RehearsalReport):
        names = ("read", "convertible", "deleted", "quarantined", "collisions")
        rows = {f"rows of {table}": count for table, count in report.child_rows.items()}
        odd = {f"kept whole in extra: {field}": count for field, count in report.odd.items()}
        return {**{name: getattr(report, name) for name in names}, **rows, **odd}
    if isinstance(report, VerifyReport):
        return report.counts.stored()
    return {name: getattr(report.counts, name) for name in BackfillCounts.__slots__}


def _lines(report: BackfillReport | VerifyReport | RehearsalReport) -> Iterator[str]:
    """Examples of what was found, for a terminal; the report file has all that was kept."""
    if isinstance(report, RehearsalReport):
        for reason, entry in list(report.reasons.items())[:20]:
            yield f"{entry['count']} x {reason}: {', '.join(entry['ids'][:3])}"
        for twin in report.twins[:20]:
            yield f"{twin['rule']} {twin['key']!r} is held by {', '.join(twin['ids'][:5])}"
    elif isinstance(report, VerifyReport):
        for one in report.samples[:20]:
            yield f"{one['id']}: {one['finding']} {', '.join(one['fields'])}".rstrip()
    else:
        for one in report.quarantined[:10]:
            yield f"{one['id']}: {one['reason']}"
        for one in report.parked[:10]:
            yield f"{one['id']}: breaks the rule {one['rule']} ({one['why']})"


# --- signals ------------------------------------------------------------------------------------------------


@contextmanager
def stopping() -> Iterator[asyncio.Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets; the second one ends the command at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def ask() -> None:
        stop.set()
        problems.print("stopping after this chunk; once more to stop at once", highlight=False)
        for number in signals:
            loop.remove_signal_handler(number)

    for number in signals:
        loop.add_signal_handler(number, ask)
    try:
        yield stop
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
