"""The quarantine, for a person: what is in it, one document as it was found, and the way out of it.

Documents leave when they can be carried: after a change of the mapping (`retry`), or mended in a file of Extended JSON,
a line each (`export_quarantine`, `read_mended`). What was exported is as MongoDB has it then, so a document that
changes meanwhile is told from the one that a person has mended.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import bson
from bson.errors import BSONError
from bson.json_util import CANONICAL_JSON_OPTIONS, JSONMode, JSONOptions, dumps, loads

from crossfade.entity import Entity
from crossfade.errors import ConfigurationError
from crossfade.record import CF
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres
from crossfade.values import (
    CODEC_OPTIONS,
    Unmappable,
    digest_of_bytes,
    encode_document,
    id_to_text,
    text_to_id,
)

#: Entries that are read together.
PORTION = 200
_LOOSE = CODEC_OPTIONS.with_options(unicode_decode_error_handler="backslashreplace")
#: As documents are decoded everywhere else: dates with their zone, binaries with their subtype.
_JSON = JSONOptions(
    json_mode=JSONMode.CANONICAL,
    tz_aware=True,
    document_class=dict,
    datetime_conversion=CODEC_OPTIONS.datetime_conversion,
)


@dataclass(frozen=True, slots=True)
class Mended:
    """A line of a file, understood.

    Attributes:
        number: of the line.
        entity, text, id: of whom.
        seen: digest of the bytes that were exported.
        document: as a person left it.
    """

    number: int
    entity: Entity
    text: str
    id: Any
    seen: str
    document: dict[str, Any]


async def list_quarantine(target: BulkPostgres, entity: str | None, *, limit: int) -> list[dict[str, Any]]:
    """The entries that were seen last.

    Args:
        entity: name of one entity; None: of all.
        limit: entries at most.
    """
    return await target.quarantine_list(entity, limit=limit)


async def show_quarantined(target: BulkPostgres, entity: str, text: str) -> dict[str, Any] | None:
    """One entry with its document, None without one.

    Args:
        text: id text, as the list has it.

    Returns:
        ``reason``; ``hex``, the bytes as found; ``document``, as Extended JSON as far as it decodes (invalid
        UTF-8 is replaced), or None.
    """
    found = await target.quarantine_document(entity, text)
    if found is None:
        return None
    reason, raw = found
    document: str | None
    try:
        document = dumps(bson.decode(raw, _LOOSE), json_options=CANONICAL_JSON_OPTIONS)
    except (BSONError, ValueError, TypeError, OverflowError):
        document = None
    return {"entity": entity, "id": text, "reason": reason, "document": document, "hex": raw.hex()}


async def export_quarantine(
    source: BulkMongo, target: BulkPostgres, entity: Entity, *, waived: bool
) -> AsyncIterator[str]:
    """Entries of an entity as lines of canonical Extended JSON (v2); ``waived``: those too that somebody has waived.

    The document is the one in MongoDB now, without Crossfade's notes, ``seen`` the digest of its bytes. One that does
    not decode at all, or is there no more, has ``hex`` instead, the bytes that went into quarantine; so
    has one that a file would not give back: Extended JSON takes some documents for values (``{"$numberInt": "5"}``).
    """
    after = ""
    while found := await target.quarantine_after(entity.name, after, limit=PORTION):
        after = found[-1][0]
        ids = dict(_ids(text for text, _, _ in found))
        there = {_text(raw): raw for raw in await asyncio.to_thread(source.fetch, entity, list(ids.values()))}
        for text, about, kept in found:
            if about["waived"] and not waived:
                continue
            about |= {name: about[name].isoformat() for name in ("first_seen", "last_seen")}
            line = {"entity": entity.name, "id": text, **about}
            raw = there.get(text)
            try:
                if raw is None:
                    raise ValueError
                document = bson.decode(raw, _LOOSE)
                document.pop(CF, None)
                told = dumps(document, json_options=CANONICAL_JSON_OPTIONS)
                if _encoded(loads(told, json_options=_JSON)) != _encoded(document):
                    raise ValueError
                shown = json.loads(told)
                line |= {"seen": digest_of_bytes(raw).hex(), "document": shown}
            except (BSONError, ValueError, TypeError, OverflowError):
                line["hex"] = kept.hex()
            yield json.dumps(line, ensure_ascii=False)


def _encoded(document: dict[str, Any]) -> bytes:
    return bson.encode(document, codec_options=CODEC_OPTIONS)


def _ids(texts: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for text in texts:
        try:
            yield text, text_to_id(text)
        except ValueError:
            continue  # its id has no text; the entry goes by its digest


def _text(raw: bytes) -> str | None:
    try:
        return id_to_text(bson.decode(raw, _LOOSE)["_id"])
    except (BSONError, Unmappable, KeyError, ValueError):
        return None


def read_mended(lines: Iterable[str], entities: dict[str, Entity]) -> tuple[list[Mended], list[str]]:
    """Lines of an exported file that a person has worked on; and what is wrong with others, a sentence each.

    A document that cannot be carried yet is refused here, before anything is written.

    Raises:
        crossfade.errors.ConfigurationError: a line names an entity that the migration does not have.
    """
    mended: list[Mended] = []
    wrong: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            if found["entity"] not in entities:
                raise ConfigurationError(
                    f"line {number}: no entity {found['entity']!r}; the migration has: {', '.join(entities)}"
                )
            if "document" not in found:
                continue  # exported as bytes, for a look
            entity = entities[found["entity"]]
            document = loads(json.dumps(found["document"]), json_options=_JSON)
            id_ = text_to_id(found["id"])
            if encode_document({"_id": document.get("_id")}) != encode_document({"_id": id_}):
                wrong.append(f"line {number}: the _id of {found['id']} must stay as it was")
                continue
            entity.to_rows(document, entity.keys(document))
            mended.append(Mended(number, entity, found["id"], id_, found["seen"], document))
        except Unmappable as problem:
            wrong.append(f"line {number}: {found['id']} cannot be carried yet: {problem.reason}")
        except (ValueError, KeyError, TypeError, AttributeError, BSONError) as cause:
            wrong.append(f"line {number} is not a line of an export: {type(cause).__name__} {cause}")
    return mended, wrong


def with_notes(raw: bytes, document: dict[str, Any]) -> dict[str, Any] | None:
    """A mended document with Crossfade's notes of the stored one; None where nothing was changed."""
    stored = bson.decode(raw, _LOOSE)
    notes = stored.pop(CF, None)
    # As exported, also where that is legible only because what was not valid was replaced: a person has to say so.
    if encode_document(stored) == encode_document(document):
        return None
    if not isinstance(notes, dict):
        return document
    # A part may be what was mended: its note does not hold any more.
    return {**document, CF: {name: note for name, note in notes.items() if name != "parts"}}
