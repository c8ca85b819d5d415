"""The switch of the primary, in either direction: a journal of numbered steps, each idempotent.

====  ========  ==============================================================================================
step  name      what it does
====  ========  ==============================================================================================
1     announce  every worker is told, and looks more often from then on; writes go on
2     fence     new writes wait; those under way end and every worker acknowledges, or its lease runs out
3     drain     *only then* what another application has just written is adopted, and every debt settled, open
              ``ROLLBACK_BOTH`` writes undone: a position read before the fence is how others lost writes
4     verify    what was written since the announcement is compared in both stores, the guard is asked once more
5     decide    **the point of no return**: one compare-and-set in the old primary's store
6     resume    the new primary's store is told that it was decided; waiting writes run
7     report    what the workers say that their writes waited
====  ========  ==============================================================================================

How far it has come is the control record (`crossfade.control`). Before 5, whatever is unexpected, and a pause that
passes its limit, goes back to the old primary by compare-and-set from the same state; so do workers when they see no
end of it. After 5 it only goes forward. Whoever runs a step again, another coordinator too, does no harm: the record's
version lets one of two decide.

Before 1 the whole of both stores is compared, for as long as that takes: nobody waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import statistics
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from crossfade import errors
from crossfade.clock import boot_clock
from crossfade.control import ANNOUNCED, PREPARED, STEADY, SWITCHING, Control
from crossfade.guard import guard, refusals, told
from crossfade.migration import Migration
from crossfade.phase import Phase, check_transition
from crossfade.values import text_to_id
from crossfade.workers import SKEW, Registry, Worker

#: Seconds for which a switch may hold writes.
PAUSE_LIMIT = 2.0
#: Between two looks whether the others have acknowledged.
_POLL = 0.01
#: An announcement that took longer is made again: too much was written meanwhile to compare it in the pause.
_LONG_ANNOUNCEMENT = 0.5
#: Seconds that the sweep for foreign writes may take of the pause, and how far before the announcement it begins.
_SWEEP, _SWEEP_OVERLAP = 0.25, timedelta(seconds=2)
#: Seconds for the workers to say what their writes waited.
_REPORTS = 3.0

OnStep = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Pause:
    """What held writes waited, in seconds, as the workers that are left tell it.

    Attributes:
        waits: how long each waited, the shortest first.
        failed: how many of them in vain.
        whole: from the fence to the decision, by the coordinator's clock.
    """

    waits: tuple[float, ...] = ()
    failed: int = 0
    whole: float = 0.0

    @property
    def writes(self) -> int:
        """How many waited."""
        return len(self.waits)

    @property
    def p50(self) -> float:
        """Half of them waited no longer; 0 where none did."""
        return statistics.median(self.waits) if self.waits else 0.0

    @property
    def p99(self) -> float:
        """All but one in a hundred waited no longer; of fewer than a hundred: the longest."""
        return self.waits[min(self.writes - 1, int(self.writes * 0.99))] if self.waits else 0.0

    @property
    def longest(self) -> float:
        """The longest that one waited; 0 where none did."""
        return self.waits[-1] if self.waits else 0.0


@dataclass(frozen=True, slots=True)
class Changed:
    """What a change of phase did.

    Attributes:
        before, after: the control records.
        forced: guards that did not hold and were overridden by name.
        adopted: records that were made equal before the switch began, and inside it, by what another application wrote.
        drained: debts settled inside the switch.
        compared: records compared inside the switch.
        silent: workers that did not acknowledge, and were fenced by their lease.
        pause: what writes waited; nothing within one primary.
    """

    before: Control
    after: Control
    forced: tuple[str, ...] = ()
    adopted: int = 0
    drained: int = 0
    compared: int = 0
    silent: tuple[str, ...] = ()
    pause: Pause = field(default_factory=Pause)


async def switch(
    migration: Migration,
    target: Phase,
    *,
    by: str,
    reason: str,
    forced: tuple[str, ...] = (),
    limit: float = PAUSE_LIMIT,
    on_step: OnStep = lambda _: None,
) -> Changed:
    """Move the primary to ``target``'s; its guard was asked and holds, but for what is ``forced``.

    Raises:
        crossfade.errors.NotAllowedInPhase: it was not carried out; the old primary decides, as before.
        crossfade.errors.StoreUnavailable: the same; or the old primary's store was lost, and the message says so.
    """
    before = (await migration.board.refresh()).control
    # Others may have moved it since the guard was asked.
    assert_is_next(before, target)
    coordinator = Coordinator(migration, before, by=by, limit=limit, on_step=on_step)
    coordinator.adopted = await coordinator.compare_all()
    await coordinator.announce(target, reason=reason, forced=forced)
    return await coordinator.carry_out()


async def resume(migration: Migration, *, by: str, on_step: OnStep = lambda _: None) -> Changed:
    """Finish a switch whose coordinator is gone.

    Raises:
        crossfade.errors.NotAllowedInPhase: none is under way, or it could not be carried out; see `switch`.
        crossfade.errors.StoreUnavailable: see `switch`.
    """
    now = (await migration.board.refresh()).control
    if now.state == STEADY:
        raise errors.NotAllowedInPhase(
            f"no switch of {migration.name} is under way; {now.phase.rules.primary} is primary. Begin one with "
            "`crossfade switch`"
        )
    coordinator = Coordinator(migration, now, by=by, limit=now.limit, on_step=on_step)
    on_step(f"taking over from {now.coordinator}, which had come to {now.state!r}")
    await coordinator.become(lambda control: control.taken_over(by=by, coordinator=whoami()))
    return await coordinator.carry_out()


async def abort(migration: Migration, *, by: str) -> bool:
    """Go back from a switch under way to the old primary; False: none is, or it was decided before.

    Raises:
        crossfade.errors.StoreUnavailable: the old primary cannot be reached.
    """
    timeout = migration.pair.options.primary_deadline
    for _ in range(8):
        look = await migration.board.refresh()
        if look.control.state == STEADY:
            return False
        back = look.control.abandoned(by=by, reason="the switch was aborted")
        if await migration.record.change(look.control, back, timeout=timeout):
            await migration.board.refresh()
            return True
    raise errors.NotAllowedInPhase("the control record keeps changing; look at `crossfade status`")


async def resolve(migration: Migration, *, by: str, primary: str) -> Control:
    """A person says that ``primary`` decides from now on, because the old primary's store is lost for good.

    Only where that is the question: the other store was told that all is prepared, and nobody can be asked whether it
    was decided.

    Raises:
        crossfade.errors.NotAllowedInPhase: there is nothing to resolve; the message says what to do instead.
        crossfade.errors.StoreUnavailable: the store that is to decide cannot be reached.
    """
    timeout = migration.pair.options.primary_deadline
    seen = await migration.record.look(timeout=timeout)
    now = seen.control
    if now is None or seen.decisive:
        raise errors.NotAllowedInPhase(
            "there is nothing to resolve: the primary answers. `crossfade switch --resume` finishes a switch, "
            "`crossfade switch --abort` goes back from one"
        )
    old = now.phase.rules.primary
    if now.state != PREPARED or now.target is None:
        raise errors.NotAllowedInPhase(
            f"no switch had come to its decision when {old} was lost, so {old} is still primary: start it"
        )
    if primary == old:
        raise errors.NotAllowedInPhase(
            f"{old} does not answer, so nothing can be written there: start it, and the switch goes back by itself"
        )
    new = now.resolved(by=by, reason=f"{old} is lost; a person decided for {primary}")
    if not await migration.record.stores[primary].change_control(
        migration.name, new.to_document(), expected=now.version, timeout=timeout
    ):
        raise errors.NotAllowedInPhase("somebody else resolved it meanwhile; look at `crossfade status`")
    return new


def whoami() -> str:
    """This process, for people."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _step(control: Control) -> tuple[str, str, str, int]:
    """What of a version is the coordinator's to change; the rest are flags that workers set and lift."""
    return control.attempt, control.state, control.coordinator, control.epoch


def assert_is_next(control: Control, target: Phase) -> None:
    """That a step to ``target`` can be asked for at all, whatever its guard says.

    Raises:
        crossfade.errors.NotAllowedInPhase: a switch is under way, or the step skips a phase, or leads nowhere.
    """
    if control.state != STEADY:
        raise errors.NotAllowedInPhase(
            f"migration {control.migration} is switching to {control.target}, by {control.coordinator}; if that is "
            "gone, run `crossfade switch --resume` or `--abort`"
        )
    check_transition(control.phase, target, feeding=control.feeding)


@dataclass
class Coordinator:
    """Carries out one switch.

    Attributes:
        now: the version of the control record that this coordinator has made, or seen, last.
    """

    migration: Migration
    now: Control
    by: str
    limit: float
    on_step: OnStep
    adopted: int = 0
    _before: Control = field(init=False)
    _drained: int = 0
    _wrote: tuple[tuple[str, str], ...] = ()
    _silent: tuple[str, ...] = ()
    #: What a worker must have acknowledged to have a lease.
    _granting: set[tuple[int, str]] = field(default_factory=set)
    _paused: float = 0.0
    #: When the last sweep for foreign writes began, by this process's date; None: another coordinator made it.
    _swept: datetime | None = None

    def __post_init__(self) -> None:
        self._before = self.now
        self._registry = Registry(self.migration.name, self.migration.record.stores)

    @property
    def _old(self) -> str:
        return self._before.phase.rules.primary

    @property
    def _new(self) -> str:
        return self._before.phase.rules.secondary

    @property
    def _deadline(self) -> float:
        return self.migration.pair.options.primary_deadline

    def _say(self, number: int, text: str) -> None:
        self.on_step(f"{number} {text}")

    # --- the record --------------------------------------------------------------------------------------------

    async def become(self, make: Callable[[Control], Control]) -> None:
        """The record's next version, in the old primary's store; repeated until it is decided whose it is.

        Raises:
            crossfade.errors.NotAllowedInPhase: somebody went back from this switch, or took it over.
            crossfade.errors.StoreUnavailable: the store does not say whether it was made.
        """
        record = self.migration.record
        ends = boot_clock() + self._deadline
        before, new = self.now, make(self.now)
        while True:
            if self.now != before:
                # Else just the same again: a request that was not answered may yet arrive.
                before, new = self.now, make(self.now)
            try:
                if await record.change(self.now, new, timeout=self._deadline, copy=False):
                    self.now = new
                    return
                latest = await self._latest()
            except errors.StoreUnavailable:
                if boot_clock() >= ends:
                    raise
                await asyncio.sleep(_POLL)
                continue
            if _step(latest) == _step(new) != _step(self.now):
                self.now = latest  # made after all, and flagged by a worker since
                return
            if _step(latest) != _step(self.now):
                raise errors.NotAllowedInPhase(
                    f"somebody else moves migration {self.migration.name}: {latest.changed_by} ({latest.reason}). It "
                    f"is {latest.state}, and {latest.phase.rules.primary} is primary"
                )
            # A worker has set or lifted a flag.
            self.now = latest

    async def _latest(self) -> Control:
        found = await self.migration.record.stores[self._old].control(
            self.migration.name, timeout=self._deadline
        )
        if found is None:
            raise errors.StoreUnavailable(self._old, f"the control record is gone from {self._old}")
        return Control.from_document(found)

    # --- before anybody waits ------------------------------------------------------------------------------------

    async def compare_all(self) -> int:
        """Make every record of both stores equal, as the primary has it; how many were not."""
        self.on_step("0 compare: every record in both stores, while writes go on")
        reconciler = self.migration.reconciler
        if self._old == "mongo":
            adopted = await reconciler.full_sweep()
            self._swept = datetime.now(UTC)
            return adopted + await reconciler.sweep()
        return await reconciler.full_delivery()

    async def announce(self, target: Phase, *, reason: str, forced: tuple[str, ...]) -> None:
        """Step 1."""
        self._say(1, "announce: every worker is told; writes go on")
        await self.become(
            lambda control: control.announced(
                target, by=self.by, reason=reason, limit=self.limit, coordinator=whoami(), forced=forced
            )
        )

    async def carry_out(self) -> Changed:
        """Everything from there on, whatever state it is in."""
        target = self.now.target
        assert target is not None
        try:
            if self.now.state == ANNOUNCED:
                await self._until_all_have_heard()
            await self._hold_and_prepare(target)
            self._say(5, f"decide: {self._new} is primary from here on; there is no way back from this")
            await self.become(lambda control: control.decided(reason=control.reason))
        except BaseException as cause:
            if not await self._go_back(cause):
                raise
        whole = boot_clock() - self._paused
        self._say(6, "resume: waiting writes run")
        await self._commit()
        self._say(7, "report")
        pause = await self._what_was_waited(whole)
        return Changed(
            self._before, self.now, self.now.forced, self.adopted, self._drained, len(self._wrote), self._silent, pause
        )  # fmt: skip

    async def _until_all_have_heard(self) -> None:
        for again in (True, True, True, False):
            began = boot_clock()
            self._note_silent(await self._acknowledged(began))
            # Whoever acknowledges an announcement has a lease: none is made without waiting for what it is answered.
            self._granting.add(self.now.token)
            if not again or boot_clock() - began <= _LONG_ANNOUNCEMENT:
                return
            # Those that are silent have no lease from now on; the next round does not wait for them.
            await self.become(Control.announced_again)

    # --- while writes wait -----------------------------------------------------------------------------------------

    async def _hold_and_prepare(self, target: Phase) -> None:
        self._paused = boot_clock()
        async with asyncio.timeout(self.limit):
            if self.now.state == ANNOUNCED:
                self._say(2, "fence: writes wait; those under way end")
                await self.become(Control.fenced)
            if self.now.state == SWITCHING:
                self._note_silent(await self._acknowledged(boot_clock()))
                # Only now: an image of a write that has just ended would have been refused for its epoch.
                await self.migration.record.copy(self.now, to=self._new, timeout=self._deadline)
                await self._drain_and_verify(target)
                await self.become(Control.prepared)
            await self.migration.record.copy(self.now, to=self._new, timeout=self._deadline)

    async def _drain_and_verify(self, target: Phase) -> None:
        self._say(3, "drain: every debt")
        if self._old == "mongo":
            await self._sweep()
        await self._drain()
        # Only now: what was parked, or put into quarantine, until here is the guard's to refuse.
        asked = asyncio.create_task(guard(self.migration, target))
        try:
            self._say(4, f"verify: {len(self._wrote)} records written since the announcement, and the guard")
            await self._compare()
            if in_the_way := refusals(await asked, self.now.forced):
                raise errors.NotAllowedInPhase(f"while writes waited: {told(in_the_way)}")
        finally:
            asked.cancel()

    def _note_silent(self, workers: tuple[str, ...]) -> None:
        self._silent = tuple(sorted({*self._silent, *workers}))

    async def _acknowledged(self, since: float) -> tuple[str, ...]:
        """Wait until every worker has acknowledged this version, or its lease has run out; who has not."""
        own = self.migration.pair.options.lease
        board = self.migration.board
        wanted = self.now.token
        while True:
            if not board.is_running:
                await board.refresh()  # its own process may be in the registry, too
            workers = await self._registry.workers(self._old, timeout=self._deadline)
            waiting = [worker for worker in workers if self._may_hold_lease(worker, wanted)]
            there = [worker for worker in workers if worker.token == wanted]
            lease = max([own, *(worker.lease for worker in waiting)])
            if not waiting or boot_clock() - since > lease * SKEW:
                if self.now.state == SWITCHING:
                    self._wrote = self._written(there)
                return tuple(worker.name for worker in waiting)
            await asyncio.sleep(_POLL)

    def _may_hold_lease(self, worker: Worker, wanted: tuple[int, str]) -> bool:
        return worker.token != wanted and (not self._granting or worker.token in self._granting)

    def _written(self, workers: list[Worker]) -> tuple[tuple[str, str], ...]:
        if any(worker.wrote is None for worker in workers):
            raise errors.NotAllowedInPhase(
                "more was written since the announcement than can be compared while writes wait; try again"
            )
        return tuple(sorted({key for worker in workers for key in worker.wrote or ()}))

    async def _sweep(self) -> None:
        """Adopt what was written past Crossfade since the last sweep: every worker makes one of these now and then.

        Bounded, because it reads what workers wrote as well: what it leaves is a conflict when its record is delivered.
        """
        since = None if self._swept is None else self._swept - _SWEEP_OVERLAP
        try:
            async with asyncio.timeout(_SWEEP):
                self.adopted += await self.migration.reconciler.sweep(since)
        except TimeoutError:
            self.on_step("  not all that was changed of late could be looked through for foreign writes")

    async def _drain(self) -> None:
        done = await self.migration.reconciler.drain()
        self._drained = done.settled
        left = done.failed + done.parked + done.open
        if left:
            raise errors.NotAllowedInPhase(
                f"{left} debts could not be settled ({done.cause or 'see `crossfade debts`'})"
            )

    async def _compare(self) -> None:
        entities = self.migration.entities
        records = [(entities[entity], text_to_id(text)) for entity, text in self._wrote]
        if unlike := await self.migration.reconciler.unlike(records):
            entity, id_ = unlike[0]
            raise errors.NotAllowedInPhase(
                f"{len(unlike)} records differ though nothing is owed, the first is {entity} {id_}: run `crossfade "
                "verify`"
            )

    # --- either way -------------------------------------------------------------------------------------------------

    async def _go_back(self, cause: BaseException) -> bool:
        """Back to the old primary; True: it was decided after all.

        Raises:
            crossfade.errors.NotAllowedInPhase, StoreUnavailable: why it went back, in words.
        """
        attempt = self.now.attempt
        self.on_step("going back to the old primary")
        undoing: Coroutine[Any, Any, Control] = self._abandon(str(cause) or type(cause).__name__)
        try:
            self.now = await asyncio.shield(asyncio.ensure_future(undoing))
        except errors.StoreUnavailable as lost:
            if not isinstance(cause, Exception):
                return False
            raise errors.StoreUnavailable(
                self._old,
                f"{lost}. Whether the primary has changed is not known: workers hold their writes, and go back by "
                f"themselves once {self._old} answers; `crossfade switch --resolve` if it is lost for good",
            ) from cause
        if self.now.attempt == attempt and self.now.phase is not self._before.phase:
            return True
        if isinstance(cause, TimeoutError):
            raise errors.NotAllowedInPhase(
                f"writes had waited for {self.limit:g} s, the limit: {self._old} is primary, as before"
            ) from cause
        return False

    async def _abandon(self, why: str) -> Control:
        """The record once no switch of this attempt is under way."""
        ends = boot_clock() + self._deadline
        while True:
            try:
                latest = await self._latest()
                if (
                    latest.state == STEADY
                    or latest.attempt != self.now.attempt
                    or latest.coordinator != whoami()
                ):
                    return latest
                back = latest.abandoned(by=self.by, reason=f"the switch was aborted: {why}")
                if await self.migration.record.change(latest, back, timeout=self._deadline):
                    return back
            except errors.StoreUnavailable:
                if boot_clock() >= ends:
                    raise
            await asyncio.sleep(_POLL)

    async def _commit(self) -> None:
        """Tell the new primary's store that it was decided; every worker that knows does the same."""
        with contextlib.suppress(errors.CrossfadeError):
            seen = await self.migration.record.look(timeout=self._deadline)
            record = self.migration.record
            lagging = await record.spread(seen.not_before(self.now), timeout=self._deadline)
            await record.spread_history(lagging, timeout=self._deadline)
            await self.migration.board.refresh()

    async def _what_was_waited(self, whole: float) -> Pause:
        told_: list[Worker] = []
        ends = boot_clock() + _REPORTS
        while boot_clock() < ends:
            with contextlib.suppress(errors.CrossfadeError):
                workers = await self._registry.workers(self._new, timeout=_REPORTS)
                told_ = [worker for worker in workers if worker.token[1] == self.now.attempt]
                if all(worker.token == self.now.token and not worker.holds for worker in told_):
                    break
            await asyncio.sleep(_POLL * 5)
        waits = sorted(wait for worker in told_ for wait in worker.waits)
        return Pause(tuple(waits), sum(worker.failed for worker in told_), whole)
