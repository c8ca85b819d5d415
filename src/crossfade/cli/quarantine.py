"""`crossfade quarantine`: documents that cannot be carried over unchanged, and what a person does about them."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from crossfade.bulk import quarantine as entries
from crossfade.cli.context import Exit, JsonOption, as_json_text, console, run
from crossfade.cli.crew import bulk_target
from crossfade.errors import ConfigurationError

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
