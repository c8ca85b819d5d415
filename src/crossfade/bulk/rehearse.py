"""The dry run of a backfill: convert every document, write none, and say what would happen."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson

from crossfade.bulk.convert import bad_document, image_of, quiet_interpreter
from crossfade.bulk.plan import Range
from crossfade.entity import Entity, Rows
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres, EntityTables
from crossfade.values import Unmappable, id_to_text

#: Ids named per reason, and reasons told apart.
SAMPLES, REASONS = 20, 200
#: Collisions named in a report; their number is always whole.
TWINS = 200


@dataclass(slots=True)
class Report:
    """What a backfill would meet.

    Attributes:
        read: documents; ``convertible`` of them become rows, ``deleted`` are decided deletes.
        child_rows: rows by child table.
        reasons: reason for quarantine -> how many, and some id texts.
        odd: mapped field -> in how many documents its value does not fit the column and goes to ``extra``.
        collisions: how many normalised keys occur more than once; ``twins`` names some, with their ids.
    """

    entity: str
    state: str = "interrupted"
    read: int = 0
    convertible: int = 0
    deleted: int = 0
    quarantined: int = 0
    child_rows: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)
    odd: dict[str, int] = field(default_factory=dict)
    collisions: int = 0
    twins: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**asdict(self), "found": self.found}

    @property
    def found(self) -> bool:
        """Whether anything needs a person."""
        return bool(self.quarantined or self.collisions)


class Rehearsal:
    """A dry run; nothing is left behind in either store (keys are compared in a temporary table).

    Args:
        entity: what would be moved.
        source, target: the stores, for this run alone.
        batch_size: documents converted between two reports of progress.
        on_progress: called with the report so far.
    """

    def __init__(
        self,
        entity: Entity,
        source: BulkMongo,
        target: BulkPostgres,
        *,
        batch_size: int = 5_000,
        on_progress: Callable[[Report], None] | None = None,
    ) -> None:
        self.entity = entity
        self._source = source
        self._target = target
        self._batch_size = batch_size
        self._on_progress = on_progress
        self._report = Report(entity.name)
        self._odd: Counter[str] = Counter()
        self._child_rows: Counter[str] = Counter()
        self._mapped = frozenset(entity.order)
        self._extra = entity.parent_columns.index("extra")

    async def run(self, *, stop: asyncio.Event | None = None) -> Report:
        """Convert everything.

        Raises:
            crossfade.errors.StoreUnavailable: a store is gone.
            crossfade.errors.SchemaNotReady: tables are missing.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        tables = await self._target.tables_of(self.entity)
        with ThreadPoolExecutor(1, "crossfade-rehearse") as thread, quiet_interpreter():
            made = self._batches(tables)
            while (keys := await loop.run_in_executor(thread, next, made, None)) is not None:
                if keys:
                    await self._target.keep_keys(keys)
                if self._on_progress is not None:
                    self._on_progress(self._report)
                if stop is not None and stop.is_set():
                    break
            else:
                self._report.state = "complete"
        if self.entity.unique:
            # Before any key is noted the table of keys does not exist.
            await self._target.keep_keys([])
            self._report.collisions, twins = await self._target.twins(limit=TWINS)
            self._report.twins = [{"rule": rule, "key": key, "ids": ids} for rule, key, ids in twins]
        self._report.odd = dict(self._odd)
        self._report.child_rows = dict(self._child_rows)
        self._report.seconds = loop.time() - began
        return self._report

    def _batches(self, tables: EntityTables) -> Iterator[list[tuple[str, str, str]]]:
        """Convert; give the keys of every batch."""
        keys: list[tuple[str, str, str]] = []
        documents = self._source.read(self.entity, Range().queries, None, batch=min(1_000, self._batch_size))
        for number, raw in enumerate(documents, 1):
            self._convert(raw, tables, keys)
            if number % self._batch_size == 0:
                yield keys
                keys = []
        yield keys

    def _convert(self, raw: bytes, tables: EntityTables, keys: list[tuple[str, str, str]]) -> None:
        report, image = self._report, None
        report.read += 1
        try:
            image, _ = image_of(raw, self.entity.parts)
            if image.deleted:
                report.deleted += 1
                return
            rows = self.entity.to_rows(image.document, image.keys or None)
            tables.write_parent((*rows.parent, image.rev, None, image.digest, 0))
            # Computed, not the stamped ones: a stamp has made colliding keys differ already.
            computed = self.entity.keys(image.document)
        except Unmappable as problem:
            self._note_bad(bad_document(raw, problem, image).text, problem)
            return
        report.convertible += 1
        text = id_to_text(image.id)
        keys += [(rule, key, text) for rule, key in computed.items() if key is not None]
        self._note_rows(rows)

    def _note_rows(self, rows: Rows) -> None:
        for child, made in zip(self.entity.children, rows.children, strict=True):
            self._child_rows[child.table.name] += len(made)
        extra = rows.parent[self._extra]
        if extra is not None:
            self._odd.update(self._mapped.intersection(orjson.loads(extra)))

    def _note_bad(self, text: str, problem: Unmappable) -> None:
        report = self._report
        report.quarantined += 1
        reason = (
            problem.reason if problem.reason in report.reasons or len(report.reasons) < REASONS else "others"
        )
        entry = report.reasons.setdefault(reason, {"count": 0, "field": problem.field, "ids": []})
        entry["count"] += 1
        if len(entry["ids"]) < SAMPLES:
            entry["ids"].append(text)
