"""`crossfade advance`, `back`, `switch`, `workers`, `strategy`: moving a migration, and who follows."""

from __future__ import annotations

import getpass
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.table import Table

from crossfade import errors
from crossfade.cli.context import AppOption, Exit, JsonOption, as_json_text, console, open_migration, run
from crossfade.control import Control, Seen
from crossfade.guard import Statement, guard
from crossfade.migration import Migration
from crossfade.phase import Phase
from crossfade.strategy import FailureStrategy
from crossfade.switch import PAUSE_LIMIT, Changed, abort, assert_is_next, resolve, resume
from crossfade.transition import change_phase, next_phase, phase_before, set_strategy
from crossfade.workers import Registry

ReasonOption = Annotated[str, typer.Option("--reason", help="Kept in the history.")]
ForceOption = Annotated[
    list[str] | None, typer.Option("--force", help="Go although this guard does not hold; recorded.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what stands in the way.")]
LimitOption = Annotated[
    float,
    typer.Option("--pause-limit", min=0.1, help="Seconds for which a switch of the primary may hold writes."),
]


def add_to(app: typer.Typer) -> None:
    """Add these commands."""
    app.command("advance")(advance)
    app.command("back")(back)
    app.command("switch")(switch)
    app.command("workers")(workers)
    app.command("strategy")(strategy)


def advance(
    app: AppOption = None,
    reason: ReasonOption = "",
    force: ForceOption = None,
    dry_run: DryRunOption = False,
    pause_limit: LimitOption = PAUSE_LIMIT,
    as_json: JsonOption = False,
) -> None:
    """One phase on, if its guard holds."""
    _step_by(next_phase, "crossfade advance", app, reason, force, dry_run, pause_limit, as_json)


def back(
    app: AppOption = None,
    reason: ReasonOption = "",
    force: ForceOption = None,
    dry_run: DryRunOption = False,
    pause_limit: LimitOption = PAUSE_LIMIT,
    as_json: JsonOption = False,
) -> None:
    """One phase back."""
    _step_by(phase_before, "crossfade back", app, reason, force, dry_run, pause_limit, as_json)


def _step_by(
    choose: Callable[[Phase], Phase],
    command: str,
    app: str | None,
    reason: str,
    force: list[str] | None,
    dry_run: bool,
    pause_limit: float,
    as_json: bool,
) -> None:
    async def work() -> Exit:
        async with open_migration(app, needs_both=False) as migration:
            target = choose(migration.phase)
            return await move(
                migration, target, command, reason=reason, force=force, dry_run=dry_run,
                pause_limit=pause_limit, as_json=as_json,
            )  # fmt: skip

    run(work, as_json=as_json)


async def move(
    migration: Migration,
    target: Phase,
    command: str,
    *,
    reason: str,
    force: list[str] | None,
    dry_run: bool,
    pause_limit: float,
    as_json: bool,
) -> Exit:
    """Change the phase, and say what came of it; ``dry_run``: say what would be in the way."""
    if dry_run:
        assert_is_next((await migration.board.refresh()).control, target)
        statements = await guard(migration, target)
        if as_json:
            print(
                as_json_text(
                    [{"name": s.name, "holds": s.holds, "why": s.why, "mend": s.mend} for s in statements]
                )
            )
        else:
            console.print(f"to enter [bold]{target.value}[/]:")
            show_guard(statements)
        return Exit.DONE if all(s.holds for s in statements) else Exit.FOUND
    done = await change_phase(
        migration, target, by=getpass.getuser(), reason=reason or command, force=tuple(force or ()),
        limit=pause_limit, on_step=progress(as_json=as_json),
    )  # fmt: skip
    show_change(done, as_json=as_json)
    return Exit.DONE


def show_guard(statements: list[Statement]) -> None:
    """Each statement: holds or not, why, and the command that mends it."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for statement in statements:
        mark = "[green]holds[/]" if statement.holds else "[red]does not hold[/]"
        table.add_row(statement.name, mark, statement.why, statement.mend)
    console.print(table)


def progress(*, as_json: bool) -> Callable[[str], None]:
    """Say each step when it begins, with the milliseconds since the first."""
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(f"  {(time.monotonic() - began) * 1000:6.0f} ms  {text}", highlight=False)

    return (lambda _: None) if as_json else say


def show_change(done: Changed, *, as_json: bool) -> None:
    """What a change of phase did."""
    pause = done.pause
    found: dict[str, Any] = {
        "from": done.before.phase.value, "phase": done.after.phase.value, "epoch": done.after.epoch,
        "forced": done.forced, "adopted": done.adopted, "drained": done.drained, "compared": done.compared,
        "silent": done.silent, "pause_seconds": round(pause.whole, 4),
        "held": {
            "writes": pause.writes, "failed": pause.failed, "p50_seconds": round(pause.p50, 4),
            "p99_seconds": round(pause.p99, 4), "max_seconds": round(pause.longest, 4),
        },
    }  # fmt: skip
    if as_json:
        print(as_json_text(found))
        return
    console.print(f"[green]phase {found['phase']}[/], epoch {found['epoch']}")
    if done.before.phase.rules.primary != done.after.phase.rules.primary:
        console.print(
            f"{done.after.phase.rules.primary} is primary. Writes were held for {pause.whole * 1000:.0f} ms: "
            f"{pause.writes} waited, p50 {pause.p50 * 1000:.0f} ms, p99 {pause.p99 * 1000:.0f} ms, at most "
            f"{pause.longest * 1000:.0f} ms; {pause.failed} failed. {done.drained} debts drained, "
            f"{done.compared} records compared, {done.adopted} made equal before",
            highlight=False,
        )
    if done.silent:
        console.print(f"[yellow]fenced by their lease, not heard of: {', '.join(done.silent)}[/]")


def switch(
    app: AppOption = None,
    go_back: Annotated[
        bool, typer.Option("--abort", help="Go back from a switch that is under way.")
    ] = False,
    go_on: Annotated[
        bool, typer.Option("--resume", help="Finish a switch whose coordinator is gone.")
    ] = False,
    decide: Annotated[
        bool,
        typer.Option(
            "--resolve", help="The old primary's store is lost in the middle of a switch: a person decides."
        ),
    ] = False,
    primary: Annotated[
        str | None, typer.Option("--primary", help="With --resolve: mongo or postgres; else it is asked.")
    ] = None,
    reason: ReasonOption = "",
    force: ForceOption = None,
    dry_run: DryRunOption = False,
    pause_limit: LimitOption = PAUSE_LIMIT,
    as_json: JsonOption = False,
) -> None:
    """Make the other store the primary: from phase 3 to 4, or back."""

    async def work() -> Exit:
        if sum((go_back, go_on, decide, dry_run)) > 1:
            raise errors.ConfigurationError("--abort, --resume, --resolve and --dry-run exclude each other")
        if primary is not None and not decide:
            raise errors.ConfigurationError(
                "--primary is for --resolve; without it the other store becomes the primary, whichever that is"
            )
        async with open_migration(app, begin=False, needs_both=False, looks=not decide) as migration:
            if decide:
                return await _resolve(migration, primary, as_json=as_json)
            if go_back:
                return await _abort(migration, as_json=as_json)
            if go_on:
                done = await resume(migration, by=getpass.getuser(), on_step=progress(as_json=as_json))
                show_change(done, as_json=as_json)
                return Exit.DONE
            return await move(
                migration, _other_side(migration.phase), "crossfade switch", reason=reason, force=force,
                dry_run=dry_run, pause_limit=pause_limit, as_json=as_json,
            )  # fmt: skip

    run(work, as_json=as_json)


def _other_side(here: Phase) -> Phase:
    sides = {Phase.POSTGRES_READ: Phase.POSTGRES_PRIMARY, Phase.POSTGRES_PRIMARY: Phase.POSTGRES_READ}
    if here not in sides:
        raise errors.NotAllowedInPhase(
            f"the primary is switched between postgres_read and postgres_primary; the migration is in {here.value}: "
            "`crossfade advance` goes on"
        )
    return sides[here]


async def _abort(migration: Migration, *, as_json: bool) -> Exit:
    undone = await abort(migration, by=getpass.getuser())
    if as_json:
        print(as_json_text({"aborted": undone, "primary": migration.primary}))
    else:
        console.print(f"back at {migration.primary}" if undone else "no switch is under way")
    return Exit.DONE if undone else Exit.FOUND


async def _resolve(migration: Migration, primary: str | None, *, as_json: bool) -> Exit:
    seen = await migration.record.look(timeout=migration.pair.options.primary_deadline)
    if not as_json:
        _show_copies(seen)
    if primary is None and not as_json:
        primary = typer.prompt("Which store is primary from now on: mongo or postgres")
    if primary not in ("mongo", "postgres"):
        raise errors.ConfigurationError(f"--primary {primary}: write mongo or postgres")
    control = await resolve(migration, by=getpass.getuser(), primary=primary)
    if as_json:
        print(as_json_text({"phase": control.phase.value, "primary": primary, "epoch": control.epoch}))
    else:
        console.print(f"[green]phase {control.phase.value}[/]: {primary} is primary, epoch {control.epoch}")
    return Exit.DONE


def _show_copies(seen: Seen) -> None:
    table = Table("", "mongo", "postgres")
    names = (
        "version",
        "epoch",
        "phase",
        "state",
        "target",
        "coordinator",
        "changed_at",
        "changed_by",
        "reason",
    )

    def told(store: str, name: str) -> str:
        copy: Control | None = seen.copies.get(store)
        if not seen.answered(store):
            return "does not answer" if name == "version" else ""
        return "no record" if copy is None else str(getattr(copy, name) or "")

    for name in names:
        table.add_row(name, told("mongo", name), told("postgres", name))
    console.print(table)


def workers(app: AppOption = None, as_json: JsonOption = False) -> None:
    """Every process that may acknowledge writes, and which epoch it has acknowledged."""

    async def work() -> Exit:
        async with open_migration(app, begin=False, needs_both=False, looks=False) as migration:
            timeout = migration.pair.options.primary_deadline
            seen = await migration.record.look(timeout=timeout)
            control = seen.control
            assert control is not None
            rules = control.phase.rules
            store = rules.primary if seen.decisive else rules.secondary
            registry = Registry(migration.name, migration.record.stores)
            found = await registry.workers(store, timeout=timeout)
            silent = await registry.silent_for(store, timeout=timeout)
            late = [worker for worker in found if worker.token[0] < control.epoch]
            if as_json:
                told = [
                    {
                        "worker": worker.name, "epoch": worker.token[0], "acknowledged": worker not in late,
                        "silent_seconds": round(silent.get(worker.id, 0.0), 1),
                    }
                    for worker in found
                ]  # fmt: skip
                print(as_json_text({"epoch": control.epoch, "store": store, "workers": told}))
            else:
                table = Table("worker", "epoch", "last sign")
                for worker in sorted(found, key=lambda worker: worker.name):
                    mark = "" if worker not in late else f" [yellow](the epoch is {control.epoch})[/]"
                    table.add_row(
                        worker.name, f"{worker.token[0]}{mark}", f"{silent.get(worker.id, 0.0):.1f} s ago"
                    )
                console.print(table)
            return Exit.FOUND if late else Exit.DONE

    run(work, as_json=as_json)


def strategy(
    name: Annotated[
        str, typer.Argument(help="prioritize_mongo, rollback_both, prioritize_postgres, or default.")
    ],
    app: AppOption = None,
    as_json: JsonOption = False,
) -> None:
    """What becomes of a write, from now on, when one store fails: of writes that ask for no strategy themselves."""

    async def work() -> None:
        known = [each.value for each in FailureStrategy]
        if name not in (*known, "default"):
            raise errors.ConfigurationError(f"{name!r}: write {', '.join(known)} or default")
        async with open_migration(app, begin=False) as migration:
            chosen = None if name == "default" else FailureStrategy(name)
            await set_strategy(migration, chosen, by=getpass.getuser())
            if as_json:
                print(as_json_text({"strategy": migration.strategy.value}))
            else:
                console.print(f"strategy: {migration.strategy.value}")

    run(work, as_json=as_json)
