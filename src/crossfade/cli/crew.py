"""Several processes at one bulk run: any executor, a pool of this machine's cores, or a Dask cluster.

A worker is told what to do and by whom, never an address or a password: it has those of its own environment. Which
piece it does, it learns from PostgreSQL (`crossfade.stores.runs`), so workers may come, go and die, and it does not
matter how many there are.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from crossfade import errors
from crossfade.bulk.backfill import Backfill
from crossfade.bulk.verify import Verify
from crossfade.cli.context import Exit, address, open_migration, problems, status_of
from crossfade.entity import Entity
from crossfade.migration import Migration
from crossfade.record import Settled
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres
from crossfade.stores.loading import OnStep

#: Seconds between two looks at how far the workers are.
_LOOK = 0.5
#: Workers that may die before a run is given up, for each that there are: something kills them, and it is no accident.
_DEATHS = 5

#: Seconds that a cluster may be without any worker: one that died is replaced by then, or by nobody.
_UNMANNED = 30.0
#: Niceness of a bulk command and its processes: what else runs on their machine goes first.
_NICE = 10

ExecutorFactory = Callable[[], AbstractContextManager[Executor]]


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is to do.

    Attributes:
        kind: "backfill", "verify" or "verify_fast".
        application: where its entities are, as of ``--app``.
        entity: name of the one.
        run: id of the run to work on.
        batch_size: documents in a chunk; None: by time.
    """

    kind: str
    application: str | None
    entity: str
    run: str
    batch_size: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an order: exceptions do not travel well between processes.

    Attributes:
        samples: what the report shows examples of, by name.
        error, status: why it ended, if it did, and the exit status of that.
    """

    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    error: str = ""
    status: Exit = Exit.DONE


def give_way() -> None:
    """Let everything else on this machine go first, from now on, before this process and those that it will start.

    So a service beside it keeps its processors; and since the probes of the throttle stand back, too, they notice when
    there are none left.
    """
    os.nice(max(0, _NICE - os.nice(0)))


@asynccontextmanager
async def bulk_target() -> AsyncIterator[BulkPostgres]:
    """A connection to PostgreSQL for one run; its leases end with it."""
    target = await BulkPostgres.connect(address("DATABASE_URL", "postgresql://app:secret@127.0.0.1:5432/app"))
    try:
        yield target
    finally:
        await target.close()


@asynccontextmanager
async def bulk_stores() -> AsyncIterator[tuple[BulkMongo, BulkPostgres]]:
    """Connections to both stores for one run."""
    source = BulkMongo(address("MONGO_URI", "mongodb://127.0.0.1:27017/app"))
    try:
        async with bulk_target() as target:
            yield source, target
    finally:
        source.close()


def backfill_of(
    migration: Migration,
    entity: Entity,
    source: BulkMongo,
    target: BulkPostgres,
    *,
    batch_size: int | None,
    on_progress: Callable[[Any], None] | None = None,
    loading: bool = False,
    on_step: OnStep | None = None,
) -> Backfill:
    """A backfill that settles by the migration's protocol what needs it."""
    control = migration.control

    async def settle_one(entity: Entity, id_: Any) -> None:
        if await migration.settler.settle_one(entity, id_, control) is Settled.PARKED:
            raise errors.CrossfadeError("PostgreSQL refuses it; see the log for the cause")

    async def on_behind(entity: Entity, ids: Any) -> None:
        # A row that is ahead has its own debt; a fork is lifted. One at a time: there are few.
        for id_ in ids:
            await migration.settler.settle_one(entity, id_, control)

    return Backfill(
        entity, source, target, migration=migration.name, epoch=control.epoch, batch_size=batch_size,
        settle_one=settle_one, on_behind=on_behind, on_progress=on_progress, loading=loading, on_step=on_step,
    )  # fmt: skip


def verify_of(
    migration: Migration,
    entity: Entity,
    source: BulkMongo,
    target: BulkPostgres,
    *,
    fast: bool,
    on_progress: Callable[[Any], None] | None = None,
) -> Verify:
    """A verify under the migration's present epoch."""
    return Verify(
        entity, source, target, migration=migration.name, epoch=migration.control.epoch, fast=fast,
        on_progress=on_progress,
    )  # fmt: skip


def work(order: Order) -> Outcome:
    """Do what an order says, as far as nobody else is at it. For a process, or a thread, of its own."""
    try:
        return asyncio.run(_work(order))
    except errors.CrossfadeError as cause:
        return Outcome(error=str(cause), status=status_of(cause))


async def _work(order: Order) -> Outcome:
    async with open_migration(order.application, begin=False) as migration, bulk_stores() as (source, target):
        entity, run = migration.entities[order.entity], await target.runs.get(order.run)
        if order.kind == "backfill":
            made = backfill_of(migration, entity, source, target, batch_size=order.batch_size)
            report = await made.run(run, alone=False)
            return Outcome({"quarantined": report.quarantined, "parked": report.parked})
        await verify_of(migration, entity, source, target, fast=order.kind == "verify_fast").run(
            run, alone=False
        )
        return Outcome()


def _as_worker(parent: int) -> None:
    """Make a process of a pool end with its command, and with nothing else."""
    # Whoever presses Ctrl-C means the command, and that says when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        # The command was killed: nobody would ever tell this process. Any instant is as good as another to die.
        os._exit(1)

    threading.Thread(target=watch, name="crossfade-parent", daemon=True).start()


@contextmanager
def pool(workers: int) -> Iterator[Executor]:
    """So many processes on this machine."""
    spawning = multiprocessing.get_context("spawn")
    made = ProcessPoolExecutor(workers, mp_context=spawning, initializer=_as_worker, initargs=(os.getpid(),))
    try:
        yield made
    except BaseException:
        # Whoever leads them is gone, and they would work on to the end. As above: any instant is as good as another.
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        made.shutdown(wait=True, cancel_futures=True)


@contextmanager
def dask(where: str) -> Iterator[tuple[Executor, int, Callable[[], bool]]]:
    """A Dask cluster, how many workers it has, and whether there have been any of late (for a thread).

    Raises:
        crossfade.errors.ConfigurationError: the extra is not installed, or there is no scheduler or no worker.
    """
    try:
        import distributed
    except ImportError:
        raise errors.ConfigurationError(
            "--dask needs the extra: pip install 'crossfade[dask]' (here and on every worker)"
        ) from None
    try:
        connect: Any = distributed.Client
        client = connect(where, timeout=10, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as cause:
        raise errors.ConfigurationError(
            f"no Dask scheduler at {where}: {str(cause).splitlines()[0] if str(cause) else type(cause).__name__}"
        ) from None
    seen = time.monotonic()

    def is_manned() -> bool:
        nonlocal seen
        if client.scheduler_info(n_workers=-1)["workers"]:
            seen = time.monotonic()
        return time.monotonic() - seen < _UNMANNED

    try:
        workers = len(client.scheduler_info(n_workers=-1)["workers"])
        if not workers:
            raise errors.ConfigurationError(f"the Dask cluster at {where} has no worker")
        yield cast(Executor, client.get_executor(pure=False)), workers, is_manned
    finally:
        client.close()


async def lead(
    executor: ExecutorFactory,
    workers: int,
    order: Order,
    look: Callable[[], Awaitable[None]],
    is_manned: Callable[[], bool] = lambda: True,
) -> list[Outcome]:
    """Give ``workers`` workers an order and wait until none of them finds anything to do, or none is left.

    Args:
        executor: makes one; again, when the death of a worker has broken it.
        look: called now and then meanwhile: shows progress, passes on what is asked.
        is_manned: whether somebody is there to do it.

    Raises:
        crossfade.errors.CrossfadeError: workers died again and again.
    """
    outcomes: list[Outcome] = []
    deaths = 0
    left = workers
    while left:
        with executor() as crew:
            futures = {asyncio.wrap_future(crew.submit(work, order)) for _ in range(left)}
            left = 0
            while futures:
                done, futures = await asyncio.wait(futures, timeout=_LOOK)
                await look()
                if not done and not await asyncio.to_thread(is_manned):
                    for future in futures:
                        future.cancel()
                    problems.print(
                        "the cluster has no worker left; this command goes on alone", highlight=False
                    )
                    return outcomes
                for future in done:
                    try:
                        outcomes.append(future.result())
                    except asyncio.CancelledError:
                        left += 1
                    except Exception as cause:
                        if not isinstance(cause, BrokenExecutor) and type(cause).__name__ != "KilledWorker":
                            raise
                        left += 1
        deaths += bool(left)
        if deaths > _DEATHS:
            raise errors.CrossfadeError(
                f"workers died {deaths} times (out of memory?); nothing is lost, try fewer with --workers"
            )
        if left:
            problems.print("a worker died; another goes on with its piece", highlight=False)
    return outcomes
