"""Repair: what a verify found to differ is made equal to the primary, record by record.

What it promises
    Each record is looked at again first; what has become equal is left alone. What is done goes through the
    protocol of single writes, so it is guarded by revisions: a write of the application in between wins. Where
    the primary holds nothing to repair from, the policy says what becomes of the rest, and its default is to keep
    it. Every change is noted in ``crossfade.repairs`` before it is made, with what was there; and after it.
    A dry run changes nothing and notes nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from crossfade.bulk.findings import Finding
from crossfade.bulk.verify import FAST, KIND, look_at
from crossfade.entity import Entity
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres, EntityTables, StoredRecord
from crossfade.stores.runs import Run
from crossfade.values import Unmappable, encode_document, text_to_id

#: Findings that are looked at again together.
PORTION = 200
#: Records that a report names for one kind of outcome.
SAMPLES = 20


class Means(Protocol):
    """How records are changed: the protocol of single writes, under the present phase."""

    #: "mongo" or "postgres".
    primary: str

    async def from_primary(self, entity: Entity, id_: Any) -> object:
        """Bring what the primary holds of a record to the other store."""

    async def anew(self, entity: Entity, id_: Any) -> object:
        """The same as a new revision: what stands there is not what its revision and digest say."""

    async def drop_row(self, entity: Entity, id_: Any, rev: int) -> object:
        """Make a delete of the row at this revision, decided in MongoDB."""


@dataclass(slots=True)
class Report:
    """How a repair ended.

    Attributes:
        state: "complete", "interrupted", or "never verified".
        applied: whether it was no dry run.
        run: of the verify whose findings they are.
        looked_at: findings.
        equal: that have become equal meanwhile.
        to_do: in a dry run: that would be repaired, by finding.
        repaired: that are equal now, by finding.
        kept: that the policy leaves alone, or that reconcile or the quarantine has, by finding.
        left: that still differ, by what they are now.
        samples: id text, finding, and what became of it.
        seconds: that it took.
    """

    entity: str
    state: str
    applied: bool
    run: str = ""
    looked_at: int = 0
    equal: int = 0
    to_do: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    samples: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        return {
            name: dict(value) if isinstance(value, Counter) else value for name, value in plain.items()
        } | {"found": self.found}

    @property
    def found(self) -> bool:
        """Whether anything is left to do, or to decide."""
        undecided = self.kept.total() - self.kept[Finding.IN_DEBT] - self.kept[Finding.QUARANTINED]
        return bool(self.to_do or self.left or undecided or self.state == "never verified")


class Repair:
    """The repair of one entity.

    Args:
        entity: whose findings.
        source, target: the stores, for this run alone.
        migration: name of the migration.
        means: how records are changed.
        by: who asks for it, for the audit.
        apply: do it; else only say what would be done.
        drop_extra: rows without a document go (MongoDB primary).
        lift_tombstoned: documents that were put back under a tombstone stay, above it (MongoDB primary).
        on_progress: called with how many findings have been looked at.
    """

    def __init__(
        self,
        entity: Entity,
        source: BulkMongo,
        target: BulkPostgres,
        *,
        migration: str,
        means: Means,
        by: str,
        apply: bool = False,
        drop_extra: bool = False,
        lift_tombstoned: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.entity = entity
        self._source, self._target = source, target
        self._migration = migration
        self._means = means
        self._by = by
        self._apply = apply
        self._drop_extra, self._lift_tombstoned = drop_extra, lift_tombstoned
        self._on_progress = on_progress
        self._report = Report(entity.name, "interrupted", apply)

    async def run(self, *, stop: asyncio.Event | None = None) -> Report:
        """Repair what the last complete verify found.

        Args:
            stop: once set, the record under way is the last one. Run again, it finds the others.

        Raises:
            crossfade.errors.StoreUnavailable: a store is gone; run it again to go on.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        run = await self._last_verify()
        if run is None:
            self._report.state = "never verified"
            return self._report
        self._report.run = str(run.run)
        tables = await self._target.tables_of(self.entity)
        after, total = "", sum(run.counts.get(finding, 0) for finding in Finding)
        while found := await self._target.findings(run, limit=PORTION, after=after):
            after = found[-1]["id"]
            texts = [one["id"] for one in found]
            looked = await look_at(self.entity, self._source, self._target, tables, texts)
            for text, (now, _) in looked.items():
                if stop is not None and stop.is_set():
                    return self._report
                self._report.looked_at += 1
                if now is None:
                    self._report.equal += 1
                else:
                    await self._one(run, tables, text, now[0])
                if self._on_progress is not None:
                    self._on_progress(self._report.looked_at, total)
        self._report.state = "complete"
        self._report.seconds = loop.time() - began
        return self._report

    async def _last_verify(self) -> Run | None:
        runs = self._target.runs
        full = await runs.latest(self._migration, self.entity, KIND, state="complete")
        fast = await runs.latest(self._migration, self.entity, FAST, state="complete")
        if full is None or fast is None:
            return full or fast
        return await runs.newer(full, fast)

    def _action(self, finding: Finding) -> str | None:
        """What is to be done; None: nothing."""
        if finding.is_explained:
            return None
        if self._means.primary == "postgres":
            # A document without a row is nothing that PostgreSQL could bring; a person decides.
            return None if finding in (Finding.MISSING, Finding.TOMBSTONED) else "from primary"
        if finding in (Finding.EXTRA, Finding.TOMBSTONE_MISSING):
            return "drop row" if self._drop_extra else None
        if finding is Finding.TOMBSTONED:
            return "from primary" if self._lift_tombstoned else None
        return "from primary"

    async def _one(self, run: Run, tables: EntityTables, text: str, finding: Finding) -> None:
        action = self._action(finding)
        try:
            id_ = text_to_id(text)
        except ValueError:
            action = None  # no write can name it
        if action is None:
            return self._note("kept", text, finding)
        if not self._apply:
            return self._note("to_do", text, finding)
        row = (await self._target.read_ids(tables, [text])).get(text)
        number = await self._target.begin_repair(
            run, self.entity, text, finding, action, self._by, row, self._content(row)
        )
        if action == "from primary":
            await self._means.from_primary(self.entity, id_)
        elif row is not None:
            await self._means.drop_row(self.entity, id_, row.rev)
        now = await self._now(tables, text)
        if now is Finding.DIFFERENT and action == "from primary":
            await self._means.anew(self.entity, id_)
            now = await self._now(tables, text)
        row = (await self._target.read_ids(tables, [text])).get(text)
        await self._target.end_repair(number, row, self._content(row))
        if now is None:
            return self._note("repaired", text, finding)
        return self._note("left", text, now)

    async def _now(self, tables: EntityTables, text: str) -> Finding | None:
        """How a record differs now; None: not."""
        [(now, _)] = (await look_at(self.entity, self._source, self._target, tables, [text])).values()
        return None if now is None else now[0]

    def _content(self, row: StoredRecord | None) -> bytes | None:
        """The document that a row gives back; None where it gives none."""
        if row is None:
            return None
        try:
            return encode_document(self.entity.from_rows(row.parent, row.children))
        except (Unmappable, ValueError, KeyError, IndexError, TypeError):
            return None

    def _note(self, outcome: str, text: str, finding: Finding) -> None:
        counts: Counter[str] = getattr(self._report, outcome)
        counts[finding.value] += 1
        if counts[finding.value] <= SAMPLES:
            self._report.samples.append({"id": text, "finding": finding.value, "outcome": outcome})
