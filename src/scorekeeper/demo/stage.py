"""The demo's stage: servers, a database of its own in each, the service's processes, and the `crossfade` command.

What it promises
    Nothing is touched that was there before: a store that the environment names is used with a fresh database,
    which goes away at the end. However the demo ends, SIGKILL included, no process of it stays: the servers'
    supervisor watches this process, and the kernel kills workers and commands with it. Only `Stage.keep`, at the
    very end, lets go of them, and writes down what `stop_kept` needs to end them.

What it hangs on
    The parent-death signal is tied to the thread that forks: workers and commands are started by the main thread.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import psycopg
import pymongo
from psycopg import sql
from pymongo.errors import PyMongoError

import scorekeeper
from crossfade.embedded import EmbeddedError, EmbeddedServers
from crossfade.embedded.places import state_root
from crossfade.embedded.ports import free_port
from crossfade.embedded.servers import Control, state_control
from crossfade.embedded.supervisor import die_with_parent, started

#: What `stop_kept` reads, in the folder of a demo that was kept.
_KEPT = "kept.json"
#: Settings of the service that would make this demo another one.
_NOT_INHERITED = (
    "CACHE_TTL", "CORS_ORIGINS", "CROSSFADE_LOG_LEVEL", "HOST", "LEGACY_URL", "LOG_LEVEL", "PASSWORD_THREADS",
    "PORT", "PROMETHEUS_MULTIPROC_DIR",
)  # fmt: skip
#: Seconds that a worker has to finish the requests under way.
_GRACE = 15.0


class DemoFailed(Exception):
    """A step of the demo could not be done; the message says which and why."""


@dataclass
class Stage:
    """Where the demo plays.

    Attributes:
        servers: the private set; in it the user's own servers where the environment names them.
        folder: the logs of the workers.
        name: of the demo's database, in MongoDB and in PostgreSQL.
        mongo_uri, database_url: with that database.
        environment: of workers and commands.
        ports: of the workers, on 127.0.0.1.
    """

    servers: EmbeddedServers
    folder: Path
    name: str
    mongo_uri: str
    database_url: str
    environment: dict[str, str]
    ports: list[int]
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def addresses(self) -> list[str]:
        """Of the workers."""
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    @property
    def own_servers(self) -> list[str]:
        """Names of the stores that are the user's own."""
        return [server.name for server in self.servers.servers if not server.is_ours]

    # --- the command, as a user types it -------------------------------------------------------------------

    async def crossfade(self, *words: str, may_find: bool = False, as_json: bool = True) -> dict[str, Any]:
        """Run one `crossfade` command; the object that it printed, {} without ``as_json``.

        Raises:
            DemoFailed: it ended with another status than 0 (with ``may_find``: than 0 or 1).
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "from crossfade.cli.main import main; main()",
            *words, *(["--json"] if as_json else []),
            env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        try:
            out, err = await process.communicate()
        except asyncio.CancelledError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        printed: Any = {}
        with suppress(IndexError, ValueError):
            printed = json.loads(out.decode().strip().splitlines()[-1])
        refused = process.returncode not in ((0, 1) if may_find else (0,))
        if refused or "error" in printed or (as_json and not printed):
            why = printed.get("error") or err.decode(errors="replace").strip()[-2000:]
            raise DemoFailed(f"crossfade {' '.join(words)} (status {process.returncode}): {why}")
        return dict(printed)

    # --- the service ---------------------------------------------------------------------------------------

    def start_workers(self, *, kept: bool = False) -> None:
        """Start the service's processes, by the main thread; see `until_ready`.

        ``kept``: they outlive this process.
        """
        self.workers = []
        for port in self.ports:
            with (self.folder / f"worker-{port}.log").open("ab") as log:
                self.workers.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "scorekeeper", "--port", str(port)],
                        env=self.environment,
                        cwd=self.folder,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                        # One system call, looked up beforehand: safe beside threads.
                        preexec_fn=None if kept else die_with_parent,  # noqa: PLW1509
                    )
                )

    async def until_ready(self, seconds: float = 90.0) -> None:
        """Wait until every worker may acknowledge writes.

        Raises:
            DemoFailed: one ended, or took longer.
        """
        until = time.monotonic() + seconds
        async with httpx.AsyncClient(timeout=2.0, trust_env=False) as http:
            for port, worker in zip(self.ports, self.workers, strict=True):
                while not await _is_ready(http, port):
                    if worker.poll() is not None or time.monotonic() > until:
                        log = (self.folder / f"worker-{port}.log").read_text(errors="replace").strip()
                        raise DemoFailed(f"the worker on port {port} did not start: {log[-500:]}")
                    await asyncio.sleep(0.1)

    def ended_workers(self) -> list[int]:
        """Ports of workers that ended, which none should."""
        return [port for port, w in zip(self.ports, self.workers, strict=True) if w.poll() is not None]

    def stop_workers(self) -> None:
        """Ask each to end, and wait for it."""
        _end([(worker.pid, started(worker.pid)) for worker in self.workers if worker.poll() is None])
        for worker in self.workers:
            worker.wait()

    # --- the end -------------------------------------------------------------------------------------------

    def saved_logs(self) -> Path:
        """A folder with copies of the workers' logs, which stays."""
        saved = Path(tempfile.mkdtemp(prefix="crossfade-demo-logs-"))
        for log in self.folder.glob("*.log"):
            shutil.copy(log, saved)
        return saved

    async def keep(self) -> None:
        """Let servers and workers outlive this process, until `stop_kept`.

        Raises:
            DemoFailed: the workers did not start again.
        """
        # A process cannot be told from outside to outlive its parent, so these are new ones.
        await asyncio.to_thread(self.stop_workers)
        self.start_workers(kept=True)
        await self.until_ready()
        noted = {
            "workers": [[worker.pid, started(worker.pid)] for worker in self.workers],
            "mongo": [self.servers.mongo_uri, self.name] if "mongo" in self.own_servers else None,
            "postgres": [self.servers.database_url, self.name] if "postgres" in self.own_servers else None,
        }
        note = _kept_folder() / _KEPT
        note.touch(mode=0o600)
        note.write_text(json.dumps(noted))
        if self.servers.directory is not None and len(self.own_servers) < len(self.servers.servers):
            Control(state_control(self.servers.directory)).ask("release")


async def _is_ready(http: httpx.AsyncClient, port: int) -> bool:
    try:
        return (await http.get(f"http://127.0.0.1:{port}/api/health/ready")).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def staged(*, keep: bool) -> Iterator[Stage]:
    """Servers up, a fresh database in each store, the schema at head; down again and gone afterwards.

    With ``keep``, what was let go of by `Stage.keep` stays. Call it in the main thread.

    Raises:
        DemoFailed: the schema cannot be made, or a demo that was kept still runs.
        crossfade.embedded.EmbeddedError: a server cannot be had.
    """
    directory = None
    if keep:
        if (_kept_folder() / _KEPT).exists():
            raise DemoFailed("a demo that was kept is still there; end it first: crossfade demo --stop")
        shutil.rmtree(_kept_folder(), ignore_errors=True)
        directory = _kept_folder() / "servers"
    servers = EmbeddedServers(directory)
    servers.start()
    name = f"crossfade_demo_{secrets.token_hex(4)}"
    folder = Path(tempfile.mkdtemp(dir=servers.directory, prefix="crossfade-demo-"))
    stage = Stage(
        servers, folder, name, with_database(servers.mongo_uri, name), with_database(servers.database_url, name),
        {}, [free_port(), free_port()],
    )  # fmt: skip
    try:
        stage.environment = _environment(stage)
        with psycopg.connect(servers.database_url, autocommit=True, connect_timeout=10) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
        _bring_to_head(stage)
        yield stage
    except psycopg.Error as error:
        raise DemoFailed(f"PostgreSQL at port {servers.postgres.port}: {str(error).strip()}") from error
    finally:
        if not keep or not (_kept_folder() / _KEPT).exists():
            _strike(stage, keep=keep)


def _environment(stage: Stage) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    return {
        **inherited,
        "MONGO_URI": stage.mongo_uri,
        "DATABASE_URL": stage.database_url,
        "REDIS_URL": stage.servers.redis_url,
        "JWT_SECRET": secrets.token_urlsafe(48),
        # New passwords of the demo cost little, so that the figures show the stores and not bcrypt.
        "BCRYPT_ROUNDS": "4",
        "HASH_SCHEME": "bcrypt",
        # Everybody in the demo comes from one address.
        "RATE_LIMITS": "false",
        "USE_POSTGRES": "false",
        "CROSSFADE_APP": "scorekeeper.migration:accounts",
        # Traffic for seconds, not for days: every read is compared, and fewer are asked for.
        "CROSSFADE_SHADOW_SAMPLE": "1",
        "CROSSFADE_SHADOW_COMPARISONS": "500",
    }


def _bring_to_head(stage: Stage) -> None:
    settings = Path(scorekeeper.__file__).parents[2] / "alembic.ini"
    if not settings.is_file():
        raise DemoFailed(f"the demo runs from a clone of the repository: there is no {settings}")
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "-c", str(settings), "upgrade", "head"],
        env=stage.environment, cwd=stage.folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False, preexec_fn=die_with_parent,
    )  # fmt: skip
    if done.returncode:
        raise DemoFailed(f"alembic upgrade head: {done.stderr.strip()[-1000:]}")


def _strike(stage: Stage, *, keep: bool) -> None:
    """Stop everything and remove what is the demo's own."""
    with suppress(OSError):
        stage.stop_workers()
    own = stage.own_servers
    _drop_databases(
        [stage.servers.mongo_uri, stage.name] if "mongo" in own else None,
        [stage.servers.database_url, stage.name] if "postgres" in own else None,
    )
    shutil.rmtree(stage.folder, ignore_errors=True)
    stage.servers.stop()
    if keep:
        shutil.rmtree(_kept_folder(), ignore_errors=True)


def _drop_databases(mongo: list[str] | None, postgres: list[str] | None) -> None:
    """Drop the demo's database on servers that go on without it; each is [URI, name]."""
    if mongo is not None:
        with (
            suppress(PyMongoError),
            pymongo.MongoClient[dict[str, Any]](mongo[0], serverSelectionTimeoutMS=5000) as client,
        ):
            client.drop_database(mongo[1])
    if postgres is not None:
        drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(postgres[1]))
        with (
            suppress(psycopg.Error),
            psycopg.connect(postgres[0], autocommit=True, connect_timeout=5) as client,
        ):
            client.execute(drop)


def stop_kept(say: Callable[[str], None]) -> bool:
    """End and remove the demo that was kept; False: there is none.

    Raises:
        crossfade.embedded.EmbeddedError: the servers' supervisor does not answer.
    """
    folder = _kept_folder()
    try:
        noted = json.loads((folder / _KEPT).read_text())
    except (OSError, ValueError):
        return False
    _end([(int(pid), since) for pid, since in noted["workers"]])
    say("the workers are stopped")
    _drop_databases(noted["mongo"], noted["postgres"])
    with suppress(EmbeddedError):  # they may have been stopped by hand
        EmbeddedServers.attach(folder / "servers").stop()
    shutil.rmtree(folder, ignore_errors=True)
    say(f"the servers are stopped, and {folder} is removed")
    return True


def _end(processes: list[tuple[int, str | None]]) -> None:
    """Ask each process (number, start time) to end; kill it after `_GRACE` seconds."""

    def living() -> list[int]:
        return [pid for pid, since in processes if since is not None and started(pid) == since]

    for number, seconds in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, 5.0)):
        for pid in living():
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        until = time.monotonic() + seconds
        while living() and time.monotonic() < until:
            time.sleep(0.05)


def _kept_folder() -> Path:
    return state_root() / "demo"


def with_database(uri: str, name: str) -> str:
    """The same address with another database; whoever was authenticated against the first one still is."""
    parts = urlsplit(uri)
    query = parts.query
    if parts.scheme.startswith("mongodb") and "@" in parts.netloc and "authsource" not in query.lower():
        source = parts.path.strip("/") or "admin"
        query = f"{query}&authSource={source}" if query else f"authSource={source}"
    return urlunsplit(parts._replace(path=f"/{name}", query=query))
