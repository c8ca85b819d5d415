"""Who works on a migration: the registry that a coordinator reads instead of waiting out every lease.

Every process that may acknowledge writes has an entry in the store that is primary, *before* the look that gives it a
lease. The entry says which epoch, and which announced switch, the process has acknowledged: it has read them, and no
write of an older epoch is under way in it. A coordinator changes the control record first and reads the registry
afterwards, so it finds everybody whose lease is from before the change.

Who has not acknowledged is fenced by its lease. To keep that wait out of the pause a switch is announced while writes
go on: an announced switch gives no lease to who has not acknowledged it, so whoever is silent then has none by the
time of the fence.

**What is assumed of clocks**: two monotonic clocks run at speeds that differ by less than one per cent. No time of day
is compared, and no process reads another one's clock; the ages in the registry are for people. A clock that runs slower
than that makes a worker acknowledge what it must not; PostgreSQL refuses such a write all the same (its transaction is
bound to an epoch), and in MongoDB it stands out by its debt of an older epoch (`crossfade.strays`).

An entry that has not moved for its ``term`` is taken out by whoever sees that. Its worker, if it is alive, knows by its
own clock that the term has passed, and takes no lease before it has written itself in again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from crossfade import errors
from crossfade.clock import boot_clock
from crossfade.control import STEADY, Control
from crossfade.record import new_operation
from crossfade.stores.mongo import MongoStore
from crossfade.stores.postgres import PostgresStore

#: A coordinator waits a lease and one per cent: two clocks may not run at the very same speed.
SKEW = 1.01
#: Records that a worker names as written since a switch was announced; more, and it says so.
MOST_WRITTEN = 500
#: Held writes whose waits a worker reports one by one.
_MOST_WAITS = 2_000
#: Seconds between two signs of life, and after which an entry without one counts for nothing.
_BEAT = 1.0
_TERM = 10.0


@dataclass(frozen=True, slots=True)
class Worker:
    """An entry of the registry.

    Attributes:
        id, name: which process: a random id; host and process id, for people.
        beat: +1 with every sign of life.
        token: the epoch and the switch that it has acknowledged.
        holds: its writes wait.
        lease, board_age: its `Options.lease` and `Options.board_age`, in seconds.
        term: seconds without a sign of life after which the entry counts for nothing.
        wrote: (entity, id text) written since the switch of ``token`` was announced; None: too many to name.
        waits: seconds that each write waited in that switch; ``failed``: writes that waited in vain.
    """

    id: str
    name: str
    beat: int
    token: tuple[int, str]
    holds: bool
    lease: float
    term: float
    wrote: tuple[tuple[str, str], ...] | None = ()
    waits: tuple[float, ...] = ()
    failed: int = 0
    board_age: float = 0.0

    def to_document(self) -> dict[str, Any]:
        """As stored: plain JSON."""
        return {
            "name": self.name, "beat": self.beat, "epoch": self.token[0], "attempt": self.token[1],
            "holds": self.holds, "lease": self.lease, "term": self.term, "failed": self.failed,
            "board_age": self.board_age,
            "wrote": None if self.wrote is None else [list(key) for key in self.wrote],
            "waits": [round(wait, 4) for wait in self.waits],
        }  # fmt: skip

    @classmethod
    def from_document(cls, id_: str, stored: Mapping[str, Any]) -> Worker:
        """The reverse of `to_document`."""
        wrote = stored["wrote"]
        return cls(
            id_, stored["name"], int(stored["beat"]), (int(stored["epoch"]), stored["attempt"]),
            bool(stored["holds"]), float(stored["lease"]), float(stored["term"]),
            None if wrote is None else tuple((entity, key) for entity, key in wrote),
            tuple(stored["waits"]), int(stored["failed"]), float(stored.get("board_age", 0.0)),
        )  # fmt: skip


@dataclass
class Gate:
    """The writes under way in this process, by the epoch that they were admitted under; and what they waited."""

    _inside: dict[int, int] = field(default_factory=dict)
    _keys: dict[tuple[str, str], int] = field(default_factory=dict)
    _left: asyncio.Event = field(default_factory=asyncio.Event)
    #: The switch that was announced last, and the records written since; None: too many.
    _attempt: str = ""
    _wrote: set[tuple[str, str]] | None = field(default_factory=set)
    _waiting: int = 0
    _went_on: asyncio.Event = field(default_factory=asyncio.Event)
    #: Of the switch that held writes last.
    _held: str = ""
    _waits: list[float] = field(default_factory=list)
    _failed: int = 0

    @contextlib.contextmanager
    def entered(self, epoch: int, keys: Iterable[tuple[str, str]]) -> Iterator[None]:
        """A write of these records is under way, admitted under this epoch."""
        mine = tuple(keys)
        self._inside[epoch] = self._inside.get(epoch, 0) + 1
        for key in mine:
            self._keys[key] = self._keys.get(key, 0) + 1
        self._note_written(mine)
        try:
            yield
        finally:
            self._inside[epoch] -= 1
            if not self._inside[epoch]:
                del self._inside[epoch]
            for key in mine:
                self._keys[key] -= 1
                if not self._keys[key]:
                    del self._keys[key]
            self._left.set()

    def hear_of(self, attempt: str) -> None:
        """From now on remember what is written: a switch was announced."""
        if attempt != self._attempt:
            self._attempt, self._wrote = attempt, set()
            self._note_written(self._keys)

    def _note_written(self, keys: Iterable[tuple[str, str]]) -> None:
        if self._attempt and self._wrote is not None:
            self._wrote.update(keys)
            if len(self._wrote) > MOST_WRITTEN:
                self._wrote = None

    def holds(self, epoch: int) -> bool:
        """Whether a write of this epoch is under way: then this process has acknowledged no later one."""
        return epoch in self._inside

    def is_clear(self, epoch: int) -> bool:
        """Whether nothing of an older epoch is under way."""
        return all(older >= epoch for older in self._inside)

    async def cleared(self, epoch: int) -> None:
        """Wait until nothing of an older epoch is under way."""
        while not self.is_clear(epoch):
            self._left.clear()
            await self._left.wait()

    @contextlib.contextmanager
    def held(self, attempt: str) -> Iterator[None]:
        """A write waits for this switch; how long, and whether in vain, is reported."""
        if attempt != self._held:
            self._held, self._waits, self._failed = attempt, [], 0
        began = boot_clock()
        self._waiting += 1
        try:
            yield
        except errors.Busy:
            self._failed += 1
            raise
        finally:
            self._waiting -= 1
            self._went_on.set()
            if len(self._waits) < _MOST_WAITS:
                self._waits.append(boot_clock() - began)

    async def nobody_waits(self) -> None:
        """Return once those that waited have noted it."""
        while self._waiting:
            self._went_on.clear()
            await self._went_on.wait()

    @property
    def noted(self) -> int:
        """How many waits there are to report."""
        return len(self._waits)

    def report(self, attempt: str) -> dict[str, Any]:
        """What a worker's entry says about this switch."""
        found: dict[str, Any] = {"wrote": (), "waits": (), "failed": 0}
        if attempt and attempt == self._attempt:
            found["wrote"] = None if self._wrote is None else tuple(sorted(self._wrote))
        if attempt and attempt == self._held:
            found |= {"waits": tuple(self._waits), "failed": self._failed}
        return found


class Registry:
    """The registry of one migration, in both stores."""

    def __init__(self, migration: str, stores: Mapping[str, MongoStore | PostgresStore]) -> None:
        self._migration = migration
        self._stores = stores
        #: (store, worker, beat) since when they have been seen so, by `boot_clock`.
        self._seen: dict[tuple[str, str, int], float] = {}

    async def workers(self, store: str, *, timeout: float) -> list[Worker]:
        """Everybody in it, as this store has it.

        Raises:
            crossfade.errors.CrossfadeError: the store does not answer.
        """
        found = await self._stores[store].workers(self._migration, timeout=timeout)
        return [Worker.from_document(*each) for each in found]

    async def silent_for(self, store: str, *, timeout: float) -> dict[str, float]:
        """By worker, seconds since its last sign of life, by this store's clock; for people.

        Raises:
            crossfade.errors.CrossfadeError: the store does not answer.
        """
        return await self._stores[store].silent_for(self._migration, timeout=timeout)

    async def put(self, store: str, worker: Worker, *, timeout: float) -> None:
        """Write an entry.

        Raises:
            crossfade.errors.CrossfadeError: the store does not answer.
        """
        await self._stores[store].put_worker(
            self._migration, worker.id, worker.to_document(), timeout=timeout
        )

    async def drop(self, store: str, worker: str, *, timeout: float) -> None:
        """Take an entry out: its worker has ended, or says so itself."""
        await self._stores[store].drop_worker(self._migration, worker, beat=None, timeout=timeout)

    async def reap(self, store: str, *, timeout: float) -> None:
        """Take out who has not been heard of for its term, by this process's own clock.

        Raises:
            crossfade.errors.CrossfadeError: the store does not answer.
        """
        here = await self.workers(store, timeout=timeout)
        now = boot_clock()
        known = {
            (store, worker.id, worker.beat): self._seen.get((store, worker.id, worker.beat), now)
            for worker in here
        }
        self._seen = {key: since for key, since in self._seen.items() if key[0] != store} | known
        for worker in here:
            if now - known[store, worker.id, worker.beat] > worker.term * SKEW:
                await self._stores[store].drop_worker(
                    self._migration, worker.id, beat=worker.beat, timeout=timeout
                )


@dataclass
class Membership:
    """This process in the registry."""

    registry: Registry
    gate: Gate
    lease: float
    board_age: float
    id: str = field(default_factory=new_operation)
    name: str = field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}")
    token: tuple[int, str] = (0, "")
    _holds: bool = False
    _beat: int = 0
    _told: int = 0
    #: By store: when the last sign of life was begun, and when it was written.
    _signs: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def term(self) -> float:
        """Seconds for which one sign of life counts."""
        return max(_TERM, self.lease * 2)

    def grants(self, control: Control, look: float) -> bool:
        """Whether a look at this record that began at ``look`` gives a lease.

        The entry stands in the primary's store since before, and whoever takes out what is silent leaves it there for
        the lease's length. An announced switch gives none to who has not acknowledged it; see the module's docstring.
        """
        began, written = self._signs.get(control.phase.rules.primary, (float("-inf"), float("inf")))
        stands = written < look and look - began <= self.term - self.lease
        return stands and (control.state == STEADY or self.token == control.token)

    def is_due(self, control: Control) -> bool:
        """Whether there is something to tell: a new epoch, a new switch, waits; or that this process lives."""
        began, _ = self._signs.get(control.phase.rules.primary, (float("-inf"), 0.0))
        news = (self.token, self._holds, self._told) != (control.token, control.holds_writes, self.gate.noted)
        return news or boot_clock() - began >= _BEAT

    async def sign(self, control: Control, *, timeout: float, secondary: float) -> None:
        """Write the entry into both stores: this record is acknowledged.

        ``secondary``: seconds that the other store has; 0: it is not asked.

        Raises:
            crossfade.errors.CrossfadeError: the primary's store does not answer.
        """
        self._beat += 1
        told = self.gate.noted
        me = Worker(
            self.id, self.name, self._beat, control.token, control.holds_writes, self.lease, self.term,
            board_age=self.board_age, **self.gate.report(control.attempt),
        )  # fmt: skip
        rules = control.phase.rules

        async def put(store: str, seconds: float) -> None:
            began = boot_clock()
            await self.registry.put(store, me, timeout=seconds)
            self._signs[store] = (began, boot_clock())

        async def put_there_too() -> None:
            with contextlib.suppress(errors.CrossfadeError):
                await put(rules.secondary, secondary)

        both = [put(rules.primary, timeout), *([put_there_too()] if secondary else [])]
        await asyncio.gather(*both)
        self.token, self._holds, self._told = control.token, control.holds_writes, told

    async def leave(self, *, timeout: float) -> None:
        """Take the entry out of both stores: nothing is acknowledged any more."""

        async def drop(store: str) -> None:
            with contextlib.suppress(errors.CrossfadeError):
                await self.registry.drop(store, self.id, timeout=timeout)

        # No look may give a lease while the entry is on its way out.
        stores = list(self._signs)
        self._signs.clear()
        await asyncio.gather(*(drop(store) for store in stores))
