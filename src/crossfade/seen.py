"""What the application holds of the records that it has read: a write that follows need not ask for them first.

Only a guess: whatever is written upon it is a compare-and-set on the revision, and one that misses is made again upon
what is there. Nothing is kept for it: a record that the application has let go is not remembered.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

from crossfade.entity import Entity
from crossfade.record import Image, Record
from crossfade.values import Unmappable, decode_document, digest_of_bytes, encode_document, id_to_text


class Seen:
    """The records of one migration that somebody in this process holds."""

    def __init__(self) -> None:
        self._records: weakref.WeakValueDictionary[tuple[str, str], Record] = weakref.WeakValueDictionary()

    def record(self, entity: Entity, image: Image, source: str, *, stale: bool = False) -> Record:
        """What the application gets of an image, remembered while it holds it."""
        record = Record(image.id, image.document, image.rev, source, stale, image)
        if not stale and not image.deleted:
            self._records[entity.name, id_to_text(image.id)] = record
        return record

    def last(self, entity: Entity, id_: Any) -> Image | None:
        """The image of the record with this id that was read or written last, if it is held still; a copy."""
        record = self._records.get((entity.name, id_to_text(id_)))
        if record is None or record.image is None:
            return None
        try:
            there = encode_document(record.image.document)
        except Unmappable:
            return None
        if digest_of_bytes(there) != record.image.digest:
            return None  # the application has changed its copy
        return replace(record.image, document=decode_document(there))
