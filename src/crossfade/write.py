"""The write protocol for single records.

What is the same whichever store decides: who may write now, by which strategy, and what the caller is told. How a
write is decided, and how it reaches the other store, is `primary_mongo`'s and `primary_postgres`'s.

**Unknown outcomes.** A write that was not answered is sent again, the same compare-and-set: of the two only one
can match, so afterwards it is decided, and the operation id says whose it was. Reading alone would decide
nothing: a delayed request can run after the read.

**ROLLBACK_BOTH.** The debt is born tentative, with the values before, in the same update. Success is told only
after a compare-and-set from tentative to confirmed; what is still tentative past its deadline the reconciler
undoes, *whatever the secondary did*: the undo is the newer revision.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from crossfade import errors, observe
from crossfade.board import Pair
from crossfade.clock import boot_clock
from crossfade.control import Control
from crossfade.debt import Settler
from crossfade.delivery import ATTEMPTS
from crossfade.entity import Entity
from crossfade.operation import (
    Background,
    Fate,
    NotAdmitted,
    Operation,
    Request,
    as_stored,
    assert_id,
    assert_writable,
    is_same_id,
)
from crossfade.primary_mongo import MongoPrimary
from crossfade.primary_postgres import PostgresPrimary
from crossfade.query import assert_values
from crossfade.record import Record, new_id, new_operation
from crossfade.strategy import check_strategy, default_strategy
from crossfade.values import Unmappable, id_to_text


@dataclass
class Writer:
    """Writes single records of one migration, in the direction and by the strategy that its phase asks for."""

    pair: Pair
    settler: Settler
    background: Background = field(init=False)
    mongo: MongoPrimary = field(init=False)
    postgres: PostgresPrimary = field(init=False)

    def __post_init__(self) -> None:
        self.background = Background(self.pair.options.background)
        self.mongo = MongoPrimary(self.pair, self.settler, self.background)
        self.postgres = PostgresPrimary(self.pair, self.settler.deliverer, self.background)

    # --- what an application calls (through migration.EntityHandle) ------------------------------------------

    async def insert(self, entity: Entity, document: Mapping[str, Any], request: Request) -> Record:
        """Insert a document; ``_id`` is made where it has none.

        Raises:
            crossfade.errors.DuplicateKey: the id, or a value of a unique rule, is taken.
            crossfade.errors.CrossfadeError: as the strategy has it; see errors.py.
        """
        given = "_id" in document
        whole = as_stored({"_id": document["_id"] if given else new_id(), **document})

        async def run(o: Operation) -> Record:
            if o.control.phase.rules.primary == "mongo":
                return await self.mongo.insert(entity, whole, o, id_given=given)
            return await self.postgres.write(entity, whole["_id"], o, insert=whole)

        return await self._operate(entity, "insert", whole["_id"], request, run)

    async def update(
        self,
        entity: Entity,
        id_: Any,
        request: Request,
        *,
        set_: Mapping[str, Any],
        unset: Iterable[str],
        if_revision: int | None,
    ) -> Record:
        """Set and remove top-level fields.

        Raises:
            crossfade.errors.ConfigurationError: an argument cannot be; no store was asked.
            crossfade.errors.NotFound, StaleRevision, ConditionNotMet, DuplicateKey: nothing was changed.
            crossfade.errors.CrossfadeError: as the strategy has it; see errors.py.
        """
        removed = tuple(unset)
        assert_writable(entity, set_, removed)
        assert_values(entity.name, request.where)
        wrote = as_stored(set_)
        if request.where:
            request = replace(request, where=as_stored(request.where))

        async def run(o: Operation) -> Record:
            if o.control.phase.rules.primary == "mongo":
                return await self.mongo.update(entity, id_, wrote, removed, if_revision, o)
            return await self.postgres.write(
                entity, id_, o, wrote=wrote, removed=removed, if_revision=if_revision
            )

        return await self._operate(entity, "update", id_, request, run)

    async def delete(self, entity: Entity, id_: Any, request: Request) -> None:
        """Delete a record for good: a tombstone keeps it from coming back.

        Raises:
            crossfade.errors.NotFound: nothing was changed.
            crossfade.errors.CrossfadeError: as the strategy has it; see errors.py.
        """

        async def run(o: Operation) -> Record:
            if o.control.phase.rules.primary == "mongo":
                return await self.mongo.delete(entity, id_, o)
            return await self.postgres.write(entity, id_, o)

        await self._operate(entity, "delete", id_, request, run)

    async def close(self) -> None:
        """Wait at most a second for ``mode="async"`` writes under way; their debts stand."""
        await self.background.close()

    # --- the frame of every write -----------------------------------------------------------------------------

    async def _operate(self, entity: Entity, kind: str, id_: Any, request: Request, run: Any) -> Record:
        if any(step.entity == entity.name and is_same_id(step.id, id_) for step in request.steps):
            raise errors.ConfigurationError(
                f"the record of {entity.name} that decides an operation cannot have a step in it: set its fields there"
            )
        for each in (id_, *(step.id for step in request.steps)):
            assert_id(entity, each)
        began = time.perf_counter()
        self.pair.asked = boot_clock()
        options = self.pair.options
        context, strategy, asynchronous = request.context, request.strategy, request.asynchronous
        chosen, fate = strategy, Fate()
        outcome = "failed"
        try:
            for _ in range(ATTEMPTS):
                control = await self._admit()
                chosen = strategy or default_strategy(control.phase, control.strategy)
                check_strategy(chosen, control.phase, asynchronous=asynchronous)
                o = Operation(
                    kind, context, chosen, asynchronous, control, new_operation(),
                    boot_clock() + options.primary_deadline, request, (entity.name, id_to_text(id_)), fate,
                )  # fmt: skip
                with self.pair.board.gate.entered(control.epoch, o.everybody):
                    try:
                        record: Record = await run(o)
                    except NotAdmitted:
                        continue
                    if not (self.pair.board.leased(control.epoch) or await self._same_epoch(control)):
                        raise errors.OutcomeUnknown(
                            f"[{context}] the write was made, but this worker's lease ran out meanwhile: it may not "
                            "tell whether the store it wrote to is still the primary"
                        )
                outcome = "acknowledged"
                return record
            raise errors.Busy(f"[{context}] the phase kept changing while the write was on its way")
        except errors.CrossfadeError as cause:
            outcome = (errors.OutcomeUnknown if fate.leaves_open(cause) else type(cause)).__name__
            if fate.leaves_open(cause):
                raise errors.OutcomeUnknown(
                    f"[{context}] the write may have been made, and what became of it cannot be told: {cause}"
                ) from cause
            raise
        except Unmappable as cause:
            outcome = errors.OutcomeUnknown.__name__
            raise errors.OutcomeUnknown(
                f"[{context}] a foreign writer has put into this record of {entity.name} what cannot be read "
                f"({cause}), so whether the write was made cannot be told; mend the document in MongoDB"
            ) from cause
        finally:
            name = chosen.value if chosen else "default"
            observe.of(observe.WRITES, self.pair.name, entity.name, kind, name, outcome).inc()
            observe.of(observe.WRITE_SECONDS, self.pair.name, kind).observe(time.perf_counter() - began)

    async def _admit(self) -> Control:
        board = self.pair.board
        control = await board.steady()
        if not board.lease_valid:
            # A look may only be late: take one before refusing.
            await board.obtain_lease()
            control = await board.steady()
        return control

    async def _same_epoch(self, control: Control) -> bool:
        """Whether nothing has changed since this control record: no epoch is used again, so none came in between."""
        with contextlib.suppress(errors.CrossfadeError):
            return (await self.pair.board.refresh()).control.epoch == control.epoch
        return False
