"""The control record: where a migration stands, the same for every worker.

It is kept in both stores and changed only by compare-and-set on its version, in the store that is primary by
the record being replaced; the other store's copy follows. Of two copies the higher version counts. An epoch is
never reused: each change of phase or state makes the next one, and a write is bound to the epoch that it began
under.

Why a copy that lags does no harm: PostgreSQL refuses an image of an epoch other than its own copy's, so a
write with a newer epoch leaves its debt until the copy has followed; and a worker holds a lease only while the
store that is primary *by the newest record it has seen* answers.

The switch of the primary is a sequence of versions of this record, in the *old* primary's store until the last:

========== ======= ============================================================================================
state      writes  what it says
========== ======= ============================================================================================
steady     go on
announced  go on   a switch is coming: workers look every few milliseconds
switching  wait    the fence; the copy in the new primary's store stays behind until every worker is fenced
prepared   wait    drained and verified, and said so in *both* stores before anything is decided
steady     go on   the point of no return: the new phase, under the epoch of *prepared*
========== ======= ============================================================================================

So where the new primary's copy is not *prepared*, nothing was decided. Who sees it prepared and cannot ask the old
store does not know, and writes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from crossfade import errors
from crossfade.clock import boot_clock
from crossfade.phase import Phase
from crossfade.record import new_operation
from crossfade.stores.errors import Unanswered
from crossfade.stores.mongo import MongoStore
from crossfade.stores.postgres import PostgresStore

STEADY = "steady"
ANNOUNCED = "announced"
SWITCHING = "switching"
PREPARED = "prepared"
#: What a person's decision adds to version and epoch: whatever the lost store holds is below.
_ABOVE_ALL = 1_000
#: Seconds between two attempts at a change that was not answered.
_AGAIN = 0.01
#: Versions that one switch makes, and more.
_STEPS = 20


@dataclass(frozen=True, slots=True)
class Control:
    """One version of the control record.

    Attributes:
        migration: its name.
        version: +1 with every change of any kind; the compare-and-set is on it.
        epoch: +1 with every change of phase or state; never reused.
        phase: where the migration stands.
        state: "steady", or how far a switch of the primary is; see the module's docstring.
        target: the phase that a switch under way leads to.
        attempt: id of the switch under way, or of the last one.
        limit: seconds for which that switch may hold writes before anybody goes back from it.
        coordinator: who carries it out, for people: host and process.
        forced: guards of that switch that do not hold and were overridden by name.
        strategy: of writes that ask for none, where the phase allows it; None: the phase's default.
        dual_epoch: the epoch at which dual writing began; evidence older than it counts for nothing.
        phase_epoch: the epoch at which the present phase was entered.
        foreign_writers: an old application still writes to MongoDB.
        began_empty: PostgreSQL was empty when dual writing began.
        feeding: in phase ``postgres_only``: MongoDB still receives images, so that the way back is open.
        feed_until: until when, ISO 8601, UTC; the first worker whose clock has passed it ends it.
        retired: MongoDB is an archive without anything of Crossfade's, and is not asked again.
        unreadable: token of the failure since which nobody may read the secondary; None: it may be read.
        lifting: the reconciler is about to make the secondary readable again.
        since: when the phase was entered: ISO 8601, UTC, by the clock of whoever changed it; for people only.
        changed_at, changed_by, reason: of this version.
    """

    migration: str
    version: int = 1
    epoch: int = 1
    phase: Phase = Phase.MONGO_ONLY
    state: str = STEADY
    target: Phase | None = None
    attempt: str = ""
    limit: float = 2.0
    coordinator: str = ""
    forced: tuple[str, ...] = ()
    strategy: str | None = None
    dual_epoch: int = 0
    phase_epoch: int = 0
    foreign_writers: bool = False
    began_empty: bool = False
    feeding: bool = False
    feed_until: str = ""
    retired: bool = False
    unreadable: str | None = None
    lifting: bool = False
    since: str = ""
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
        known["forced"] = tuple(known.get("forced", ()))
        known["target"] = None if known.get("target") is None else Phase(known["target"])
        return cls(**known)

    @property
    def dual(self) -> bool:
        """Whether the store that does not decide is owed images."""
        return self.phase.rules.dual or (self.phase is Phase.POSTGRES_ONLY and self.feeding)

    def fed_until(self, now: datetime) -> Control | None:
        """The next version, in which MongoDB is no longer fed, if its time is over."""
        fed = self.phase is Phase.POSTGRES_ONLY and self.state == STEADY and self.feeding
        if not fed or not self.feed_until or now < datetime.fromisoformat(self.feed_until):
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

    @property
    def holds_writes(self) -> bool:
        """Whether new writes wait: the primary is being decided."""
        return self.state in (SWITCHING, PREPARED)

    @property
    def token(self) -> tuple[int, str]:
        """What a worker acknowledges: this epoch, and that it has heard of this switch."""
        return self.epoch, self.attempt

    def changed(self, *, by: str, reason: str, **fields: Any) -> Control:
        """The next version, a new epoch if phase or state change."""
        new_epoch = any(name in fields for name in ("phase", "state"))
        return self._next(by, reason, epochs=1 if new_epoch else 0, **fields)

    def announced(
        self, target: Phase, *, by: str, reason: str, limit: float, coordinator: str, forced: tuple[str, ...]
    ) -> Control:
        """A switch is coming; writes go on, so the epoch is the same."""
        return self._next(
            by, reason, state=ANNOUNCED, target=target, attempt=new_operation(), limit=limit,
            coordinator=coordinator, forced=forced,
        )  # fmt: skip

    def announced_again(self) -> Control:
        """The same as another attempt: what workers noted since the first is forgotten."""
        return self._next(self.changed_by, self.reason, attempt=new_operation())

    def taken_over(self, *, by: str, coordinator: str) -> Control:
        """The same switch, carried out by another coordinator: the first one's next step finds another version."""
        return self._next(by, self.reason, coordinator=coordinator)

    def fenced(self) -> Control:
        """Writes wait from now on."""
        return self._next(self.changed_by, self.reason, epochs=1, state=SWITCHING)

    def prepared(self) -> Control:
        """All is drained and verified: what is missing is the decision, under this very epoch."""
        return self._next(self.changed_by, self.reason, epochs=1, state=PREPARED)

    def decided(self, *, reason: str) -> Control:
        """The new primary; no write was made under this epoch before."""
        assert self.target is not None
        return self._next(
            self.changed_by, reason, state=STEADY, phase=self.target, target=None, unreadable=None, lifting=False
        )  # fmt: skip

    def abandoned(self, *, by: str, reason: str) -> Control:
        """Back to the old primary."""
        # The epoch of *prepared* may stand in the other store already.
        return self._next(by, reason, epochs=1 if self.holds_writes else 0, state=STEADY, target=None)

    def resolved(self, *, by: str, reason: str) -> Control:
        """What a person decides when the old primary's store is lost: the new one, above whatever that one holds."""
        return replace(
            self.decided(reason=reason), changed_by=by,
            version=self.version + _ABOVE_ALL, epoch=self.epoch + _ABOVE_ALL,
        )  # fmt: skip

    def _next(self, by: str, reason: str, *, epochs: int = 0, **fields: Any) -> Control:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        if "phase" in fields and fields["phase"] is not self.phase:
            fields |= {"since": now, "phase_epoch": self.epoch + epochs}
        return replace(
            self,
            version=self.version + 1, epoch=self.epoch + epochs, changed_at=now, changed_by=by, reason=reason,
            **fields,
        )  # fmt: skip

    def tells_more_than(self, old: Control | None) -> bool:
        """Whether this version belongs into the history: not the flags that workers set and lift by themselves."""
        kept = ("phase", "state", "foreign_writers", "strategy", "coordinator")
        return old is None or any(getattr(self, name) != getattr(old, name) for name in kept)


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look at both copies found.

    Attributes:
        control: the newest version seen; None: neither store has one.
        decisive: the store that is primary by it answered, so the look may renew a lease.
        mongo, postgres: the version that each store holds; None: no record; -1: the store did not answer.
        copies: the record that each store holds, by store, of those that have one.
    """

    control: Control | None
    decisive: bool
    mongo: int | None
    postgres: int | None
    copies: Mapping[str, Control] = field(default_factory=dict)

    def answered(self, store: str) -> bool:
        """Whether the store did."""
        return (self.mongo if store == "mongo" else self.postgres) != -1

    def not_before(self, known: Control | None) -> Seen:
        """The same, of somebody who has seen a newer version before: a decision is not forgotten with its store."""
        if known is None or (self.control is not None and self.control.version >= known.version):
            return self
        return replace(self, control=known, decisive=self.answered(known.phase.rules.primary))


class ControlRecord:
    """Reads and changes one migration's control record in both stores."""

    def __init__(self, migration: str, mongo: MongoStore, postgres: PostgresStore) -> None:
        self.migration = migration
        self.stores: dict[str, MongoStore | PostgresStore] = {"mongo": mongo, "postgres": postgres}
        #: MongoDB is an archive by a record that was seen: nothing of it is looked for there.
        self._retired = False

    async def look(self, *, timeout: float, brief: str | None = None, brief_timeout: float = 0.25) -> Seen:
        """Read both copies at once, each bounded by ``timeout`` seconds, ``brief``'s by ``brief_timeout``."""
        names = [name for name in self.stores if not (self._retired and name == "mongo")]
        answers = await asyncio.gather(
            *(
                self.stores[name].control(self.migration, timeout=brief_timeout if name == brief else timeout)
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
        return Seen(newest, decisive, versions["mongo"], versions["postgres"], found)

    async def glance(self, known: Control, *, timeout: float) -> bool:
        """Whether the store that is primary by ``known`` still holds just this version.

        Raises:
            crossfade.errors.StoreUnavailable: it does not answer.
        """
        found = await self.stores[known.phase.rules.primary].control(self.migration, timeout=timeout)
        return found is not None and int(found["version"]) == known.version

    async def spread(self, seen: Seen, *, timeout: float) -> dict[str, int]:
        """Bring the copy that lags behind up to the newest version; by its store, the version that it had.

        `spread_history` is to follow, once nobody waits. Not while a switch is under way: what the other store holds
        then says how far it has come.
        """
        lagging: dict[str, int] = {}
        if seen.control is None or seen.control.state != STEADY:
            return lagging
        record = seen.control.to_document()
        for name, version in (("mongo", seen.mongo), ("postgres", seen.postgres)):
            if version is None or 0 <= version < seen.control.version:
                try:
                    await self.stores[name].copy_control(self.migration, record, timeout=timeout)
                except errors.CrossfadeError:
                    continue  # it is down: the next look finds it lagging still
                lagging[name] = version or 0
        return lagging

    async def spread_history(self, lagging: Mapping[str, int], *, timeout: float) -> None:
        """Bring the history to copies that `spread` found behind; what cannot be brought now is left out there."""
        for name, version in lagging.items():
            with contextlib.suppress(errors.CrossfadeError):
                # The other steps of a switch stand in the old primary's store alone.
                await self._copy_history(to=name, after=version - _STEPS, timeout=timeout)

    async def begin(self, control: Control, *, timeout: float) -> Control:
        """Write the first record, or return the one that another worker wrote first.

        Raises:
            crossfade.errors.StoreUnavailable: MongoDB cannot be reached.
        """
        seen = await self.look(timeout=timeout)
        if seen.control is not None:
            return seen.control
        # One store says who was first, whichever is primary: workers may be told different phases to begin in.
        await self.stores["mongo"].change_control(
            self.migration, control.to_document(), expected=None, timeout=timeout
        )
        seen = await self.look(timeout=timeout)
        if seen.control is None:
            raise errors.StoreUnavailable("mongo", "the control record cannot be read")
        await self.spread_history(await self.spread(seen, timeout=timeout), timeout=timeout)
        return seen.control

    async def change(self, old: Control, new: Control, *, timeout: float, copy: bool = True) -> bool:
        """Compare-and-set from ``old`` to ``new`` in the store that is primary by ``old``, then copy.

        ``copy=False``: leave the copy to the next look, because the other store is known not to answer, or is not to
        know yet. False: somebody else changed it first.

        Raises:
            Unanswered: whether it was changed is not known.
            crossfade.errors.StoreUnavailable: it was not.
        """
        primary, secondary = old.phase.rules.primary, old.phase.rules.secondary
        if not await self._compare_and_set(primary, old, new, timeout):
            return False
        told = new.tells_more_than(old)
        if told:
            await self._note(primary, new, timeout=timeout)
        if copy and not (new.retired and secondary == "mongo"):
            # Decided already; where this fails every worker's next look carries the copy over.
            with contextlib.suppress(errors.CrossfadeError):
                await self.copy(new, to=secondary, timeout=timeout)
                if told:
                    await self._note(secondary, new, timeout=timeout)
        return True

    async def _compare_and_set(self, store: str, old: Control, new: Control, timeout: float) -> bool:
        """The same one again where it was not answered: of the two only one can match, so then it is decided."""
        ends = boot_clock() + timeout
        unanswered: Unanswered | None = None
        while True:
            left = max(_AGAIN, ends - boot_clock())
            try:
                made = await self.stores[store].change_control(
                    self.migration, new.to_document(), expected=old.version, timeout=left
                )
                if made or unanswered is None:
                    return made
                found = await self.stores[store].control(self.migration, timeout=left)
            except errors.StoreUnavailable as cause:
                unanswered = cause if isinstance(cause, Unanswered) else unanswered
                if unanswered is None:
                    raise
                if boot_clock() >= ends:
                    raise unanswered from None
                await asyncio.sleep(_AGAIN)
                continue
            latest = None if found is None else Control.from_document(found)
            if latest is None or latest.version > new.version:
                raise unanswered  # upon whose, nobody can tell
            return latest == new

    async def copy(self, control: Control, *, to: str, timeout: float) -> None:
        """Write this version into a store whose copy is older.

        Raises:
            crossfade.errors.CrossfadeError: the store does not answer, or lacks Crossfade's tables.
        """
        await self.stores[to].copy_control(self.migration, control.to_document(), timeout=timeout)

    # --- who changed what, and why ---------------------------------------------------------------------------

    async def _note(self, store: str, control: Control, *, timeout: float) -> None:
        # The change stands: that it cannot be noted must not look as if it did not.
        with contextlib.suppress(errors.CrossfadeError):
            await self.stores[store].note_history(self.migration, [_entry(control)], timeout=timeout)

    async def _copy_history(self, *, to: str, after: int, timeout: float) -> None:
        source = self.stores["postgres" if to == "mongo" else "mongo"]
        entries = await source.history(self.migration, after=after, timeout=timeout)
        await self.stores[to].note_history(self.migration, entries, timeout=timeout)

    async def history(self, *, timeout: float) -> list[dict[str, Any]]:
        """Every change that a person or a coordinator made, the oldest first, of both stores or the one that answers.

        Each is ``version, epoch, phase, state, changed_at`` (ISO 8601, UTC, by the clock of whoever changed it),
        ``changed_by, reason``.

        Raises:
            crossfade.errors.CrossfadeError: neither answers.
        """
        answers = await asyncio.gather(
            *(store.history(self.migration, after=0, timeout=timeout) for store in self.stores.values()),
            return_exceptions=True,
        )
        failed = [answer for answer in answers if isinstance(answer, BaseException)]
        for failure in failed:
            if len(failed) == len(answers) or not isinstance(failure, errors.CrossfadeError):
                raise failure
        found = {
            entry["version"]: entry
            for answer in answers if not isinstance(answer, BaseException)
            for entry in answer
        }  # fmt: skip
        return [found[version] for version in sorted(found)]


def _entry(control: Control) -> dict[str, Any]:
    names = ("version", "epoch", "state", "changed_at", "changed_by", "reason")
    return {"phase": control.phase.value, **{name: getattr(control, name) for name in names}}
