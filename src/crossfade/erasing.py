"""Erasing debts that the secondary has confirmed, many in one request, behind the caller's back.

A debt is erased where revision and operation id still match, so a newer write keeps its own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from crossfade import errors
from crossfade.board import Pair, end
from crossfade.entity import Entity
from crossfade.part import Part
from crossfade.record import DebtKey, Image, acceptable_key
from crossfade.values import Unmappable


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


def is_misnamed(entity: Entity, image: Image) -> bool:
    """Whether its keys are another name's: a foreign writer renamed it, and no sweep sees that in what is settled."""
    with contextlib.suppress(Unmappable):
        named = entity.keys(image.document)
        for rule in entity.unique:  # what another release calls a rule is that one's to see to
            key, stamped = named.get(rule.rule), image.keys.get(rule.rule)
            if not (stamped is None if key is None else acceptable_key(stamped, key, image.id)):
                return True
    return False  # it goes to quarantine


@dataclass
class Eraser:
    """Erases the debts of one migration in one worker."""

    pair: Pair
    _queue: asyncio.Queue[_Confirmed] = field(default_factory=lambda: asyncio.Queue(10_000))
    _task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to erase confirmed debts in the background."""
        self._task = asyncio.create_task(self._erase(), name=f"settling {self.pair.name}")

    async def stop(self) -> None:
        """Erase what is confirmed already, for at most a second; the rest costs an idempotent re-apply."""
        if self._task is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self.join()
        await end(self._task)

    def soon(self, entity: Entity, image: Image, behind: Sequence[asyncio.Task[None]] = ()) -> None:
        """Erase a confirmed debt with the next batch; a full queue leaves it to the reconciler.

        ``behind``: see `PostgresStore.apply`. If that fails, the debt stands. So does that of a record that has to be
        stamped anew: the reconciler does that.
        """
        if image.debt is not None and not image.debt.delivery and is_misnamed(entity, image):
            return
        if (key := confirmed(entity, image)) is not None:
            with contextlib.suppress(asyncio.QueueFull):
                self._queue.put_nowait(_Confirmed(entity, key, tuple(behind)))

    async def join(self) -> None:
        """Wait until nothing is left to erase."""
        await self._queue.join()

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


@dataclass(frozen=True, slots=True)
class _Confirmed:
    """A debt to be erased, once what goes on ``behind`` the commit that confirmed it has succeeded."""

    entity: Entity
    key: DebtKey
    behind: tuple[asyncio.Task[None], ...]

    def looked_again(self) -> bool:
        return all(task.done() and not task.cancelled() and task.exception() is None for task in self.behind)
