"""Bulk runs in PostgreSQL: what is to be done, in pieces, and who does which of them.

A piece belongs to whoever has its lease. Every chunk of it ends with `Runs.checkpoint` in its own transaction, which
fails where the lease has gone to somebody else: so a worker that slept, and wakes up, undoes its chunk, and nothing is
done twice. A lease ends with its session (a killed worker's piece is free at once) or after `LEASE` seconds without a
checkpoint (a worker that hangs, or a host that is gone).
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, LiteralString

import orjson
from psycopg import AsyncConnection, sql

from crossfade import errors
from crossfade.entity import Entity

#: Seconds without a checkpoint after which others may take a piece. A chunk takes about one.
LEASE = 60.0


class LeaseLost(Exception):
    """Another worker has this piece now, or the run was given up; the chunk under way has been undone."""


@dataclass(frozen=True, slots=True)
class Run:
    """A row of ``crossfade.runs``; see schema.sql for the columns."""

    run: uuid.UUID
    epoch: int
    state: str
    counts: dict[str, Any]
    settings: dict[str, Any]


@dataclass(slots=True)
class Piece:
    """A piece of a run that this session has leased.

    Attributes:
        after, last, position, pending: BSON, see schema.sql.
        counts: of this piece, so far.
    """

    run: uuid.UUID
    number: int
    lease: uuid.UUID
    after: bytes | None
    last: bytes | None
    position: bytes | None
    pending: bytes | None
    counts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Steering:
    """What is asked of the workers of a run while it goes on.

    Attributes:
        paused, stopped: wait; end after the chunk under way.
        rate: records a second of all workers together; None: as many as it can.
        chunk_size: records in a chunk; None: by time.
        duty: part of the time that workers may work (above 0, up to 1); the throttle sets it.
        workers: that are at work now.
    """

    paused: bool = False
    stopped: bool = False
    rate: float | None = None
    chunk_size: int | None = None
    duty: float = 1.0
    workers: int = 1

    @classmethod
    def of(cls, stored: Mapping[str, Any], workers: int) -> Steering:
        """Of ``crossfade.runs.steering``; names that are not known are passed over."""
        known = {name: stored[name] for name in cls.__slots__ if name in stored and name != "workers"}
        return cls(**known, workers=max(workers, 1))


class Runs:
    """The bulk runs, over one connection (`crossfade.stores.bulk_postgres.BulkPostgres.runs`)."""

    def __init__(
        self, connection: AsyncConnection[Any], translated: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._connection = connection
        self._translated = translated
        self._me = f"{socket.gethostname()}:{os.getpid()}"

    @asynccontextmanager
    async def _holding(self) -> AsyncIterator[None]:
        """A transaction that waits for whoever else has a run's row.

        That one has it for no longer than a commit takes. The session's own limit is for the rows of records, and on
        a slow machine a commit takes longer.
        """
        with self._translated():
            async with self._connection.transaction():
                await self._connection.execute(
                    "SELECT set_config('lock_timeout', %s, true)", [f"{int(LEASE)}s"]
                )
                yield

    async def latest(
        self, migration: str, entity: Entity, kind: str, *, state: str | None = None
    ) -> Run | None:
        """The run of this kind that began last; ``state``: of those in this one."""
        return await self._run(
            "migration = %s AND entity = %s AND kind = %s AND (%s::text IS NULL OR state = %s)",
            [migration, entity.name, kind, state, state],
        )

    async def newer(self, one: Run, other: Run) -> Run:
        """Which of two runs began later."""
        found = await self._run("run = ANY(%s)", [[one.run, other.run]])
        return other if found is not None and found.run == other.run else one

    async def get(self, run: str) -> Run:
        """The run with this id.

        Raises:
            crossfade.errors.ConfigurationError: there is none.
        """
        found = await self._run("run = %s::uuid", [run])
        if found is None:
            raise errors.ConfigurationError(f"there is no run {run} in this database: is it the right one?")
        return found

    async def _run(self, where: LiteralString, parameters: Sequence[Any]) -> Run | None:
        query = sql.SQL(
            "SELECT run, epoch, state, counts::text, settings::text FROM crossfade.runs WHERE {} "
            "ORDER BY started_at DESC LIMIT 1"
        ).format(sql.SQL(where))
        with self._translated():
            row = await (await self._connection.execute(query, parameters)).fetchone()
        if row is None:
            return None
        run, epoch, found, counts, settings = row
        return Run(run, epoch, found, orjson.loads(counts), orjson.loads(settings))

    async def begin(
        self,
        migration: str,
        entity: Entity,
        kind: str,
        *,
        epoch: int,
        settings: Mapping[str, Any],
        pieces: Sequence[tuple[bytes | None, bytes | None]],
        more: Mapping[str, Any] | None = None,
        restart: bool = False,
    ) -> Run:
        """Begin a run, or join the one that somebody else began meanwhile with the same epoch and settings.

        Others of this kind that were not finished count as given up.

        Args:
            pieces: ``after`` and ``last`` of each.
            more: settings of a new run that do not matter for joining one.
            restart: begin a new one, whatever there is.

        Raises:
            crossfade.errors.Busy: ``restart``, and somebody is at work on the present one.
        """
        run = Run(uuid.uuid4(), epoch, "running", {}, {**settings, **(more or {})})
        async with self._holding():
            await self._connection.execute(
                "SELECT pg_advisory_xact_lock(hashtextextended(%s, 3))",
                [f"{kind}:{migration}:{entity.name}"],
            )
            last = await self.latest(migration, entity, kind)
            if last is not None and last.state == "running":
                same = all(last.settings.get(name) == value for name, value in settings.items())
                if not restart and last.epoch == epoch and same:
                    return last
                if await self._workers(last.run):
                    raise errors.Busy(
                        f"another {kind} of {entity.name} is running, with other settings; wait for it or stop it"
                    )
            await self._connection.execute(
                "UPDATE crossfade.runs SET state = 'abandoned', updated_at = now() "
                "WHERE migration = %s AND entity = %s AND kind = %s AND state = 'running'",
                [migration, entity.name, kind],
            )
            await self._connection.execute(
                "INSERT INTO crossfade.runs (run, migration, entity, kind, epoch, state, settings) "
                "VALUES (%s, %s, %s, %s, %s, 'running', %s::jsonb)",
                [run.run, migration, entity.name, kind, epoch, orjson.dumps(run.settings).decode()],
            )
            await self._connection.cursor().executemany(
                "INSERT INTO crossfade.ranges (run, number, after, last) VALUES (%s, %s, %s, %s)",
                [(run.run, number, after, last) for number, (after, last) in enumerate(pieces)],
            )
        return run

    async def _workers(self, run: uuid.UUID) -> int:
        cursor = await self._connection.execute(
            "SELECT count(*) FROM crossfade.ranges AS r WHERE run = %s AND crossfade.is_leased(r)", [run]
        )
        [(workers,)] = await cursor.fetchall()
        return int(workers)

    async def claim(self, run: Run) -> Piece | None:
        """Lease a piece that nobody works on; None: there is none."""
        lease = uuid.uuid4()
        with self._translated():
            cursor = await self._connection.execute(
                "UPDATE crossfade.ranges SET lease = %(lease)s, leased_by = %(me)s, backend = pg_backend_pid(), "
                "leased_until = clock_timestamp() + make_interval(secs => %(seconds)s) "
                "WHERE run = %(run)s AND number = (SELECT r.number FROM crossfade.ranges AS r "
                "JOIN crossfade.runs AS o USING (run) WHERE r.run = %(run)s AND r.state = 'open' "
                "AND o.state = 'running' AND NOT crossfade.is_leased(r) ORDER BY r.number LIMIT 1 "
                "FOR UPDATE OF r SKIP LOCKED) "
                "RETURNING number, after, last, position, pending, counts::text",
                {"lease": lease, "me": self._me, "seconds": LEASE, "run": run.run},
            )
            row = await cursor.fetchone()
        if row is None:
            return None
        number, after, last, position, pending, counts = row
        return Piece(run.run, number, lease, after, last, position, pending, orjson.loads(counts))

    async def checkpoint(
        self,
        piece: Piece,
        *,
        position: bytes | None,
        pending: bytes | None,
        counts: Mapping[str, Any],
        complete: bool = False,
    ) -> Steering:
        """Note how far a piece is, in the transaction of the rows that say so; what is asked of its worker.

        Raises:
            LeaseLost: the transaction must not be committed.
        """
        cursor = await self._connection.execute(
            "UPDATE crossfade.ranges AS r SET position = %(position)s, pending = %(pending)s, "
            "counts = %(counts)s::jsonb, state = CASE WHEN %(complete)s THEN 'complete' ELSE r.state END, "
            "lease = CASE WHEN %(complete)s THEN NULL ELSE r.lease END, "
            "leased_until = clock_timestamp() + make_interval(secs => %(seconds)s) "
            "FROM crossfade.runs AS o WHERE r.run = %(run)s AND r.number = %(number)s AND r.lease = %(lease)s "
            "AND o.run = r.run AND o.state = 'running' RETURNING o.steering::text, "
            "(SELECT count(*) FROM crossfade.ranges AS r WHERE r.run = %(run)s AND crossfade.is_leased(r))",
            {
                "position": position, "pending": pending, "counts": orjson.dumps(dict(counts)).decode(),
                "complete": complete, "seconds": LEASE, "run": piece.run, "number": piece.number,
                "lease": piece.lease,
            },
        )  # fmt: skip
        row = await cursor.fetchone()
        if row is None:
            raise LeaseLost(f"piece {piece.number} of run {piece.run}")
        piece.position, piece.pending, piece.counts = position, pending, dict(counts)
        return Steering.of(orjson.loads(row[0]), row[1])

    async def keep(self, piece: Piece) -> Steering:
        """Keep a lease while nothing is to be noted.

        Raises:
            LeaseLost: it has gone.
        """
        with self._translated():
            return await self.checkpoint(
                piece, position=piece.position, pending=piece.pending, counts=piece.counts
            )

    async def finish_piece(self, piece: Piece, counts: Mapping[str, Any]) -> Steering:
        """Note that nothing is left of a piece.

        Raises:
            LeaseLost: it has gone.
        """
        with self._translated():
            return await self.checkpoint(
                piece, position=piece.position, pending=None, counts=counts, complete=True
            )

    async def release(self, piece: Piece) -> None:
        """Give a piece back, for whoever goes on."""
        with self._translated():
            await self._connection.execute(
                "UPDATE crossfade.ranges SET lease = NULL WHERE run = %s AND number = %s AND lease = %s",
                [piece.run, piece.number, piece.lease],
            )

    async def totals(self, run: Run) -> dict[str, int]:
        """The counts of all pieces together."""
        with self._translated():
            cursor = await self._connection.execute(
                "SELECT key, sum(value::bigint) FROM crossfade.ranges, jsonb_each_text(counts) WHERE run = %s "
                "GROUP BY key",
                [run.run],
            )
            return {name: int(number) for name, number in await cursor.fetchall()}

    async def open_pieces(self, run: Run) -> int:
        """How many pieces are not completed."""
        with self._translated():
            cursor = await self._connection.execute(
                "SELECT count(*) FROM crossfade.ranges WHERE run = %s AND state = 'open'", [run.run]
            )
            [(number,)] = await cursor.fetchall()
            return int(number)

    async def is_busy(self, run: Run) -> bool:
        """Whether somebody works on a piece of it."""
        with self._translated():
            return await self._workers(run.run) > 0

    async def finish(self, run: Run) -> bool:
        """Record that a run is done, with the sum of its counts; False: something is left of it."""
        async with self._holding():
            await self._connection.execute("SELECT FROM crossfade.runs WHERE run = %s FOR UPDATE", [run.run])
            counts = await self.totals(run)
            cursor = await self._connection.execute(
                "UPDATE crossfade.runs AS o SET state = 'complete', counts = %s::jsonb, updated_at = now(), "
                "finished_at = coalesce(finished_at, now()) WHERE run = %s AND state IN ('running', 'complete') "
                "AND NOT EXISTS (SELECT FROM crossfade.ranges AS r WHERE r.run = o.run AND r.state = 'open')",
                [orjson.dumps(counts).decode(), run.run],
            )
        return cursor.rowcount == 1

    async def steer(self, run: Run, fields: Mapping[str, Any]) -> None:
        """Ask something of the workers of a run; see `Steering`. A field that is None is as if it was never set."""
        async with self._holding():
            await self._connection.execute(
                "UPDATE crossfade.runs SET steering = jsonb_strip_nulls(steering || %s::jsonb), updated_at = now() "
                "WHERE run = %s",
                [orjson.dumps(dict(fields)).decode(), run.run],
            )

    async def probe(self, enough: int) -> tuple[float, float, int]:
        """How PostgreSQL does.

        Returns:
            Seconds that a small read took; that the slowest replica is behind (0 without one); and how many records
            MongoDB is owed, counted up to ``enough``.
        """
        began = time.perf_counter()
        with self._translated():
            await self._connection.execute("SELECT FROM crossfade.control LIMIT 1")
            took = time.perf_counter() - began
            cursor = await self._connection.execute(
                "SELECT coalesce(extract(epoch FROM max(replay_lag)), 0)::float8 FROM pg_stat_replication"
            )
            [(lag,)] = await cursor.fetchall()
            cursor = await self._connection.execute(
                "SELECT count(*) FROM (SELECT FROM crossfade.outbox LIMIT %s) AS o", [enough]
            )
            [(deliveries,)] = await cursor.fetchall()
        return took, lag, deliveries

    async def steering(self, run: Run) -> Steering:
        """What is asked of the workers of a run now."""
        with self._translated():
            cursor = await self._connection.execute(
                "SELECT steering::text FROM crossfade.runs WHERE run = %s", [run.run]
            )
            [(stored,)] = await cursor.fetchall()
            return Steering.of(orjson.loads(stored), await self._workers(run.run))
