"""MongoDB decides: the writes of single records.

One update of one document carries the data, revision n+1, the operation id and the debt: there is no instant at which
a crash leaves a difference that is not recorded. Then PostgreSQL gets the image that MongoDB gave back; then the debt
is erased, in batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from bson.int64 import Int64

from crossfade import errors
from crossfade.board import Pair
from crossfade.clock import boot_clock
from crossfade.debt import Settler, keys_to_stamp
from crossfade.delivery import ATTEMPTS
from crossfade.entity import Entity
from crossfade.operation import FAILED, Background, Operation, confirmed_or_not, written_since
from crossfade.part import Carried, Part, carried_by, noted_parts
from crossfade.record import (
    CF,
    Applied,
    Debt,
    Image,
    Record,
    Settled,
    Steps,
    acceptable_key,
    new_operation,
    stamped_keys,
    unique_key,
)
from crossfade.steps import Placed, joined, members
from crossfade.stores.errors import RuleBroken, Unanswered
from crossfade.stores.mongo import just, same_birth
from crossfade.stores.postgres import Ahead
from crossfade.values import Unmappable, equal

_T = TypeVar("_T")


@dataclass
class MongoPrimary:
    """Writes single records of one migration while MongoDB decides."""

    pair: Pair
    settler: Settler
    background: Background

    async def insert(
        self, entity: Entity, document: dict[str, Any], o: Operation, *, id_given: bool
    ) -> Record:
        """A new record; ``id_given``: the caller has chosen its id, which may have been another's before."""
        keys = entity.keys(document)
        o.say("Writing to MongoDB...")
        for _ in range(ATTEMPTS):
            buried = (
                await self.pair.mongo.tombstone(entity, document["_id"], timeout=o.left())
                if id_given
                else None
            )
            rev = 1 if buried is None else buried.rev + 1
            its_parts = tuple(name for name in entity.parts if document.get(name) is not None)
            group = () if buried is None else buried.group
            before = {"debt": Debt(0, group=group).to_document()}
            marks = self._marks(
                entity, document["_id"], o, rev, keys, {"kind": "insert"}, before, parts=its_parts
            )
            if "debt" in marks:
                marks["debt"]["sending"] = new_operation()
            if buried is not None and buried.done:
                marks["done"] = list(buried.done)  # steps that the record before it has taken
            stored = {**document, CF: marks | {"born": o.op}}
            image = _meanwhile(functools.partial(Image.from_document, dict(stored), entity.parts))
            with self._ahead(entity, None if group else image, o) as ahead:
                made = await self._insert_until_decided(entity, stored, image, o)
                if made is not None:
                    if id_given and await self._was_buried_meanwhile(entity, stored, o):
                        continue
                    if ahead is not None:
                        await ahead.decide(made)
                    o.say("MongoDB write successful")
                    return await self._then_postgres(entity, made, o, ahead)
        raise errors.Busy(f"[{o.context}] this record of {entity.name} is being deleted again and again")

    async def update(
        self,
        entity: Entity,
        id_: Any,
        wrote: Mapping[str, Any],
        removed: tuple[str, ...],
        if_revision: int | None,
        o: Operation,
    ) -> Record:
        """Upon what was seen of the record last, if that still stands, else upon what there is."""
        ruled = {rule.rule: rule.field for rule in entity.unique}
        unique_fields = list(ruled.values())
        where = o.request.where
        looked_at = {*unique_fields, *where, *((*wrote, *removed) if o.rollback else ())}
        o.say("Writing to MongoDB...")
        seen, kept = self._seen(entity, id_, {*wrote, *removed}, if_revision, o) or (None, None)
        suffixed: set[str] = set()
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
            keys = {
                rule: unique_key(key, id_) if rule in suffixed else key
                for rule, key in plain.items()
                if not acceptable_key(stamped.get(rule), key, id_)
            }
            # What another release calls a rule is that one's to see to.
            nameless = [u.rule for u in entity.unique if u.rule in stamped and u.rule not in plain]
            tentative = None
            also: dict[str, Any] = {name: just(value) for name, value in where.items()}
            if seen is not None:
                also |= _still(entity, seen)
            else:
                # The keys are those of the names that were seen; a foreign writer counts no revision up.
                names = [name for name in unique_fields if name not in wrote and name not in removed]
                also |= _same_birth(cf) | {
                    name: just(notes[name]) if name in notes else {"$exists": False} for name in names
                }
                # One that it has already may go to another meanwhile: see `Settler.name_is_freed`.
                also |= {f"{CF}.keys.{rule}": just(stamped[rule]) for rule in plain if rule not in keys}
            if o.rollback:
                changed = (*wrote, *removed)
                before = {name: notes[name] for name in changed if name in notes}
                tentative = {
                    "kind": "update", "before": before, "wrote": dict(wrote), "removed": list(removed),
                    "keys": stamped,
                }  # fmt: skip
                # The values before must still stand when the write happens, or its undo would bring back others.
                also |= {n: just(before[n]) if n in before else {"$exists": False} for n in changed}
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
                try:
                    image = await self._set_until_decided(
                        entity, id_, rev, set_, gone, also, future, o, left_out=carried.left_out,
                        foreseen=foreseen,
                    )  # fmt: skip
                except errors.DuplicateKey as cause:
                    if cause.rule in suffixed or cause.rule not in keys or ruled[cause.rule] in wrote:
                        raise
                    # A foreign writer has taken that name, not this caller: it gets a key of its own, as in `lift`.
                    suffixed.add(cause.rule)
                    continue
                if image is not None:
                    if ahead is not None:
                        await ahead.decide(image)
                    o.say("MongoDB write successful")
                    return await self._then_postgres(entity, image, o, ahead)
            seen = kept = None
        raise errors.Busy(f"[{o.context}] other writers kept changing this record of {entity.name}")

    async def delete(self, entity: Entity, id_: Any, o: Operation) -> Record:
        """Decided in the document, which goes behind its tombstone."""
        o.say("Deleting in MongoDB...")
        for _ in range(ATTEMPTS * 4):
            notes, rev = await self._base(entity, id_, (), None, o)
            id_ = notes["_id"]  # as above
            marks = self._marks(entity, id_, o, rev + 1, {}, {"kind": "delete"}, notes.get(CF))
            set_ = {f"{CF}.{name}": value for name, value in marks.items()} | {f"{CF}.deleted": True}
            # The names that it held are free from this moment on, unless it may yet be undone.
            gone = [] if o.rollback else [f"{CF}.keys"]
            none, also = dict.fromkeys(entity.parts), _same_birth(notes.get(CF) or {})
            image = await self._set_until_decided(entity, id_, rev, set_, gone, also, {}, o, left_out=none)
            if image is None:
                continue
            o.say("MongoDB delete decided")
            return await self._then_postgres(entity, image, o)
        raise errors.Busy(f"[{o.context}] other writers kept changing this record of {entity.name}")

    # --- the first step: until MongoDB has decided ----------------------------------------------------------------

    def _marks(
        self,
        entity: Entity,
        id_: Any,
        o: Operation,
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

    async def _was_buried_meanwhile(self, entity: Entity, stored: Mapping[str, Any], o: Operation) -> bool:
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
            if await self.pair.mongo.remove_echo(
                entity, stored["_id"], rev=stored[CF]["rev"], op=o.op, timeout=o.left()
            ):
                return True
        except errors.StoreUnavailable as cause:
            raise errors.OutcomeUnknown(
                f"[{o.context}] MongoDB holds the write, but does not say whether it stands: {cause}"
            ) from cause
        raise written_since(entity, o)

    async def _insert_until_decided(
        self, entity: Entity, stored: dict[str, Any], image: Callable[[], Image], o: Operation
    ) -> Image | None:
        """Insert, repeated until it is decided: the image that was made; None: a decided delete stood in the way."""
        # A request of an attempt that was taken back may be on its way still.
        unknown = o.fate.unanswered
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
                    o.say(f"MongoDB write failed: {cause}", warn=True)
                    raise
                await self._again(o, cause)
                continue
            except RuleBroken as cause:
                mine = await self._read_or_unknown(entity, stored["_id"], o, unknown=unknown)
                if mine is not None and mine.op == o.op and mine.rev < stored[CF]["rev"]:
                    # It has arrived, and is no more to be seen than what was taken back.
                    try:
                        await self.pair.mongo.remove_echo(
                            entity, mine.id, rev=mine.rev, op=o.op, timeout=o.left()
                        )
                    except errors.StoreUnavailable as unheard:
                        await self._again(o, unheard)
                    continue
                if mine is None or mine.op != o.op:
                    if unknown:
                        raise written_since(entity, o) from cause
                    if mine is not None and await self._roll_delete_forward(entity, mine, o):
                        return None
                    if mine is None and await self.settler.name_is_freed(
                        entity, stored, stored["_id"], o.control
                    ):
                        continue
                    rule = (
                        "_id"
                        if mine is not None
                        else await self._broken_rule(entity, stored, stored["_id"], cause)
                    )
                    o.say(f"MongoDB write refused: the rule {rule!r} is broken")
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
                raise written_since(entity, o)
            return made

    async def _roll_delete_forward(self, entity: Entity, there: Image, o: Operation) -> bool:
        """Bury and remove a document whose delete is decided, so that its id is free; False: it is not.

        Or one that came back with an insert repeated.
        """
        if await self.settler.is_echo(entity, there):
            return True
        tentative = there.debt is not None and there.debt.tentative is not None
        if not there.deleted or tentative or there.op is None:
            return False
        if there.steps is not None:
            await self.settler.roll_forward(entity, there, o.control, ends=o.ends)
        await self.settler.bury(entity, there)
        return True

    async def _again(self, o: Operation, cause: errors.StoreUnavailable) -> None:
        """Pause before the same request is sent again.

        Raises:
            crossfade.errors.OutcomeUnknown: the deadline has passed.
        """
        if boot_clock() >= o.ends:
            o.say(f"MongoDB write not answered: {cause}", warn=True)
            raise errors.OutcomeUnknown(
                f"[{o.context}] MongoDB did not say within the deadline whether it holds the write; whichever it "
                "is, both stores are made equal"
            ) from cause
        await asyncio.sleep(0.05)

    async def _read_or_unknown(
        self, entity: Entity, id_: Any, o: Operation, *, unknown: bool
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

    def _seen(
        self, entity: Entity, id_: Any, changed: set[str], if_revision: int | None, o: Operation
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
        o: Operation,
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
        self, entity: Entity, id_: Any, fields: Iterable[str], if_revision: int | None, o: Operation
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
                o.say(f"MongoDB write failed: {cause}", warn=True)
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

    async def _is_buried(self, entity: Entity, id_: Any, cf: Mapping[str, Any], o: Operation) -> bool:
        """Whether this is a newborn over a tombstone, which no reader sees: a revision upon it was told before."""
        newborn = Image.from_document({"_id": id_, CF: cf})
        return not await self.pair.mongo.standing(entity, [newborn], timeout=o.left())

    def _quarantined(self) -> frozenset[str]:
        look = self.pair.board.look
        return frozenset() if look is None else look.quarantined

    async def _assert_readable(self, entity: Entity, id_: Any, o: Operation) -> None:
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
        o: Operation,
        *,
        left_out: Mapping[str, Part | None],
        foreseen: Callable[[], Image] | None = None,
    ) -> Image | None:
        """One compare-and-set, repeated until it is decided; None: another write was first."""
        unknown: errors.StoreUnavailable | None = None
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
                unknown, o.fate.unanswered = cause, True
                await self._again(o, cause)
                continue
            except errors.StoreUnavailable as cause:
                if unknown is None:
                    o.say(f"MongoDB write failed: {cause}", warn=True)
                    raise
                await self._again(o, cause)
                continue
            except RuleBroken as cause:
                if unknown is not None:
                    # The request that was not answered may yet arrive, once the value is free.
                    raise written_since(entity, o) from cause
                if await self.settler.name_is_freed(entity, fields, id_, o.control):
                    continue
                rule = await self._broken_rule(entity, fields, id_, cause)
                o.say(f"MongoDB write refused: the rule {rule!r} is broken")
                raise errors.DuplicateKey(entity.name, rule) from cause
            if image is not None or unknown is None:
                return image
            now = await self._read_or_unknown(entity, id_, o, unknown=True)
            if now is not None and now.op == o.op:
                return now
            if now is None and o.kind == "delete":
                buried = await self.pair.mongo.tombstone(entity, id_, timeout=o.left())
                if buried is not None and buried.op == o.op:
                    return buried.as_image()
            if now is not None and now.rev == rev:
                # Something else is in the way of this one, and the first may yet arrive once it has gone.
                await self._again(o, unknown)
                continue
            if now is None or now.rev != rev + 1:
                # Somebody has written upon revision n+1, and nothing says any more whose that was.
                raise written_since(entity, o)
            o.fate.unanswered = False  # revision n+1 is somebody else's
            return None

    # --- the second step: PostgreSQL ------------------------------------------------------------------------------

    async def _then_postgres(
        self, entity: Entity, image: Image, o: Operation, ahead: Ahead | None = None
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
            if self.background.has_room:
                # The caller may change what it is given while this one is on its way.
                kept = image.kept()
                self.background.start(lambda: self._try_postgres(entity, kept(), o))
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

    async def _take_steps(self, entity: Entity, image: Image, o: Operation) -> list[Placed]:
        """Do to the other records what has been decided.

        Raises:
            crossfade.errors.OutcomeUnknown: not all of it could be done now; it will be.
        """
        if image.steps is None or image.steps.op != o.op:
            return []  # answered late: whoever came upon them meanwhile has done all of it
        try:
            together = await self.settler.stepper.take(entity, image, o.control, ends=o.ends)
            await self.settler.stepper.erase(entity, image.id, image.steps)
        except (errors.CrossfadeError, Unmappable) as cause:
            o.say(f"MongoDB write decided, its other records are owed their part: {cause}", warn=True)
            raise errors.OutcomeUnknown(
                f"[{o.context}] the operation is decided and will be carried out, but not every record shows it yet"
            ) from cause
        return together

    async def _try_postgres(
        self,
        entity: Entity,
        image: Image,
        o: Operation,
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
        o.say("Writing to PostgreSQL...")
        behind: list[asyncio.Task[None]] = []
        try:
            # Lifting and making way take several steps: together no longer than four.
            with self.pair.postgres_breaker.hears():
                async with asyncio.timeout(self.pair.options.secondary_deadline * 4):
                    settled = await self._bring(entity, image, o, together, behind, ahead)
        except TimeoutError as cause:
            o.say(f"PostgreSQL write failed: {cause}", warn=True)
            return errors.StoreUnavailable("postgres", "PostgreSQL did not answer within the deadline")
        except Unmappable as cause:
            return errors.Quarantined(f"PostgreSQL cannot hold this record: {cause}")
        except errors.CrossfadeError as cause:
            o.say(f"PostgreSQL write failed: {cause}", warn=True)
            return cause
        if settled is Settled.PARKED:
            o.say("PostgreSQL write failed: its rules or the mapping refuse the record", warn=True)
            return errors.Quarantined("PostgreSQL refuses this record; see the debt's cause")
        if o.rollback and settled is not Settled.CONFIRMED:
            # A row above the primary's revision, for one: it is not a confirmation.
            return errors.StoreUnavailable("postgres", "PostgreSQL holds another state of this record")
        o.say("PostgreSQL write successful")
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
        o: Operation,
        together: Sequence[Placed],
        behind: list[asyncio.Task[None]],
        ahead: Ahead | None,
    ) -> Settled:
        timeout = self.pair.options.secondary_deadline
        own = [(entity, image), *together]
        # Who is early is not waited for: this write has its own deadline.
        placed, _ = await self.settler.with_groups(own)
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

    async def _acknowledge_with_debt(self, o: Operation, failure: errors.CrossfadeError) -> None:
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
        o.say(f"MongoDB keeps the write; PostgreSQL is owed it: {failure}", warn=True)

    async def _close_tentative(
        self,
        entity: Entity,
        image: Image,
        o: Operation,
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
                    # Decided for all: who does not hear of it now is told by a reconciler, if nobody else removes
                    # the record that says so.
                    try:
                        await self.settler.stepper.close(image.steps)
                    except errors.StoreUnavailable as cause:
                        raise errors.OutcomeUnknown(
                            f"[{o.context}] the operation is decided and will be carried out, but not every record "
                            "shows it yet"
                        ) from cause
                    with contextlib.suppress(errors.StoreUnavailable):
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
            if await self._stands_open(entity, image, o):
                raise _undo_pending(o)
            raise errors.Undone(
                f"[{o.context}] the write was undone: it was not confirmed before its deadline"
            )
        o.say(f"Rolling MongoDB back: {failure}", warn=True)
        try:
            settled = await self.settler.undo(entity, image, o.control)
        except FAILED as cause:
            if await self._stands_open(entity, image, o):
                o.say(f"Rollback failed: {cause}; the reconciler undoes it", warn=True)
                raise errors.UndoPending(
                    f"[{o.context}] PostgreSQL failed, and the undo in MongoDB could not be finished; it is "
                    "recorded and will be carried out"
                ) from failure
            settled = Settled.SUPERSEDED
        if settled in (Settled.SUPERSEDED, Settled.GONE):
            await self._bring_what_replaced_it(entity, image, o)
        # A step that was not answered may yet be taken, and is then undone as one whose writer died.
        is_late = bool(o.request.steps) and isinstance(failure, Unanswered) and failure.store == "mongo"
        if is_late or (settled is not Settled.CONFIRMED and await self._stands_open(entity, image, o)):
            raise _undo_pending(o) from failure
        if settled is not Settled.CONFIRMED and self.pair.board.control.postgres_first:
            # PostgreSQL may have taken the write without saying so: nobody may read it there after "undone".
            with contextlib.suppress(errors.CrossfadeError):
                await self.pair.board.mark_unreadable(o.op)
        o.say("Rollback successful", warn=True)
        raise errors.Undone(
            f"[{o.context}] PostgreSQL failed; MongoDB was rolled back: {failure}"
        ) from failure

    async def _bring_what_replaced_it(self, entity: Entity, image: Image, o: Operation) -> None:
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
                with contextlib.suppress(*FAILED):
                    settled = await self.settler.finish_delete(entity, gone, o.control)
            elif there.debt is not None or there.rev > image.rev:
                return
            else:
                lifted = await self.settler.lift(entity, image.id, above=image.rev, control=o.control)
                if lifted is None:
                    return
                with contextlib.suppress(*FAILED):
                    settled = await self.settler.bring(
                        entity, lifted, o.control, timeout=self.pair.options.secondary_deadline
                    )
                if settled is Settled.CONFIRMED:
                    self.settler.eraser.soon(entity, lifted)
            if settled is not Settled.CONFIRMED and self.pair.board.control.postgres_first:
                await self.pair.board.mark_unreadable(o.op)

    async def _stands_open(self, entity: Entity, image: Image, o: Operation) -> bool:
        """Whether the document, or one with a step of it, still is as the open write left it, or cannot be asked."""
        places = [(entity, image.id)]
        places += [(self.pair.entities[step.entity], step.id) for step in o.request.steps]
        try:
            for each, id_ in places:
                notes = await self.pair.mongo.notes(each, id_, (), timeout=o.left())
                if ((notes or {}).get(CF) or {}).get("op") == o.op:
                    return True
        except errors.StoreUnavailable:
            return True
        return False

    async def _confirm(self, entity: Entity, image: Image, o: Operation) -> bool:
        """The compare-and-set from tentative to confirmed, repeated until it is decided; False: undone.

        Raises:
            crossfade.errors.StoreUnavailable: MongoDB does not say.
            crossfade.errors.OutcomeUnknown: it was confirmed or undone, and written again since.
        """
        unknown = False
        assert image.debt is not None
        assert image.debt.tentative is not None
        held = image.debt.tentative.get("keys", {})
        keys, gone = image.keys, [f"{CF}.keys.{rule}" for rule in held if rule not in image.keys]
        if image.deleted:
            keys, gone = {}, [f"{CF}.keys"]  # its names are free from now on, whoever removes it when
        while True:
            try:
                done = await self.pair.mongo.compare_and_set(
                    entity, image.id, rev=image.rev,
                    set_={
                        f"{CF}.op": o.op,
                        **{f"{CF}.keys.{rule}": key for rule, key in keys.items()},
                        # Steps of an earlier operation, decided already, are not this one's to confirm.
                        **(
                            {f"{CF}.steps.state": "confirmed"}
                            if image.steps is not None and image.steps.op == o.op
                            else {}
                        ),
                    },
                    unset=[
                        f"{CF}.debt.tentative",
                        *gone,
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
                        raise confirmed_or_not(entity, o)
                    return False
            except errors.StoreUnavailable:
                unknown = True
                if boot_clock() >= o.ends:
                    raise
                await asyncio.sleep(0.05)
                continue
            return now.debt is None or now.debt.tentative is None

    async def _finish_confirmed_delete(self, entity: Entity, image: Image, o: Operation) -> None:
        with contextlib.suppress(*FAILED):
            await self.settler.finish_delete(entity, image, o.control)


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
    o: Operation,
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


def _same_birth(cf: Mapping[str, Any]) -> dict[str, Any]:
    return same_birth(cf.get("op"), cf.get("born"), Debt.from_document(cf.get("debt")))


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


def _undo_pending(o: Operation) -> errors.UndoPending:
    return errors.UndoPending(f"[{o.context}] the undo in MongoDB waits for the reconciler")


def _waits(entity: Entity, o: Operation) -> errors.Busy:
    return errors.Busy(f"[{o.context}] a write of this record of {entity.name} waits for its outcome")
