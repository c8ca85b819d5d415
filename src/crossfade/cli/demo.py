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
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running, to be looked at.")] = False,
    as_json: JsonOption = False,
) -> None:
    """A live migration under traffic, on private real servers: the whole thing in some minutes."""
    if find_spec("scorekeeper") is None:
        fail("the demo needs the reference service: install crossfade[embedded,scorekeeper]", Exit.WRONG_USE)
    words = ["-m", "scorekeeper.demo", "--users", str(users)]
    words += ["--keep"] if keep else []
    words += ["--json"] if as_json else []
    # Replaced, not imported: the library knows nothing of the service.
    os.execv(sys.executable, [sys.executable, *words])  # noqa: S606 - our own interpreter, no shell wanted
