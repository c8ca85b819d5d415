"""Settling what the secondary is owed: read, apply, on *behind* lift. Backfill, sweep and repair end here too.

Why a debt is never erased too early: the secondary confirms only an image whose revision *and* digest are the
row's. *Behind* is not a confirmation: the primary is read again. If it has moved on, its own newer debt brings
that; if it has not, the row's content does not stem from it, and the primary's record is lifted above the row.
A debt is erased where revision and operation id still match, so a newer write keeps its own.

Why a delete is final: it is decided in the document, a tombstone stands before the document is removed, and the
tombstone's debt is erased only after a second look that found no document.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, TypeVar

from bson.int64 import Int64

from crossfade import errors, observe
from crossfade.board import Pair, end
from crossfade.clock import boot_clock
from crossfade.control import Control
from crossfade.entity import Entity, Rows, UniqueRule
from crossfade.part import Part, carried_by, digest_with, parts_of
from crossfade.record import CF, Applied, Debt, DebtKey, Held, Image, new_operation
from crossfade.steps import LARGEST_GROUP, Placed, Stepper
from crossfade.stores.errors import Fenced, RuleBroken
from crossfade.stores.mongo import Put, Tombstone
from crossfade.stores.postgres import Ahead, Change, Delivery
from crossfade.values import (
    Unmappable,
    decode_document,
    digest_of_bytes,
    digest_of_stored,
    encode_document,
    id_texts,
    id_to_text,
    text_to_id,
)

_Given = TypeVar("_Given")
_Taken = TypeVar("_Taken")

#: Inserts of deliveries that are seen to at once.
MOST_DELIVERIES = 1_000
#: How often a record that keeps changing under us is tried again before it is left to the next round.
ATTEMPTS = 8
#: Records that may have to change places in one transaction: a chain of renames longer than this is parked.
LONGEST_CHAIN = 16
#: Bytes of BSON that are settled in one transaction.
MOST_TOGETHER = 8 * 2**20
#: Bytes of a value that is brought to MongoDB ahead of the large ones of its record.
SMALL = 4096


class Settled(StrEnum):
    """How an attempt to settle ended."""

    #: The secondary holds the primary's revision.
    CONFIRMED = "confirmed"
    #: The primary has moved on; the newer revision's own debt brings it.
    SUPERSEDED = "superseded"
    #: The secondary's rules, or the mapping, refuse it; noted with its cause.
    PARKED = "parked"
    #: A ``ROLLBACK_BOTH`` write that is still open.
    OPEN = "open"
    #: There is nothing in the primary.
    GONE = "gone"


def acceptable_key(key: str | None, plain: str, id_: Any) -> bool:
    """Whether a stamped key fits the name that ``plain`` is made from: itself, or made unique by the id."""
    return key in (plain, unique_key(plain, id_))


def unique_key(plain: str, id_: Any) -> str:
    """The key of a record whose plain key another, older record has."""
    return f"{plain}#{id_to_text(id_)}"


def confirmed(entity: Entity, image: Image) -> DebtKey | None:
    """What the debt of an image that the secondary has confirmed is erased by, and what is then noted of its parts."""
    key = image.debt_key
    if key is None or not entity.parts:
        return key
    noted: list[tuple[str, Part | None]] = []
    for name in entity.parts:
        part = image.parts.get(name)
        if part == image.noted.get(name):
            continue
        if part is not None and (
            name in image.left_out or not entity.keeps_apart(name, image.document[name])
        ):
            part = None
        noted.append((name, part))
    return key._replace(parts=tuple(noted))


def keys_to_stamp(entity: Entity, image: Image) -> dict[str, str]:
    """The keys that the document should carry and does not."""
    return {
        rule: plain
        for rule, plain in entity.keys(image.document).items()
        if not acceptable_key(image.keys.get(rule), plain, image.id)
    }


@dataclass(frozen=True, slots=True)
class _Confirmed:
    """A debt to be erased, once what goes on ``behind`` the commit that confirmed it has succeeded."""

    entity: Entity
    key: DebtKey
    behind: tuple[asyncio.Task[None], ...]

    def looked_again(self) -> bool:
        return all(task.done() and not task.cancelled() and task.exception() is None for task in self.behind)


@dataclass
class Settler:
    """Settles single records of one migration, in both directions."""

    pair: Pair
    stepper: Stepper
    _queue: asyncio.Queue[_Confirmed] = field(default_factory=lambda: asyncio.Queue(10_000))
    _task: asyncio.Task[None] | None = None

    # --- settling in batches, behind the caller's back -------------------------------------------------------

    def start(self) -> None:
        """Begin to erase confirmed debts in the background."""
        self._task = asyncio.create_task(self._erase(), name=f"settling {self.pair.name}")

    async def stop(self) -> None:
        """Erase what is confirmed already, for at most a second; the rest costs an idempotent re-apply."""
        if self._task is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._queue.join()
        await end(self._task)

    def erase_soon(self, entity: Entity, image: Image, behind: Sequence[asyncio.Task[None]] = ()) -> None:
        """Erase a confirmed debt with the next batch; a full queue leaves it to the reconciler.

        ``behind``: see `PostgresStore.apply`. If that fails, the debt stands.
        """
        if (key := confirmed(entity, image)) is not None:
            with contextlib.suppress(asyncio.QueueFull):
                self._queue.put_nowait(_Confirmed(entity, key, tuple(behind)))

    async def _erase(self) -> None:
        while True:
            batch = [await self._queue.get()]
            # Long enough that a burst shares a round trip, short enough that the board stays small.
            await asyncio.sleep(0.02)
            while not self._queue.empty() and len(batch) < 1000:
                batch.append(self._queue.get_nowait())
            try:
                behind = {task for one in batch for task in one.behind}
                if behind:
                    await asyncio.wait(behind, timeout=self.pair.options.secondary_deadline)
                await self._erase_batch([one for one in batch if one.looked_again()])
            except errors.CrossfadeError:
                pass  # the debts stand, and the reconciler settles them
            finally:
                for _ in batch:
                    self._queue.task_done()

    async def _erase_batch(self, batch: Sequence[_Confirmed]) -> None:
        by_entity: dict[str, list[DebtKey]] = {}
        for one in batch:
            by_entity.setdefault(one.entity.name, []).append(one.key)
        for name, settled in by_entity.items():
            await self.pair.mongo.settle(
                self.pair.entities[name], settled, timeout=self.pair.options.primary_deadline
            )

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

    async def with_groups(self, placed: Sequence[Placed]) -> list[Placed]:
        """These, and those that PostgreSQL should get with them: of one operation, and not yet settled.

        A record may be owed by several operations, so theirs as well; `LARGEST_GROUP` at most.
        """
        found = list(placed)
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
                            found.append((other, _deleted(buried)))
                    elif there.deleted and there.steps:
                        pass  # they would go with the document
                    elif there.debt and there.debt.tentative is None:
                        found.append((other, there))
        return found

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
                self.erase_soon(entity, current, behind or ())
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

    async def lift(self, entity: Entity, id_: Any, *, above: int, control: Control) -> Image | None:
        """Give a record the next revision above ``above``, with debt, so that its present content wins.

        None: the record is gone, its delete is decided, or another write holds it; each brings its own.
        Normalised keys are stamped anew where a foreign writer changed the name.
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
                            *(f"{CF}.keys.{rule}" for rule in image.keys if rule not in named),
                            *(f"{CF}.parts.{name}" for name in changed),
                        ],
                        also={f"{CF}.debt.tentative": {"$exists": False}, f"{CF}.deleted": {"$ne": True}},
                        timeout=timeout,
                    )
                except RuleBroken:
                    # An older record has the plain key: this one keeps its name, and gets a key of its own.
                    suffixed |= set(stale)
                    continue
                if lifted is not None and not keys_to_stamp(entity, lifted):
                    return lifted
            return None

    async def is_echo(self, entity: Entity, image: Image) -> bool:
        """Whether this document is an insert repeated, of a record that has been deleted since; then it is removed.

        An insert that is not answered is sent again. The first request may have made the record, and somebody deleted
        it, before the repetition arrives: nothing in MongoDB stands in its way then but what the tombstone remembers.
        """
        if image.op is None or image.op != image.born:
            return False
        timeout = self.pair.options.primary_deadline
        buried = await self.pair.mongo.tombstone(entity, image.id, timeout=timeout)
        if buried is None or image.op not in buried.born:
            return False
        await self.pair.mongo.remove_echo(entity, image.id, op=image.op, timeout=timeout)
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
        return await self._bring_owed(entity, _deleted(buried), control, timeout=timeout)

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
                    self.erase_soon(entity, found)
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
        pair = self.pair
        timeout = pair.options.primary_deadline
        if "postgres" in (control.phase.rules.primary, pair.board.control.phase.rules.primary):
            raise _no_longer(entity)
        try:
            image = await pair.mongo.read_owed(entity, id_, timeout=timeout)
            doubted = image is not None and (not owed if image.debt is None else image.debt.parked)
            if image is not None and image.left_out and doubted:
                # What a foreign writer did to a part, only the whole document tells.
                image = await pair.mongo.read(entity, id_, timeout=timeout)
        except Unmappable as cause:
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
            return await self.finish_delete(entity, image, control)
        if image.debt is not None and image.debt.delivery:
            return await self.end_delivery(entity, id_)  # left from the time before the switch back
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
        return await self._bring_owed(entity, image, control, timeout=timeout)

    async def _bring_owed(self, entity: Entity, image: Image, control: Control, *, timeout: float) -> Settled:
        """Bring an image with those of its operation that are still owed, and erase the debts of all.

        ``timeout``: for each call of PostgreSQL, in seconds.
        """
        pair = self.pair
        placed = await self.with_groups([(entity, image)])
        brought = await self.bring_together(placed, control, timeout=timeout)
        for (each, one), settled in zip(placed, brought, strict=True):
            if settled is Settled.CONFIRMED and (key := confirmed(each, one)) is not None:
                await self.stepper.erase_marks(each, one)
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

    async def deliver_anew(self, entity: Entity, id_: Any, control: Control, *, above: int = 0) -> Settled:
        """Give a row the next revision, above ``above``, and bring it to MongoDB, whatever stands there.

        Raises:
            crossfade.errors.StoreUnavailable: what was begun stays in the outbox.
        """
        await self._lift_row(entity, id_, above=above, control=control)
        owed = Delivery(entity.name, id_, 0, "", None, None, None)
        return await self.deliver(owed, control, timeout=self.pair.options.primary_deadline)

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
            if anchor is not None and anchor.op == note["op"]:
                await self.undo(decider, anchor, control)
        return Settled.OPEN

    async def _adopt(self, entity: Entity, image: Image, control: Control) -> Image | None:
        """Lift a document without debt whose content is not the row's; None: they are equal."""
        async with self._mongo_decides(entity, image.id, control):
            held = await self.pair.postgres.held(entity, image.id, timeout=self.pair.options.primary_deadline)
            if not keys_to_stamp(entity, image):
                if held.rev == image.rev and held.digest == image.digest and not _covered(held):
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
            return await self.lift(entity, image.id, above=held.highest, control=control)

    # --- ROLLBACK_BOTH, MongoDB primary ----------------------------------------------------------------------

    async def undo(self, entity: Entity, image: Image, control: Control) -> Settled:
        """Take an open write back, as a new revision, *whatever PostgreSQL did* with it.

        Only the operation's own fields, and only where they still hold its values: a foreign write stays.

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
            if note["kind"] == "insert":
                marks[f"{CF}.deleted"] = True
            elif note["kind"] == "delete":
                unset.append(f"{CF}.deleted")
            else:
                wrote, before = note["wrote"], note["before"]
                future = dict(image.document)
                for name in (*wrote, *note["removed"]):
                    mine = (
                        name in image.document and _same(image.document[name], wrote[name])
                        if name in wrote
                        else name not in image.document
                    )
                    if not mine:
                        continue
                    also[name] = {"$eq": wrote[name]} if name in wrote else {"$exists": False}
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
                unset += [f"{CF}.keys.{rule}" for rule in held if rule not in plain]
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
                # A foreign writer has given it a name that another record has: as in `lift`.
                suffixed = True
                continue
            if undone is not None:
                others = not decider or await self._undo_steps(image, control)
                if undone.deleted:
                    settled = await self.finish_delete(entity, undone, control)
                elif not control.phase.rules.dual:
                    # Its debt stands for the day on which PostgreSQL is owed it again.
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
                    everywhere &= await self.undo(target, there, control) is Settled.CONFIRMED
            except (errors.CrossfadeError, Unmappable):
                everywhere = False
        return everywhere

    # --- PostgreSQL primary: deliveries to MongoDB -----------------------------------------------------------

    async def deliver(self, owed: Delivery, control: Control, *, timeout: float) -> Settled:
        """Bring what PostgreSQL holds of a record to MongoDB.

        Only the document that was looked at is replaced, whole: any write in between makes it look again. A
        content that the last delivery did not leave is a foreign write, and is journaled first.

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
            if there.rev > now.rev:
                latest = await pair.postgres.outbox_row(entity, owed.id, timeout=primary)
                if latest is None or latest.op != now.op:
                    return None  # it is a later delivery's: look again
            expected = {now.base_digest, there.delivered, None if row is None else row.digest}
            if there.digest not in expected:
                await pair.postgres.note_conflict(
                    entity, there, cause="written in MongoDB while PostgreSQL was primary",
                    store="mongo", timeout=primary, document=broken,
                )  # fmt: skip
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
                return await self._park_delivery(entity, row, now, cause)
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
        return await self._park_delivery(entity, row, now, cause)

    async def _park_delivery(
        self, entity: Entity, row: Image, now: Delivery, cause: errors.CrossfadeError
    ) -> Settled:
        await self.pair.postgres.park(
            entity, row.id, now.rev, now.op, str(cause), timeout=self.pair.options.primary_deadline
        )
        observe.log().warning(f"Parked: {cause}", context="Reconcile", entity=entity.name, id=str(row.id))
        return Settled.PARKED

    async def _put_small(self, entity: Entity, now: Delivery, row: Image, *, timeout: float) -> bool | None:
        """Bring a row without its parts; None: the document does not hold just these, or is not as it was left."""
        mongo = self.pair.mongo
        raw = await mongo.read_raw(entity, row.id, timeout=timeout, without=entity.parts)
        if raw is None or _as_left(now, row, raw, entity, entity.parts) is None:
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
        if raw is None:
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
        if raw is not None:
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
            self.erase_soon(entity, row)
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
        # The digest tells what we leave there from what a foreign writer makes of it.
        notes["digest"] = Image.from_document({**small, CF: dict(notes)}, entity.parts).digest
        if notes["digest"] == there.digest:
            return False
        await self.pair.mongo.deliver(entity, raw, {**small, CF: notes}, timeout=timeout)
        return True

    async def end_deliveries(self) -> int:
        """See to inserts that were delivered and that nobody has confirmed; how many there were.

        A worker sends one and dies; the record is deleted, and its delete delivered, before the insert arrives. Nothing
        else would ever look at it again.

        Raises:
            crossfade.errors.StoreUnavailable: one of the stores does not answer.
        """
        found = await self.pair.mongo.debts(
            self.pair.entities.values(), limit=MOST_DELIVERIES, parked=False,
            timeout=self.pair.options.primary_deadline,
        )  # fmt: skip
        marked = [owed for owed in found if owed.delivery]
        for owed in marked:
            await self.end_delivery(self.pair.entities[owed.entity], owed.id)
        return len(marked)

    async def end_delivery(self, entity: Entity, id_: Any) -> Settled:
        """Remove a document that was delivered late, after the delete of its record; or its mark, where it stands.

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
        if owed is None:
            # Delivered between the two looks, or PostgreSQL knows nothing of its giving the value up.
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
    return there if stands else None


def _delivered_notes(row: Image) -> dict[str, Any]:
    """What a delivery writes under ``_cf``."""
    notes: dict[str, Any] = {"rev": Int64(row.rev), "op": row.op, "digest": row.digest}
    if row.keys:
        notes["keys"] = row.keys
    if row.parts:
        notes["parts"] = {name: part.to_document() for name, part in row.parts.items()}
    return notes


def _no_longer(entity: Entity) -> Fenced:
    return Fenced(
        f"a record of {entity.name} is not brought to PostgreSQL: whether MongoDB still decides is not known; the "
        "next round sees"
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same BSON: 1 is not true, and a NaN equals itself."""
    return encode_document({"v": one}) == encode_document({"v": other})


def _deleted(buried: Tombstone) -> Image:
    """What a tombstone is to whoever brings it together with others."""
    debt = Debt(0, group=buried.group)
    return Image(buried.id, {"_id": buried.id}, buried.rev, buried.op, {}, b"", debt, deleted=True)


def _owed_with(image: Image) -> tuple[tuple[str, str], ...]:
    """The other records of operations that PostgreSQL is to get in one transaction with this one."""
    return () if image.debt is None else image.debt.group


def _covered(held: Held) -> bool:
    """Whether a tombstone stands over the row."""
    return held.tombstone is not None and (held.rev is None or held.tombstone >= held.rev)
