"""`crossfade repair`: what a verify found to differ is made equal to the primary."""

from __future__ import annotations

import getpass
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from crossfade.bulk.repair import Repair, Report
from crossfade.cli.bars import bars
from crossfade.cli.bulk import EntityOption, ReportOption, chosen_entities, stopping
from crossfade.cli.context import (
    AppOption,
    Exit,
    JsonOption,
    as_json_text,
    console,
    open_migration,
    problems,
    run,
)
from crossfade.cli.crew import bulk_stores
from crossfade.entity import Entity
from crossfade.errors import ConfigurationError, NotAllowedInPhase
from crossfade.migration import Migration


class _ByProtocol:
    """Repairs by the protocol of single writes, under the phase that the migration was in when it began."""

    def __init__(self, migration: Migration) -> None:
        self._migration = migration
        self._control = migration.control
        self.primary = self._control.phase.rules.primary

    async def from_primary(self, entity: Entity, id_: Any) -> object:
        settler = self._migration.settler
        if self.primary == "postgres":
            return await settler.deliverer.deliver_anew(entity, id_, self._control)
        return await settler.settle_one(entity, id_, self._control)

    async def anew(self, entity: Entity, id_: Any) -> object:
        settler = self._migration.settler
        if self.primary == "postgres":
            return await settler.deliverer.deliver_anew(entity, id_, self._control)
        return await settler.bring_anew(entity, id_, self._control)

    async def drop_row(self, entity: Entity, id_: Any, rev: int) -> object:
        return await self._migration.settler.adopt_delete(entity, id_, rev, self._control)


def repair(
    entity: EntityOption = None,
    apply: Annotated[bool, typer.Option("--apply", help="Do it; else only say what would be done.")] = False,
    extra: Annotated[
        Literal["keep", "delete"],
        typer.Option(help="Rows without a document: deleted behind Crossfade's back, or put there."),
    ] = "keep",
    tombstoned: Annotated[
        Literal["keep", "lift"],
        typer.Option(help="Documents that were put back after their delete: lift makes them records again."),
    ] = "keep",
    by: Annotated[
        str | None, typer.Option("--by", help="Who does it, for the audit.", show_default="the login name")
    ] = None,
    report: ReportOption = None,
    application: AppOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make equal to the primary what the last verify found to differ. Without --apply nothing is changed.

    Each record is looked at again before and after; each change is kept in crossfade.repairs, with what was there.

    Exit status: 0 nothing is left to do, 1 something is, or --apply is missing, 2 wrong use, 3 a store cannot be
    reached, 130 interrupted; in both of the last cases run it again.
    """

    async def work() -> Exit:
        async with open_migration(application, begin=False) as migration:
            if not migration.control.dual:
                raise NotAllowedInPhase(
                    f"migration {migration.name!r} is in phase {migration.control.phase.value}: a repair needs writes "
                    "to go to both stores. Run `crossfade status` for the way there"
                )
            reports = []
            chosen = chosen_entities(list(migration.entities.values()), entity)
            with stopping() as stop, bars(as_json) as bar:
                for one in chosen:
                    async with bulk_stores() as (source, target):
                        show = bar(one.name, 0)
                        made = Repair(
                            one, source, target, migration=migration.name, means=_ByProtocol(migration),
                            by=by or getpass.getuser(), apply=apply, drop_extra=extra == "delete",
                            lift_tombstoned=tombstoned == "lift",
                            on_progress=lambda done, total, show=show: show(done, f"of {total}"),  # type: ignore[misc]
                        )  # fmt: skip
                        reports.append(await made.run(stop=stop))
                    if stop.is_set():
                        break
        return _conclude(reports, len(chosen), report, as_json=as_json)

    run(work, as_json=as_json)


def _conclude(reports: list[Report], wanted: int, path: Path | None, *, as_json: bool) -> Exit:
    interrupted = len(reports) < wanted or any(one.state == "interrupted" for one in reports)
    found = any(one.found for one in reports)
    whole = {"command": "repair", "found": found, "entities": [one.to_json() for one in reports]}
    if path is not None:
        try:
            path.write_text(json.dumps(whole, indent=2, default=str) + "\n", encoding="utf-8")
        except OSError as cause:
            raise ConfigurationError(f"cannot write the report {path}: {cause.strerror}") from cause
    if as_json:
        print(as_json_text(whole))
    else:
        for one in reports:
            _show(one)
        if interrupted:
            problems.print("interrupted; the same command goes on", highlight=False)
    if interrupted:
        return Exit.INTERRUPTED
    return Exit.FOUND if found else Exit.DONE


def _show(report: Report) -> None:
    if report.state == "never verified":
        problems.print(f"{report.entity}: never verified; run `crossfade verify` first", highlight=False)
        return
    table = Table("outcome", "finding", "records", title=f"{report.entity}: {report.looked_at:,} findings")
    if report.equal:
        table.add_row("equal by now", "", f"{report.equal:,}")
    for name in ("to_do", "repaired", "kept", "left"):
        for finding, number in getattr(report, name).items():
            table.add_row(name.replace("_", " "), finding, f"{number:,}")
    console.print(table)
    for sample in report.samples[:20]:
        console.print(
            "  " + escape(f"{sample['id']}: {sample['finding']}, {sample['outcome'].replace('_', ' ')}"),
            highlight=False,
        )
    if report.to_do:
        console.print("nothing was changed; the same command with --apply does it")


def add_to(main: typer.Typer) -> None:
    """Put this command into the main one."""
    main.command()(repair)
