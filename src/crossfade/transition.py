"""Changing the phase: the guard, the step, and the guard once more inside the step.

Within one primary a step is one compare-and-set; it has been made once every worker that may acknowledge writes has
read it. What the guard saw may have ended between the question and the step, so it is asked again afterwards, and the
step taken back where it no longer holds. Where the primary changes the step is `crossfade.switch`, which asks while
writes wait.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from crossfade import errors
from crossfade.clock import boot_clock
from crossfade.control import STEADY, Control
from crossfade.guard import Statement, guard, refusals, told
from crossfade.migration import Migration
from crossfade.phase import Phase
from crossfade.stores.errors import Unanswered
from crossfade.strategy import FailureStrategy, check_strategy
from crossfade.switch import PAUSE_LIMIT, Changed, OnStep, assert_is_next, switch
from crossfade.values import Unmappable
from crossfade.workers import SKEW, Registry

#: Seconds between two looks whether every worker has read it.
_POLL = 0.05
#: Rows that are asked for at once.
_ROWS = 1_000
#: How often keys are stamped before they are found missing: an old application that goes on writing never waits.
_STAMPINGS = 10


def next_phase(here: Phase) -> Phase:
    """The one after.

    Raises:
        crossfade.errors.NotAllowedInPhase: there is none.
    """
    if here is Phase.POSTGRES_ONLY:
        raise errors.NotAllowedInPhase("postgres_only is the last phase")
    return list(Phase)[here.number + 1]


def phase_before(here: Phase) -> Phase:
    """The one before.

    Raises:
        crossfade.errors.NotAllowedInPhase: there is none.
    """
    if here is Phase.MONGO_ONLY:
        raise errors.NotAllowedInPhase("mongo_only is the first phase")
    return list(Phase)[here.number - 1]


async def change_phase(
    migration: Migration,
    target: Phase,
    *,
    by: str,
    reason: str,
    force: tuple[str, ...] = (),
    limit: float = PAUSE_LIMIT,
    on_step: OnStep = lambda _: None,
) -> Changed:
    """Move a migration to ``target``, one phase on or any allowed number back.

    ``force``: guards by name that need not hold; the history says so. ``limit``: seconds for which a switch of the
    primary may hold writes.

    Raises:
        crossfade.errors.NotAllowedInPhase: the step skips a phase, or a guard does not hold; the phase is unchanged.
        crossfade.errors.StoreUnavailable: a store that must answer does not; the phase is unchanged.
        crossfade.errors.OutcomeUnknown: the primary was asked to change it, and does not say whether it has; or it has,
            and does not say who has read it.
    """
    before = (await migration.board.refresh()).control
    assert_is_next(before, target)
    if target is Phase.DUAL_WRITE and before.phase is Phase.MONGO_ONLY:
        on_step("preparing tables, indexes and normalised keys")
        await migration.prepare()
    on_step(f"checking the guard of {target.value}")
    statements = await _ask(migration, target)
    _assert_holds(statements, force, target)
    forced = tuple(s.name for s in statements if not s.holds)
    if forced:
        reason = f"{reason} (forced: {', '.join(forced)})"
    if before.phase.rules.primary != target.rules.primary:
        return await switch(
            migration, target, by=by, reason=reason, forced=force, limit=limit, on_step=on_step
        )
    fields: dict[str, object] = {"phase": target}
    began_empty = False
    if target is Phase.POSTGRES_ONLY:
        until = datetime.now(UTC) + timedelta(seconds=migration.pair.options.feed)
        fields |= {"feeding": True, "feed_until": until.isoformat(timespec="seconds")}
    if target is Phase.DUAL_WRITE and before.phase is Phase.MONGO_ONLY:
        fields |= {"dual_epoch": before.epoch + 1, "began_empty": False}
        began_empty = await migration.pair.postgres.is_empty(
            migration.entities.values(), timeout=migration.pair.options.primary_deadline
        )
    began = boot_clock()
    after = await _change(migration, before, lambda now: now.changed(by=by, reason=reason, **fields))
    on_step("waiting until every worker has read it")
    try:
        silent = await until_all_have_read(migration, after, began)
        _assert_holds(await _ask(migration, target, before=before), force, target)
    except (errors.NotAllowedInPhase, errors.StoreUnavailable) as cause:
        back = str(cause)
        if target.number < before.phase.number:
            raise errors.OutcomeUnknown(
                f"phase {target.value} was entered; who has read it is not known: {back}"
            ) from cause
        on_step("going back: the guard no longer holds, or cannot be asked")
        try:
            await _change(migration, after, lambda now: now.changed(by=by, reason=back, phase=before.phase))
        except errors.StoreUnavailable as lost:
            raise errors.OutcomeUnknown(
                f"phase {target.value} was entered, and could not be left again ({lost}) although: {back}"
            ) from cause
        raise
    if began_empty:
        on_step("comparing the first rows")
        after = await _began_empty(migration, after)
    with contextlib.suppress(errors.StoreUnavailable):  # it stands, whoever sees it when
        await migration.board.refresh()
    return Changed(before, after, forced, silent=silent)


async def _began_empty(migration: Migration, control: Control) -> Control:
    """Let PostgreSQL be read, which was empty before every worker wrote to both stores.

    Until then those that had not read so wrote to MongoDB alone: upon what others had brought to PostgreSQL, too. If
    that cannot be compared now, MongoDB is read until phase `postgres_read`.
    """
    pair, timeout = migration.pair, migration.pair.options.bulk_deadline
    try:
        await migration.board.refresh()
        for entity in migration.entities.values():
            ids: list[Any] = []
            after = ""
            while rows := await pair.postgres.ids_after(entity, after, limit=_ROWS, timeout=timeout):
                after = rows[-1][0]
                ids += [id_ for _, id_, _ in rows]
            for at in range(0, len(ids), _ROWS):
                for _, id_ in await migration.reconciler.unlike([(entity, i) for i in ids[at : at + _ROWS]]):
                    await migration.settler.settle_one(entity, id_, control)
        return await _change(
            migration,
            control,
            lambda now: now.changed(by=now.changed_by, reason=now.reason, began_empty=True),
        )
    except (errors.CrossfadeError, Unmappable):
        return control


async def _ask(migration: Migration, target: Phase, before: Control | None = None) -> list[Statement]:
    """What the guard says; documents that an old application has just written without keys get them first."""
    for _ in range(_STAMPINGS):
        statements = await guard(migration, target, before=before)
        if all(statement.holds or statement.name != "keys" for statement in statements):
            break
        if any((await migration.prepare()).no_room.values()):
            break  # these have none the next time either
    return statements


def _assert_holds(statements: Sequence[Statement], force: tuple[str, ...], target: Phase) -> None:
    in_the_way = refusals(statements, force)
    if in_the_way:
        raise errors.NotAllowedInPhase(f"phase {target.value} is refused: {told(in_the_way)}")


async def until_all_have_read(migration: Migration, control: Control, began: float) -> tuple[str, ...]:
    """Return once no worker acts by an older record: each has acknowledged this one, or has no lease; who has not."""
    registry = Registry(migration.name, migration.record.stores)
    options = migration.pair.options
    while True:
        if not migration.board.is_running:
            await migration.board.refresh()  # this process may be in the registry, too
        workers = await registry.workers(control.phase.rules.primary, timeout=options.primary_deadline)
        silent = [worker for worker in workers if worker.token[0] < control.epoch]
        lease = max([options.lease, *(worker.lease for worker in silent)])
        if not silent or boot_clock() - began > lease * SKEW:
            return tuple(worker.name for worker in silent)
        await asyncio.sleep(_POLL)


async def _change(migration: Migration, before: Control, make: Callable[[Control], Control]) -> Control:
    """The record after ``before``; flags that workers set or lift meanwhile stand in nobody's way.

    Before PostgreSQL is read no more nobody may read it: who has heard of the step warns nobody of what he leaves owed,
    or leaves no debt at all, and who has not would go on serving rows.
    """
    board, now = migration.board, before
    token = board.new_token()
    stands = ""
    for _ in range(8):
        after = make(now)
        if now.postgres_first and not after.postgres_first and now.unreadable != stands:
            stands = await board.mark_unreadable(token)
        else:
            if now.unreadable == token:
                after = replace(after, unreadable=None, lifting=False)
            try:
                if await migration.record.change(now, after, timeout=migration.pair.options.primary_deadline):
                    return after
            except Unanswered as cause:
                raise errors.OutcomeUnknown(
                    f"whether migration {migration.name} was changed was not answered; look at `crossfade status`: "
                    f"{cause}"
                ) from cause
        now = (await board.refresh()).control
        if now.token != before.token or now.state != STEADY or now.foreign_writers != before.foreign_writers:
            break
    raise errors.NotAllowedInPhase(
        f"somebody else changed migration {migration.name} meanwhile; look at `crossfade status`"
    )


async def set_foreign_writers(migration: Migration, declared: bool, *, by: str) -> Control:
    """Declare whether an old application still writes to MongoDB.

    Raises:
        crossfade.errors.NotAllowedInPhase: somebody else changed the control record meanwhile.
    """
    now = (await migration.board.refresh()).control
    reason = "foreign writers declared" if declared else "foreign writers declared stopped"
    return await _change(
        migration, now, lambda control: control.changed(by=by, reason=reason, foreign_writers=declared)
    )


async def set_strategy(migration: Migration, strategy: FailureStrategy | None, *, by: str) -> Control:
    """Choose the strategy of writes that ask for none, on every worker from its next look on; None: the phase's own.

    Raises:
        crossfade.errors.NotAllowedInPhase: the phase does not allow it, or somebody else changed the record meanwhile.
    """
    now = (await migration.board.refresh()).control
    if strategy is not None:
        check_strategy(strategy, now.phase)
    reason = f"strategy {strategy.value if strategy else 'of the phase'}"
    chosen = strategy.value if strategy else None
    after = await _change(
        migration, now, lambda control: control.changed(by=by, reason=reason, strategy=chosen)
    )
    await migration.board.refresh()
    return after
