"""The write protocol for single records.

**MongoDB primary.** One update of one document carries the data, revision n+1, the operation id and the debt:
there is no instant at which a crash leaves a difference that is not recorded. Then PostgreSQL gets the image
that MongoDB gave back; then the debt is erased, in batches.

**PostgreSQL primary.** One transaction carries the rows, revision n+1 and an outbox row. Then MongoDB gets the
image; then the outbox row goes.

**Unknown outcomes.** A write that was not answered is sent again, the same compare-and-set: of the two only one
can match, so afterwards it is decided, and the operation id says whose it was. Reading alone would decide
nothing: a delayed request can run after the read.

**ROLLBACK_BOTH.** The debt is born tentative, with the values before, in the same update. Success is told only
after a compare-and-set from tentative to confirmed; what is still tentative past its deadline the reconciler
undoes, *whatever the secondary did*: the undo is the newer revision.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import bson
from bson.int64 import Int64

from crossfade import errors, observe
from crossfade.board import Pair
from crossfade.clock import boot_clock
from crossfade.control import Control
from crossfade.debt import Settler, keys_to_stamp
from crossfade.delivery import ATTEMPTS
from crossfade.entity import Entity
from crossfade.part import Carried, Part, carried_by, noted_parts
from crossfade.query import assert_values
from crossfade.record import (
    CF,
    Applied,
    Debt,
    Image,
    Record,
    Settled,
    Step,
    Steps,
    acceptable_key,
    new_id,
    new_operation,
    stamped_keys,
)
from crossfade.steps import Placed, joined, members
from crossfade.stores.errors import Fenced, RuleBroken, Unanswered
from crossfade.stores.postgres import Ahead, Change, Delivery
from crossfade.strategy import FailureStrategy, check_strategy, default_strategy
from crossfade.values import (
    CODEC_OPTIONS,
    Unmappable,
    can_be_id,
    encode_document,
    equal,
    id_to_text,
    text_to_id,
)

_T = TypeVar("_T")
_FAILED = (errors.StoreUnavailable, Fenced)
#: What is raised of a write that may stand; and what only a primary that has answered decides: it was not made.
_SAY_WHAT_BECAME = (errors.OutcomeUnknown, errors.Undone, errors.UndoPending)
_DECIDED = (errors.NotFound, errors.DuplicateKey, errors.StaleRevision, errors.ConditionNotMet)
#: Seconds for the answer of a ``mode="async"`` write to leave the process before its other half takes the processor.
_ANSWER_FIRST = 0.005
#: Seconds that an attempt upon a busy record must have: one cut short would leave open what became of it.
_LAST_ATTEMPT = 0.25


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller asks of any write.

    Attributes:
        context: names the operation in log lines.
        strategy: None for the phase's default.
        asynchronous: acknowledge once the primary has it.
        where: an update only: fields that must equal these values, or nothing is written.
        steps: what the operation does to other records, once this one has decided it.
    """

    context: str
    strategy: FailureStrategy | None = None
    asynchronous: bool = False
    where: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()


@dataclass(slots=True)
class _Fate:
    """What is known of a write.

    Attributes:
        unanswered: it was sent, and the primary has not answered: it may have been made.
        made: it is in the primary.
    """

    unanswered: bool = False
    made: bool = False

    def leaves_open(self, cause: errors.CrossfadeError) -> bool:
        """Whether this error says less than there is to say: no write that may stand is told as one that failed."""
        says = _SAY_WHAT_BECAME if self.made else (*_SAY_WHAT_BECAME, *_DECIDED)
        return (self.made or self.unanswered) and not isinstance(cause, says)


@dataclass(frozen=True, slots=True)
class _Operation:
    """One write on its way.

    Attributes:
        kind: "insert", "update" or "delete".
        control: the control record it was admitted under.
        ends: when the primary must have answered, by `boot_clock`.
        decider: (entity, id text) of the record.
        fate: what is known of it, in whatever attempt.
    """

    kind: str
    context: str
    strategy: FailureStrategy
    asynchronous: bool
    control: Control
    op: str
    ends: float
    request: Request
    decider: tuple[str, str]
    fate: _Fate

    @property
    def rollback(self) -> bool:
        return self.strategy is FailureStrategy.ROLLBACK_BOTH

    @property
    def everybody(self) -> list[tuple[str, str]]:
        """(entity, id text) of every record of an operation of several."""
        return [self.decider, *((step.entity, id_to_text(step.id)) for step in self.request.steps)]

    def left(self) -> float:
        """Seconds until the deadline; never less than a hundredth."""
        return max(0.01, self.ends - boot_clock())


@dataclass
class Writer:
    """Writes single records of one migration, in the direction and by the strategy that its phase asks for."""

    pair: Pair
    settler: Settler
    _background: set[asyncio.Task[None]] = field(default_factory=set)

    # --- what an application calls (through migration.EntityHandle) ------------------------------------------

    async def insert(self, entity: Entity, document: Mapping[str, Any], request: Request) -> Record:
        """Insert a document; ``_id`` is made where it has none.

        Raises:
            crossfade.errors.DuplicateKey: the id, or a value of a unique rule, is taken.
            crossfade.errors.CrossfadeError: as the strategy has it; see errors.py.
        """
        given = "_id" in document
        whole = as_stored({"_id": document["_id"] if given else new_id(), **document})

        async def run(o: _Operation) -> Record:
            if o.control.phase.rules.primary == "mongo":
                return await self._mongo_insert(entity, whole, o, id_given=given)
            return await self._postgres_write(entity, whole["_id"], o, insert=whole)

        return await self._operate(entity, "insert", whole["_id"], request, run)

    async def update(
        self,
        entity: Entity,
        id_: Any,
        request: Request,
        *,
        set_: Mapping[str, Any],
        unset: Iterable[str],
        if_revision: int | None,
    ) -> Record:
        """Set and remove top-level fields.

        Raises:
            crossfade.errors.ConfigurationError: an argument cannot be; no store was asked.
            crossfade.errors.NotFound, StaleRevision, ConditionNotMet, DuplicateKey: nothing was changed.
            crossfade.errors.CrossfadeError: as the strategy has it; see errors.py.
        """
        removed = tuple(unset)
        assert_writable(entity, set_, removed)
        assert_values(entity.name, request.where)
        wrote = as_stored(set_)
        if request.where:
            request = replace(request, where=as_stored(request.where))

        async def run(o: _Operation) -> Record:
            if o.control.phase.rules.primary == "mongo":
                return await self._mongo_update(entity, id_, wrote, removed, if_revision, o)
            return await self._postgres_write(
                entity, id_, o, wrote=wrote, removed=removed, if_revision=if_revision
            )

        return await self._operate(entity, "update", id_, request, run)

    async def delete(self, entity: Entity, id_: Any, request: Request) -> None:
        """Delete a record for good: a tombstone keeps it from coming back.

        Raises:
            crossfade.errors.NotFound: nothing was changed.
            crossfade.errors.CrossfadeError: as the strategy has it; see errors.py.
        """

        async def run(o: _Operation) -> Record:
            if o.control.phase.rules.primary == "mongo":
                return await self._mongo_delete(entity, id_, o)
            return await self._postgres_write(entity, id_, o)

        await self._operate(entity, "delete", id_, request, run)

    async def close(self) -> None:
        """Wait at most a second for ``mode="async"`` writes under way; their debts stand."""
        if self._background:
            await asyncio.wait(self._background, timeout=1.0)
        cancelled = set(self._background)
        for task in cancelled:
            task.cancel()
        if cancelled:
            await asyncio.wait(cancelled)

    # --- the frame of every write -----------------------------------------------------------------------------

    async def _operate(self, entity: Entity, kind: str, id_: Any, request: Request, run: Any) -> Record:
        if any((step.entity, step.id) == (entity.name, id_) for step in request.steps):
            raise errors.ConfigurationError(
                f"the record of {entity.name} that decides an operation cannot have a step in it: set its fields there"
            )
        for each in (id_, *(step.id for step in request.steps)):
            _assert_id(entity, each)
        began = time.perf_counter()
        self.pair.asked = boot_clock()
        options = self.pair.options
        context, strategy, asynchronous = request.context, request.strategy, request.asynchronous
        chosen, fate = strategy, _Fate()
        outcome = "failed"
        try:
            for _ in range(ATTEMPTS):
                control = await self._admit()
                chosen = strategy or default_strategy(control.phase, control.strategy)
                check_strategy(chosen, control.phase, asynchronous=asynchronous)
                o = _Operation(
                    kind, context, chosen, asynchronous, control, new_operation(),
                    boot_clock() + options.primary_deadline, request, (entity.name, id_to_text(id_)), fate,
                )  # fmt: skip
                with self.pair.board.gate.entered(control.epoch, o.everybody):
                    try:
                        record: Record = await run(o)
                    except _NotAdmitted:
                        continue
                    if not (self.pair.board.leased(control.epoch) or await self._same_epoch(control)):
                        raise errors.OutcomeUnknown(
                            f"[{context}] the write was made, but this worker's lease ran out meanwhile: it may not "
                            "tell whether the store it wrote to is still the primary"
                        )
                outcome = "acknowledged"
                return record
            raise errors.Busy(f"[{context}] the phase kept changing while the write was on its way")
        except errors.CrossfadeError as cause:
            outcome = (errors.OutcomeUnknown if fate.leaves_open(cause) else type(cause)).__name__
            if fate.leaves_open(cause):
                raise errors.OutcomeUnknown(
                    f"[{context}] the write may have been made, and what became of it cannot be told: {cause}"
                ) from cause
            raise
        except Unmappable as cause:
            outcome = errors.OutcomeUnknown.__name__
            raise errors.OutcomeUnknown(
                f"[{context}] a foreign writer has put into this record of {entity.name} what cannot be read "
                f"({cause}), so whether the write was made cannot be told; mend the document in MongoDB"
            ) from cause
        finally:
            name = chosen.value if chosen else "default"
            observe.of(observe.WRITES, self.pair.name, entity.name, kind, name, outcome).inc()
            observe.of(observe.WRITE_SECONDS, self.pair.name, kind).observe(time.perf_counter() - began)

    async def _admit(self) -> Control:
        board = self.pair.board
        control = await board.steady()
        if not board.lease_valid:
            # A look may only be late: take one before refusing.
            await board.obtain_lease()
            control = await board.steady()
        return control

    async def _same_epoch(self, control: Control) -> bool:
        """Whether nothing has changed since this control record: no epoch is used again, so none came in between."""
        with contextlib.suppress(errors.CrossfadeError):
            return (await self.pair.board.refresh()).control.epoch == control.epoch
        return False

    def _say(self, o: _Operation, text: str, *, warn: bool = False) -> None:
        logger = observe.log()
        (logger.warning if warn else logger.info)(text, context=o.context)

    # --- MongoDB primary --------------------------------------------------------------------------------------

    def _marks(
        self,
        entity: Entity,
        id_: Any,
        o: _Operation,
        rev: int,
        keys: Mapping[str, str],
        tentative: Any,
        notes: Mapping[str, Any] | None = None,
        parts: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """What a write puts under ``_cf``; ``notes`` is what stands there, ``parts`` are those that it writes."""
        marks: dict[str, Any] = {"rev": Int64(rev), "op": o.op}
        if keys:
            marks["keys"] = dict(keys)
        before = Debt.from_document((notes or {}).get("debt"))
        # What an earlier operation of several still owes together stays owed together.
        group = () if before is None else before.group
        owed = parts if before is None else tuple(dict.fromkeys((*before.parts, *parts)))
        if o.request.steps:
            steps = Steps(o.op, o.request.steps, "open" if o.rollback else "decided")
            marks["steps"] = steps.to_document()
            group = (*group, *members(entity, id_, steps, None))
        if o.control.phase.rules.dual:
            debt = Debt(o.control.epoch, tentative if o.rollback else None, group=joined(group), parts=owed)
            marks["debt"] = debt.to_document()
        return marks

    async def _mongo_insert(
        self, entity: Entity, document: dict[str, Any], o: _Operation, *, id_given: bool
    ) -> Record:
        keys = entity.keys(document)
        self._say(o, "Writing to MongoDB...")
        for _ in range(ATTEMPTS):
            buried = (
                await self.pair.mongo.tombstone(entity, document["_id"], timeout=o.left())
                if id_given
                else None
            )
            rev = 1 if buried is None else buried.rev + 1
            its_parts = tuple(name for name in entity.parts if document.get(name) is not None)
            marks = self._marks(entity, document["_id"], o, rev, keys, {"kind": "insert"}, parts=its_parts)
            if "debt" in marks:
                marks["debt"]["sending"] = new_operation()
            stored = {**document, CF: marks | {"born": o.op}}
            image = _meanwhile(functools.partial(Image.from_document, dict(stored), entity.parts))
            with self._ahead(entity, image, o) as ahead:
                made = await self._insert_until_decided(entity, stored, image, o)
                if made is not None:
                    if id_given and await self._was_buried_meanwhile(entity, stored, o):
                        continue
                    if ahead is not None:
                        await ahead.decide(made)
                    self._say(o, "MongoDB write successful")
                    return await self._then_postgres(entity, made, o, ahead)
        raise errors.Busy(f"[{o.context}] this record of {entity.name} is being deleted again and again")

    async def _was_buried_meanwhile(self, entity: Entity, stored: Mapping[str, Any], o: _Operation) -> bool:
        """Whether others made and deleted this id since its tombstone was read; then the document is taken back.

        Its revision would be one that was told before. Nobody has been told of it yet (`MongoStore.standing`), so it is
        made once more above the new tombstone.

        Raises:
            crossfade.errors.OutcomeUnknown: MongoDB does not say; or somebody has lifted or written upon it already.
        """
        try:
            buried = await self.pair.mongo.tombstone(entity, stored["_id"], timeout=o.left())
            if buried is None or buried.rev < stored[CF]["rev"] or o.op in buried.born:
                return False
            if await self.pair.mongo.remove_echo(entity, stored["_id"], op=o.op, timeout=o.left()):
                return True
        except errors.StoreUnavailable as cause:
            raise errors.OutcomeUnknown(
                f"[{o.context}] MongoDB holds the write, but does not say whether it stands: {cause}"
            ) from cause
        raise _written_since(entity, o)

    async def _insert_until_decided(
        self, entity: Entity, stored: dict[str, Any], image: Callable[[], Image], o: _Operation
    ) -> Image | None:
        """Insert, repeated until it is decided: the image that was made; None: a decided delete stood in the way."""
        unknown = False
        debt = stored[CF].get("debt")
        while True:
            if unknown and debt is not None:
                debt["sending"] = new_operation()
            try:
                await self.pair.mongo.insert(entity, stored, timeout=o.left())
            except Unanswered as cause:
                unknown = o.fate.unanswered = True
                await self._again(o, cause)
                continue
            except errors.StoreUnavailable as cause:
                if not unknown:
                    self._say(o, f"MongoDB write failed: {cause}", warn=True)
                    raise
                await self._again(o, cause)
                continue
            except RuleBroken as cause:
                mine = await self._read_or_unknown(entity, stored["_id"], o, unknown=unknown)
                if mine is None or mine.op != o.op:
                    if unknown:
                        raise _written_since(entity, o) from cause
                    if mine is not None and await self._roll_delete_forward(entity, mine, o):
                        return None
                    rule = (
                        "_id"
                        if mine is not None
                        else await self._broken_rule(entity, stored, stored["_id"], cause)
                    )
                    self._say(o, f"MongoDB write refused: the rule {rule!r} is broken")
                    raise errors.DuplicateKey(entity.name, rule) from cause
                # An earlier sending has made it.
                if debt is not None:
                    debt["sending"] = None if mine.debt is None else mine.debt.sending
            if not unknown:
                return image()
            made = replace(image(), debt=Debt.from_document(debt))
            # Somebody may have deleted what a request that was not answered had made.
            try:
                echo = await self.settler.is_echo(entity, made)
            except errors.StoreUnavailable as cause:
                await self._again(o, cause)
                continue
            if echo:
                raise _written_since(entity, o)
            return made

    async def _roll_delete_forward(self, entity: Entity, there: Image, o: _Operation) -> bool:
        """Bury and remove a document whose delete is decided, so that its id is free; False: it is not."""
        tentative = there.debt is not None and there.debt.tentative is not None
        if not there.deleted or tentative or there.op is None:
            return False
        if there.steps is not None:
            await self.settler.roll_forward(entity, there, o.control, ends=o.ends)
        await self.settler.bury(entity, there)
        return True

    async def _again(self, o: _Operation, cause: errors.StoreUnavailable) -> None:
        """Pause before the same request is sent again.

        Raises:
            crossfade.errors.OutcomeUnknown: the deadline has passed.
        """
        if boot_clock() >= o.ends:
            self._say(o, f"MongoDB write not answered: {cause}", warn=True)
            raise errors.OutcomeUnknown(
                f"[{o.context}] MongoDB did not say within the deadline whether it holds the write; whichever it "
                "is, both stores are made equal"
            ) from cause
        await asyncio.sleep(0.05)

    async def _read_or_unknown(
        self, entity: Entity, id_: Any, o: _Operation, *, unknown: bool
    ) -> Image | None:
        while True:
            try:
                return await self.pair.mongo.read_owed(entity, id_, timeout=o.left())
            except Unmappable as cause:
                if unknown:
                    raise
                raise errors.Quarantined(
                    f"[{o.context}] {entity.name} has a record with this id already, and it cannot be read: {cause}"
                ) from cause
            except errors.StoreUnavailable as cause:
                if not unknown:
                    raise
                await self._again(o, cause)

    async def _broken_rule(
        self, entity: Entity, fields: Mapping[str, Any], id_: Any, cause: RuleBroken
    ) -> str:
        """Which rule was broken: not every server names the index."""
        keys = entity.keys(fields)
        for rule in entity.unique:
            if f"{CF}.keys.{rule.rule}" in cause.constraint:
                return rule.rule
        for rule in entity.unique:
            checks: list[dict[str, Any]] = []
            if rule.rule in keys:
                checks.append({f"{CF}.keys.{rule.rule}": keys[rule.rule]})
            if rule.field in fields:
                checks.append({rule.field: fields[rule.field]})
            for query in checks:
                timeout = self.pair.options.primary_deadline
                for other in await self.pair.mongo.look_up(entity, [query], timeout=timeout):
                    if other.id != id_:
                        return rule.rule
        return cause.constraint or "unique"

    async def _mongo_update(
        self,
        entity: Entity,
        id_: Any,
        wrote: Mapping[str, Any],
        removed: tuple[str, ...],
        if_revision: int | None,
        o: _Operation,
    ) -> Record:
        unique_fields = [rule.field for rule in entity.unique]
        where = o.request.where
        looked_at = {*unique_fields, *where, *((*wrote, *removed) if o.rollback else ())}
        self._say(o, "Writing to MongoDB...")
        seen, kept = self._seen(entity, id_, {*wrote, *removed}, if_revision, o) or (None, None)
        for _ in range(ATTEMPTS * 4):
            if seen is not None:
                debt = None if seen.debt is None else seen.debt.to_document()
                notes: dict[str, Any] = {**seen.document, CF: {"keys": seen.keys, "debt": debt}}
                rev, noted = seen.rev, seen.noted
            else:
                notes, rev = await self._base(entity, id_, looked_at, if_revision, o)
                id_ = notes["_id"]  # as it is kept: a number may have been given in another type
                noted = noted_parts(notes.get(CF) or {}, entity.parts)
            carried = carried_by(entity.parts, noted, wrote=wrote, removed=removed)
            missed = [name for name in where if name not in notes or not equal(notes[name], where[name])]
            if missed:
                raise errors.ConditionNotMet(
                    f"[{o.context}] this record of {entity.name} has another value in {', '.join(missed)} by now"
                )
            cf = notes.get(CF) or {}
            stamped = stamped_keys(cf)
            future = {**{n: notes[n] for n in unique_fields if n in notes}, **wrote}
            for name in removed:
                future.pop(name, None)
            plain = entity.keys(future)
            keys = {r: k for r, k in plain.items() if not acceptable_key(stamped.get(r), k, id_)}
            nameless = [rule for rule in stamped if rule not in plain]
            tentative = None
            also: dict[str, Any] = {name: {"$eq": value} for name, value in where.items()}
            if seen is not None:
                also |= _still(entity, seen)
            if o.rollback:
                changed = (*wrote, *removed)
                before = {name: notes[name] for name in changed if name in notes}
                tentative = {
                    "kind": "update", "before": before, "wrote": dict(wrote), "removed": list(removed),
                    "keys": stamped,
                }  # fmt: skip
                # The values before must still stand when the write happens, or its undo would bring back others.
                also |= {n: {"$eq": before[n]} if n in before else {"$exists": False} for n in changed}
            marks = self._marks(entity, id_, o, rev + 1, {}, tentative, cf, carried.owed)
            set_ = {
                **wrote,
                **{f"{CF}.{name}": value for name, value in marks.items()},
                **{
                    f"{CF}.keys.{rule}": [key, stamped[rule]] if o.rollback and rule in stamped else key
                    for rule, key in keys.items()
                },
                **{f"{CF}.keys.{rule}": [stamped[rule]] for rule in nameless if o.rollback},
            }
            gone = [
                *removed,
                *(f"{CF}.keys.{rule}" for rule in nameless if not o.rollback),
                *(f"{CF}.parts.{name}" for name in carried.erased),
            ]
            foreseen = upon = None
            if seen is not None and kept is not None:
                foreseen = _foreseen(entity, kept, seen.left_out, wrote, removed, carried, o)
                if not any(child.field in wrote or child.field in removed for child in entity.children):
                    upon = seen
            with self._ahead(entity, foreseen, o, upon=upon) as ahead:
                image = await self._set_until_decided(
                    entity, id_, rev, set_, gone, also, future, o, left_out=carried.left_out,
                    foreseen=foreseen,
                )  # fmt: skip
                if image is not None:
                    if ahead is not None:
                        await ahead.decide(image)
                    self._say(o, "MongoDB write successful")
                    return await self._then_postgres(entity, image, o, ahead)
            seen = kept = None
        raise errors.Busy(f"[{o.context}] other writers kept changing this record of {entity.name}")

    def _seen(
        self, entity: Entity, id_: Any, changed: set[str], if_revision: int | None, o: _Operation
    ) -> tuple[Image, Callable[[], Image]] | None:
        """What the record was when it was read last, if this write can be made upon that; None: ask for it.

        See `Seen.last`. A write that needs to know more of it than a revision stands for is made upon what is there.
        """
        ruled = {rule.field for rule in entity.unique}
        if o.rollback or o.request.steps or o.request.where or ruled & changed:
            return None
        if entity.name in self._quarantined():
            return None
        last = self.pair.seen.last(entity, id_)
        if last is None:
            return None
        seen, _ = last
        if if_revision not in (None, seen.rev) or keys_to_stamp(entity, seen):
            return None
        if seen.parts != seen.noted:
            return None  # what has been confirmed of its parts since need not travel again
        return last

    @contextlib.contextmanager
    def _ahead(
        self,
        entity: Entity,
        image: Callable[[], Image] | None,
        o: _Operation,
        *,
        upon: Image | None = None,
    ) -> Iterator[Ahead | None]:
        """Write to PostgreSQL meanwhile what the document is going to be, where that is known; see `Ahead`.

        ``upon``: what it is now, if its children stay. An open write is not told before its outcome, and one that goes
        with others goes in their transaction.
        """
        control = self.pair.board.control
        alone = not (o.rollback or o.asynchronous or o.request.steps)
        heard = control.unreadable is None and self.pair.postgres_breaker.allows()
        if image is None or not (o.control.phase.rules.dual and alone and heard):
            yield None
            return
        ahead = self.pair.postgres.apply_ahead(
            entity, image, upon,
            migration=self.pair.name, epoch=o.control.epoch, timeout=self.pair.options.secondary_deadline,
        )  # fmt: skip
        try:
            yield ahead
        finally:
            if ahead is not None:
                ahead.drop()

    async def _base(
        self, entity: Entity, id_: Any, fields: Iterable[str], if_revision: int | None, o: _Operation
    ) -> tuple[dict[str, Any], int]:
        """The notes and revision to write upon, once no ``ROLLBACK_BOTH`` write is open.

        Raises:
            crossfade.errors.NotFound, StaleRevision: nothing to write upon.
            crossfade.errors.Busy: an open write outlasted the deadline.
        """
        names = list(fields)
        began, is_open = boot_clock(), False
        while True:
            try:
                notes = await self.pair.mongo.notes(entity, id_, names, timeout=o.left())
            except errors.StoreUnavailable as cause:
                if is_open and boot_clock() >= o.ends:
                    # A look that has no time left says nothing of the store.
                    raise _waits(entity, o) from cause
                self._say(o, f"MongoDB write failed: {cause}", warn=True)
                raise
            cf = (notes or {}).get(CF) or {}
            debt = Debt.from_document(cf.get("debt"))
            if notes is not None and debt is not None and debt.tentative is not None:
                is_open = True
                if boot_clock() >= o.ends:
                    raise _waits(entity, o)
                if not o.control.phase.rules.dual and boot_clock() - began > self.pair.options.tentative:
                    # From before a step back to phase 0, where no reconciler comes by.
                    await self.settler.finish_one(entity, id_, o.control)
                await asyncio.sleep(0.02)
                continue
            if notes is None or cf.get("deleted") or await self._is_buried(entity, notes["_id"], cf, o):
                raise errors.NotFound(f"[{o.context}] {entity.name} has no record with this id")
            if o.rollback or o.request.steps or entity.name in self._quarantined():
                await self._assert_readable(entity, id_, o)
            if "steps" in cf and (o.request.steps or o.kind == "delete"):
                there = await self.pair.mongo.read_owed(entity, id_, timeout=o.left())
                if there is not None and there.steps is not None:
                    await self.settler.roll_forward(entity, there, o.control, ends=o.ends)
                continue
            rev = int(cf.get("rev", 0))
            if if_revision is not None and rev != if_revision:
                raise errors.StaleRevision(
                    f"[{o.context}] this record of {entity.name} is at revision {rev}, not {if_revision}"
                )
            return notes, rev

    async def _is_buried(self, entity: Entity, id_: Any, cf: Mapping[str, Any], o: _Operation) -> bool:
        """Whether this is a newborn over a tombstone, which no reader sees: a revision upon it was told before."""
        newborn = Image.from_document({"_id": id_, CF: cf})
        return not await self.pair.mongo.standing(entity, [newborn], timeout=o.left())

    def _quarantined(self) -> frozenset[str]:
        look = self.pair.board.look
        return frozenset() if look is None else look.quarantined

    async def _assert_readable(self, entity: Entity, id_: Any, o: _Operation) -> None:
        """Refuse to write upon a document that cannot be carried over, or taken back, before anything is decided.

        Raises:
            crossfade.errors.Quarantined: a field that this write may not even touch holds such a value.
        """
        try:
            await self.pair.mongo.read_owed(entity, id_, timeout=o.left())
        except Unmappable as cause:
            raise errors.Quarantined(
                f"[{o.context}] this record of {entity.name} cannot be written while it holds what no store gives "
                f"back unchanged: {cause}. Mend the document in MongoDB"
            ) from cause

    async def _set_until_decided(
        self,
        entity: Entity,
        id_: Any,
        rev: int,
        set_: Mapping[str, Any],
        unset: list[str],
        also: Mapping[str, Any],
        fields: Mapping[str, Any],
        o: _Operation,
        *,
        left_out: Mapping[str, Part | None],
        foreseen: Callable[[], Image] | None = None,
    ) -> Image | None:
        """One compare-and-set, repeated until it is decided; None: another write was first."""
        unknown = False
        guard = {f"{CF}.debt.tentative": {"$exists": False}, f"{CF}.deleted": {"$ne": True}, **also}
        if o.request.steps or o.kind == "delete":
            # What it owes to others by an earlier operation must be done first.
            guard[f"{CF}.steps"] = {"$exists": False}
        while True:
            try:
                image = await self.pair.mongo.compare_and_set(
                    entity, id_, rev=rev, set_=set_, unset=unset, also=guard, left_out=left_out,
                    foreseen=foreseen, timeout=o.left(),
                )  # fmt: skip
            except Unanswered as cause:
                unknown = o.fate.unanswered = True
                await self._again(o, cause)
                continue
            except errors.StoreUnavailable as cause:
                if not unknown:
                    self._say(o, f"MongoDB write failed: {cause}", warn=True)
                    raise
                await self._again(o, cause)
                continue
            except RuleBroken as cause:
                if unknown:
                    # The request that was not answered may yet arrive, once the value is free.
                    raise _written_since(entity, o) from cause
                rule = await self._broken_rule(entity, fields, id_, cause)
                self._say(o, f"MongoDB write refused: the rule {rule!r} is broken")
                raise errors.DuplicateKey(entity.name, rule) from cause
            if image is not None or not unknown:
                return image
            now = await self._read_or_unknown(entity, id_, o, unknown=True)
            if now is not None and now.op == o.op:
                return now
            if now is None and o.kind == "delete":
                buried = await self.pair.mongo.tombstone(entity, id_, timeout=o.left())
                if buried is not None and buried.op == o.op:
                    return Image(id_, {"_id": id_}, buried.rev, o.op, {}, b"", deleted=True)
            if now is None or now.rev > rev + 1:
                # Somebody has written upon revision n+1, and nothing says any more whose that was.
                raise _written_since(entity, o)
            o.fate.unanswered = False  # revision n+1 is somebody else's
            return None

    async def _mongo_delete(self, entity: Entity, id_: Any, o: _Operation) -> Record:
        self._say(o, "Deleting in MongoDB...")
        for _ in range(ATTEMPTS * 4):
            notes, rev = await self._base(entity, id_, (), None, o)
            id_ = notes["_id"]  # as above
            marks = self._marks(entity, id_, o, rev + 1, {}, {"kind": "delete"}, notes.get(CF))
            set_ = {f"{CF}.{name}": value for name, value in marks.items()} | {f"{CF}.deleted": True}
            # The names that it held are free from this moment on, unless it may yet be undone.
            gone = [] if o.rollback else [f"{CF}.keys"]
            none = dict.fromkeys(entity.parts)
            image = await self._set_until_decided(entity, id_, rev, set_, gone, {}, {}, o, left_out=none)
            if image is None:
                continue
            self._say(o, "MongoDB delete decided")
            return await self._then_postgres(entity, image, o)
        raise errors.Busy(f"[{o.context}] other writers kept changing this record of {entity.name}")

    # --- MongoDB primary: the second step -----------------------------------------------------------------------

    async def _then_postgres(
        self, entity: Entity, image: Image, o: _Operation, ahead: Ahead | None = None
    ) -> Record:
        o.fate.made = True
        record = self.pair.seen.record(entity, image, "mongo")
        together: list[Placed] = []
        if o.request.steps and not o.rollback:
            together = await self._take_steps(entity, image, o)
        if image.deleted and not o.rollback:
            # Decided already: if this fails the document, which readers take for gone, stays a little longer.
            with contextlib.suppress(errors.StoreUnavailable):
                await self.settler.bury(entity, image)
        if not o.control.phase.rules.dual:
            return record
        if o.asynchronous:
            if len(self._background) < self.pair.options.background:
                # The caller may change what it is given while this one is on its way.
                task = asyncio.create_task(self._quietly(entity, image.kept(), o))
                self._background.add(task)
                task.add_done_callback(self._background.discard)
            return record
        failure: errors.CrossfadeError | None = None
        if o.request.steps and o.rollback:
            try:
                together = await self.settler.stepper.take_open(entity, image, o.control, ends=o.ends)
            except (errors.CrossfadeError, Unmappable) as cause:
                failure = _as_failure(cause)
        failure = failure or await self._try_postgres(entity, image, o, together, ahead)
        if o.rollback:
            await self._close_tentative(entity, image, o, failure, together)
        elif failure is not None:
            await self._acknowledge_with_debt(o, failure)
        return record

    async def _take_steps(self, entity: Entity, image: Image, o: _Operation) -> list[Placed]:
        """Do to the other records what has been decided.

        Raises:
            crossfade.errors.OutcomeUnknown: not all of it could be done now; it will be.
        """
        assert image.steps is not None
        try:
            together = await self.settler.stepper.take(entity, image, o.control, ends=o.ends)
            await self.settler.stepper.erase(entity, image.id, image.steps)
        except (errors.CrossfadeError, Unmappable) as cause:
            self._say(o, f"MongoDB write decided, its other records are owed their part: {cause}", warn=True)
            raise errors.OutcomeUnknown(
                f"[{o.context}] the operation is decided and will be carried out, but not every record shows it yet"
            ) from cause
        return together

    async def _quietly(self, entity: Entity, image: Callable[[], Image], o: _Operation) -> None:
        await asyncio.sleep(_ANSWER_FIRST)
        with contextlib.suppress(errors.CrossfadeError):
            await self._try_postgres(entity, image(), o)

    async def _try_postgres(
        self,
        entity: Entity,
        image: Image,
        o: _Operation,
        together: Sequence[Placed] = (),
        ahead: Ahead | None = None,
    ) -> errors.CrossfadeError | None:
        """Bring the image, and those of its operation, to PostgreSQL; None once confirmed, else why not.

        The debts stand meanwhile.
        """
        control = self.pair.board.control
        # While a reconciler is lifting the flag, writers settle their own again: else it could never be lifted.
        flagged = control.unreadable is not None and not control.lifting and not o.rollback
        if flagged or not self.pair.postgres_breaker.allows():
            return errors.StoreUnavailable("postgres", "PostgreSQL is known to be down; nobody waits for it")
        self._say(o, "Writing to PostgreSQL...")
        behind: list[asyncio.Task[None]] = []
        try:
            # Lifting and making way take several steps: together no longer than four.
            with self.pair.postgres_breaker.hears():
                async with asyncio.timeout(self.pair.options.secondary_deadline * 4):
                    settled = await self._bring(entity, image, o, together, behind, ahead)
        except TimeoutError as cause:
            self._say(o, f"PostgreSQL write failed: {cause}", warn=True)
            return errors.StoreUnavailable("postgres", "PostgreSQL did not answer within the deadline")
        except Unmappable as cause:
            return errors.Quarantined(f"PostgreSQL cannot hold this record: {cause}")
        except errors.CrossfadeError as cause:
            self._say(o, f"PostgreSQL write failed: {cause}", warn=True)
            return cause
        if settled is Settled.PARKED:
            self._say(o, "PostgreSQL write failed: its rules or the mapping refuse the record", warn=True)
            return errors.Quarantined("PostgreSQL refuses this record; see the debt's cause")
        if o.rollback and settled is not Settled.CONFIRMED:
            # A row above the primary's revision, for one: it is not a confirmation.
            return errors.StoreUnavailable("postgres", "PostgreSQL holds another state of this record")
        self._say(o, "PostgreSQL write successful")
        look = self.pair.board.look
        if settled is Settled.CONFIRMED and look is not None and entity.name in look.quarantined:
            # What could not be carried before may be this very record.
            with contextlib.suppress(errors.CrossfadeError):
                await self.pair.postgres.release(
                    entity, [image.id], timeout=self.pair.options.secondary_deadline
                )
        if settled is Settled.CONFIRMED and not image.deleted and not o.rollback:
            self.settler.eraser.soon(entity, image, behind)
        return None

    async def _bring(
        self,
        entity: Entity,
        image: Image,
        o: _Operation,
        together: Sequence[Placed],
        behind: list[asyncio.Task[None]],
        ahead: Ahead | None,
    ) -> Settled:
        timeout = self.pair.options.secondary_deadline
        own = [(entity, image), *together]
        placed = await self.settler.with_groups(own)
        if len(placed) > 1:
            brought = await self.settler.bring_together(placed, o.control, timeout=timeout)
            for (each, one), settled in zip(placed, brought, strict=True):
                if settled is Settled.CONFIRMED and one is not image and not one.is_open:
                    self.settler.eraser.soon(each, one)
            # What was owed before is owed on where it is refused: this write stands without it.
            mine = brought[: len(own)]
            unlike = [settled for settled in mine if settled not in (Settled.CONFIRMED, Settled.OPEN)]
            if unlike or not image.deleted or not o.rollback:
                return Settled.PARKED if Settled.PARKED in unlike else (unlike or mine)[0]
        elif not image.deleted:
            # An open write is confirmed by its outcome: nothing of it may be left to do then.
            prompt = None if o.rollback else behind
            return await self.settler.bring(
                entity, image, o.control, timeout=timeout, behind=prompt, ahead=ahead
            )
        if not o.rollback:
            return await self.settler.finish_delete(entity, image, o.control)
        # Still tentative: the row goes, the document stays until success may be told.
        verdict, _ = await self.pair.postgres.apply_delete(
            entity, image.id, rev=image.rev, op=o.op,
            migration=self.pair.name, epoch=o.control.epoch, timeout=timeout,
        )  # fmt: skip
        return Settled.SUPERSEDED if verdict is Applied.BEHIND else Settled.CONFIRMED

    async def _acknowledge_with_debt(self, o: _Operation, failure: errors.CrossfadeError) -> None:
        """Before success is told: make sure that no worker goes on serving the older row."""
        board = self.pair.board
        try:
            if not (board.control.postgres_first or await board.is_unchanged()):
                # Others may have heard already that PostgreSQL is read by now, from before this debt.
                await board.refresh()
            if board.control.postgres_first and isinstance(failure, errors.Quarantined):
                # PostgreSQL answers, and refuses this record alone: it is on every board that is young enough.
                await asyncio.sleep(board.options.board_age)
            elif board.control.postgres_first:
                await board.mark_unreadable(o.op)
        except errors.CrossfadeError as cause:
            raise errors.OutcomeUnknown(
                f"[{o.context}] MongoDB holds the write, but readers of PostgreSQL could not be warned"
            ) from cause
        self._say(o, f"MongoDB keeps the write; PostgreSQL is owed it: {failure}", warn=True)

    async def _close_tentative(
        self,
        entity: Entity,
        image: Image,
        o: _Operation,
        failure: errors.CrossfadeError | None,
        together: Sequence[Placed],
    ) -> None:
        """ROLLBACK_BOTH: tell success only after tentative has become confirmed; else undo."""
        if failure is None:
            try:
                confirmed = await self._confirm(entity, image, o)
            except errors.StoreUnavailable as cause:
                raise errors.OutcomeUnknown(
                    f"[{o.context}] both stores hold the write, but it could not be confirmed in time: the "
                    "reconciler undoes it unless the confirmation arrived"
                ) from cause
            if confirmed:
                if image.steps is not None and image.steps.op == o.op:
                    # Decided for all: who does not hear of it now is told by a reconciler.
                    with contextlib.suppress(errors.StoreUnavailable):
                        await self.settler.stepper.close(image.steps)
                        await self.settler.stepper.erase(
                            entity, image.id, replace(image.steps, state="confirmed")
                        )
                        for each, one in together:
                            self.settler.eraser.soon(each, one)
                if image.deleted:
                    await self._finish_confirmed_delete(entity, image, o)
                else:
                    self.settler.eraser.soon(entity, image)
                return
            await self._bring_what_replaced_it(entity, image, o)
            raise errors.Undone(
                f"[{o.context}] the write was undone: it was not confirmed before its deadline"
            )
        self._say(o, f"Rolling MongoDB back: {failure}", warn=True)
        try:
            settled = await self.settler.undo(entity, image, o.control)
        except _FAILED as cause:
            if await self._stands_open(entity, image, o):
                self._say(o, f"Rollback failed: {cause}; the reconciler undoes it", warn=True)
                raise errors.UndoPending(
                    f"[{o.context}] PostgreSQL failed, and the undo in MongoDB could not be finished; it is "
                    "recorded and will be carried out"
                ) from failure
            settled = Settled.SUPERSEDED
        if settled in (Settled.OPEN, Settled.PARKED) and await self._stands_open(entity, image, o):
            raise errors.UndoPending(
                f"[{o.context}] the undo in MongoDB waits for the reconciler"
            ) from failure
        if settled in (Settled.SUPERSEDED, Settled.GONE):
            await self._bring_what_replaced_it(entity, image, o)
        if settled is not Settled.CONFIRMED and self.pair.board.control.postgres_first:
            # PostgreSQL may have taken the write without saying so: nobody may read it there after "undone".
            with contextlib.suppress(errors.CrossfadeError):
                await self.pair.board.mark_unreadable(o.op)
        self._say(o, "Rollback successful", warn=True)
        raise errors.Undone(
            f"[{o.context}] PostgreSQL failed; MongoDB was rolled back: {failure}"
        ) from failure

    async def _bring_what_replaced_it(self, entity: Entity, image: Image, o: _Operation) -> None:
        """Bring to PostgreSQL what a foreign writer has put in the place of an open write, or that it is gone.

        PostgreSQL may hold the write, and no revision says that what stands is newer: before the next full pass nobody
        would notice.
        """
        with contextlib.suppress(errors.CrossfadeError, Unmappable):
            settled = Settled.SUPERSEDED
            there = await self.pair.mongo.read_owed(entity, image.id, timeout=o.left())
            if there is None:
                buried = await self.pair.mongo.tombstone(entity, image.id, timeout=o.left())
                if buried is not None and buried.rev > image.rev:
                    return  # undone, or deleted since: that brings its own
                gone = replace(image, rev=image.rev + 1, op=new_operation())
                with contextlib.suppress(*_FAILED):
                    settled = await self.settler.finish_delete(entity, gone, o.control)
            elif there.debt is not None or there.rev > image.rev:
                return
            else:
                lifted = await self.settler.lift(entity, image.id, above=image.rev, control=o.control)
                if lifted is None:
                    return
                with contextlib.suppress(*_FAILED):
                    settled = await self.settler.bring(
                        entity, lifted, o.control, timeout=self.pair.options.secondary_deadline
                    )
                if settled is Settled.CONFIRMED:
                    self.settler.eraser.soon(entity, lifted)
            if settled is not Settled.CONFIRMED and self.pair.board.control.postgres_first:
                await self.pair.board.mark_unreadable(o.op)

    async def _stands_open(self, entity: Entity, image: Image, o: _Operation) -> bool:
        """Whether the document still is as the open write left it, or cannot be asked."""
        try:
            current = await self.pair.mongo.read_owed(entity, image.id, timeout=o.left())
        except errors.StoreUnavailable:
            return True
        return current is not None and current.op == o.op

    async def _confirm(self, entity: Entity, image: Image, o: _Operation) -> bool:
        """The compare-and-set from tentative to confirmed, repeated until it is decided; False: undone.

        Raises:
            crossfade.errors.StoreUnavailable: MongoDB does not say.
            crossfade.errors.OutcomeUnknown: it was confirmed or undone, and written again since.
        """
        unknown = False
        assert image.debt is not None
        assert image.debt.tentative is not None
        held = image.debt.tentative.get("keys", {})
        while True:
            try:
                done = await self.pair.mongo.compare_and_set(
                    entity, image.id, rev=image.rev,
                    set_={
                        f"{CF}.op": o.op,
                        **{f"{CF}.keys.{rule}": key for rule, key in image.keys.items()},
                        # Steps of an earlier operation, decided already, are not this one's to confirm.
                        **(
                            {f"{CF}.steps.state": "confirmed"}
                            if image.steps is not None and image.steps.op == o.op
                            else {}
                        ),
                    },
                    unset=[
                        f"{CF}.debt.tentative",
                        *(f"{CF}.keys.{rule}" for rule in held if rule not in image.keys),
                    ],
                    also={f"{CF}.op": o.op, f"{CF}.debt.tentative": {"$exists": True}},
                    left_out=dict.fromkeys(entity.parts), timeout=o.left(),
                )  # fmt: skip
                if done is not None:
                    return True
                now = await self.pair.mongo.read_owed(entity, image.id, timeout=o.left())
                if now is None or now.op != o.op:
                    buried = await self.pair.mongo.tombstone(entity, image.id, timeout=o.left())
                    if buried is not None and buried.op == o.op:
                        return True
                    if unknown:
                        raise errors.OutcomeUnknown(
                            f"[{o.context}] whether the write was confirmed was not answered, and this record of "
                            f"{entity.name} was written again since"
                        )
                    return False
            except errors.StoreUnavailable:
                unknown = True
                if boot_clock() >= o.ends:
                    raise
                await asyncio.sleep(0.05)
                continue
            return now.debt is None or now.debt.tentative is None

    async def _finish_confirmed_delete(self, entity: Entity, image: Image, o: _Operation) -> None:
        with contextlib.suppress(*_FAILED):
            await self.settler.finish_delete(entity, image, o.control)

    # --- PostgreSQL primary -------------------------------------------------------------------------------------

    async def _postgres_write(
        self,
        entity: Entity,
        id_: Any,
        o: _Operation,
        *,
        insert: dict[str, Any] | None = None,
        wrote: Mapping[str, Any] | None = None,
        removed: tuple[str, ...] = (),
        if_revision: int | None = None,
    ) -> Record:
        """One write that PostgreSQL decides; ``insert``: a new document, ``wrote``: an update, neither: a delete."""
        id_, o = await self._as_kept(entity, id_, o)
        mine: list[Change] = []

        def decide(before: Image | None, tombstone: int) -> Change:
            if before is not None and before.op == o.op:
                raise _AlreadyWritten
            if mine and max(tombstone, before.rev if before else 0) > mine[-1].rev:
                # An attempt that was not answered may be what others have written upon.
                raise _written_since(entity, o)
            if insert is not None:
                if before is not None:
                    raise errors.DuplicateKey(entity.name, "_id")
                change = self._new_image(entity, insert, {}, tombstone + 1, o)
            else:
                if before is None:
                    raise errors.NotFound(f"[{o.context}] {entity.name} has no record with this id")
                if if_revision is not None and before.rev != if_revision:
                    raise errors.StaleRevision(
                        f"[{o.context}] this record of {entity.name} is at revision {before.rev}, not {if_revision}"
                    )
                where = o.request.where
                there = before.document
                missed = [n for n in where if n not in there or not equal(there[n], where[n])]
                if missed:
                    raise errors.ConditionNotMet(
                        f"[{o.context}] this record of {entity.name} has another value in {', '.join(missed)} by now"
                    )
                if wrote is None:
                    change = Change(
                        None, None, max(before.rev, tombstone) + 1, o.op, self._tentative("delete", before, o)
                    )
                else:
                    after = {**before.document, **wrote}
                    for name in removed:
                        after.pop(name, None)
                    rev = max(before.rev, tombstone) + 1
                    change = self._new_image(entity, after, before.keys, rev, o, before)
            mine.append(change)
            return change

        writes = [(entity, id_, decide), *(self._step_write(step, o) for step in o.request.steps)]
        self._say(o, "Writing to PostgreSQL...")
        change, *others = await self._decide_in_postgres(
            entity, writes, mine, o, keep_in_outbox=o.control.dual
        )
        assert change is not None
        o.fate.made = True
        self._say(o, "PostgreSQL write successful")
        record = (
            self.pair.seen.record(entity, change.image, "postgres")
            if change.image is not None
            else Record(id_, {"_id": id_}, change.rev, "postgres")
        )
        if not o.control.phase.rules.dual:
            return record  # what phase 5 still feeds MongoDB with, reconcilers bring: nobody waits for it
        owed = Delivery(entity.name, id_, change.rev, o.op, None, change.tentative, None)
        deliveries = [owed] + [
            Delivery(step.entity, step.id, other.rev, o.op, None, other.tentative, None)
            for step, other in zip(o.request.steps, others, strict=True)
            if other is not None
        ]
        if o.asynchronous:
            if len(self._background) < self.pair.options.background:
                task = asyncio.create_task(self._deliver_quietly(owed, o))
                self._background.add(task)
                task.add_done_callback(self._background.discard)
            return record
        failure = None
        ends = self._patience()  # of a caller, however many records it has written
        for each in deliveries:
            failure = failure or await self._try_mongo(each, o, ends)
        if o.rollback:
            await self._close_in_postgres(deliveries, o, failure)
        elif failure is not None:
            self._say(o, f"PostgreSQL keeps the write; MongoDB is owed it: {failure}", warn=True)
        return record

    async def _as_kept(self, entity: Entity, id_: Any, o: _Operation) -> tuple[Any, _Operation]:
        """The ids that PostgreSQL keeps the records of an operation by: a number may be given in another type."""
        postgres = self.pair.postgres
        if o.kind != "insert":
            id_ = await postgres.as_kept(entity, id_, timeout=o.left())
        steps: list[Step] = []
        for step in o.request.steps:
            kept = await postgres.as_kept(self.pair.entities[step.entity], step.id, timeout=o.left())
            steps.append(replace(step, id=kept))
        decider = (entity.name, id_to_text(id_))
        return id_, replace(o, decider=decider, request=replace(o.request, steps=tuple(steps)))

    def _step_write(
        self, step: Step, o: _Operation
    ) -> tuple[Entity, Any, Callable[[Image | None, int], Change | None]]:
        entity = self.pair.entities[step.entity]

        def decide(before: Image | None, tombstone: int) -> Change | None:
            if before is None:
                return None  # a record that is gone has nothing to take
            set_, unset = step.effect(before.document)
            after = {**before.document, **as_stored(set_)}
            for name in unset:
                after.pop(name, None)
            return self._new_image(entity, after, before.keys, max(before.rev, tombstone) + 1, o, before)

        return entity, step.id, decide

    def _new_image(
        self,
        entity: Entity,
        document: dict[str, Any],
        stamped: Mapping[str, str],
        rev: int,
        o: _Operation,
        before: Image | None = None,
    ) -> Change:
        plain = entity.keys(document)
        id_ = document["_id"]
        keys = {r: stamped[r] if acceptable_key(stamped.get(r), k, id_) else k for r, k in plain.items()}
        try:
            rows = entity.to_rows(document, keys)
        except Unmappable as cause:
            raise errors.Quarantined(f"[{o.context}] PostgreSQL cannot hold this record: {cause}") from cause
        there: Mapping[str, Any] = {} if before is None else before.document
        parts = [name for name in entity.parts if document.get(name) is not there.get(name)]
        notes = {
            name: part.to_document()
            for name, part in (before.parts if before else {}).items()
            if name not in parts
        }
        image = Image.from_document(
            {**document, CF: {"rev": rev, "op": o.op, "keys": keys, "parts": notes}}, entity.parts
        )
        kind = "insert" if before is None else "update"
        return Change(image, rows, rev, o.op, self._tentative(kind, before, o), tuple(parts))

    @staticmethod
    def _tentative(kind: str, before: Image | None, o: _Operation) -> dict[str, Any] | None:
        if not o.rollback:
            return None
        whole = None if before is None else base64.b64encode(encode_document(before.document)).decode()
        note: dict[str, Any] = {"kind": kind, "before": whole, "keys": {} if before is None else before.keys}
        if o.request.steps:
            # Every one of them, so that whoever finds one open row takes all of them back.
            note["with"] = [*o.everybody]
        return note

    async def _decide_in_postgres(
        self,
        entity: Entity,
        writes: Sequence[tuple[Entity, Any, Callable[[Image | None, int], Change | None]]],
        mine: list[Change],
        o: _Operation,
        *,
        keep_in_outbox: bool,
    ) -> list[Change | None]:
        """The changes that PostgreSQL made of ``writes``; the first of them decides, and notes its own in ``mine``."""
        id_ = writes[0][1]
        # Conditions and steps need the values of the parts that they name.
        named = {*o.request.where, *(name for step in o.request.steps for name in step.fields)}
        small = not o.rollback and named.isdisjoint(name for each, _, _ in writes for name in each.parts)
        unknown = False
        unanswered = 0  # so many of `mine` may have been written
        while True:
            try:
                return await self.pair.postgres.write(
                    writes, migration=self.pair.name, epoch=o.control.epoch,
                    timeout=o.left(), keep_in_outbox=keep_in_outbox, op=o.op, small=small,
                )  # fmt: skip
            except _AlreadyWritten:
                return await self._written_already(writes, mine[-1], o)
            except errors.NotFound:
                if unknown and o.kind == "delete":
                    buried = await self.pair.postgres.tombstone(entity, id_, timeout=o.left())
                    if buried is not None and buried[1] == o.op:
                        return await self._written_already(writes, mine[-1], o)
                raise
            except errors.Busy:
                del mine[unanswered:]
                if o.ends - boot_clock() < _LAST_ATTEMPT:
                    raise
                await asyncio.sleep(0.02)
            except RuleBroken as cause:
                mine.clear()
                names = {rule.to: rule.rule for rule in entity.unique}
                found = next((rule for column, rule in names.items() if column in cause.constraint), None)
                self._say(o, f"PostgreSQL write refused: {cause}")
                if not cause.taken:
                    raise errors.Quarantined(f"[{o.context}] {cause}; nothing was changed") from cause
                raise errors.DuplicateKey(entity.name, found or cause.constraint) from cause
            except Unanswered as cause:
                unknown, unanswered = True, len(mine)
                o.fate.unanswered = True
                if boot_clock() >= o.ends:
                    self._say(o, f"PostgreSQL write not answered: {cause}", warn=True)
                    raise errors.OutcomeUnknown(
                        f"[{o.context}] PostgreSQL did not say within the deadline whether it holds the write"
                    ) from cause
                await asyncio.sleep(0.05)
            except Fenced as cause:
                if unknown:
                    raise errors.OutcomeUnknown(
                        f"[{o.context}] PostgreSQL did not answer, and the phase has changed meanwhile"
                    ) from cause
                # Refused as a whole: once it is known what PostgreSQL knows, the write is made under that.
                await self.pair.board.refresh()
                raise _NotAdmitted from cause
            except errors.StoreUnavailable as cause:
                if not unknown:
                    self._say(o, f"PostgreSQL write failed: {cause}", warn=True)
                    raise
                if boot_clock() >= o.ends:
                    raise errors.OutcomeUnknown(
                        f"[{o.context}] PostgreSQL cannot be asked: {cause}"
                    ) from cause
                await asyncio.sleep(0.05)

    async def _written_already(
        self, writes: Sequence[tuple[Entity, Any, Any]], decided: Change, o: _Operation
    ) -> list[Change | None]:
        """What the transaction that was not answered left of the other records: those that still carry its id."""
        left: list[Change | None] = [decided]
        for entity, id_, _ in writes[1:]:
            owed = await self.pair.postgres.outbox_row(entity, id_, timeout=o.left())
            mine = owed is not None and owed.op == o.op
            left.append(Change(None, None, owed.rev, o.op, owed.tentative) if mine and owed else None)
        return left

    async def _deliver_quietly(self, owed: Delivery, o: _Operation) -> None:
        await asyncio.sleep(_ANSWER_FIRST)
        with contextlib.suppress(errors.CrossfadeError):
            await self._try_mongo(owed, o, self._patience())

    def _patience(self) -> float:
        """Until when a secondary that answers may take for all that is to be done there, by `boot_clock`."""
        return boot_clock() + self.pair.options.secondary_deadline * 4

    async def _try_mongo(self, owed: Delivery, o: _Operation, ends: float) -> errors.CrossfadeError | None:
        """Deliver to MongoDB; None once there, else why not. The outbox row stands meanwhile."""
        if not self.pair.mongo_breaker.allows():
            return errors.StoreUnavailable("mongo", "MongoDB is known to be down; nobody waits for it")
        self._say(o, "Writing to MongoDB...")
        try:
            with self.pair.mongo_breaker.hears():
                async with asyncio.timeout(ends - boot_clock()):
                    settled = await self.settler.deliverer.deliver(
                        owed, o.control, timeout=self.pair.options.secondary_deadline
                    )
        except TimeoutError as cause:
            self._say(o, f"MongoDB write failed: {cause}", warn=True)
            return errors.StoreUnavailable("mongo", "MongoDB did not answer within the deadline")
        except errors.StoreUnavailable as cause:
            self._say(o, f"MongoDB write failed: {cause}", warn=True)
            return cause
        except (errors.CrossfadeError, Unmappable) as cause:
            # PostgreSQL holds the write already: what goes wrong here is the outbox row's business.
            self._say(o, f"MongoDB write failed: {cause}", warn=True)
            return errors.Quarantined(f"MongoDB did not take this record: {cause}")
        if settled is Settled.PARKED:
            self._say(o, "MongoDB write failed: its rules refuse the record", warn=True)
            return errors.Quarantined("MongoDB refuses this record; see the outbox row's cause")
        if settled is not Settled.CONFIRMED:
            return errors.StoreUnavailable("mongo", "other writers kept changing this record in MongoDB")
        self._say(o, "MongoDB write successful")
        return None

    async def _close_in_postgres(
        self, deliveries: Sequence[Delivery], o: _Operation, failure: errors.CrossfadeError | None
    ) -> None:
        postgres = self.pair.postgres
        entities = self.pair.entities
        if failure is None:
            try:
                confirmed = await self._confirm_in_postgres(deliveries, o)
            except errors.StoreUnavailable as cause:
                raise errors.OutcomeUnknown(
                    f"[{o.context}] both stores hold the write, but it could not be confirmed in time: the "
                    "reconciler undoes it unless the confirmation arrived"
                ) from cause
            if not confirmed:
                raise errors.Undone(
                    f"[{o.context}] the write was undone: it was not confirmed before its deadline"
                )
            with contextlib.suppress(errors.StoreUnavailable):
                for owed in deliveries:
                    await postgres.settle(entities[owed.entity], owed.id, owed.rev, owed.op, timeout=o.left())
            return
        self._say(o, f"Rolling PostgreSQL back: {failure}", warn=True)
        owed = deliveries[0]
        try:
            await self.undo_in_postgres(owed, o.control)
            now = await postgres.outbox_row(entities[owed.entity], owed.id, timeout=o.left())
            if now is not None and now.op == owed.op:
                raise Fenced("PostgreSQL is at another epoch")
        except (*_FAILED, RuleBroken) as cause:
            self._say(o, f"Rollback failed: {cause}; the reconciler undoes it", warn=True)
            raise errors.UndoPending(
                f"[{o.context}] MongoDB failed, and the undo in PostgreSQL could not be finished; it is recorded "
                "and will be carried out"
            ) from failure
        self._say(o, "Rollback successful", warn=True)
        raise errors.Undone(
            f"[{o.context}] MongoDB failed; PostgreSQL was rolled back: {failure}"
        ) from failure

    async def _confirm_in_postgres(self, deliveries: Sequence[Delivery], o: _Operation) -> bool:
        """Turn tentative into confirmed, repeated until it is decided; False: undone.

        Raises:
            crossfade.errors.StoreUnavailable: PostgreSQL does not say.
            crossfade.errors.OutcomeUnknown: it was confirmed or undone, and written again since.
        """
        postgres = self.pair.postgres
        unknown = False
        owed = deliveries[0]
        entity = self.pair.entities[owed.entity]
        writes = [(self.pair.entities[each.entity], each.id, each.rev) for each in deliveries]
        while True:
            try:
                if await postgres.confirm(writes, owed.op, timeout=o.left()):
                    return True
                if not unknown:
                    return False
                row = await postgres.read(entity, owed.id, timeout=o.left())
                buried = await postgres.tombstone(entity, owed.id, timeout=o.left())
            except errors.StoreUnavailable:
                unknown = True
                if boot_clock() >= o.ends:
                    raise
                await asyncio.sleep(0.05)
                continue
            # Whoever undoes it, or writes upon it, leaves an operation id of its own.
            if (row is not None and row.op == owed.op) or (
                row is None and buried is not None and buried[1] == owed.op
            ):
                return True
            raise errors.OutcomeUnknown(
                f"[{o.context}] whether the write was confirmed was not answered, and this record of "
                f"{entity.name} was written again since"
            )

    async def undo_in_postgres(self, owed: Delivery, control: Control) -> None:
        """Take an open write, and its whole operation, back as new revisions; nothing if it is no longer open."""
        assert owed.tentative is not None
        writes = [(self.pair.entities[owed.entity], owed.id, owed.rev)]
        for name, text in owed.tentative.get("with", ()):
            entity, id_ = self.pair.entities[name], text_to_id(text)
            other = await self.pair.postgres.outbox_row(
                entity, id_, timeout=self.pair.options.primary_deadline
            )
            if (name, id_) == (owed.entity, owed.id) or other is None or other.op != owed.op:
                continue  # itself, or one that was gone and has taken nothing
            writes.append((entity, id_, other.rev))
        await self.pair.postgres.undo(
            writes, owed.op, migration=self.pair.name, epoch=control.epoch,
            timeout=self.pair.options.primary_deadline,
        )  # fmt: skip


class _NotAdmitted(Exception):
    """PostgreSQL is at another epoch than the write was admitted under; nothing was written."""


class _AlreadyWritten(Exception):
    """The record in PostgreSQL carries our operation id: the unanswered write had committed."""


def _meanwhile(make: Callable[[], _T]) -> Callable[[], _T]:
    """What ``make`` gives; made while the primary is being asked, or sooner where it is needed sooner."""
    made = functools.cache(make)
    asyncio.get_running_loop().call_soon(made)
    return made


def _foreseen(
    entity: Entity,
    kept: Callable[[], Image],
    left_out: Iterable[str],
    wrote: Mapping[str, Any],
    removed: Collection[str],
    carried: Carried,
    o: _Operation,
) -> Callable[[], Image] | None:
    """What an update makes of the record, if nobody changes it meanwhile; None: a part of it is not at hand.

    ``kept``: what it is, ``left_out``: the parts that are left out of that.
    """
    its_parts = {name: carried.left_out.get(name) for name in left_out if name not in (*wrote, *removed)}
    if None in its_parts.values():
        return None

    def after() -> Image:
        seen = kept()
        document = {**seen.document, **wrote}
        for name in removed:
            document.pop(name, None)
        notes = {
            "rev": seen.rev + 1, "op": o.op, "keys": seen.keys,
            "parts": {name: part.to_document() for name, part in carried.left_out.items()},
        }  # fmt: skip
        return Image.from_document({**document, **its_parts, CF: notes}, entity.parts)

    return _meanwhile(after)


def _still(entity: Entity, seen: Image) -> dict[str, Any]:
    """What a filter asks for beside the revision, so that an update may be made upon what was seen of a record."""
    # The same revision of the same record, not of one that was made anew after a delete.
    also: dict[str, Any] = {f"{CF}.op": {"$eq": seen.op}}
    # A newborn in debt may be such a one, an insert that came twice: whoever asks for it looks for a tombstone. A row
    # does not say what made its record.
    may_be_newborn = seen.born in (None, seen.op)
    also[f"{CF}.debt" if may_be_newborn else f"{CF}.debt.group"] = {"$exists": False}
    for rule in entity.unique:
        # What another writer may change without a new revision, and keys hang on.
        there = rule.field in seen.document
        also[rule.field] = {"$eq": seen.document[rule.field]} if there else {"$exists": False}
        key = seen.keys.get(rule.rule)
        also[f"{CF}.keys.{rule.rule}"] = {"$exists": False} if key is None else {"$eq": key}
    return also


def _as_failure(cause: errors.CrossfadeError | Unmappable) -> errors.CrossfadeError:
    return errors.Quarantined(f"a record cannot be read: {cause}") if isinstance(cause, Unmappable) else cause


def _waits(entity: Entity, o: _Operation) -> errors.Busy:
    return errors.Busy(f"[{o.context}] a write of this record of {entity.name} waits for its outcome")


def _written_since(entity: Entity, o: _Operation) -> errors.OutcomeUnknown:
    return errors.OutcomeUnknown(
        f"[{o.context}] the write was not answered, and this record of {entity.name}, or a value of it, was written "
        "by others since"
    )


def assert_writable(entity: Entity, *ways: Iterable[str]) -> None:
    """That these are fields that an update can name, each written in one of these ways.

    Raises:
        crossfade.errors.ConfigurationError: one is not.
    """
    seen: set[str] = set()
    for names in map(set, ways):
        for name in names:
            if not name or "." in name or name.startswith("$") or "\0" in name or name in ("_id", CF):
                raise errors.ConfigurationError(f"field {name!r} cannot be set by an update of {entity.name}")
            if name in seen:
                raise errors.ConfigurationError(
                    f"field {name!r} of {entity.name} is written in two ways at once"
                )
        seen |= names


def _assert_id(entity: Entity, id_: Any) -> None:
    try:
        if can_be_id(id_):
            id_to_text(id_)
            return
        why = "an array, a regular expression or a condition cannot be an _id"
    except Unmappable as cause:
        why = str(cause)
    raise errors.ConfigurationError(f"no record of {entity.name} can be written with this _id: {why}")


def as_stored(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document as a store gives it back (dates in milliseconds, UTC; integers by size).

    Raises:
        crossfade.errors.ConfigurationError: a value that BSON has no type for, or ``_cf``.
    """
    if CF in document:
        raise errors.ConfigurationError(f"the field {CF!r} belongs to Crossfade")
    try:
        return bson.decode(bson.encode(dict(document)), CODEC_OPTIONS)
    except (bson.errors.BSONError, OverflowError, TypeError, ValueError) as cause:
        raise errors.ConfigurationError(f"this document cannot be stored: {cause}") from cause
