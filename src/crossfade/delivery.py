"""PostgreSQL decides: what the outbox owes is brought to MongoDB.

Only the document that was looked at is replaced, whole: any write in between makes it look again. A content that the
last delivery did not leave there is a foreign write, and is journaled before it is written over.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bson.int64 import Int64

from crossfade import errors, observe
from crossfade.board import Pair
from crossfade.control import Control
from crossfade.entity import Entity, UniqueRule
from crossfade.erasing import Eraser
from crossfade.part import digest_with, parts_of
from crossfade.record import CF, Debt, Image, Settled, new_operation, unique_key
from crossfade.stores.errors import RuleBroken
from crossfade.stores.mongo import Put
from crossfade.stores.postgres import Change, Delivery
from crossfade.values import Unmappable, decode_document, digest_of_bytes, encode_document, id_to_text

#: Inserts of deliveries that are seen to at once.
MOST_DELIVERIES = 1_000
#: How often a record that keeps changing under us is tried again before it is left to the next round.
ATTEMPTS = 8
#: Bytes of BSON that are settled in one transaction.
MOST_TOGETHER = 8 * 2**20
#: Bytes of a value that is brought to MongoDB ahead of the large ones of its record.
SMALL = 4096
#: Why a delivery is parked that nothing in PostgreSQL says anything of.
_DELETED_BY_HAND = (
    "its row was deleted in PostgreSQL past Crossfade, so nothing says what MongoDB is to hold: make a record with this"
    " id again, and delete that if it is to go"
)


@dataclass
class Deliverer:
    """Delivers single records of one migration to MongoDB, and many at once after an outage."""

    pair: Pair
    eraser: Eraser

    async def deliver(self, owed: Delivery, control: Control, *, timeout: float) -> Settled:
        """Bring what PostgreSQL holds of a record to MongoDB.

        Raises:
            crossfade.errors.StoreUnavailable: the outbox row stays.
        """
        entity = self.pair.entities[owed.entity]
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            settled = await self._deliver_once(entity, owed, control, last=last, timeout=timeout)
            if settled is not None:
                return settled
        return Settled.SUPERSEDED

    async def deliver_many(
        self, entity: Entity, ids: Sequence[Any], control: Control
    ) -> tuple[set[str], set[str]]:
        """Bring what the outbox owes of these records to MongoDB together; the id texts of those that were settled so,
        and of those that others have settled meanwhile.

        What owes nothing but its own row, and stands in MongoDB as it was left there. The others are `deliver`'s, which
        decides what becomes of them: this only spares the many that an outage leaves five requests each.

        Raises:
            crossfade.errors.StoreUnavailable: the outbox rows stay.
        """
        pair = self.pair
        timeout = pair.options.primary_deadline
        owed = await pair.postgres.outbox_rows(entity, ids, timeout=timeout)
        elsewhere = {id_to_text(id_) for id_ in ids} - owed.keys()
        plain: list[Delivery] = []
        room = MOST_TOGETHER
        for now, size in owed.values():
            if now.tentative is None and not now.parked and not now.parts and size <= room:
                plain.append(now)
                room -= size
        rows = {
            id_to_text(row.id): row
            for row in await pair.postgres.read_many(
                entity, [now.id for now in plain], timeout=timeout, small=bool(entity.parts)
            )
        }
        standing = [
            (now, row)
            for now in plain
            if (row := rows.get(id_to_text(now.id))) is not None
            and (row.rev, row.op) == (now.rev, now.op)
            and not row.unknown
        ]
        delivered: dict[str, Image] = {}
        for small in (True, False):
            some = [(now, row) for now, row in standing if bool(row.left_out) is small]
            for row in await self._put_many(entity, some, control, small=small, timeout=timeout):
                delivered[id_to_text(row.id)] = row
        if not delivered:
            return set(), elsewhere
        settled = await pair.postgres.settle_many(
            entity, [(key, row.rev, row.op) for key, row in delivered.items()], timeout=timeout
        )
        return settled, elsewhere

    async def _put_many(
        self,
        entity: Entity,
        owed: Sequence[tuple[Delivery, Image]],
        control: Control,
        *,
        small: bool,
        timeout: float,
    ) -> list[Image]:
        """The rows of these that stand in MongoDB now; ``small``: without their parts."""
        if not owed:
            return []
        mongo, left_out = self.pair.mongo, entity.parts if small else ()
        found, all_of_them = await mongo.read_raw_many(
            entity, [row.id for _, row in owed], size=MOST_TOGETHER, timeout=timeout, without=left_out
        )
        puts: list[Put] = []
        rows: list[Image] = []
        for number, (now, row) in enumerate(owed):
            if number % 16 == 0:
                await asyncio.sleep(0)  # others in this process are waiting
            raw = found.get(id_to_text(row.id))
            if raw is None:
                if small or not all_of_them:
                    continue
                # Marked as in `_put`.
                sent = replace(row, debt=Debt(control.epoch, delivery=True, sending=new_operation()))
            else:
                there = _as_left(now, row, raw, entity, left_out)
                # Where an earlier delivery left these very notes, they do not tell whether this one was made.
                if there is None or there.op == row.op:
                    continue
                sent = row
            notes = _delivered_notes(sent)
            if sent.debt is not None:
                notes["debt"] = sent.debt.to_document()
            values = {
                name: value for name, value in row.document.items() if not small or name not in row.parts
            }
            puts.append(Put(raw, {**values, CF: notes}, small))
            rows.append(sent)
        if not puts:
            return []
        put = await mongo.deliver_many(entity, puts, timeout=timeout)
        stand = [row for row in rows if id_to_text(row.id) in put]
        inserted = [row.id for row in stand if row.debt is not None]
        buried = await mongo.buried_among(entity, inserted, timeout=timeout) if inserted else {}
        return [
            row
            for row in stand
            if row.debt is None
            or await self._stays(entity, row, buried.get(id_to_text(row.id)), control, timeout=timeout)
        ]

    async def _deliver_once(
        self, entity: Entity, owed: Delivery, control: Control, *, last: bool, timeout: float
    ) -> Settled | None:
        pair = self.pair
        primary = pair.options.primary_deadline
        now = await pair.postgres.outbox_row(entity, owed.id, timeout=primary)
        if now is None:
            return Settled.CONFIRMED
        small = bool(entity.parts) and not now.parts
        row = await pair.postgres.read(entity, owed.id, timeout=primary, small=small)
        if row is not None and row.left_out and not row.unknown and row.rev == now.rev:
            try:
                put = await self._put_small(entity, now, row, timeout=timeout)
            except RuleBroken as cause:
                return await self._refused(entity, row, now, cause, last=last, timeout=timeout)
            if put is not None:
                return await self._delivered(entity, now) if put else None
        if small and row is not None:
            row = await pair.postgres.read(entity, owed.id, timeout=primary)
        if row is None:
            gone = await pair.postgres.tombstone(entity, owed.id, timeout=primary)
            if gone is None and last:
                return await self._park_delivery(entity, owed.id, now, _DELETED_BY_HAND)
            if gone is None or gone[0] != now.rev:
                return None  # made again between the statements: look again
            # Before the document is looked for: who inserts one after that look finds the tombstone.
            await pair.mongo.bury(entity, owed.id, rev=now.rev, op=now.op, owed=False, timeout=timeout)
        elif row.rev != now.rev:
            return None  # written between the statements: look again
        raw = await pair.mongo.read_raw(entity, owed.id, timeout=timeout)
        there = broken = None
        if raw is not None:
            try:
                there = Image.from_raw(raw, entity.parts)
            except Unmappable:
                there, broken = Image(owed.id, {"_id": owed.id}, 0, None, {}, digest_of_bytes(raw)), raw
            expected = {now.base_digest, there.delivered, None if row is None else row.digest}
            is_foreign = there.digest not in expected
            if is_foreign or there.rev >= now.rev:
                latest = await pair.postgres.outbox_row(entity, owed.id, timeout=primary)
                if latest is None or latest.op != now.op:
                    # A later delivery's; or this one was made by another, and MongoDB may decide again: look again.
                    return None
            if is_foreign:
                await pair.postgres.note_conflict(
                    entity, there, cause="written in MongoDB while PostgreSQL was primary",
                    store="mongo", timeout=primary, document=broken,
                )  # fmt: skip
            if row is not None and id_to_text(there.id) != id_to_text(row.id):
                # A number of another type: what replaces it would keep that.
                await pair.mongo.deliver_removal(entity, raw, timeout=timeout)
                return None
        if row is None:
            if raw is not None and not await pair.mongo.deliver_removal(entity, raw, timeout=timeout):
                return None
        elif there is not None and there.rev > row.rev:
            # A worker that slept through the switch numbered a revision of its own: PostgreSQL goes above it.
            await self._lift_row(entity, owed.id, above=there.rev, control=control)
            return None
        else:
            try:
                if not await self._put(entity, raw, there, row, control, timeout=timeout):
                    return None
            except RuleBroken as cause:
                return await self._refused(entity, row, now, cause, last=last, timeout=timeout)
            except errors.Quarantined as cause:
                return await self._park_delivery(entity, row.id, now, cause)
        return await self._delivered(entity, now)

    async def _delivered(self, entity: Entity, now: Delivery) -> Settled | None:
        timeout = self.pair.options.primary_deadline
        if now.tentative is None and not await self.pair.postgres.settle(
            entity, now.id, now.rev, now.op, timeout=timeout
        ):
            return None
        return Settled.CONFIRMED

    async def _refused(
        self, entity: Entity, row: Image, now: Delivery, cause: RuleBroken, *, last: bool, timeout: float
    ) -> Settled | None:
        if await self._make_way(entity, row, timeout=timeout) and not last:
            return None
        return await self._park_delivery(entity, row.id, now, cause)

    async def _park_delivery(
        self, entity: Entity, id_: Any, now: Delivery, cause: errors.CrossfadeError | str
    ) -> Settled:
        await self.pair.postgres.park(
            entity, id_, now.rev, now.op, str(cause), timeout=self.pair.options.primary_deadline
        )
        observe.log().warning(f"Parked: {cause}", context="Reconcile", entity=entity.name, id=str(id_))
        return Settled.PARKED

    async def _put_small(self, entity: Entity, now: Delivery, row: Image, *, timeout: float) -> bool | None:
        """Bring a row without its parts; None: the document does not hold just these, or is not as it was left."""
        mongo = self.pair.mongo
        raw = await mongo.read_raw(entity, row.id, timeout=timeout, without=entity.parts)
        there = None if raw is None else _as_left(now, row, raw, entity, entity.parts)
        # One that was made already stands as it was left only if nobody has written since: seen to whole.
        if raw is None or there is None or there.op == row.op:
            return None
        values = {name: value for name, value in row.document.items() if name not in row.parts}
        return await mongo.deliver_small(
            entity, decode_document(raw), {**values, CF: _delivered_notes(row)}, timeout=timeout
        )

    async def _put(
        self,
        entity: Entity,
        raw: bytes | None,
        there: Image | None,
        row: Image,
        control: Control,
        *,
        timeout: float,
    ) -> bool:
        notes = _delivered_notes(row)
        # It may arrive when whoever sent it is gone, and the record too: then `end_deliveries` finds it by this.
        mark = Debt(control.epoch, delivery=True, sending=new_operation())
        # So it may be upon one that came late, behind the delete of its record, which had found nothing.
        is_new = raw is None or (there is not None and _is_marked(there))
        if is_new:
            notes["debt"] = mark.to_document()
        mongo = self.pair.mongo
        try:
            if not await mongo.deliver(entity, raw, {**row.document, CF: notes}, timeout=timeout):
                return False
        except errors.Quarantined:
            if (
                raw is None
                or there is None
                or not await self._make_room(entity, raw, there, row, timeout=timeout)
            ):
                raise
            return False
        if not is_new:
            return True
        # Whoever inserts looks for a tombstone afterwards: the delete may have found nothing to remove.
        buried = await mongo.buried_among(entity, [row.id], timeout=timeout)
        return await self._stays(
            entity, replace(row, debt=mark), buried.get(id_to_text(row.id)), control, timeout=timeout
        )

    async def _stays(
        self, entity: Entity, row: Image, buried: int | None, control: Control, *, timeout: float
    ) -> bool:
        """Whether a record that was inserted stays, with a tombstone at ``buried``; if not, it is removed."""
        mongo = self.pair.mongo
        if buried is None or buried < row.rev:
            self.eraser.soon(entity, row)
            return True
        mine = await mongo.read_raw(entity, row.id, timeout=timeout)
        if mine is not None and Image.from_raw(mine, entity.parts).op == row.op:
            await mongo.deliver_removal(entity, mine, timeout=timeout)
        held = await self.pair.postgres.held(entity, row.id, timeout=self.pair.options.primary_deadline)
        if held.rev == row.rev:
            # Not PostgreSQL's delete: a worker that slept through the switch has buried what stands.
            await self._lift_row(entity, row.id, above=buried, control=control)
        return False

    async def _make_room(
        self, entity: Entity, raw: bytes, there: Image, row: Image, *, timeout: float
    ) -> bool:
        """Bring what is small of a row first; False: that is what stands there already.

        A document that is replaced and the one that replaces it go in one command, which holds 16 MiB.
        """
        small = {
            name: value for name, value in row.document.items() if len(encode_document({"v": value})) < SMALL
        }
        notes = _delivered_notes(row)
        notes.pop("parts", None)
        if there.debt is not None and _is_marked(there):
            notes["debt"] = there.debt.to_document()
        # The digest tells what we leave there from what a foreign writer makes of it.
        notes["digest"] = Image.from_document({**small, CF: dict(notes)}, entity.parts).digest
        if notes["digest"] == there.digest:
            return False
        await self.pair.mongo.deliver(entity, raw, {**small, CF: notes}, timeout=timeout)
        return True

    async def deliver_anew(self, entity: Entity, id_: Any, control: Control, *, above: int = 0) -> Settled:
        """Give a row the next revision, above ``above``, and bring it to MongoDB, whatever stands there.

        Raises:
            crossfade.errors.StoreUnavailable: what was begun stays in the outbox.
        """
        await self._lift_row(entity, id_, above=above, control=control)
        owed = Delivery(entity.name, id_, 0, "", None, None, None)
        return await self.deliver(owed, control, timeout=self.pair.options.primary_deadline)

    async def end_deliveries(self) -> int:
        """See to inserts that were delivered and that nobody has confirmed; how many there were.

        A worker sends one and dies; the record is deleted, and its delete delivered, before the insert arrives. Nothing
        else would ever look at it again.

        Raises:
            crossfade.errors.StoreUnavailable: one of the stores does not answer.
        """
        number = 0
        found = self.pair.mongo.each_debt(
            self.pair.entities.values(), page=MOST_DELIVERIES, timeout=self.pair.options.primary_deadline
        )
        async for owed in found:
            if owed.delivery:
                await self.end_delivery(self.pair.entities[owed.entity], owed.id)
                number += 1
        return number

    async def end_delivery(self, entity: Entity, id_: Any) -> Settled:
        """Remove a document that was delivered late, after the delete of its record; or its mark, where it stands.

        SUPERSEDED: PostgreSQL knows nothing of the record, so nothing says what becomes of it.

        Raises:
            crossfade.errors.StoreUnavailable: one of the stores does not answer.
        """
        pair, timeout = self.pair, self.pair.options.primary_deadline
        raw = await pair.mongo.read_raw(entity, id_, timeout=timeout)
        try:
            image = None if raw is None else Image.from_raw(raw, entity.parts)
        except Unmappable:
            return (
                Settled.GONE
            )  # a foreign writer broke it since: it is delivered over when its record is written
        key = None if image is None else image.debt_key
        if raw is None or image is None or image.debt is None or not image.debt.delivery or key is None:
            return Settled.GONE
        held = await pair.postgres.held(entity, id_, timeout=timeout)
        if held.rev is not None:
            await pair.mongo.settle(entity, [key], timeout=timeout)
        elif await pair.postgres.outbox_row(entity, id_, timeout=timeout) is not None:
            return Settled.OPEN  # the delivery of the delete finds it
        elif (held.tombstone or -1) >= image.rev:
            await pair.mongo.deliver_removal(entity, raw, timeout=timeout)
        else:
            return Settled.SUPERSEDED
        return Settled.CONFIRMED

    async def _make_way(self, entity: Entity, row: Image, *, timeout: float) -> bool:
        """Free the values of this record that another document still holds; False: none gives way.

        Only a document that is owed a delivery gives way: that delivery writes its new value. One that does not may
        have the same value under a key of its own, and be in nobody's way: whoever tries again finds out.
        """
        rivals = gave_way = 0
        for rule in entity.unique:
            key = row.keys.get(rule.rule)
            if key is None:
                continue
            for query in ({f"{CF}.keys.{rule.rule}": key}, {rule.field: row.document.get(rule.field)}):
                for rival in await self.pair.mongo.look_up(entity, [query], timeout=timeout):
                    if rival.id != row.id:
                        rivals += 1
                        gave_way += await self._set_aside(entity, rule, key, rival, timeout=timeout)
        return not rivals or gave_way > 0

    async def _set_aside(
        self, entity: Entity, rule: UniqueRule, key: str, rival: Image, *, timeout: float
    ) -> bool:
        pair = self.pair
        primary = pair.options.primary_deadline
        owed = await pair.postgres.outbox_row(entity, rival.id, timeout=primary)
        if owed is None or owed.op == rival.op:
            # Delivered between the two looks, or PostgreSQL knows nothing of its giving the value up. Or delivered and
            # not settled yet: nothing would bring back what is set aside then.
            there = await pair.mongo.read(entity, rival.id, timeout=timeout)
            return there is None or (there.rev, there.digest) != (rival.rev, rival.digest)
        if rival.digest not in (owed.base_digest, rival.delivered):
            await pair.postgres.note_conflict(
                entity, rival, cause="written in MongoDB while PostgreSQL was primary",
                store="mongo", timeout=primary,
            )  # fmt: skip
        # The digest tells what we leave there from what a foreign writer makes of it.
        aside = {rule.field: unique_key(key, rival.id)}
        await pair.mongo.compare_and_set(
            entity,
            rival.id,
            rev=rival.rev,
            set_={**aside, f"{CF}.digest": digest_with({**rival.document, **aside}, rival.parts)},
            unset=[f"{CF}.keys.{rule.rule}"],
            also={rule.field: rival.document.get(rule.field)},
            timeout=timeout,
        )
        return True

    async def _lift_row(self, entity: Entity, id_: Any, *, above: int, control: Control) -> None:
        op = new_operation()

        def decide(before: Image | None, _tombstone: int) -> Change:
            if before is None:
                raise errors.NotFound("gone meanwhile")
            rev = max(above, before.rev) + 1
            parts = parts_of(before.document, entity.parts, before.parts, rev)
            # The digest anew: a row whose own is wrong would differ for ever.
            digest = digest_with(before.document, parts)
            lifted = replace(before, rev=rev, op=op, parts=parts, digest=digest)
            # Whatever it is lifted for, MongoDB is to have all of it.
            return Change(lifted, entity.to_rows(before.document, before.keys), rev, op, parts=entity.parts)

        with contextlib.suppress(errors.NotFound):
            await self.pair.postgres.write(
                [(entity, id_, decide)], migration=self.pair.name, epoch=control.epoch,
                timeout=self.pair.options.primary_deadline,
            )  # fmt: skip


def _as_left(
    now: Delivery, row: Image, raw: bytes, entity: Entity, left_out: Collection[str]
) -> Image | None:
    """A document that stands as a delivery left it, and holds just the parts that are ``left_out`` of the row."""
    try:
        there = Image.from_raw(raw, entity.parts, left_out)
    except Unmappable:
        return None
    expected = (now.base_digest, there.delivered, row.digest)
    stands = there.digest in expected and there.rev <= row.rev and (not left_out or there.noted == row.parts)
    return there if stands and not _is_marked(there) else None


def _is_marked(there: Image) -> bool:
    """Whether a document is an insert that was delivered, and that nobody has confirmed yet."""
    return there.debt is not None and there.debt.delivery


def _delivered_notes(row: Image) -> dict[str, Any]:
    """What a delivery writes under ``_cf``."""
    notes: dict[str, Any] = {"rev": Int64(row.rev), "op": row.op, "digest": row.digest}
    if row.keys:
        notes["keys"] = row.keys
    if row.parts:
        notes["parts"] = {name: part.to_document() for name, part in row.parts.items()}
    return notes
