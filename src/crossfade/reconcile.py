"""Drives every debt to settled: a background task of each worker, and `crossfade reconcile`.

Any number of reconcilers may run on the same debts: each step is idempotent, and they take them in random
order. A debt is taken once it has been *seen* for a while by this process's own clock: a write in flight settles
its own, and no two clocks are compared.

The sweeps adopt what foreign writers left: by ``updatedAt`` with an overlap, and, as the guarantee, a full pass
against the rows' digests, which also finds what was deleted behind our back.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from crossfade import errors, observe
from crossfade.board import Pair, debt_key, end
from crossfade.clock import boot_clock
from crossfade.control import STEADY, Control
from crossfade.debt import Settler
from crossfade.entity import Entity
from crossfade.erasing import is_misnamed
from crossfade.record import Image, Settled
from crossfade.stores.errors import Fenced
from crossfade.stores.mongo import Owed
from crossfade.stores.postgres import Claim, Delivery
from crossfade.strays import Strays
from crossfade.values import Unmappable, id_to_text
from crossfade.write import Writer

#: A foreign writer's clock may be this wrong before the sweep by ``updatedAt`` misses its write.
OVERLAP = timedelta(seconds=60)
_AT_ONCE = 8
#: Records that are settled in one transaction: none of them takes another write meanwhile.
_TOGETHER = 250
#: The same while callers are served by this process: what a portion takes of the processor at once, one of them waits.
_BESIDE_CALLERS = 50
#: Seconds after a caller's last request for which others are expected; and the rest after a portion, by what it took.
_CALLERS, _REST = 1.0, 0.5
#: Plain debts of an entity that are worth it.
_MANY = 50
_BATCH = 1000
#: Rounds of a drain: what one leaves open, because it changed meanwhile, the next one takes.
_DRAINS = 20
#: What one record raises that cannot be settled: of rows that give no document, it is a ValueError.
_ONE_RECORDS = (errors.CrossfadeError, Unmappable, ValueError)
#: Seconds between two questions whether others are done: looking what is left would take time from them.
_PAUSE = 0.25


@dataclass
class Round:
    """What one round of reconciling did.

    Attributes:
        settled, parked, open: debts by how they ended; ``open``: still tentative, or written meanwhile.
        failed: a store did not answer.
        adopted: foreign writes that a sweep lifted.
        elsewhere: debts that another reconciler has settled, or is about to.
        cause: why the last one failed.
    """

    settled: int = 0
    parked: int = 0
    open: int = 0
    failed: int = 0
    adopted: int = 0
    elsewhere: int = 0
    cause: str = ""


@dataclass
class Reconciler:
    """Reconciles one migration in one worker.

    Attributes:
        settled: debts that it has settled so far.
    """

    pair: Pair
    settler: Settler
    writer: Writer
    strays: Strays
    settled: int = 0
    _task: asyncio.Task[None] | None = None
    _parked: dict[tuple[str, str, int], float] = field(default_factory=dict)
    _swept: datetime | None = None
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def start(self) -> None:
        """Reconcile in the background until `stop`."""
        self._task = asyncio.create_task(self._run(), name=f"reconciler of {self.pair.name}")

    async def stop(self) -> None:
        """Stop at the next await; what is not settled stays in debt."""
        if self._task is not None:
            await end(self._task)

    async def _run(self) -> None:
        options = self.pair.options
        # Workers that start together must not sweep together.
        next_sweep = boot_clock() + options.sweep * random.random()
        next_full = boot_clock() + options.full_sweep * (0.5 + random.random())
        while True:
            await asyncio.sleep(options.poll * (0.8 + 0.4 * random.random()))
            try:
                await self._background_round()
                control = self.pair.board.control
                rules = control.phase.rules
                # What compares the stores would read the primary in vain.
                comparable = self.pair.board.look is not None and self.pair.board.look.secondary_answers
                adopts = rules.primary == "mongo" and rules.dual and not control.holds_writes
                if comparable and rules.dual and options.full_sweep and boot_clock() >= next_full:
                    # Before the work: what fails is not tried again with every poll.
                    next_full = boot_clock() + options.full_sweep
                    if adopts:
                        await self.full_sweep(makes_way=True)
                    await self.link()
                if options.sweep and boot_clock() >= next_sweep:
                    next_sweep = boot_clock() + options.sweep
                    if comparable and adopts:
                        await self.sweep()
                    elif comparable and control.dual:
                        await self.settler.deliverer.end_deliveries()
                        await self.strays.merge_all(control)
                    await self._end_feeding(control)
            except (errors.CrossfadeError, Unmappable) as cause:
                observe.log().debug(f"Reconciling waits: {cause}", context="Reconcile")
            except Exception as cause:
                # Whatever one record or one round did, debts must go on being settled.
                # As text: what shows the variables on the way, as some loggers do, shows users' documents.
                text = "".join(traceback.format_exception(cause))
                observe.log().error("A round of reconciling failed", context="Reconcile", exception=text)

    async def _end_feeding(self, control: Control) -> None:
        after = control.fed_until(datetime.now(UTC))
        if after is not None:
            timeout = self.pair.options.primary_deadline
            await self.pair.board.record.change(control, after, timeout=timeout)

    async def _background_round(self) -> None:
        board, options = self.pair.board, self.pair.options
        look = board.look
        if look is None or look.control.holds_writes or not board.lease_valid:
            return
        shown = {_parked_key(debt) for debt in look.debts}
        self._parked = {key: until for key, until in self._parked.items() if key in shown}
        due = [
            debt
            for debt in look.debts
            if board.seen_for(debt) >= (options.tentative if debt.tentative else options.reconcile_age)
        ]
        if not look.secondary_answers:
            # What the primary alone decides: an undo, before which the record takes no other write, and steps.
            due = [debt for debt in due if debt.tentative or (isinstance(debt, Owed) and debt.steps)]
        if due:
            done = await self._settle(due, look.control, retry_parked=False)
            if done.settled:
                observe.log().info(
                    f"Settled {done.settled} debts", context="Reconcile", migration=self.pair.name
                )
        if look.control.unreadable is not None and look.postgres:
            await board.lift_unreadable(self._settle_everything)

    async def _settle_everything(self) -> bool:
        """Whether PostgreSQL took every debt that it can take: what is left is on every worker's board."""
        return not (await self.reconcile(retry_parked=False, wait_for_open=False)).failed

    async def reconcile(self, *, retry_parked: bool = True, wait_for_open: bool = True) -> Round:
        """Settle every debt that there is now; those that other writers make meanwhile are their own.

        ``wait_for_open``: wait for open ``ROLLBACK_BOTH`` writes to pass their deadline, and undo them.

        Raises:
            crossfade.errors.StoreUnavailable: the primary cannot be reached.
        """
        total = Round()
        total.settled = await self.settler.finish_decided(self.pair.board.control)
        late = await self._end_late_arrivals(total)
        with contextlib.suppress(errors.StoreUnavailable):
            # Looking what is owed takes time from who is settling it.
            await self._until_others_are_done(at_once=True)
        began = boot_clock()
        mine: set[tuple[Any, ...]] | None = None
        while True:
            look = await self.pair.board.refresh()
            if mine is None:
                mine = {debt_key(debt) for debt in look.debts}
            done = await self._settle(
                [debt for debt in look.debts if debt_key(debt) in mine],
                look.control,
                retry_parked=retry_parked,
            )
            retry_parked = False
            total.settled += done.settled
            total.parked, total.open, total.failed = done.parked, done.open, done.failed + late
            total.cause = done.cause or total.cause
            if done.elsewhere:
                await self._until_others_are_done()
            if look.overflown and (done.settled or done.elsewhere):
                mine = None  # the board shows only so many at a time
                continue
            if done.failed or not (done.settled or done.open or done.elsewhere):
                return total
            if done.open and not done.settled:
                if not wait_for_open or boot_clock() - began > self.pair.options.tentative * 4 + 10:
                    return total
                await asyncio.sleep(self.pair.options.poll)

    async def drain(self) -> Round:
        """Settle every debt while nobody writes: an open write is nobody's any more, and is undone at once.

        What is parked stays so.

        Raises:
            crossfade.errors.StoreUnavailable: the primary cannot be reached.
        """
        total = Round()
        for _ in range(_DRAINS):
            look = await self.pair.board.refresh()
            owed = [debt for debt in look.debts if debt.parked is None or debt.tentative]
            if not owed:
                if len(look.debts) >= self.pair.options.board_limit:
                    total.failed = len(look.debts)
                    total.cause = (
                        f"{total.failed:,} debts are parked, as many as the board shows: whether more is owed cannot "
                        "be seen; settle some of them, see `crossfade debts`"
                    )
                return total
            done = await self._settle(owed, look.control, retry_parked=False, undo_open=True)
            total.settled += done.settled
            total.failed, total.parked, total.cause = done.failed, done.parked, done.cause
            if done.failed or done.parked:
                return total
            if done.elsewhere:
                await self._until_others_are_done()
        total.open = len(owed)
        return total

    async def _end_late_arrivals(self, done: Round) -> int:
        """See to inserts that were delivered late, and to strays; how often a store did not answer."""
        control = self.pair.board.control
        if control.dual and control.phase.rules.primary == "postgres":
            try:
                done.settled += await self.settler.deliverer.end_deliveries()
                done.settled += sum((await self.strays.merge_all(self.pair.board.control)).values())
            except (errors.StoreUnavailable, Fenced) as cause:
                done.cause = str(cause)
                return 1
        return 0

    async def _settle(
        self,
        debts: Sequence[Owed | Delivery],
        control: Control,
        *,
        retry_parked: bool,
        undo_open: bool = False,
    ) -> Round:
        """Settle these, in random order, some at once; stops asking a store that does not answer."""
        done = Round()
        waiting = await self._settle_together(debts, control, done)
        random.shuffle(waiting)

        async def work() -> None:
            while waiting and done.failed < _AT_ONCE:
                debt = waiting.pop()
                if not retry_parked and self._rests(debt):
                    done.parked += 1
                    continue
                try:
                    settled = await self._one(debt, control, undo_open=undo_open)
                except (errors.StoreUnavailable, Fenced) as cause:
                    done.failed += 1
                    done.cause = str(cause)
                    continue
                except errors.Busy:
                    # It waits for an open write of another record, which the next round may end.
                    done.open += 1
                    continue
                except _ONE_RECORDS as cause:
                    # One record that cannot be settled must not keep the others from it.
                    self._parked[_parked_key(debt)] = boot_clock() + self.pair.options.parked_retry
                    done.parked += 1
                    done.cause = str(cause)
                    observe.log().warning(
                        f"Cannot be settled: {cause}",
                        context="Reconcile",
                        entity=debt.entity,
                        id=str(debt.id),
                    )
                    continue
                if settled in (Settled.CONFIRMED, Settled.GONE):
                    done.settled += 1
                    self._count(debt.entity, 1)
                elif settled is Settled.PARKED:
                    done.parked += 1
                    if debt.parked is None and not debt.tentative:
                        # Beside another record, which is what is shown.
                        self._parked[_parked_key(debt)] = boot_clock() + self.pair.options.parked_retry
                else:
                    done.open += 1

        await asyncio.gather(*(work() for _ in range(_AT_ONCE)))
        done.failed += len(waiting)
        return done

    async def _settle_together(
        self, debts: Sequence[Owed | Delivery], control: Control, done: Round
    ) -> list[Owed | Delivery]:
        """Settle the plain debts of an outage by the hundred; what is left, for one by one."""
        portions, left = _portions(debts, self._parked)
        if not portions:
            return left
        try:
            async with self._claim() as claim:
                if not claim.mine:
                    done.elsewhere += sum(map(len, portions))
                    return left
                while portions:
                    before = done.settled
                    # Apart: a delete locks the rows of others that name what goes, and their images lock them in
                    # another order. It comes first: an image may take a name that it frees.
                    deletes = [one for one in portions if _is_tombstone(one[0])]
                    portions = [one for one in portions if not _is_tombstone(one[0])]
                    for some in (deletes, portions):
                        async with asyncio.TaskGroup() as two:
                            for _ in range(2):
                                two.create_task(self._work(some, left, claim, control, done))
                    look = self.pair.board.look
                    if look is None or not look.overflown or done.settled == before:
                        break
                    # The board shows only so many at a time; whoever has the claim goes on.
                    portions, _ = _portions((await self.pair.board.refresh()).debts, self._parked)
        except (errors.StoreUnavailable, Fenced):
            pass
        return left + [debt for portion in portions for debt in portion]

    def _count(self, entity: str, number: int) -> None:
        self.settled += number
        observe.SETTLED.labels(self.pair.name, entity).inc(number)

    async def owed(self) -> int:
        """How many debts there are now, parked ones among them; none in phase 0, whatever phase 1 is going to owe.

        Raises:
            crossfade.errors.StoreUnavailable: the primary cannot be reached.
        """
        pair, timeout = self.pair, self.pair.options.bulk_deadline
        rules = pair.board.control.phase.rules
        if rules.primary == "mongo":
            return await pair.mongo.count_debts(pair.entities.values(), timeout=timeout) if rules.dual else 0
        return (await pair.postgres.outbox_depth(pair.entities, timeout=timeout))[0]

    def _claim(self) -> contextlib.AbstractAsyncContextManager[Claim]:
        """One reconciler at a time settles what there is much of: two would get into each other's way."""
        return self.pair.postgres.claim(f"drain:{self.pair.name}", timeout=self.pair.options.primary_deadline)

    async def _until_others_are_done(self, *, at_once: bool = False) -> None:
        """``at_once``: ask before the first pause."""
        while True:
            if not at_once:
                await asyncio.sleep(_PAUSE * (1 + random.random()))
            at_once = False
            async with self._claim() as claim:
                if claim.mine:
                    return

    async def _work(
        self,
        portions: list[list[Owed | Delivery]],
        left: list[Any],
        claim: Claim,
        control: Control,
        done: Round,
    ) -> None:
        """Settle portion after portion; what is not settled so is ``left``."""
        while portions:
            portion = portions.pop()
            entity = self.pair.entities[portion[0].entity]
            settled: set[str] = set()
            try:
                settled, elsewhere = await self._settle_portion(entity, portion, claim, control)
                done.settled += len(settled)
                done.elsewhere += len(elsewhere)
                self._count(entity.name, len(settled))
                settled |= elsewhere
            except (errors.StoreUnavailable, Fenced):
                left += [debt for each in portions for debt in each]
                portions.clear()
            except _ONE_RECORDS:
                pass  # what stands in its way is found out one by one
            left += [debt for debt in portion if id_to_text(debt.id) not in settled]

    async def _settle_portion(
        self, entity: Entity, portion: Sequence[Owed | Delivery], claim: Claim, control: Control
    ) -> tuple[set[str], set[str]]:
        """Settle them together, as `_together` says.

        While callers are served here: little by little, in turn, and with rests between.
        """
        settled, elsewhere = set[str](), set[str]()
        at = 0
        while at < len(portion):
            beside = boot_clock() - self.pair.asked < _CALLERS
            some = portion[at : at + (_BESIDE_CALLERS if beside else len(portion))]
            at += len(some)
            async with self._turn if beside else contextlib.nullcontext():
                began = boot_clock()
                await claim.stay()
                done = await self._together(some[0])(entity, [debt.id for debt in some], control)
                if beside:
                    await asyncio.sleep((boot_clock() - began) * _REST)
            settled |= done[0]
            elsewhere |= done[1]
        return settled, elsewhere

    def _together(
        self, debt: Owed | Delivery
    ) -> Callable[[Entity, Sequence[Any], Control], Awaitable[tuple[set[str], set[str]]]]:
        """What settles many debts like this one."""
        if isinstance(debt, Delivery):
            return self.settler.deliverer.deliver_many
        return self.settler.settle_deletes if _is_tombstone(debt) else self.settler.settle_many

    def _rests(self, debt: Owed | Delivery) -> bool:
        """Whether a debt that was refused is left alone: tried again now and then, never in a hot loop."""
        key = _parked_key(debt)
        now = boot_clock()
        if key not in self._parked:
            if debt.parked is None:
                return False
            if debt.tentative:
                # The write was refused; whether its undo is, too, is not known here before it is tried.
                if self._is_overdue(debt):
                    self._parked[key] = now + self.pair.options.parked_retry
                return False
        if now < self._parked.setdefault(key, now + self.pair.options.parked_retry):
            return True
        del self._parked[key]
        return False

    def _is_overdue(self, debt: Owed | Delivery) -> bool:
        return self.pair.board.seen_for(debt) >= self.pair.options.tentative

    async def _one(self, debt: Owed | Delivery, control: Control, *, undo_open: bool) -> Settled:
        entity = self.pair.entities[debt.entity]
        timeout = self.pair.options.primary_deadline
        overdue = undo_open or self._is_overdue(debt)
        if isinstance(debt, Delivery):
            if debt.tentative is not None:
                if overdue:
                    await self.writer.postgres.undo(debt, control)
                return Settled.OPEN
            return await self.settler.deliverer.deliver(debt, control, timeout=timeout)
        if debt.tombstone:
            return await self.settler.settle_tombstone(entity, debt.id, control, timeout=timeout)
        return await self.settler.settle_one(entity, debt.id, control, undo_tentative=overdue, owed=True)

    async def link(self) -> int:
        """Set the links between records that were missed, by a crash behind a commit; how many."""
        pair = self.pair
        return await pair.postgres.link_all(pair.entities.values(), timeout=pair.options.bulk_deadline)

    # --- sweeping for foreign writes ------------------------------------------------------------------------

    async def sweep(self, since: datetime | None = None) -> int:
        """Adopt documents changed since the last sweep, or ``since``, by ``updatedAt``; how many were lifted."""
        began = datetime.now(UTC)
        since = since or (self._swept or began) - OVERLAP
        # For all of it: what began under one primary is not finished under another.
        control = self.pair.board.control
        adopted = 0
        for entity in self.pair.entities.values():
            if any(column.field == "updatedAt" for column in entity.columns):
                changed = self.pair.mongo.changed_since(
                    entity, "updatedAt", since, batch=_BATCH, timeout=self.pair.options.bulk_deadline
                )
                adopted += await self._adopt_all(entity, changed, control)
        self._swept = began
        return adopted

    async def full_sweep(self, *, makes_way: bool = False) -> int:
        """Adopt every document whose content is not its row's, and every foreign delete; how many.

        ``makes_way``: end early where a switch of the primary begins. That compares everything itself, and then waits
        for this process to say that it has heard of it.
        """
        adopted = 0
        control = self.pair.board.control
        for entity in self.pair.entities.values():
            found = self.pair.mongo.scan(entity, batch=_BATCH, timeout=self.pair.options.bulk_deadline)
            adopted += await self._adopt_all(entity, found, control, makes_way=makes_way)
            if makes_way and self.pair.board.control.state != STEADY:
                break
            adopted += await self._adopt_deletes(entity, control)
        return adopted

    # --- comparing -------------------------------------------------------------------------------------------

    async def full_delivery(self) -> int:
        """PostgreSQL deciding: bring every record whose document is not its row's to MongoDB; how many.

        A document without a row is left alone: it is nobody's debt.
        """
        delivered = 0
        pair, timeout = self.pair, self.pair.options.bulk_deadline
        await self.strays.merge_all(pair.board.control)
        for entity in pair.entities.values():
            after = ""
            while rows := await pair.postgres.ids_after(entity, after, limit=_BATCH, timeout=timeout):
                after = rows[-1][0]
                unlike = await self.unlike([(entity, id_) for _, id_, _ in rows])
                if unlike:
                    await self.pair.board.refresh()  # written, or delivered, between the two stores' answers
                    unlike = await self.unlike([(entity, id_) for _, id_ in unlike])
                for _, id_ in unlike:
                    # Busy: written just now, so it is owed, as it was or as it will be.
                    with contextlib.suppress(errors.Busy):
                        await self.settler.deliverer.deliver_anew(entity, id_, pair.board.control)
                        delivered += 1
        return delivered

    async def unlike(self, records: Sequence[tuple[Entity, Any]]) -> list[tuple[str, Any]]:
        """(entity, id) of those of these records that are unlike in the two stores, and owed nothing when last seen."""
        found: list[tuple[str, Any]] = []
        timeout = self.pair.options.primary_deadline
        look = self.pair.board.look
        owed = set() if look is None else {(debt.entity, id_to_text(debt.id)) for debt in look.debts}
        by_entity: dict[str, list[Any]] = {}
        for entity, id_ in records:
            by_entity.setdefault(entity.name, []).append(id_)
        for name, ids in by_entity.items():
            entity = self.pair.entities[name]
            rows, documents = await asyncio.gather(
                self.pair.postgres.held_many(entity, ids, timeout=timeout),
                self.pair.mongo.held_many(entity, ids, timeout=timeout),
            )
            for id_ in ids:
                text = id_to_text(id_)
                if rows.get(text) != documents.get(text) and (name, text) not in owed:
                    found.append((name, id_))
        return found

    async def _adopt_all(
        self,
        entity: Entity,
        found: AsyncIterator[Image | tuple[Any, bytes]],
        control: Control,
        *,
        makes_way: bool = False,
    ) -> int:
        adopted = 0
        batch: list[Image | tuple[Any, bytes]] = []
        misnamed: set[str] = set()
        async for one in found:
            if isinstance(one, Image) and is_misnamed(entity, one):
                misnamed.add(id_to_text(one.id))
            # Without its content: a thousand whole documents may be more than a worker has room for.
            batch.append(replace(one, document={}) if isinstance(one, Image) else (one[0], b""))
            if len(batch) >= _BATCH:
                if makes_way and self.pair.board.control.state != STEADY:
                    return adopted
                adopted += await self._adopt_batch(entity, batch, misnamed, control)
                batch, misnamed = [], set()
        return adopted + await self._adopt_batch(entity, batch, misnamed, control)

    async def _adopt_batch(
        self,
        entity: Entity,
        batch: Sequence[Image | tuple[Any, bytes]],
        misnamed: Collection[str],
        control: Control,
    ) -> int:
        """``misnamed``: whose keys are another name's, by id text; a backfill has copied them so."""
        if not batch:
            return 0
        timeout = self.pair.options.bulk_deadline
        ids = [one.id if isinstance(one, Image) else one[0] for one in batch]
        held = await self.pair.postgres.held_many(entity, ids, timeout=timeout)
        quarantined = await self.pair.postgres.quarantined_among(entity, ids, timeout=timeout)
        adopted, carried = 0, []
        for id_, one in zip(ids, batch, strict=True):
            key = id_to_text(id_)
            if isinstance(one, Image):
                if one.debt is not None and (one.debt.parked is None or key not in quarantined):
                    continue  # the debt brings it
                # Steps without a debt: a worker had decided them that had not heard of phase 1.
                done = not one.deleted and one.steps is None and key not in misnamed
                if done and held.get(key) == (one.rev, one.digest):
                    if key in quarantined:
                        carried.append(id_)  # by a write that had not heard yet that it was there
                    continue
                if quarantined.get(key) == one.digest and not await self._is_hidden(entity, id_, one):
                    continue
            elif key in quarantined and not await self._is_hidden(entity, id_):
                continue
            if await self.settler.settle_one(entity, id_, control) is Settled.CONFIRMED:
                adopted += 1
        if carried:
            await self.pair.postgres.release(entity, carried, timeout=timeout)
        return adopted

    async def _is_hidden(self, entity: Entity, id_: Any, image: Image | None = None) -> bool:
        """Whether readers get another state of a document in quarantine: there is a row, and it is on no board."""
        if image is not None and image.debt is not None:
            return False
        row = await self.pair.postgres.held(entity, id_, timeout=self.pair.options.bulk_deadline)
        return row.rev is not None and (image is None or (row.rev, row.digest) != (image.rev, image.digest))

    async def _adopt_deletes(self, entity: Entity, control: Control) -> int:
        """Rows whose document is gone without a tombstone: deleted by a foreign writer, after a second look."""
        pair = self.pair
        timeout = pair.options.bulk_deadline
        adopted = 0
        after = ""
        while True:
            rows = await pair.postgres.ids_after(entity, after, limit=_BATCH, timeout=timeout)
            if not rows:
                return adopted
            after = rows[-1][0]
            present = await pair.mongo.present(entity, [id_ for _, id_, _ in rows], timeout=timeout)
            gone = [(id_, rev) for text, id_, rev in rows if text not in present]
            if gone:
                await asyncio.sleep(1.0)  # a write in flight may have put the row first: look again
            for id_, rev in gone:
                adopted += await self.settler.adopt_delete(entity, id_, rev, control)


def _portions(
    debts: Iterable[Owed | Delivery], refused: Collection[tuple[str, str, int]]
) -> tuple[list[list[Owed | Delivery]], list[Owed | Delivery]]:
    """Plain debts that are many, by the hundred, and all the others; tombstones in portions of their own.

    ``refused``: those that were tried in vain, by `_parked_key`. A tombstone has no note of it.
    """
    plain: dict[tuple[str, bool], list[Owed | Delivery]] = {}
    others: list[Owed | Delivery] = []
    for debt in debts:
        alone = debt.parked is not None or debt.tentative or (isinstance(debt, Owed) and debt.delivery)
        if alone or _parked_key(debt) in refused:
            others.append(debt)
        else:
            plain.setdefault((debt.entity, _is_tombstone(debt)), []).append(debt)
    portions: list[list[Owed | Delivery]] = []
    for owed in plain.values():
        if len(owed) < _MANY:
            others += owed
            continue
        owed.sort(key=lambda debt: id_to_text(debt.id))
        portions += [owed[at : at + _TOGETHER] for at in range(0, len(owed), _TOGETHER)]
    return portions, others


def _is_tombstone(debt: Owed | Delivery) -> bool:
    return isinstance(debt, Owed) and debt.tombstone


def _parked_key(debt: Owed | Delivery) -> tuple[str, str, int]:
    return debt.entity, id_to_text(debt.id), debt.rev
