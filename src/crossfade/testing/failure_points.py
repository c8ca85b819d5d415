"""Failure points: every await on a store is counted by running an operation, and any of them can be made to fail.

Design
    `FailurePoints` stands between one `Crossfade` and its two drivers, below everything that is ours: the stores
    translate the drivers' own exceptions, as they do in earnest. Whatever a store asks of its driver from now on is
    counted by itself; there is no list to keep.

    In MongoDB every command is a point. In PostgreSQL a connection taken from the pool, every statement outside a
    transaction, and every COMMIT are points: a transaction that does not get to its COMMIT has not happened, whichever
    of its statements was the last.

    After ``await points.run(operation)`` without failures `FailurePoints.points` is what can fail, and
    ``points.plan({point.place: ...})`` makes one of them fail in the next run. `Point.place` finds it again: what an
    operation does behind a commit runs beside its delivery, so the seventh await of one run is not the seventh of the
    next; of one task the awaits keep their order. Where what others do decides how often an operation looks, whoever
    runs it says which `FailurePoints.stage` it has come to. ``points.plan({7: ...})`` is for operations that only ever
    do one thing at a time. A worker that was killed asks its stores for nothing any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

import psycopg
from psycopg.pq import TransactionStatus
from psycopg_pool import PoolTimeout
from pymongo import _csot
from pymongo.asynchronous.cursor import AsyncCursor
from pymongo.errors import AutoReconnect, NetworkTimeout, ServerSelectionTimeoutError

from crossfade.migration import Crossfade
from crossfade.stores.server import QUERIES

T = TypeVar("T")
#: Who hangs at a point hangs until the caller's deadline; no longer than this in seconds where it has none.
_FOREVER = 60.0


class Failure(StrEnum):
    """What can go wrong at a point."""

    #: No connection to be had: certainly not carried out.
    REFUSED = "refused"
    #: The connection breaks before the server acts; the caller cannot tell.
    REQUEST_LOST = "request lost"
    #: The server acts, and the connection breaks before it answers.
    ANSWER_LOST = "answer lost"
    #: The server acts at once, and its answer comes after the deadline.
    ANSWER_LATE = "answer late"
    #: Nothing comes within the deadline, and the server acts after that, at `FailurePoints.deliver_late`.
    REQUEST_LATE = "request late"
    #: The process ends before the request leaves it.
    KILLED_BEFORE = "killed before"
    #: The process ends when the server has acted.
    KILLED_AFTER = "killed after"

    @property
    def kills(self) -> bool:
        """Whether the process ends of it."""
        return self in (Failure.KILLED_BEFORE, Failure.KILLED_AFTER)

    @property
    def waits(self) -> bool:
        """Whether a deadline passes."""
        return self in (Failure.ANSWER_LATE, Failure.REQUEST_LATE)


#: How a connection can fail to be had; a process that ends there ended at the point before, or at the next.
_CONNECTING = (Failure.REFUSED, Failure.ANSWER_LATE)


#: The stage, what the task that asks is running, the call, and which of its calls there it is, from 0.
Place = tuple[str, str, str, int]


class Killed(BaseException):
    """The process ended here."""


@dataclass(frozen=True)
class Point:
    """One await on a store.

    Attributes:
        number: from 0, in the order of one run.
        store: "mongo" or "postgres".
        call: what was asked for: ``users.find_one_and_update``, ``COMMIT``, a named query.
        failures: what can go wrong there.
        place: the same point in another run, also where its number is another one.
    """

    number: int
    store: str
    call: str
    failures: tuple[Failure, ...]
    place: Place

    def __str__(self) -> str:
        return f"{self.number} ({self.store}: {self.call})"


@dataclass
class FailurePoints:
    """Counts what a `Crossfade` asks of its stores, and lets it fail; made before it is entered.

    Attributes:
        points: of the run under way, or of the last.
        struck: the planned failures that have happened, by the point they met.
        kill: what ends the process; raises `Killed` where it returns.
        killed: the process has ended: nothing is asked of any store any more.
        stage: how far the operation has come, as whoever runs it says; for `Point.place`.
    """

    cf: Crossfade
    kill: Callable[[], None] = lambda: None
    points: list[Point] = field(default_factory=list)
    struck: dict[int, Failure] = field(default_factory=dict)
    killed: bool = False
    stage: str = ""
    _counting: bool = False
    _plan: Mapping[Any, Failure] = field(default_factory=dict)
    _calls: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    _lasting: bool = False
    _dead: str | None = None
    _late: set[asyncio.Task[None]] = field(default_factory=set)
    _deliver: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        mongo, postgres = self.cf.mongo, self.cf.postgres
        # Whatever the stores call from here on goes through a point: the types are only seemingly the drivers'.
        mongo.database = _Database(mongo.database, self)  # type: ignore[assignment]
        mongo._raw = _Database(mongo._raw, self)  # type: ignore[assignment]
        mongo._opened.clear()
        postgres._pool = _Pool(postgres._pool, self)  # type: ignore[assignment]

    def plan(
        self, failures: Mapping[int, Failure] | Mapping[Place, Failure], *, lasting: bool = False
    ) -> None:
        """Let the points of these numbers, or places, fail in the next run.

        ``lasting``: their store is dead from the first of them on.
        """
        self._plan, self._lasting = dict(failures), lasting

    async def run(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Carry the operation out, counting, and with the failures that were planned."""
        self.points, self.struck, self._counting = [], {}, True
        self._calls.clear()
        self._deliver.clear()
        try:
            answer = await operation()
            # What goes on behind the caller's back belongs to it; in this order, so that the numbers are the same ones.
            if behind := self.cf.postgres.behind:
                await asyncio.wait(behind, timeout=_FOREVER)
            return answer
        finally:
            self._counting = False
            self._plan, self._lasting, self._dead = {}, False, None

    async def deliver_late(self) -> None:
        """The requests that were held back reach their servers now."""
        self._deliver.set()
        if self._late:
            await asyncio.wait(self._late)
        self._late.clear()

    def end(self) -> None:
        """Nothing of this worker reaches a store any more."""
        self.killed = True
        for task in self._late:
            task.cancel()

    # --- at a point ------------------------------------------------------------------------------------------

    async def at(
        self,
        store: str,
        call: str,
        act: Callable[[], Awaitable[T]],
        *,
        sever: Callable[[], Awaitable[None]] | None = None,
        hold: Callable[[], None] | None = None,
        connecting: bool = False,
    ) -> T:
        """``act``, or its failure. ``sever`` breaks the connection; ``hold`` keeps it for a request on its way."""
        if self.killed:
            raise Killed
        if not self._counting:
            return await act()
        point = Point(
            len(self.points), store, call, _failures(store, connecting=connecting), self._place(call)
        )
        self.points.append(point)
        self._calls[point.place[:3]] += 1
        failure = self._failure_at(point)
        if failure is None:
            answer = await act()
            if self.killed:
                raise Killed
            return answer
        self.struck[point.number] = failure
        if not connecting and failure in (Failure.ANSWER_LOST, Failure.ANSWER_LATE, Failure.KILLED_AFTER):
            # That the server refused is an answer, too, and nobody hears it.
            with contextlib.suppress(Exception):
                await act()
        if failure.kills:
            self._die()
        if failure.waits:
            await self._wait_in_vain(store, failure, act, hold)
        if sever is not None:
            await sever()
        if failure.kills:
            raise Killed
        raise _exception(store, failure, connecting=connecting)

    def _place(self, call: str) -> Place:
        task = asyncio.current_task()
        assert task is not None
        where = (self.stage, getattr(task.get_coro(), "__qualname__", ""), call)
        return (*where, self._calls[where])

    def planned_next(self, call: str) -> Failure | None:
        """What is planned for the next point, if it is this call."""
        if not self._counting:
            return None
        return self._plan.get(len(self.points)) or self._plan.get(self._place(call))

    def _failure_at(self, point: Point) -> Failure | None:
        planned = self._plan.get(point.number) or self._plan.get(point.place)
        if planned is not None and planned in point.failures:
            if self._lasting:
                self._dead = point.store
            return planned
        if self._dead == point.store:
            hangs = any(failure.waits for failure in self._plan.values())
            if hangs:
                return Failure.ANSWER_LATE if point.call == "connect" else Failure.REQUEST_LATE
            return Failure.REFUSED if Failure.REFUSED in point.failures else Failure.REQUEST_LOST
        return None

    def _die(self) -> None:
        self.killed = True
        self.kill()

    async def _wait_in_vain(
        self,
        store: str,
        failure: Failure,
        act: Callable[[], Awaitable[Any]],
        hold: Callable[[], None] | None,
    ) -> None:
        async def later() -> None:
            await self._deliver.wait()
            with contextlib.suppress(Exception):
                await act()

        def send() -> None:
            if failure is Failure.REQUEST_LATE:
                if hold is not None:
                    hold()
                # In a context of its own: the caller's deadline is not the request's.
                self._late.add(asyncio.create_task(later(), context=contextvars.Context()))

        left = _csot.remaining() if store == "mongo" else None
        try:
            await asyncio.sleep(_FOREVER if left is None else max(0.0, left))
        finally:
            # PostgreSQL's caller does not wait to the end: it is cancelled at the deadline.
            send()


def _failures(store: str, *, connecting: bool) -> tuple[Failure, ...]:
    if connecting:
        return _CONNECTING
    return tuple(failure for failure in Failure if store == "mongo" or failure is not Failure.REFUSED)


def _exception(store: str, failure: Failure, *, connecting: bool) -> Exception:
    text = f"a planned failure: {failure}"
    if store == "postgres":
        return PoolTimeout(text) if connecting else psycopg.OperationalError(text)
    if failure is Failure.REFUSED:
        return ServerSelectionTimeoutError(text)
    return NetworkTimeout(text) if failure.waits else AutoReconnect(text)


# --- MongoDB ---------------------------------------------------------------------------------------------------


class _Database:
    """A database whose collections ask through a point."""

    def __init__(self, inner: Any, points: FailurePoints) -> None:
        self._inner, self._points = inner, points

    def __getitem__(self, name: str) -> _Collection:
        return _Collection(self._inner[name], name, self._points)

    async def command(self, command: str | Mapping[str, Any], **how: Any) -> Any:
        verb, of = (command, "") if isinstance(command, str) else next(iter(command.items()))
        return await self._points.at(
            "mongo", f"{of}.{verb}".lstrip("."), lambda: self._inner.command(command, **how)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Collection:
    """A collection of which every command is a point."""

    def __init__(self, inner: Any, name: str, points: FailurePoints) -> None:
        self._inner, self._name, self._points = inner, name, points

    def __getattr__(self, name: str) -> Any:
        there = getattr(self._inner, name)
        if not callable(there):
            return there
        call = f"{self._name}.{name}"
        if inspect.iscoroutinefunction(there):

            async def ask(*args: Any, **how: Any) -> Any:
                return await self._points.at("mongo", call, lambda: there(*args, **how))

            return ask

        def open_(*args: Any, **how: Any) -> Any:
            made = there(*args, **how)
            return _Cursor(made, call, self._points) if isinstance(made, AsyncCursor) else made

        return open_


class _Cursor:
    """A cursor of which every round trip is a point."""

    def __init__(self, inner: Any, call: str, points: FailurePoints) -> None:
        self._inner, self._call, self._points = inner, call, points

    def __aiter__(self) -> _Cursor:
        return self

    async def __anext__(self) -> Any:
        # What has come with the last batch is here already.
        if self._inner._data or not self._inner.alive:
            return await self._inner.next()
        return await self._ended(self._points.at("mongo", self._call, lambda: _next(self._inner)))

    @staticmethod
    async def _ended(asked: Awaitable[tuple[Any, ...]]) -> Any:
        found = await asked
        if not found:
            raise StopAsyncIteration
        return found[0]

    async def next(self) -> Any:
        return await self.__anext__()

    async def to_list(self, *args: Any) -> Any:
        return await self._points.at("mongo", self._call, lambda: self._inner.to_list(*args))

    def __getattr__(self, name: str) -> Any:
        there = getattr(self._inner, name)
        if name not in ("sort", "limit", "skip", "batch_size", "hint"):
            return there

        def refine(*args: Any, **how: Any) -> _Cursor:
            there(*args, **how)
            return self

        return refine


async def _next(cursor: Any) -> tuple[Any, ...]:
    """The next document, or nothing: the end of a cursor is an answer, and no failure."""
    try:
        return (await cursor.next(),)
    except StopAsyncIteration:
        return ()


# --- PostgreSQL ------------------------------------------------------------------------------------------------

_NAMES = {query: name for name, query in QUERIES.items()}


class _Pool:
    """A pool of which taking a connection is a point."""

    def __init__(self, inner: Any, points: FailurePoints) -> None:
        self._inner, self._points = inner, points

    async def getconn(self, timeout: float | None = None) -> _Connection:
        taken = await self._points.at(
            "postgres", "connect", lambda: self._inner.getconn(timeout=timeout), connecting=True
        )
        return _Connection(taken, self._points)

    async def putconn(self, connection: _Connection) -> None:
        if not connection.held:
            await self._inner.putconn(connection._inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Connection:
    """A connection of which every statement outside a transaction, and every COMMIT, is a point.

    Attributes:
        held: a request of it is on its way and will arrive late; nobody else may have it.
    """

    def __init__(self, inner: Any, points: FailurePoints) -> None:
        self._inner, self._points = inner, points
        self._inside = False
        self._pipeline: Any = None
        self.held = False

    async def execute(self, query: Any, parameters: Any = None) -> Any:
        if query == b"BEGIN":
            self._inside = True
        if self._inside and query != b"COMMIT":
            if self._points.killed:
                raise Killed
            return await self._inner.execute(query, parameters)
        self._inside = False
        name = "on rows"
        if isinstance(query, bytes):
            name = _NAMES.get(query, query.decode())
        return await self._at(name, lambda: self._inner.execute(query, parameters))

    async def _at(self, name: str, act: Callable[[], Awaitable[Any]]) -> Any:
        planned = self._points.planned_next(name)

        async def acted() -> Any:
            answer = await act()
            if planned is not None and self._pipeline is not None:
                await self._pipeline.sync()
            if self.held:
                await self._inner.close()
            return answer

        if planned is not None and self._pipeline is not None:
            # What was sent before this point has arrived.
            await self._pipeline.sync()
        return await self._points.at("postgres", name, acted, sever=self._inner.close, hold=self._hold)

    def _hold(self) -> None:
        self.held = True

    @contextlib.asynccontextmanager
    async def pipeline(self) -> AsyncIterator[Any]:
        async with self._inner.pipeline() as pipeline:
            self._pipeline = pipeline
            try:
                yield pipeline
            finally:
                self._pipeline = None

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        transaction = self._inner.transaction()
        await transaction.__aenter__()
        self._inside = True
        try:
            yield transaction
        except BaseException as cause:
            self._inside = False
            if not await transaction.__aexit__(type(cause), cause, cause.__traceback__):
                raise
        else:
            self._inside = False
            await self._at("COMMIT", lambda: transaction.__aexit__(None, None, None))

    async def rollback(self) -> None:
        if not self.held:
            await self._inner.rollback()

    @property
    def info(self) -> Any:
        return _Idle if self.held else self._inner.info

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Idle:
    """What is to be seen of a connection whose request is still on its way: nothing."""

    transaction_status = TransactionStatus.IDLE
