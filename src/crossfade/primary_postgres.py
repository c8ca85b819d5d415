"""PostgreSQL decides: the writes of single records.

One transaction carries the rows, revision n+1 and an outbox row. Then MongoDB gets the image; then the outbox row goes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from crossfade import errors
from crossfade.board import Pair
from crossfade.clock import boot_clock
from crossfade.control import Control
from crossfade.delivery import Deliverer
from crossfade.entity import Entity
from crossfade.operation import (
    FAILED,
    Background,
    NotAdmitted,
    Operation,
    as_stored,
    confirmed_or_not,
    written_since,
)
from crossfade.record import CF, Image, Record, Settled, Step, acceptable_key
from crossfade.stores.errors import Fenced, RuleBroken, Unanswered
from crossfade.stores.postgres import Change, Delivery
from crossfade.values import Unmappable, encode_document, equal, id_to_text, text_to_id

#: Seconds that an attempt upon a busy record must have: one cut short would leave open what became of it.
_LAST_ATTEMPT = 0.25


@dataclass
class PostgresPrimary:
    """Writes single records of one migration while PostgreSQL decides."""

    pair: Pair
    deliverer: Deliverer
    background: Background

    async def write(
        self,
        entity: Entity,
        id_: Any,
        o: Operation,
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
                raise written_since(entity, o)
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
        o.say("Writing to PostgreSQL...")
        change, *others = await self._decide(entity, writes, mine, o, keep_in_outbox=o.control.dual)
        assert change is not None
        o.fate.made = True
        o.say("PostgreSQL write successful")
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
            if self.background.has_room:
                self.background.start(lambda: self._try_mongo(owed, o, self._patience()))
            return record
        failure = None
        ends = self._patience()  # of a caller, however many records it has written
        for each in deliveries:
            failure = failure or await self._try_mongo(each, o, ends)
        if o.rollback:
            await self._close(deliveries, o, failure)
        elif failure is not None:
            o.say(f"PostgreSQL keeps the write; MongoDB is owed it: {failure}", warn=True)
        return record

    async def undo(self, owed: Delivery, control: Control) -> None:
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

    async def _as_kept(self, entity: Entity, id_: Any, o: Operation) -> tuple[Any, Operation]:
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
        self, step: Step, o: Operation
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
        o: Operation,
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
    def _tentative(kind: str, before: Image | None, o: Operation) -> dict[str, Any] | None:
        if not o.rollback:
            return None
        whole = None if before is None else base64.b64encode(encode_document(before.document)).decode()
        note: dict[str, Any] = {"kind": kind, "before": whole, "keys": {} if before is None else before.keys}
        if o.request.steps:
            # Every one of them, so that whoever finds one open row takes all of them back.
            note["with"] = [*o.everybody]
        return note

    async def _decide(
        self,
        entity: Entity,
        writes: Sequence[tuple[Entity, Any, Callable[[Image | None, int], Change | None]]],
        mine: list[Change],
        o: Operation,
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
                o.say(f"PostgreSQL write refused: {cause}")
                if not cause.taken:
                    raise errors.Quarantined(f"[{o.context}] {cause}; nothing was changed") from cause
                raise errors.DuplicateKey(entity.name, found or cause.constraint) from cause
            except Unanswered as cause:
                if len(mine) > unanswered:  # else nothing was sent: it did not even say what stands there
                    unknown, unanswered = True, len(mine)
                    o.fate.unanswered = True
                if boot_clock() >= o.ends:
                    o.say(f"PostgreSQL write not answered: {cause}", warn=True)
                    if not unknown:
                        raise errors.StoreUnavailable("postgres", str(cause)) from cause
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
                raise NotAdmitted from cause
            except errors.StoreUnavailable as cause:
                if not unknown:
                    o.say(f"PostgreSQL write failed: {cause}", warn=True)
                    raise
                if boot_clock() >= o.ends:
                    raise errors.OutcomeUnknown(
                        f"[{o.context}] PostgreSQL cannot be asked: {cause}"
                    ) from cause
                await asyncio.sleep(0.05)

    async def _written_already(
        self, writes: Sequence[tuple[Entity, Any, Any]], decided: Change, o: Operation
    ) -> list[Change | None]:
        """What the transaction that was not answered left of the other records: those that still carry its id."""
        left: list[Change | None] = [decided]
        for entity, id_, _ in writes[1:]:
            owed = await self.pair.postgres.outbox_row(entity, id_, timeout=o.left())
            mine = owed is not None and owed.op == o.op
            left.append(Change(None, None, owed.rev, o.op, owed.tentative) if mine and owed else None)
        return left

    def _patience(self) -> float:
        """Until when a secondary that answers may take for all that is to be done there, by `boot_clock`."""
        return boot_clock() + self.pair.options.secondary_deadline * 4

    async def _try_mongo(self, owed: Delivery, o: Operation, ends: float) -> errors.CrossfadeError | None:
        """Deliver to MongoDB; None once there, else why not. The outbox row stands meanwhile."""
        if not self.pair.mongo_breaker.allows():
            return errors.StoreUnavailable("mongo", "MongoDB is known to be down; nobody waits for it")
        o.say("Writing to MongoDB...")
        try:
            with self.pair.mongo_breaker.hears():
                async with asyncio.timeout(ends - boot_clock()):
                    settled = await self.deliverer.deliver(
                        owed, o.control, timeout=self.pair.options.secondary_deadline
                    )
        except TimeoutError as cause:
            o.say(f"MongoDB write failed: {cause}", warn=True)
            return errors.StoreUnavailable("mongo", "MongoDB did not answer within the deadline")
        except errors.StoreUnavailable as cause:
            o.say(f"MongoDB write failed: {cause}", warn=True)
            return cause
        except (errors.CrossfadeError, Unmappable) as cause:
            # PostgreSQL holds the write already: what goes wrong here is the outbox row's business.
            o.say(f"MongoDB write failed: {cause}", warn=True)
            return errors.Quarantined(f"MongoDB did not take this record: {cause}")
        if settled is Settled.PARKED:
            o.say("MongoDB write failed: its rules refuse the record", warn=True)
            return errors.Quarantined("MongoDB refuses this record; see the outbox row's cause")
        if settled is not Settled.CONFIRMED:
            return errors.StoreUnavailable("mongo", "other writers kept changing this record in MongoDB")
        o.say("MongoDB write successful")
        return None

    async def _close(
        self, deliveries: Sequence[Delivery], o: Operation, failure: errors.CrossfadeError | None
    ) -> None:
        postgres = self.pair.postgres
        entities = self.pair.entities
        if failure is None:
            try:
                confirmed = await self._confirm(deliveries, o)
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
        o.say(f"Rolling PostgreSQL back: {failure}", warn=True)
        owed = deliveries[0]
        try:
            await self.undo(owed, o.control)
            now = await postgres.outbox_row(entities[owed.entity], owed.id, timeout=o.left())
            if now is not None and now.op == owed.op:
                raise Fenced("PostgreSQL is at another epoch")
        except (*FAILED, RuleBroken) as cause:
            o.say(f"Rollback failed: {cause}; the reconciler undoes it", warn=True)
            raise errors.UndoPending(
                f"[{o.context}] MongoDB failed, and the undo in PostgreSQL could not be finished; it is recorded "
                "and will be carried out"
            ) from failure
        o.say("Rollback successful", warn=True)
        raise errors.Undone(
            f"[{o.context}] MongoDB failed; PostgreSQL was rolled back: {failure}"
        ) from failure

    async def _confirm(self, deliveries: Sequence[Delivery], o: Operation) -> bool:
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
            raise confirmed_or_not(entity, o)


class _AlreadyWritten(Exception):
    """The record in PostgreSQL carries our operation id: the unanswered write had committed."""
