"""How closely a verify looks at a record: at every field, or at its revision alone (pure but for reading rows)."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple, Protocol, TypeVar

import bson
from bson.errors import BSONError

from crossfade.bulk.findings import Notes, Source, judge
from crossfade.entity import Entity
from crossfade.part import digest_with, parts_of
from crossfade.record import CF, stamped_keys
from crossfade.stores.bulk_postgres import BulkPostgres, EntityTables, StoredRecord
from crossfade.values import CODEC_OPTIONS, Unmappable, digest_of_bytes, encode_document

_length = struct.Struct("<i")
_int64 = struct.Struct("<q").unpack_from

#: What a look has of a row: all of it, or its revision.
Row = TypeVar("Row")


class Compared(NamedTuple):
    """What the first look at one record saw.

    Attributes:
        suspect: document and row are not plainly equal.
        alive: there is a document whose delete has not been decided.
        line: what it adds to the checksum of its chunk; None where there is no image.
    """

    suspect: bool
    alive: bool
    line: str | None


class Look(Protocol[Row]):
    """What a mode reads of the rows, and how it compares it."""

    async def rows(
        self, target: BulkPostgres, tables: EntityTables, after: str, last: str, *, limit: int
    ) -> list[tuple[str, Row]]:
        """The rows whose id text is above ``after`` and not above ``last``, by id text, in order."""
        ...

    async def rows_with(self, target: BulkPostgres, tables: EntityTables, texts: list[str]) -> dict[str, Row]:
        """The rows with these id texts."""
        ...

    def compare(self, entity: Entity, text: str, raw: bytes | None, row: Row | None) -> Compared:
        """Compare what was read of a document, None without one, with its row, None without any."""
        ...


class Whole:
    """Every field, the stored digest and the keys: evidence."""

    async def rows(
        self, target: BulkPostgres, tables: EntityTables, after: str, last: str, *, limit: int
    ) -> list[tuple[str, StoredRecord]]:
        """The records of a range."""
        return [(row.text, row) for row in await target.read_range(tables, after, last, limit=limit)]

    async def rows_with(
        self, target: BulkPostgres, tables: EntityTables, texts: list[str]
    ) -> dict[str, StoredRecord]:
        """The records with these id texts."""
        return await target.read_ids(tables, texts)

    def compare(self, entity: Entity, text: str, raw: bytes | None, row: StoredRecord | None) -> Compared:
        """Compare the document with the one that the row gives back."""
        if raw is not None and row is not None:
            plain = plainly_equal(entity, raw, row)
            if plain is not None:
                return Compared(False, True, f"{text} {plain} {row.digest.hex()}")
        source = None if raw is None else Source.of(raw, entity.parts)
        # Without the notes, whatever is not plainly equal is a suspect.
        suspect = judge(entity, source, row, Notes()) is not None
        if source is None or source.is_gone:
            return Compared(suspect, False, None)
        image = source.image
        return Compared(suspect, True, None if image is None else f"{text} {image.rev} {image.digest.hex()}")


class Revisions:
    """Ids and revisions alone: finds what is missing, too many or late, and is no evidence."""

    async def rows(
        self, target: BulkPostgres, tables: EntityTables, after: str, last: str, *, limit: int
    ) -> list[tuple[str, int]]:
        """The revisions of a range."""
        return await target.read_revisions(tables, after, last, limit=limit)

    async def rows_with(self, target: BulkPostgres, tables: EntityTables, texts: list[str]) -> dict[str, int]:
        """The revisions of the records with these id texts."""
        return {text: row.rev for text, row in (await target.read_ids(tables, texts)).items()}

    def compare(self, entity: Entity, text: str, raw: bytes | None, row: int | None) -> Compared:  # noqa: ARG002
        """Compare the document's revision with the row's."""
        if raw is None:
            return Compared(row is not None, False, None)
        rev = _revision(raw)
        if rev is None:
            return Compared(True, True, None)
        if rev < 0:
            return Compared(row is not None, False, None)
        return Compared(row != rev, True, f"{text} {rev}")


def plainly_equal(entity: Entity, raw: bytes, row: StoredRecord) -> int | None:
    """The revision of a stored document that its rows give back byte for byte, digest and keys included.

    None says nothing: what is equal in another way (``_cf`` in the middle of the document) has to be judged. It saves
    understanding nearly every document, which takes more time than everything else here.
    """
    try:
        rebuilt = entity.from_rows(row.parent, row.children)
        content = encode_document(rebuilt)
        if not raw.startswith(content[4:-1], 4):
            return None
        notes = _notes_behind(raw, len(content) - 1)
        if notes is None or notes.get("deleted"):
            return None
        rev = int(notes.get("rev", 0))
        keys = {**entity.keys(rebuilt), **stamped_keys(notes)}
        its_parts = parts_of(rebuilt, entity.parts, {}, rev)
        digest = digest_with(rebuilt, its_parts) if its_parts else digest_of_bytes(content)
    except (Unmappable, BSONError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    if row.rev != rev or row.mapping != entity.mapping_version or row.digest != digest:
        return None
    for rule in entity.unique:
        if row.parent[entity.parent_columns.index(rule.to)] != keys.get(rule.rule):
            return None
    return rev


def _notes_behind(raw: bytes, at: int) -> dict[str, Any] | None:
    """What ``_cf`` holds if nothing else comes in a document from ``at`` on; {} if nothing comes at all."""
    if at == len(raw) - 1:
        return {}
    if raw[at : at + 5] != b"\x03_cf\0" or at + 5 + _length.unpack_from(raw, at + 5)[0] != len(raw) - 1:
        return None
    return bson.decode(raw[at + 5 : -1], CODEC_OPTIONS)


def _revision(raw: bytes) -> int | None:
    """The revision in what the fast mode fetches of a document; -1: its delete has been decided, None: unreadable."""
    # As nearly all are: an ObjectId, alone or with a revision behind it.
    if raw[4:9] == b"\x07_id\0":
        if len(raw) == 22:
            return 0
        if len(raw) == 45 and raw[21:26] == b"\x03_cf\0" and raw[30:35] == b"\x12rev\0":
            return int(_int64(raw, 35)[0])
    try:
        notes = bson.decode(raw, CODEC_OPTIONS).get(CF) or {}
        return -1 if notes.get("deleted") else int(notes.get("rev", 0))
    except (ValueError, TypeError, AttributeError, BSONError):
        return None
