"""From a stored document to what a bulk writer sends, and in chunks (pure)."""

from __future__ import annotations

import contextlib
import gc
import struct
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import bson

from crossfade.entity import Child, Rows
from crossfade.part import digest_with, parts_of
from crossfade.record import CF, Image
from crossfade.stores.bulk_mongo import id_of
from crossfade.stores.bulk_postgres import BadDocument, EntityTables, PreparedRow
from crossfade.values import (
    CODEC_OPTIONS,
    Unmappable,
    decode_document,
    digest_of_bytes,
    digest_of_stored,
    encode_document,
    id_to_text,
)

#: What the key of an entry in quarantine begins with, for a document whose id has no text.
NO_TEXT = "x:"

_int32 = struct.Struct("<i").pack
_WITHOUT_NOTES = Image(None, {}, 0, None, {}, b"")


def canonical(raw: bytes, document: dict[str, Any]) -> bytes:
    """Canonical bytes of a document that was decoded from ``raw`` by `decode_document`, ``_cf`` left out.

    Encoding again costs as much as decoding, and `decode_document` has proved already that it would give
    ``raw``. So where nothing is to be left out, or ``_cf`` stands last (an update puts it there), the bytes are
    cut out of ``raw``.
    """
    if raw[5:9] != b"_id\0":
        return encode_document(document)
    if CF not in document:
        return raw
    if next(reversed(document)) == CF:
        notes = bson.encode({CF: document[CF]}, codec_options=CODEC_OPTIONS)[4:]
        if raw.endswith(notes):
            return _int32(len(raw) - len(notes) + 1) + raw[4 : len(raw) - len(notes)] + b"\0"
    return encode_document(document)


def image_of(raw: bytes, parts: Sequence[str] = ()) -> tuple[Image, bytes]:
    """The image that a stored document stands for (as `Image.from_raw`), and its canonical bytes.

    ``parts``: the entity's.

    Raises:
        crossfade.values.Unmappable: the bytes, or the notes in ``_cf``, cannot be understood.
    """
    document = decode_document(raw)
    content = canonical(raw, document)
    notes = document.pop(CF, None)
    try:
        own = (
            Image.from_document({"_id": document["_id"], CF: notes}, parts)
            if isinstance(notes, Mapping)
            else _WITHOUT_NOTES
        )
        id_ = document["_id"]
    except (TypeError, ValueError, AttributeError):
        raise Unmappable("the field '_cf' does not hold what Crossfade wrote there", CF) from None
    except KeyError:
        raise Unmappable("the document has no _id", "_id") from None
    its_parts = parts_of(document, parts, own.noted, own.rev)
    return (
        Image(
            id=id_, document=document, rev=own.rev, op=own.op, keys=own.keys,
            digest=digest_with(document, its_parts) if its_parts else digest_of_bytes(content),
            debt=own.debt, deleted=own.deleted, delivered=own.delivered, parts=its_parts, noted=own.noted,
        ),
        content,
    )  # fmt: skip


def bad_document(raw: bytes, problem: Unmappable, image: Image | None) -> BadDocument:
    """A document as it goes to quarantine, whatever is wrong with it."""
    id_ = None
    try:
        id_ = id_of(raw) if image is None else image.id
        text = id_to_text(id_)
    except (Unmappable, ValueError):
        # The entry needs a key of its own, whatever else the document holds; the true id is in the bytes.
        text = NO_TEXT + digest_of_stored(raw, id_alone=True).hex()
    digest = digest_of_stored(raw) if image is None else image.digest
    clean = (
        problem.field.replace("\0", "\u2400").encode(errors="backslashreplace").decode()
        if problem.field
        else None
    )
    return BadDocument(id_, text, raw, 0 if image is None else image.rev, digest, problem.reason, clean)


@dataclass(slots=True)
class Chunk:
    """Documents that are written in one transaction.

    Attributes:
        rows: convertible ones, in the order of their ids.
        bad: for quarantine.
        read: documents read, the deleted ones included.
        deleted: documents whose delete is decided; their own debt takes it to PostgreSQL.
        size: bytes of BSON.
        last: ``_id`` of the last one whose id can be told, in a tuple (null is an id too); None: no such one.
    """

    rows: list[PreparedRow] = field(default_factory=list)
    bad: list[BadDocument] = field(default_factory=list)
    read: int = 0
    deleted: int = 0
    size: int = 0
    last: tuple[Any] | None = None

    def add(self, raw: bytes, tables: EntityTables) -> None:
        """Convert one document and add it."""
        self.read += 1
        self.size += len(raw)
        image = None
        try:
            image, _ = image_of(raw, tables.entity.parts)
            self.last = (image.id,)
            if image.deleted:
                self.deleted += 1
                return
            rows = tables.entity.to_rows(image.document, image.keys or None)
            self.rows.append(prepare(raw, image, rows, tables))
        except Unmappable as problem:
            bad = bad_document(raw, problem, image)
            if bad.id is not None:
                self.last = (bad.id,)
            self.bad.append(bad)


def prepare(raw: bytes, image: Image, rows: Rows, tables: EntityTables) -> PreparedRow:
    """Encode a record's rows.

    Raises:
        Unmappable: the operation id in ``_cf`` is none.
    """
    try:
        op = None if image.op is None else uuid.UUID(image.op)
    except (ValueError, AttributeError):
        raise Unmappable("the field '_cf' holds an operation id that is none", CF) from None
    mapping = tables.entity.mapping_version
    return PreparedRow(
        image.id,
        rows.parent[0],
        raw,
        image.rev,
        image.digest,
        tables.write_parent((*rows.parent, image.rev, op, image.digest, mapping)),
        tuple(
            [
                write(_noted(image, child, made))
                for child, write, made in zip(
                    tables.entity.children, tables.write_children, rows.children, strict=True
                )
            ]
        ),
    )


def _noted(image: Image, child: Child, rows: Sequence[tuple[Any, ...]]) -> Sequence[tuple[Any, ...]]:
    """Child rows with what is noted of a part beside its values."""
    if not (child.is_part and rows):
        return rows
    part = image.parts[child.field]
    return [(*row, part.rev, part.digest) for row in rows]


def chunks(
    documents: Iterable[bytes], tables: EntityTables, *, count: Callable[[], int], size: int
) -> Iterator[Chunk]:
    """Cut a stream of documents into chunks of ``count()`` documents, or ``size`` bytes if that comes first.

    Only a document that is larger than that by itself makes a larger chunk.
    """
    chunk = Chunk()
    for raw in documents:
        if chunk.read and (chunk.read >= count() or chunk.size + len(raw) > size):
            yield chunk
            chunk = Chunk()
        chunk.add(raw, tables)
    if chunk.read:
        yield chunk


#: Seconds for which a thread that converts may keep the one that talks to PostgreSQL from going on. Python's 5 ms, at
#: each answer and each block of a COPY, were a tenth of the time that loading a table took.
_TURN = 0.001


@contextlib.contextmanager
def quiet_interpreter() -> Iterator[None]:
    """Keep what Python does by itself out of the way of a bulk run.

    The cyclic collector: walking a chunk's objects again and again, none of them in a cycle, costs nearly as much as
    making them; the caller collects the youngest between chunks. And long turns of one thread.
    """
    was_on, turn = gc.isenabled(), sys.getswitchinterval()
    gc.collect()
    gc.freeze()
    gc.disable()
    sys.setswitchinterval(min(turn, _TURN))
    try:
        yield
    finally:
        sys.setswitchinterval(turn)
        gc.unfreeze()
        if was_on:
            gc.enable()
