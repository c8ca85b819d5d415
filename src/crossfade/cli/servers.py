"""`crossfade servers`: the embedded servers, running on their own until told to stop."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit, urlunsplit

import typer
from rich.console import Console

if TYPE_CHECKING:
    from crossfade.embedded import EmbeddedServers

app = typer.Typer(
    name="servers",
    help="Private MongoDB-compatible, PostgreSQL and Redis servers, for the demo and for trying things out.",
    no_args_is_help=True,
)

#: Exit statuses, as of every command.
FOUND_SOMETHING, WRONG_USE, CANNOT_REACH, INTERRUPTED = 1, 2, 3, 130

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Directory = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the servers' data and logs.", show_default="crossfade/servers in the state folder"
    ),
]
Port = Annotated[int | None, typer.Option(min=1, max=65535, show_default="a free one, kept with the data")]


@contextmanager
def _outcome(as_json: bool) -> Iterator[None]:
    """Turn the errors of the embedded servers into one line and an exit status."""
    try:
        from crossfade.embedded import EmbeddedError
    except ImportError as error:
        _fail(
            as_json,
            f"the embedded servers are not installed ({error.name} is missing). Install crossfade[embedded].",
            CANNOT_REACH,
        )
    try:
        yield
    except EmbeddedError as error:
        _fail(as_json, str(error), CANNOT_REACH)
    except KeyboardInterrupt:
        _fail(as_json, "interrupted; run the command again to go on.", INTERRUPTED)
    except OSError as error:
        _fail(as_json, f"{error.filename or 'the embedded servers'}: {error.strerror}.", CANNOT_REACH)


def _fail(as_json: bool, message: str, status: int) -> None:
    if as_json:
        print(json.dumps({"error": message}))
    else:
        Console(stderr=True).print(message, style="red", highlight=False, soft_wrap=True, markup=False)
    raise typer.Exit(status)


def _place(directory: Path | None) -> Path:
    from crossfade.embedded.places import state_root

    return directory.absolute() if directory else state_root() / "servers"


def _without_own(place: Path) -> dict[str, str]:
    """The environment, without URIs that are this very set's (exported from `crossfade servers env`)."""
    from crossfade.embedded.servers import known_environment

    known = known_environment(place)
    return {name: value for name, value in os.environ.items() if known.get(name) != value}


def _hide_password(uri: str) -> str:
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", uri)


def _report(servers: EmbeddedServers, place: Path) -> dict[str, Any]:
    return {
        "directory": str(place),
        "servers": [
            {
                "name": server.name,
                "uri": _hide_password(server.uri),
                "port": server.port,
                "ours": server.is_ours,
                "running": server.is_running if server.is_ours else None,
                "processes": server.pids if server.is_ours else {},
            }
            for server in servers.servers
        ],
    }


def _show(report: dict[str, Any]) -> None:
    for server in report["servers"]:
        state = "your own" if not server["ours"] else "running" if server["running"] else "DOWN"
        processes = ", ".join(f"{name} {pid}" for name, pid in server["processes"].items())
        print(f"{server['name']:<10}{state:<10}{server['uri']}{'  (' + processes + ')' if processes else ''}")


@app.command()
def up(
    directory: Directory = None,
    mongo_port: Port = None,
    postgres_port: Port = None,
    redis_port: Port = None,
    as_json: AsJson = False,
) -> None:
    """Start the servers; they run until `down`. Starts what is down if some run already."""
    with _outcome(as_json):
        from crossfade.embedded import EmbeddedServers

        place = _place(directory)
        given = {"mongo": mongo_port, "postgres": postgres_port, "redis": redis_port}
        ports = {name: port for name, port in given.items() if port is not None}
        servers = EmbeddedServers(place, detached=True, environ=_without_own(place), ports=ports)
        already = servers.start_or_attach()
        report = {**_report(servers, place), "already_running": already}
        if as_json:
            print(json.dumps(report))
            return
        _show(report)
        if any(server["ours"] for server in report["servers"]):
            option = f" --directory {shlex.quote(str(directory))}" if directory else ""
            print(f'\nTo use them in this shell: eval "$(crossfade servers env{option})"')
        else:
            print("\nNothing to start: the environment names a server of your own for each store.")


@app.command()
def down(directory: Directory = None, as_json: AsJson = False) -> None:
    """Stop the servers; their data stays."""
    with _outcome(as_json):
        from crossfade.embedded import EmbeddedServers
        from crossfade.embedded.servers import end_leftovers, running_set

        place = _place(directory)
        was_running = running_set(place) is not None
        if was_running:
            EmbeddedServers.attach(place).stop()
        else:
            end_leftovers(place)
        if as_json:
            print(json.dumps({"directory": str(place), "was_running": was_running}))
        else:
            print("stopped" if was_running else f"no servers run in {place}")


@app.command()
def status(directory: Directory = None, as_json: AsJson = False) -> None:
    """Show which servers run. Exit status 1 if one does not."""
    with _outcome(as_json):
        from crossfade.embedded import EmbeddedServers
        from crossfade.embedded.servers import running_set

        place = _place(directory)
        if running_set(place) is None:
            if as_json:
                print(json.dumps({"directory": str(place), "servers": []}))
            else:
                print(f"no servers run in {place}. `crossfade servers up` starts them.")
            raise typer.Exit(FOUND_SOMETHING)
        report = _report(EmbeddedServers.attach(place), place)
        if as_json:
            print(json.dumps(report))
        else:
            _show(report)
        if any(server["running"] is False for server in report["servers"]):
            raise typer.Exit(FOUND_SOMETHING)


@app.command()
def env(directory: Directory = None, as_json: AsJson = False) -> None:
    """Print MONGO_URI, DATABASE_URL and REDIS_URL for the shell: eval "$(crossfade servers env)"."""
    with _outcome(as_json):
        from crossfade.embedded import EmbeddedServers

        servers = EmbeddedServers.attach(_place(directory))
        environment = servers.environment()
        if servers.mongo.is_ours:
            # A URI without a database is of no use to a command; PostgreSQL's names one, too.
            parts = urlsplit(environment["MONGO_URI"])
            environment["MONGO_URI"] = urlunsplit(parts._replace(path="/crossfade"))
        if as_json:
            print(json.dumps(environment))
        else:
            for name, value in environment.items():
                print(f"export {name}={shlex.quote(value)}")


@app.command()
def logs(
    name: Annotated[
        str | None, typer.Argument(help="mongo, postgres or redis; all of them if left out.")
    ] = None,
    lines: Annotated[int, typer.Option(min=1, help="Last lines per file.")] = 50,
    directory: Directory = None,
    as_json: AsJson = False,
) -> None:
    """Print the last lines of the servers' logs, of stopped servers too."""
    with _outcome(as_json):
        from crossfade.embedded.servers import NAMES, log_files

        if name is not None and name not in NAMES:
            _fail(as_json, f"no server is called {name!r}; there are {', '.join(NAMES)}.", WRONG_USE)
        place = _place(directory)
        files = [path for server, path in log_files(place) if name in (None, server)]
        if not files:
            _fail(as_json, f"no logs in {place}. `crossfade servers up` starts the servers.", FOUND_SOMETHING)
        tails = {str(path): _tail(path, lines) for path in files}
        if as_json:
            print(json.dumps(tails))
            return
        for path, tail in tails.items():
            print(f"==> {path} <==", *tail, sep="\n", file=sys.stdout)


def _tail(path: Path, lines: int) -> list[str]:
    with path.open(errors="replace") as log:
        return [line.rstrip("\n") for line in deque(log, maxlen=lines)]
