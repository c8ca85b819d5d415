"""Strays: writes that arrived in MongoDB after PostgreSQL had become the primary.

MongoDB cannot be fenced on every server: a worker that was stopped in the middle of a write, or cut off, may wake and
send it when the primary has changed. Nobody was told that it succeeded, its lease had run out; but it stands there,
with a debt that nobody in this phase makes. So while PostgreSQL decides, MongoDB's debts are looked for all the same:

- A plain write upon just what PostgreSQL still holds, and has delivered, is made there, as a write of its own.
- Anything else (the record was written since, PostgreSQL's rules refuse it, it was one of several records or was never
  confirmed) is kept whole in the conflict journal, and PostgreSQL's record is brought to MongoDB again.

Either way the stray has ended: the document is what PostgreSQL holds.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from enum import StrEnum

from crossfade import errors, observe
from crossfade.board import Pair
from crossfade.control import Control
from crossfade.debt import Settler
from crossfade.delivery import MOST_DELIVERIES
from crossfade.entity import Entity
from crossfade.part import parts_of
from crossfade.record import Image, new_operation
from crossfade.stores.errors import Fenced, RuleBroken
from crossfade.stores.mongo import Owed
from crossfade.stores.postgres import Change, Delivery
from crossfade.values import Unmappable, digest

_CAUSE = "written in MongoDB under an older epoch, after PostgreSQL had become the primary"


class Merged(StrEnum):
    """What became of a stray."""

    APPLIED = "applied"
    JOURNALED = "journaled"
    #: It is none, or it is gone.
    NONE = "none"


class _Conflict(Exception):
    """PostgreSQL's record is not the one that the stray was written upon."""


@dataclass
class Strays:
    """Looks for strays of one migration, and ends them."""

    pair: Pair
    settler: Settler

    async def merge_all(self, control: Control) -> dict[Merged, int]:
        """End every stray there is now; how many, by what became of them. Nothing unless PostgreSQL decides.

        One that cannot be ended stays, is logged, and keeps nobody else from it.

        Raises:
            crossfade.errors.StoreUnavailable, Fenced: what is left stands.
        """
        counts = dict.fromkeys(Merged, 0)
        if control.phase.rules.primary != "postgres":
            return counts
        # What was parked before the switch is known, and was waived by a person.
        found = self.pair.mongo.each_debt(
            self.pair.entities.values(), page=MOST_DELIVERIES, timeout=self.pair.options.primary_deadline
        )
        async for owed in found:
            if owed.delivery:
                continue
            entity = self.pair.entities[owed.entity]
            end = self._end_tombstone if owed.tombstone else self._end_document
            try:
                merged = await end(entity, owed, control)
            except (errors.StoreUnavailable, Fenced):
                raise
            except Exception as cause:
                observe.log().error(
                    f"A stray cannot be ended: {type(cause).__name__}",
                    context="Reconcile", entity=entity.name, id=str(owed.id),
                )  # fmt: skip
                continue
            counts[merged] += 1
            if merged is Merged.JOURNALED:
                observe.log().warning(
                    f"A conflict: {_CAUSE}", context="Reconcile", entity=entity.name, id=str(owed.id)
                )
        return counts

    async def _end_document(self, entity: Entity, owed: Owed, control: Control) -> Merged:
        pair, timeout = self.pair, self.pair.options.primary_deadline
        raw = await pair.mongo.read_raw(entity, owed.id, timeout=timeout)
        if raw is None:
            return Merged.NONE
        try:
            image = Image.from_raw(raw, entity.parts)
        except Unmappable:
            return (
                Merged.NONE
            )  # a foreign writer broke it since: it is delivered over when its record is written
        if image.debt is None or image.debt.delivery:
            return Merged.NONE
        if image.debt.epoch > control.epoch:
            return Merged.NONE  # no stray: MongoDB decides again, which this round has not heard of
        # Its writer had not seen what MongoDB has not got: the number of a revision alone does not tell that.
        undelivered = await pair.postgres.outbox_row(entity, owed.id, timeout=timeout) is not None
        held = await pair.postgres.held(entity, owed.id, timeout=timeout)
        # Another worker was quicker.
        there = held.rev is None if image.deleted else held.digest == image.digest
        plain = not (image.is_open or image.steps is not None or image.debt.group)
        if plain and (there or (not undelivered and await self._is_applied(entity, image, control))):
            merged = Merged.APPLIED
        else:
            await pair.postgres.note_conflict(entity, image, cause=_CAUSE, store="mongo", timeout=timeout)
            merged = Merged.JOURNALED
        held = await pair.postgres.held(entity, owed.id, timeout=timeout)
        if held.rev is None and await pair.postgres.outbox_row(entity, owed.id, timeout=timeout) is None:
            await pair.mongo.deliver_removal(entity, raw, timeout=timeout)
        else:
            await self._bring(entity, image, control)
        return merged

    async def _end_tombstone(self, entity: Entity, owed: Owed, control: Control) -> Merged:
        pair, timeout = self.pair, self.pair.options.primary_deadline
        buried = await pair.mongo.tombstone(entity, owed.id, timeout=timeout)
        if buried is None or not buried.owed:
            return Merged.NONE
        nothing = {"_id": owed.id}
        image = Image(owed.id, nothing, buried.rev, buried.op, {}, digest(nothing), deleted=True)
        merged = Merged.APPLIED
        undelivered = await pair.postgres.outbox_row(entity, owed.id, timeout=timeout) is not None
        held = await pair.postgres.held(entity, owed.id, timeout=timeout)
        if held.rev is not None and (undelivered or not await self._is_applied(entity, image, control)):
            cause = _CAUSE.replace("written", "deleted")
            await pair.postgres.note_conflict(entity, image, cause=cause, store="mongo", timeout=timeout)
            merged = Merged.JOURNALED
        await self._bring(entity, image, control)
        await pair.mongo.settle_tombstones(entity, [(owed.id, buried.rev, buried.op)], timeout=timeout)
        return merged

    async def _is_applied(self, entity: Entity, image: Image, control: Control) -> bool:
        """Make the stray a write of PostgreSQL's, if its record is the one that it was written upon."""
        op = new_operation()

        def decide(before: Image | None, tombstone: int) -> Change | None:
            rev = max(image.rev, tombstone) + 1
            if before is not None and before.digest == image.digest and not image.deleted:
                return None  # an empty write: a lift
            if before is None and image.deleted:
                return None  # another worker was quicker
            upon = tombstone if before is None else before.rev
            if upon != image.rev - 1 or (before is None and image.op != image.born):
                raise _Conflict
            if image.deleted:
                return Change(None, None, rev, op)
            keys = entity.keys(image.document) | image.keys
            rows = entity.to_rows(image.document, keys)
            parts = parts_of(image.document, entity.parts, {} if before is None else before.parts, rev)
            made = Image(image.id, image.document, rev, op, keys, image.digest, parts=parts)
            # Which of its parts MongoDB has confirmed nobody knows, so it is to have all of them.
            return Change(made, rows, rev, op, parts=entity.parts)

        with contextlib.suppress(
            _Conflict, RuleBroken, Unmappable, errors.Quarantined, errors.Busy, errors.DuplicateKey
        ):
            await self.pair.postgres.write(
                [(entity, image.id, decide)], migration=self.pair.name, epoch=control.epoch,
                timeout=self.pair.options.primary_deadline,
            )  # fmt: skip
            return True
        return False

    async def _bring(self, entity: Entity, image: Image, control: Control) -> None:
        """Bring PostgreSQL's record to MongoDB, above the stray."""
        timeout = self.pair.options.primary_deadline
        if await self.pair.postgres.outbox_row(entity, image.id, timeout=timeout) is None:
            await self.settler.deliverer.deliver_anew(entity, image.id, control, above=image.rev)
            return
        owed = Delivery(entity.name, image.id, 0, "", None, None, None)
        await self.settler.deliverer.deliver(owed, control, timeout=timeout)
