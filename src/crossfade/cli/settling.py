"""`crossfade reconcile`, `debts`, `conflicts`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Annotated

import bson
import typer
from bson.json_util import CANONICAL_JSON_OPTIONS, dumps
from rich.table import Table

from crossfade.board import end
from crossfade.cli.bars import Show, bars
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
from crossfade.cli.crew import give_way
from crossfade.reconcile import Reconciler

#: Seconds.
_SHOWN_EVERY = 0.2

LimitOption = Annotated[int, typer.Option("--limit", min=1, help="At most this many.")]


def add_to(app: typer.Typer) -> None:
    """Add these commands."""
    app.command("reconcile")(reconcile)
    app.command("debts")(debts)
    app.command("conflicts")(conflicts)


def reconcile(
    app: AppOption = None,
    full: Annotated[
        bool, typer.Option("--full", help="First adopt every foreign write, by a pass over all documents.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Settle every debt; parked ones are tried once more."""

    async def work() -> Exit:
        give_way()
        async with open_migration(app, begin=False) as migration:
            reconciler = migration.reconciler
            adopted = 0
            if full:
                with nullcontext() if as_json else problems.status("looking for foreign writes"):
                    adopted = await reconciler.full_sweep()
            with bars(as_json) as bar:
                async with _shown(reconciler, bar("debts", await reconciler.owed())):
                    done = await reconciler.reconcile()
            if migration.control.dual:
                await reconciler.link()
            if as_json:
                print(as_json_text({
                    "settled": done.settled, "parked": done.parked, "open": done.open, "failed": done.failed,
                    "adopted": adopted, "cause": done.cause,
                }))  # fmt: skip
            else:
                console.print(
                    f"settled {done.settled}, adopted {adopted}, parked {done.parked}, open {done.open}, "
                    f"failed {done.failed}" + (f": {done.cause}" if done.cause else "")
                )
            if done.failed:
                return Exit.UNREACHABLE
            return Exit.FOUND if done.parked or done.open else Exit.DONE

    run(work, as_json=as_json)


@asynccontextmanager
async def _shown(reconciler: Reconciler, show: Show) -> AsyncIterator[None]:
    """Show how many debts are settled while the block runs."""

    async def look() -> None:
        while True:
            show(reconciler.settled, "")
            await asyncio.sleep(_SHOWN_EVERY)

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        await end(looking)
        show(reconciler.settled, "")


def debts(app: AppOption = None, limit: LimitOption = 50, as_json: JsonOption = False) -> None:
    """What the secondary is owed, and why it refuses what is parked."""

    async def work() -> Exit:
        async with open_migration(app, begin=False, needs_both=False) as migration:
            look = await migration.board.refresh()
            # A board shows only so many.
            total = await migration.reconciler.owed() if look.overflown else len(look.debts)
            rows = [
                {
                    "entity": debt.entity,
                    "id": str(debt.id),
                    "rev": debt.rev,
                    "kind": "tombstone" if getattr(debt, "tombstone", False) else "image",
                    "open": bool(debt.tentative),
                    "parts": list(debt.parts),
                    "parked": debt.parked,
                }
                for debt in look.debts[:limit]
            ]
            if as_json:
                print(as_json_text({"total": total, "debts": rows}))
            else:
                table = Table("entity", "id", "rev", "kind", "parked because")
                for row in rows:
                    table.add_row(
                        *(str(row[n]) for n in ("entity", "id", "rev", "kind")), str(row["parked"] or "")
                    )
                console.print(table)
                console.print(f"{total} in all")
            return Exit.FOUND if look.debts else Exit.DONE

    run(work, as_json=as_json)


def conflicts(app: AppOption = None, limit: LimitOption = 50, as_json: JsonOption = False) -> None:
    """Content that lost against the primary, kept whole for a person."""

    async def work() -> Exit:
        async with open_migration(app, begin=False) as migration:
            rows = await migration.pair.postgres.conflicts(
                migration.entities, limit=limit, timeout=migration.pair.options.primary_deadline
            )
            names = ("number", "entity", "id", "cause", "store", "rev", "document", "seen_at")
            found = []
            for row in rows:
                one = dict(zip(names, row, strict=True))
                try:
                    text = dumps(bson.decode(bytes(row[6])), json_options=CANONICAL_JSON_OPTIONS)
                except bson.errors.BSONError:
                    text = bytes(row[6]).hex()
                found.append({**one, "document": text})
            if as_json:
                print(as_json_text(found))
            else:
                table = Table("number", "entity", "id", "cause", "store", "seen at", "document")
                for one in found:
                    table.add_row(
                        *(str(one[n]) for n in ("number", "entity", "id", "cause", "store", "seen_at")),
                        str(one["document"])[:80],
                    )
                console.print(table)
            return Exit.FOUND if found else Exit.DONE

    run(work, as_json=as_json)
