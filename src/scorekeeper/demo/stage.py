"""The demo's stage: servers, a database of its own, service workers, and the `crossfade` command as a user types it."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import psycopg
from psycopg import sql

from crossfade.embedded import EmbeddedServers

_PR_SET_PDEATHSIG = 1


class DemoFailed(Exception):
    """A step of the demo could not be done; the message says which and why."""


def _die_with_parent() -> None:
    """In a child, before it starts: end when the demo ends, killed or not."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass
class Stage:
    """Where the demo plays.

    Attributes:
        servers: the private set, or the user's own where their addresses are set.
        folder: logs of the workers.
        mongo_uri, database_url: with the demo's own database.
        ports: of the two workers.
    """

    servers: EmbeddedServers
    folder: Path
    mongo_uri: str
    database_url: str
    environment: dict[str, str]
    ports: list[int]
    workers: list[subprocess.Popen[bytes]]

    @property
    def addresses(self) -> list[str]:
        """Of the workers."""
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    async def crossfade(self, *words: str, may_find: bool = False) -> dict[str, Any]:
        """Run one command with ``--json``; what it printed.

        Raises:
            DemoFailed: it ended with another status than 0 (with ``may_find``: than 0 or 1).
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "from crossfade.cli.main import main; main()", *words, "--json",
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_die_with_parent,
        )  # fmt: skip
        out, err = await process.communicate()
        try:
            printed = json.loads(out.decode().strip().splitlines()[-1])
        except (IndexError, ValueError):
            printed = {}
        if process.returncode not in ((0, 1) if may_find else (0,)):
            why = printed.get("error") if isinstance(printed, dict) else None
            raise DemoFailed(f"crossfade {' '.join(words)}: {why or err.decode().strip()[-500:]}")
        return printed if isinstance(printed, dict) else {"result": printed}

    def start_workers(self) -> None:
        """Start the service's processes; see `until_ready`."""
        for port in self.ports:
            with (self.folder / f"worker-{port}.log").open("wb") as log:
                self.workers.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "scorekeeper", "--port", str(port)],
                        env=self.environment,
                        stdout=log,
                        stderr=log,
                        preexec_fn=_die_with_parent,  # noqa: PLW1509 - before any thread of the child
                    )
                )

    async def until_ready(self, seconds: float = 60.0) -> None:
        """Wait until every worker may acknowledge writes.

        Raises:
            DemoFailed: one ended, or took longer.
        """
        until = time.monotonic() + seconds
        async with httpx.AsyncClient(timeout=2.0) as http:
            for port, worker in zip(self.ports, self.workers, strict=True):
                while True:
                    if worker.poll() is not None or time.monotonic() > until:
                        log = (self.folder / f"worker-{port}.log").read_text(errors="replace").strip()
                        raise DemoFailed(f"the worker on port {port} did not start: {log[-500:]}")
                    try:
                        answer = await http.get(f"http://127.0.0.1:{port}/api/health/ready")
                        if answer.status_code == 200:
                            break
                    except httpx.HTTPError:
                        pass
                    await asyncio.sleep(0.1)

    def stop_workers(self) -> None:
        """Ask each to end, and wait for it."""
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            try:
                worker.wait(15)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


def _with_database(uri: str, name: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=f"/{name}"))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def staged(folder: Path, *, keep: bool) -> Iterator[Stage]:
    """Servers up, a fresh database in each store, the schema at head; down again afterwards unless ``keep``.

    Raises:
        DemoFailed: the schema could not be made.
        crossfade.embedded.EmbeddedError: a server cannot be had.
    """
    servers = EmbeddedServers(folder / "servers" if keep else None)
    servers.start()
    try:
        name = f"crossfade_demo_{secrets.token_hex(4)}"
        mongo_uri = _with_database(servers.mongo_uri, name)
        database_url = _with_database(servers.database_url, name)
        with psycopg.connect(servers.database_url, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        environment = {
            **os.environ,
            "MONGO_URI": mongo_uri,
            "DATABASE_URL": database_url,
            "REDIS_URL": servers.redis_url,
            "JWT_SECRET": secrets.token_urlsafe(48),
            # New passwords of the demo cost little, so that the figures show the stores and not bcrypt.
            "BCRYPT_ROUNDS": "4",
            "USE_POSTGRES": "false",
            "CROSSFADE_APP": "scorekeeper.migration:accounts",
        }
        done = subprocess.run(
            [sys.executable, "-m", "alembic", "upgrade", "head"],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise DemoFailed(f"alembic upgrade head: {done.stderr.strip()[-500:]}")
        stage = Stage(servers, folder, mongo_uri, database_url, environment, [free_port(), free_port()], [])
        try:
            yield stage
        finally:
            if not keep:
                stage.stop_workers()
    finally:
        if not keep:
            servers.stop()
