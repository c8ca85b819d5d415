"""The debt board: what a worker knows of the control record and of the records in debt, and how old that is.

Debt lives in the primary, the reader asks PostgreSQL; so every worker keeps the ids in debt, read again every
`Options.poll` seconds. Each look reads the control record *first* and the debts after it: a look that saw the
secondary as readable has therefore seen every debt that was written before that.

A look's age counts from its *start*, on a clock that runs through suspension. The lease is the same look: a
write is acknowledged only if the lease of *its* epoch was still valid when the answer arrived, so a coordinator that
waits for the lease's length knows that no older acknowledgement can follow; or reads it in the registry, sooner
(`crossfade.workers`).

While a switch is under way the record alone is looked at, every few milliseconds. Whoever sees that its coordinator has
held writes for longer than it may goes back from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from crossfade import errors, observe
from crossfade.breaker import Breaker
from crossfade.clock import boot_clock
from crossfade.control import ANNOUNCED, STEADY, Control, ControlRecord
from crossfade.control import Seen as SeenCopies
from crossfade.entity import Entity
from crossfade.record import new_operation
from crossfade.seen import Seen
from crossfade.stores.mongo import MongoStore, Owed
from crossfade.stores.postgres import Delivery, PostgresStore
from crossfade.values import id_to_text
from crossfade.workers import Gate, Membership, Registry

#: Beyond the pause limit before a worker goes back from a switch: its coordinator does so at the limit.
_GRACE = 0.25
#: Seconds for which a switch may be announced and not begun.
_ANNOUNCED = 10.0
#: Seconds between two looks for workers that are gone.
_REAP = 5.0
#: Seconds for which debts are not looked at again while they can neither be settled nor matter to a reader: every look
#: of every worker reads all of them, from the one store that is left.
_SPARED = 2.0


async def end(task: asyncio.Task[None]) -> None:
    """Cancel a background task until it has ended.

    Once is not enough: a cancellation that meets the completion of a ``wait_for`` below is lost (Python 3.11), and
    the loop above would go on for ever.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.1)


@dataclass(frozen=True, slots=True)
class Options:
    """Times and limits; the defaults are protocol.md's. All times in seconds.

    Attributes:
        primary_deadline: for the store that decides.
        bulk_deadline: for one round trip of what nobody waits for: stamping, sweeping, preparing.
        secondary_deadline: for the other one: how much longer it may make a caller wait.
        poll: between two looks at the control record and the debts.
        glance: between two looks at the control record alone, while a switch is under way.
        board_age: the oldest board that a reader accepts; a write that leaves debt on a failure waits it out.
        lease: how long a look allows a worker to acknowledge writes.
        tentative: how long a ``ROLLBACK_BOTH`` write may stay open before the reconciler undoes it.
        reconcile_age: how long a debt must have been seen before the reconciler takes it: a write in
            flight settles its own.
        parked_retry: between two attempts at a debt that PostgreSQL's rules refuse.
        sweep: between two sweeps for foreign writes by ``updatedAt``; with PostgreSQL deciding, between two looks for
            what reached MongoDB late, and for the end of its feeding. 0: none of all that but by a command.
        full_sweep: between two full passes against the rows' digests; 0: none.
        board_limit: ids per entity on the board, and tombstones, or deliveries, of all of them; more than that: the
            whole entity, or every one, is read from the primary.
        mongo_pool, postgres_pool: connections at most.
        feed: how long MongoDB is still fed once phase ``postgres_only`` was entered.
        shadow_sample: the part of the reads that is compared in phase ``shadow_read``; 1.0: all of them.
        shadow_deadline: for each look of a comparison at a store.
        shadow_looks: waits after which what differs is looked at again; it counts after the last one.
        shadow_queue: comparisons that wait at most; what is more is dropped, and counted.
        shadow_flush: between two times at which a worker adds what it counted to PostgreSQL.
        shadow_postgres_read: compare in phase ``postgres_read``, too.
        shadow_comparisons: how many of them, without a mismatch, let PostgreSQL be read.
        background: ``mode="async"`` writes under way at most; more of them leave their debt to the reconciler.
    """

    primary_deadline: float = 5.0
    bulk_deadline: float = 60.0
    secondary_deadline: float = 0.25
    poll: float = 0.25
    glance: float = 0.015
    board_age: float = 0.5
    lease: float = 2.0
    tentative: float = 2.0
    reconcile_age: float = 1.0
    parked_retry: float = 30.0
    sweep: float = 2.0
    full_sweep: float = 300.0
    board_limit: int = 2_000
    mongo_pool: int = 50
    postgres_pool: int = 20
    background: int = 200
    feed: float = 7 * 24 * 3600.0
    shadow_sample: float = 0.1
    shadow_deadline: float = 1.0
    # The last look is later than several sweeps (`sweep`): what a foreign writer left has been adopted by then.
    shadow_looks: tuple[float, ...] = (0.25, 1.0, 4.0, 10.0)
    shadow_queue: int = 1_000
    shadow_flush: float = 1.0
    shadow_postgres_read: bool = False
    shadow_comparisons: int = 1_000

    @classmethod
    def from_env(cls) -> Options:
        """The defaults, with what an operator may set in the environment, by these names.

        ``CROSSFADE_FEED_HOURS``, ``CROSSFADE_SHADOW_SAMPLE``, ``CROSSFADE_SHADOW_COMPARISONS``,
        ``CROSSFADE_SHADOW_POSTGRES_READ`` (0 or 1).

        Raises:
            crossfade.errors.ConfigurationError: one of them cannot be used; the message names it.
        """
        usual = cls()
        return replace(
            usual,
            feed=_number("CROSSFADE_FEED_HOURS", usual.feed / 3600, most=24 * 3650) * 3600,
            shadow_sample=_number("CROSSFADE_SHADOW_SAMPLE", usual.shadow_sample, most=1),
            shadow_comparisons=int(
                _number("CROSSFADE_SHADOW_COMPARISONS", usual.shadow_comparisons, most=1_000_000_000)
            ),
            shadow_postgres_read=bool(_number("CROSSFADE_SHADOW_POSTGRES_READ", 0, most=1)),
        )


def _number(name: str, usual: float, *, most: int) -> float:
    text = os.environ.get(name, "").strip()
    try:
        value = float(text) if text else usual
    except ValueError:
        value = -1.0
    if not 0 <= value <= most:
        raise errors.ConfigurationError(f"{name} is {text!r}: write a number from 0 to {most:,}")
    return value


@dataclass(frozen=True, slots=True)
class Look:
    """One look.

    Attributes:
        began: when it began, by `boot_clock`.
        control: the control record.
        ids: (entity, id text) in debt.
        owed_entities: entities with any debt, any record in quarantine, or more debts than the board holds.
        overflown: entities with more debts than the board holds.
        quarantined: entities with a record in quarantine.
        owed, deliveries: the debts themselves, whichever kind the primary has.
        debts_read: when the look began that read them, by `boot_clock`: mostly this one.
        mongo, postgres: whether the store answered.
    """

    began: float
    control: Control
    ids: frozenset[tuple[str, str]]
    owed_entities: frozenset[str]
    overflown: frozenset[str]
    quarantined: frozenset[str]
    owed: tuple[Owed, ...] = ()
    deliveries: tuple[Delivery, ...] = ()
    debts_read: float = 0.0
    mongo: bool = True
    postgres: bool = True

    @property
    def debts(self) -> tuple[Owed | Delivery, ...]:
        """What the secondary is owed, whichever it is."""
        return (*self.owed, *self.deliveries)

    @property
    def secondary_answers(self) -> bool:
        """Whether the secondary answered, whichever it is."""
        return self.postgres if self.control.phase.rules.primary == "mongo" else self.mongo


@dataclass
class Board:
    """Keeps the latest look of one migration in one worker; see the module's docstring."""

    migration: str
    entities: Mapping[str, Entity]
    mongo: MongoStore
    postgres: PostgresStore
    record: ControlRecord
    options: Options
    look: Look | None = None
    gate: Gate = field(default_factory=Gate)
    #: This process in the registry, once it is one that may acknowledge writes.
    member: Membership | None = None
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _flagging: asyncio.Lock = field(default_factory=asyncio.Lock)
    _task: asyncio.Task[None] | None = None
    #: The flag "secondary unreadable" as last seen (None: it may be read), and since when.
    _flag: tuple[str | None, float] | None = None
    #: When the last look began that saw the flag stand; None: the last one saw that it does not.
    _standing: float | None = None
    _first_seen: dict[tuple[Any, ...], float] = field(default_factory=dict)
    #: Looks since the secondary answered.
    _silent: int = 0
    #: By epoch, when the latest look began that gave a lease under it.
    _leased: dict[int, float] = field(default_factory=dict)
    _signing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _signed: asyncio.Task[None] | None = None
    #: The switch that is under way and how far it is, and since when this worker has seen it so.
    _under_way: tuple[str, bool] = ("", False)
    _under_way_since: float = 0.0
    _reaped: float = 0.0

    @property
    def control(self) -> Control:
        """The newest control record this worker has seen.

        Raises:
            crossfade.errors.StoreUnavailable: it has never seen one.
        """
        if self.look is None:
            raise errors.StoreUnavailable("mongo", f"the control record of {self.migration} was never read")
        return self.look.control

    @property
    def age(self) -> float:
        """Seconds since the latest successful look began."""
        return float("inf") if self.look is None else boot_clock() - self.look.began

    @property
    def lease_valid(self) -> bool:
        """Whether a write that is admitted now may be acknowledged."""
        return self.look is not None and self.leased(self.look.control.epoch)

    def leased(self, epoch: int) -> bool:
        """Whether a write that was admitted under this epoch may be acknowledged now."""
        return boot_clock() - self._leased.get(epoch, float("-inf")) <= self.options.lease

    def vouches_for(self, control: Control) -> bool:
        """Whether the primary of this record is known to have been it until now."""
        if control.holds_writes:
            return False  # acknowledged: it may have been decided already
        return self.leased(control.epoch)  # nobody waits for who is in no registry: to him there is none

    @property
    def is_running(self) -> bool:
        """Whether it looks by itself."""
        return self._task is not None and not self._task.done()

    async def start(self) -> None:
        """Enter the registry, take the first look, and go on looking in the background.

        Raises:
            crossfade.errors.SchemaNotReady: the primary lacks a table of Crossfade's, so there will never be a lease.
        """
        with contextlib.suppress(errors.StoreUnavailable):
            await self.obtain_lease()
        self._task = asyncio.create_task(self._run(), name=f"board of {self.migration}")

    async def stop(self) -> None:
        """Stop looking, and leave the registry."""
        for task in (self._task, self._signed):
            if task is not None:
                await end(task)
        # Before the entry goes: a write that ends meanwhile is nobody's that a coordinator would ask.
        self._leased.clear()
        if self.member is not None:
            await self.member.leave(timeout=min(1.0, self.options.primary_deadline))

    async def obtain_lease(self) -> None:
        """Enter the registry if this process is not in it, and look.

        Raises:
            crossfade.errors.StoreUnavailable: the primary does not answer.
        """
        if self.member is None:
            registry = Registry(self.migration, self.record.stores)
            self.member = Membership(registry, self.gate, self.options.lease, self.options.board_age)
        # The first look says which store is primary; the entry stands there before the next. Where another look of
        # this process is just writing it, this one has not, and the one after that may have to.
        for _ in range(3):
            await self.refresh()
            if self.lease_valid:
                return
            async with self._signing:
                pass

    async def _run(self) -> None:
        refreshed = boot_clock()
        while True:
            control = None if self.look is None else self.look.control
            under_way = control is not None and control.state != STEADY
            await asyncio.sleep(self.options.glance if under_way else self.options.poll)
            try:
                young = boot_clock() - refreshed < self.options.poll
                if not (under_way and young and await self.is_unchanged()):
                    refreshed = boot_clock()
                    await self.refresh(spares=True)
                    await self._reap()
                await self._go_back_from_an_orphan()
            except errors.CrossfadeError as cause:
                observe.log().debug(f"The debt board could not be read: {cause}", context="Debt Board")
            except Exception as cause:
                # A worker that has stopped looking would never take a lease again.
                observe.log().error(f"A look failed: {type(cause).__name__}", context="Debt Board")

    async def is_unchanged(self) -> bool:
        """Whether the control record is the one that is known; that renews the lease as a whole look does.

        Raises:
            crossfade.errors.StoreUnavailable: the primary does not answer.
        """
        began, known = boot_clock(), self.control
        if not await self.record.glance(known, timeout=self.options.lease / 2):
            return False
        self._grant(known, began)
        return True

    async def _go_back_from_an_orphan(self) -> None:
        """Go back from a switch whose coordinator must have done so: it is gone, or late."""
        control, now = self.control, boot_clock()
        if control.state == STEADY:
            return
        if self._under_way != (control.attempt, control.holds_writes):
            self._under_way, self._under_way_since = (control.attempt, control.holds_writes), now
        allowed = control.limit + _GRACE if control.holds_writes else _ANNOUNCED
        if now - self._under_way_since <= allowed:
            return
        back = control.abandoned(by="a worker", reason="the switch's coordinator is gone")
        if await self.record.change(control, back, timeout=self.options.primary_deadline):
            observe.log().warning("Went back from a switch: its coordinator is gone", context="Switch")

    async def _reap(self) -> None:
        if self.member is not None and boot_clock() - self._reaped >= _REAP:
            self._reaped = boot_clock()
            rules, registry = self.control.phase.rules, self.member.registry
            await registry.reap(rules.primary, timeout=self.options.lease / 2)
            if self.look is not None and self.look.secondary_answers and not self.control.retired:
                # Once that one decides, who has died is not to be waited for, nor shown.
                with contextlib.suppress(errors.CrossfadeError):
                    await registry.reap(rules.secondary, timeout=self.options.poll)

    async def refresh(self, *, spares: bool = False) -> Look:
        """Look now.

        ``spares``: where nobody can use them, the debts may be those of a look `_SPARED` ago.

        Raises:
            crossfade.errors.StoreUnavailable: the primary does not answer; the look before stays, and ages.
        """
        options = self.options
        timeout = options.board_age
        began = boot_clock()
        # A secondary that hangs must not age the board and the lease: only the primary is waited for.
        second = self.look.control.phase.rules.secondary if self.look is not None else None
        seen = await self.record.look(timeout=options.lease / 2, brief=second, brief_timeout=self._brief())
        if seen.control is not None and not seen.decisive and seen.control.phase.rules.primary == second:
            # It has become the primary: it has all the time that a primary has.
            began = boot_clock()
            seen = await self.record.look(timeout=options.lease / 2)
        seen = seen.not_before(None if self.look is None else self.look.control)
        control = seen.control
        if control is None:
            raise errors.SchemaNotReady(
                f"migration {self.migration!r} has no control record: run `crossfade init`"
            )
        if not seen.decisive:
            primary = control.phase.rules.primary
            raise errors.StoreUnavailable(
                primary, self.record.stores[primary].unreachable(f"no answer within {options.lease / 2:g} s")
            )
        if control.state != STEADY:
            await self._hear(control, seen, began)
        lagging = await self.record.spread(seen, timeout=timeout)
        owed: tuple[Owed, ...] = ()
        deliveries: tuple[Delivery, ...] = ()
        limit, read = options.board_limit, began
        if control.phase.rules.primary == "mongo":
            known = self.look
            if spares and known is not None and self._are_of_no_use(known, control, seen, began):
                owed, read = known.owed, known.debts_read
            elif control.phase.rules.dual:
                owed = await self._owed(timeout=timeout * 4)
            found: list[tuple[str, Any]] = [(debt.entity, debt.id) for debt in owed]
        else:
            deliveries = tuple(await self.postgres.outbox(self.entities, limit=limit, timeout=timeout * 4))
            found = [(debt.entity, debt.id) for debt in deliveries]
        quarantined = set(self.entities)  # not known: nothing may be called absent
        if seen.postgres != -1:
            with contextlib.suppress(errors.CrossfadeError):
                quarantined = await self.postgres.quarantined_entities(self.entities, timeout=options.poll)
        counts: dict[str, int] = {}
        for entity, _ in found:
            counts[entity] = counts.get(entity, 0) + 1
        overflown = frozenset(entity for entity, number in counts.items() if number >= limit)
        if len(deliveries) >= limit or sum(debt.tombstone for debt in owed) >= limit:
            overflown = frozenset(self.entities)  # these share the limit
        look = Look(
            began,
            control,
            frozenset((entity, id_to_text(id_)) for entity, id_ in found),
            frozenset(counts) | frozenset(quarantined) | overflown,
            overflown,
            frozenset(quarantined),
            owed,
            deliveries,
            debts_read=read,
            mongo=seen.mongo != -1,
            postgres=seen.postgres != -1,
        )
        async with self._changed:
            latest = self.look is None or (
                look.began >= self.look.began and control.version >= self.look.control.version
            )  # else another one was faster
            if latest:
                self._note_ages(look)
                self._note_flag(control, began)
                self.look = look
                self._grant(control, began)
                if control.state != STEADY:
                    self.gate.hear_of(control.attempt)
                self._changed.notify_all()
        if latest:
            await self._give_sign(control, seen)
        # Writes that a switch held go on by now.
        await self.record.spread_history(lagging, timeout=timeout)
        return look

    @staticmethod
    def _are_of_no_use(known: Look, control: Control, seen: SeenCopies, began: float) -> bool:
        """Whether PostgreSQL, silent, can take no debt, nobody may read it, and the debts are known of just now.

        A look that sees it as readable has to have read them itself. What the primary alone settles, an open write or
        steps, a reconciler must not find here again: there would be nothing left to do but to wait for PostgreSQL.
        """
        read_by_nobody = control.unreadable is not None or not control.postgres_first
        for_primary = any(debt.tentative or debt.steps for debt in known.owed)
        return (
            not seen.answered("postgres")
            and read_by_nobody
            and not for_primary
            and control.epoch == known.control.epoch
            and began - known.debts_read < _SPARED
        )

    async def _owed(self, *, timeout: float) -> tuple[Owed, ...]:
        limit = self.options.board_limit
        owed = await self.mongo.debts(self.entities.values(), limit=limit, timeout=timeout)
        parked = Counter(debt.entity for debt in owed if debt.parked is not None)
        if hiding := [self.entities[name] for name, number in parked.items() if number >= limit]:
            # Those of an entity that are all parked may hide some that a reconciler could settle.
            owed += await self.mongo.debts(hiding, limit=limit, timeout=timeout, parked=False)
        return tuple({debt_key(debt): debt for debt in owed}.values())

    async def _hear(self, control: Control, seen: SeenCopies, began: float) -> None:
        """Acknowledge a step of a switch before debts are looked at: everybody's writes may be waiting for that.

        What is known of debts is as old as it was.
        """
        async with self._changed:
            if self.look is None or control.version <= self.look.control.version:
                return
            known = self.look.control
            if control.phase is not known.phase:
                return  # debts of another primary
            if self.look.debts_read < self.look.began or (known.unreadable and not control.unreadable):
                return  # debts from before the secondary was made readable do not say what may be read there
            self.look = replace(self.look, control=control)
            self._grant(control, began)
            self.gate.hear_of(control.attempt)
            self._changed.notify_all()
        await self._give_sign(control, seen)

    def _grant(self, control: Control, began: float) -> None:
        """Take the lease that a look at this record gives."""
        if self.member is not None and self.member.grants(control, began):
            older = sorted(self._leased)[-4:]
            self._leased = {epoch: self._leased[epoch] for epoch in older}
            self._leased[control.epoch] = max(began, self._leased.get(control.epoch, began))

    async def _give_sign(self, control: Control, seen: SeenCopies) -> None:
        """Acknowledge this record in the registry; behind the caller's back while older writes are under way."""
        if self.member is None or not self.member.is_due(control) or self._signing.locked():
            return
        there = seen.answered(control.phase.rules.secondary) and not control.retired
        secondary = self._brief() if there else 0.0
        if self.gate.is_clear(control.epoch):
            await self._sign(secondary)
        elif self._signed is None or self._signed.done():
            self._signed = asyncio.create_task(self._sign_once_clear(secondary))

    async def _sign(self, secondary: float) -> None:
        assert self.member is not None
        async with self._signing:
            if not self.control.holds_writes:
                await self.gate.nobody_waits()  # they may go on, and what they waited belongs into the entry
            if self.gate.is_clear(self.control.epoch):
                await self.member.sign(self.control, timeout=self.options.lease / 2, secondary=secondary)
                if self.control.state == ANNOUNCED:
                    # The fence may follow at once, and writes under way then have what is left of this lease.
                    with contextlib.suppress(errors.CrossfadeError):
                        await self.is_unchanged()

    async def _sign_once_clear(self, secondary: float) -> None:
        await self.gate.cleared(self.control.epoch)
        with contextlib.suppress(errors.CrossfadeError):
            await self._sign(secondary)

    def _note_flag(self, control: Control, began: float) -> None:
        """Remember since when this worker has seen the flag that stands now, and in which look last."""
        token = None if control.lifting else control.unreadable
        if self._flag is None or self._flag[0] != token:
            self._flag = (token, boot_clock())
        if token is None:
            self._standing = None
        elif self._standing is None or began > self._standing:
            self._standing = began

    def _note_ages(self, look: Look) -> None:
        """Remember since when each revision in debt has been seen; the reconciler goes by that."""
        now = boot_clock()
        keys = [debt_key(debt) for debt in look.debts]
        self._first_seen = {key: self._first_seen.get(key, now) for key in keys}
        observe.DEBTS.labels(self.migration).set(len(keys))
        observe.PHASE.labels(self.migration).set(look.control.phase.number)
        oldest = min(self._first_seen.values(), default=now)
        observe.DEBT_AGE.labels(self.migration).set(now - oldest)

    def seen_for(self, debt: Owed | Delivery) -> float:
        """Seconds for which this worker has seen this very revision in debt."""
        return boot_clock() - self._first_seen.get(debt_key(debt), boot_clock())

    async def wait_until(self, condition: Callable[[Control], bool], timeout: float) -> Control:
        """The control record once it fulfils ``condition``.

        Raises:
            crossfade.errors.Busy: it did not within ``timeout`` seconds.
        """
        try:
            async with asyncio.timeout(timeout), self._changed:
                while self.look is None or not condition(self.look.control):
                    await self._changed.wait()
                return self.look.control
        except TimeoutError:
            raise errors.Busy(
                f"migration {self.migration}: a switch held all writes for {timeout:g} s"
            ) from None

    async def steady(self) -> Control:
        """The control record; while a switch holds writes, the one that it leads to.

        Raises:
            crossfade.errors.Busy: the switch held this write past its deadline.
        """
        control = self.control
        if not control.holds_writes:
            return control
        # In a process that does not look by itself nobody else would see the end of it.
        looking = None if self.is_running else asyncio.create_task(self._keep_looking())
        try:
            with self.gate.held(control.attempt):
                return await self.wait_until(lambda c: not c.holds_writes, self.options.primary_deadline)
        finally:
            if looking is not None:
                await end(looking)

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(self.options.poll)
            with contextlib.suppress(errors.CrossfadeError):
                await self.refresh()

    # --- "secondary unreadable" ----------------------------------------------------------------------------

    async def mark_unreadable(self, token: str) -> str:
        """Return once no worker serves an older row: the flag stands, and every board from before is too old.

        Its token is ``token``, or that of whoever set it before.

        Raises:
            crossfade.errors.StoreUnavailable: the flag could not be set.
        """
        if not self._stands():
            async with self._flagging:
                # Who has waited here mostly finds it done: one look for all of them.
                if not self._stands():
                    await self._set_flag(token)
        assert self._flag is not None
        stands, since = self._flag
        assert stands is not None
        await self._outlast_boards(since)
        return stands

    def _stands(self) -> bool:
        """Whether the flag stood in a look so young that nobody can have made the secondary readable since."""
        seen = self._standing
        return seen is not None and boot_clock() - seen <= self.options.board_age

    async def _set_flag(self, token: str) -> None:
        control = self.control
        for _ in range(20):
            began = boot_clock()
            seen = await self.record.look(
                timeout=self.options.primary_deadline,
                brief=control.phase.rules.secondary,
                brief_timeout=self._brief(),
            )
            now = seen.control
            if now is None or not seen.decisive:
                raise errors.StoreUnavailable("mongo", "the control record cannot be read")
            if now.unreadable is not None and not now.lifting:
                self._note_flag(now, began)
                return
            new = now.changed(by="a worker", reason="a write met a failure", unreadable=token, lifting=False)
            if await self.record.change(now, new, timeout=self.options.primary_deadline, copy=False):
                self._note_flag(new, began)
                return
        raise errors.StoreUnavailable("mongo", "the control record could not be changed")

    def _brief(self) -> float:
        """Seconds that the secondary has to show its copy of the control record: few, once it has not answered.

        Now and then it has them all, or a slow one would never be heard again.
        """
        answered = self.look is None or self.look.secondary_answers
        self._silent = 0 if answered else self._silent + 1
        return self.options.poll if self._silent % 4 == 0 else min(self.options.poll, 0.05)

    async def _outlast_boards(self, since: float) -> None:
        """Wait until every board is too old that began before the flag was seen; once per failure, not per write.

        Seeing the flag is not enough: another worker's board may be from just before it.
        """
        oldest = await self._oldest_accepted()
        await asyncio.sleep(max(0.0, since + oldest - boot_clock()))

    async def _oldest_accepted(self) -> float:
        """The greatest `Options.board_age` of all workers.

        Those of one application have the same; a command has the default, whatever its application has.
        """
        own = self.options.board_age
        if self.is_running:
            return own
        primary = self.control.phase.rules.primary
        registry = Registry(self.migration, self.record.stores)
        workers = await registry.workers(primary, timeout=self.options.primary_deadline)
        return max([own, *(worker.board_age for worker in workers)])

    async def lift_unreadable(self, settle_everything: Callable[[], Awaitable[bool]]) -> bool:
        """Make the secondary readable again, if every debt can be settled first.

        In two steps, because a writer that saw the flag up to `Options.board_age` ago does not wait: "lifting"
        makes every later writer set the flag anew, and after `board_age` no such writer is left.
        """
        control = self.control
        if control.unreadable is None:
            return True
        token = control.unreadable
        lifting = control.changed(by="a reconciler", reason="the secondary answers again", lifting=True)
        if not control.lifting and not await self.record.change(
            control, lifting, timeout=self.options.primary_deadline
        ):
            return False
        await asyncio.sleep(self.options.board_age * 1.1)
        if not await settle_everything():
            return False
        look = await self.refresh()
        now = look.control
        if now.unreadable != token or not now.lifting:
            return False
        readable = now.changed(
            by="a reconciler", reason="every debt is settled", unreadable=None, lifting=False
        )
        return await self.record.change(now, readable, timeout=self.options.primary_deadline)

    def new_token(self) -> str:
        """A token for `mark_unreadable`."""
        return new_operation()


def debt_key(debt: Owed | Delivery) -> tuple[Any, ...]:
    """What tells one owed revision from another."""
    return (debt.entity, id_to_text(debt.id), debt.rev, debt.op, getattr(debt, "tombstone", False))


@dataclass
class Pair:
    """The two stores of one migration, and what a worker knows of them.

    Attributes:
        asked: when a caller last asked for a read or a write, by `boot_clock`: background work makes way for callers.
        mongo_breaker, postgres_breaker: whether it is worth waiting for the store. Reads and writes share one: who has
            waited for a silent store in vain spares the next, whatever that one wants of it.
    """

    name: str
    entities: dict[str, Entity]
    mongo: MongoStore
    postgres: PostgresStore
    board: Board
    options: Options
    seen: Seen = field(default_factory=Seen)
    asked: float = float("-inf")
    mongo_breaker: Breaker = field(init=False)
    postgres_breaker: Breaker = field(init=False)

    def __post_init__(self) -> None:
        self.mongo_breaker = Breaker(lambda: self.mongo.ping(self.options.secondary_deadline))
        self.postgres_breaker = Breaker(lambda: self.postgres.ping(self.options.secondary_deadline))

    async def close(self) -> None:
        """Ask no store any more whether it is back; for when nobody reads or writes any more."""
        await self.mongo_breaker.close()
        await self.postgres_breaker.close()
