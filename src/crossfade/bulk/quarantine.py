"""The quarantine, for a person: what is in it, and one document as it was found."""

from __future__ import annotations

from typing import Any

import bson
from bson.errors import BSONError
from bson.json_util import CANONICAL_JSON_OPTIONS, dumps

from crossfade.stores.bulk_postgres import BulkPostgres
from crossfade.values import CODEC_OPTIONS


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
        loose = CODEC_OPTIONS.with_options(unicode_decode_error_handler="backslashreplace")
        document = dumps(bson.decode(raw, loose), json_options=CANONICAL_JSON_OPTIONS)
    except (BSONError, ValueError, TypeError, OverflowError):
        document = None
    return {"entity": entity, "id": text, "reason": reason, "document": document, "hex": raw.hex()}
