"""What every command shares: finding the application's entities, opening the stores, exit statuses.

Exit statuses: 0 done, 1 found something, 2 wrong use, 3 a store cannot be reached, 130 interrupted, resumable.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import tomllib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from dotenv import dotenv_values
from rich.console import Console
from rich.markup import escape

from crossfade import errors
from crossfade.board import Options
from crossfade.entity import Entity
from crossfade.migration import Crossfade, Migration
from crossfade.stores.errors import Fenced

console = Console()
problems = Console(stderr=True)
#: Seconds that a command waits for a store before it calls it unreachable.
_PATIENCE = 3.0


class Exit(IntEnum):
    """Exit statuses of every command."""

    DONE = 0
    FOUND = 1
    WRONG_USE = 2
    UNREACHABLE = 3
    INTERRUPTED = 130


class EndedElsewhere(errors.CrossfadeError):
    """Another process of this command ended with an error: what it said, and the exit status of that."""

    def __init__(self, message: str, status: Exit) -> None:
        super().__init__(message)
        self.status = status


def status_of(cause: errors.CrossfadeError) -> Exit:
    """The exit status of a command that ends with this error."""
    match cause:
        case EndedElsewhere():
            return cause.status
        case errors.StoreUnavailable() | errors.OutcomeUnknown():
            return Exit.UNREACHABLE
        case errors.NotAllowedInPhase() | errors.Busy() | Fenced():
            return Exit.FOUND
        case _:
            return Exit.WRONG_USE


AppOption = Annotated[
    str | None,
    typer.Option(
        "--app",
        envvar="CROSSFADE_APP",
        help="Where the entities are: module:function, which returns a list of them; the function's name is the "
        "migration's. Default: `app` under \\[tool.crossfade] in pyproject.toml.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]


def fail(message: str, status: Exit, *, as_json: bool = False) -> NoReturn:
    """Say what is wrong, in one line, and end the command."""
    if as_json:
        print(json.dumps({"error": message, "status": int(status)}))
    else:
        problems.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(int(status))


def find_application(app: str | None) -> tuple[str, list[Entity]]:
    """The migration's name and its entities.

    Raises:
        crossfade.errors.ConfigurationError: there is none, or it cannot be imported.
    """
    if app is None:
        settings = Path("pyproject.toml")
        if settings.is_file():
            tool = tomllib.loads(settings.read_text(encoding="utf-8")).get("tool", {})
            app = tool.get("crossfade", {}).get("app")
    if not app:
        raise errors.ConfigurationError(
            "no application named: give --app module:function, set CROSSFADE_APP, or write app under "
            "[tool.crossfade] in pyproject.toml"
        )
    module_name, _, name = app.partition(":")
    # As `python -m` does: the application's modules are found from where the command is run.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        entities = getattr(importlib.import_module(module_name), name)()
    except (ImportError, AttributeError, ValueError, TypeError) as cause:
        raise errors.ConfigurationError(
            f"the application {app!r} cannot be loaded ({cause}); write module:function, the function returning a "
            "list of entities"
        ) from cause
    return name, list(entities)


def address(name: str, example: str) -> str:
    """A store's address from the environment, or ``.env``.

    Raises:
        crossfade.errors.ConfigurationError: it is not set.
    """
    value = os.environ.get(name) or dotenv_values(".env").get(name)
    if not value:
        raise errors.ConfigurationError(f"{name} is not set: for example {example}")
    return value


def _environment() -> None:
    """Let ``.env`` fill what the environment leaves open."""
    for name, value in dotenv_values(".env").items():
        if value is not None:
            os.environ.setdefault(name, value)


async def _unreachable(cf: Crossfade) -> list[errors.CrossfadeError]:
    """Why each store that does not answer does not, learnt in seconds: a pool would go on trying."""
    asked = await asyncio.gather(
        cf.mongo.ping(_PATIENCE), cf.postgres.connect_once(_PATIENCE), return_exceptions=True
    )
    for answer in asked:
        if isinstance(answer, BaseException) and not isinstance(answer, errors.CrossfadeError):
            raise answer
    return [answer for answer in asked if isinstance(answer, errors.CrossfadeError)]


@asynccontextmanager
async def open_migration(
    app: str | None,
    *,
    options: Options | None = None,
    background: bool = False,
    begin: bool = True,
    needs_both: bool = True,
    looks: bool = True,
) -> AsyncIterator[Migration]:
    """The application's migration with its stores open.

    ``begin=False``: do not write a control record where there is none. ``needs_both=False``: the command has
    something to say, or to do, while one of the stores is down; ``looks=False``: even if that is the primary, so the
    migration has no control record until it is looked for.

    Raises:
        crossfade.errors.CrossfadeError: settings, stores or schema; the message says what to do.
    """
    _environment()
    name, entities = find_application(app)
    cf = Crossfade.from_env(options=options, background=background)
    try:
        down = await _unreachable(cf)
        if len(down) > (0 if needs_both else 1):
            raise down[0]
        limits = cf.options
        if down:
            limits = options = replace(limits, primary_deadline=1.0, bulk_deadline=5.0)
        if not begin:
            await cf.postgres.open()
            migration = cf.migration(name, entities)
            seen = await migration.record.look(timeout=limits.primary_deadline)
            if seen.control is None:
                if down:
                    raise down[0]
                raise errors.SchemaNotReady(
                    f"migration {name!r} has no control record yet: run `crossfade init`"
                )
    finally:
        await cf.mongo.close()
        await cf.postgres.close()
    cf = Crossfade.from_env(options=options, background=background)
    migration = cf.migration(name, entities)
    if looks:
        async with cf:
            yield migration
        return
    await cf.postgres.open()
    try:
        yield migration
    finally:
        await cf.mongo.close()
        await cf.postgres.close()


def run(work: Callable[[], Coroutine[Any, Any, Exit | None]], *, as_json: bool = False) -> None:
    """Run a command's work, and turn its errors into one line and an exit status."""
    try:
        status = asyncio.run(work())
    except KeyboardInterrupt:
        fail("interrupted; run the command again to go on", Exit.INTERRUPTED, as_json=as_json)
    except errors.CrossfadeError as cause:
        fail(str(cause), status_of(cause), as_json=as_json)
    if status:
        raise typer.Exit(int(status))


def as_json_text(value: Any) -> str:
    """One JSON object for machines: dates ISO 8601, ids as text."""

    def plain(odd: Any) -> str:
        return odd.isoformat() if isinstance(odd, datetime) else str(odd)

    return json.dumps(value, default=plain)
