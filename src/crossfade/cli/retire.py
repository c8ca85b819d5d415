"""`crossfade validate-constraints` and `retire`: the way to a plain PostgreSQL application."""

from __future__ import annotations

import getpass
from dataclasses import asdict
from typing import Annotated

import typer

from crossfade.cli.context import AppOption, Exit, JsonOption, as_json_text, console, open_migration, run
from crossfade.errors import ConfigurationError
from crossfade.retire import retire as retire_mongo
from crossfade.retire import what_is_left


def add_to(app: typer.Typer) -> None:
    """Add these commands."""
    app.command("validate-constraints")(validate_constraints)
    app.command("retire")(retire)


def validate_constraints(app: AppOption = None, as_json: JsonOption = False) -> None:
    """Let PostgreSQL check old rows, too, against constraints that hold for new ones only. Reads and writes go on."""

    async def work() -> Exit:
        async with open_migration(app, begin=False, needs_both=False) as migration:
            pair = migration.pair
            done = await pair.postgres.validate(
                migration.entities.values(), timeout=pair.options.bulk_deadline
            )
        if as_json:
            print(as_json_text({"validated": done}))
        else:
            console.print("\n".join(done) or "every constraint is validated already", highlight=False)
        return Exit.DONE

    run(work, as_json=as_json)


def retire(
    name: Annotated[
        str | None, typer.Argument(metavar="MIGRATION", help="Its name, to be sure; --apply wants it.")
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Do it; else only say what is left.")] = False,
    max_rate: Annotated[int, typer.Option("--max-rate", min=1, help="Documents a second at most.")] = 5_000,
    app: AppOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make MongoDB an archive: no notes, indexes, tombstones or control record of Crossfade's. There is no way back.

    Without --apply nothing is changed. Exit status: 0 nothing is left, 1 something is, or it is refused.
    """

    async def work() -> Exit:
        async with open_migration(app, begin=False) as migration:
            if apply:
                if name != migration.name:
                    raise ConfigurationError(
                        f"there is no way back from this: name the migration, crossfade retire {migration.name} --apply"
                    )
                await retire_mongo(
                    migration, by=getpass.getuser(), rate=max_rate,
                    on_progress=lambda entity, number: None if as_json else _say(entity, number),
                )  # fmt: skip
            left = await what_is_left(migration)
        if as_json:
            print(as_json_text({**asdict(left), "retired": left.is_nothing}))
        elif left.is_nothing:
            console.print("MongoDB holds nothing of Crossfade's any more")
        else:
            for entity, number in left.documents.items():
                indexes = ", ".join(left.indexes[entity]) or "none"
                console.print(
                    f"{entity}: {number:,} documents with notes; indexes: {indexes}", highlight=False
                )
            for store, number in left.tombstones.items():
                console.print(f"tombstones in {store}: {number:,}", highlight=False)
            if not apply:
                console.print(f"nothing was changed; crossfade retire {migration.name} --apply removes it")
        return Exit.DONE if left.is_nothing else Exit.FOUND

    run(work, as_json=as_json)


def _say(entity: str, number: int) -> None:
    console.print(f"  {entity}: {number:,}", highlight=False)
