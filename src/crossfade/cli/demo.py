"""`crossfade demo`: hands over to the reference service's demo."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from crossfade.cli.context import Exit, JsonOption, fail


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    users: Annotated[int, typer.Option(min=50, help="Legacy users.")] = 20_000,
    seconds: Annotated[
        float, typer.Option(min=1, help="For which each phase's latencies are measured.")
    ] = 10.0,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave servers and workers running, to be looked at.")
    ] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End and remove what --keep has left.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Play a migration under traffic through, on real servers: the whole thing in some minutes.

    Exit status: 0 nothing lost and no request failed that the contract does not allow, 1 otherwise, 3 servers cannot
    be had, 130 interrupted. A store that the environment names is used, with a database of the demo's own in it.
    """
    if find_spec("scorekeeper") is None:
        fail(
            "the demo needs the reference service: install crossfade[embedded,scorekeeper]",
            Exit.WRONG_USE,
            as_json=as_json,
        )
    words = ["-m", "scorekeeper.demo", "--users", str(users), "--seconds", str(seconds)]
    words += ["--keep"] if keep else []
    words += ["--stop"] if stop else []
    words += ["--json"] if as_json else []
    # Replaced, not imported: the library knows nothing of the service.
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *words])  # noqa: S606 - the very program that runs this
