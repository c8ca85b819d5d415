"""A record at one revision: its image, and the notes kept beside it in the document (pure).

A document carries ``_cf: {rev, op, born, keys, parts, debt, deleted, steps, done}``, unknown to and preserved by an
application that updates with ``$set``. ``debt`` exists only while the secondary has not confirmed the revision:
settling is ``$unset``, so a sparse index on it finds every debt. A document without ``_cf`` is at revision 0.
``steps`` is what a decided operation still owes to other records, ``done`` the operations whose step this record
has taken, ``born`` the insert that made it, ``parts`` the large fields that the secondary holds (`crossfade.part`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

from bson import ObjectId
from bson.int64 import Int64

from crossfade import errors
from crossfade.part import Part, digest_with, left_out_of, noted_parts, parts_of, with_left_out
from crossfade.values import decode_canonical, decode_document, encode_document, id_to_text, notes_beside

#: The sub-document that holds Crossfade's notes.
CF = "_cf"


def new_id() -> ObjectId:
    """A fresh id, made in the application before any write, the same in both stores."""
    return ObjectId()


def new_operation() -> str:
    """A fresh operation id (32 hex characters): tells a retry from a rival."""
    return os.urandom(16).hex()


@dataclass(frozen=True, slots=True)
class Debt:
    """What the primary notes about a revision that the secondary has not confirmed.

    Attributes:
        epoch: the control record's epoch under which the write was made.
        tentative: ``ROLLBACK_BOTH`` only, until success may be told: the values before the write
            (``{"kind": "insert" | "update" | "delete", "before": {field: value}, "wrote": {...}, "removed": [...]}``;
            of a step, "anchor": the record that decides).
        parked: why the secondary refuses it (a rule violated there only), else None.
        group: the other records of an operation of several, as (entity, id text): the secondary gets them together.
        delivery: MongoDB is the secondary and owes nothing: an insert that was delivered, until it is known to stand.
        sending: of an insert, which of its sendings made this document. One that was not answered is sent again, and
            may arrive when the record has been deleted: what was confirmed of another sending does not settle it.
        parts: the parts that were written since the secondary confirmed any revision.
    """

    epoch: int
    tentative: Mapping[str, Any] | None = None
    parked: str | None = None
    group: tuple[tuple[str, str], ...] = ()
    delivery: bool = False
    sending: str | None = None
    parts: tuple[str, ...] = ()

    def to_document(self) -> dict[str, Any]:
        """As kept under ``_cf.debt``."""
        note: dict[str, Any] = {"epoch": Int64(self.epoch)}
        if self.delivery:
            note["delivery"] = True
        if self.tentative is not None:
            note["tentative"] = dict(self.tentative)
        if self.parked is not None:
            note["parked"] = self.parked
        if self.group:
            note["group"] = [list(member) for member in self.group]
        if self.sending is not None:
            note["sending"] = self.sending
        if self.parts:
            note["parts"] = list(self.parts)
        return note

    @classmethod
    def from_document(cls, note: Mapping[str, Any] | None) -> Debt | None:
        """The reverse of `to_document`; None for none."""
        if note is None:
            return None
        group = tuple((entity, id_) for entity, id_ in note.get("group", ()))
        return cls(
            int(note.get("epoch", 0)),
            note.get("tentative"),
            note.get("parked"),
            group,
            bool(note.get("delivery")),
            note.get("sending"),
            tuple(note.get("parts", ())),
        )


class DebtKey(NamedTuple):
    """What a confirmed debt is erased by: all of it must stand there still.

    Attributes:
        id, rev, op, sending: of the image that was confirmed.
        parts: what is noted in the same update: of a part, that the secondary holds it; None: that it does not.
    """

    id: Any
    rev: int
    op: str
    sending: str | None
    parts: tuple[tuple[str, Part | None], ...] = ()


def stamped_keys(notes: Mapping[str, Any]) -> dict[str, str]:
    """The normalised keys by rule in ``_cf``.

    An open ``ROLLBACK_BOTH`` write holds two, the new one first: the old one must not be taken before its outcome. One
    that leaves the record without a name holds the old one alone.
    """
    found = {
        rule: key if isinstance(key, list) else [key, key] for rule, key in (notes.get("keys") or {}).items()
    }
    return {rule: keys[0] for rule, keys in found.items() if len(keys) > 1}


@dataclass(frozen=True, slots=True)
class Step:
    """One change that an operation of several records makes to another record than the one that decides.

    It needs no condition, so once the operation is decided it can be taken at any time, by anybody. A record that
    is not there, or no longer, has nothing to take.

    Attributes:
        entity: the entity's name.
        id: the record's ``_id``.
        set, unset: fields set to a value; fields removed.
        add: by field, values put at the end of an array that does not hold them already.
        remove: by field, values taken out of an array.
    """

    entity: str
    id: Any
    set: Mapping[str, Any] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    add: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    remove: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field that it may change."""
        return (*self.set, *self.unset, *self.add, *self.remove)

    def effect(self, document: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """What it does to this document: fields with their new values, fields to remove; both may be empty.

        A field that should hold an array and holds something else is taken for an empty one. ``__v``, by which
        Mongoose notices that an array has changed, is counted up.
        """
        after = dict(self.set)
        for name in {*self.add, *self.remove}:
            there = document.get(name)
            values = list(there) if isinstance(there, list) else []
            values = [value for value in values if value not in self.remove.get(name, ())]
            values += [value for value in self.add.get(name, ()) if value not in values]
            if values != there and (values or isinstance(there, list)):
                after[name] = values
                version = document.get("__v")
                if isinstance(version, int) and "__v" not in self.set:
                    after["__v"] = version + 1
        return after, [name for name in self.unset if name in document]

    def to_document(self) -> dict[str, Any]:
        """As kept under ``_cf.steps.left``."""
        return {
            "entity": self.entity,
            "id": self.id,
            "set": dict(self.set),
            "unset": list(self.unset),
            "add": {name: list(values) for name, values in self.add.items()},
            "remove": {name: list(values) for name, values in self.remove.items()},
        }

    @classmethod
    def from_document(cls, note: Mapping[str, Any]) -> Step:
        """The reverse of `to_document`."""
        return cls(
            note["entity"],
            note["id"],
            note["set"],
            tuple(note["unset"]),
            {name: tuple(values) for name, values in note["add"].items()},
            {name: tuple(values) for name, values in note["remove"].items()},
        )


@dataclass(frozen=True, slots=True)
class Steps:
    """What an operation owes to other records, noted in the record that decides it.

    Attributes:
        op: the operation's id.
        left: the steps.
        state: "decided": to be taken, by whoever finds them. ``ROLLBACK_BOTH``: "open" until success may be told, then
            "confirmed": all were taken, and are to be closed.
    """

    op: str
    left: tuple[Step, ...]
    state: str = "decided"

    def to_document(self) -> dict[str, Any]:
        """As kept under ``_cf.steps``."""
        return {"op": self.op, "state": self.state, "left": [step.to_document() for step in self.left]}

    @classmethod
    def from_document(cls, note: Mapping[str, Any] | None) -> Steps | None:
        """The reverse of `to_document`; None for none."""
        if note is None:
            return None
        return cls(note["op"], tuple(map(Step.from_document, note["left"])), note["state"])


@dataclass(frozen=True, slots=True)
class Image:
    """The whole state of a record at one revision; a part that the secondary holds may be left out of it.

    Attributes:
        id: the document's ``_id``.
        document: the document with ``_id`` and without ``_cf``; not to be changed. A part that was left out is a
            `Part`.
        rev: revision; 0 for a document never written through Crossfade.
        op: operation id of the write that made this revision; None at revision 0.
        keys: normalised keys by rule, as stamped in the document.
        digest: of ``document``, its parts replaced by their own digests; 16 bytes.
        debt: the debt noted in the document, if any.
        deleted: the delete has been decided; readers and writers treat the record as gone.
        delivered: PostgreSQL primary only: digest of what the last delivery left here.
        steps: what an operation that this record decided still owes to others.
        done: the operations of others whose step this record has taken, while they may be asked for again:
            ``{"op": id, "entity": ..., "id": id text of the record that decided}``.
        born: operation id of the insert that made the record; None when Crossfade did not.
        parts: its parts by field, left out or not.
        noted: those that the document notes as confirmed.
        unknown: it was read without parts that it has no note of: ``digest`` says nothing, and it is no base of writes.
    """

    id: Any
    document: dict[str, Any]
    rev: int
    op: str | None
    keys: dict[str, str]
    digest: bytes
    debt: Debt | None = None
    deleted: bool = False
    delivered: bytes | None = None
    steps: Steps | None = None
    done: tuple[Mapping[str, str], ...] = ()
    born: str | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)
    noted: Mapping[str, Part] = field(default_factory=dict)
    unknown: bool = False

    @property
    def left_out(self) -> frozenset[str]:
        """The parts that it was read or made without."""
        return left_out_of(self.document) if self.parts else frozenset()

    @property
    def is_open(self) -> bool:
        """Whether a ``ROLLBACK_BOTH`` write of it still waits for its outcome."""
        return self.debt is not None and self.debt.tentative is not None

    @property
    def is_newborn(self) -> bool:
        """Whether it is as its insert made it, and still in debt: nobody may have told of it yet.

        So is an insert that was delivered: it may have come after the delete of its record.
        """
        return self.debt is not None and (
            self.debt.delivery or (self.op is not None and self.op == self.born)
        )

    @property
    def debt_key(self) -> DebtKey | None:
        """What its debt is erased by; None of a document that Crossfade never wrote."""
        sending = None if self.debt is None else self.debt.sending
        return None if self.op is None else DebtKey(self.id, self.rev, self.op, sending)

    def kept(self) -> Callable[[], Image]:
        """What gives this image as it is now, whatever becomes of its values; to be made when it is needed."""
        return self.kept_in_bytes()[0]

    def kept_in_bytes(self) -> tuple[Callable[[], Image], bytes]:
        """`kept`, and the canonical bytes of the document that it is made of, parts that were left out apart."""
        left_out = {name: value for name, value in self.document.items() if isinstance(value, Part)}
        names = list(self.document)
        values = encode_document({n: v for n, v in self.document.items() if n not in left_out})

        def image() -> Image:
            there = decode_canonical(values) | left_out
            return replace(self, document={name: there[name] for name in names})

        return image, values

    @classmethod
    def from_raw(cls, raw: bytes, parts: Sequence[str] = (), left_out: Iterable[str] = ()) -> Image:
        """The image that a stored document stands for.

        Args:
            raw: the document's bytes.
            parts: the entity's parts.
            left_out: those that the document was read without.

        Raises:
            crossfade.values.Unmappable: the bytes hold what cannot be carried back unchanged.
        """
        return cls.from_document(decode_document(raw), parts, left_out)

    @classmethod
    def from_document(
        cls, document: dict[str, Any], parts: Sequence[str] = (), left_out: Iterable[str] = ()
    ) -> Image:
        """Like `from_raw`, of a decoded document; takes the document over."""
        notes = document.pop(CF, None)
        return cls._noted(document, notes if isinstance(notes, Mapping) else {}, parts, left_out)

    def in_raw(self, raw: bytes, parts: Sequence[str]) -> Image | None:
        """What `from_raw` makes of bytes that hold this image's document, whole; None: they hold another.

        To compare bytes costs a tenth of what it takes to decode them and to be sure of it.
        """
        if self.parts:
            return None
        notes = notes_beside(encode_document(self.document), raw)
        if notes is None:
            return None
        return self._noted(self.document, decode_document(notes), parts, (), self.digest)

    @classmethod
    def _noted(
        cls,
        document: dict[str, Any],
        notes: Mapping[str, Any],
        parts: Sequence[str],
        left_out: Iterable[str],
        digest: bytes | None = None,
    ) -> Image:
        rev = int(notes.get("rev", 0))
        noted = noted_parts(notes, parts)
        missing = {name: noted.get(name) for name in left_out}
        document = with_left_out(document, {name: part for name, part in missing.items() if part})
        its_parts = parts_of(document, parts, noted, rev)
        return cls(
            id=document["_id"],
            document=document,
            rev=rev,
            op=notes.get("op"),
            keys=stamped_keys(notes),
            digest=digest or digest_with(document, its_parts),
            debt=Debt.from_document(notes.get("debt")),
            deleted=bool(notes.get("deleted", False)),
            delivered=bytes(notes["digest"]) if "digest" in notes else None,
            steps=Steps.from_document(notes.get("steps")),
            done=tuple(notes.get("done", ())),
            born=notes.get("born"),
            parts=its_parts,
            noted=noted,
            unknown=None in missing.values(),
        )


class Applied(StrEnum):
    """How applying an image to the secondary ended."""

    APPLIED = "applied"
    SAME = "same"
    #: The row is newer, or equal in revision and other in content. Not a confirmation: re-read the primary.
    BEHIND = "behind"


@dataclass(frozen=True, slots=True)
class Held:
    """What PostgreSQL holds of a record: a row, a tombstone, both or neither.

    Attributes:
        rev, op, digest, mapping: of the row; None without one.
        tombstone: revision of the tombstone; None without one.
    """

    rev: int | None = None
    op: str | None = None
    digest: bytes | None = None
    mapping: int | None = None
    tombstone: int | None = None

    @property
    def highest(self) -> int:
        """The highest revision that PostgreSQL knows of this record; -1 for none."""
        return max(-1 if self.rev is None else self.rev, -1 if self.tombstone is None else self.tombstone)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Record:
    """What an application gets: a document, and where it came from.

    Attributes:
        id: the document's ``_id``.
        document: without ``_cf``, and without the parts in ``without``; a copy that the caller may change.
        rev: revision that was read or written.
        source: "mongo" or "postgres": the store that served it.
        stale: the primary could not be asked, and the other store's last known state is given instead.
        without: parts that it was read or written without, which does not say that the record has none.
        image: what it was made from; Crossfade's own.
    """

    id: Any
    document: dict[str, Any]
    rev: int
    source: str
    stale: bool = False
    without: frozenset[str] = frozenset()
    image: Image | None = field(default=None, repr=False, compare=False)

    def __getitem__(self, field: str) -> Any:
        """A field of the document; KeyError where the document has none.

        Raises:
            crossfade.errors.PartLeftOut: see ``without``.
        """
        self._assert_here(field)
        return self.document[field]

    def get(self, field: str, default: Any = None) -> Any:
        """A field of the document, or ``default`` where it has none.

        Raises:
            crossfade.errors.PartLeftOut: see ``without``.
        """
        self._assert_here(field)
        return self.document.get(field, default)

    def _assert_here(self, field: str) -> None:
        if field in self.without and field not in self.document:
            raise errors.PartLeftOut(
                f"this record was read or written without its part {field!r}; read it whole: get(id)"
            )


class Settled(StrEnum):
    """How an attempt to settle ended."""

    #: The secondary holds the primary's revision.
    CONFIRMED = "confirmed"
    #: The primary has moved on; the newer revision's own debt brings it.
    SUPERSEDED = "superseded"
    #: The secondary's rules, or the mapping, refuse it; noted with its cause.
    PARKED = "parked"
    #: A ``ROLLBACK_BOTH`` write that is still open.
    OPEN = "open"
    #: There is nothing in the primary.
    GONE = "gone"


def acceptable_key(key: str | None, plain: str, id_: Any) -> bool:
    """Whether a stamped key fits the name that ``plain`` is made from: itself, or made unique by the id."""
    return key in (plain, unique_key(plain, id_))


def unique_key(plain: str, id_: Any) -> str:
    """The key of a record whose plain key another, older record has."""
    return f"{plain}#{id_to_text(id_)}"
