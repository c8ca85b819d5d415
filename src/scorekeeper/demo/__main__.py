"""``python -m scorekeeper.demo`` (what `crossfade demo` runs): a live migration under traffic, and its figures.

Exit status: 0 nothing was lost and no request failed that the contract does not allow, 1 otherwise, 3 servers or
schema cannot be had, 130 interrupted. However it ends, nothing of it is left, but for what ``--keep`` keeps.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from typing import Annotated, Any, NoReturn

import typer
from pymongo.errors import PyMongoError
from rich.console import Console
from rich.markup import escape

from crossfade.embedded import EmbeddedError
from scorekeeper.demo.play import Play
from scorekeeper.demo.report import as_json as report_as_json
from scorekeeper.demo.report import show
from scorekeeper.demo.screen import Screen
from scorekeeper.demo.stage import DemoFailed, Stage, staged, stop_kept

console = Console(stderr=True)


def demo(
    users: Annotated[int, typer.Option(min=50, help="Legacy users.")] = 20_000,
    seconds: Annotated[
        float, typer.Option(min=1, help="For which each phase's latencies are measured.")
    ] = 10.0,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave servers and workers running, to be looked at.")
    ] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End and remove what --keep has left.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Move a legacy database to PostgreSQL while two workers and an old application use it."""
    # A shell starts background jobs with SIGINT ignored; and SIGTERM is to clean up as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        if stop:
            if not stop_kept(lambda text: console.print(text, highlight=False, soft_wrap=True)):
                console.print("no demo was kept")
            return
        status = _perform(users, seconds, keep=keep, as_json=as_json)
    except (DemoFailed, EmbeddedError) as error:
        _fail(str(error), 3, as_json=as_json)
    except KeyboardInterrupt:
        _fail("interrupted; everything that was started is stopped", 130, as_json=as_json)
    raise typer.Exit(status)


def _fail(message: str, status: int, *, as_json: bool) -> NoReturn:
    console.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    if as_json:
        _print({"ok": False, "error": message, "status": status})
    raise typer.Exit(status)


def _print(value: Any) -> None:
    sys.stdout.write(json.dumps(value, default=str) + "\n")
    sys.stdout.flush()


def _perform(users: int, seconds: float, *, keep: bool, as_json: bool) -> int:
    began = time.monotonic()
    screen = Screen(console)
    console.print("servers: MongoDB-compatible, PostgreSQL, Redis; schema at head ...", highlight=False)
    with staged(keep=keep) as stage:
        screen.seconds["servers, schema at head"] = round(time.monotonic() - began, 2)
        if stage.own_servers:
            own = ", ".join(stage.own_servers)
            console.print(f"your own {own}: database {stage.name}", highlight=False, soft_wrap=True)
        play = Play(stage, screen, users, seconds)
        try:
            asyncio.run(_play(play, screen))
        except (DemoFailed, PyMongoError) as error:
            raise DemoFailed(f"{error}\nlogs of the workers: {stage.saved_logs()}") from error
        took = time.monotonic() - began
        if as_json:
            _print(report_as_json(play, took))
        else:
            show(play, took, Console())
        if play.problems:
            console.print(f"logs of the workers: {stage.saved_logs()}", highlight=False, soft_wrap=True)
        if keep:
            asyncio.run(stage.keep())
            _say_how_to_look(stage)
    return 1 if play.problems else 0


async def _play(play: Play, screen: Screen) -> None:
    with screen.live():
        await play.run()


def _say_how_to_look(stage: Stage) -> None:
    """Print the addresses, what to run on them, and how to end it all."""
    exports = " ".join(
        f"{name}='{stage.environment[name]}'"
        for name in ("MONGO_URI", "DATABASE_URL", "REDIS_URL", "CROSSFADE_APP")
    )
    lines = (
        "",
        "[bold]Still running:[/]",
        *(f"  the service      {address}/docs   {address}/api/health" for address in stage.addresses),
        f"  in this shell    export {escape(exports)}",
        "  look             crossfade status; crossfade quarantine list; crossfade history",
        f"  PostgreSQL       psql '{escape(stage.database_url)}'",
        f"  logs             {stage.folder}",
        "  end it all       crossfade demo --stop",
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(demo)
