"""``python -m scorekeeper``: serve, after everything that can be checked beforehand was checked.

Exit statuses: 0 stopped, 2 a setting is missing or unusable, 3 a store cannot be reached.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from typing import Annotated, NoReturn

import structlog
import typer
import uvicorn

from crossfade import CrossfadeError, StoreUnavailable, observe
from scorekeeper import demo_accounts
from scorekeeper.app import check_start, create_app, crossfade_of
from scorekeeper.auth.passwords import Passwords
from scorekeeper.serving import DrainingProtocol, DrainingServer, Listener, Workers, bind, keep_what_is_loaded
from scorekeeper.settings import Settings, SettingsError, load_settings

log = structlog.get_logger("scorekeeper")


def _stop(message: str, status: int) -> NoReturn:
    print(f"scorekeeper: {message}", file=sys.stderr)  # noqa: T201 - the one line, log format or not
    raise SystemExit(status)


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default HOST.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Default PORT, 5000.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes.")] = 1,
    uds: Annotated[
        str | None, typer.Option(help="Unix socket to listen on, instead of host and port.")
    ] = None,
) -> None:
    """Serve the users and authentication of a card-game score keeper."""
    try:
        settings = load_settings(
            **{name: value for name, value in (("host", host), ("port", port)) if value is not None}
        )
    except SettingsError as error:
        _stop(str(error), 2)
    observe.configure_logging(settings.log_level)
    try:
        asyncio.run(check_start(settings))
        if settings.demo_accounts:
            asyncio.run(_make_demo_accounts(settings))
    except StoreUnavailable as error:
        _stop(str(error), 3)
    except CrossfadeError as error:
        _stop(str(error), 2)
    common = {
        "http": DrainingProtocol,
        "log_level": "warning",
        "access_log": False,
        "timeout_graceful_shutdown": 30,
        "timeout_keep_alive": 65,
    }
    listener = _listen(settings.host, settings.port, uds)
    _say_where(uds, settings.host, 0 if uds else listener.socket.getsockname()[1])
    if workers == 1:
        config = uvicorn.Config(create_app(settings), **common)  # type: ignore[arg-type]
        keep_what_is_loaded()
        DrainingServer(config, listener).run(sockets=[listener.socket])
        return
    with tempfile.TemporaryDirectory(prefix="scorekeeper-metrics-") as folder:
        # Set before the workers import prometheus_client: each writes its counts there, any of them adds up.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        os.environ["PORT"], os.environ["HOST"] = str(settings.port), settings.host
        config = uvicorn.Config(
            "scorekeeper.app:from_environment",
            factory=True,
            workers=workers,
            **common,  # type: ignore[arg-type]
        )
        Workers(config, listener).run()


def _listen(host: str, port: int, path: str | None) -> Listener:
    try:
        return Listener(bind(host, port, path))
    except OSError as error:
        setting, where = ("--uds", path) if path else ("PORT", f"{host}:{port}")
        _stop(
            f"{setting}: cannot listen on {where} ({error.strerror}). Stop what does, or set another.",
            2,
        )


async def _make_demo_accounts(settings: Settings) -> None:
    async with Passwords(settings.bcrypt_rounds, settings.password_threads) as passwords:
        await demo_accounts.make(crossfade_of(settings), passwords)
    demo_accounts.say_how_to_log_in(f"http://localhost:{settings.port}")


def _say_where(uds: str | None, host: str, port: int) -> None:
    where = f"unix:{uds}" if uds else f"http://{f'[{host}]' if ':' in host else host}:{port}"
    log.info("scorekeeper starts", address=where)


if __name__ == "__main__":
    typer.run(serve)
