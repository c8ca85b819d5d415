"""`crossfade init`, `status`, `phase ...`, `history`."""

from __future__ import annotations

import getpass
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from crossfade import errors
from crossfade.cli.context import (
    AppOption,
    Exit,
    JsonOption,
    as_json_text,
    console,
    open_migration,
    run,
)
from crossfade.cli.switching import DryRunOption, ForceOption, LimitOption, ReasonOption, move, show_guard
from crossfade.guard import Statement, guard
from crossfade.migration import Migration
from crossfade.phase import Phase
from crossfade.shadow import mapping_of
from crossfade.switch import PAUSE_LIMIT, abort
from crossfade.transition import set_foreign_writers
from crossfade.workers import Registry

phase_app = typer.Typer(
    help="Where the migration stands, and moving it.", no_args_is_help=True, pretty_exceptions_enable=False
)


def add_to(app: typer.Typer) -> None:
    """Add these commands."""
    app.command("init")(init)
    app.command("status")(status)
    app.command("history")(history)
    app.add_typer(phase_app, name="phase")


def init(app: AppOption = None, as_json: JsonOption = False) -> None:
    """Create Crossfade's tables and indexes, and stamp normalised keys on old documents. Idempotent."""

    async def work() -> Exit:
        async with open_migration(app) as migration:
            prepared = await migration.prepare()
            colliding, no_room = _listed(prepared.colliding), _listed(prepared.no_room)
            if as_json:
                print(as_json_text({"migration": migration.name, "colliding": colliding, "no_room": no_room}))
            else:
                lacking = " but those below" if any(no_room.values()) else ""
                console.print(
                    f"Prepared {migration.name}: tables, indexes and normalised keys are there{lacking}."
                )
                _show_documents(colliding, "an older record has the same {rule}; kept, with a key of its own")
                _show_documents(
                    no_room,
                    "MongoDB holds 16 MiB a document, and this one has no room for its key of {rule}; kept, without "
                    "one, so others can take its name. Make it smaller in MongoDB, then: crossfade init",
                )
            return Exit.FOUND if any((*colliding.values(), *no_room.values())) else Exit.DONE

    run(work, as_json=as_json)


def _listed(found: dict[str, list[tuple[str, Any]]]) -> dict[str, list[list[str]]]:
    return {rule: [[entity, str(id_)] for entity, id_ in documents] for rule, documents in found.items()}


def _show_documents(found: dict[str, list[list[str]]], what: str) -> None:
    for rule, documents in found.items():
        for entity, id_ in documents:
            console.print(f"[yellow]{entity} {escape(id_)}[/]: {what.format(rule=rule)}", soft_wrap=True)


def status(app: AppOption = None, as_json: JsonOption = False) -> None:
    """Phase, debts, evidence, and what the next phase wants."""

    async def work() -> None:
        async with open_migration(app, begin=False, needs_both=False) as migration:
            found = await gather_status(migration)
            if as_json:
                print(as_json_text(found))
            else:
                _show_status(found)

    run(work, as_json=as_json)


async def gather_status(migration: Migration) -> dict[str, Any]:
    """What `crossfade status` shows, as plain values."""
    timeout = migration.pair.options.primary_deadline
    look = await migration.board.refresh()
    control = look.control
    next_phase = None if control.phase is Phase.POSTGRES_ONLY else list(Phase)[control.phase.number + 1]
    found: dict[str, Any] = {
        "migration": migration.name,
        "phase": control.phase.value,
        "number": control.phase.number,
        "state": control.state,
        "epoch": control.epoch,
        "since": control.since,
        "age_seconds": _seconds_since(control.since),
        "primary": control.phase.rules.primary,
        "reads": "postgres" if control.postgres_first else control.phase.rules.read,
        "strategy": migration.strategy.value,
        "foreign_writers": control.foreign_writers,
        "secondary_unreadable": control.unreadable is not None,
        "stores": {"mongo": look.mongo, "postgres": look.postgres},
        "debts": {
            "total": len(look.debts),
            "more": bool(look.overflown),
            "parked": sum(debt.parked is not None for debt in look.debts),
            "tentative": sum(bool(debt.tentative) for debt in look.debts),
        },
    }
    try:
        quarantined, conflicts = await migration.pair.postgres.counts(migration.entities, timeout=timeout)
        found |= {"quarantined": quarantined, "conflicts": conflicts}
        compared = await migration.pair.postgres.shadow.compared(
            migration.name, mapping_of(migration.entities.values()), control.phase_epoch, migration.entities,
            timeout=timeout,
        )  # fmt: skip
        found["shadow"] = {**asdict(compared), "comparisons": compared.comparisons}
        found["waiting_references"] = await migration.pair.postgres.waiting_references(
            migration.entities.values(), timeout=timeout
        )
        found["runs"] = await migration.pair.postgres.last_runs(
            migration.name, migration.entities, timeout=timeout
        )
    except errors.CrossfadeError as cause:
        found |= {
            "quarantined": None,
            "conflicts": None,
            "shadow": None,
            "waiting_references": {},
            "runs": [],
            "evidence_missing": str(cause),
        }
    found["workers"] = await _workers(migration)
    if next_phase is not None:
        try:
            statements = await guard(migration, next_phase)
        except errors.CrossfadeError as cause:
            statements = [Statement("evidence", False, str(cause), "start the store that is down")]
        found["next"] = {
            "phase": next_phase.value,
            "guard": [{"name": s.name, "holds": s.holds, "why": s.why, "mend": s.mend} for s in statements],
        }
    return found


def _seconds_since(moment: str) -> float | None:
    """By the clock of whoever wrote it; None: nobody did."""
    if not moment:
        return None
    return round((datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds(), 1)


async def _workers(migration: Migration) -> dict[str, int] | None:
    """How many there are, and how many have acknowledged the epoch; None: nobody can be asked."""
    registry = Registry(migration.name, migration.record.stores)
    for store in (migration.control.phase.rules.primary, migration.control.phase.rules.secondary):
        try:
            found = await registry.workers(store, timeout=migration.pair.options.primary_deadline)
        except errors.CrossfadeError:
            continue
        epoch = migration.control.epoch
        return {"known": len(found), "acknowledged": sum(worker.token[0] >= epoch for worker in found)}
    return None


def _show_status(found: dict[str, Any]) -> None:
    age = found["age_seconds"]
    since = "" if age is None else f" for {timedelta(seconds=round(age))}"
    console.print(
        f"[bold]{found['migration']}[/]  phase [bold]{found['number']} {found['phase']}[/]{since}"
        + (f"  [yellow]{found['state']}[/]" if found["state"] != "steady" else "")
    )
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    debts = found["debts"]
    table.add_row("primary", f"{found['primary']}, reads from {found['reads']}, strategy {found['strategy']}")
    table.add_row(
        "stores",
        ", ".join(f"{name} {'answers' if up else '[red]down[/]'}" for name, up in found["stores"].items()),
    )
    more = "+" if debts["more"] else ""
    table.add_row("in debt", f"{debts['total']}{more} ({debts['parked']} parked, {debts['tentative']} open)")
    if found["secondary_unreadable"]:
        table.add_row(
            "secondary", "[yellow]marked unreadable since a write failed; reads go to the primary[/]"
        )
    table.add_row(
        "quarantine",
        "[red]not known[/] while PostgreSQL is down"
        if found["quarantined"] is None
        else f"{found['quarantined']} records; {found['conflicts']} conflicts noted",
    )
    shadow = found["shadow"]
    if shadow is not None and (shadow["comparisons"] or shadow["open"] or found["reads"] == "shadow"):
        table.add_row(
            "shadow reads",
            f"{shadow['comparisons']:,} compared in this phase, {shadow['open']:,} mismatches open"
            f" ({shadow['unsettled']:,} came to no rest, {shadow['dropped']:,} dropped, {shadow['failed']:,} failed)",
        )
    for column, number in found["waiting_references"].items():
        table.add_row("references", f"{number} in {column} name a record that is not in PostgreSQL")
    table.add_row(
        "old application", "still writes (declared)" if found["foreign_writers"] else "none declared"
    )
    if found["workers"] is not None:
        table.add_row(
            "workers",
            f"{found['workers']['known']}, {found['workers']['acknowledged']} at epoch {found['epoch']}",
        )
    for last in found["runs"]:
        when = last["finished_at"] or last["started_at"]
        age = timedelta(seconds=round((datetime.now(UTC) - when).total_seconds()))
        counts = ", ".join(f"{k} {v}" for k, v in last["counts"].items() if isinstance(v, int) and v)
        table.add_row(f"last {last['kind']}", f"{last['entity']}: {last['state']}, {age} ago ({counts})")
    console.print(table)
    step = found.get("next")
    if step is None:
        console.print("This is the last phase.")
        return
    console.print(f"\nto enter [bold]{step['phase']}[/]:")
    show_guard([Statement(**statement) for statement in step["guard"]])
    lacking = [s["mend"] for s in step["guard"] if not s["holds"]]
    console.print(f"next: [bold]{lacking[0] if lacking else 'crossfade advance'}[/]")


def history(app: AppOption = None, as_json: JsonOption = False) -> None:
    """Who changed the phase, when and why."""

    async def work() -> None:
        async with open_migration(app, begin=False, needs_both=False, looks=False) as migration:
            rows = await migration.record.history(timeout=migration.pair.options.primary_deadline)
            if as_json:
                print(as_json_text(rows))
                return
            names = ("epoch", "phase", "state", "changed_at", "changed_by", "reason")
            table = Table(*names)
            for row in rows:
                table.add_row(*(str(row[name]) for name in names))
            console.print(table)

    run(work, as_json=as_json)


@phase_app.command("set")
def set_phase(
    phase: Annotated[str, typer.Argument(help="Name or number, 0 to 5.")],
    app: AppOption = None,
    reason: ReasonOption = "",
    force: ForceOption = None,
    dry_run: DryRunOption = False,
    pause_limit: LimitOption = PAUSE_LIMIT,
    as_json: JsonOption = False,
) -> None:
    """Move the migration one phase on, or back."""

    async def work() -> Exit:
        target = Phase.parse(phase)
        async with open_migration(app, needs_both=False) as migration:
            return await move(
                migration, target, "crossfade phase set", reason=reason, force=force, dry_run=dry_run,
                pause_limit=pause_limit, as_json=as_json,
            )  # fmt: skip

    run(work, as_json=as_json)


@phase_app.command("abort")
def abort_switch(app: AppOption = None) -> None:
    """Go back from a switch whose coordinator is gone."""

    async def work() -> Exit:
        async with open_migration(app, begin=False, needs_both=False) as migration:
            undone = await abort(migration, by=getpass.getuser())
            console.print("back at the old primary" if undone else "no switch is under way")
            return Exit.DONE if undone else Exit.FOUND

    run(work)


@phase_app.command("foreign-writers")
def foreign_writers(
    state: Annotated[str, typer.Argument(help="declared or stopped")],
    app: AppOption = None,
) -> None:
    """Say whether an old application still writes to MongoDB."""

    async def work() -> None:
        if state not in ("declared", "stopped"):
            raise errors.ConfigurationError(f"{state!r}: write declared or stopped")
        async with open_migration(app) as migration:
            await set_foreign_writers(migration, state == "declared", by=getpass.getuser())
            console.print(f"foreign writers: {state}")

    run(work)
