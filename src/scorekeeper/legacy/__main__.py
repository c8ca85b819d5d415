"""The command: `python -m scorekeeper.legacy --users 20000 --seed 1`."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import typer
from pymongo import MongoClient
from pymongo.database import Database
from pymongo.errors import ConfigurationError, InvalidURI, PyMongoError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from scorekeeper.legacy.generation import LegacySummary, TargetNotEmpty, drop_collections, generate
from scorekeeper.legacy.rates import DEFAULT_RATES, DirtRates

# A server that is there answers within this; a person should not wait longer to hear that none is.
_PATIENCE_MS = 5_000

_errors = Console(stderr=True, soft_wrap=True, highlight=False)


class _Bars:
    """One progress bar per collection, with rate and time left, on standard error."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, collection: str, done: int, total: int) -> None:
        if collection not in self._tasks:
            self._tasks[collection] = self._progress.add_task(collection, total=total, rate="")
        task = self._tasks[collection]
        self._progress.update(task, completed=done, total=total)
        elapsed = self._progress.tasks[task].elapsed or 0
        self._progress.update(task, rate=f"{done / elapsed:,.0f}/s" if elapsed > 0.05 else "")


def _open(uri: str, name: str | None) -> Database[Any]:
    client: MongoClient[Any] = MongoClient(uri, serverSelectionTimeoutMS=_PATIENCE_MS, tz_aware=True)
    return client[name] if name else client.get_default_database("scorekeeper")


def _fail(message: str) -> typer.Exit:
    _errors.print(message, style="red", markup=False)
    return typer.Exit(1)


def _address(database: Database[Any]) -> str:
    # Hosts only: the URI may hold a password.
    nodes = database.client.topology_description.server_descriptions()
    return ", ".join(f"{host}:{port}" for host, port in nodes) or "the address given"


def _tell(summary: LegacySummary) -> None:
    table = Table("collection", "documents", "dirt", title="Legacy database")
    for collection, count in summary.counts.items():
        dirt = ", ".join(f"{kind} {n:,}" for kind, n in summary.dirt[collection].items())
        table.add_row(collection, f"{count:,}", dirt)
    console = Console()
    console.print(table)
    for refusal in summary.refused:
        kinds = ", ".join(refusal.kinds) or "an index"
        console.print(
            f"refused: {refusal.collection} {refusal.what} ({kinds}): {refusal.cause}", markup=False
        )
    for login in summary.logins[:3]:
        console.print(f"can log in: {login.username}  {login.password}", markup=False)


def main(
    users: Annotated[
        int, typer.Option(min=1, help="Users; other collections follow in proportion.")
    ] = 20_000,
    seed: Annotated[int, typer.Option(help="The same seed writes the same documents.")] = 1,
    dirt: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="One rate for every kind of dirt, 0 to 1; 0 is a clean database."),
    ] = None,
    database: Annotated[
        str | None, typer.Option(help="Database; else the one that MONGO_URI names, else scorekeeper.")
    ] = None,
    drop: Annotated[
        bool, typer.Option("--drop", help="Drop the collections first if they hold documents.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Fill a MongoDB database (MONGO_URI) with what a legacy deployment holds, dirt included."""
    uri = os.environ.get("MONGO_URI", "").strip()
    if not uri:
        raise _fail("MONGO_URI is not set. Write MONGO_URI=mongodb://HOST:27017/DATABASE.")
    rates = DEFAULT_RATES if dirt is None else DirtRates.all(dirt) if dirt else DirtRates.none()
    try:
        target = _open(uri, database)
    except (InvalidURI, ConfigurationError, ValueError) as error:
        raise _fail(f"MONGO_URI cannot be used: {error}") from None
    with target.client:
        try:
            target.client.admin.command("ping")
        except PyMongoError as error:
            cause = str(error).split(",")[0].split(" (configured")[0]
            raise _fail(
                f"cannot reach MongoDB at {_address(target)} ({cause}). Is it running? MONGO_URI sets the address."
            ) from None
        summary = _run(target, users=users, seed=seed, rates=rates, drop=drop)
    if as_json:
        typer.echo(json.dumps(summary.as_dict()))
    else:
        _tell(summary)


def _run(target: Database[Any], *, users: int, seed: int, rates: DirtRates, drop: bool) -> LegacySummary:
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:>10}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    try:
        if drop:
            drop_collections(target)
        with Progress(*columns, console=_errors) as progress:
            return generate(target, seed=seed, users=users, rates=rates, on_progress=_Bars(progress))
    except TargetNotEmpty as error:
        raise _fail(f"{error} (--drop does it.)") from None
    except PyMongoError as error:
        raise _fail(
            f"MongoDB at {_address(target)} failed while {target.name} was being filled: {error}"
        ) from None


if __name__ == "__main__":
    typer.run(main)
