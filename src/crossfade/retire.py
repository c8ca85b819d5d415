"""The end: MongoDB becomes an archive, and nothing of Crossfade's is left in it.

What it promises
    Only in phase ``postgres_only``. The control record says so *first* (`Control.retired`): from then on no worker
    feeds MongoDB or looks for a control record there, and there is no way back. Once every lease of an older record is
    over, what MongoDB is still owed is delivered, and the notes go out of the documents, batch by batch at a bounded
    rate; then the indexes on them, the tombstones, and the control record's copy. A document's own fields stay.

    Killed anywhere, the same command goes on: each step looks for what is still there.

    PostgreSQL's tombstones go last. They kept late images from bringing a deleted record back; PostgreSQL takes no
    image of an older epoch, so by then none can come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from crossfade import errors
from crossfade.clock import boot_clock
from crossfade.control import Control
from crossfade.migration import Migration
from crossfade.phase import Phase
from crossfade.transition import until_all_have_read

#: Documents in one update: a few milliseconds of the server's time.
BATCH = 500


@dataclass(slots=True)
class Left:
    """What is still there of Crossfade's.

    Attributes:
        documents: with notes, by entity.
        indexes: on the notes, by entity.
        tombstones: in MongoDB, and in PostgreSQL.
        control: MongoDB has a copy of the control record.
    """

    documents: dict[str, int] = field(default_factory=dict)
    indexes: dict[str, list[str]] = field(default_factory=dict)
    tombstones: dict[str, int] = field(default_factory=dict)
    control: bool = False

    @property
    def is_nothing(self) -> bool:
        """Whether MongoDB is an archive already."""
        counts = (*self.documents.values(), *self.tombstones.values())
        return not any(counts) and not any(self.indexes.values()) and not self.control


async def what_is_left(migration: Migration) -> Left:
    """Look, and change nothing.

    Raises:
        crossfade.errors.StoreUnavailable: a store does not answer.
    """
    pair, timeout = migration.pair, migration.pair.options.bulk_deadline
    left = Left()
    for name, entity in migration.entities.items():
        left.documents[name] = await pair.mongo.marked(entity, timeout=timeout)
        left.indexes[name] = await pair.mongo.own_indexes(entity, timeout=timeout)
    left.tombstones = {
        "mongo": await pair.mongo.count_tombstones(migration.entities, timeout=timeout),
        "postgres": await pair.postgres.count_tombstones(migration.entities, timeout=timeout),
    }
    left.control = await pair.mongo.control(migration.name, timeout=timeout) is not None
    return left


async def retire(
    migration: Migration, *, by: str, rate: float, on_progress: Callable[[str, int], None] = lambda *_: None
) -> None:
    """Do it; ``rate``: documents a second at most. ``on_progress``: entity, and documents that were seen to.

    Raises:
        crossfade.errors.NotAllowedInPhase: another phase, or MongoDB is owed something.
        crossfade.errors.StoreUnavailable: a store does not answer; the same call goes on.
    """
    pair, timeout = migration.pair, migration.pair.options.bulk_deadline
    await _announce(migration, by)
    await _deliver_what_is_owed(migration)
    for name, entity in migration.entities.items():
        done = 0
        async for number in pair.mongo.unmark(entity, batch=BATCH, timeout=timeout):
            done += number
            on_progress(name, done)
            await asyncio.sleep(number / rate)
        indexes = await pair.mongo.own_indexes(entity, timeout=timeout)
        await pair.mongo.drop_indexes(entity, indexes, timeout=timeout)
    await pair.mongo.forget(migration.name, migration.entities, timeout=timeout)
    dropped = BATCH
    while dropped:
        dropped = await pair.postgres.drop_tombstones(migration.entities, batch=BATCH, timeout=timeout)
        await asyncio.sleep(dropped / rate)


async def _announce(migration: Migration, by: str) -> Control:
    look = await migration.board.refresh()
    control = look.control
    if control.phase is not Phase.POSTGRES_ONLY:
        raise errors.NotAllowedInPhase(
            f"migration {migration.name!r} is in phase {control.phase.value}: MongoDB is retired in postgres_only"
        )
    if control.retired:
        return control
    if any(debt.parked for debt in look.debts):
        raise errors.NotAllowedInPhase(
            "MongoDB refuses records that it is owed, and an archive should have them: see `crossfade debts`"
        )
    # A new epoch: whoever still writes under the old one leaves a note that MongoDB is owed the record.
    after = control.changed(
        by=by, reason="MongoDB is retired", state=control.state, feeding=False, retired=True
    )
    began = boot_clock()
    if not await migration.record.change(control, after, timeout=migration.pair.options.primary_deadline):
        raise errors.NotAllowedInPhase(
            f"somebody else changed migration {migration.name} meanwhile; look at `crossfade status`"
        )
    await until_all_have_read(migration, after, began)
    return after


async def _deliver_what_is_owed(migration: Migration) -> None:
    done = await migration.reconciler.reconcile()
    left = (await migration.board.refresh()).debts
    if left:
        raise errors.NotAllowedInPhase(
            f"MongoDB could not be given {len(left)} records that it is owed "
            f"({done.cause or 'see `crossfade debts`'}); "
            "nothing was removed yet: run it again"
        )
