"""How a record differs between the stores: one document, its rows, and what else is known (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from crossfade.bulk.convert import bad_document, image_of
from crossfade.entity import Entity
from crossfade.part import digest_with, parts_of
from crossfade.record import Image
from crossfade.stores.bulk_postgres import BadDocument, StoredRecord
from crossfade.values import Unmappable, encode_document, fields_that_differ


class Finding(StrEnum):
    """How a record differs. The first two have a known reason; the others count as mismatches."""

    IN_DEBT = "in_debt"
    QUARANTINED = "quarantined"
    #: A document without rows (one that belongs into quarantine and is not there, too).
    MISSING = "missing"
    #: Rows that nothing accounts for: no document, and a tombstone that should have removed them, or rows that are
    #: not as Crossfade writes them.
    EXTRA = "extra"
    #: Rows as Crossfade wrote them, without document or tombstone: it was deleted behind Crossfade's back.
    TOMBSTONE_MISSING = "tombstone_missing"
    #: The document was changed, or replaced whole, behind Crossfade's back: no revision says so.
    FOREIGN_WRITE = "foreign_write"
    #: The rows are of an older mapping of the entity.
    MAPPING_CHANGED = "mapping_changed"
    #: The row is at an older revision than the document, and nothing notes that it is owed.
    BEHIND = "behind"
    #: The row is at a newer revision than the document.
    AHEAD = "ahead"
    #: Equal in revision, other in content, and the row is to blame, or nobody knows who is.
    DIFFERENT = "different"
    #: A document whose id has a tombstone at or above its revision: it was put back behind Crossfade's back.
    TOMBSTONED = "tombstoned"

    @property
    def is_explained(self) -> bool:
        """Whether it differs for a known reason."""
        return self in (Finding.IN_DEBT, Finding.QUARANTINED)


@dataclass(frozen=True, slots=True)
class Source:
    """A document as read.

    Attributes:
        text: id text.
        image, content: its image and canonical bytes; None when it cannot be understood.
        bad: then: as it goes to quarantine.
        size: bytes of BSON.
        id: its ``_id``, as far as it can be told.
    """

    text: str
    image: Image | None
    content: bytes | None
    bad: BadDocument | None
    size: int
    id: Any = None

    @classmethod
    def of(cls, raw: bytes, parts: Sequence[str] = ()) -> Source:
        """Of a stored document; ``parts``: its entity's."""
        try:
            image, content = image_of(raw, parts)
            # Its id text may not exist, too.
            text = bad_document(raw, Unmappable(""), image).text
        except Unmappable as problem:
            bad = bad_document(raw, problem, None)
            return cls(bad.text, None, None, bad, len(raw), bad.id)
        return cls(text, image, content, None, len(raw), image.id)

    @property
    def is_gone(self) -> bool:
        """Whether its delete has been decided."""
        return self.image is not None and self.image.deleted

    @property
    def digest(self) -> bytes:
        """As a quarantine entry has it."""
        if self.image is not None:
            return self.image.digest
        assert self.bad is not None
        return self.bad.digest


def text_of(raw: bytes) -> str:
    """Id text of a stored document; of one whose id has none, the key of its entry in quarantine."""
    if raw[4:9] == b"\x07_id\0":
        return raw[9:21].hex()
    return Source.of(raw).text


@dataclass(frozen=True, slots=True)
class Notes:
    """What else is known about a record.

    Attributes:
        quarantined: digest of the entry in quarantine, or None.
        tombstone: revision of PostgreSQL's tombstone, or None.
        deleted: MongoDB has a tombstone.
        delete_owed: and PostgreSQL has not confirmed it.
        delivery_owed: PostgreSQL's outbox has it: MongoDB has not confirmed its revision.
    """

    quarantined: bytes | None = None
    tombstone: int | None = None
    deleted: bool = False
    delete_owed: bool = False
    delivery_owed: bool = False


def differing_fields(entity: Entity, source: Source, row: StoredRecord) -> list[str]:
    """Names of what differs between a document and its rows; [] when they are the same.

    Top-level fields by name; ``(order)`` when only the order of fields differs, ``cf_digest`` when only the
    stored digest is not that of the content, a key column by its name, ``(unreadable)`` when the rows give no document.
    """
    assert source.image is not None
    try:
        rebuilt = entity.from_rows(row.parent, row.children)
        content = encode_document(rebuilt)
    except (Unmappable, ValueError, KeyError, IndexError, TypeError):
        return ["(unreadable)"]
    found: list[str] = []
    if content != source.content:
        found = list(fields_that_differ(source.image.document, rebuilt))
    elif row.digest != source.image.digest:
        found = ["cf_digest"]
    keys = {**entity.keys(source.image.document), **source.image.keys}
    for rule in entity.unique:
        if row.parent[entity.parent_columns.index(rule.to)] != keys.get(rule.rule):
            found.append(rule.to)
    return found


def is_as_written(entity: Entity, row: StoredRecord) -> bool:
    """Whether rows give the content that their stored digest is of."""
    try:
        document = entity.from_rows(row.parent, row.children)
        return digest_with(document, parts_of(document, entity.parts, {}, row.rev)) == row.digest
    except (Unmappable, ValueError, KeyError, IndexError, TypeError):
        return False


def judge(
    entity: Entity, source: Source | None, row: StoredRecord | None, notes: Notes
) -> tuple[Finding, list[str]] | None:
    """How a record differs, and in which fields; None when it does not.

    Args:
        source: the document, None without one.
        row: its rows, None without any.
        notes: what else is known.
    """
    image = source.image if source is not None else None
    if source is None or source.is_gone:
        if row is None:
            return None
        if notes.delivery_owed or notes.delete_owed or (image is not None and image.debt is not None):
            return Finding.IN_DEBT, []
        known = notes.deleted or notes.tombstone is not None or image is not None
        behind_our_back = not known and is_as_written(entity, row)
        return (Finding.TOMBSTONE_MISSING if behind_our_back else Finding.EXTRA), []
    fields = differing_fields(entity, source, row) if row is not None and image is not None else []
    old = row is not None and row.mapping != entity.mapping_version
    if row is not None and image is not None and row.rev == image.rev and not fields and not old:
        return None
    if notes.quarantined is not None and notes.quarantined == source.digest:
        return Finding.QUARANTINED, []
    if notes.delivery_owed or (image is not None and image.debt is not None):
        return Finding.IN_DEBT, fields
    if row is None or image is None:
        covered = notes.tombstone is not None and image is not None and notes.tombstone >= image.rev
        return (Finding.TOMBSTONED if covered else Finding.MISSING), []
    return _of_two(entity, image, row, fields, old=old), fields


def _of_two(entity: Entity, image: Image, row: StoredRecord, fields: list[str], *, old: bool) -> Finding:
    """Why a document and its rows differ, where both are there and nothing explains it."""
    if row.rev < image.rev:
        return Finding.BEHIND
    if old and row.rev == image.rev and row.digest == image.digest:
        return Finding.MAPPING_CHANGED
    if row.rev > image.rev:
        # Replaced whole, by somebody who does not know of revisions; or put back from a backup.
        return Finding.FOREIGN_WRITE if image.rev == 0 and fields else Finding.AHEAD
    untouched = row.op == image.op and row.digest != image.digest
    return Finding.FOREIGN_WRITE if untouched and is_as_written(entity, row) else Finding.DIFFERENT
