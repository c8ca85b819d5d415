"""Operations of several records, MongoDB deciding: one record decides, its steps are owed to the others.

The update that decides carries the steps (``_cf.steps``), so there is no instant at which a crash leaves half of an
operation that nobody knows of. Whoever finds steps takes them: the writer, a reconciler, the next writer of that
record.

**Each step is taken once**, whoever comes how late. A record that has taken it names the operation (``_cf.done``), and
the marks go only after the steps are gone from the record that decided. Who takes a step looks at the record *first*
and at the one that decided *afterwards*: if the steps still stand there, the mark had not been erased when the record
was looked at, so its absence means that the step was not taken, and the compare-and-set on the revision seen lets
nobody take it in between. A mark that a crash left behind keeps its record in debt until a reconciler has erased it.

**ROLLBACK_BOTH.** Every record's debt is tentative and names the record that decides; that one's confirmation is the
decision for all. A record whose decider shows no steps of that operation is undone: the steps go only after every
record has been confirmed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bson.int64 import Int64

from crossfade import errors
from crossfade.board import Pair
from crossfade.clock import boot_clock
from crossfade.control import Control
from crossfade.entity import Entity
from crossfade.part import carried_by
from crossfade.record import CF, Debt, Image, Step, Steps, new_operation
from crossfade.stores.errors import Unanswered
from crossfade.stores.mongo import just, same_birth
from crossfade.values import Unmappable, id_to_text, text_to_id

#: A record and its entity.
Placed = tuple[Entity, Image]
#: Records that PostgreSQL is given together at most; operations upon records still in debt add up.
LARGEST_GROUP = 32


def members(entity: Entity, anchor_id: Any, steps: Steps, own: Step | None) -> tuple[tuple[str, str], ...]:
    """Everybody of an operation but the record that ``own`` is for (None: the record that decides)."""
    everybody = [(entity.name, anchor_id, None), *((step.entity, step.id, step) for step in steps.left)]
    return tuple((name, id_to_text(id_)) for name, id_, step in everybody if step is not own)


def joined(group: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Each of them once, the last `LARGEST_GROUP`."""
    return tuple(dict.fromkeys(group))[-LARGEST_GROUP:]


def anchor_note(entity: Entity, id_: Any, op: str) -> dict[str, Any]:
    """How a tentative step, or a mark, names the record that decides."""
    return {"entity": entity.name, "id": id_to_text(id_), "op": op}


@dataclass
class Stepper:
    """Takes, confirms and erases steps in MongoDB."""

    pair: Pair

    async def take(self, entity: Entity, anchor: Image, control: Control, *, ends: float) -> list[Placed]:
        """Take every step that ``anchor`` owes; the records that have taken one, as they are then.

        Raises:
            crossfade.errors.StoreUnavailable: the steps that are left stand.
            crossfade.errors.Busy: a record had an open ``ROLLBACK_BOTH`` write until ``ends`` (`boot_clock`).
            crossfade.errors.Quarantined: the same, and its undo is refused, so it stays open.
        """
        assert anchor.steps is not None
        taken: list[Placed] = []
        for step in anchor.steps.left:
            target = self.pair.entities[step.entity]
            image = await self._take(entity, anchor.id, anchor.steps, target, step, control, ends)
            if image is not None:
                taken.append((target, image))
        return taken

    async def _take(
        self,
        entity: Entity,
        anchor_id: Any,
        steps: Steps,
        target: Entity,
        step: Step,
        control: Control,
        ends: float,
    ) -> Image | None:
        mongo, timeout, op = self.pair.mongo, self.pair.options.primary_deadline, steps.op
        group = members(entity, anchor_id, steps, step)
        while True:
            image = await self._glimpse(target, step)
            if image is not None and any(mark["op"] == op for mark in image.done):
                return await self._whole(target, step.id)
            # In this order: see the module's docstring.
            standing = await self.standing(entity, anchor_id)
            if standing is None or standing.op != op or _is_gone(image):
                return None if image is None or image.deleted else await self._whole(target, step.id)
            assert image is not None
            if not image.is_open:
                set_, unset = step.effect(image.document)
                carried = carried_by(target.parts, image.noted, wrote=set_, removed=unset)
                marks = {
                    f"{CF}.rev": Int64(image.rev + 1),
                    f"{CF}.op": new_operation(),
                    **self._debt(
                        control, None, group if image.debt is None else (*image.debt.group, *group),
                        carried.owed if image.debt is None else (*image.debt.parts, *carried.owed),
                    ),
                }  # fmt: skip
                erased = [f"{CF}.parts.{name}" for name in carried.erased]
                try:
                    done = await mongo.compare_and_set(
                        target, step.id, rev=image.rev, set_={**set_, **marks}, unset=[*unset, *erased],
                        push={f"{CF}.done": anchor_note(entity, anchor_id, op)},
                        also=_unchanged(image, step), left_out=carried.left_out, timeout=timeout,
                    )  # fmt: skip
                except Unanswered:
                    if boot_clock() >= ends:
                        raise
                    done = None
                except Unmappable:
                    return None  # taken; what else the record holds its own debt carries to quarantine
                if done is not None:
                    return done
            if image.is_open and image.debt is not None and image.debt.parked and boot_clock() >= ends:
                raise errors.Quarantined(
                    f"a record of {target.name} has an open write that cannot be taken back"
                )
            await self._pause(target, ends)

    async def _glimpse(self, target: Entity, step: Step) -> Image | None:
        """A record as far as a step is concerned: another field, one that cannot be read even, is no matter."""
        looked_at = (*step.fields, "__v")
        notes = await self.pair.mongo.notes(
            target, step.id, looked_at, timeout=self.pair.options.primary_deadline
        )
        if notes is None:
            return None
        unseen = [name for name in target.parts if name not in step.fields]
        return await self._standing(target, Image.from_document(notes, target.parts, unseen))

    async def _standing(self, target: Entity, image: Image) -> Image | None:
        """None for an insert that a delete overtook: to nobody it is a record."""
        timeout = self.pair.options.primary_deadline
        return next(iter(await self.pair.mongo.standing(target, [image], timeout=timeout)), None)

    async def _whole(self, target: Entity, id_: Any) -> Image | None:
        with contextlib.suppress(Unmappable):
            return await self.pair.mongo.read_owed(target, id_, timeout=self.pair.options.primary_deadline)
        return None

    async def take_open(
        self, entity: Entity, anchor: Image, control: Control, *, ends: float
    ) -> list[Placed]:
        """Take every step tentatively (``ROLLBACK_BOTH``); the records that have taken one.

        Raises:
            crossfade.errors.StoreUnavailable: not every step was taken: undo.
            crossfade.errors.Busy: another open write held a record until ``ends`` (`boot_clock`): undo.
        """
        assert anchor.steps is not None
        taken: list[Placed] = []
        # In one order everywhere, so that two operations seldom wait for each other.
        for step in sorted(anchor.steps.left, key=lambda step: (step.entity, id_to_text(step.id))):
            target = self.pair.entities[step.entity]
            image = await self._take_open(entity, anchor, target, step, control, ends)
            if image is not None:
                taken.append((target, image))
        return taken

    async def _take_open(
        self, entity: Entity, anchor: Image, target: Entity, step: Step, control: Control, ends: float
    ) -> Image | None:
        mongo, timeout = self.pair.mongo, self.pair.options.primary_deadline
        assert anchor.steps is not None
        op = anchor.steps.op
        group = members(entity, anchor.id, anchor.steps, step)
        while True:
            # What it writes of a part must be there, to be put back.
            whole = any(name in target.parts for name in step.fields)
            read = mongo.read if whole else mongo.read_owed
            image = await read(target, step.id, timeout=timeout)
            if image is not None and image.op == op:
                return image
            if image is None or _is_gone(image) or await self._standing(target, image) is None:
                return None
            if not image.is_open:
                set_, unset = step.effect(image.document)
                touched = (*set_, *unset)
                tentative = {
                    "kind": "update",
                    "before": {name: image.document[name] for name in touched if name in image.document},
                    "wrote": dict(set_),
                    "removed": list(unset),
                    "keys": image.keys,
                    "anchor": anchor_note(entity, anchor.id, op),
                }
                carried = carried_by(target.parts, image.noted, wrote=set_, removed=unset)
                marks = {
                    f"{CF}.rev": Int64(image.rev + 1),
                    f"{CF}.op": op,
                    **self._debt(
                        control, tentative, group if image.debt is None else (*image.debt.group, *group),
                        carried.owed if image.debt is None else (*image.debt.parts, *carried.owed),
                    ),
                }  # fmt: skip
                erased = [f"{CF}.parts.{name}" for name in carried.erased]
                try:
                    done = await mongo.compare_and_set(
                        target, step.id, rev=image.rev, set_={**set_, **marks}, unset=[*unset, *erased],
                        also=_unchanged(image, step), left_out=carried.left_out, timeout=timeout,
                    )  # fmt: skip
                except Unanswered:
                    if boot_clock() >= ends:
                        raise
                    done = None
                if done is not None:
                    return done
            await self._pause(target, ends)

    def _debt(
        self,
        control: Control,
        tentative: Mapping[str, Any] | None,
        group: tuple[tuple[str, str], ...],
        parts: tuple[str, ...],
    ) -> dict[str, Any]:
        if not control.phase.rules.dual:
            return {}
        owed = tuple(dict.fromkeys(parts))
        return {f"{CF}.debt": Debt(control.epoch, tentative, group=joined(group), parts=owed).to_document()}

    async def _pause(self, target: Entity, ends: float) -> None:
        if boot_clock() >= ends:
            raise errors.Busy(
                f"a record of {target.name} could not be written in time: others kept writing it"
            )
        await asyncio.sleep(0.02)

    async def standing(self, entity: Entity, id_: Any) -> Steps | None:
        """The steps that a record owes now."""
        notes = await self.pair.mongo.notes(entity, id_, (), timeout=self.pair.options.primary_deadline)
        return None if notes is None else Steps.from_document((notes.get(CF) or {}).get("steps"))

    async def outcome(self, note: Mapping[str, Any]) -> tuple[Entity, Any, Steps | None]:
        """What the record that decides says of a tentative step: its entity, its id, and its steps.

        No steps of that operation: it was undone, or never decided.
        """
        entity, id_ = self.pair.entities[note["entity"]], text_to_id(note["id"])
        standing = await self.standing(entity, id_)
        return entity, id_, standing if standing is not None and standing.op == note["op"] else None

    async def close(self, steps: Steps) -> None:
        """Make every tentative step of a confirmed operation a plain debt."""
        for step in steps.left:
            await self.pair.mongo.close_step(
                self.pair.entities[step.entity],
                step.id,
                op=steps.op,
                timeout=self.pair.options.primary_deadline,
            )

    async def erase_marks(self, entity: Entity, image: Image) -> bool:
        """Erase the marks of a record that its operations, their steps gone everywhere, no longer ask for; all?"""
        all_of_them = True
        for mark in image.done:
            _, _, standing = await self.outcome(mark)
            all_of_them &= standing is None
            if standing is None:
                await self.pair.mongo.erase_mark(
                    entity, image.id, op=mark["op"], timeout=self.pair.options.primary_deadline
                )
        return all_of_them

    async def erase(self, entity: Entity, id_: Any, steps: Steps) -> None:
        """Erase steps that everybody has taken: from the record that decided first, the marks after it."""
        mongo, timeout = self.pair.mongo, self.pair.options.primary_deadline
        await mongo.erase_steps(entity, id_, op=steps.op, timeout=timeout)
        if steps.state == "decided":
            for step in steps.left:
                target = self.pair.entities[step.entity]
                await mongo.erase_mark(target, step.id, op=steps.op, timeout=timeout)


def _is_gone(image: Image | None) -> bool:
    """Whether there is nothing to take a step. A delete that is open may yet be undone: its outcome is waited for."""
    return image is None or (image.deleted and not image.is_open)


def _unchanged(image: Image, step: Step) -> dict[str, Any]:
    """A filter: nobody decided a delete, opened a write, or changed, unknown to us, what the step goes by."""
    looked_at = dict.fromkeys((*step.fields, *(("__v",) if step.add or step.remove else ())))
    return {
        f"{CF}.debt.tentative": {"$exists": False},
        f"{CF}.deleted": {"$ne": True},
        **same_birth(image.op, image.born, image.debt),
        **{
            name: just(image.document[name]) if name in image.document else {"$exists": False}
            for name in looked_at
        },
    }
