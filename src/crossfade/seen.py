"""What the application holds of the records that it has read: a write that follows need not ask for them first.

Only a guess: whatever is written upon it is a compare-and-set on the revision, and one that misses is made again upon
what is there. Nothing is kept for it: a record that the application has let go is not remembered.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from crossfade.entity import Entity
from crossfade.part import digest_with
from crossfade.record import Image, Record
from crossfade.values import Unmappable, digest_of_bytes, id_to_text


class Seen:
    """The records of one migration that somebody in this process holds."""

    def __init__(self) -> None:
        self._records: weakref.WeakValueDictionary[tuple[str, str], Record] = weakref.WeakValueDictionary()

    def record(
        self,
        entity: Entity,
        image: Image,
        source: str,
        *,
        stale: bool = False,
        without: Collection[str] = (),
    ) -> Record:
        """What the application gets of an image, remembered while it holds it; ``without``: not these parts."""
        document, out = image.document, frozenset(without) | image.left_out
        if entity.parts:
            # The application's own: a part that was left out is nothing to it, and what is remembered needs none.
            document = {name: value for name, value in document.items() if name not in out}
            image = _small(image)
        record = Record(image.id, document, image.rev, source, stale, out, image)
        if not (stale or image.deleted or image.unknown):
            self._records[entity.name, id_to_text(image.id)] = record
        return record

    def last(self, entity: Entity, id_: Any) -> tuple[Image, Callable[[], Image]] | None:
        """The image of the record with this id that was read or written last, if it is held still.

        Its values are the application's, which may change them as soon as it has its turn; see `Image.kept` for the
        second, which gives a copy.
        """
        record = self._records.get((entity.name, id_to_text(id_)))
        if record is None or record.image is None:
            return None
        image = record.image
        try:
            kept, there = image.kept_in_bytes()
            own = digest_with(image.document, image.parts) if image.parts else digest_of_bytes(there)
        except Unmappable:
            return None
        if own != image.digest:
            return None  # the application has changed its copy
        return image, kept


def _small(image: Image) -> Image:
    """The same image without the parts that the other store holds."""
    noted = {name: part for name, part in image.noted.items() if image.parts.get(name) == part}
    if not noted:
        return image
    return replace(image, document={name: noted.get(name, value) for name, value in image.document.items()})
