"""Verify: is every record of the collection in PostgreSQL, unchanged, and nothing else?

What it promises
    Every document is compared with the document that its rows give back, byte for byte in canonical form, and
    its normalised keys with the key columns; stored digests are checked, never trusted. Every row is asked for
    its document. So a difference that exists for the whole time of a run is found, in either direction. The
    fast mode compares ids and revisions alone: it finds what is missing, too many or late, and no evidence.

    A difference is looked at again after a wait before it counts: with writers at work, the two stores are
    read at two moments. What is owed (debt) or in quarantine is told apart: it differs for a known reason.

    A run that was killed goes on behind its last chunk. What it has passed may have changed since, as it may
    behind the back of a run that was not.

How
    The collection is cut into pieces, for several workers. Both sides of a piece are read in ``_id`` order and
    merged: ids that are ObjectIds or strings have the same order as their texts do in PostgreSQL. Other ids
    are looked up. If a server ordered ids in another way, records would be suspected without need, and cleared
    by the second look, which goes by id. Memory is bounded by a chunk of documents, and by the number of
    suspects that wait for the second look; those are kept with the checkpoint.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import bson
from bson import ObjectId

from crossfade.bulk.convert import NO_TEXT, quiet_interpreter
from crossfade.bulk.findings import Finding, Notes, Source, judge, text_of
from crossfade.bulk.looks import Look, Revisions, Whole
from crossfade.bulk.pace import Pace
from crossfade.bulk.pieces import Pieces, at, plan
from crossfade.bulk.plan import Range, bracket_of, decode_position, encode_position
from crossfade.entity import Entity
from crossfade.stores.bulk_mongo import BulkMongo, id_of
from crossfade.stores.bulk_postgres import BulkPostgres, EntityTables, StoredRecord
from crossfade.stores.runs import Piece, Run, Steering
from crossfade.values import id_to_text, text_to_id

#: Runs of the full mode, which is evidence, and of the fast one, which is none.
KIND, FAST = "verify", "verify_fast"
#: Documents in a chunk, and bytes of BSON at most, but for one document that is larger.
CHUNK_COUNT, CHUNK_BYTES = 2_000, 8 * 1024 * 1024
#: Ids and revisions in a chunk of the fast mode.
FAST_COUNT = 20_000
#: Suspects that are looked at again together.
SUSPECTS = 500
#: Findings that a report names; the counts are always whole, and ``crossfade.findings`` has them all.
SAMPLES = 100


@dataclass(slots=True)
class Counts:
    """What a verify saw.

    Attributes:
        documents, rows: read on either side, deleted documents left out.
        equal: records that are the same in both.
        findings: how many of each kind, by name.
    """

    documents: int = 0
    rows: int = 0
    equal: int = 0
    findings: dict[str, int] = field(default_factory=lambda: {finding.value: 0 for finding in Finding})

    @property
    def mismatches(self) -> int:
        """Records that differ for no known reason."""
        return sum(count for name, count in self.findings.items() if not Finding(name).is_explained)

    def stored(self) -> dict[str, int]:
        """As kept with a piece of the run."""
        return {"documents": self.documents, "rows": self.rows, "equal": self.equal,
                "mismatches": self.mismatches, **self.findings}  # fmt: skip

    def set(self, stored: Mapping[str, Any]) -> None:
        """The reverse of `stored`; names that are not there are 0."""
        self.documents, self.rows = stored.get("documents", 0), stored.get("rows", 0)
        self.equal = stored.get("equal", 0)
        self.findings = {finding.value: stored.get(finding.value, 0) for finding in Finding}


@dataclass(slots=True)
class Report:
    """How a verify ended.

    Attributes:
        state: "complete" or "interrupted"; only a complete one is evidence.
        counts: of the whole run, the parts before an interruption included.
        run: id of the run in ``crossfade.runs``, for ``crossfade.findings`` and ``crossfade.chunks``.
        resumed: documents that an earlier part of the run had compared.
        samples: id text, finding, and the fields that differ.
        seconds: that this part took.
    """

    entity: str
    state: str
    counts: Counts
    run: str = ""
    resumed: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**asdict(self), "counts": self.counts.stored(), "found": self.found}

    @property
    def found(self) -> bool:
        """Whether anything differs for no known reason."""
        return self.counts.mismatches > 0


@dataclass(frozen=True, slots=True)
class _Bracket:
    """Ids whose order is that of their texts: texts above ``first`` and not above ``last``."""

    name: str
    first: str
    last: str
    place: int

    def holds(self, text: str) -> bool:
        return self.first < text <= self.last

    def within(self, piece: Range) -> tuple[str, str] | None:
        """The part of it that a piece has; None: none."""
        first, last = self.first, self.last
        if piece.after is not None:
            above = bracket_of(piece.after["_id"])
            if above > self.place:
                return None
            first = id_to_text(piece.after["_id"]) if above == self.place else first
        if piece.last is not None:
            below = bracket_of(piece.last["_id"])
            if below < self.place:
                return None
            last = id_to_text(piece.last["_id"]) if below == self.place else last
        return first, last


# Hexadecimal digits are below "g"; strings begin with "s:".
_BRACKETS = (
    _Bracket("ObjectId", "", "g", bracket_of(ObjectId(bytes(12)))),
    _Bracket("string", "s", "s;", bracket_of("")),
)
#: Texts of all other ids.
_OTHERS = ("j", "j;")

OnProgress = Callable[[Counts], None]


@dataclass(slots=True)
class _Seen:
    """What a worker carries from chunk to chunk of a piece; kept with its checkpoint.

    Attributes:
        at: by bracket, the id text up to which rows were compared, and the one where the piece ends.
        suspects: id texts of records that wait for the second look.
    """

    at: dict[str, list[str]]
    suspects: dict[str, None] = field(default_factory=dict)

    def stored(self) -> bytes:
        return bson.encode({"at": self.at, "suspects": list(self.suspects)})

    @classmethod
    def of(cls, piece: Piece) -> _Seen:
        if piece.pending is not None:
            kept = bson.decode(piece.pending)
            return cls(kept["at"], dict.fromkeys(kept["suspects"]))
        parts = {bracket.name: bracket.within(at(piece)) for bracket in _BRACKETS}
        return cls({name: list(part) for name, part in parts.items() if part is not None})


class Verify:
    """One worker's part in a verify.

    Args:
        entity: what to compare.
        source, target: the stores, for this worker alone.
        migration: name of the migration.
        epoch: of the control record, noted with the result: evidence counts only for the epoch's life.
        fast: compare ids and revisions alone.
        wait: seconds before a difference is looked at again.
        looks: how often it is looked at again before it counts.
        chunk: documents in a chunk.
        on_progress: called after every chunk with the counts of the run, as far as this worker knows them.
    """

    def __init__(
        self,
        entity: Entity,
        source: BulkMongo,
        target: BulkPostgres,
        *,
        migration: str,
        epoch: int,
        fast: bool = False,
        wait: float = 1.0,
        looks: int = 3,
        chunk: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.entity = entity
        self._source = source
        self._target = target
        self._migration = migration
        self._epoch = epoch
        self._fast = fast
        self._look: Look[Any] = Revisions() if fast else Whole()
        self._wait = wait
        self._looks = looks
        self._chunk = chunk or (FAST_COUNT if fast else CHUNK_COUNT)
        self._pace = Pace(self._chunk)
        self._on_progress = on_progress
        #: Of the piece under way; and of the run, as far as this worker has heard.
        self._counts = Counts()
        self._total = Counts()
        self._report = Report(entity.name, "interrupted", self._total)
        self._seen = _Seen({})
        self._findings: dict[str, tuple[Finding, list[str]]] = {}
        self._checksums: list[tuple[str, str, int, str]] = []

    async def begin(self, *, restart: bool = False, workers: int = 1) -> Run:
        """The unfinished run of this epoch and mapping, or a new one, with its pieces for so many workers.

        Raises:
            crossfade.errors.Busy: ``restart``, or another mapping, and somebody is at work.
        """
        return await self._target.runs.begin(
            self._migration, self.entity, FAST if self._fast else KIND, epoch=self._epoch,
            settings={"mapping": self.entity.mapping_version, "full": not self._fast},
            pieces=await plan(self._source, self.entity, workers), restart=restart,
        )  # fmt: skip

    def heard(self, totals: Mapping[str, int]) -> None:
        """Report as progress what all workers of the run have done (`Runs.totals`)."""
        self._total.set(totals)
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
        """Compare everything that is left and that nobody else is at; the result is kept in ``crossfade.runs``.

        Args:
            begun: the run to work on; None: as of `begin`.
            restart: begin at the beginning, whatever an earlier run has done.
            stop: once set, the run ends as "interrupted" after the chunk under way.
            alone: also what others are at: wait until they are done, or gone.

        Raises:
            crossfade.errors.Busy: ``restart``, and another process is at work.
            crossfade.errors.StoreUnavailable: a store is gone; run it again to go on.
            crossfade.errors.SchemaNotReady: tables are missing.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        tables = await self._target.tables_of(self.entity)
        run = begun or await self.begin(restart=restart)
        self._total.set(await self._target.runs.totals(run))
        self._report.resumed = self._total.documents
        pieces = Pieces(self._target.runs, run, self._pace, stop)
        with ThreadPoolExecutor(1, "crossfade-verify") as thread, quiet_interpreter():
            while (piece := await pieces.next(alone=alone)) is not None:
                async with pieces.hold(piece):
                    self._counts.set(piece.counts)
                    self._findings.clear()
                    self._checksums.clear()
                    await self._compare_piece(tables, piece, pieces, thread)
        if await self._target.runs.finish(run):
            self._report.state = "complete"
        self._total.set(await self._target.runs.totals(run))
        self._report.run = str(run.run)
        self._report.samples = await self._target.findings(run, limit=SAMPLES)
        self._report.seconds = loop.time() - began
        return self._report

    # --- the first look: everything, in order --------------------------------------------------------------

    async def _compare_piece(
        self, tables: EntityTables, piece: Piece, pieces: Pieces, thread: ThreadPoolExecutor
    ) -> None:
        loop = asyncio.get_running_loop()
        within = at(piece)
        self._seen = _Seen.of(piece)
        documents = self._source.read(
            self.entity, within.queries, decode_position(piece.position), batch=min(1000, self._chunk),
            notes_only=self._fast,
        )  # fmt: skip
        made = _chunks(documents, lambda: self._pace.count)
        upcoming = loop.run_in_executor(thread, next, made, None)
        try:
            while (chunk := await upcoming) is not None:
                if pieces.is_to_stop:
                    return
                upcoming = loop.run_in_executor(thread, next, made, None)
                began = loop.time()
                await self._compare_chunk(tables, chunk)
                steering = await self._checkpoint(tables, piece, chunk)
                self._pace.took(len(chunk), loop.time() - began, steering)
                gc.collect(0)
                await pieces.rest(piece)
        finally:
            await asyncio.wait([upcoming])
            upcoming.exception()  # seen here, where another error is on its way already
        if not await self._compare_rest(tables, piece, pieces):
            return
        if within.last is None:
            await self._find_extra_others(tables, piece)
        await self._look_again(tables, piece)
        await self._target.note(piece, self._noted(), self._checksums, lambda: self._complete(pieces, piece))
        self._report_progress()

    async def _complete(self, pieces: Pieces, piece: Piece) -> None:
        await pieces.complete(piece, self._counts.stored())

    async def _checkpoint(self, tables: EntityTables, piece: Piece, chunk: dict[str, bytes]) -> Steering:
        if len(self._seen.suspects) >= SUSPECTS:
            await self._look_again(tables, piece)
        position = piece.position
        for raw in reversed(chunk.values()):
            with suppress(ValueError):
                position = encode_position(id_of(raw))
                break
        steering = Steering()

        async def note() -> None:
            nonlocal steering
            steering = await self._target.runs.checkpoint(
                piece, position=position, pending=self._seen.stored(), counts=self._counts.stored()
            )

        await self._target.note(piece, self._noted(), self._checksums, note)
        self._findings.clear()
        self._checksums.clear()
        self._report_progress()
        return steering

    def _noted(self) -> list[tuple[str, str, list[str]]]:
        return [(text, finding.value, fields) for text, (finding, fields) in self._findings.items()]

    def _report_progress(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self._total)

    async def _compare_chunk(self, tables: EntityTables, chunk: dict[str, bytes]) -> None:
        left = dict(chunk)
        for bracket in _BRACKETS:
            if bracket.name not in self._seen.at:
                continue
            ours = {text: left.pop(text) for text in chunk if text in left and bracket.holds(text)}
            if ours:
                first, end = self._seen.at[bracket.name]
                reached = max(ours)
                await self._compare_range(tables, first, reached, ours)
                # Behind rows that were compared before an interruption, a document may have come since.
                self._seen.at[bracket.name] = [max(first, reached), end]
        if left:
            rows = await self._look.rows_with(self._target, tables, list(left))
            self._add(rows=len(rows))
            self._compare((text, raw, rows.get(text)) for text, raw in left.items())

    async def _compare_rest(self, tables: EntityTables, piece: Piece, pieces: Pieces) -> bool:
        """Rows of a piece behind its last document, in chunks as well; False: it is to stop."""
        loop = asyncio.get_running_loop()
        for name in self._seen.at:
            while rows := await self._look.rows(
                self._target, tables, *self._seen.at[name], limit=self._chunk
            ):
                if pieces.is_to_stop:
                    return False
                began = loop.time()
                self._compare((text, None, row) for text, row in rows)
                self._add(rows=len(rows))
                self._seen.at[name][0] = rows[-1][0]
                steering = await self._checkpoint(tables, piece, {})
                self._pace.took(len(rows), loop.time() - began, steering)
                await pieces.rest(piece)
        return True

    async def _compare_range(
        self, tables: EntityTables, after: str, last: str, documents: dict[str, bytes]
    ) -> None:
        """Merge the documents of a range with its rows; at most a chunk of rows is held at once."""
        first, lines = after, list[tuple[str, str]]()
        while True:
            rows = await self._look.rows(self._target, tables, after, last, limit=self._chunk)
            lines += self._compare((text, documents.pop(text, None), row) for text, row in rows)
            self._add(rows=len(rows))
            if len(rows) < self._chunk:
                break
            after = rows[-1][0]
        lines += self._compare((text, raw, None) for text, raw in documents.items())
        self._note_checksum(first, last, lines)

    def _note_checksum(self, first: str, last: str, lines: list[tuple[str, str]]) -> None:
        """As SQL gives it of the rows; see schema.sql."""
        if lines:
            text = "\n".join(line for _, line in sorted(lines))
            checksum = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
            self._checksums.append((first, last, len(lines), checksum))

    async def _find_extra_others(self, tables: EntityTables, piece: Piece) -> None:
        """Rows whose ids are neither ObjectIds nor strings: does each have its document?"""
        after, last = _OTHERS
        while rows := await self._target.read_range(tables, after, last, limit=SUSPECTS):
            after = rows[-1].text
            await self._target.runs.keep(piece)
            found = {source.text for source in await self._fetch([row.text for row in rows])}
            for row in rows:
                if row.text not in found:
                    self._add(rows=1)
                    self._seen.suspects[row.text] = None

    def _compare(self, records: Iterable[tuple[str, bytes | None, Any]]) -> list[tuple[str, str]]:
        """Take the first look at records (id text, document, row); id text and line of the checksum of those alive."""
        compare, entity, suspects = self._look.compare, self.entity, self._seen.suspects
        lines = []
        documents = equal = 0
        for text, raw, row in records:
            suspect, alive, line = compare(entity, text, raw, row)
            if suspect:
                suspects[text] = None
            documents += alive
            equal += alive and not suspect
            if line is not None:
                lines.append((text, line))
        self._add(documents=documents, equal=equal)
        return lines

    def _add(self, *, documents: int = 0, rows: int = 0, equal: int = 0) -> None:
        for counts in (self._counts, self._total):
            counts.documents += documents
            counts.rows += rows
            counts.equal += equal

    # --- the second look: suspects, by id ------------------------------------------------------------------

    async def _look_again(self, tables: EntityTables, piece: Piece) -> None:
        """Look at the suspects again, after a wait for all of them; count those that still differ."""
        texts = list(self._seen.suspects)
        self._seen.suspects.clear()
        findings: dict[str, tuple[Finding, list[str]]] = {}
        for _ in range(self._looks):
            if not texts:
                return
            await asyncio.sleep(self._wait)
            findings.clear()
            for start in range(0, len(texts), SUSPECTS):
                # Where nearly everything differs, this takes longer than a lease.
                await self._target.runs.keep(piece)
                findings |= await self._still_differing(tables, texts[start : start + SUSPECTS])
            texts = list(findings)
        for text, (finding, fields) in findings.items():
            self._count(text, finding, fields)

    async def _still_differing(
        self, tables: EntityTables, texts: list[str]
    ) -> dict[str, tuple[Finding, list[str]]]:
        looked = await look_at(self.entity, self._source, self._target, tables, texts)
        equal = sum(found is None and is_there for found, is_there in looked.values())
        self._add(equal=equal)
        findings = {text: found for text, (found, _) in looked.items() if found is not None}
        # What is explained stays explained; only the rest may be on its way.
        for text in [text for text, (finding, _) in findings.items() if finding.is_explained]:
            self._count(text, *findings.pop(text))
        return findings

    def _count(self, text: str, finding: Finding, fields: list[str]) -> None:
        self._counts.findings[finding] += 1
        self._total.findings[finding] += 1
        self._findings[text] = (finding, fields)

    async def _fetch(self, texts: Sequence[str]) -> list[Source]:
        return await _fetch(self.entity, self._source, texts)


async def look_at(
    entity: Entity, source: BulkMongo, target: BulkPostgres, tables: EntityTables, texts: Sequence[str]
) -> dict[str, tuple[tuple[Finding, list[str]] | None, bool]]:
    """How each of these records differs now (None: not), and whether there is a document; by id text.

    One that is written between the looks at its two sides differs for that alone, so those that differ are read twice.
    """
    sources = {one.text: one for one in await _fetch(entity, source, texts)}
    rows = await target.read_ids(tables, texts)
    quarantined, buried = await target.notes(entity, texts)
    owed = await target.deliveries_owed(entity, texts)
    deleted = await asyncio.to_thread(source.tombstones, entity, texts)
    looked: dict[str, tuple[tuple[Finding, list[str]] | None, bool]] = {}
    for text in texts:
        notes = Notes(
            quarantined.get(text), buried.get(text), text in deleted, deleted.get(text, False), text in owed
        )
        one = sources.get(text)
        looked[text] = (judge(entity, one, rows.get(text), notes), one is not None and not one.is_gone)
        if text.startswith(NO_TEXT):
            # It cannot be asked for, and no row can stand for it: it was there, and is to be in quarantine.
            looked[text] = ((Finding.QUARANTINED if text in quarantined else Finding.MISSING, []), True)
    differing = [
        text for text, (found, _) in looked.items() if found is not None and not found[0].is_explained
    ]
    if differing:
        now = {one.text: one for one in await _fetch(entity, source, differing)}
        rows_now = await target.read_ids(tables, differing)
        for text in differing:
            if (_mark(sources.get(text)), _mark(rows.get(text))) != (
                _mark(now.get(text)),
                _mark(rows_now.get(text)),
            ):
                found, is_there = looked[text]
                looked[text] = ((Finding.IN_DEBT, found[1] if found else []), is_there)
    return looked


def _mark(side: Source | StoredRecord | None) -> tuple[int, str | None] | None:
    """What every write through Crossfade changes on either side of a record."""
    if isinstance(side, Source):
        side_now = side.image
        return None if side_now is None else (side_now.rev, side_now.op)
    return None if side is None else (side.rev, side.op)


async def _fetch(entity: Entity, source: BulkMongo, texts: Sequence[str]) -> list[Source]:
    ids = []
    for text in texts:
        try:
            ids.append(text_to_id(text))
        except ValueError:
            continue  # the document's id has no text; its entry in quarantine goes by the digest of it
    # A thread of its own: the first one is busy with the next chunk.
    found = await asyncio.to_thread(source.fetch, entity, ids)
    return [Source.of(raw, entity.parts) for raw in found]


def _chunks(documents: Iterable[bytes], count: Callable[[], int]) -> Iterator[dict[str, bytes]]:
    """Documents as stored, by id text, in the server's order."""
    chunk: dict[str, bytes] = {}
    size = 0
    for raw in documents:
        if chunk and (len(chunk) >= count() or size + len(raw) > CHUNK_BYTES):
            yield chunk
            chunk, size = {}, 0
        chunk[text_of(raw)] = raw
        size += len(raw)
    if chunk:
        yield chunk
