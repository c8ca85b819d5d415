"""The control record: where a migration stands, the same for every worker.

It is kept in both stores and changed only by compare-and-set on its version, in the store that is primary by
the record being replaced; the other store's copy follows. Of two copies the higher version counts. An epoch is
never reused: each change of phase or state makes the next one, and a write is bound to the epoch that it began
under.

Why a copy that lags does no harm: PostgreSQL refuses an image of an epoch other than its own copy's, so a
write with a newer epoch leaves its debt until the copy has followed; and a worker holds a lease only while the
store that is primary *by the newest record it has seen* answers.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from crossfade import errors
from crossfade.phase import Phase
from crossfade.record import new_operation
from crossfade.stores.mongo import MongoStore
from crossfade.stores.postgres import PostgresStore

STEADY = "steady"
SWITCHING = "switching"


@dataclass(frozen=True, slots=True)
class Control:
    """One version of the control record.

    Attributes:
        migration: its name.
        version: +1 with every change of any kind; the compare-and-set is on it.
        epoch: +1 with every change of phase or state; never reused.
        phase: where the migration stands.
        state: "steady", or "switching": writes wait until the primary is decided.
        target: the phase that a switch under way leads to.
        attempt: id of the change that made this version.
        dual_epoch: the epoch at which dual writing began; evidence older than it counts for nothing.
        phase_epoch: the epoch at which the present phase was entered.
        foreign_writers: an old application still writes to MongoDB.
        began_empty: PostgreSQL was empty when dual writing began.
        feeding: in phase ``postgres_only``: MongoDB still receives images, so that the way back is open.
        feed_until: until when, ISO 8601, UTC; the first worker whose clock has passed it ends it.
        retired: MongoDB is an archive without anything of Crossfade's, and is not asked again.
        unreadable: token of the failure since which nobody may read the secondary; None: it may be read.
        lifting: the reconciler is about to make the secondary readable again.
        changed_at: ISO 8601, UTC, by the clock of whoever changed it; for people only.
    """

    migration: str
    version: int = 1
    epoch: int = 1
    phase: Phase = Phase.MONGO_ONLY
    state: str = STEADY
    target: Phase | None = None
    attempt: str = ""
    dual_epoch: int = 0
    phase_epoch: int = 0
    foreign_writers: bool = False
    began_empty: bool = False
    feeding: bool = False
    feed_until: str = ""
    retired: bool = False
    unreadable: str | None = None
    lifting: bool = False
    changed_at: str = ""
    changed_by: str = ""
    reason: str = ""

    def to_document(self) -> dict[str, Any]:
        """As stored: plain JSON."""
        return asdict(self)

    @classmethod
    def from_document(cls, stored: dict[str, Any]) -> Control:
        """The reverse of `to_document`; fields of a newer release are passed over."""
        known = {name: stored[name] for name in cls.__slots__ if name in stored}
        known["phase"] = Phase(known["phase"])
        known["target"] = None if known.get("target") is None else Phase(known["target"])
        return cls(**known)

    @property
    def dual(self) -> bool:
        """Whether the store that does not decide is owed images."""
        return self.phase.rules.dual or (self.phase is Phase.POSTGRES_ONLY and self.feeding)

    def fed_until(self, now: datetime) -> Control | None:
        """The next version, in which MongoDB is no longer fed, if its time is over."""
        if not self.feeding or not self.feed_until or now < datetime.fromisoformat(self.feed_until):
            return None
        return self.changed(
            by="a worker", reason="MongoDB was fed for its time", state=self.state, feeding=False
        )

    @property
    def postgres_first(self) -> bool:
        """Whether reads try PostgreSQL first.

        In phase 1 they do where nothing can be in MongoDB only: PostgreSQL was empty when dual writing began
        and no foreign writer is declared (what is absent is then asked of MongoDB).
        """
        if self.phase is Phase.DUAL_WRITE:
            return self.began_empty and not self.foreign_writers
        return self.phase.rules.read == "postgres"

    def changed(self, *, by: str, reason: str, **fields: Any) -> Control:
        """The next version, a new epoch if phase or state change."""
        epoch = self.epoch + (1 if any(name in fields for name in ("phase", "state")) else 0)
        enters = fields.get("phase", self.phase) is not self.phase
        return replace(
            self,
            version=self.version + 1,
            epoch=epoch,
            phase_epoch=epoch if enters else self.phase_epoch,
            attempt=new_operation(),
            changed_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            changed_by=by,
            reason=reason,
            **fields,
        )


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look at both copies found.

    Attributes:
        control: the newest version seen; None: neither store has one.
        decisive: the store that is primary by it answered, so the look may renew a lease.
        mongo, postgres: the version that each store holds; None: no record; -1: the store did not answer.
    """

    control: Control | None
    decisive: bool
    mongo: int | None
    postgres: int | None


class ControlRecord:
    """Reads and changes one migration's control record in both stores."""

    def __init__(self, migration: str, mongo: MongoStore, postgres: PostgresStore) -> None:
        self.migration = migration
        self._stores: dict[str, MongoStore | PostgresStore] = {"mongo": mongo, "postgres": postgres}
        self._postgres = postgres
        #: MongoDB is an archive by a record that was seen: nothing of it is looked for there.
        self._retired = False

    async def look(self, *, timeout: float, brief: str | None = None, brief_timeout: float = 0.25) -> Seen:
        """Read both copies at once, each bounded by ``timeout`` seconds, ``brief``'s by ``brief_timeout``."""
        names = [name for name in self._stores if not (self._retired and name == "mongo")]
        answers = await asyncio.gather(
            *(
                self._stores[name].control(
                    self.migration, timeout=brief_timeout if name == brief else timeout
                )
                for name in names
            ),
            return_exceptions=True,
        )
        found: dict[str, Control] = {}
        versions: dict[str, int | None] = {}
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, errors.CrossfadeError):
                # A PostgreSQL without Crossfade's tables has no record, and can be asked.
                versions[name] = None if isinstance(answer, errors.SchemaNotReady) else -1
            elif isinstance(answer, BaseException):
                raise answer
            else:
                versions[name] = None
                if answer is not None:
                    found[name] = Control.from_document(answer)
                    versions[name] = found[name].version
        newest = max(found.values(), key=lambda c: c.version, default=None)
        if newest is not None and newest.retired:
            self._retired, versions["mongo"] = True, newest.version
        decisive = newest is not None and versions[newest.phase.rules.primary] != -1
        return Seen(newest, decisive, versions["mongo"], versions["postgres"])

    async def spread(self, seen: Seen, *, timeout: float) -> None:
        """Bring the copy that lags behind up to the newest version."""
        if seen.control is None:
            return
        record = seen.control.to_document()
        for name, version in (("mongo", seen.mongo), ("postgres", seen.postgres)):
            if version is None or 0 <= version < seen.control.version:
                try:
                    await self._stores[name].copy_control(self.migration, record, timeout=timeout)
                except errors.CrossfadeError:
                    continue  # it is down: the next look finds it lagging still

    async def begin(self, control: Control, *, timeout: float) -> Control:
        """Write the first record, or return the one that another worker wrote first.

        Raises:
            crossfade.errors.StoreUnavailable: the primary of ``control`` cannot be reached.
        """
        seen = await self.look(timeout=timeout)
        if seen.control is not None:
            return seen.control
        primary = self._stores[control.phase.rules.primary]
        await primary.change_control(self.migration, control.to_document(), expected=None, timeout=timeout)
        seen = await self.look(timeout=timeout)
        if seen.control is None:
            raise errors.StoreUnavailable(control.phase.rules.primary, "the control record cannot be read")
        await self.spread(seen, timeout=timeout)
        return seen.control

    async def change(self, old: Control, new: Control, *, timeout: float, copy: bool = True) -> bool:
        """Compare-and-set from ``old`` to ``new`` in the store that is primary by ``old``, then copy.

        ``copy=False``: leave the copy to the next look, because the other store is known not to answer.
        False: somebody else changed it first.
        """
        record = new.to_document()
        primary = old.phase.rules.primary
        if not await self._stores[primary].change_control(
            self.migration, record, expected=old.version, timeout=timeout
        ):
            return False
        if not copy:
            return True
        secondary = old.phase.rules.secondary
        try:
            await self._stores[secondary].copy_control(self.migration, record, timeout=timeout)
            if new.epoch != old.epoch:
                await self._postgres.note_history(
                    self.migration, new.epoch, new.phase.value,
                    changed_by=new.changed_by, reason=f"{new.state}: {new.reason}", timeout=timeout,
                )  # fmt: skip
        except errors.CrossfadeError:
            pass  # decided already; every worker's next look carries the copy over
        return True
