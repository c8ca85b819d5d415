"""A record at one revision: its image, and the notes kept beside it in the document (pure).

A document carries ``_cf: {rev, op, keys, debt, deleted}``, unknown to and preserved by an application that
updates with ``$set``. ``debt`` exists only while the secondary has not confirmed the revision: settling is
``$unset``, so a sparse index on it finds every debt. A document without ``_cf`` is at revision 0.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from bson import ObjectId
from bson.int64 import Int64

from crossfade.values import decode_document, digest

#: The sub-document that holds Crossfade's notes.
CF = "_cf"


def new_id() -> ObjectId:
    """A fresh id, made in the application before any write, the same in both stores."""
    return ObjectId()


def new_operation() -> str:
    """A fresh operation id (32 hex characters): tells a retry from a rival."""
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Debt:
    """What the primary notes about a revision that the secondary has not confirmed.

    Attributes:
        epoch: the control record's epoch under which the write was made.
        tentative: ``ROLLBACK_BOTH`` only, until success may be told: the values before the write
            (``{"set": {field: value}, "unset": [fields], "kind": "insert" | "update" | "delete"}``).
        parked: why the secondary refuses it (a rule violated there only), else None.
    """

    epoch: int
    tentative: Mapping[str, Any] | None = None
    parked: str | None = None

    def to_document(self) -> dict[str, Any]:
        """As kept under ``_cf.debt``."""
        note: dict[str, Any] = {"epoch": Int64(self.epoch)}
        if self.tentative is not None:
            note["tentative"] = dict(self.tentative)
        if self.parked is not None:
            note["parked"] = self.parked
        return note

    @classmethod
    def from_document(cls, note: Mapping[str, Any] | None) -> Debt | None:
        """The reverse of `to_document`; None for none."""
        if note is None:
            return None
        return cls(int(note.get("epoch", 0)), note.get("tentative"), note.get("parked"))


def stamped_keys(notes: Mapping[str, Any]) -> dict[str, str]:
    """The normalised keys by rule in ``_cf``.

    An open ``ROLLBACK_BOTH`` write holds two, the new one first: the old one must not be taken before its outcome.
    """
    found = dict(notes.get("keys") or {})
    return {rule: key[0] if isinstance(key, list) else key for rule, key in found.items()}


@dataclass(frozen=True, slots=True)
class Image:
    """The whole state of a record at one revision.

    Attributes:
        id: the document's ``_id``.
        document: the document with ``_id`` and without ``_cf``; not to be changed.
        rev: revision; 0 for a document never written through Crossfade.
        op: operation id of the write that made this revision; None at revision 0.
        keys: normalised keys by rule, as stamped in the document.
        digest: of ``document``, 16 bytes.
        debt: the debt noted in the document, if any.
        deleted: the delete has been decided; readers and writers treat the record as gone.
        delivered: PostgreSQL primary only: digest of what the last delivery left here.
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

    @classmethod
    def from_raw(cls, raw: bytes) -> Image:
        """The image that a stored document stands for.

        Raises:
            crossfade.values.Unmappable: the bytes hold what cannot be carried back unchanged.
        """
        return cls.from_document(decode_document(raw))

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Image:
        """Like `from_raw`, of a decoded document; takes the document over."""
        notes = document.pop(CF, None)
        if not isinstance(notes, Mapping):
            notes = {}
        return cls(
            id=document["_id"],
            document=document,
            rev=int(notes.get("rev", 0)),
            op=notes.get("op"),
            keys=stamped_keys(notes),
            digest=digest(document),
            debt=Debt.from_document(notes.get("debt")),
            deleted=bool(notes.get("deleted", False)),
            delivered=bytes(notes["digest"]) if "digest" in notes else None,
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


@dataclass(frozen=True, slots=True)
class Record:
    """What an application gets: a document, and where it came from.

    Attributes:
        id: the document's ``_id``.
        document: without ``_cf``; a copy that the caller may change.
        rev: revision that was read or written.
        source: "mongo" or "postgres": the store that served it.
        stale: the primary could not be asked, and the other store's last known state is given instead.
    """

    id: Any
    document: dict[str, Any]
    rev: int
    source: str
    stale: bool = False

    def __getitem__(self, field: str) -> Any:
        """A field of the document; KeyError where the document has none."""
        return self.document[field]

    def get(self, field: str, default: Any = None) -> Any:
        """A field of the document, or ``default`` where it has none."""
        return self.document.get(field, default)
