"""One PostgreSQL, asked within deadlines.

Design of *bounded*: a call runs as a task of its own and the caller stops waiting at its deadline. The task
is cancelled and cleans up behind the caller's back, because cancelling a query on a server that hangs takes
seconds itself. At most as many of these linger as the pool has connections. An image that still arrives
later does no harm: applying is idempotent and order does not matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Coroutine, Mapping
from importlib import resources
from types import TracebackType
from typing import Any, TypeVar

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from crossfade import errors
from crossfade.stores.errors import RuleBroken, Unanswered
from crossfade.stores.rows import NoRows, NoRowsDumper

STORE = "postgres"

_T = TypeVar("_T")
_NAMED = re.compile(r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)", re.MULTILINE | re.DOTALL)


def _load_queries() -> dict[str, bytes]:
    text = resources.files(__package__).joinpath("queries.sql").read_text(encoding="utf-8")
    return {name: body.strip().encode() for name, body in _NAMED.findall(text)}


QUERIES = _load_queries()


class _RawJson(Loader):
    """JSONB as the bytes that PostgreSQL sent: `values` decodes them, with BSON's types."""

    def load(self, data: Buffer) -> bytes:
        return bytes(data)


async def _configure(connection: AsyncConnection[Any]) -> None:
    connection.adapters.register_loader("jsonb", _RawJson)
    connection.adapters.register_loader("json", _RawJson)
    connection.adapters.register_dumper(NoRows, NoRowsDumper)
    # Every statement of every entity stays prepared: there are a few dozen.
    connection.prepared_max = 1000


def address_of(url: str) -> str:
    """Host and port, for people.

    Raises:
        crossfade.errors.ConfigurationError: the URL cannot be understood, or names no database.
    """
    try:
        parts = conninfo_to_dict(url)
    except psycopg.ProgrammingError as cause:
        raise errors.ConfigurationError(
            f"DATABASE_URL cannot be used: {str(cause).strip()}. "
            "Write postgresql://user:password@host:port/database"
        ) from None
    if not parts.get("dbname"):
        raise errors.ConfigurationError(
            "DATABASE_URL names no database: write postgresql://user:password@host:port/database"
        )
    return f"{parts.get('host', 'the local socket')}:{parts.get('port', 5432)}"


class PostgresServer:
    """A database of one PostgreSQL, and its answers within a deadline.

    Args:
        url: ``postgresql://...``.
        max_pool: connections at most.
        connect_timeout: seconds.

    Raises:
        crossfade.errors.ConfigurationError: the URL cannot be understood.
    """

    def __init__(self, url: str, *, max_pool: int = 20, connect_timeout: int = 2) -> None:
        self.address = address_of(url)
        self._url = url
        self._connect_timeout = connect_timeout
        self._pool: AsyncConnectionPool[AsyncConnection[Any]] = AsyncConnectionPool(
            url,
            min_size=1,
            max_size=max_pool,
            open=False,
            configure=_configure,
            kwargs={
                "autocommit": True,
                "connect_timeout": connect_timeout,
                "application_name": "crossfade",
                # A worker that dies or sleeps inside a transaction must not hold a switch or a row.
                "options": "-c idle_in_transaction_session_timeout=1500 -c synchronous_commit=on -c TimeZone=UTC",
            },
            # A reconnect gives up soon and is asked for anew by the next call.
            reconnect_timeout=1.0,
        )
        self._lingering: set[asyncio.Task[Any]] = set()
        #: What goes on behind commits that were answered already.
        self.behind: set[asyncio.Task[None]] = set()
        self._weeding: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin to fill the pool; does not wait for the server."""
        await self._pool.open(wait=False)

    async def close(self) -> None:
        """Close every connection; waits for no query that hangs."""
        for task in (*self._lingering, *self.behind, *([self._weeding] if self._weeding else [])):
            task.cancel()
        await self._pool.close(timeout=0.5)

    def pool_wait(self) -> float:
        """Seconds that a connection was waited for since this was asked last, on average; 0: nobody had to."""
        stats = self._pool.pop_stats()
        return stats.get("requests_wait_ms", 0) / 1000 / max(stats.get("requests_num", 0), 1)

    async def _bounded(self, work: Coroutine[Any, Any, _T], timeout: float) -> _T:
        """Run ``work``, wait at most ``timeout`` seconds, and translate what the driver raises."""
        answer: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        await self._wait_for(answer, _begin(_answering(answer, work), work), timeout)
        return answer.result()

    async def _until(self, reached: asyncio.Future[Any], task: asyncio.Task[None], timeout: float) -> None:
        """The same until the task, one of `reaching`, has set ``reached``; it goes on behind the caller's back."""
        await self._wait_for(reached, task, timeout)
        self._leave(task)

    async def _wait_for(self, answer: asyncio.Future[Any], task: asyncio.Task[None], timeout: float) -> None:
        """Wait for an answer that a task gives, in a turn of the loop: each turn lies between it and the caller.

        The task is one of its own because what the driver does when it is cancelled takes its time, too.
        """
        timer = asyncio.get_running_loop().call_later(timeout, _give_up, answer)
        try:
            with self._translated():
                await answer
        except asyncio.CancelledError:
            self._abandon(task)
            raise
        except _NoAnswer:
            self._abandon(task)
            raise Unanswered(STORE, self.unreachable(f"no answer within {timeout:g} s")) from None
        finally:
            timer.cancel()

    def _leave(self, task: asyncio.Task[None]) -> None:
        """To go on behind the caller's back."""
        self.behind.add(task)
        task.add_done_callback(self._forget)

    def _abandon(self, task: asyncio.Task[Any]) -> None:
        task.cancel()
        self._lingering.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._lingering.discard(task)
        self.behind.discard(task)
        if not task.cancelled():
            task.exception()  # nobody waits for it any more; seen here, so that asyncio does not complain

    @contextlib.contextmanager
    def _translated(self) -> Any:
        try:
            yield
        except (PoolTimeout, PoolClosed, TooManyRequests) as cause:
            raise errors.StoreUnavailable(STORE, self.unreachable("no connection to be had")) from cause
        except (psycopg.errors.UniqueViolation, psycopg.errors.ExclusionViolation) as cause:
            raise RuleBroken(
                STORE,
                cause.diag.constraint_name or "",
                f"PostgreSQL: another row holds this value of {cause.diag.constraint_name}",
            ) from cause
        except psycopg.errors.IntegrityError as cause:
            raise RuleBroken(
                STORE,
                cause.diag.constraint_name or "",
                f"PostgreSQL refuses the row: {cause.diag.constraint_name or cause.diag.message_primary}",
                taken=False,
            ) from cause
        except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn) as cause:
            raise errors.SchemaNotReady(
                f"PostgreSQL at {self.address}: {cause.diag.message_primary}. The schema is not at head: run "
                "the application's migrations (alembic upgrade head) and `crossfade init`"
            ) from cause
        except (psycopg.errors.DataError, psycopg.errors.ProgramLimitExceeded) as cause:
            raise errors.Quarantined(
                f"PostgreSQL cannot hold this record: {cause.diag.message_primary}"
            ) from cause
        except (psycopg.errors.InvalidPassword, psycopg.errors.InvalidAuthorizationSpecification) as cause:
            raise errors.StoreUnavailable(
                STORE, self.unreachable("it refuses the user or password in DATABASE_URL")
            ) from cause
        except psycopg.Error as cause:
            raise Unanswered(STORE, self.unreachable(_first_line(cause))) from cause

    def unreachable(self, cause: str) -> str:
        """What to tell of this store where it cannot be asked, and what to do."""
        return (
            f"cannot reach PostgreSQL at {self.address} ({cause}). Is it running? "
            "DATABASE_URL sets the address."
        )

    def _connection(self, timeout: float) -> _Connection:
        """A connection of the pool, to be had within ``timeout`` seconds; given back outside any transaction."""
        return _Connection(self, timeout)

    async def _ask(self, name: str, timeout: float, **parameters: Any) -> list[tuple[Any, ...]]:
        """One named query outside any transaction; its rows, [] for one that gives none."""

        async def work() -> list[tuple[Any, ...]]:
            async with self._connection(timeout) as connection:
                cursor = await connection.execute(QUERIES[name], parameters)
                return await cursor.fetchall() if cursor.description else []

        return await self._bounded(work(), timeout)

    async def _count(self, name: str, timeout: float, **parameters: Any) -> int:
        """One named statement outside any transaction; how many rows it touched."""

        return await self._execute(QUERIES[name], timeout, parameters)

    async def _execute(
        self, statement: bytes | sql.Composed, timeout: float, parameters: Mapping[str, Any] | None = None
    ) -> int:
        async def work() -> int:
            async with self._connection(timeout) as connection:
                return (await connection.execute(statement, parameters)).rowcount

        return await self._bounded(work(), timeout)

    async def ping(self, timeout: float = 1.0) -> float:
        """Seconds that a round trip took.

        Raises:
            crossfade.errors.StoreUnavailable: no answer within ``timeout`` seconds.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        await self._ask("now", timeout)
        return loop.time() - began

    async def connect_once(self, timeout: float = 3.0) -> None:
        """Open one connection outside the pool, to learn why none can be had.

        Raises:
            crossfade.errors.StoreUnavailable: with the server's own reason (a wrong password, no such
                database, connection refused).
        """

        async def work() -> None:
            connection = await AsyncConnection.connect(self._url, connect_timeout=self._connect_timeout)
            await connection.close()

        try:
            await self._bounded(work(), timeout)
        except Unanswered as cause:
            raise errors.StoreUnavailable(STORE, str(cause)) from cause.__cause__


class _Connection:
    """See `PostgresServer._connection`. A class: generators' turns cost a write as much as its own work does."""

    __slots__ = ("_connection", "_store", "_timeout")

    def __init__(self, store: PostgresServer, timeout: float) -> None:
        self._store, self._timeout = store, timeout

    async def __aenter__(self) -> AsyncConnection[Any]:
        self._connection: AsyncConnection[Any] = await self._store._pool.getconn(self._timeout)
        return self._connection

    async def __aexit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None
    ) -> None:
        store, connection = self._store, self._connection
        try:
            if (
                isinstance(cause, psycopg.Error)
                and connection.broken
                and (store._weeding is None or store._weeding.done())
            ):
                # The server went away: the idle connections of that time are dead, too.
                store._weeding = asyncio.create_task(store._pool.check())
            if connection.info.transaction_status not in (TransactionStatus.IDLE, TransactionStatus.UNKNOWN):
                with contextlib.suppress(psycopg.Error):
                    await connection.rollback()
        finally:
            await store._pool.putconn(connection)


#: What ends a task, or the loop, beside whoever waits for its answer.
_ENDS = (asyncio.CancelledError, KeyboardInterrupt, SystemExit)


class _NoAnswer(Exception):
    """Nothing was answered in time."""


def _give_up(answer: asyncio.Future[Any]) -> None:
    if not answer.done():
        answer.set_exception(_NoAnswer())


def reaching(reached: asyncio.Future[Any], work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that does ``work``; who waits for ``reached``, which that sets on its way, hears what failed.

    The task raises what fails behind that.
    """
    return _begin(_reaching(reached, work), work)


def _begin(task_of: Coroutine[Any, Any, None], work: Coroutine[Any, Any, Any]) -> asyncio.Task[None]:
    """A task that does ``work``; where the loop ends before its first turn, nobody complains that it never was."""
    task = asyncio.create_task(task_of)
    task.add_done_callback(lambda _: work.close())
    return task


async def _answering(answer: asyncio.Future[_T], work: Coroutine[Any, Any, _T]) -> None:
    """Do it, and answer with what it gives or raises."""
    try:
        found = await work
    except BaseException as cause:
        _fail(answer, cause)
        if isinstance(cause, _ENDS):
            raise
    else:
        if not answer.done():
            answer.set_result(found)


async def _reaching(reached: asyncio.Future[Any], work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except BaseException as cause:
        behind = reached.done()
        _fail(reached, cause)
        if behind or isinstance(cause, _ENDS):
            raise


def _fail(answer: asyncio.Future[Any], cause: BaseException) -> None:
    if answer.done():
        return
    if isinstance(cause, asyncio.CancelledError):
        answer.cancel()
        return
    answer.set_exception(cause)
    answer.exception()  # perhaps nobody waits for it any more; seen here, so that asyncio does not complain


def _first_line(cause: BaseException) -> str:
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
