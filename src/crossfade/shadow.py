"""Shadow read: what one store has just served is compared with what the other one would have answered.

What it promises
    Whatever happens here, the caller has its answer already: offering one takes no time worth speaking of and never
    raises; the queue is bounded and what does not fit is dropped and counted; each look has a deadline of its own.

    A mismatch is no accident of timing. What differs at first sight is looked at again, up to
    `Options.shadow_looks` later, record by record: the primary first, the other store, the primary once more. Only
    a record that the primary shows unchanged around that look, that is not in debt and not in quarantine counts:
    its debt was erased, so the other store has confirmed this very revision, and does not hold it.

    A comparison that never came to rest (the record was written all the time, or stayed in debt) is none: the
    evidence is made of those that ended equal.

Counts are added up in PostgreSQL by all workers, in batches, per mapping and per entry into the phase: a changed
mapping, or the phase entered anew, begins at 0 (`crossfade.guard`).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from bson import ObjectId

from crossfade import errors, observe
from crossfade.board import Pair, end
from crossfade.control import Control
from crossfade.entity import Entity
from crossfade.part import digest_with, parts_of
from crossfade.phase import Phase
from crossfade.record import Image
from crossfade.stores.errors import Fenced
from crossfade.stores.shadow_notes import Mismatch
from crossfade.values import Unmappable, digest, fields_that_differ, id_to_text, text_to_id

#: Comparisons at one time: enough to keep up, too few to matter to the stores.
_AT_ONCE = 2
#: Mismatches kept in memory while PostgreSQL does not take them; the rest is counted only.
_KEPT = 1_000

#: What rows raise that give no document; and how an answer with such rows is told.
_UNREADABLE = (KeyError, IndexError, ValueError, TypeError)
_UNTOLD = "(unreadable)"

#: Answers a question with at most so many seconds.
Ask = Callable[[float], Awaitable[Any]]
#: An answer without its content: {id text: (revision, digest)}, or a number of records.
Told = dict[str, tuple[int, bytes]] | int


class Cause(StrEnum):
    """How the two stores' answers differ; the first six are a record's own, in the words of a verify."""

    #: A document without rows.
    MISSING = "missing"
    #: Rows without a document.
    EXTRA = "extra"
    #: The row is at an older revision, and nothing notes that it is owed.
    BEHIND = "behind"
    #: The row is at a newer revision than the document.
    AHEAD = "ahead"
    #: Equal in revision; the row is as it was written: the document was changed behind Crossfade's back.
    FOREIGN_WRITE = "foreign_write"
    #: Equal in revision, other in content.
    DIFFERENT = "different"
    #: The record is the same in both, and only one of them finds it by this question.
    FOUND_OTHERWISE = "found_otherwise"
    #: Each counts another number of records.
    COUNTED_OTHERWISE = "counted_otherwise"


class Outcome(StrEnum):
    """How a comparison ended."""

    EQUAL = "equal"
    MISMATCH = "mismatch"
    #: It differs for a known reason (quarantine), or never came to rest.
    UNSETTLED = "unsettled"
    #: The queue was full.
    DROPPED = "dropped"
    #: A store did not answer in time, or something went wrong here.
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One record, looked at in both stores.

    Attributes:
        at_rest: whether the look says anything: False while it is in debt, written, or in quarantine.
        cause: how it differs; None when it does not.
        fields: names of the top-level fields that differ.
        mongo, postgres: revision in each; None where there is none.
    """

    at_rest: bool
    cause: Cause | None = None
    fields: tuple[str, ...] = ()
    mongo: int | None = None
    postgres: int | None = None


@dataclass(slots=True)
class _Comparison:
    """An answer that was served, and how to ask both stores for it once more."""

    entity: Entity
    question: str
    told: Told
    served: Ask
    other: Ask
    entered: int
    without: Collection[str] = ()
    looks: int = 0


@dataclass
class Shadow:
    """Compares reads of one migration in one worker; see the module's docstring."""

    pair: Pair
    _queue: asyncio.Queue[_Comparison] = field(init=False)
    #: Comparisons that wait to be looked at again.
    _waiting: int = 0
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    #: By the epoch at which the phase was entered.
    _counts: dict[int, Counter[str]] = field(default_factory=dict)
    _mismatches: dict[tuple[str, str], Mismatch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._queue = asyncio.Queue(self.pair.options.shadow_queue)

    def start(self) -> None:
        """Compare in the background until `stop`."""
        work = [self._compare_on() for _ in range(_AT_ONCE)] + [self._flush_on()]
        self._tasks = [asyncio.create_task(each, name=f"shadow reads of {self.pair.name}") for each in work]

    async def stop(self) -> None:
        """Stop comparing; what has been counted is kept, what waits is not."""
        for task in self._tasks:
            await end(task)
        if self._tasks:
            self._tasks.clear()
            with contextlib.suppress(errors.CrossfadeError):
                await self.flush(timeout=1.0)  # a worker that ends waits for nothing that hangs

    def is_on(self, control: Control) -> bool:
        """Whether reads are compared where the migration stands."""
        if control.phase is Phase.POSTGRES_READ:
            return self.pair.options.shadow_postgres_read
        return control.phase.rules.read == "shadow"

    # --- on the caller's path --------------------------------------------------------------------------------

    def offer(
        self,
        entity: Entity,
        question: str,
        answer: Any,
        source: str,
        mongo: Ask,
        postgres: Ask,
        limit: int = 0,
        without: Collection[str] = (),
    ) -> None:
        """Take an answer that was served by ``source``, to be compared; returns at once, and never raises.

        ``question`` says for a person how it was asked, without values. ``limit``: of a list, where it ends.
        ``without``: parts that were not asked for.
        """
        try:
            control = self.pair.board.control
            options = self.pair.options
            if not self._tasks or not self.is_on(control) or random.random() >= options.shadow_sample:
                return
            told = _told(entity, answer, without, computed=source == "postgres")
            if limit and not isinstance(told, int) and len(told) >= limit and not _in_one_order(answer):
                return  # the two stores cut such a list at different places
            served, other = (mongo, postgres) if source == "mongo" else (postgres, mongo)
            self._put(_Comparison(entity, question, told, served, other, control.phase_epoch, without))
        except Exception as cause:
            observe.SHADOW_READS.labels(self.pair.name, entity.name, Outcome.FAILED.value).inc()
            _log(cause)

    def _put(self, one: _Comparison) -> None:
        try:
            self._queue.put_nowait(one)
        except asyncio.QueueFull:
            self._count(one, Outcome.DROPPED)

    def _count(self, one: _Comparison, outcome: Outcome) -> None:
        observe.SHADOW_READS.labels(self.pair.name, one.entity.name, outcome.value).inc()
        self._counts.setdefault(one.entered, Counter())[outcome.value] += 1

    # --- behind the caller's back ------------------------------------------------------------------------------

    async def _compare_on(self) -> None:
        while True:
            one = await self._queue.get()
            try:
                outcome = await self._look(one)
            except (errors.StoreUnavailable, Fenced):
                outcome = Outcome.FAILED
            except Unmappable:
                outcome = Outcome.UNSETTLED  # belongs into quarantine, which says so
            except Exception as cause:
                outcome = Outcome.FAILED
                _log(cause)
            if outcome is not None:
                self._count(one, outcome)

    async def _look(self, one: _Comparison) -> Outcome | None:
        """Look once; None: it is to be looked at again."""
        if not one.looks and await self._ask(one, one.other) == one.told:
            return Outcome.EQUAL
        if one.looks:
            served, other = await self._ask(one, one.served), await self._ask(one, one.other)
            if served == other:
                return Outcome.EQUAL
            if one.looks >= len(self.pair.options.shadow_looks):
                return await self._conclude(one, served, other)
        self._again(one)
        return None

    async def _ask(self, one: _Comparison, ask: Ask) -> Told:
        try:
            answer = await ask(self.pair.options.shadow_deadline)
            return _told(one.entity, answer, one.without, computed=True)
        except Unmappable:
            raise
        except _UNREADABLE:
            return {_UNTOLD: (-1, b"")}

    def _again(self, one: _Comparison) -> None:
        if self._waiting >= self.pair.options.shadow_queue:
            self._count(one, Outcome.DROPPED)
            return
        self._waiting += 1
        delay = self.pair.options.shadow_looks[one.looks]
        one.looks += 1

        def due() -> None:
            self._waiting -= 1
            self._put(one)

        asyncio.get_running_loop().call_later(delay, due)

    async def _conclude(self, one: _Comparison, served: Told, other: Told) -> Outcome:
        """The last look: which records differ, and do they at rest?"""
        entity = one.entity
        if isinstance(served, int) or isinstance(other, int):
            owed = self.pair.board.look is None or entity.name in self.pair.board.look.owed_entities
            if owed or await self._ask(one, one.served) != served:
                return Outcome.UNSETTLED
            self._note(one, f"({one.question})", Verdict(True, Cause.COUNTED_OTHERWISE))
            return Outcome.MISMATCH
        differing = sorted(text for text in {*served, *other} if served.get(text) != other.get(text))
        differing = [text for text in differing if text != _UNTOLD]
        verdicts = {text: await self.look_at(entity, text_to_id(text)) for text in differing}
        if not all(verdict.at_rest for verdict in verdicts.values()):
            return Outcome.UNSETTLED
        found = {text: verdict for text, verdict in verdicts.items() if verdict.cause is not None}
        if not found:
            if _UNTOLD in other:
                return Outcome.UNSETTLED
            # Each record is the same in both. Then so is the answer, unless it was written meanwhile.
            now = await self._ask(one, one.served)
            if now != served or await self._ask(one, one.other) == now:
                return Outcome.UNSETTLED
            found = {text: Verdict(True, Cause.FOUND_OTHERWISE) for text in differing}
        for text, verdict in found.items():
            self._note(one, text, verdict)
        return Outcome.MISMATCH

    async def look_at(self, entity: Entity, id_: Any) -> Verdict:
        """One record in both stores, now.

        Raises:
            crossfade.errors.StoreUnavailable: one of them does not answer.
        """
        mongo, postgres, timeout = self.pair.mongo, self.pair.postgres, self.pair.options.shadow_deadline
        try:
            before = await mongo.read(entity, id_, timeout=timeout)
            row: Image | None = None
            how: tuple[Cause | None, tuple[str, ...]] = (Cause.DIFFERENT, (_UNTOLD,))
            with contextlib.suppress(*_UNREADABLE):
                row = await postgres.read(entity, id_, timeout=timeout)
                how = differ(entity, before, row)
            cause, fields = how
            revisions = (None if before is None else before.rev, None if row is None else row.rev)
            if cause is None:
                return Verdict(True, None, (), *revisions)
            if not await self._is_at_rest(entity, id_, before):
                return Verdict(False, cause, fields, *revisions)
            after = await mongo.read(entity, id_, timeout=timeout)
        except Unmappable:
            return Verdict(False)
        unchanged = _marks(before) == _marks(after)
        return Verdict(unchanged, cause, fields, *revisions)

    async def _is_at_rest(self, entity: Entity, id_: Any, document: Image | None) -> bool:
        timeout = self.pair.options.shadow_deadline
        if document is None:
            buried = await self.pair.mongo.tombstone(entity, id_, timeout=timeout)
            return buried is None or not buried.owed
        if document.debt is not None or document.deleted:
            return False
        entries = await self.pair.postgres.quarantined_among(entity, [id_], timeout=timeout)
        return entries.get(id_to_text(id_)) != document.digest

    # --- kept in PostgreSQL --------------------------------------------------------------------------------------

    def _note(self, one: _Comparison, text: str, verdict: Verdict) -> None:
        key = (one.entity.name, text)
        if key not in self._mismatches and len(self._mismatches) >= _KEPT:
            return
        seen = self._mismatches[key].seen if key in self._mismatches else 0
        assert verdict.cause is not None
        self._mismatches[key] = Mismatch(
            *key, verdict.cause.value, verdict.fields, one.question, verdict.mongo, verdict.postgres, seen + 1
        )

    async def _flush_on(self) -> None:
        while True:
            await asyncio.sleep(self.pair.options.shadow_flush)
            try:
                await self.flush()
            except errors.CrossfadeError as cause:
                observe.log().debug(f"Shadow reads cannot be counted: {cause}", context="Shadow Read")

    async def flush(self, *, timeout: float | None = None) -> None:
        """Add to PostgreSQL what was counted here since the last time; ``timeout``: other than for what nobody awaits.

        Raises:
            crossfade.errors.StoreUnavailable: it does not answer; the counts wait for the next time.
            crossfade.errors.SchemaNotReady: its tables are older than this release.
        """
        timeout, notes = timeout or self.pair.options.bulk_deadline, self.pair.postgres.shadow
        # Mismatches first: a count must not be there without what it found.
        mismatches, self._mismatches = self._mismatches, {}
        try:
            if mismatches:
                await notes.note(mismatches.values(), timeout=timeout)
        except BaseException:
            self._mismatches = mismatches | self._mismatches
            raise
        for entered in list(self._counts):
            counted = self._counts.pop(entered)
            try:
                await notes.count(
                    self.pair.name, mapping_of(self.pair.entities.values()), entered, counted, timeout=timeout
                )
            except BaseException:
                self._counts[entered] = counted + self._counts.get(entered, Counter())
                raise


def mapping_of(entities: Iterable[Entity]) -> str:
    """The versions of a migration's mappings, as one text: what is compared rests on them."""
    return ", ".join(sorted(f"{entity.name} {entity.mapping_version}" for entity in entities))


def differ(entity: Entity, document: Image | None, row: Image | None) -> tuple[Cause | None, tuple[str, ...]]:
    """How a document and its rows differ, and in which fields; a document whose delete was decided counts as gone."""
    if document is None or document.deleted:
        return (None if row is None else Cause.EXTRA), ()
    if row is None:
        return Cause.MISSING, ()
    content = _content(entity, row)
    fields = () if content == document.digest else fields_that_differ(document.document, row.document)
    if row.rev != document.rev:
        return (Cause.BEHIND if row.rev < document.rev else Cause.AHEAD), fields
    if not fields:
        return None, ()
    as_written = row.digest == content and row.op == document.op
    return (Cause.FOREIGN_WRITE if as_written else Cause.DIFFERENT), fields


def _told(entity: Entity, answer: Any, without: Collection[str], *, computed: bool) -> Told:
    """``computed``: by the content itself, where the digest that comes along is a stored one."""
    if isinstance(answer, int):
        return answer
    images: list[Image] = [] if answer is None else [answer] if isinstance(answer, Image) else answer
    return {
        id_to_text(image.id): (
            image.rev,
            _content(entity, image, without) if computed or without else image.digest,
        )
        for image in images
    }


def _content(entity: Entity, image: Image, without: Collection[str] = ()) -> bytes:
    """The digest of what an image holds; ``without``: of the rest."""
    if without:
        return digest({name: value for name, value in image.document.items() if name not in without})
    return digest_with(image.document, parts_of(image.document, entity.parts, {}, image.rev))


def _in_one_order(images: Iterable[Image]) -> bool:
    """Whether both stores have these ids in the same order: as BSON, and as text."""
    return all(isinstance(image.id, ObjectId) for image in images)


def _marks(image: Image | None) -> tuple[Any, ...] | None:
    return None if image is None else (image.rev, image.op, image.digest, image.debt is None, image.deleted)


def _log(cause: Exception) -> None:
    # Without its text: that may hold values of a document.
    observe.log().warning(f"A shadow read went wrong: {type(cause).__name__}", context="Shadow Read")
