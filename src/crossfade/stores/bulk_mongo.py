"""Reading whole collections from MongoDB: raw BSON, in ``_id`` order, for a thread of its own.

One long sorted cursor is about twice as fast as a query per chunk. It may be lost (a fail-over, a cursor that
timed out); it is then opened again behind the last document that was handed out, so the caller never notices.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import bson
import pymongo
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument
from pymongo import MongoClient
from pymongo.errors import (
    AutoReconnect,
    ConfigurationError,
    CursorNotFound,
    OperationFailure,
    PyMongoError,
)
from pymongo.read_preferences import ReadPreference

from crossfade import errors
from crossfade.entity import Entity
from crossfade.record import CF
from crossfade.values import CODEC_OPTIONS

STORE = "mongo"
#: How often a lost cursor is opened again before the store counts as unreachable.
ATTEMPTS = 5

_RAW = CODEC_OPTIONS.with_options(document_class=RawBSONDocument)
_length = struct.Struct("<i").unpack_from


def split(batch: bytes) -> list[bytes]:
    """The documents of a raw batch."""
    documents = []
    at = 0
    while at < len(batch):
        end = at + _length(batch, at)[0]
        documents.append(batch[at:end])
        at = end
    return documents


def id_of(raw: bytes) -> Any:
    """The ``_id`` of a stored document that may not decode as a whole.

    Raises:
        ValueError: it does not stand first, where every server puts it, or is not valid itself.
    """
    if raw[5:9] != b"_id\0":
        raise ValueError("the document's first field is not _id")
    kind = raw[4]
    size = _FIXED.get(kind)
    if size is None:
        size = _length(raw, 9)[0] + _BESIDE_LENGTH.get(kind, 0)
    element = raw[4 : 9 + size]
    try:
        return bson.decode(struct.pack("<i", len(element) + 5) + element + b"\0", CODEC_OPTIONS)["_id"]
    except (BSONError, KeyError) as cause:
        raise ValueError(f"the document's _id is not valid: {cause}") from None


# Bytes of a value by its BSON type: fixed, or what comes on top of the length that the value begins with.
_FIXED = {0x01: 8, 0x07: 12, 0x08: 1, 0x09: 8, 0x0A: 0, 0x10: 4, 0x11: 8, 0x12: 8, 0x13: 16, 0x7F: 0, 0xFF: 0}
_BESIDE_LENGTH = {0x02: 4, 0x05: 5, 0x0D: 4, 0x0E: 4}


class BulkMongo:
    """One MongoDB database, read in bulk. Blocking: every method belongs into a thread.

    Args:
        uri: ``mongodb://.../<database>``.
        select_timeout: seconds to find a server.

    Raises:
        crossfade.errors.ConfigurationError: the URI cannot be understood or names no database.
    """

    def __init__(self, uri: str, *, select_timeout: float = 5.0) -> None:
        try:
            self._client: MongoClient[Any] = MongoClient(
                uri,
                serverSelectionTimeoutMS=int(select_timeout * 1000),
                connectTimeoutMS=int(select_timeout * 1000),
                # A round trip fetches at most 16 MiB; a server that needs longer hangs.
                socketTimeoutMS=120_000,
                appname="crossfade bulk",
            )
            self._database = self._client.get_default_database().with_options(
                codec_options=_RAW, read_preference=ReadPreference.PRIMARY
            )
        except ConfigurationError as cause:
            raise errors.ConfigurationError(
                f"MONGO_URI cannot be used: {cause}. Write mongodb://host:port/<database>"
            ) from None
        except (PyMongoError, ValueError) as cause:
            raise errors.ConfigurationError(f"MONGO_URI cannot be used: {cause}") from None
        nodes = pymongo.uri_parser.parse_uri(uri, validate=False)["nodelist"] if "+srv" not in uri else []
        self.address = ",".join(f"{host}:{port}" for host, port in nodes) or "the cluster in MONGO_URI"

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def probe(self) -> float:
        """Seconds that a small read took."""
        from crossfade.stores.mongo import CONTROL

        began = time.perf_counter()
        try:
            self._database[CONTROL].find_one({"_id": "-"})
        except PyMongoError as cause:
            raise self._unreachable(cause) from cause
        return time.perf_counter() - began

    def debts(self, entities: Iterable[Entity], enough: int) -> int:
        """How many documents of these entities PostgreSQL is owed, counted up to ``enough``."""
        found = 0
        try:
            for entity in entities:
                if found < enough:
                    found += self._database[entity.collection].count_documents(
                        {f"{CF}.debt": {"$exists": True}}, limit=enough - found
                    )
        except PyMongoError as cause:
            raise self._unreachable(cause) from cause
        return found

    def count(self, entity: Entity) -> int:
        """About how many documents there are; for a progress bar only."""
        try:
            return int(self._database[entity.collection].estimated_document_count())
        except PyMongoError as cause:
            raise self._unreachable(cause) from cause

    def draw_ids(self, entity: Entity, number: int) -> list[Any]:
        """About so many ids drawn by chance, in the server's order; [] where it cannot draw any."""
        collection = self._database[entity.collection].with_options(codec_options=CODEC_OPTIONS)
        try:
            drawn = collection.aggregate([{"$sample": {"size": number}}, {"$project": {"_id": 1}}])
            ids = [note["_id"] for note in drawn]
            # Which of two ids of any type comes first, only the server knows.
            return [note["_id"] for note in collection.find({"_id": {"$in": ids}}, {"_id": 1}).sort("_id", 1)]
        except (OperationFailure, BSONError):
            return []
        except PyMongoError as cause:
            raise self._unreachable(cause) from cause

    def read(
        self,
        entity: Entity,
        queries_after: Callable[[Mapping[str, Any] | None], list[dict[str, Any]]],
        position: Mapping[str, Any] | None,
        *,
        batch: int,
        notes_only: bool = False,
    ) -> Iterator[bytes]:
        """Every document after ``position``, raw, in the server's order of ids.

        Args:
            entity: whose collection to read.
            queries_after: the plan (`crossfade.bulk.plan.Range.queries`).
            position: ``{"_id": last id done}`` or None.
            batch: documents fetched in one round trip, at most; the server also ends one at 16 MiB.
            notes_only: nothing but ``_id`` and what Crossfade notes of revision and deletion.

        Raises:
            crossfade.errors.StoreUnavailable: no answer, also not after `ATTEMPTS` tries.
        """
        failures = 0
        last: bytes | None = None
        projection = {f"{CF}.rev": 1, f"{CF}.deleted": 1} if notes_only else None
        while True:
            try:
                for query in queries_after(position):
                    cursor = self._database[entity.collection].find_raw_batches(
                        query, projection, sort=[("_id", 1)], batch_size=batch
                    )
                    for raw_batch in cursor:
                        for raw in split(raw_batch):
                            last = raw
                            yield raw
                        failures = 0
                return
            except (AutoReconnect, CursorNotFound, OperationFailure) as cause:
                failures += 1
                if failures >= ATTEMPTS or (isinstance(cause, OperationFailure) and not _is_passing(cause)):
                    raise self._unreachable(cause) from cause
                time.sleep(0.2 * 2**failures)
            except PyMongoError as cause:
                raise self._unreachable(cause) from cause
            if last is not None:
                try:
                    position = {"_id": id_of(last)}
                except ValueError as cause:
                    raise self._unreachable(cause) from cause

    def fetch(self, entity: Entity, ids: Sequence[Any]) -> list[bytes]:
        """The documents with these ids, raw, those that there are."""
        try:
            found = self._database[entity.collection].find_raw_batches({"_id": {"$in": list(ids)}})
            return [raw for batch in found for raw in split(batch)]
        except PyMongoError as cause:
            raise self._unreachable(cause) from cause

    def tombstones(self, entity: Entity, ids: Iterable[str]) -> dict[str, bool]:
        """Those of these id texts that have a tombstone, and whether PostgreSQL has not confirmed it yet."""
        from crossfade.stores.mongo import TOMBSTONES

        keys = [{"entity": entity.name, "id": text} for text in ids]
        try:
            found = self._database[TOMBSTONES].find({"_id": {"$in": keys}})
            return {str(note["_id"]["id"]): "debt" in note for note in found}
        except PyMongoError as cause:
            raise self._unreachable(cause) from cause

    def _unreachable(self, cause: Exception) -> errors.StoreUnavailable:
        reason = (str(cause).splitlines() or [type(cause).__name__])[0][:200]
        return errors.StoreUnavailable(
            STORE,
            f"cannot read MongoDB at {self.address} ({reason}). Is it running? MONGO_URI sets the address.",
        )


def _is_passing(cause: OperationFailure) -> bool:
    # DocumentDB reports an engine that restarts as code 1; refused credentials do not pass.
    return isinstance(cause, CursorNotFound) or cause.code not in (13, 18)
