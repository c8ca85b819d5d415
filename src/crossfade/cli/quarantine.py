"""`crossfade quarantine`: documents that cannot be carried over unchanged, and what a person does about them."""

from __future__ import annotations

import getpass
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from crossfade.bulk import quarantine as entries
from crossfade.cli.bulk import chosen_entities
from crossfade.cli.context import (
    AppOption,
    Exit,
    JsonOption,
    as_json_text,
    console,
    find_application,
    open_migration,
    run,
)
from crossfade.cli.crew import bulk_stores, bulk_target
from crossfade.errors import ConfigurationError, NotAllowedInPhase
from crossfade.migration import Migration
from crossfade.record import Settled
from crossfade.values import digest_of_bytes, text_to_id

app = typer.Typer(help="Documents that cannot be carried over unchanged.", no_args_is_help=True)


@app.command("list")
def quarantine_list(
    entity: Annotated[str | None, typer.Option(help="Only of this entity.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Entries at most.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """List what is in quarantine, the newest first. Exit status 1 if there is anything."""

    async def work() -> Exit:
        async with bulk_target() as target:
            found = await entries.list_quarantine(target, entity, limit=limit)
        if as_json:
            print(as_json_text({"quarantine": found}))
        elif found:
            table = Table("entity", "id", "reason", "field", "bytes", "last seen", "waived by")
            for one in found:
                table.add_row(
                    *(
                        escape(str(one[name] if one[name] is not None else ""))
                        for name in ("entity", "id", "reason")
                    ),
                    escape(str(one["field"] or "")),
                    f"{one['bytes']:,}",
                    one["last_seen"].isoformat(timespec="seconds"),
                    escape(one["waived_by"] or ""),
                )
            console.print(table)
        else:
            console.print("nothing is in quarantine")
        return Exit.FOUND if found else Exit.DONE

    run(work, as_json=as_json)


@app.command("show")
def quarantine_show(
    entity: Annotated[str, typer.Argument(help="Name of the entity.")],
    id_text: Annotated[str, typer.Argument(metavar="ID", help="As `quarantine list` shows it.")],
    as_json: JsonOption = False,
) -> None:
    """Show one document as it was found."""

    async def work() -> Exit:
        async with bulk_target() as target:
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


IdArgument = Annotated[str, typer.Argument(metavar="ID", help="As `quarantine list` shows it.")]
EntityArgument = Annotated[str, typer.Argument(help="Name of the entity.")]
OneEntityOption = Annotated[str | None, typer.Option("--entity", help="Only of this entity.")]


@app.command("retry")
def quarantine_retry(
    entity: OneEntityOption = None, application: AppOption = None, as_json: JsonOption = False
) -> None:
    """Try each once more, as it is now and under the present mapping. Exit status 1 if some stay."""

    async def work() -> Exit:
        async with open_migration(application, begin=False) as migration:
            _assert_mongo_decides(migration)
            left, gone, stay = 0, 0, list[dict[str, str]]()
            async with bulk_target() as target:
                for one in chosen_entities(list(migration.entities.values()), entity and [entity]):
                    after = ""
                    while found := await target.quarantine_after(one.name, after, limit=entries.PORTION):
                        after = found[-1][0]
                        for text, about, _ in found:
                            became = await _retry(migration, one.name, text)
                            left += became is Settled.CONFIRMED
                            gone += became is Settled.GONE
                            if became not in (Settled.CONFIRMED, Settled.GONE):
                                stay.append({"entity": one.name, "id": text, "reason": about["reason"]})
        if as_json:
            print(as_json_text({"carried": left, "gone": gone, "stay": stay}))
        else:
            console.print(f"{left} carried, {gone} gone from MongoDB, {len(stay)} stay")
            for each in stay[:20]:
                console.print(
                    "  " + escape(f"{each['entity']} {each['id']}: {each['reason']}"), highlight=False
                )
        return Exit.FOUND if stay else Exit.DONE

    run(work, as_json=as_json)


async def _retry(migration: Migration, name: str, text: str) -> Settled:
    entity, pair = migration.entities[name], migration.pair
    try:
        id_ = text_to_id(text)
    except ValueError:
        return Settled.PARKED  # its id cannot be told: a backfill finds it again by its bytes
    timeout = pair.options.primary_deadline
    if await pair.mongo.read_raw(entity, id_, timeout=timeout) is None:
        await pair.postgres.release(entity, [id_], timeout=timeout)
        return Settled.GONE
    became = await migration.settler.settle_one(entity, id_, migration.control)
    if became is Settled.CONFIRMED:
        await pair.postgres.release(entity, [id_], timeout=timeout)
    return became


def _assert_mongo_decides(migration: Migration) -> None:
    rules = migration.control.phase.rules
    if not rules.dual or rules.primary != "mongo":
        raise NotAllowedInPhase(
            f"migration {migration.name!r} is in phase {migration.control.phase.value}: documents leave quarantine "
            "while MongoDB decides and writes go to both stores (dual_write to postgres_read)"
        )


@app.command("waive")
def quarantine_waive(
    entity: EntityArgument,
    id_text: IdArgument,
    reason: Annotated[str, typer.Option("--reason", help="Why it need not be carried.")],
    by: Annotated[
        str | None, typer.Option("--by", help="Who says so.", show_default="the login name")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Accept by name that this document, as it is now, will not be carried; the switch no longer waits for it."""
    _waive(entity, id_text, by or getpass.getuser(), reason, as_json=as_json)


@app.command("unwaive")
def quarantine_unwaive(entity: EntityArgument, id_text: IdArgument, as_json: JsonOption = False) -> None:
    """Take that back."""
    _waive(entity, id_text, None, None, as_json=as_json)


def _waive(entity: str, text: str, by: str | None, reason: str | None, *, as_json: bool) -> None:
    async def work() -> Exit:
        async with bulk_target() as target:
            if not await target.quarantine_waive(entity, text, by, reason):
                raise ConfigurationError(f"no document {text!r} of {entity!r} is in quarantine")
        if as_json:
            print(as_json_text({"entity": entity, "id": text, "waived_by": by, "waived_reason": reason}))
        return Exit.DONE

    run(work, as_json=as_json)


@app.command("export")
def quarantine_export(
    file: Annotated[Path, typer.Argument(help="Where to; one document a line.", dir_okay=False)],
    entity: OneEntityOption = None,
    waived: Annotated[bool, typer.Option("--waived", help="Also those that were waived.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    application: AppOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the documents as Extended JSON, for a person to mend, and for `quarantine import`."""

    async def work() -> Exit:
        if file.exists() and not force:
            raise ConfigurationError(f"{file} is there already; --force replaces it")
        _, entities = find_application(application)
        number, unfinished = 0, file.with_name(f".{file.name}.{os.getpid()}")
        try:
            async with bulk_stores() as (source, target):
                with unfinished.open("w", encoding="utf-8") as lines:
                    for one in chosen_entities(entities, entity and [entity]):
                        async for line in entries.export_quarantine(source, target, one, waived=waived):
                            lines.write(line + "\n")
                            number += 1
            unfinished.replace(file)
        except OSError as cause:
            raise ConfigurationError(f"cannot write {file}: {cause.strerror}") from cause
        finally:
            unfinished.unlink(missing_ok=True)
        if as_json:
            print(as_json_text({"exported": number, "file": str(file)}))
        else:
            console.print(f"{number} documents written to {file}")
        return Exit.DONE

    run(work, as_json=as_json)


@app.command("import")
def quarantine_import(
    file: Annotated[Path, typer.Argument(help="An export, mended.", exists=True, dir_okay=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be taken.")] = False,
    application: AppOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put mended documents into MongoDB, and carry them. Exit status 1 if some are refused.

    One that was changed in MongoDB since its export is refused. Every line is checked before the first is written.
    """

    async def work() -> Exit:
        async with open_migration(application, begin=False) as migration:
            _assert_mongo_decides(migration)
            with file.open(encoding="utf-8") as lines:
                mended, wrong = entries.read_mended(lines, dict(migration.entities))
            taken, unchanged = 0, 0
            for one in mended:
                became = await _take(migration, one, dry_run=dry_run)
                taken += became == "taken"
                unchanged += became == "unchanged"
                if became not in ("taken", "unchanged"):
                    wrong.append(f"line {one.number}: {one.text} {became}")
        if as_json:
            print(
                as_json_text({"taken": taken, "unchanged": unchanged, "refused": wrong, "dry_run": dry_run})
            )
        else:
            console.print(
                f"{taken} {'would be ' if dry_run else ''}taken, {unchanged} unchanged, {len(wrong)} refused"
            )
            for line in wrong:
                console.print("  " + escape(line), highlight=False)
        return Exit.FOUND if wrong else Exit.DONE

    run(work, as_json=as_json)


async def _take(migration: Migration, one: entries.Mended, *, dry_run: bool) -> str:
    pair, timeout = migration.pair, migration.pair.options.primary_deadline
    raw = await pair.mongo.read_raw(one.entity, one.id, timeout=timeout)
    if raw is None or digest_of_bytes(raw).hex() != one.seen:
        return "was changed since its export, or is gone; export it again"
    document: dict[str, Any] | None = entries.with_notes(raw, one.document)
    if document is None:
        return "unchanged"
    if dry_run:
        return "taken"
    if not await pair.mongo.deliver(one.entity, raw, document, timeout=timeout):
        return "was changed just now; export it again"
    became = await _retry(migration, one.entity.name, one.text)
    return (
        "taken"
        if became is Settled.CONFIRMED
        else "was put into MongoDB; PostgreSQL does not take it yet, see `crossfade debts`"
    )
