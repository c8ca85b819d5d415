"""Changing the phase, the primary included.

Within one primary a change is one compare-and-set and the length of a lease: afterwards every worker that may
acknowledge writes has read it. Across the switch of the primary the order is what matters:

1. *Announce*: "switching", a new epoch, in the old primary's store. Workers hold new writes (they wait).
2. *Fence*: wait out the lease: what is still in flight can no longer be acknowledged.
3. *Only then* drain: sweep for foreign writes and settle every debt. A position read before the fence is how
   others lost writes.
4. *Decide*, the point of no return: one compare-and-set from this attempt's "switching", in the old primary's
   store. Before it, anything unexpected goes back to the old primary the same way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import monotonic

from crossfade import errors
from crossfade.control import STEADY, SWITCHING, Control
from crossfade.guard import debts_in_the_way, guard, refusals
from crossfade.migration import Migration
from crossfade.phase import Phase, check_transition

#: A coordinator waits a lease and one per cent: two clocks may not run at the very same speed.
_SKEW = 1.01


@dataclass(frozen=True, slots=True)
class Changed:
    """What a change of phase did.

    Attributes:
        before, after: the control records.
        forced: guards that did not hold and were overridden by name.
        drained: debts settled inside the switch.
        pause: seconds for which writes waited; 0 within one primary.
    """

    before: Control
    after: Control
    forced: tuple[str, ...]
    drained: int
    pause: float


async def change_phase(
    migration: Migration,
    target: Phase,
    *,
    by: str,
    reason: str,
    force: tuple[str, ...] = (),
    on_step: Callable[[str], None] = lambda _: None,
) -> Changed:
    """Move a migration to ``target``, one phase on or any allowed number back.

    Raises:
        crossfade.errors.NotAllowedInPhase: the step skips a phase, or a guard does not hold.
        crossfade.errors.StoreUnavailable: a store that must answer does not; the phase is unchanged.
    """
    look = await migration.board.refresh()
    before = look.control
    if before.state != STEADY:
        raise errors.NotAllowedInPhase(
            f"migration {migration.name} is switching to {before.target}; if its coordinator is gone, run "
            "`crossfade phase abort`"
        )
    check_transition(before.phase, target, feeding=before.feeding)
    if target is Phase.DUAL_WRITE and before.phase is Phase.MONGO_ONLY:
        on_step("preparing tables, indexes and normalised keys")
        await migration.prepare()
    on_step(f"checking the guard of {target.value}")
    statements = await guard(migration, target)
    in_the_way = refusals(statements, force)
    if in_the_way:
        raise errors.NotAllowedInPhase(
            f"phase {target.value} is refused: "
            + "; ".join(f"[{s.name}] {s.why} (mend: {s.mend})" for s in in_the_way)
        )
    forced = tuple(s.name for s in statements if not s.holds)
    if forced:
        reason = f"{reason} (forced: {', '.join(forced)})"
    if before.phase.rules.primary != target.rules.primary:
        return await _switch(migration, before, target, by=by, reason=reason, forced=forced, on_step=on_step)
    fields: dict[str, object] = {"phase": target}
    if target is Phase.POSTGRES_ONLY:
        until = datetime.now(UTC) + timedelta(seconds=migration.pair.options.feed)
        fields |= {"feeding": True, "feed_until": until.isoformat(timespec="seconds")}
    if target is Phase.DUAL_WRITE and before.phase is Phase.MONGO_ONLY:
        fields["dual_epoch"] = before.epoch + 1
        fields["began_empty"] = await migration.pair.postgres.is_empty(
            migration.entities.values(), timeout=migration.pair.options.primary_deadline
        )
    after = before.changed(by=by, reason=reason, **fields)
    await _set(migration, before, after)
    on_step("waiting until every worker has read it")
    await asyncio.sleep(migration.pair.options.lease * _SKEW)
    return Changed(before, after, forced, 0, 0.0)


async def _set(migration: Migration, before: Control, after: Control) -> None:
    if not await migration.record.change(before, after, timeout=migration.pair.options.primary_deadline):
        raise errors.NotAllowedInPhase(
            f"somebody else changed migration {migration.name} meanwhile; look at `crossfade status`"
        )


async def _switch(
    migration: Migration,
    before: Control,
    target: Phase,
    *,
    by: str,
    reason: str,
    forced: tuple[str, ...],
    on_step: Callable[[str], None],
) -> Changed:
    began = monotonic()
    on_step("announcing the switch: writes wait from now on")
    switching = before.changed(by=by, reason=reason, state=SWITCHING, target=target)
    await _set(migration, before, switching)
    try:
        on_step("fencing: waiting until no older write can be acknowledged")
        await asyncio.sleep(migration.pair.options.lease * _SKEW)
        on_step("draining every debt")
        drained = await _drain(migration, before)
        now = (await migration.board.refresh()).control
        if now.attempt != switching.attempt:
            raise errors.NotAllowedInPhase("the switch was aborted by somebody else")
        # The second look at what the guard said, now that nobody writes.
        in_the_way = refusals(await guard(migration, target), forced)
        if in_the_way:
            raise errors.NotAllowedInPhase(
                "; ".join(f"[{s.name}] {s.why} (mend: {s.mend})" for s in in_the_way)
            )
        on_step(f"deciding: {target.rules.primary} is primary")
        after = switching.changed(
            by=by, reason=reason, state=STEADY, phase=target, target=None, unreadable=None
        )
        await _set(migration, switching, after)
    except BaseException:
        on_step("going back to the old primary")
        await abort(migration, by=by, attempt=switching.attempt)
        raise
    return Changed(before, after, forced, drained, monotonic() - began)


async def _drain(migration: Migration, before: Control) -> int:
    settled = 0
    if before.phase.rules.primary == "mongo":
        await migration.board.refresh()
        settled += await migration.reconciler.full_sweep()
    done = await migration.reconciler.reconcile()
    settled += done.settled
    look = await migration.board.refresh()
    left = await debts_in_the_way(migration, look.debts)
    if left:
        raise errors.NotAllowedInPhase(
            f"{len(left)} debts could not be settled ({done.cause or 'see `crossfade debts`'})"
        )
    return settled


async def abort(migration: Migration, *, by: str, attempt: str | None = None) -> bool:
    """Go back from "switching" to the old primary; False: no switch (of this attempt) is under way.

    Raises:
        crossfade.errors.StoreUnavailable: the old primary cannot be reached.
    """
    seen = await migration.record.look(timeout=migration.pair.options.primary_deadline)
    now = seen.control
    if now is None or now.state != SWITCHING or (attempt is not None and now.attempt != attempt):
        return False
    back = now.changed(by=by, reason="the switch was aborted", state=STEADY, target=None)
    return await migration.record.change(now, back, timeout=migration.pair.options.primary_deadline)


async def set_foreign_writers(migration: Migration, declared: bool, *, by: str) -> Control:
    """Declare whether an old application still writes to MongoDB.

    Raises:
        crossfade.errors.NotAllowedInPhase: somebody else changed the control record meanwhile.
    """
    now = (await migration.board.refresh()).control
    reason = "foreign writers declared" if declared else "foreign writers declared stopped"
    after = now.changed(by=by, reason=reason, foreign_writers=declared)
    await _set(migration, now, after)
    return after
