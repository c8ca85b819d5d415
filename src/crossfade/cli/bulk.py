"""`crossfade backfill`, `verify` and `quarantine`: whole collections at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from dotenv import dotenv_values
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from crossfade import errors
from crossfade.bulk import quarantine as entries
from crossfade.bulk.backfill import BATCH_SIZE, Backfill
from crossfade.bulk.backfill import Counts as BackfillCounts
from crossfade.bulk.backfill import Report as BackfillReport
from crossfade.bulk.rehearse import Rehearsal
from crossfade.bulk.rehearse import Report as RehearsalReport
from crossfade.bulk.verify import Report as VerifyReport
from crossfade.bulk.verify import Verify
from crossfade.cli.context import (
    AppOption,
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
from crossfade.debt import Settled
from crossfade.entity import Entity
from crossfade.errors import ConfigurationError, NotAllowedInPhase
from crossfade.migration import Migration
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres

app = typer.Typer(no_args_is_help=True)
quarantine_app = typer.Typer(help="Documents that cannot be carried over unchanged.", no_args_is_help=True)

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


@app.command()
def backfill(
    entity: EntityOption = None,
    batch_size: Annotated[
        int, typer.Option(min=1, max=100_000, help="Documents in one transaction.")
    ] = BATCH_SIZE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Convert everything, write nothing.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin at the beginning.")] = False,
    report: ReportOption = None,
    application: AppOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy every document to PostgreSQL while the application keeps writing. Run again, it goes on.

    Exit status: 0 complete, 1 complete, and something needs a person (quarantine, broken rules), 2 wrong use,
    3 a store cannot be reached, 130 interrupted; in both of the last cases run it again.
    """

    async def work() -> Exit:
        reports: Sequence[BackfillReport | RehearsalReport]
        if dry_run:
            _, entities = find_application(application)
            reports = await _rehearse(_chosen(entities, entity), batch_size, as_json=as_json)
        else:
            async with open_migration(application, begin=False) as migration:
                chosen = _chosen(list(migration.entities.values()), entity)
                reports = await _backfill(migration, chosen, batch_size, restart=restart, as_json=as_json)
        return _conclude(reports, report, "backfill", as_json=as_json)

    run(work, as_json=as_json)


@app.command()
def verify(
    entity: EntityOption = None,
    report: ReportOption = None,
    application: AppOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare every record in both stores, both ways, and keep the result as evidence.

    Exit status: 0 nothing differs, or only for a known reason (debt, quarantine), 1 mismatches, 2 wrong use,
    3 a store cannot be reached, 130 interrupted.
    """

    async def work() -> Exit:
        async with open_migration(application, begin=False) as migration:
            chosen = _chosen(list(migration.entities.values()), entity)
            reports: list[VerifyReport] = []
            with _stopping() as stop, _bars(as_json) as bars:
                for one in chosen:
                    async with _stores() as (source, target):
                        show = bars(one, await asyncio.to_thread(source.count, one))
                        made = Verify(
                            one,
                            source,
                            target,
                            migration=migration.name,
                            epoch=migration.control.epoch,
                            on_progress=lambda c, show=show: show(  # type: ignore[misc]
                                c.documents, f"{c.mismatches} mismatches"
                            ),
                        )
                        reports.append(await made.run(stop=stop))
                    if stop.is_set():
                        break
        return _conclude(reports, report, "verify", as_json=as_json)

    run(work, as_json=as_json)


@quarantine_app.command("list")
def quarantine_list(
    entity: Annotated[str | None, typer.Option(help="Only of this entity.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Entries at most.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """List what is in quarantine, the newest first. Exit status 1 if there is anything."""

    async def work() -> Exit:
        async with _target() as target:
            found = await entries.list_quarantine(target, entity, limit=limit)
        if as_json:
            print(as_json_text({"quarantine": found}))
        elif found:
            table = Table("entity", "id", "reason", "field", "bytes", "last seen")
            for one in found:
                table.add_row(
                    *(
                        escape(str(one[name] if one[name] is not None else ""))
                        for name in ("entity", "id", "reason")
                    ),
                    escape(str(one["field"] or "")),
                    f"{one['bytes']:,}",
                    one["last_seen"].isoformat(timespec="seconds"),
                )
            console.print(table)
        else:
            console.print("nothing is in quarantine")
        return Exit.FOUND if found else Exit.DONE

    run(work, as_json=as_json)


@quarantine_app.command("show")
def quarantine_show(
    entity: Annotated[str, typer.Argument(help="Name of the entity.")],
    id_text: Annotated[str, typer.Argument(metavar="ID", help="As `quarantine list` shows it.")],
    as_json: JsonOption = False,
) -> None:
    """Show one document as it was found."""

    async def work() -> Exit:
        async with _target() as target:
            found = await entries.show_quarantined(target, entity, id_text)
        if found is None:
            raise ConfigurationError(f"no document {id_text!r} of {entity!r} is in quarantine")
        if as_json:
            print(as_json_text(found))
        else:
            console.print(f"[bold]{escape(found['reason'])}[/]", highlight=False)
            console.print(escape(found["document"] or found["hex"]), highlight=False, soft_wrap=True)
        return Exit.DONE

    run(work, as_json=as_json)


app.add_typer(quarantine_app, name="quarantine")


def add_to(main: typer.Typer) -> None:
    """Put these commands into the main one."""
    main.command()(backfill)
    main.command()(verify)
    main.add_typer(quarantine_app, name="quarantine")


# --- the work -----------------------------------------------------------------------------------------------


async def _backfill(
    migration: Migration, chosen: Sequence[Entity], batch_size: int, *, restart: bool, as_json: bool
) -> list[BackfillReport]:
    control = migration.control
    if not control.phase.rules.dual or control.phase.rules.primary != "mongo":
        raise NotAllowedInPhase(
            f"migration {migration.name!r} is in phase {control.phase.value}: a backfill needs writes to go to both "
            "stores with MongoDB deciding. Run `crossfade phase set dual_write` first, or try --dry-run"
        )

    async def settle_one(entity: Entity, id_: Any) -> None:
        if await migration.settler.settle_one(entity, id_, control) is Settled.PARKED:
            raise errors.CrossfadeError("PostgreSQL refuses it; see the log for the cause")

    async def on_behind(entity: Entity, ids: Sequence[Any]) -> None:
        # A row that is ahead has its own debt; a fork is lifted. One at a time: there are few.
        for id_ in ids:
            await migration.settler.settle_one(entity, id_, control)

    reports = []
    with _stopping() as stop, _bars(as_json) as bars:
        for entity in chosen:
            async with _stores() as (source, target):
                show = bars(entity, await asyncio.to_thread(source.count, entity))
                made = Backfill(
                    entity,
                    source,
                    target,
                    migration=migration.name,
                    epoch=control.epoch,
                    batch_size=batch_size,
                    settle_one=settle_one,
                    on_behind=on_behind,
                    on_progress=lambda c, show=show: show(c.read, _said(c)),  # type: ignore[misc]
                )
                reports.append(await made.run(restart=restart, stop=stop))
            if stop.is_set():
                break
    return reports


def _said(counts: BackfillCounts) -> str:
    return f"{counts.quarantined} quarantined, {counts.errors} errors"


async def _rehearse(chosen: Sequence[Entity], batch_size: int, *, as_json: bool) -> list[RehearsalReport]:
    reports = []
    with _stopping() as stop, _bars(as_json) as bars:
        for entity in chosen:
            async with _stores() as (source, target):
                show = bars(entity, await asyncio.to_thread(source.count, entity))
                made = Rehearsal(
                    entity,
                    source,
                    target,
                    batch_size=batch_size,
                    on_progress=lambda r, show=show: show(  # type: ignore[misc]
                        r.read, f"{r.quarantined} would be quarantined"
                    ),
                )
                reports.append(await made.run(stop=stop))
            if stop.is_set():
                break
    return reports


def _chosen(entities: Sequence[Entity], names: Sequence[str] | None) -> list[Entity]:
    by_name = {entity.name: entity for entity in entities}
    unknown = [name for name in names or () if name not in by_name]
    if unknown:
        raise ConfigurationError(f"no entity {unknown[0]!r}; the migration has: {', '.join(by_name)}")
    return [by_name[name] for name in names] if names else list(entities)


def _conclude(
    reports: Sequence[BackfillReport | VerifyReport | RehearsalReport],
    path: Path | None,
    command: str,
    *,
    as_json: bool,
) -> Exit:
    """Show and store the reports; the exit status that they ask for."""
    interrupted = any(report.state != "complete" for report in reports)
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
            goes_on = "goes on behind the last chunk" if command == "backfill" else "begins again"
            problems.print(f"interrupted; the same command {goes_on}", highlight=False)
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
        return dict(report.counts.to_json())
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


# --- stores, signals, bars ------------------------------------------------------------------------------------


def _address(name: str, example: str) -> str:
    value = os.environ.get(name) or dotenv_values(".env").get(name)
    if not value:
        raise ConfigurationError(f"{name} is not set: for example {example}")
    return value


@asynccontextmanager
async def _target() -> AsyncIterator[BulkPostgres]:
    target = await BulkPostgres.connect(
        _address("DATABASE_URL", "postgresql://app:secret@127.0.0.1:5432/app")
    )
    try:
        yield target
    finally:
        await target.close()


@asynccontextmanager
async def _stores() -> AsyncIterator[tuple[BulkMongo, BulkPostgres]]:
    """Connections for one run: its claim ends with them."""
    source = BulkMongo(_address("MONGO_URI", "mongodb://127.0.0.1:27017/app"))
    try:
        async with _target() as target:
            yield source, target
    finally:
        source.close()


@contextmanager
def _stopping() -> Iterator[asyncio.Event]:
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


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("- /s" if task.speed is None else f"{task.speed:,.0f}/s")


Show = Callable[[int, str], None]


@contextmanager
def _bars(as_json: bool) -> Iterator[Callable[[Entity, int], Show]]:
    """A progress bar per entity, on the error output: how far, how fast, how long still, what was found."""
    progress = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
        console=Console(stderr=True),
        disable=as_json or not problems.is_terminal,
    )

    def bar(entity: Entity, total: int) -> Show:
        task = progress.add_task(entity.name, total=total, said="")

        def show(done: int, said: str) -> None:
            progress.update(task, completed=done, total=max(total, done), said=said)

        return show

    with progress:
        yield bar
