"""`crossfade mismatches`: records that a shadow read found to differ, and what a person does about them."""

from __future__ import annotations

import getpass
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from crossfade.cli.context import AppOption, Exit, JsonOption, as_json_text, console, open_migration, run
from crossfade.errors import ConfigurationError
from crossfade.migration import Migration
from crossfade.shadow import Cause, Verdict
from crossfade.stores.shadow_notes import Mismatch
from crossfade.values import text_to_id

app = typer.Typer(help="Records that reads found to differ between the stores.", no_args_is_help=True)

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="As `mismatches list` shows it.")]
EntityArgument = Annotated[str, typer.Argument(help="Name of the entity.")]
#: Looked at again by one `resolve`; what is more is for the next one.
_MOST = 10_000


@app.command("list")
def mismatches_list(
    every: Annotated[bool, typer.Option("--all", help="Those that are resolved, too.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Entries at most.")] = 100,
    application: AppOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the records that differed, the latest first. Exit status 1 if any is open."""

    async def work() -> Exit:
        async with open_migration(application, begin=False, needs_both=False) as migration:
            found = await migration.pair.postgres.shadow.mismatches(
                migration.entities, limit=limit, resolved=every, timeout=_timeout(migration)
            )
        if as_json:
            print(as_json_text({"mismatches": [asdict(one) for one in found]}))
        elif found:
            table = Table(
                "entity", "id", "cause", "fields", "read", "seen", "first seen", "last seen", "resolved"
            )
            for one in found:
                dates = (one.first_seen, one.last_seen)
                table.add_row(
                    escape(one.entity), escape(one.id), one.cause, escape(", ".join(one.fields)), escape(one.question),
                    f"{one.seen:,}", *("" if d is None else d.isoformat(timespec="seconds") for d in dates),
                    escape(one.resolved_why or ""),
                )  # fmt: skip
            console.print(table)
        else:
            console.print("no mismatch is open" if not every else "there has been no mismatch")
        return Exit.FOUND if any(one.resolved_at is None for one in found) else Exit.DONE

    run(work, as_json=as_json)


@app.command("show")
def mismatches_show(
    entity: EntityArgument, id_text: IdArgument, application: AppOption = None, as_json: JsonOption = False
) -> None:
    """Show one, and how the record is in both stores now. Exit status 1 if it still differs."""

    async def work() -> Exit:
        async with open_migration(application, begin=False) as migration:
            one = await _known(migration, entity, id_text)
            now = await _look(migration, one)
        if as_json:
            print(as_json_text({**asdict(one), "now": None if now is None else asdict(now)}))
        else:
            for name, value in asdict(one).items():
                if value not in (None, ()):
                    console.print(f"{name.replace('_', ' ')}: {escape(str(value))}", highlight=False)
            console.print(f"[bold]now: {_said(now)}[/]", highlight=False)
        return Exit.DONE if now is not None and now.cause is None and now.at_rest else Exit.FOUND

    run(work, as_json=as_json)


@app.command("resolve")
def mismatches_resolve(
    entity: Annotated[
        str | None, typer.Argument(help="Name of the entity; without it, all that are open.")
    ] = None,
    id_text: Annotated[
        str | None, typer.Argument(metavar="ID", help="As `mismatches list` shows it.")
    ] = None,
    accept: Annotated[
        str | None,
        typer.Option(
            "--accept", metavar="WHY", help="Close this one whatever it is now, and keep the reason."
        ),
    ] = None,
    application: AppOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look at each again in both stores, and close those that are mended. Exit status 1 if some stay open."""

    async def work() -> Exit:
        if (entity is None) != (id_text is None) or (accept is not None and entity is None):
            raise ConfigurationError("name both the entity and the id, or neither; --accept wants them")
        async with open_migration(application, begin=False) as migration:
            notes, timeout = migration.pair.postgres.shadow, _timeout(migration)
            if entity is not None and id_text is not None:
                asked = [await _known(migration, entity, id_text)]
            else:
                asked = await notes.mismatches(migration.entities, limit=_MOST, timeout=timeout)
            closed, stay = 0, list[dict[str, Any]]()
            for one in asked:
                now = None if accept is not None else await _look(migration, one)
                mended = now is not None and now.at_rest and now.cause is None
                why = accept if accept is not None else "the same in both stores"
                if (mended or accept is not None) and await notes.resolve(
                    one, by=getpass.getuser(), why=why, timeout=timeout
                ):
                    closed += 1
                else:
                    stay.append({"entity": one.entity, "id": one.id, "now": _said(now)})
        if as_json:
            print(as_json_text({"resolved": closed, "open": stay}))
        else:
            console.print(f"{closed} resolved, {len(stay)} stay open")
            for each in stay[:20]:
                console.print("  " + escape(f"{each['entity']} {each['id']}: {each['now']}"), highlight=False)
        return Exit.FOUND if stay else Exit.DONE

    run(work, as_json=as_json)


async def _known(migration: Migration, entity: str, text: str) -> Mismatch:
    found = None
    if entity in migration.entities:
        found = await migration.pair.postgres.shadow.mismatch(entity, text, timeout=_timeout(migration))
    if found is None:
        raise ConfigurationError(
            f"no mismatch of {entity!r} {text!r} is known; see `crossfade mismatches list`"
        )
    return found


async def _look(migration: Migration, one: Mismatch) -> Verdict | None:
    """The record as it is now; None where it is not the record that differs, or its id cannot be told."""
    if one.cause in (Cause.COUNTED_OTHERWISE, Cause.FOUND_OTHERWISE):
        return None
    try:
        id_ = text_to_id(one.id)
    except ValueError:
        return None
    return await migration.shadow.look_at(migration.entities[one.entity], id_)


def _said(now: Verdict | None) -> str:
    if now is None:
        return "cannot be looked at again by itself: read on, or close it with --accept WHY"
    if not now.at_rest:
        return "in debt, in quarantine, or just written: look again later"
    if now.cause is None:
        return "the same in both stores"
    return f"{now.cause.value} {', '.join(now.fields)}".rstrip()


def _timeout(migration: Migration) -> float:
    return migration.pair.options.primary_deadline
