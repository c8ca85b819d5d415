"""`crossfade jobs`, `pause`, `resume`, `rate`, `chunk-size`, `stop`: a bulk run, steered while it goes on.

The command that leads a run listens on a unix socket for a line (`echo pause | nc -U SOCKET` does as well) and answers
with one JSON object. What it is asked for it writes to the run's row in PostgreSQL, where all workers read it, on
whichever machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from crossfade import errors
from crossfade.bulk.throttle import LEAST, Throttle
from crossfade.cli.context import Exit, JsonOption, as_json_text, console, fail
from crossfade.entity import Entity
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres
from crossfade.stores.runs import Run

WORDS = "status, pause, resume, rate N, chunk-size N, stop"
#: Bytes that the path of a unix socket may have.
_LONGEST = 107
#: Seconds between two looks at how fast the stores answer.
_PROBE = 0.5
#: Seconds that a command waits for a job's answer.
_PATIENCE = 10.0

PidOption = Annotated[int | None, typer.Option("--pid", help="Which job, where several run.")]


class Live:
    """What can be asked of a leading command while it runs.

    Args:
        kind, migration: what it does.
        target: a connection of its own.
        stop: set when it is asked to end.
        max_rate: to begin with, records a second of all workers.
    """

    def __init__(
        self,
        kind: str,
        migration: str,
        target: BulkPostgres,
        stop: asyncio.Event,
        *,
        max_rate: int | None = None,
    ) -> None:
        self._kind, self._migration = kind, migration
        self._target = target
        self._stop = stop
        self._asking = asyncio.Lock()
        self._run: Run | None = None
        self._entity, self._total, self._done, self._began = "", 0, 0, time.monotonic()
        self._throttled = ""
        #: The part of the time that the throttle lets the run work.
        self._duty = 1.0
        #: What a person has asked for; it holds for the entities that follow, too.
        self._wanted: dict[str, Any] = {} if max_rate is None else {"rate": max_rate}

    async def follow(self, entity: str, run: Run, total: int, done: int) -> None:
        """This run is under way now; ``done`` of it since an earlier command."""
        async with self._asking:
            self._run, self._entity, self._total = run, entity, total
            self._done, self._began = done, time.monotonic()
            self._duty = 1.0
            if self._wanted:
                await self._target.runs.steer(run, self._wanted)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Path]:
        """Answer on a socket, which is removed with the block.

        Raises:
            crossfade.errors.ConfigurationError: its path would be too long.
        """
        path = folder() / f"job-{self._migration}-{os.getpid()}.sock"
        if len(os.fsencode(path)) > _LONGEST:
            raise errors.ConfigurationError(
                f"the path of the socket {path} is too long; set XDG_RUNTIME_DIR to a shorter folder"
            )
        path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._serve, path)
        path.chmod(0o600)
        try:
            yield path
        finally:
            server.close()
            path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, ValueError):
            while line := await reader.readline():
                answer = await self.answer(line.decode(errors="replace").strip())
                writer.write(as_json_text(answer).encode() + b"\n")
                await writer.drain()
        writer.close()

    async def throttle(
        self,
        throttle: Throttle,
        source: BulkMongo,
        entities: Sequence[Entity],
        pool_wait: Callable[[], float],
    ) -> None:
        """Slow the workers down when the stores answer late or fall behind, until it is cancelled.

        Args:
            throttle: decides.
            source: MongoDB, for its probes.
            entities: whose debts count.
            pool_wait: seconds that the protocol's own writes of this process waited for a connection, since it was
                asked last.
        """
        while True:
            await asyncio.sleep(_PROBE)
            try:
                mongo = await asyncio.to_thread(source.probe)
                owed = await asyncio.to_thread(source.debts, entities, throttle.enough_debts)
                async with self._asking:
                    postgres, lag, deliveries = await self._target.runs.probe(throttle.enough_debts)
                    throttle.heard(
                        {"MongoDB": mongo, "PostgreSQL": postgres}, lag, owed + deliveries, pool_wait()
                    )
                    self._throttled = throttle.reason
                    duty = max(round(throttle.duty, 1), LEAST)
                    if duty == self._duty or self._run is None:
                        continue
                    await self._target.runs.steer(self._run, {"duty": duty})
                    self._duty = duty
            except errors.StoreUnavailable:
                continue  # the workers meet it themselves, and say so

    async def answer(self, line: str) -> dict[str, Any]:
        """Do what a line asks for; the status then, or what is wrong with the line."""
        word, _, value = line.partition(" ")
        asked = _understood(word, value.strip())
        if isinstance(asked, str):
            return {"ok": False, "error": asked}
        if asked.get("stopped"):
            self._stop.set()
        async with self._asking:
            try:
                self._wanted |= {name: it for name, it in asked.items() if name != "stopped"}
                if self._run is not None and asked:
                    await self._target.runs.steer(self._run, asked)
                return {"ok": True, **await self._status()}
            except errors.CrossfadeError as cause:
                return {"ok": False, "error": str(cause)}

    async def _status(self) -> dict[str, Any]:
        about = {"kind": self._kind, "migration": self._migration, "pid": os.getpid(), "entity": self._entity}
        if self._run is None:
            return {**about, "state": "beginning"}
        steering = await self._target.runs.steering(self._run)
        totals = await self._target.runs.totals(self._run)
        done = totals.get("read", totals.get("documents", 0))
        seconds = time.monotonic() - self._began
        rate = (done - self._done) / seconds if seconds else 0.0
        stopping = steering.stopped or self._stop.is_set()
        return {
            **about,
            "state": "stopping" if stopping else "paused" if steering.paused else "running",
            "done": done,
            "total": max(self._total, done),
            "rate": round(rate),
            "seconds_left": round(max(self._total - done, 0) / rate) if rate >= 1 else None,
            "workers": steering.workers,
            "max_rate": steering.rate,
            "chunk_size": steering.chunk_size,
            "duty": steering.duty,
            "throttled": self._throttled or None,
            "counts": totals,
        }


def _understood(word: str, value: str) -> dict[str, Any] | str:
    """What a line asks of the workers, as of `Steering`; or what is wrong with it."""
    plain: dict[str, dict[str, Any]] = {
        "status": {}, "pause": {"paused": True}, "resume": {"paused": None}, "stop": {"stopped": True},
    }  # fmt: skip
    if word in plain and not value:
        return plain[word]
    if word in ("rate", "chunk-size"):
        name, most = ("rate", 10**9) if word == "rate" else ("chunk_size", 100_000)
        if value in {"none", "0"}:
            return {name: None}
        if value.isdecimal() and int(value) <= most:
            return {name: int(value)}
        return f"{word} {value!r}: write a whole number up to {most:,}, or none"
    return f"{' '.join((word, value)).strip()!r} is not understood; there are: {WORDS}"


def folder() -> Path:
    """Where this user's jobs listen, readable for nobody else.

    Raises:
        crossfade.errors.ConfigurationError: the folder is somebody else's.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    made = Path(base) / "crossfade" if base else Path(tempfile.gettempdir()) / f"crossfade-{os.getuid()}"
    made.mkdir(mode=0o700, parents=True, exist_ok=True)
    if made.stat().st_uid != os.getuid() or made.stat().st_mode & 0o077:
        raise errors.ConfigurationError(
            f"the folder {made} is not this user's alone; remove it, or set XDG_RUNTIME_DIR"
        )
    return made


def _ask(path: Path, line: str) -> dict[str, Any] | None:
    """What a job answers; None: there is none behind this socket any more."""
    with socket.socket(socket.AF_UNIX) as job:
        job.settimeout(_PATIENCE)
        try:
            job.connect(str(path))
            job.sendall(line.encode() + b"\n")
            return dict(json.loads(job.makefile().readline()))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)  # left by a command that was killed
            return None
        except (OSError, ValueError) as cause:
            return {"ok": False, "error": f"the job behind {path} does not answer ({cause})"}


def _tell(line: str, pid: int | None, *, as_json: bool) -> None:
    """Ask the one job that runs, or the one with this process id, and show what it says."""
    try:
        paths = sorted(folder().glob("job-*.sock"))
    except errors.ConfigurationError as cause:
        fail(str(cause), Exit.WRONG_USE, as_json=as_json)
    there = [path for path in paths if _ask(path, "status") is not None]
    chosen = [path for path in there if pid is None or path.stem.endswith(f"-{pid}")]
    if not chosen:
        fail("no such job runs here" if there else "no job runs here", Exit.FOUND, as_json=as_json)
    if len(chosen) > 1:
        pids = ", ".join(path.stem.rpartition("-")[2] for path in chosen)
        fail(f"several jobs run here: name one of {pids} with --pid", Exit.WRONG_USE, as_json=as_json)
    answer = _ask(chosen[0], line) or {"ok": False, "error": "the job has ended meanwhile"}
    if not answer["ok"]:
        fail(answer["error"], Exit.WRONG_USE, as_json=as_json)
    _show([answer], as_json=as_json)


def _show(answers: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print(as_json_text({"jobs": answers}))
        return
    table = Table(
        "pid", "job", "state", "done", "of", "rate", "left", "workers", "at most", "chunk", "throttled"
    )
    for one in answers:
        left, most = one.get("seconds_left"), one.get("max_rate")
        table.add_row(
            str(one["pid"]), f"{one['kind']} {one['migration']} {one['entity']}", one["state"],
            f"{one.get('done', 0):,}", f"{one.get('total', 0):,}", f"{one.get('rate', 0):,}/s",
            "" if left is None else f"{left:,} s", str(one.get("workers", "")),
            "" if most is None else f"{most:,.0f}/s", str(one.get("chunk_size") or "by time"),
            f"{one['duty']:.0%} of the time: {one['throttled']}" if one.get("throttled") else "",
        )  # fmt: skip
    console.print(table)


def jobs(as_json: JsonOption = False) -> None:
    """Which backfills and verifies this user has running here, and how far they are. Exit status 1 if none."""
    try:
        answers = [answer for path in sorted(folder().glob("job-*.sock")) if (answer := _ask(path, "status"))]
    except errors.ConfigurationError as cause:
        fail(str(cause), Exit.WRONG_USE, as_json=as_json)
    answers = [answer for answer in answers if answer["ok"]]
    if not answers:
        fail("no job runs here", Exit.FOUND, as_json=as_json)
    _show(answers, as_json=as_json)


def pause(pid: PidOption = None, as_json: JsonOption = False) -> None:
    """Let a running backfill or verify wait after the chunk under way."""
    _tell("pause", pid, as_json=as_json)


def resume(pid: PidOption = None, as_json: JsonOption = False) -> None:
    """Let it go on."""
    _tell("resume", pid, as_json=as_json)


def rate(
    records: Annotated[
        str, typer.Argument(metavar="N", help="Records a second of all its workers, or none.")
    ],
    pid: PidOption = None,
    as_json: JsonOption = False,
) -> None:
    """Limit how fast it is."""
    _tell(f"rate {records}", pid, as_json=as_json)


def chunk_size(
    records: Annotated[str, typer.Argument(metavar="N", help="Records in a transaction, or none: by time.")],
    pid: PidOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set how much it does at once."""
    _tell(f"chunk-size {records}", pid, as_json=as_json)


def stop(pid: PidOption = None, as_json: JsonOption = False) -> None:
    """End it after the chunk under way, as Ctrl-C does; the same command goes on later."""
    _tell("stop", pid, as_json=as_json)


def add_to(main: typer.Typer) -> None:
    """Put these commands into the main one."""
    for command in (jobs, pause, resume, rate, stop):
        main.command()(command)
    main.command("chunk-size")(chunk_size)
