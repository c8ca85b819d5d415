"""Backfill: every document of a collection becomes rows, while the application keeps writing.

What it promises
    Whatever happens in between (a kill, a lost store, another writer), running the same command until it says
    "complete" leaves for every document of the collection: its row at its revision or a newer one, or an entry
    in quarantine with its bytes, or a note that it breaks a rule. It never replaces a newer row and never
    brings back a deleted record. Documents made while it runs are not its business: dual writing has to be on
    (phase 1 or later), which carries them.

How
    The collection is cut into pieces, and whoever leases one (this process, others beside it, others elsewhere)
    reads it with one long cursor. A thread reads and converts the next chunk while this one is written, so at most
    two are in memory. The checkpoint, with what is left to do after the commit (look again for tombstones, records
    to settle one by one), is in the transaction of the rows; whoever goes on with the piece of a worker that was
    killed does that first.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import bson

from crossfade.bulk.convert import NO_TEXT, Chunk, chunks, quiet_interpreter
from crossfade.bulk.findings import text_of
from crossfade.bulk.pace import Pace
from crossfade.bulk.pieces import Pieces, at, plan
from crossfade.bulk.plan import decode_position, encode_position
from crossfade.entity import Entity
from crossfade.errors import ConfigurationError
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres, EntityTables, Written
from crossfade.stores.loading import OnStep
from crossfade.stores.runs import Piece, Run, Steering
from crossfade.values import CODEC_OPTIONS, Unmappable, id_to_text

KIND = "backfill"
#: Bytes of BSON in a chunk, at most, but for one document that is larger. Two chunks are in memory, each about three
#: times over.
BATCH_BYTES = 8 * 1024 * 1024
#: Documents per round trip: a part of a chunk, so that the server works while this side converts.
FETCH_SIZE = 1_000
#: How many ids a report names for one kind of finding; the counts are always whole.
SAMPLES = 20

SettleOne = Callable[[Entity, Any], Awaitable[object]]
OnBehind = Callable[[Entity, Sequence[Any]], Awaitable[object]]


@dataclass(slots=True)
class Counts:
    """What a run did so far; kept with its checkpoint, so it is exact after a kill.

    Attributes:
        read: documents.
        inserted, updated: rows written.
        same: rows that were there already, equal.
        deleted: documents whose delete is decided; their debt carries it.
        quarantined: documents that cannot be carried unchanged, or that the table does not take.
        behind: documents whose row is newer or a fork, or that a tombstone covers; handed on.
        violations: documents that break a rule in PostgreSQL; handed on, one by one.
        parked: of these, those that could not be settled at once.
        removed: rows removed again because a delete committed meanwhile.
    """

    read: int = 0
    inserted: int = 0
    updated: int = 0
    same: int = 0
    deleted: int = 0
    quarantined: int = 0
    behind: int = 0
    violations: int = 0
    parked: int = 0
    removed: int = 0

    @property
    def errors(self) -> int:
        """Documents that need a person, quarantine apart."""
        return self.parked


@dataclass(slots=True)
class Report:
    """How a backfill ended.

    Attributes:
        state: "complete" or "interrupted" (stopped on request after a whole chunk; run it again to go on).
        counts: of the whole run, the parts before an interruption included.
        resumed: documents that an earlier part of the run had read.
        restored: indexes and foreign keys that had been put aside, and were made anew.
        quarantined: samples: id text, reason and field.
        parked: samples: id text, rule and why.
        seconds: that this part took.
    """

    entity: str
    state: str
    counts: Counts
    resumed: int = 0
    restored: int = 0
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    parked: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**asdict(self), "found": self.found}

    @property
    def found(self) -> bool:
        """Whether anything needs a person."""
        return bool(self.counts.quarantined or self.counts.parked)


OnProgress = Callable[[Counts], None]


class Backfill:
    """One worker's part in a backfill.

    Args:
        entity: what to move.
        source, target: the stores, for this worker alone.
        migration: name of the migration.
        epoch: of the control record, as read by whoever checked that its phase writes to both stores. Another
            one found in PostgreSQL ends the run.
        batch_size: documents in a chunk; None: as many as are written in about a second.
        batch_bytes: bytes of BSON in a chunk, at most, but for one document that is larger.
        settle_one: reconciles one record by the protocol of single writes (rows that break a rule). What it
            raises parks the record. None: every such record is parked.
        on_behind: lifts or passes over records that the row is ahead of; None: they are only counted.
        on_progress: called after every chunk with the counts of the run, as far as this worker knows them.
        loading: where the tables are empty, put aside their foreign keys and further indexes, and make them anew at
            the end (`crossfade.stores.loading`).
        on_step: hears what of that is being made.
    """

    def __init__(
        self,
        entity: Entity,
        source: BulkMongo,
        target: BulkPostgres,
        *,
        migration: str,
        epoch: int,
        batch_size: int | None = None,
        batch_bytes: int = BATCH_BYTES,
        settle_one: SettleOne | None = None,
        on_behind: OnBehind | None = None,
        on_progress: OnProgress | None = None,
        loading: bool = False,
        on_step: OnStep | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ConfigurationError(f"a batch has at least 1 document, not {batch_size}")
        self.entity = entity
        self._source = source
        self._target = target
        self._migration = migration
        self._epoch = epoch
        self._pace = Pace(batch_size)
        self._batch_bytes = batch_bytes
        self._settle_one = settle_one
        self._on_behind = on_behind
        self._on_progress = on_progress
        self._may_load = loading
        self._on_step: OnStep = on_step or (lambda _number, _of, _what: None)
        #: Of the piece under way; and of the run, as far as this worker has heard.
        self._counts = Counts()
        self._total = Counts()
        self._report = Report(entity.name, "interrupted", self._total)
        self._links = _Links(target)

    async def begin(self, *, restart: bool = False, workers: int = 1) -> Run:
        """The unfinished run of this epoch and mapping, or a new one, with its pieces for so many workers.

        One of an older epoch is not resumed: dual writing may have been off in between, so rows that it has
        passed may be out of date.

        Raises:
            crossfade.errors.Busy: ``restart``, or other settings, and somebody is at work.
        """
        await self._target.tables_of(self.entity)  # or the error says what is missing
        loads = self._may_load and await self._target.loading.is_worth_it(self.entity)
        run = await self._target.runs.begin(
            self._migration, self.entity, KIND, epoch=self._epoch,
            settings={"mapping": self.entity.mapping_version}, more={"loading": loads},
            pieces=await plan(self._source, self.entity, workers), restart=restart,
        )  # fmt: skip
        if run.settings.get("loading") and await self._target.runs.open_pieces(run):
            await self._target.loading.put_aside(self.entity)
        return run

    def heard(self, totals: Mapping[str, int]) -> None:
        """Report as progress what all workers of the run have done (`Runs.totals`)."""
        _set(self._total, totals)
        if self._on_progress is not None:
            self._on_progress(self._total)

    async def run(
        self,
        begun: Run | None = None,
        *,
        restart: bool = False,
        stop: asyncio.Event | None = None,
        alone: bool = True,
    ) -> Report:
        """Move everything that is left and that nobody else is at.

        Args:
            begun: the run to work on; None: as of `begin`.
            restart: begin at the beginning, whatever an earlier run has done.
            stop: once set, the chunk under way is finished and the run ends as "interrupted".
            alone: also what others are at: wait until they are done, or gone; and then the end of the run. Else the
                report says "interrupted": whoever leads the run ends it.

        Raises:
            crossfade.errors.Busy: ``restart``, and another process is at work.
            crossfade.stores.errors.Fenced: the migration went to another epoch.
            crossfade.errors.StoreUnavailable: a store is gone; run it again to go on.
            crossfade.errors.SchemaNotReady: tables are missing.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        run = begun or await self.begin(restart=restart)
        # A worker that was told of the run may have come when another phase had begun already.
        self._epoch = run.epoch
        tables = await self._target.tables_of(self.entity, loading=bool(run.settings.get("loading")))
        _set(self._total, await self._target.runs.totals(run))
        self._report.resumed = self._total.read
        pieces = Pieces(self._target.runs, run, self._pace, stop)
        with ThreadPoolExecutor(1, "crossfade-convert") as thread, quiet_interpreter():
            while (piece := await pieces.next(alone=alone)) is not None:
                async with pieces.hold(piece):
                    _set(self._counts, piece.counts)
                    await self._move(tables, piece, pieces, thread)
        if alone and not await self._target.runs.open_pieces(run):
            await self._target.drop_covered(tables)
            # While the run is not complete: what a kill leaves undone here, the next command finds, and no guard
            # passes over.
            self._report.restored = await self._target.loading.restore(self.entity, self._on_step)
            if await self._target.runs.finish(run):
                self._report.state = "complete"
        _set(self._total, await self._target.runs.totals(run))
        self._report.seconds = loop.time() - began
        return self._report

    async def _move(
        self, tables: EntityTables, piece: Piece, pieces: Pieces, thread: ThreadPoolExecutor
    ) -> None:
        """Write chunk after chunk of a piece, to its end or until it is to stop."""
        loop = asyncio.get_running_loop()
        await self._finish_pending(tables, piece.pending, resumed=True)
        within, position = at(piece), decode_position(piece.position)
        documents = self._source.read(
            self.entity, within.queries, position, batch=min(FETCH_SIZE, self._pace.count)
        )
        made = chunks(documents, tables, count=lambda: self._pace.count, size=self._batch_bytes)
        upcoming = loop.run_in_executor(thread, next, made, None)
        try:
            while (chunk := await upcoming) is not None:
                if pieces.is_to_stop:
                    return
                upcoming = loop.run_in_executor(thread, next, made, None)
                began = loop.time()
                steering = await self._write(tables, piece, chunk)
                if steering.duty < 1 or steering.rate:
                    await self._links.done()  # whoever is asked to be gentle does one thing at a time
                self._pace.took(chunk.read, loop.time() - began, steering)
                # What little is in cycles (tracebacks) must not add up; there is next to nothing to walk.
                gc.collect(0)
                if self._on_progress is not None:
                    self._on_progress(self._total)
                await pieces.rest(piece)
            await self._links.done()
            await pieces.complete(piece, asdict(self._counts))
        finally:
            await self._links.end()
            await asyncio.wait([upcoming])
            upcoming.exception()  # seen here, where another error is on its way already

    async def _write(self, tables: EntityTables, piece: Piece, chunk: Chunk) -> Steering:
        before, position = asdict(self._counts), piece.position
        pending: bytes | None = None
        steering = Steering()
        # A position that stays behind costs reading a few documents again.
        if chunk.last is not None:
            position = encode_position(chunk.last[0])

        async def checkpoint(written: Written) -> None:
            nonlocal pending, steering
            _set(self._counts, before)  # counted anew on each try of the transaction
            self._count(chunk, written)
            pending = _pending(chunk, written, self._links.left)
            steering = await self._target.runs.checkpoint(
                piece, position=position, pending=pending, counts=asdict(self._counts)
            )

        written = await self._target.write_chunk(
            tables, chunk.rows, chunk.bad, migration=self._migration, epoch=self._epoch, checkpoint=checkpoint
        )
        room = SAMPLES - len(self._report.quarantined)
        self._report.quarantined += [
            {"id": bad.text, "reason": bad.reason, "field": bad.field}
            for bad in [*chunk.bad, *written.refused][: max(room, 0)]
        ]
        await self._finish_pending(tables, pending, resumed=False)
        for name, value in asdict(self._counts).items():
            setattr(self._total, name, getattr(self._total, name) + value - before[name])
        return steering

    def _count(self, chunk: Chunk, written: Written) -> None:
        counts = self._counts
        counts.read += chunk.read
        counts.deleted += chunk.deleted
        counts.inserted += written.inserted
        counts.updated += written.updated
        counts.same += written.same
        counts.removed += written.removed
        counts.quarantined += len(chunk.bad) + len(written.refused)
        counts.behind += len(written.behind)
        counts.violations += len(written.violations)

    async def _finish_pending(self, tables: EntityTables, stored: bytes | None, *, resumed: bool) -> None:
        """Do what a chunk leaves to do behind its commit, or begin to. Repeating it does no harm.

        ``resumed``: another worker has left it, perhaps with the links of a chunk before.
        """
        if stored is None:
            return
        work = bson.decode(stored, CODEC_OPTIONS)
        links = [(first, last) for first, last in work.get("links", ())] if resumed else []
        if "first" in work:
            self._counts.removed += await self._target.look_again(tables, work["first"], work["last"])
            links.append((work["first"], work["last"]))
        if bad := work.get("bad"):
            # Who deleted one meanwhile has taken it out of quarantine before it was there.
            left = {text_of(raw) for raw in await asyncio.to_thread(self._source.fetch, self.entity, bad)}
            gone = [text for text in map(id_to_text, bad) if text not in left]
            await self._target.quarantine_release(self.entity, gone)
        if work["behind"] and self._on_behind is not None:
            await self._on_behind(self.entity, work["behind"])
        for id_, rule in work["violations"]:
            await self._settle(id_, rule)
        await self._links.done()
        self._links.begin(tables, links)

    async def _settle(self, id_: Any, rule: str) -> None:
        why = "no one to settle it"
        if self._settle_one is not None:
            try:
                await self._settle_one(self.entity, id_)
            except Exception as cause:
                why = str(cause) or type(cause).__name__
            else:
                return
        self._counts.parked += 1
        if len(self._report.parked) < SAMPLES:
            self._report.parked.append({"id": _shown(id_), "rule": rule, "why": why})


def _set(counts: Counts, values: Mapping[str, Any]) -> None:
    """Make counts what was noted of them; names that are not there are 0."""
    for name in Counts.__slots__:
        setattr(counts, name, values.get(name, 0))


def _pending(chunk: Chunk, written: Written, links: Sequence[tuple[str, str]]) -> bytes | None:
    """What a chunk leaves to do behind its commit, with the links that are not set yet of those before."""
    bad = [one.id for one in (*chunk.bad, *written.refused) if not one.text.startswith(NO_TEXT)]
    if not chunk.rows and not links and not bad:
        return None
    work: dict[str, Any] = {
        "behind": written.behind,
        "violations": [[id_, rule] for id_, rule in written.violations],
        "links": [list(each) for each in links],
        "bad": bad,
    }
    if chunk.rows:
        texts = [row.text for row in chunk.rows]
        work |= {"first": min(texts), "last": max(texts)}
    return bson.encode(work, codec_options=CODEC_OPTIONS)


class _Links:
    """The links of one chunk at a time, set while the next one is written.

    Attributes:
        left: ranges of id texts whose links are not known to be set.
    """

    def __init__(self, target: BulkPostgres) -> None:
        self._target = target
        self._task: asyncio.Task[None] | None = None
        self.left: list[tuple[str, str]] = []

    def begin(self, tables: EntityTables, ranges: list[tuple[str, str]]) -> None:
        """Set the links of these ranges from now on."""
        self.left = ranges
        self._task = asyncio.create_task(self._set(tables))

    async def _set(self, tables: EntityTables) -> None:
        while self.left:
            await self._target.link(tables, *self.left[0])
            del self.left[0]

    async def done(self) -> None:
        """Wait until they are set.

        Raises:
            crossfade.errors.StoreUnavailable: they are not.
        """
        if self._task is not None:
            await self._task

    async def end(self) -> None:
        """Wait until nothing is under way, whatever became of it: what is left is noted with the piece."""
        if self._task is not None:
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.exception()  # seen here, where another error is on its way already
            self._task, self.left = None, []


def _shown(id_: Any) -> str:
    try:
        return id_to_text(id_)
    except Unmappable:
        return repr(id_)[:100]
