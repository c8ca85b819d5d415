"""Verify: is every record of the collection in PostgreSQL, unchanged, and nothing else?

What it promises
    Every document is compared with the document that its rows give back, byte for byte in canonical form, and
    its normalised keys with the key columns; stored digests are checked, never trusted. Every row is asked for
    its document. So a difference that exists for the whole time of a run is found, in either direction.

    A difference is looked at again after a wait before it counts: with writers at work, the two stores are
    read at two moments. What is owed (debt) or in quarantine is told apart: it differs for a known reason.

How
    Both sides are read in ``_id`` order and merged: ids that are ObjectIds or strings have the same order as
    their texts do in PostgreSQL. Other ids are looked up. If a server ordered ids in another way, records would
    be suspected without need, and cleared by the second look, which goes by id. Memory is bounded by a chunk
    of documents, and by the number of suspects that wait for the second look.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from crossfade.bulk.convert import bad_document, image_of, quiet_collector
from crossfade.bulk.plan import queries_after
from crossfade.entity import Entity
from crossfade.record import Image
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BadDocument, BulkPostgres, EntityTables, StoredRecord
from crossfade.values import Unmappable, digest_of_bytes, encode_document, text_to_id

KIND = "verify"
#: Documents in a chunk, and bytes of BSON at which it ends before that.
CHUNK_COUNT, CHUNK_BYTES = 2_000, 8 * 1024 * 1024
#: Suspects that are looked at again together.
SUSPECTS = 500
#: Findings that a report names; the counts are always whole.
SAMPLES = 100


class Finding(StrEnum):
    """How a record differs. The first two have a known reason; the others count as mismatches."""

    IN_DEBT = "in_debt"
    QUARANTINED = "quarantined"
    #: A document without rows (one that belongs into quarantine and is not there, too).
    MISSING = "missing"
    #: Rows without a document.
    EXTRA = "extra"
    #: The row is at an older revision than the document, and nothing notes that it is owed.
    BEHIND = "behind"
    #: The row is at a newer revision than the document.
    AHEAD = "ahead"
    #: Equal in revision, other in content.
    DIFFERENT = "different"
    #: A document whose id has a tombstone at or above its revision: it was put back behind Crossfade's back.
    TOMBSTONED = "tombstoned"

    @property
    def is_explained(self) -> bool:
        """Whether it differs for a known reason."""
        return self in (Finding.IN_DEBT, Finding.QUARANTINED)


@dataclass(frozen=True, slots=True)
class Source:
    """A document as read.

    Attributes:
        text: id text.
        image, content: its image and canonical bytes; None when it cannot be understood.
        bad: then: as it goes to quarantine.
        size: bytes of BSON.
    """

    text: str
    image: Image | None
    content: bytes | None
    bad: BadDocument | None
    size: int

    @classmethod
    def of(cls, raw: bytes) -> Source:
        """Of a stored document."""
        try:
            image, content = image_of(raw)
            # Its id text may not exist, too.
            text = bad_document(raw, Unmappable(""), image).text
        except Unmappable as problem:
            bad = bad_document(raw, problem, None)
            return cls(bad.text, None, None, bad, len(raw))
        return cls(text, image, content, None, len(raw))

    @property
    def is_gone(self) -> bool:
        """Whether its delete has been decided."""
        return self.image is not None and self.image.deleted

    @property
    def digest(self) -> bytes:
        """As a quarantine entry has it."""
        if self.image is not None:
            return self.image.digest
        assert self.bad is not None
        return self.bad.digest


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

    def to_json(self) -> dict[str, Any]:
        """As kept with the run, and in reports."""
        return {
            "documents": self.documents,
            "rows": self.rows,
            "equal": self.equal,
            "mismatches": self.mismatches,
            **self.findings,
        }


@dataclass(slots=True)
class Report:
    """How a verify ended.

    Attributes:
        state: "complete" or "interrupted"; only a complete one is evidence.
        samples: id text, finding, and the fields that differ.
        seconds: that it took.
    """

    entity: str
    state: str
    counts: Counts
    samples: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**asdict(self), "counts": self.counts.to_json(), "found": self.found}

    @property
    def found(self) -> bool:
        """Whether anything differs for no known reason."""
        return self.counts.mismatches > 0


@dataclass(frozen=True, slots=True)
class Notes:
    """What else is known about a record.

    Attributes:
        quarantined: digest of the entry in quarantine, or None.
        tombstone: revision of PostgreSQL's tombstone, or None.
        delete_owed: MongoDB has a tombstone that PostgreSQL has not confirmed.
    """

    quarantined: bytes | None = None
    tombstone: int | None = None
    delete_owed: bool = False


def differing_fields(entity: Entity, source: Source, row: StoredRecord) -> list[str]:
    """Names of what differs between a document and its rows; [] when they are the same.

    Top-level fields by name; ``(order)`` when only the order of fields differs, ``cf_digest`` when only the
    stored digest is not that of the content, a key column by its name, ``(unreadable)`` when the rows give no document.
    """
    assert source.image is not None
    try:
        rebuilt = entity.from_rows(row.parent, row.children)
        content = encode_document(rebuilt)
    except (Unmappable, ValueError, KeyError, IndexError, TypeError):
        return ["(unreadable)"]
    found: list[str] = []
    if content != source.content:
        names = dict.fromkeys([*source.image.document, *rebuilt])
        found = [name for name in names if _element(source.image.document, name) != _element(rebuilt, name)]
        found = found or ["(order)"]
    elif row.digest != digest_of_bytes(content):
        found = ["cf_digest"]
    keys = {**entity.keys(source.image.document), **source.image.keys}
    for rule in entity.unique:
        if row.parent[entity.parent_columns.index(rule.to)] != keys.get(rule.rule):
            found.append(rule.to)
    return found


def _element(document: dict[str, Any], name: str) -> bytes | None:
    return encode_document({"v": document[name]}) if name in document else None


def judge(
    entity: Entity, source: Source | None, row: StoredRecord | None, notes: Notes
) -> tuple[Finding, list[str]] | None:
    """How a record differs, and in which fields; None when it does not.

    Args:
        source: the document, None without one.
        row: its rows, None without any.
        notes: what else is known.
    """
    image = source.image if source is not None else None
    if source is None or source.is_gone:
        if row is None:
            return None
        owed = notes.delete_owed or (image is not None and image.debt is not None)
        return (Finding.IN_DEBT if owed else Finding.EXTRA), []
    fields = differing_fields(entity, source, row) if row is not None and image is not None else []
    if row is not None and image is not None and row.rev == image.rev and not fields:
        return None
    if notes.quarantined is not None and notes.quarantined == source.digest:
        return Finding.QUARANTINED, []
    if image is not None and image.debt is not None:
        return Finding.IN_DEBT, fields
    if row is None or image is None:
        covered = notes.tombstone is not None and image is not None and notes.tombstone >= image.rev
        return (Finding.TOMBSTONED if covered else Finding.MISSING), []
    if row.rev == image.rev:
        return Finding.DIFFERENT, fields
    return (Finding.BEHIND if row.rev < image.rev else Finding.AHEAD), fields


@dataclass(frozen=True, slots=True)
class _Bracket:
    """Ids whose order is that of their texts: texts above ``first`` and not above ``last``."""

    first: str
    last: str

    def holds(self, text: str) -> bool:
        return self.first < text <= self.last


# Hexadecimal digits are below "g"; strings begin with "s:".
_OBJECT_IDS = _Bracket("", "g")
_STRINGS = _Bracket("s", "s;")
_OTHERS = _Bracket("j", "j;")

OnProgress = Callable[[Counts], None]


class Verify:
    """One run of a full verify.

    Args:
        entity: what to compare.
        source, target: the stores, for this run alone.
        migration: name of the migration.
        epoch: of the control record, noted with the result: evidence counts only for the epoch's life.
        wait: seconds before a difference is looked at again.
        looks: how often it is looked at again before it counts.
        on_progress: called after every chunk.
    """

    def __init__(
        self,
        entity: Entity,
        source: BulkMongo,
        target: BulkPostgres,
        *,
        migration: str,
        epoch: int,
        wait: float = 1.0,
        looks: int = 3,
        chunk: int = CHUNK_COUNT,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.entity = entity
        self._source = source
        self._target = target
        self._migration = migration
        self._epoch = epoch
        self._wait = wait
        self._looks = looks
        self._chunk = chunk
        self._on_progress = on_progress
        self._counts = Counts()
        self._report = Report(entity.name, "interrupted", self._counts)
        self._suspects: dict[str, Any] = {}
        self._thread: ThreadPoolExecutor | None = None

    async def run(self, *, stop: asyncio.Event | None = None) -> Report:
        """Compare everything; the result is kept in ``crossfade.runs``.

        Args:
            stop: once set, the run ends as "interrupted" after the chunk under way. A verify does not go on
                where it ended: what it has passed may have changed.

        Raises:
            crossfade.errors.Busy: another process does the same.
            crossfade.errors.StoreUnavailable: a store is gone.
            crossfade.errors.SchemaNotReady: tables are missing.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        await self._target.claim(self._migration, self.entity, KIND)
        tables = await self._target.tables_of(self.entity)
        run = await self._target.begin_run(
            self._migration,
            self.entity,
            KIND,
            epoch=self._epoch,
            settings={"mapping": self.entity.mapping_version, "full": True},
        )
        with ThreadPoolExecutor(1, "crossfade-verify") as self._thread, quiet_collector():
            if await self._compare_all(tables, stop):
                await self._look_again(tables)
                self._report.state = "complete"
        state = "complete" if self._report.state == "complete" else "abandoned"
        await self._target.finish_run(run, self._counts.to_json(), state=state)
        self._report.seconds = loop.time() - began
        return self._report

    # --- the first look: everything, in order --------------------------------------------------------------

    async def _compare_all(self, tables: EntityTables, stop: asyncio.Event | None) -> bool:
        loop = asyncio.get_running_loop()
        documents = self._source.read(self.entity, queries_after, None, batch=min(1000, self._chunk))
        made = _chunks(documents, self._chunk)
        at = {_OBJECT_IDS: _OBJECT_IDS.first, _STRINGS: _STRINGS.first}
        upcoming = loop.run_in_executor(self._thread, next, made, None)
        try:
            while (chunk := await upcoming) is not None:
                upcoming = loop.run_in_executor(self._thread, next, made, None)
                if stop is not None and stop.is_set():
                    return False
                self._counts.documents += sum(not source.is_gone for source in chunk)
                for bracket, after in at.items():
                    ours = {source.text: source for source in chunk if bracket.holds(source.text)}
                    if ours:
                        at[bracket] = max(ours)
                        await self._compare_range(tables, after, at[bracket], ours)
                await self._compare_others(
                    tables, {s.text: s for s in chunk if not any(bracket.holds(s.text) for bracket in at)}
                )
                await self._tell(tables)
        finally:
            await asyncio.wait([upcoming])
            upcoming.exception()  # seen here, where another error is on its way already
        for bracket, first in at.items():
            await self._compare_range(tables, first, bracket.last, {})
        await self._find_extra_others(tables)
        return True

    async def _compare_range(
        self, tables: EntityTables, after: str, last: str, sources: dict[str, Source]
    ) -> None:
        """Merge the documents of a range with its rows; at most a chunk of rows is held at once."""
        while True:
            rows = await self._target.read_range(tables, after, last, limit=self._chunk)
            for row in rows:
                self._compare(row.text, sources.pop(row.text, None), row)
            self._counts.rows += len(rows)
            if len(rows) < self._chunk:
                break
            after = rows[-1].text
            await self._tell(tables)
        for text, source in sources.items():
            self._compare(text, source, None)

    async def _compare_others(self, tables: EntityTables, sources: dict[str, Source]) -> None:
        if not sources:
            return
        rows = await self._target.read_ids(tables, list(sources))
        self._counts.rows += len(rows)
        for text, source in sources.items():
            self._compare(text, source, rows.get(text))

    async def _find_extra_others(self, tables: EntityTables) -> None:
        """Rows whose ids are neither ObjectIds nor strings: does each have its document?"""
        after = _OTHERS.first
        while rows := await self._target.read_range(tables, after, _OTHERS.last, limit=SUSPECTS):
            after = rows[-1].text
            found = {source.text for source in await self._fetch([row.text for row in rows])}
            for row in rows:
                if row.text not in found:
                    self._counts.rows += 1
                    self._suspects[row.text] = None
            await self._tell(tables)

    def _compare(self, text: str, source: Source | None, row: StoredRecord | None) -> None:
        # Without the notes, whatever is not plainly equal is a suspect.
        if judge(self.entity, source, row, Notes()) is not None:
            self._suspects[text] = None
        elif source is not None and not source.is_gone:
            self._counts.equal += 1

    async def _tell(self, tables: EntityTables) -> None:
        if len(self._suspects) >= SUSPECTS:
            await self._look_again(tables)
        if self._on_progress is not None:
            self._on_progress(self._counts)

    # --- the second look: suspects, by id ------------------------------------------------------------------

    async def _look_again(self, tables: EntityTables) -> None:
        """Look at the suspects again, after a wait; count those that still differ."""
        texts = list(self._suspects)
        self._suspects.clear()
        for start in range(0, len(texts), SUSPECTS):
            await self._look_again_at(tables, texts[start : start + SUSPECTS])

    async def _look_again_at(self, tables: EntityTables, texts: list[str]) -> None:
        findings: dict[str, tuple[Finding, list[str]]] = {}
        for _ in range(self._looks):
            await asyncio.sleep(self._wait)
            findings = {}
            sources = {source.text: source for source in await self._fetch(texts)}
            rows = await self._target.read_ids(tables, texts)
            quarantined, buried = await self._target.notes(self.entity, texts)
            owed = await asyncio.to_thread(self._source.tombstones, self.entity, texts)
            for text in texts:
                notes = Notes(quarantined.get(text), buried.get(text), text in owed)
                found = judge(self.entity, sources.get(text), rows.get(text), notes)
                if found is not None:
                    findings[text] = found
                elif text in sources and not sources[text].is_gone:
                    self._counts.equal += 1
            # What is explained stays explained; only the rest may be on its way.
            for text in [text for text, (finding, _) in findings.items() if finding.is_explained]:
                self._count(text, *findings.pop(text))
            texts = list(findings)
            if not texts:
                return
        for text, (finding, fields) in findings.items():
            self._count(text, finding, fields)

    def _count(self, text: str, finding: Finding, fields: list[str]) -> None:
        self._counts.findings[finding] += 1
        if len(self._report.samples) < SAMPLES:
            self._report.samples.append({"id": text, "finding": finding.value, "fields": fields})

    async def _fetch(self, texts: Sequence[str]) -> list[Source]:
        ids = []
        for text in texts:
            try:
                ids.append(text_to_id(text))
            except ValueError:
                continue  # the document's id has no text; its entry in quarantine goes by its digest

        # A thread of its own: the first one is busy with the next chunk.
        found = await asyncio.to_thread(self._source.fetch, self.entity, ids)
        return [Source.of(raw) for raw in found]


def _chunks(documents: Iterable[bytes], count: int) -> Iterator[list[Source]]:
    chunk: list[Source] = []
    size = 0
    for raw in documents:
        chunk.append(Source.of(raw))
        size += len(raw)
        if len(chunk) >= count or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
