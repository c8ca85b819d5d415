"""`crossfade`: the commands, put together."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"crossfade {version('crossfade')}")
        raise typer.Exit


def build() -> typer.Typer:
    """All commands."""
    from crossfade import observe
    from crossfade.cli import (
        bulk,
        demo,
        jobs,
        mismatches,
        phases,
        quarantine,
        repair,
        retire,
        servers,
        settling,
        switching,
    )
    from crossfade.cli.context import Exit, fail

    app = typer.Typer(
        name="crossfade",
        help="Move a running application from MongoDB to PostgreSQL, and back.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def _start(
        log_level: Annotated[
            str, typer.Option(envvar="CROSSFADE_LOG_LEVEL", help="debug, info, warning or error.")
        ] = "warning",
        _version: Annotated[
            bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
        ] = False,
    ) -> None:
        if log_level.lower() not in ("debug", "info", "warning", "error"):
            fail(f"--log-level {log_level!r}: write debug, info, warning or error", Exit.WRONG_USE)
        observe.configure_logging(log_level)

    phases.add_to(app)
    switching.add_to(app)
    settling.add_to(app)
    bulk.add_to(app)
    repair.add_to(app)
    retire.add_to(app)
    jobs.add_to(app)
    app.add_typer(quarantine.app, name="quarantine")
    app.add_typer(mismatches.app, name="mismatches")
    demo.add_to(app)
    app.add_typer(servers.app, name="servers")
    return app


def main() -> None:
    """The entry point."""
    if sys.argv[1:2] == ["servers"]:
        # Called again and again by scripts, and in need of nothing that the others load in half a second.
        from crossfade.cli import servers

        servers.app(args=sys.argv[2:], prog_name="crossfade servers")
    else:
        build()()
