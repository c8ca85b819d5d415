"""What many workers did to a few records, and whether one record after the other could have happened that way.

Every write puts a number of its own into the field ``n``, so a value names its write. All workers share one clock, so
of two operations it is known whether one ended before the other began. Nothing here asks a store.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Told when the primary holds nothing of the write, and never held it.
REFUSED = {
    "StoreUnavailable", "DuplicateKey", "NotFound", "ConditionNotMet", "StaleRevision", "Busy", "Quarantined",
}  # fmt: skip
#: Told when it was taken back, or will be.
TAKEN_BACK = {"Undone", "UndoPending"}


@dataclass(slots=True)
class Event:
    """One operation of one worker upon one record.

    Attributes:
        kind: "insert", "update", "delete", "read", "foreign" (another application's update).
        began, ended: on the common clock; ``ended`` is infinite for one whose worker was killed.
        value: what it wrote into ``n``, or read there; None for a delete, and for a record that was not found.
        told: "acknowledged", or the name of the error; "killed".
        rev: revision that was told; None where none was.
        stale: a read whose answer says that it may be old.
    """

    kind: str
    id: Any
    began: float
    ended: float = float("inf")
    value: int | None = None
    told: str = "killed"
    rev: int | None = None
    stale: bool = False

    @property
    def acknowledged(self) -> bool:
        return self.told == "acknowledged"

    @property
    def over(self) -> float:
        """When it can no longer take effect: a request that nobody has answered may be carried out at any time."""
        return self.ended if self.acknowledged or self.told in REFUSED | TAKEN_BACK else float("inf")

    @property
    def may_stand(self) -> bool:
        """Whether the primary may hold it for good."""
        return self.told not in REFUSED | TAKEN_BACK

    def __str__(self) -> str:
        rev = "" if self.rev is None else f" at revision {self.rev}"
        return f"{self.began:.3f}-{self.ended:.3f} {self.kind} n={self.value}{rev}: {self.told}"


@dataclass
class History:
    """The events of one run, and what is wrong with them."""

    events: list[Event] = field(default_factory=list)

    def violations(self, final: Mapping[Any, tuple[int, int | None] | None]) -> list[str]:
        """What cannot have happened, in words.

        Args:
            final: by id, revision and value that both stores hold at the end; None for a record that is gone.
        """
        by_id: dict[Any, list[Event]] = {}
        for event in self.events:
            by_id.setdefault(event.id, []).append(event)
        found = []
        for id_, events in by_id.items():
            ours = _Record(events, final[id_])
            found += [f"{id_}: {what}" for what in ours.violations()]
        return found

    def of_interest(self, violations: Iterable[str]) -> str:
        """The violations, and all that was told of their records, in order."""
        found = list(violations)
        ids = {violation.partition(":")[0] for violation in found}
        told = sorted((e for e in self.events if str(e.id) in ids), key=lambda e: e.began)
        return "\n".join([*found, "", *(f"{event.id} {event}" for event in told)])


class _Record:
    def __init__(self, events: list[Event], final: tuple[int, int | None] | None) -> None:
        self.writes = [e for e in events if e.kind in ("insert", "update", "foreign")]
        self.deletes = [e for e in events if e.kind == "delete"]
        self.reads = [e for e in events if e.kind == "read" and e.acknowledged]
        self.final = final
        self.told = [e for e in self.writes if e.acknowledged and e.rev is not None]
        self.by_value = {e.value: e for e in self.writes}
        self.has_foreign = any(e.kind == "foreign" for e in self.writes)

    def violations(self) -> Iterable[str]:
        yield from self._a_revision_is_told_once()
        yield from self._revisions_follow_time()
        for read in self.reads:
            yield from self._a_read_is_true(read)
        yield from self._the_end_is_true()

    def _a_revision_is_told_once(self) -> Iterable[str]:
        seen: dict[int, Event] = {}
        for write in self.told:
            assert write.rev is not None
            other = seen.setdefault(write.rev, write)
            if other is not write:
                yield f"revision told twice: {other} and {write}"

    def _revisions_follow_time(self) -> Iterable[str]:
        in_order = sorted(self.told, key=lambda e: e.began)
        done = sorted(self.told, key=lambda e: e.ended)
        highest: Event | None = None
        at = 0
        for write in in_order:
            while at < len(done) and done[at].ended < write.began:
                if highest is None or _rev(done[at]) > _rev(highest):
                    highest = done[at]
                at += 1
            if highest is not None and _rev(write) <= _rev(highest):
                yield f"later write, no higher revision: {highest}, then {write}"

    def _a_read_is_true(self, read: Event) -> Iterable[str]:
        if read.rev is not None and read.value is not None:
            wrote = self.by_value.get(read.value)
            if wrote is None or wrote.began > read.ended:
                yield f"read what nobody had written: {read}"
            elif wrote.told in REFUSED:
                yield f"read what was refused: {read}, of {wrote}"
            elif wrote.rev is not None and wrote.kind != "foreign" and read.rev < wrote.rev:
                yield f"read a value under an older revision than its own: {read}, of {wrote}"
        if read.stale:
            return
        known = [e for e in self.told if e.ended < read.began]
        if not known:
            return
        last = max(known, key=_rev)
        if read.rev is not None and read.rev < _rev(last):
            yield f"read older than acknowledged: {last}, then {read}"
        if read.rev is None and not any(
            d.told not in REFUSED and d.began < read.ended and d.over > last.began for d in self.deletes
        ):
            yield f"not found, and nobody had deleted it: {last}, then {read}"

    def _the_end_is_true(self) -> Iterable[str]:
        last = max(self.told, key=_rev, default=None)
        if self.final is None:
            if last is not None and not any(d.may_stand and d.over > last.began for d in self.deletes):
                yield f"gone, and nobody had deleted it after {last}"
            return
        rev, value = self.final
        if last is not None and rev < _rev(last):
            yield f"the end, revision {rev}, is older than acknowledged: {last}"
        if last is not None and rev == _rev(last) and value != last.value and not self.has_foreign:
            yield f"the end has another value ({value}) at the revision of {last}"
        wrote = self.by_value.get(value)
        if wrote is None:
            yield f"the end holds what nobody wrote: {value}"
            return
        if not wrote.may_stand:
            yield f"the end holds what was refused or taken back: {wrote}"
        for later in self.told:
            if later.began > wrote.over and not self.has_foreign:
                yield f"the end holds {wrote}, and {later} was acknowledged after it"
                break
        for delete in self.deletes:
            if delete.acknowledged and delete.began > wrote.over and wrote.kind != "foreign":
                yield f"back from the dead: {wrote}, then {delete}"
                break


def _rev(event: Event) -> int:
    assert event.rev is not None
    return event.rev
