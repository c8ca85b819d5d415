"""Settling what the secondary is owed: read, apply, on *behind* lift. Backfill, sweep and repair end here too.

Why a debt is never erased too early: the secondary confirms only an image whose revision *and* digest are the
row's. *Behind* is not a confirmation: the primary is read again. If it has moved on, its own newer debt brings
that; if it has not, the row's content does not stem from it, and the primary's record is lifted above the row.
Erased is what is confirmed (`crossfade.erasing`); the other direction is `crossfade.delivery`'s.

Why a delete is final: it is decided in the document, a tombstone stands before the document is removed, and the
tombstone's debt is erased only after a second look that found no document.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from bson.int64 import Int64

from crossfade import errors, observe
from crossfade.board import Pair
from crossfade.clock import boot_clock
from crossfade.control import Control
from crossfade.delivery import ATTEMPTS, MOST_TOGETHER, Deliverer
from crossfade.entity import Entity, Rows, UniqueRule
from crossfade.erasing import Eraser, confirmed, is_misnamed
from crossfade.part import carried_by, digest_with, parts_of
from crossfade.record import (
    CF,
    Applied,
    Debt,
    Held,
    Image,
    Settled,
    acceptable_key,
    new_operation,
    unique_key,
)
from crossfade.steps import LARGEST_GROUP, Placed, Stepper
from crossfade.stores.errors import Fenced, RuleBroken
from crossfade.stores.mongo import Tombstone, just
from crossfade.stores.postgres import Ahead
from crossfade.values import Unmappable, digest_of_stored, encode_document, id_texts, id_to_text, text_to_id

_Given = TypeVar("_Given")
_Taken = TypeVar("_Taken")

#: Records that may have to change places in one transaction: a chain of renames longer than this is parked.
LONGEST_CHAIN = 16


def keys_to_stamp(entity: Entity, image: Image) -> dict[str, str]:
    """The keys that the document should carry and does not."""
    return {
        rule: plain
        for rule, plain in entity.keys(image.document).items()
        if not acceptable_key(image.keys.get(rule), plain, image.id)
    }


@dataclass
class Settler:
    """Settles single records of one migration, and many at once after an outage."""

    pair: Pair
    stepper: Stepper
    eraser: Eraser
    deliverer: Deliverer

    # --- MongoDB primary: images to PostgreSQL ---------------------------------------------------------------

    async def bring_together(
        self, placed: Sequence[Placed], control: Control, *, timeout: float
    ) -> list[Settled]:
        """Bring images of one operation to PostgreSQL in one transaction; where its rules refuse that, one by one.

        Raises:
            crossfade.errors.StoreUnavailable, Fenced: the debts stay.
        """
        pair = self.pair
        together = [(entity, image) for entity, image in placed if image.op is not None or not image.deleted]
        for entity, image in together:
            if image.deleted and not image.is_open:
                await self.bury(entity, image)  # no document may be left for it to come back from
        brought: dict[tuple[str, str], Settled] = {}
        with contextlib.suppress(Unmappable, errors.Quarantined, RuleBroken):
            answers = await pair.postgres.apply(
                [
                    (entity, image, None if image.deleted else entity.to_rows(image.document, image.keys))
                    for entity, image in together
                ],
                migration=pair.name, epoch=control.epoch, timeout=timeout,
            )  # fmt: skip
            for (entity, image), (verdict, _) in zip(together, answers, strict=True):
                if verdict is not Applied.BEHIND and not image.deleted:
                    brought[entity.name, id_to_text(image.id)] = Settled.CONFIRMED
        return [
            brought.get((entity.name, id_to_text(image.id)))
            or await self._bring_any(entity, image, control, timeout=timeout)
            for entity, image in placed
        ]

    async def _bring_any(self, entity: Entity, image: Image, control: Control, *, timeout: float) -> Settled:
        if not image.deleted:
            return await self.bring(entity, image, control, timeout=timeout)
        if image.is_open:
            return Settled.OPEN
        # Gone there already; what is left is the second look.
        return await self.finish_delete(entity, image, control)

    async def with_groups(self, placed: Sequence[Placed]) -> tuple[list[Placed], bool]:
        """These, and those that PostgreSQL should get with them: of one operation, and not yet settled.

        A record may be owed by several operations, so theirs as well; `LARGEST_GROUP` at most. And whether one of them
        cannot be brought yet: an open write of it waits for its outcome, or steps of its are still to be taken.
        """
        found, is_early = list(placed), False
        known = {(entity.name, id_to_text(image.id)) for entity, image in found}
        at = 0
        while at < len(found):
            debt = found[at][1].debt
            at += 1
            for member in debt.group if debt is not None else ():
                if member in known or len(found) >= LARGEST_GROUP:
                    continue
                known.add(member)
                name, text = member
                other = self.pair.entities[name]
                with contextlib.suppress(Unmappable):
                    there = await self.pair.mongo.read_owed(
                        other, text_to_id(text), timeout=self.pair.options.primary_deadline
                    )
                    if there is None:
                        buried = await self.pair.mongo.tombstone(
                            other, text_to_id(text), timeout=self.pair.options.primary_deadline
                        )
                        if buried is not None and buried.owed:
                            found.append((other, buried.as_image()))
                        continue
                    key = (name, id_to_text(there.id))
                    if key != member and key in known:
                        continue  # a number, named in another type than it is kept in
                    known.add(key)
                    if there.debt is not None and there.debt.parked is None:
                        # Only for what ends: one that is refused waits for a person.
                        is_early |= there.is_open or there.steps is not None
                    if there.deleted and there.steps:
                        pass  # they would go with the document
                    elif there.debt and there.debt.tentative is None:
                        found.append((other, there))
        return found, is_early

    async def roll_forward(self, entity: Entity, image: Image, control: Control, *, ends: float) -> None:
        """Do in MongoDB what a decided operation owes to other records, and erase that it is owed.

        Raises:
            crossfade.errors.StoreUnavailable, Busy: the steps that are left stand.
        """
        steps = image.steps
        assert steps is not None
        if steps.state == "confirmed":
            await self.stepper.close(steps)
        elif steps.state == "decided":
            await self.stepper.take(entity, image, control, ends=ends)
        else:
            return  # open: with its outcome
        await self.stepper.erase(entity, image.id, steps)

    async def finish_decided(self, control: Control) -> int:
        """Carry out in MongoDB what writers that died in phase 0 had decided; how many operations and deletes.

        Nobody is in debt there and no reconciler comes by, so the collections are read for them. In the other phases
        there is nothing to do: a debt stands beside each.

        Raises:
            crossfade.errors.StoreUnavailable, Busy: what is left stands.
        """
        pair, finished = self.pair, 0
        if control.phase.rules.dual or control.phase.rules.primary != "mongo":
            return finished
        for entity in pair.entities.values():
            async for id_ in pair.mongo.unfinished(entity, timeout=pair.options.bulk_deadline):
                finished += await self.finish_one(entity, id_, control)
        return finished

    async def finish_one(self, entity: Entity, id_: Any, control: Control) -> bool:
        """Do in MongoDB alone what was decided in one record, and undo what is open; whether there was something."""
        timeout = self.pair.options.primary_deadline
        try:
            image = await self.pair.mongo.read_owed(entity, id_, timeout=timeout)
        except Unmappable:
            return False  # a foreign writer has broken it since: it goes to quarantine
        if image is None or await self.is_echo(entity, image):
            return False
        if image.is_open:
            await self._settle_open(entity, image, control, undo=True)
            return True
        if image.steps is not None:
            try:
                await self.roll_forward(entity, image, control, ends=boot_clock() + timeout)
            except (RuleBroken, errors.Quarantined):
                return False  # in phase 1 it is parked and shown: `settle_one`
        await self.stepper.erase_marks(entity, image)
        if image.deleted and image.op is not None:
            await self.bury(entity, image)
        return True

    async def bring(
        self,
        entity: Entity,
        image: Image,
        control: Control,
        *,
        timeout: float,
        behind: list[asyncio.Task[None]] | None = None,
        ahead: Ahead | None = None,
    ) -> Settled:
        """Bring one image to PostgreSQL; on *behind*, lift and bring that.

        ``timeout`` bounds each call to PostgreSQL, in seconds; ``behind``: see `PostgresStore.apply`; ``ahead``: the
        image, where it is on its way already.

        Raises:
            crossfade.errors.StoreUnavailable, Fenced: the debt stays.
        """
        pair = self.pair
        for _ in range(ATTEMPTS):
            try:
                brought = None
                if ahead is not None and behind is not None and ahead.brings(image):
                    brought = await ahead.commit(behind)
                elif ahead is not None:
                    ahead.drop()  # it would keep this one waiting
                if brought is None:
                    rows = entity.to_rows(image.document, image.keys)
                    [brought] = await pair.postgres.apply(
                        [(entity, image, rows)],
                        migration=pair.name, epoch=control.epoch, timeout=timeout, behind=behind,
                    )  # fmt: skip
                verdict, held = brought
            except (Unmappable, errors.Quarantined) as cause:
                if image.debt is None:
                    image = await self._owed_if_held(entity, image, control)
                return await self._quarantine(entity, image, cause, timeout=timeout)
            except RuleBroken as cause:
                if await self._bring_together(entity, image, control, timeout=timeout):
                    continue
                if image.debt is None:
                    # Nothing is owed by a document that a sweep found: only what is owed can be shown.
                    image = await self.lift(entity, image.id, above=image.rev, control=control) or image
                return await self._park(entity, image, str(cause))
            if verdict is not Applied.BEHIND:
                return Settled.CONFIRMED
            current = await pair.mongo.read(entity, image.id, timeout=pair.options.primary_deadline)
            if current is None or current.deleted:
                return Settled.SUPERSEDED
            if current.rev > held.highest:
                if current.rev > image.rev and held.highest >= image.rev:
                    return Settled.SUPERSEDED
                # What PostgreSQL holds is older than what is about to be told: it is not left to whoever was quicker.
                image = current
                continue
            if held.rev == current.rev and held.digest == current.digest and not _covered(held):
                self.eraser.soon(entity, current, behind or ())
                return Settled.CONFIRMED
            await self._note_row(entity, current, held)
            lifted = await self.lift(entity, image.id, above=held.highest, control=control)
            if lifted is None:
                return Settled.SUPERSEDED
            image = lifted
        return Settled.SUPERSEDED

    @contextlib.asynccontextmanager
    async def _mongo_decides(self, entity: Entity, id_: Any, control: Control) -> AsyncIterator[None]:
        """MongoDB is the primary, as it was under ``control``, and no switch is decided before this block ends.

        What is made in here stands above PostgreSQL's row, so it must not begin once PostgreSQL decides: it is held to
        what a caller's write is, by the gate and the lease.

        Raises:
            crossfade.stores.errors.Fenced: it may be so no longer.
        """
        board, epoch = self.pair.board, control.epoch
        if not board.leased(epoch):
            # A look may only be late; and a command is no worker before it needs to be.
            await board.obtain_lease()
        # A write under way keeps its epoch from passing, and whatever it does itself.
        stands = board.control.epoch == epoch or board.gate.holds(epoch)
        if control.phase.rules.primary != "mongo" or not (stands and board.leased(epoch)):
            raise _no_longer(entity)
        with board.gate.entered(epoch, [(entity.name, id_to_text(id_))]):
            yield

    async def lift(
        self, entity: Entity, id_: Any, *, above: int, control: Control, yields: bool = False
    ) -> Image | None:
        """Give a record the next revision above ``above``, with debt, so that its present content wins.

        None: the record is gone, its delete is decided, or another write holds it; each brings its own.
        Normalised keys are stamped anew where a foreign writer changed the name. ``yields``: None, too, where another
        record has the plain key; else that is looked at.
        """
        pair = self.pair
        timeout = pair.options.primary_deadline
        suffixed: set[str] = set()
        async with self._mongo_decides(entity, id_, control):
            for _ in range(ATTEMPTS):
                image = await pair.mongo.read(entity, id_, timeout=timeout)
                if image is None or image.deleted or image.is_open or await self.is_echo(entity, image):
                    return None
                buried = await pair.mongo.buried_among(entity, [id_], timeout=timeout)
                stale = keys_to_stamp(entity, image)
                keys = {
                    rule: unique_key(key, id_) if rule in suffixed else key for rule, key in stale.items()
                }
                named = entity.keys(image.document)
                changed = tuple(n for n in entity.parts if image.parts.get(n) != image.noted.get(n))
                try:
                    lifted = await pair.mongo.compare_and_set(
                        entity,
                        id_,
                        rev=image.rev,
                        set_={
                            f"{CF}.rev": Int64(max(image.rev, above, *buried.values()) + 1),
                            f"{CF}.op": new_operation(),
                            f"{CF}.debt": Debt(
                                control.epoch, group=_owed_with(image), parts=changed
                            ).to_document(),
                            **{f"{CF}.keys.{rule}": key for rule, key in keys.items()},
                        },
                        unset=[
                            *(
                                f"{CF}.keys.{u.rule}"
                                for u in entity.unique
                                if u.rule in image.keys.keys() - named
                            ),
                            *(f"{CF}.parts.{name}" for name in changed),
                        ],
                        also={f"{CF}.debt.tentative": {"$exists": False}, f"{CF}.deleted": {"$ne": True}},
                        timeout=timeout,
                    )
                except RuleBroken:
                    if yields:
                        return None
                    if not await self.name_is_freed(entity, image.document, id_, control):
                        # An older record has the plain key: this one keeps its name, and gets a key of its own.
                        suffixed |= set(stale)
                    continue
                if lifted is not None and not keys_to_stamp(entity, lifted):
                    return lifted
            return None

    async def name_is_freed(
        self, entity: Entity, fields: Mapping[str, Any], id_: Any, control: Control | None
    ) -> bool:
        """Whether a name of these fields was held by nobody that has it, and no longer is.

        By an insert repeated, which nobody sees: that is removed. Or by a record that a foreign writer has renamed: it
        gets the key of its present name, or none where another record has that, until it is lifted. ``control``: None
        before there is one.
        """
        mongo, timeout = self.pair.mongo, self.pair.options.primary_deadline
        wanted = entity.keys(fields)
        if not wanted:
            return False
        held = [{f"{CF}.keys.{rule}": key} for rule, key in wanted.items()]
        with contextlib.suppress(Unmappable):  # what cannot be read keeps its name
            for rival in await mongo.look_up(entity, held, timeout=timeout):
                if rival.id == id_:
                    continue
                if rival.is_newborn and await self.is_echo(entity, rival):
                    return True
                if rival.is_open:
                    continue  # it may get the name back
                named = entity.keys(rival.document)
                for rule in entity.unique:
                    key = wanted.get(rule.rule)
                    own = named.get(rule.rule)
                    if key is None or rival.keys.get(rule.rule) != key:
                        continue
                    if own is not None and acceptable_key(key, own, rival.id):
                        continue  # its own, if only made unique by its id
                    if (
                        control is not None
                        and control.phase.rules.dual
                        and control.phase.rules.primary == "mongo"
                    ):
                        # PostgreSQL may hold the other key beside this very content: only a revision brings it the
                        # record's own. Else it gets none, which a sweep sees.
                        own = None
                        with contextlib.suppress(errors.CrossfadeError):
                            if await self.lift(entity, rival.id, above=0, control=control, yields=True):
                                return True
                    if await mongo.restamp(entity, rival, rule, own, timeout=timeout):
                        return True
        return False

    async def is_echo(self, entity: Entity, image: Image) -> bool:
        """Whether this document is an insert repeated, of a record that has been deleted since; then it is removed.

        An insert that is not answered is sent again. The first request may have made the record, and somebody deleted
        it, before the repetition arrives: nothing in MongoDB stands in its way then but what the tombstone remembers.
        What PostgreSQL has deleted, or delivered, while it decided does not say that: so whatever was sent under an
        older phase, or delivered, and stands at or under a tombstone is one. Nobody waits for it any more.
        """
        debt = image.debt
        delivered = debt is not None and debt.delivery
        if image.op is None or not (delivered or image.op == image.born):
            return False
        timeout = self.pair.options.primary_deadline
        buried = await self.pair.mongo.tombstone(entity, image.id, timeout=timeout)
        if buried is None:
            return False
        past = delivered or (debt is not None and debt.epoch < self.pair.board.control.phase_epoch)
        if image.op not in buried.born and not (past and image.rev <= buried.rev):
            return False
        await self.pair.mongo.remove_echo(entity, image.id, rev=image.rev, op=image.op, timeout=timeout)
        return True

    async def finish_delete(self, entity: Entity, image: Image, control: Control) -> Settled:
        """Roll a decided delete forward: tombstone, removal, PostgreSQL, second look; any number of times.

        Raises:
            crossfade.errors.StoreUnavailable, Fenced: the debt stays.
        """
        if image.op is None:
            return Settled.GONE  # not marked by Crossfade
        await self.bury(entity, image)
        if not control.phase.rules.dual:
            return Settled.CONFIRMED
        return await self.bring_tombstone(
            entity, image.id, control, timeout=self.pair.options.secondary_deadline
        )

    async def _finish_delete_together(self, entity: Entity, image: Image, control: Control) -> Settled:
        """`finish_delete`, with the other records of its operation where they are owed still."""
        if image.op is None or not control.phase.rules.dual or not _owed_with(image):
            return await self.finish_delete(entity, image, control)
        await self.bury(entity, image)
        timeout = self.pair.options.secondary_deadline
        return await self.settle_tombstone(entity, image.id, control, timeout=timeout)

    async def bury(self, entity: Entity, image: Image) -> None:
        """What a decided delete has to do in MongoDB: the tombstone, with its debt, and then the removal.

        Raises:
            crossfade.errors.StoreUnavailable: the document's own debt stays.
        """
        mongo, timeout = self.pair.mongo, self.pair.options.primary_deadline
        assert image.op is not None
        await mongo.bury(
            entity,
            image.id,
            rev=image.rev,
            op=image.op,
            # In phase 0 too: once PostgreSQL decides, it must not make the id anew at or under this revision.
            owed=True,
            born=image.born,
            done=image.done,
            group=_owed_with(image),
            timeout=timeout,
        )
        await mongo.remove(entity, image.id, rev=image.rev, op=image.op, timeout=timeout)

    async def settle_tombstone(
        self, entity: Entity, id_: Any, control: Control, *, timeout: float
    ) -> Settled:
        """Bring a tombstone, with the other records of the operation that deleted it where they are owed still."""
        buried = await self.pair.mongo.tombstone(entity, id_, timeout=self.pair.options.primary_deadline)
        if buried is None or not buried.group:
            return await self.bring_tombstone(entity, id_, control, timeout=timeout)
        return await self._bring_owed(entity, buried.as_image(), control, timeout=timeout)

    async def bring_tombstone(self, entity: Entity, id_: Any, control: Control, *, timeout: float) -> Settled:
        """Bring a tombstone to PostgreSQL, and erase its debt after a second look."""
        pair = self.pair
        primary = pair.options.primary_deadline
        for _ in range(ATTEMPTS):
            tombstone = await pair.mongo.tombstone(entity, id_, timeout=primary)
            if tombstone is None:
                return Settled.GONE
            verdict, held = await pair.postgres.apply_delete(
                entity, id_, rev=tombstone.rev, op=tombstone.op,
                migration=pair.name, epoch=control.epoch, timeout=timeout,
            )  # fmt: skip
            found = await pair.mongo.read(entity, id_, timeout=primary)
            if found is not None and not found.deleted:
                # Made again since: what is in the document must win over the tombstone.
                if found.rev <= max(tombstone.rev, held.tombstone or 0):
                    lifted = await self.lift(
                        entity, id_, above=max(tombstone.rev, held.highest), control=control
                    )
                    if lifted is None:
                        continue
                    found = lifted
                settled = await self.bring(entity, found, control, timeout=timeout)
                if settled is Settled.CONFIRMED:
                    self.eraser.soon(entity, found)
            elif found is not None:
                return Settled.SUPERSEDED  # deleted once more: that delete brings its own tombstone
            elif verdict is Applied.BEHIND:
                again = await pair.mongo.tombstone(entity, id_, timeout=primary)
                if again is not None and again.rev > tombstone.rev:
                    continue  # made and deleted once more meanwhile: the row may stem from that
                # A row above the tombstone, and no document that it could stem from: the delete must win.
                row = await pair.postgres.read(entity, id_, timeout=timeout)
                if row is not None:
                    await pair.postgres.note_conflict(
                        entity, row, cause="a row newer than the delete", store="postgres", timeout=timeout
                    )
                async with self._mongo_decides(entity, id_, control):
                    await pair.mongo.bury(
                        entity, id_, rev=held.highest + 1, op=new_operation(), owed=True, timeout=primary
                    )
                continue
            await pair.mongo.settle_tombstones(entity, [(id_, tombstone.rev, tombstone.op)], timeout=primary)
            with contextlib.suppress(errors.CrossfadeError):
                await pair.postgres.release(entity, [id_], timeout=timeout)
            return Settled.CONFIRMED
        return Settled.SUPERSEDED

    async def settle_one(
        self, entity: Entity, id_: Any, control: Control, *, undo_tentative: bool = False, owed: bool = False
    ) -> Settled:
        """Settle whatever one record owes (MongoDB primary), or adopt what a foreign writer left.

        ``undo_tentative``: an open ``ROLLBACK_BOTH`` write is past its deadline. ``owed``: it is for its debt that it
        is looked at; no part is read for one that is gone.

        Raises:
            crossfade.errors.StoreUnavailable, Fenced: the debt stays.
        """
        try:
            return await self._settle_one(entity, id_, control, undo_tentative=undo_tentative, owed=owed)
        except Unmappable:
            # Wherever that came to light: what a foreign writer did to a part, only the whole document tells.
            try:
                await self.pair.mongo.read(entity, id_, timeout=self.pair.options.primary_deadline)
            except Unmappable as cause:
                return await self._quarantine_unreadable(entity, id_, control, cause)
            raise  # it is another record's

    async def _settle_one(
        self, entity: Entity, id_: Any, control: Control, *, undo_tentative: bool, owed: bool
    ) -> Settled:
        pair = self.pair
        timeout = pair.options.primary_deadline
        if "postgres" in (control.phase.rules.primary, pair.board.control.phase.rules.primary):
            raise _no_longer(entity)
        image = await pair.mongo.read_owed(entity, id_, timeout=timeout)
        doubted = image is not None and (not owed if image.debt is None else image.debt.parked)
        if image is not None and image.left_out and doubted:
            # What a foreign writer did to a part, only the whole document tells.
            image = await pair.mongo.read(entity, id_, timeout=timeout)
        if image is None:
            return await self.settle_tombstone(entity, id_, control, timeout=timeout)
        if await self.is_echo(entity, image):
            return await self.bring_tombstone(entity, id_, control, timeout=timeout)
        if image.is_open:
            return await self._settle_open(entity, image, control, undo=undo_tentative)
        if image.steps is not None:
            try:
                await self.roll_forward(entity, image, control, ends=boot_clock() + timeout)
            except (RuleBroken, errors.Quarantined) as cause:
                # By a rule that only MongoDB has, or because there is no room: somebody has to see it.
                if image.debt is None:
                    image = await self.lift(entity, id_, above=image.rev, control=control) or image
                return await self._park(entity, image, f"a record does not take its part: {cause}")
        if image.deleted:
            return await self._finish_delete_together(entity, image, control)
        if image.debt is not None and image.debt.delivery:
            # Left from the time before the switch back.
            ended = await self.deliverer.end_delivery(entity, id_)
            if ended is not Settled.SUPERSEDED:
                return ended
        if not await pair.mongo.standing(entity, [image], timeout=timeout):
            # An insert that a delete overtook: settled as it is, it would stand at a revision that was told before.
            return await self.bring_tombstone(entity, id_, control, timeout=timeout)
        if image.debt is None:
            if image.left_out:
                return Settled.CONFIRMED  # by somebody else, in the meantime
            try:
                adopted = await self._adopt(entity, image, control)
            except errors.Quarantined as cause:
                return await self._quarantine(entity, image, cause, timeout=timeout)  # no room for a revision
            if adopted is None:
                return Settled.CONFIRMED
            image = adopted
        elif is_misnamed(entity, image):
            with contextlib.suppress(errors.Quarantined):  # no room for a key
                image = await self.lift(entity, id_, above=image.rev, control=control) or image
        return await self._bring_owed(entity, image, control, timeout=timeout)

    async def _bring_owed(self, entity: Entity, image: Image, control: Control, *, timeout: float) -> Settled:
        """Bring an image with those of its operation that are still owed, and erase the debts of all.

        ``timeout``: for each call of PostgreSQL, in seconds.
        """
        pair = self.pair
        placed, is_early = await self.with_groups([(entity, image)])
        if is_early:
            return Settled.OPEN  # half of an operation is nothing for PostgreSQL
        brought = await self.bring_together(placed, control, timeout=timeout)
        for at, ((each, one), settled) in enumerate(zip(placed, brought, strict=True)):
            if settled is Settled.CONFIRMED and (key := confirmed(each, one)) is not None:
                if one is not image and is_misnamed(each, one):
                    continue  # whoever settles that one stamps it
                if not await self.stepper.erase_marks(each, one):
                    brought[at] = Settled.PARKED  # with the record that decided, whose steps are refused
                    continue
                await pair.mongo.settle(each, [key], timeout=pair.options.primary_deadline)
                with contextlib.suppress(errors.CrossfadeError):
                    await pair.postgres.release(each, [one.id], timeout=timeout)
        return brought[0]

    async def bring_anew(self, entity: Entity, id_: Any, control: Control) -> Settled:
        """Give a document the next revision and bring it to PostgreSQL whole, whatever its row says that it holds.

        `settle_one` goes by revision and digest; a row whose content was changed beneath them it takes for confirmed.

        Raises:
            crossfade.errors.StoreUnavailable, Fenced: what was begun stays in debt.
        """
        timeout = self.pair.options.primary_deadline
        held = await self.pair.postgres.held(entity, id_, timeout=timeout)
        image = await self.lift(entity, id_, above=held.highest, control=control)
        if image is None:
            return Settled.SUPERSEDED
        return await self._bring_owed(entity, image, control, timeout=timeout)

    async def adopt_delete(self, entity: Entity, id_: Any, rev: int, control: Control) -> bool:
        """Make a delete behind our back one of ours: the row at ``rev`` goes; False: it is there again, or changed.

        Raises:
            crossfade.errors.StoreUnavailable, Fenced: what was begun stays in debt.
        """
        pair, timeout = self.pair, self.pair.options.bulk_deadline
        async with self._mongo_decides(entity, id_, control):
            # Just this one: where it is a number, the document may have come back with it in another type.
            if id_to_text(id_) in await pair.mongo.present(entity, [id_], timeout=timeout):
                return False
            if (await pair.postgres.held(entity, id_, timeout=timeout)).rev != rev:
                return False
            await pair.mongo.bury(entity, id_, rev=rev + 1, op=new_operation(), owed=True, timeout=timeout)
            await self.bring_tombstone(entity, id_, control, timeout=timeout)
            return True

    async def settle_many(
        self, entity: Entity, ids: Sequence[Any], control: Control
    ) -> tuple[set[str], set[str]]:
        """Settle what these records owe, in one transaction of PostgreSQL; the id texts of those that were settled so,
        and of those that others have settled meanwhile.

        What owes nothing but its own image, and that PostgreSQL takes. The others are `settle_one`'s, and it decides
        what becomes of them: this only spares the many that an outage leaves a transaction each.

        Raises:
            crossfade.errors.StoreUnavailable, Fenced: the debts stay.
        """
        pair = self.pair
        timeout = pair.options.primary_deadline
        images, all_of_them = await pair.mongo.owing(entity, ids, size=MOST_TOGETHER, timeout=timeout)
        there = {id_to_text(image.id) for image in images}
        elsewhere = {id_to_text(id_) for id_ in ids} - there if all_of_them else set[str]()
        if not images:
            return set(), elsewhere
        # A document over a tombstone may be the echo of an insert.
        buried = await pair.mongo.buried_among(entity, ids, timeout=timeout)
        ready: list[tuple[Entity, Image, Rows]] = []
        for number, image in enumerate(sorted(images, key=lambda image: id_to_text(image.id))):
            if number % 16 == 0:
                await asyncio.sleep(0)  # others in this process are waiting
            owes_more = image.deleted or image.is_open or image.steps is not None or image.done
            if (
                image.debt is None
                or image.debt.group
                or image.debt.parked
                or owes_more
                or image.debt.delivery
                or id_to_text(image.id) in buried
                or is_misnamed(entity, image)
            ):
                continue
            with contextlib.suppress(Unmappable):
                ready.append((entity, image, entity.to_rows(image.document, image.keys)))
        small = [one for one in ready if one[1].left_out]
        whole = [one for one in ready if not one[1].left_out]
        applied = [
            *await self._apply_many(whole, control, timeout=timeout),
            *await self._apply_many(small, control, timeout=timeout),
        ]
        settled = [key for image in applied if (key := confirmed(entity, image)) is not None]
        await pair.mongo.settle(entity, settled, timeout=timeout)
        with contextlib.suppress(errors.CrossfadeError):
            await pair.postgres.release(entity, [key.id for key in settled], timeout=timeout)
        return {id_to_text(key.id) for key in settled}, elsewhere

    async def settle_deletes(
        self, entity: Entity, ids: Sequence[Any], control: Control
    ) -> tuple[set[str], set[str]]:
        """`settle_many` of tombstones: those of the deletes of an outage, and of phase 0.

        Raises:
            crossfade.errors.StoreUnavailable, Fenced: the debts stay.
        """
        pair = self.pair
        timeout = pair.options.primary_deadline
        owed = {
            id_to_text(one.id): one
            for one in await pair.mongo.tombstones(entity, ids, timeout=timeout)
            if one.owed
        }
        elsewhere = {id_to_text(id_) for id_ in ids} - owed.keys()
        # What one operation deleted goes together.
        alone = [one for one in owed.values() if not one.group]
        if not alone:
            return set(), elsewhere
        covered = await self._delete_many(entity, alone, control, timeout=timeout)
        # The second look: what has been made again since must win over its tombstone.
        present = await pair.mongo.present(entity, [one.id for one in covered], timeout=timeout)
        settled = [one for one in covered if present.isdisjoint(id_texts(one.id))]
        if settled:
            await pair.mongo.settle_tombstones(
                entity, [(one.id, one.rev, one.op) for one in settled], timeout=timeout
            )
            with contextlib.suppress(errors.CrossfadeError):
                await pair.postgres.release(entity, [one.id for one in settled], timeout=timeout)
        return {id_to_text(one.id) for one in settled}, elsewhere

    async def _delete_many(
        self, entity: Entity, tombstones: Sequence[Tombstone], control: Control, *, timeout: float
    ) -> list[Tombstone]:
        """Bring tombstones together; those that PostgreSQL has no row above."""

        async def bring(some: Sequence[Tombstone]) -> list[Tombstone]:
            answers = await self.pair.postgres.apply_deletes(
                entity, [(one.id, one.rev, one.op) for one in some],
                migration=self.pair.name, epoch=control.epoch, timeout=timeout,
            )  # fmt: skip
            answered = zip(some, answers, strict=True)
            return [one for one, (verdict, _) in answered if verdict is not Applied.BEHIND]

        return await _halved(tombstones, bring)

    async def _apply_many(
        self, images: Sequence[tuple[Entity, Image, Rows]], control: Control, *, timeout: float
    ) -> list[Image]:
        """Apply images together; those that PostgreSQL holds now."""

        async def bring(some: Sequence[tuple[Entity, Image, Rows]]) -> list[Image]:
            answers = await self.pair.postgres.apply(
                some, migration=self.pair.name, epoch=control.epoch, timeout=timeout
            )
            answered = zip(some, answers, strict=True)
            return [image for (_, image, _), (verdict, _) in answered if verdict is not Applied.BEHIND]

        return await _halved(images, bring)

    async def _settle_open(self, entity: Entity, image: Image, control: Control, *, undo: bool) -> Settled:
        """Settle an open write; ``undo``: it is past its deadline. Of a step, another record decides."""
        assert image.debt is not None
        assert image.debt.tentative is not None
        note = image.debt.tentative.get("anchor")
        if note is None:
            return await self.undo(entity, image, control) if undo else Settled.OPEN
        decider, id_, steps = await self.stepper.outcome(note)
        if steps is None:
            # A step that arrived after its operation was undone, or that the undo has not reached yet. Its writer may
            # still be on its way to decide.
            return await self.undo(entity, image, control) if undo else Settled.OPEN
        if steps.state == "confirmed":
            await self.stepper.close(steps)
        elif undo:
            anchor = await self.pair.mongo.read_owed(decider, id_, timeout=self.pair.options.primary_deadline)
            if anchor is not None and anchor.op == note["op"] and anchor.is_open:
                await self.undo(decider, anchor, control)
        return Settled.OPEN

    async def _adopt(self, entity: Entity, image: Image, control: Control) -> Image | None:
        """Lift a document without debt whose content is not the row's; None: they are equal."""
        async with self._mongo_decides(entity, image.id, control):
            held = await self.pair.postgres.held(entity, image.id, timeout=self.pair.options.primary_deadline)
            same = held.rev == image.rev and held.digest == image.digest and not _covered(held)
            if not is_misnamed(entity, image):
                if same:
                    return None if held.mapping == entity.mapping_version else image
                if image.rev > held.highest:
                    return image  # nothing in PostgreSQL stands against it
            if held.rev is not None and 0 < image.rev < held.rev:
                notes = await self.pair.mongo.notes(
                    entity, image.id, (), timeout=self.pair.options.primary_deadline
                )
                now = (notes or {}).get(CF) or {}
                if (now.get("rev"), now.get("op")) != (image.rev, image.op):
                    return None  # written since it was read: that write brings its own
                # A document from a backup: what is gone with it is not lost.
                await self._note_row(entity, image, held)
            try:
                return await self.lift(entity, image.id, above=held.highest, control=control)
            except errors.Quarantined:
                if same:
                    return None  # nothing is wrong with it but that it has no room for a key
                raise

    # --- ROLLBACK_BOTH, MongoDB primary ----------------------------------------------------------------------

    async def undo(self, entity: Entity, image: Image, control: Control, *, bring: bool = True) -> Settled:
        """Take an open write back, as a new revision, *whatever PostgreSQL did* with it.

        Only the operation's own fields, and only where they still hold its values: a foreign write stays. Not
        ``bring``: PostgreSQL gets it with the others of its operation, from whoever undoes these.

        Raises:
            crossfade.errors.StoreUnavailable: it could not be done now; the open write still stands.
        """
        pair = self.pair
        timeout = pair.options.primary_deadline
        suffixed = False
        for _ in range(ATTEMPTS):
            assert image.debt is not None
            assert image.debt.tentative is not None
            note = image.debt.tentative
            op = new_operation()
            set_back: dict[str, Any] = {}
            taken_away: list[str] = []
            marks: dict[str, Any] = {f"{CF}.rev": Int64(image.rev + 1), f"{CF}.op": op}
            also: dict[str, Any] = {f"{CF}.op": image.op, f"{CF}.debt.tentative": {"$exists": True}}
            decider = image.steps is not None and image.steps.op == image.op
            unset: list[str] = [f"{CF}.steps"] if decider else []
            future = dict(image.document)
            if note["kind"] == "insert":
                marks[f"{CF}.deleted"] = True
                unset.append(f"{CF}.keys")
            elif note["kind"] == "delete":
                unset.append(f"{CF}.deleted")
            else:
                wrote, before = note["wrote"], note["before"]
                for name in (*wrote, *note["removed"]):
                    mine = (
                        name in image.document and _same(image.document[name], wrote[name])
                        if name in wrote
                        else name not in image.document
                    )
                    if not mine:
                        continue
                    also[name] = just(wrote[name]) if name in wrote else {"$exists": False}
                    if name in before:
                        future[name] = set_back[name] = before[name]
                    else:
                        future.pop(name, None)
                        taken_away.append(name)
                plain = entity.keys(future)
                for rule, key in plain.items():
                    kept = note["keys"].get(rule)
                    own = unique_key(key, image.id) if suffixed else key
                    marks[f"{CF}.keys.{rule}"] = kept if acceptable_key(kept, key, image.id) else own
                held = {**image.keys, **note["keys"]}
                unset += [f"{CF}.keys.{u.rule}" for u in entity.unique if u.rule in held.keys() - plain]
            carried = carried_by(entity.parts, image.noted, wrote=set_back, removed=taken_away)
            owed = tuple(dict.fromkeys((*image.debt.parts, *carried.owed)))
            # An operation that was finished before this write began is still owed together.
            debt = Debt(control.epoch, group=_owed_with(image), parts=owed)
            marks |= set_back | {f"{CF}.debt": debt.to_document()}
            unset += [*taken_away, *(f"{CF}.parts.{name}" for name in carried.erased)]
            # Of a record that goes nothing is looked at.
            gone = dict.fromkeys(entity.parts) if f"{CF}.deleted" in marks else carried.left_out
            try:
                undone = await pair.mongo.compare_and_set(
                    entity, image.id, rev=image.rev, set_=marks, unset=unset, also=also, left_out=gone,
                    timeout=timeout,
                )  # fmt: skip
            except RuleBroken as cause:
                if suffixed:
                    return await self._park(entity, image, f"the undo breaks a rule: {cause}")
                # A foreign writer has given it a name that another record has, or is stamped with: as in `lift`.
                suffixed = not await self.name_is_freed(entity, future, image.id, control)
                continue
            if undone is not None:
                others = not decider or await self._undo_steps(image, control)
                if undone.deleted:
                    settled = await self._finish_delete_together(entity, undone, control)
                elif not bring or not control.phase.rules.dual:
                    # Its debt stands, in phase 0 for the day on which PostgreSQL is owed it again.
                    settled = Settled.CONFIRMED
                else:
                    settled = await self._bring_owed(
                        entity, undone, control, timeout=pair.options.secondary_deadline
                    )
                return settled if others else Settled.SUPERSEDED
            current = await pair.mongo.read_owed(entity, image.id, timeout=timeout)
            if current is None:
                return Settled.GONE
            if current.debt is None or current.debt.tentative is None or current.op != image.op:
                return Settled.SUPERSEDED  # confirmed or undone by somebody else
            image = current
        return Settled.OPEN

    async def _undo_steps(self, anchor: Image, control: Control) -> bool:
        """Take back the steps of an operation that has been undone; False: a reconciler has to find some."""
        everywhere = True
        timeout = self.pair.options.primary_deadline
        for step in anchor.steps.left if anchor.steps is not None else ():
            target = self.pair.entities[step.entity]
            try:
                there = await self.pair.mongo.read_owed(target, step.id, timeout=timeout)
                if there is not None and there.op == anchor.op and there.debt and there.debt.tentative:
                    undone = await self.undo(target, there, control, bring=False)
                    everywhere &= undone is Settled.CONFIRMED
            except (errors.CrossfadeError, Unmappable):
                everywhere = False
        return everywhere

    # --- what cannot be applied ------------------------------------------------------------------------------

    async def _bring_together(
        self, entity: Entity, image: Image, control: Control, *, timeout: float
    ) -> bool:
        """Apply an image together with the records that must give up a value for it; False: one will not.

        Each store's history is fine, yet PostgreSQL may see A take a name before it has seen B leave it.
        True says nothing about the image itself: apply it again to learn that.
        """
        for _ in range(2):  # once more, in case a holder changed between the look and the transaction
            try:
                together = await self._who_must_move(entity, image, control, timeout=timeout)
                if together is None:
                    return False
                await self.pair.postgres.apply(
                    together, migration=self.pair.name, epoch=control.epoch, timeout=timeout
                )
            except RuleBroken:
                continue
            except (Unmappable, errors.Quarantined):
                return False
            return True
        return False

    async def _who_must_move(
        self, entity: Entity, image: Image, control: Control, *, timeout: float
    ) -> list[tuple[Entity, Image, Rows]] | None:
        """The image and those whose values it takes, theirs and so on; None: one of them will not give way."""
        pair = self.pair
        together: dict[str, tuple[Image, Rows]] = {
            id_to_text(image.id): (image, entity.to_rows(image.document, image.keys))
        }
        waiting = [image]
        while waiting:
            taker = waiting.pop()
            for rule in entity.unique:
                key = self._row_key(entity, rule, together[id_to_text(taker.id)][1])
                if key is None:
                    continue
                holder = await pair.postgres.holder(entity, rule.to, key, timeout=timeout)
                if holder is None or id_to_text(holder) in together:
                    continue
                if len(together) >= LONGEST_CHAIN:
                    return None
                rival = await pair.mongo.read(entity, holder, timeout=pair.options.primary_deadline)
                if rival is None or rival.deleted:
                    if await self._remove_rival(entity, holder, rival, control, timeout=timeout):
                        continue
                    return None
                rows = entity.to_rows(rival.document, rival.keys)
                if self._row_key(entity, rule, rows) == key:
                    return None
                if rival.debt is None:
                    # A foreign writer renamed it: without a revision of its own the row would not move.
                    rival = await self.lift(entity, holder, above=rival.rev, control=control)
                    if rival is None:
                        return None
                    rows = entity.to_rows(rival.document, rival.keys)
                together[id_to_text(holder)] = (rival, rows)
                waiting.append(rival)
        return [(entity, one, rows) for one, rows in together.values()]

    @staticmethod
    def _row_key(entity: Entity, rule: UniqueRule, rows: Rows) -> str | None:
        key: str | None = rows.parent[entity.parent_columns.index(rule.to)]
        return key

    async def _remove_rival(
        self, entity: Entity, id_: Any, rival: Image | None, control: Control, *, timeout: float
    ) -> bool:
        """Bring a rival's delete to PostgreSQL; False: it has no tombstone (deleted by a foreign writer)."""
        if rival is not None and rival.is_open:
            # Not decided yet: only the row goes, and an undo brings it back.
            assert rival.op is not None
            verdict, _ = await self.pair.postgres.apply_delete(
                entity, id_, rev=rival.rev, op=rival.op,
                migration=self.pair.name, epoch=control.epoch, timeout=timeout,
            )  # fmt: skip
            return verdict is not Applied.BEHIND
        if rival is not None:
            settled = await self.finish_delete(entity, rival, control)
        else:
            settled = await self.bring_tombstone(entity, id_, control, timeout=timeout)
        return settled is Settled.CONFIRMED

    async def _note_row(self, entity: Entity, current: Image, held: Held) -> None:
        """Journal the row's content if it claims a revision that the primary does not have."""
        if held.rev is None or held.rev < current.rev or held.digest == current.digest or held.rev == 0:
            return
        row = await self.pair.postgres.read(entity, current.id, timeout=self.pair.options.primary_deadline)
        if row is None:
            return
        parts = parts_of(row.document, entity.parts, row.parts, row.rev)
        # A field that was declared a part since changed the digest, not the content.
        if digest_with(row.document, parts) != current.digest:
            await self.pair.postgres.note_conflict(
                entity, row, cause="PostgreSQL held a revision that MongoDB never had", store="postgres",
                timeout=self.pair.options.primary_deadline,
            )  # fmt: skip

    async def _owed_if_held(self, entity: Entity, image: Image, control: Control) -> Image:
        """The image in debt, where there is another row: on no board, readers would go on getting that."""
        held = await self.pair.postgres.held(entity, image.id, timeout=self.pair.options.primary_deadline)
        if held.rev is not None and (held.rev, held.digest) != (image.rev, image.digest):
            with contextlib.suppress(errors.Quarantined):  # no room for a revision
                return await self.lift(entity, image.id, above=held.highest, control=control) or image
        return image

    async def _quarantine(
        self, entity: Entity, image: Image, cause: Unmappable | errors.Quarantined, *, timeout: float
    ) -> Settled:
        reason = getattr(cause, "reason", str(cause))
        with contextlib.suppress(errors.StoreUnavailable):
            if image.left_out:
                image = await self.pair.mongo.read(entity, image.id, timeout=timeout) or image
            await self.pair.postgres.quarantine(
                entity, image, reason=reason, field=getattr(cause, "field", None), timeout=timeout
            )
        return await self._park(entity, image, f"quarantined: {reason}")

    async def _quarantine_unreadable(
        self, entity: Entity, id_: Any, control: Control, cause: Unmappable
    ) -> Settled:
        pair, timeout = self.pair, self.pair.options.primary_deadline
        raw = await pair.mongo.read_raw(entity, id_, timeout=timeout)
        await self._quarantine_bytes(entity, id_, raw or b"", cause)
        notes = (await pair.mongo.notes(entity, id_, (), timeout=timeout) or {}).get(CF) or {}
        rev, why = int(notes.get("rev", 0)), f"quarantined: {cause.reason}"
        if "debt" not in notes:
            # On no board, readers would go on getting what PostgreSQL holds of it.
            await pair.mongo.owe(entity, id_, rev, Debt(control.epoch, parked=why), timeout=timeout)
        elif notes["debt"].get("parked") != why:
            await pair.mongo.park(entity, id_, rev, notes.get("op"), why, timeout=timeout)
        return Settled.PARKED

    async def _quarantine_bytes(self, entity: Entity, id_: Any, raw: bytes, cause: Unmappable) -> None:
        image = Image(id_, {"_id": id_}, 0, None, {}, digest_of_stored(raw))
        await self.pair.postgres.quarantine(
            entity, image, reason=cause.reason, field=cause.field,
            timeout=self.pair.options.primary_deadline, document=raw,
        )  # fmt: skip

    async def _park(self, entity: Entity, image: Image, cause: str) -> Settled:
        observe.log().warning(f"Parked: {cause}", context="Reconcile", entity=entity.name, id=str(image.id))
        if image.debt is not None:
            await self.pair.mongo.park(
                entity, image.id, image.rev, image.op, cause, timeout=self.pair.options.primary_deadline
            )
        return Settled.PARKED


async def _halved(
    items: Sequence[_Given], bring: Callable[[Sequence[_Given]], Awaitable[list[_Taken]]]
) -> list[_Taken]:
    """``bring`` them together; where PostgreSQL refuses that, halves of them, until each refused one is alone."""
    if not items:
        return []
    try:
        return await bring(items)
    except (RuleBroken, errors.Quarantined):
        if len(items) == 1:
            return []
    half = len(items) // 2
    return [*await _halved(items[:half], bring), *await _halved(items[half:], bring)]


def _no_longer(entity: Entity) -> Fenced:
    return Fenced(
        f"a record of {entity.name} is not brought to PostgreSQL: whether MongoDB still decides is not known; the "
        "next round sees"
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same BSON: 1 is not true, and a NaN equals itself."""
    return encode_document({"v": one}) == encode_document({"v": other})


def _owed_with(image: Image) -> tuple[tuple[str, str], ...]:
    """The other records of operations that PostgreSQL is to get in one transaction with this one."""
    return () if image.debt is None else image.debt.group


def _covered(held: Held) -> bool:
    """Whether a tombstone stands over the row."""
    return held.tombstone is not None and (held.rev is None or held.tombstone >= held.rev)
