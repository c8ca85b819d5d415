"""MongoDB, as the protocol needs it: single-document atomic updates that return the image, and no more.

Works on a standalone server, a replica set and compatible services: nothing here needs a transaction, a change
stream or a collation. Every write is ``w: majority, j: true`` and reads go to the primary node.

Design of the compare-and-set: the filter names the revision that was read, so of a request and its repetition
only one can match. That is what lets an unanswered write be resolved by sending it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import pymongo
import pymongo.lock
from bson.errors import BSONError
from bson.int64 import Int64
from bson.raw_bson import RawBSONDocument
from pymongo import AsyncMongoClient, InsertOne, ReplaceOne, ReturnDocument, UpdateOne
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    ConfigurationError,
    DocumentTooLarge,
    DuplicateKeyError,
    InvalidOperation,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WaitQueueTimeoutError,
)
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference
from pymongo.write_concern import WriteConcern

from crossfade import errors
from crossfade.entity import Entity, UniqueRule
from crossfade.part import Part
from crossfade.query import Query
from crossfade.record import CF, Debt, DebtKey, Image, new_operation
from crossfade.stores.bulk_mongo import id_of
from crossfade.stores.conditions import as_filter, as_filter_behind, as_sort
from crossfade.stores.errors import RuleBroken, Unanswered
from crossfade.values import CODEC_OPTIONS, Unmappable, decode_document, id_to_text, text_to_id

STORE = "mongo"
TOMBSTONES = "crossfade_tombstones"
CONTROL = "crossfade_control"
HISTORY = "crossfade_history"
WORKERS = "crossfade_workers"
#: Inserts of one id that a tombstone remembers.
BORN = 16
#: Debts that one command erases.
_PAIRS = 200
#: The stage that puts collections together, and the errors of servers that do not know a stage (304: Amazon's).
_UNION, _UNKNOWN_STAGE = "$unionWith", (40324, 304)

if sys.version_info < (3, 12):

    async def _wait_for(awaitable: Awaitable[Any], timeout: float | None) -> Any:
        async with asyncio.timeout(timeout):
            return await awaitable

    # Before 3.12 `asyncio.wait_for` runs what it waits for in a task of its own. Whoever is cancelled twice meanwhile,
    # by a deadline and by the end of a request, leaves that task behind, and it takes the lock for nobody: every
    # later call of this client hangs. So, as 3.12 does it, in the waiting task itself.
    pymongo.lock.wait_for = _wait_for  # type: ignore[assignment, attr-defined]

_RAW = CODEC_OPTIONS.with_options(document_class=RawBSONDocument)
_AUTHENTICATION = (13, 18)
# DocumentDB reports a broken unique rule inside find_one_and_update and upserts as code 1 with PostgreSQL's
# text, where MongoDB has code 11000.
_VIOLATION = re.compile(r"(unique|exclusion) constraint|duplicate key", re.IGNORECASE)
# A document of more than 16 MiB, sent or made by an update: MongoDB's words, and DocumentDB's, whose codes differ.
_TOO_LARGE = re.compile(r"larger than (\d|MaxDocumentSize)|object to insert too large|BSONObj size: ")
_INDEX_NAME = re.compile(r"index:\s+(\S+)|Index '([^']+)'")


@dataclass(frozen=True, slots=True)
class Owed:
    """One debt found in MongoDB: of a document, or of a tombstone.

    Attributes:
        entity: the entity's name.
        id: the record's ``_id``.
        rev, op: the revision that is owed.
        tombstone: the debt is a tombstone's.
        tentative: success has not been told yet.
        parked: why PostgreSQL refuses it, or None.
        delivery: nothing is owed: an insert that was delivered, and is not known to stand yet.
        parts: the parts that are owed.
        steps: an operation that it decided is not carried out in MongoDB yet.
    """

    entity: str
    id: Any
    rev: int
    op: str | None
    tombstone: bool = False
    tentative: bool = False
    parked: str | None = None
    delivery: bool = False
    parts: tuple[str, ...] = ()
    steps: bool = False


@dataclass(frozen=True, slots=True)
class Unstamped:
    """Documents that did not get their normalised key, each (id, value, key).

    Attributes:
        taken: another document has it.
        no_room: the document is so near MongoDB's 16 MiB that it cannot take one.
    """

    taken: list[tuple[Any, Any, str]] = field(default_factory=list)
    no_room: list[tuple[Any, Any, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Put:
    """A document that is to stand where exactly ``before`` stands, None: nothing.

    ``small``: both without their parts.
    """

    before: bytes | None
    document: Mapping[str, Any]
    small: bool


@dataclass(frozen=True, slots=True)
class Tombstone:
    """A deleted record in MongoDB: its id may come back only above ``rev``.

    Attributes:
        born: operation ids of the inserts that had made it, the last ones: a repetition of one of them that arrives
            late must not bring it back.
        group: the other records of the operation that deleted it, while it is owed; see `Debt`.
        done: the operations whose step it had taken, as in `Image`: a record made anew must not take it again.
    """

    entity: str
    id: Any
    rev: int
    op: str
    owed: bool
    born: tuple[str, ...] = ()
    group: tuple[tuple[str, str], ...] = ()
    done: tuple[Mapping[str, str], ...] = ()

    def as_image(self) -> Image:
        """What it is to whoever brings it, together with others of its operation."""
        debt = Debt(0, group=self.group)
        return Image(self.id, {"_id": self.id}, self.rev, self.op, {}, b"", debt, deleted=True)


def _owed(note: Mapping[str, Any]) -> Owed:
    """From a document's notes with its entity's name, or from a tombstone."""
    if CF not in note:
        key = note["_id"]
        return Owed(key["entity"], text_to_id(key["id"]), int(note["rev"]), note["op"], tombstone=True)
    cf = note[CF]
    debt = Debt.from_document(cf["debt"])
    assert debt is not None
    return Owed(
        note["entity"], note["_id"], int(cf.get("rev", 0)), cf.get("op"), tentative=debt.tentative is not None,
        parked=debt.parked, delivery=debt.delivery, parts=debt.parts, steps="steps" in cf,
    )  # fmt: skip


def _tombstone(note: Mapping[str, Any], id_: Any) -> Tombstone:
    return Tombstone(
        note["_id"]["entity"], id_, int(note["rev"]), note["op"], "debt" in note, tuple(note.get("born", ())),
        tuple((name, text) for name, text in note.get("group", ())), tuple(note.get("done", ())),
    )  # fmt: skip


def just(value: Any) -> dict[str, Any]:
    """A filter's condition for just this value: ``$eq`` alone takes an array for each of its elements, too, and a field
    that is missing for null.
    """
    exact = {"$eq": value, "$exists": True}
    return exact if isinstance(value, list) else {**exact, "$not": {"$type": "array"}}


def same_birth(op: str | None, born: str | None, debt: Debt | None) -> dict[str, Any]:
    """What keeps a write off an insert repeated that came, behind a delete, in the place of a record that was seen.

    It is at the same revision, and owed as it was sent; its sendings are told apart. One of phase 0 owes nothing.
    """
    if op is None or born != op:
        return {}
    settled = {f"{CF}.debt": {"$exists": False}}
    return settled if debt is None else {"$or": [settled, {f"{CF}.debt.sending": {"$eq": debt.sending}}]}


def _rev_filter(rev: int) -> dict[str, Any]:
    return {f"{CF}.rev": Int64(rev)} if rev else {f"{CF}.rev": {"$exists": False}}


class _Asking:
    """See `MongoStore._asking`. A class, because a generator's turn costs a write as much as its own work does."""

    __slots__ = ("_bound", "_store")

    def __init__(self, store: MongoStore, timeout: float | None) -> None:
        self._store, self._bound = store, pymongo.timeout(timeout)

    def __enter__(self) -> None:
        self._bound.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bound.__exit__(kind, cause, trace)
        if isinstance(cause, PyMongoError | BSONError | OverflowError | UnicodeEncodeError):
            raise self._store._translated(cause) from cause


class MongoStore:
    """One MongoDB database.

    Args:
        uri: ``mongodb://.../<database>``; the path names the database.
        select_timeout: seconds to find a server before a call fails.
        max_pool: connections at most.

    Raises:
        crossfade.errors.ConfigurationError: the URI cannot be understood or names no database.
    """

    def __init__(self, uri: str, *, select_timeout: float = 2.0, max_pool: int = 50) -> None:
        try:
            self._client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(
                uri,
                serverSelectionTimeoutMS=int(select_timeout * 1000),
                connectTimeoutMS=int(select_timeout * 1000),
                maxPoolSize=max_pool,
                # The protocol itself repeats what may be repeated; a driver that repeats a write on its own
                # would hide an unknown outcome.
                retryWrites=False,
                retryReads=False,
                appname="crossfade",
            )
            database = self._client.get_default_database()
        except (PyMongoError, ValueError) as cause:
            hint = (
                "it names no database: write mongodb://host:port/<database>"
                if isinstance(cause, ConfigurationError) and "default database" in str(cause)
                else str(cause)
            )
            raise errors.ConfigurationError(f"MONGO_URI cannot be used: {hint}") from None
        self.database: AsyncDatabase[dict[str, Any]] = database.with_options(
            codec_options=CODEC_OPTIONS,
            read_preference=ReadPreference.PRIMARY,
            write_concern=WriteConcern(w="majority", j=True),
            read_concern=ReadConcern("local"),
        )
        self._raw: AsyncDatabase[RawBSONDocument] = self.database.with_options(codec_options=_RAW)
        self._opened: dict[str, tuple[AsyncCollection[dict[str, Any]], AsyncCollection[RawBSONDocument]]] = {}
        nodes = pymongo.uri_parser.parse_uri(uri, validate=False)["nodelist"] if "+srv" not in uri else []
        #: Whether the server joins collections in one request, as far as is known.
        self._unites = True
        self.address = ",".join(f"{host}:{port}" for host, port in nodes) or "the cluster in MONGO_URI"

    async def close(self) -> None:
        """Close every connection."""
        await self._client.close()

    def _asking(self, timeout: float | None) -> _Asking:
        """Bound what is asked within the block in seconds, and translate what the driver raises."""
        return _Asking(self, timeout)

    def _translated(self, cause: PyMongoError | BSONError | OverflowError | UnicodeEncodeError) -> Exception:
        match cause:
            case DuplicateKeyError():
                return self._rule_broken(cause)
            case ServerSelectionTimeoutError() | WaitQueueTimeoutError():
                return errors.StoreUnavailable(STORE, self.unreachable("no server answers"))
            case DocumentTooLarge() | BSONError() | OverflowError() | UnicodeEncodeError():
                return errors.Quarantined(f"MongoDB cannot hold this document: {cause}")
            case OperationFailure() if _VIOLATION.search(str(cause)):
                return self._rule_broken(cause)
            case OperationFailure() if cause.code in _AUTHENTICATION:
                return errors.StoreUnavailable(
                    STORE, self.unreachable("it refuses the user or password in MONGO_URI")
                )
            case OperationFailure() if _TOO_LARGE.search(str(cause)):
                return errors.Quarantined(f"MongoDB cannot hold this document: {cause}")
            case OperationFailure():
                # Compatible services report their engine's failure as an ordinary command error.
                return Unanswered(STORE, self.unreachable(f"error {cause.code}"))
            case AutoReconnect() | InvalidOperation():
                return Unanswered(STORE, self.unreachable("the connection failed"))
            case _:
                return Unanswered(STORE, self.unreachable(type(cause).__name__))

    def unreachable(self, cause: str) -> str:
        """What to tell of this store where it cannot be asked, and what to do."""
        return f"cannot reach MongoDB at {self.address} ({cause}). Is it running? MONGO_URI sets the address."

    @staticmethod
    def _rule_broken(cause: OperationFailure) -> RuleBroken:
        found = _INDEX_NAME.search(str(cause))
        name = (found.group(1) or found.group(2)) if found else ""
        return RuleBroken(STORE, name, "MongoDB: another document holds this value of a unique index")

    async def ping(self, timeout: float = 1.0) -> float:
        """Seconds that a round trip took.

        Raises:
            crossfade.errors.StoreUnavailable: no answer within ``timeout`` seconds.
        """
        began = time.monotonic()
        with self._asking(timeout):
            # A read, because a compatible gateway answers `ping` while its engine is down.
            await self.database[CONTROL].find_one({"_id": "-"})
        return time.monotonic() - began

    # --- documents ---------------------------------------------------------------------------------------

    def _documents(self, entity: Entity) -> AsyncCollection[dict[str, Any]]:
        return self._collections(entity)[0]

    def _raw_documents(self, entity: Entity) -> AsyncCollection[RawBSONDocument]:
        return self._collections(entity)[1]

    def _collections(
        self, entity: Entity
    ) -> tuple[AsyncCollection[dict[str, Any]], AsyncCollection[RawBSONDocument]]:
        name = entity.collection
        if name not in self._opened:
            self._opened[name] = (self.database[name], self._raw[name])
        return self._opened[name]

    async def read(
        self, entity: Entity, id_: Any, *, timeout: float, without: Collection[str] = ()
    ) -> Image | None:
        """The record's image, one with ``deleted`` included; None where there is no document.

        ``without``: parts to leave out, confirmed or not.

        Raises:
            crossfade.values.Unmappable: the document holds bytes that cannot be carried back unchanged.
        """
        found = await self._few(entity, {"_id": id_}, 1, timeout=timeout, without=without)
        return Image.from_raw(found[0], entity.parts, without) if found else None

    async def read_owed(self, entity: Entity, id_: Any, *, timeout: float) -> Image | None:
        """The record's image without its parts if PostgreSQL has confirmed them all, else whole; see `read`."""
        if entity.parts:
            small = {"_id": id_, **_confirmed(entity)}
            found = await self._few(entity, small, 1, timeout=timeout, without=entity.parts)
            if found:
                return Image.from_raw(found[0], entity.parts, entity.parts)
        return await self.read(entity, id_, timeout=timeout)

    async def read_raw(
        self, entity: Entity, id_: Any, *, timeout: float, without: Collection[str] = ()
    ) -> bytes | None:
        """The document's bytes, as stored; ``without`` these parts."""
        found = await self._few(entity, {"_id": id_}, 1, timeout=timeout, without=without)
        return found[0] if found else None

    async def _few(
        self,
        entity: Entity,
        query: Mapping[str, Any],
        limit: int,
        *,
        timeout: float,
        without: Collection[str] = (),
    ) -> list[bytes]:
        """The bytes of so few documents that one answer holds them, mostly: a cursor is made only where it does not.

        PyMongo's cursor costs a caller as much as a tenth of the whole question.
        """
        # A command does not inherit it, and gets the server's default, which may be an older state than the primary's.
        concern = self._raw.read_concern.document
        command: dict[str, Any] = {
            "find": entity.collection, "filter": query, "limit": limit, "readConcern": concern,
        }  # fmt: skip
        if without:
            command["projection"] = _all_but(without)
        with self._asking(timeout):
            answer = (await self._raw.command(command, codec_options=_RAW))["cursor"]
            found = answer["firstBatch"]
            if answer["id"]:
                # Together they are larger than an answer may be.
                await self._raw.command({"killCursors": entity.collection, "cursors": [answer["id"]]})
                found = (
                    await self._raw_documents(entity).find(query, _all_but(without)).limit(limit).to_list()
                )
        return [bytes(raw.raw) for raw in found]

    async def read_raw_many(
        self,
        entity: Entity,
        ids: Sequence[Any],
        *,
        size: int,
        timeout: float,
        without: Collection[str] = (),
    ) -> tuple[dict[str, bytes], bool]:
        """The bytes of these documents, ``size`` of them at most, by id text; whether that is all. See `read_raw`."""
        found: dict[str, bytes] = {}
        cursor = self._raw_documents(entity).find({"_id": {"$in": list(ids)}}, _all_but(without))
        with self._asking(timeout):
            try:
                async for raw in cursor:
                    size -= len(raw.raw)
                    if size < 0 and found:
                        return found, False
                    # Not raw["_id"], which decodes the whole.
                    found[id_to_text(id_of(bytes(raw.raw)))] = bytes(raw.raw)
            finally:
                await cursor.close()
        return found, True

    async def owing(
        self, entity: Entity, ids: Sequence[Any], *, size: int, timeout: float
    ) -> tuple[list[Image], bool]:
        """The images of those of these records that are in debt, ``size`` bytes of them at most; whether that is all.

        Those whose parts PostgreSQL has confirmed come without. It is not all where there are more, or one that cannot
        be read.
        """
        images: dict[str, Image] = {}  # one that changes meanwhile may be found twice
        all_of_them = True
        query = {"_id": {"$in": list(ids)}, f"{CF}.debt": {"$exists": True}}
        for more, without in _small_first(entity):
            cursor = self._raw_documents(entity).find({**query, **more}, _all_but(without))
            with self._asking(timeout):
                try:
                    async for raw in cursor:
                        size -= len(raw.raw)
                        if size < 0 and images:
                            return list(images.values()), False
                        if len(images) % 16 == 15:
                            await asyncio.sleep(0)  # what has come is decoded without a pause otherwise
                        try:
                            image = Image.from_raw(bytes(raw.raw), entity.parts, without)
                            images[id_to_text(image.id)] = image
                        except Unmappable:
                            all_of_them = False
                finally:
                    await cursor.close()
        return list(images.values()), all_of_them

    async def notes(
        self, entity: Entity, id_: Any, fields: Iterable[str], *, timeout: float
    ) -> dict[str, Any] | None:
        """``_cf`` and these top-level fields of a document, which may be many megabytes larger."""
        projection = dict.fromkeys((CF, *fields), 1)
        with self._asking(timeout):
            return await self._documents(entity).find_one({"_id": id_}, projection)

    async def read_many(
        self, entity: Entity, ids: Sequence[Any], *, timeout: float, without: Collection[str] = ()
    ) -> list[Image]:
        """Images of the records of these ids that there are, deleted ones left out, in no order; see `read`."""
        query = {"_id": {"$in": list(ids)}, f"{CF}.deleted": {"$ne": True}}
        with self._asking(timeout):
            found = await self._raw_documents(entity).find(query, _all_but(without)).to_list()
        return [Image.from_raw(bytes(raw.raw), entity.parts, without) for raw in found]

    async def find(
        self,
        entity: Entity,
        query: Query,
        *,
        timeout: float,
        without: Collection[str] = (),
        but: Sequence[Any] = (),
    ) -> list[Image]:
        """Images of the records that a query asks for, deleted ones and the ids ``but`` left out; see `read`."""
        standing = {f"{CF}.deleted": {"$ne": True}}
        others = {"_id": {"$nin": list(but)}} if but else {}
        asked = (as_filter(entity, query.where), as_filter_behind(query), standing, others)
        parts = [part for part in asked if part]
        cursor = (
            self._raw_documents(entity).find({"$and": parts}, _all_but(without)).sort(as_sort(query.order))
        )
        with self._asking(timeout):
            found = await cursor.skip(query.skip).limit(query.limit).to_list()
        return [Image.from_raw(bytes(raw.raw), entity.parts, without) for raw in found]

    async def look_up(
        self,
        entity: Entity,
        alternatives: Sequence[Mapping[str, Any]],
        *,
        timeout: float,
        without: Collection[str] = (),
    ) -> list[Image]:
        """Images of the few records that match any of these filters, each on an index, deleted ones left out.

        In no order: sorting by ``_id`` would tempt a server into walking that index. ``without``: see `read`.
        """
        query = {"$or": list(alternatives), f"{CF}.deleted": {"$ne": True}}
        found = await self._few(entity, query, 4, timeout=timeout, without=without)
        return [Image.from_raw(raw, entity.parts, without) for raw in found]

    async def count(self, entity: Entity, where: Sequence[Mapping[str, Any]], *, timeout: float) -> int:
        """How many records match these conditions, deleted ones left out."""
        query = {"$and": [as_filter(entity, where), {f"{CF}.deleted": {"$ne": True}}]}
        with self._asking(timeout):
            return await self._documents(entity).count_documents(query)

    async def insert(self, entity: Entity, document: Mapping[str, Any], *, timeout: float) -> None:
        """Insert a document, its ``_cf`` included.

        Raises:
            RuleBroken: a unique index, ``_id`` included.
        """
        with self._asking(timeout):
            await self._documents(entity).insert_one(dict(document))

    async def compare_and_set(
        self,
        entity: Entity,
        id_: Any,
        *,
        rev: int,
        set_: Mapping[str, Any],
        unset: Iterable[str] = (),
        push: Mapping[str, Any] | None = None,
        also: Mapping[str, Any] | None = None,
        left_out: Mapping[str, Part | None] | None = None,
        foreseen: Callable[[], Image] | None = None,
        timeout: float,
    ) -> Image | None:
        """Change a document that is at revision ``rev``, and return its image after; None: no match.

        ``set_``, ``unset`` and ``push`` (one value to the end of an array) name paths; ``also`` narrows the filter
        further. ``left_out`` are parts that the image does not need; the document must note them so, None: or not.
        ``foreseen``: what the document is going to hold, if nobody has changed it without a revision.
        """
        without = left_out or {}
        noted = {f"{CF}.parts.{n}.rev": Int64(part.rev) for n, part in without.items() if part is not None}
        update: dict[str, Any] = {"$set": dict(set_)}
        if push:
            update["$push"] = dict(push)
        gone = dict.fromkeys(unset, "")
        if f"{CF}.digest" not in set_:
            # It is no longer what a delivery left, when PostgreSQL was primary before.
            gone[f"{CF}.digest"] = ""
        if gone:
            update["$unset"] = gone
        with self._asking(timeout):
            raw = await self._raw_documents(entity).find_one_and_update(
                {"_id": id_, **_rev_filter(rev), **noted, **(also or {})},
                update,
                _all_but(without),
                return_document=ReturnDocument.AFTER,
            )
        if raw is None:
            return None
        after = bytes(raw.raw)
        expected = None if foreseen is None or without else foreseen().in_raw(after, entity.parts)
        return expected or Image.from_raw(after, entity.parts, without)

    async def remove(self, entity: Entity, id_: Any, *, rev: int, op: str, timeout: float) -> bool:
        """Remove a document whose delete was decided at this revision by this operation."""
        with self._asking(timeout):
            done = await self._documents(entity).delete_one(
                {
                    "_id": id_,
                    f"{CF}.rev": Int64(rev),
                    f"{CF}.op": op,
                    f"{CF}.deleted": True,
                    # What it owes to other records must not go with it.
                    f"{CF}.steps": {"$exists": False},
                }
            )
        return done.deleted_count == 1

    async def remove_echo(self, entity: Entity, id_: Any, *, rev: int, op: str, timeout: float) -> bool:
        """Remove a document that is still as this insert, or its delivery, made it; whether it was.

        ``rev``: the same insert may make it anew above a tombstone, and a removal that arrives late is not of that.
        """
        newborn = [{f"{CF}.born": op}, {f"{CF}.debt.delivery": True}]
        query = {"_id": id_, **_rev_filter(rev), f"{CF}.op": op, "$or": newborn}
        with self._asking(timeout):
            done = await self._documents(entity).delete_one(query)
        return done.deleted_count == 1

    async def deliver(
        self, entity: Entity, before: bytes | None, document: Mapping[str, Any], *, timeout: float
    ) -> bool:
        """Put ``document`` where exactly ``before`` stands; False when something else does by now.

        The filter holds every value that was seen, so a foreign write in between makes it miss.

        Raises:
            RuleBroken: another document holds a value of a unique index.
        """
        if before is None:
            try:
                await self.insert(entity, document, timeout=timeout)
            except RuleBroken:
                with self._asking(timeout):
                    there = await self._documents(entity).count_documents({"_id": document["_id"]}, limit=1)
                if there:
                    return False
                raise
            return True
        filter_, change = _over(before, document)
        with self._asking(timeout):
            if isinstance(change, list):
                result = await self._documents(entity).update_one(filter_, change)
            else:
                result = await self._documents(entity).replace_one(filter_, change)
        return result.matched_count == 1

    async def deliver_small(
        self, entity: Entity, before: Mapping[str, Any], document: Mapping[str, Any], *, timeout: float
    ) -> bool | None:
        """The same of documents without their parts, which stay as they are; None: an update cannot do that."""
        small = _over_small(before, document)
        if small is None:
            return None
        with self._asking(timeout):
            result = await self._documents(entity).update_one(*small)
        return result.matched_count == 1

    async def deliver_many(self, entity: Entity, puts: Sequence[Put], *, timeout: float) -> set[str]:
        """`deliver`, or `deliver_small`, of many; the id texts of those that stand now as they were to be put.

        Of the others a rule of MongoDB keeps some from it, and others were written since they were seen. They are told
        apart by their notes, so those of what is put must not be there yet.
        """
        requests: list[Any] = []
        for put in puts:
            if put.before is None:
                requests.append(InsertOne(dict(put.document)))
            elif put.small:
                small = _over_small(decode_document(put.before), put.document)
                if small is not None:
                    requests.append(UpdateOne(*small))
            else:
                filter_, change = _over(put.before, put.document)
                requests.append(
                    UpdateOne(filter_, change) if isinstance(change, list) else ReplaceOne(filter_, change)
                )
        if not requests:
            return set()
        delivered = {id_to_text(put.document["_id"]): put.document[CF] for put in puts}
        with self._asking(timeout):
            try:
                done = await self._documents(entity).bulk_write(requests, ordered=False)
                if done.matched_count + done.inserted_count == len(puts):
                    return set(delivered)
            except BulkWriteError as cause:
                if cause.details["writeConcernErrors"]:
                    raise
            # A count does not say which.
            ids = [put.document["_id"] for put in puts]
            found = await self._documents(entity).find({"_id": {"$in": ids}}, {CF: 1}).to_list()
        notes = {id_to_text(document["_id"]): document.get(CF) for document in found}
        return {key for key, wanted in delivered.items() if notes.get(key) == wanted}

    async def deliver_removal(self, entity: Entity, before: bytes, *, timeout: float) -> bool:
        """Remove the document if it is exactly ``before``."""
        with self._asking(timeout):
            result = await self._documents(entity).delete_one(_exactly(before))
        return result.deleted_count == 1

    # --- steps of operations of several records -----------------------------------------------------------

    async def close_step(self, entity: Entity, id_: Any, *, op: str, timeout: float) -> None:
        """Turn a tentative step of this operation into a plain debt."""
        with self._asking(timeout):
            await self._documents(entity).update_one(
                {"_id": id_, f"{CF}.op": op, f"{CF}.debt.tentative.anchor.op": op},
                {"$unset": {f"{CF}.debt.tentative": ""}},
            )

    async def erase_steps(self, entity: Entity, id_: Any, *, op: str, timeout: float) -> None:
        """Erase what a record owes to others of this operation."""
        with self._asking(timeout):
            await self._documents(entity).update_one(
                {"_id": id_, f"{CF}.steps.op": op}, {"$unset": {f"{CF}.steps": ""}}
            )

    async def erase_mark(self, entity: Entity, id_: Any, *, op: str, timeout: float) -> None:
        """Erase the mark that a record has taken its step of this operation."""
        with self._asking(timeout):
            await self._documents(entity).update_one(
                {"_id": id_, f"{CF}.done.op": op}, {"$pull": {f"{CF}.done": {"op": op}}}
            )

    # --- debts -------------------------------------------------------------------------------------------

    async def settle(self, entity: Entity, settled: Sequence[DebtKey], *, timeout: float) -> None:
        """Erase these debts, where they still stand, and note what was confirmed of their parts."""
        plain = [key for key in settled if not key.parts]
        noting = [UpdateOne({**_still_owed(key), **_CLOSED}, _noting(key)) for key in settled if key.parts]
        # One command with every pair in its filter: a server takes several times as long over a command each.
        for at in range(0, len(plain), _PAIRS):
            portion = plain[at : at + _PAIRS]
            still = {
                "_id": {"$in": [key.id for key in portion]},
                "$or": [_still_owed(key) for key in portion],
                **_CLOSED,
            }
            with self._asking(timeout):
                await self._documents(entity).update_many(still, {"$unset": {f"{CF}.debt": ""}})
        if noting:
            with self._asking(timeout):
                await self._documents(entity).bulk_write(noting, ordered=False)

    async def owe(self, entity: Entity, id_: Any, rev: int, debt: Debt, *, timeout: float) -> None:
        """Lift a document at this revision that cannot be read, into this debt."""
        marks = {"rev": Int64(rev + 1), "op": new_operation(), "debt": debt.to_document()}
        update: dict[str, Any] = {"$set": {f"{CF}.{name}": value for name, value in marks.items()}}
        if entity.parts:
            update["$unset"] = {f"{CF}.parts": ""}  # whoever mends it may mend a part
        with self._asking(timeout):
            await self._documents(entity).update_one(
                {"_id": id_, **_rev_filter(rev), f"{CF}.debt": {"$exists": False}}, update
            )

    async def park(
        self, entity: Entity, id_: Any, rev: int, op: str | None, cause: str, *, timeout: float
    ) -> None:
        """Note beside the debt why PostgreSQL refuses this revision."""
        query: dict[str, Any] = {"_id": id_, **_rev_filter(rev), f"{CF}.debt": {"$exists": True}}
        if op is not None:
            query[f"{CF}.op"] = op
        with self._asking(timeout):
            await self._documents(entity).update_one(query, {"$set": {f"{CF}.debt.parked": cause}})

    async def debts(
        self, entities: Iterable[Entity], *, limit: int, timeout: float, parked: bool = True
    ) -> list[Owed]:
        """Up to ``limit`` debts of each of these entities, and as many of tombstones.

        ``parked=False``: of those that are not parked, which many that are would hide otherwise.
        """
        found: list[Owed] = []
        with self._asking(timeout):
            async for note in self._owing(list(entities), limit=limit, parked=parked):
                if len(found) % 100 == 99:
                    await asyncio.sleep(0)  # what has come is decoded without a pause otherwise
                found.append(_owed(note))
        return found

    async def each_debt(
        self, entities: Iterable[Entity], *, page: int, timeout: float
    ) -> AsyncIterator[Owed]:
        """Every debt that is not parked, once, ``page`` of each at a time: those that stay hide no others."""
        of, seen = list(entities), set[tuple[str, bool, str]]()
        while True:
            found = await self.debts(of, limit=page + len(seen), parked=False, timeout=timeout)
            fresh = {(owed.entity, owed.tombstone, id_to_text(owed.id)): owed for owed in found}
            for place in seen & fresh.keys():
                del fresh[place]
            if not fresh:
                return
            seen |= fresh.keys()
            for owed in fresh.values():
                yield owed

    async def count_debts(self, entities: Iterable[Entity], *, timeout: float) -> int:
        """How many debts these entities have, those of tombstones among them."""
        of, number = list(entities), 0
        with self._asking(timeout):
            for entity in of:
                number += await self._documents(entity).count_documents({f"{CF}.debt": {"$exists": True}})
            buried = {"_id.entity": {"$in": [entity.name for entity in of]}, "debt": {"$exists": True}}
            return number + await self.database[TOMBSTONES].count_documents(buried)

    async def _owing(
        self, entities: Sequence[Entity], *, limit: int, parked: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """What `_owed` reads, of documents and of tombstones; in one request where the server can."""
        owing: dict[str, Any] = {f"{CF}.debt": {"$exists": True}}
        if not parked:
            owing[f"{CF}.debt.parked"] = {"$exists": False}
        notes = {f"{CF}.rev": 1, f"{CF}.op": 1, f"{CF}.debt": 1, f"{CF}.steps.op": 1}
        sources: list[tuple[str, list[dict[str, Any]]]] = [
            (
                entity.collection,
                [
                    {"$match": owing},
                    {"$limit": limit},
                    {"$project": notes | {"entity": {"$literal": entity.name}}},
                ],
            )
            for entity in entities
        ]
        # Tombstones last: a delete that is being carried out moves its debt from the document to one.
        buried = {"_id.entity": {"$in": [entity.name for entity in entities]}, "debt": {"$exists": True}}
        sources.append((TOMBSTONES, [{"$match": buried}, {"$limit": limit}]))
        requests = sources
        if self._unites:
            # Every worker asks four times a second: eight requests cost it seven times as much as one.
            (first, stages), *others = sources
            united = [{_UNION: {"coll": name, "pipeline": each}} for name, each in others]
            requests = [(first, [*stages, *united])]
        for name, stages in requests:
            try:
                cursor = await self.database[name].aggregate(stages)
            except OperationFailure as cause:
                if not self._unites or cause.code not in _UNKNOWN_STAGE:
                    raise
                self._unites = False  # an older server
                async for note in self._owing(entities, limit=limit, parked=parked):
                    yield note
                return
            async for note in cursor:
                yield note

    # --- tombstones --------------------------------------------------------------------------------------

    async def bury(
        self,
        entity: Entity,
        id_: Any,
        *,
        rev: int,
        op: str,
        owed: bool,
        born: str | None = None,
        done: Sequence[Mapping[str, str]] = (),
        group: tuple[tuple[str, str], ...] = (),
        timeout: float,
    ) -> None:
        """Keep a tombstone at this revision; one at a higher revision stays as it is."""
        key = {"entity": entity.name, "id": id_to_text(id_)}
        note: dict[str, Any] = {"rev": Int64(rev), "op": op}
        if done:
            note["done"] = [dict(mark) for mark in done]
        if owed:
            note["debt"] = True
            if group:
                note["group"] = [list(member) for member in group]
        with self._asking(timeout):
            try:
                await self.database[TOMBSTONES].insert_one(
                    {"_id": key, **note, **({"born": [born]} if born else {})}
                )
            except DuplicateKeyError:
                update: dict[str, Any] = {"$set": note}
                if gone := {"debt", "group", "done"} - note.keys():
                    update["$unset"] = dict.fromkeys(gone, "")
                if born:
                    update["$push"] = {"born": {"$each": [born], "$slice": -BORN}}
                await self.database[TOMBSTONES].update_one({"_id": key, "rev": {"$lt": Int64(rev)}}, update)

    async def tombstone(self, entity: Entity, id_: Any, *, timeout: float) -> Tombstone | None:
        """The record's tombstone."""
        key = {"entity": entity.name, "id": id_to_text(id_)}
        with self._asking(timeout):
            note = await self.database[TOMBSTONES].find_one({"_id": key})
        return None if note is None else _tombstone(note, id_)

    async def tombstones(self, entity: Entity, ids: Sequence[Any], *, timeout: float) -> list[Tombstone]:
        """The tombstones of those of ``ids`` that have one."""
        by_text = {id_to_text(id_): id_ for id_ in ids}
        query = {"_id": {"$in": [{"entity": entity.name, "id": text} for text in by_text]}}
        with self._asking(timeout):
            notes = await self.database[TOMBSTONES].find(query).to_list()
        return [_tombstone(note, by_text[note["_id"]["id"]]) for note in notes]

    async def buried_among(self, entity: Entity, ids: Sequence[Any], *, timeout: float) -> dict[str, int]:
        """Revisions of the tombstones of those of ``ids`` that have one, by id text."""
        keys = [{"entity": entity.name, "id": id_to_text(id_)} for id_ in ids]
        with self._asking(timeout):
            found = await self.database[TOMBSTONES].find({"_id": {"$in": keys}}, {"rev": 1}).to_list()
        return {note["_id"]["id"]: int(note["rev"]) for note in found}

    async def standing(self, entity: Entity, images: list[Image], *, timeout: float) -> list[Image]:
        """Those of these images that are no newborn over a tombstone.

        Such a one is an insert that did not know of a delete (it came late, or the delete came between its look and
        its write). It is taken back or made anew above the tombstone; nobody has been told of it.
        """
        newborn = [image.id for image in images if image.is_newborn]
        if not newborn:
            return images
        buried = await self.buried_among(entity, newborn, timeout=timeout)
        return [
            image for image in images
            if not image.is_newborn or buried.get(id_to_text(image.id), -1) < image.rev
        ]  # fmt: skip

    async def settle_tombstones(
        self, entity: Entity, confirmed: Sequence[tuple[Any, int, str]], *, timeout: float
    ) -> None:
        """Erase the debts of tombstones that still stand at these revisions and operations: (id, rev, op) of each."""
        still = [
            {"_id": {"entity": entity.name, "id": id_to_text(id_)}, "rev": Int64(rev), "op": op}
            for id_, rev, op in confirmed
        ]
        for at in range(0, len(still), _PAIRS):  # as in `settle`
            portion = still[at : at + _PAIRS]
            with self._asking(timeout):
                await self.database[TOMBSTONES].update_many(
                    {"_id": {"$in": [each["_id"] for each in portion]}, "$or": portion},
                    {"$unset": {"debt": "", "group": ""}},
                )

    # --- sweeping for foreign writes ---------------------------------------------------------------------

    async def changed_since(
        self, entity: Entity, field: str, since: Any, *, batch: int, timeout: float
    ) -> AsyncIterator[Image | tuple[Any, bytes]]:
        """Images of documents whose ``field``, a date, is at or after ``since``; confirmed parts left out."""
        for more, without in _small_first(entity):
            query = {field: {"$gte": since}, **more}
            found = self._iterate(entity, query, batch=batch, timeout=timeout, without=without)
            async for one in found:
                yield one

    async def scan(
        self, entity: Entity, *, batch: int, timeout: float
    ) -> AsyncIterator[Image | tuple[Any, bytes]]:
        """Every document's image; (id, bytes) for a document whose bytes cannot be carried back."""
        async for found in self._iterate(entity, {}, batch=batch, timeout=timeout):
            yield found

    async def _iterate(
        self,
        entity: Entity,
        query: Mapping[str, Any],
        *,
        batch: int,
        timeout: float,
        without: Collection[str] = (),
    ) -> AsyncIterator[Image | tuple[Any, bytes]]:
        # The limit is on each round trip, not on the whole: a full pass takes as long as it takes.
        cursor = self._raw_documents(entity).find(query, _all_but(without), batch_size=batch)
        for number in itertools.count(1):
            if number % 16 == 0:
                await asyncio.sleep(0)  # what has come is decoded without a pause otherwise
            with self._asking(timeout):
                try:
                    raw = await cursor.next()
                except StopAsyncIteration:
                    return
            found: Image | tuple[Any, bytes]
            try:
                found = Image.from_raw(bytes(raw.raw), entity.parts, without)
                id_ = found.id
            except Unmappable:
                try:
                    # Not raw["_id"], which decodes the whole.
                    id_ = id_of(bytes(raw.raw))
                except ValueError:
                    continue
                found = id_, bytes(raw.raw)
            try:
                id_to_text(id_)
            except Unmappable:
                # As where no id can be told: no row could stand for it, so there is nothing to adopt. A verify finds
                # it missing, and a backfill puts it into quarantine.
                continue
            yield found

    async def present(self, entity: Entity, ids: Sequence[Any], *, timeout: float) -> set[str]:
        """Id texts of those of ``ids`` that have a document."""
        with self._asking(timeout):
            found = await self._documents(entity).find({"_id": {"$in": list(ids)}}, {"_id": 1}).to_list()
        return {id_to_text(document["_id"]) for document in found}

    async def is_empty(self, entities: Iterable[Entity], *, timeout: float) -> bool:
        """Whether none of the entities' collections has a document."""
        with self._asking(timeout):
            for entity in entities:
                if await self._documents(entity).find_one({}, {"_id": 1}) is not None:
                    return False
        return True

    async def held_many(
        self, entity: Entity, ids: Sequence[Any], *, timeout: float
    ) -> dict[str, tuple[int, bytes]]:
        """(revision, digest) by id text, of those of ``ids`` that have a document that is not being deleted."""
        query = {"_id": {"$in": list(ids)}, f"{CF}.deleted": {"$ne": True}}
        held: dict[str, tuple[int, bytes]] = {}
        with self._asking(timeout):
            # One by one: parts are large.
            async for raw in self._raw_documents(entity).find(query):
                if len(held) % 16 == 15:
                    await asyncio.sleep(0)  # what has come is decoded without a pause otherwise
                with contextlib.suppress(Unmappable):  # in quarantine, or about to be
                    image = Image.from_raw(bytes(raw.raw), entity.parts)
                    held[id_to_text(image.id)] = (image.rev, image.digest)
        return held

    # --- preparing ---------------------------------------------------------------------------------------

    async def prepare(self, entities: Iterable[Entity], *, timeout: float) -> None:
        """Create the indexes that the protocol needs: debts, tombstones in debt, normalised keys, nested ids.

        Raises:
            RuleBroken: stamped keys collide (they are stamped apart before this is called).
        """
        entities = list(entities)
        for attempt in range(8):
            try:
                await self._create_indexes(entities, timeout=timeout)
                return
            except Unanswered:
                # Workers that start together: a compatible service may see a deadlock in it. It is idempotent.
                if attempt == 7:
                    raise
                await asyncio.sleep(random.uniform(0.05, 0.3))

    async def _create_indexes(self, entities: Sequence[Entity], *, timeout: float) -> None:
        with self._asking(timeout):
            await self.database[TOMBSTONES].create_index("debt", sparse=True)
            for entity in entities:
                documents = self._documents(entity)
                await documents.create_index(f"{CF}.debt", sparse=True)
                there = {index["key"][0][0] for index in (await documents.index_information()).values()}
                for rule in entity.unique:
                    await documents.create_index(f"{CF}.keys.{rule.rule}", unique=True, sparse=True)
                    if rule.field not in there:
                        await documents.create_index(rule.field)  # look-ups try the exact spelling, too
                for ids in entity.nested_ids:
                    await documents.create_index(ids.path)
                if any(column.field == "updatedAt" for column in entity.columns):
                    await documents.create_index("updatedAt")  # the sweep for foreign writes goes by it

    async def missing_indexes(self, entities: Iterable[Entity], *, timeout: float) -> list[str]:
        """The indexes of `prepare` that are not there, as ``collection.path``."""
        missing = []
        with self._asking(timeout):
            for entity in entities:
                there = {
                    tuple(path for path, _ in index["key"])
                    for index in (await self._documents(entity).index_information()).values()
                }
                wanted = [f"{CF}.debt", *(f"{CF}.keys.{rule.rule}" for rule in entity.unique)]
                missing += [f"{entity.collection}.{path}" for path in wanted if (path,) not in there]
        return missing

    async def unfinished(self, entity: Entity, *, timeout: float) -> AsyncIterator[Any]:
        """The ids of documents whose steps or decided delete are still to be carried out, and of those with an open
        write; reads the collection.
        """
        notes = ("steps", "done.0", "debt.tentative")
        filter_ = {"$or": [{f"{CF}.deleted": True}, *({f"{CF}.{note}": {"$exists": True}} for note in notes)]}
        cursor = self._raw_documents(entity).find(filter_, {"_id": 1})
        while True:
            with self._asking(timeout):
                found = await cursor.to_list(100)
            if not found:
                return
            for raw in found:
                yield decode_document(bytes(raw.raw))["_id"]

    async def unstamped(
        self, entity: Entity, field: str, rule: str, *, batch: int, timeout: float
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """Batches of documents without a normalised key for ``rule``, oldest first: ``_id`` and ``field``.

        A document whose bytes are no valid text is left out: it has no key, and goes to quarantine.
        """
        cursor = (
            self._raw_documents(entity)
            .find({f"{CF}.keys.{rule}": {"$exists": False}}, {field: 1}, batch_size=batch)
            .sort("_id", 1)
        )
        while True:
            with self._asking(timeout):
                found = await cursor.to_list(batch)
            if not found:
                return
            documents: list[dict[str, Any]] = []
            for raw in found:
                with contextlib.suppress(Unmappable):
                    documents.append(decode_document(bytes(raw.raw)))
            yield documents

    async def stamp(
        self,
        entity: Entity,
        field: str,
        rule: str,
        keys: Sequence[tuple[Any, Any, str]],
        *,
        timeout: float,
    ) -> Unstamped:
        """Stamp normalised keys, in order, on documents whose ``field`` still holds the value given.

        Each of ``keys`` is (id, value, key). Returns those that did not get theirs.
        """
        path = f"{CF}.keys.{rule}"
        requests = [
            UpdateOne({"_id": id_, field: value, path: {"$exists": False}}, {"$set": {path: key}})
            for id_, value, key in keys
        ]
        if not requests:
            return Unstamped()
        unstamped = Unstamped()
        with self._asking(timeout):
            try:
                # Each on its own in order: of two that want one key the older must get it.
                await self._documents(entity).bulk_write(requests, ordered=False)
            except BulkWriteError as cause:
                for error in cause.details["writeErrors"]:
                    key = keys[error["index"]]
                    if error["code"] == 11000 or _VIOLATION.search(error["errmsg"]):
                        unstamped.taken.append(key)
                    elif _TOO_LARGE.search(error["errmsg"]):
                        unstamped.no_room.append(key)
                    else:
                        raise Unanswered(STORE, self.unreachable("a bulk write failed")) from cause
        return unstamped

    async def restamp(
        self, entity: Entity, image: Image, rule: UniqueRule, key: str | None, *, timeout: float
    ) -> bool:
        """Give a document that still holds this name under another's key its own, None: none; whether it lost that.

        Without a revision, as by `stamp`: keys are no content.
        """
        path = f"{CF}.keys.{rule.rule}"
        there = rule.field in image.document
        still = {
            "_id": image.id,
            path: image.keys[rule.rule],
            f"{CF}.debt.tentative": {"$exists": False},
            rule.field: just(image.document[rule.field]) if there else {"$exists": False},
        }
        for change in ({"$set": {path: key}}, {"$unset": {path: ""}})[key is None :]:
            try:
                with self._asking(timeout):
                    return (await self._documents(entity).update_one(still, change)).matched_count == 1
            except RuleBroken:
                continue
        return False

    # --- the control record ------------------------------------------------------------------------------

    async def control(self, migration: str, *, timeout: float) -> dict[str, Any] | None:
        """The copy of the control record that MongoDB holds."""
        with self._asking(timeout):
            return await self.database[CONTROL].find_one({"_id": migration})

    async def change_control(
        self,
        migration: str,
        record: Mapping[str, Any],
        *,
        expected: int | None,
        timeout: float,
    ) -> bool:
        """Replace the control record that is at version ``expected`` (None: where there is none)."""
        with self._asking(timeout):
            if expected is None:
                try:
                    await self.database[CONTROL].insert_one({"_id": migration, **record})
                except DuplicateKeyError:
                    return False
                return True
            done = await self.database[CONTROL].replace_one(
                {"_id": migration, "version": expected}, {"_id": migration, **record}
            )
        return done.matched_count == 1

    async def copy_control(self, migration: str, record: Mapping[str, Any], *, timeout: float) -> bool:
        """Copy a record that PostgreSQL decided; an older one never replaces a newer one."""
        with self._asking(timeout):
            done = await self.database[CONTROL].replace_one(
                {"_id": migration, "version": {"$lt": record["version"]}}, {"_id": migration, **record}
            )
            if done.matched_count == 0:
                with contextlib.suppress(DuplicateKeyError):
                    await self.database[CONTROL].insert_one({"_id": migration, **record})
        return done.matched_count == 1

    # --- retiring ------------------------------------------------------------------------------------------

    async def marked(self, entity: Entity, *, timeout: float) -> int:
        """How many documents carry Crossfade's notes."""
        with self._asking(timeout):
            return await self._documents(entity).count_documents({CF: {"$exists": True}})

    async def unmark(self, entity: Entity, *, batch: int, timeout: float) -> AsyncIterator[int]:
        """Take the notes out of every document, ``batch`` at a time; yields how many each time, and can be left."""
        documents = self._documents(entity)
        cursor = documents.find({CF: {"$exists": True}}, {"_id": 1}, batch_size=batch)
        try:
            while True:
                ids: list[Any] = []
                with self._asking(timeout):
                    while len(ids) < batch and (note := await anext(cursor, None)) is not None:
                        ids.append(note["_id"])
                    if not ids:
                        return
                    await documents.update_many({"_id": {"$in": ids}}, {"$unset": {CF: ""}})
                yield len(ids)
        finally:
            await cursor.close()

    async def own_indexes(self, entity: Entity, *, timeout: float) -> list[str]:
        """Names of the indexes on Crossfade's notes."""
        with self._asking(timeout):
            there = await self._documents(entity).index_information()
        return [
            name
            for name, index in there.items()
            if any(path.startswith(f"{CF}.") for path, _ in index["key"])
        ]

    async def drop_indexes(self, entity: Entity, names: Iterable[str], *, timeout: float) -> None:
        """Drop these indexes."""
        with self._asking(timeout):
            for name in names:
                await self._documents(entity).drop_index(name)

    async def count_tombstones(self, entities: Iterable[str], *, timeout: float) -> int:
        """How many tombstones there are."""
        with self._asking(timeout):
            return await self.database[TOMBSTONES].count_documents({"_id.entity": {"$in": list(entities)}})

    async def forget(self, migration: str, entities: Iterable[str], *, timeout: float) -> None:
        """Remove a migration's tombstones and its control record, and the collections that are empty then."""
        with self._asking(timeout):
            await self.database[TOMBSTONES].delete_many({"_id.entity": {"$in": list(entities)}})
            await self.database[CONTROL].delete_one({"_id": migration})
            await self.database[HISTORY].delete_many({"_id.migration": migration})
            await self.database[WORKERS].delete_many({"migration": migration})
            for name in (TOMBSTONES, CONTROL, HISTORY, WORKERS):
                if await self.database[name].find_one() is None:
                    await self.database[name].drop()

    async def note_history(
        self, migration: str, entries: Sequence[Mapping[str, Any]], *, timeout: float
    ) -> None:
        """Keep who changed the control record, and why; what is kept already stays as it is."""
        with self._asking(timeout):
            for entry in entries:
                with contextlib.suppress(DuplicateKeyError):
                    key = {"migration": migration, "version": Int64(entry["version"])}
                    await self.database[HISTORY].insert_one({"_id": key, **entry})

    async def history(self, migration: str, *, after: int, timeout: float) -> list[dict[str, Any]]:
        """What `note_history` kept of later versions than ``after``, the oldest first."""
        query = {"_id.migration": migration, "_id.version": {"$gt": after}}
        with self._asking(timeout):
            found = await self.database[HISTORY].find(query, {"_id": 0}).to_list()
        return sorted(found, key=lambda entry: int(entry["version"]))

    # --- who works on it -----------------------------------------------------------------------------------

    async def put_worker(
        self, migration: str, worker: str, entry: Mapping[str, Any], *, timeout: float
    ) -> None:
        """Write a worker's entry in the registry, new or again."""
        change = {"$set": {"migration": migration, "entry": dict(entry)}, "$currentDate": {"seen_at": True}}
        with self._asking(timeout):
            await self.database[WORKERS].update_one({"_id": f"{migration}/{worker}"}, change, upsert=True)

    async def workers(self, migration: str, *, timeout: float) -> list[tuple[str, dict[str, Any]]]:
        """(worker, entry) of everybody in the registry."""
        with self._asking(timeout):
            found = await self.database[WORKERS].find({"migration": migration}).to_list()
        return [(note["_id"].rpartition("/")[2], note["entry"]) for note in found]

    async def silent_for(self, migration: str, *, timeout: float) -> dict[str, float]:
        """Seconds since each worker's entry was written, by this store's own clock."""
        with self._asking(timeout):
            found = await self.database[WORKERS].find({"migration": migration}, {"seen_at": 1}).to_list()
            now = (await self.database.command("hello", codec_options=CODEC_OPTIONS))["localTime"]
        return {
            note["_id"].rpartition("/")[2]: max(0.0, (now - note["seen_at"]).total_seconds())
            for note in found
        }

    async def drop_worker(self, migration: str, worker: str, *, beat: int | None, timeout: float) -> None:
        """Take a worker out of the registry; with ``beat``: only if it has not been heard of since."""
        query: dict[str, Any] = {"_id": f"{migration}/{worker}"}
        if beat is not None:
            query["entry.beat"] = beat
        with self._asking(timeout):
            await self.database[WORKERS].delete_one(query)


def _all_but(parts: Collection[str]) -> dict[str, int] | None:
    """A projection; None for the whole document."""
    return dict.fromkeys(parts, 0) if parts else None


def _confirmed(entity: Entity) -> dict[str, Any]:
    """A filter: the document notes of every part that PostgreSQL holds it."""
    return {f"{CF}.parts.{name}": {"$exists": True} for name in entity.parts}


def _small_first(entity: Entity) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """Filters that share out the documents, each with the parts that may be left out of what it finds."""
    if not entity.parts:
        return [({}, ())]
    some = {"$or": [{path: {"$exists": False}} for path in _confirmed(entity)]}
    return [(_confirmed(entity), entity.parts), (some, ())]


#: A debt that may be erased: nothing of it is open, nor does it show others the way to what is.
_CLOSED: dict[str, Any] = {
    f"{CF}.debt.tentative": {"$exists": False},
    # What it owes to other records, and a mark that nobody needs any more, is found by its debt.
    f"{CF}.steps": {"$exists": False},
    f"{CF}.done.0": {"$exists": False},
}


def _still_owed(key: DebtKey) -> dict[str, Any]:
    return {
        "_id": key.id,
        f"{CF}.rev": Int64(key.rev),
        f"{CF}.op": key.op,
        f"{CF}.debt.sending": {"$eq": key.sending},
    }


def _noting(key: DebtKey) -> dict[str, Any]:
    """The update that erases a debt and notes what was confirmed of its parts."""
    held = {f"{CF}.parts.{name}": part.to_document() for name, part in key.parts if part is not None}
    gone = [f"{CF}.parts.{name}" for name, part in key.parts if part is None]
    update = {"$unset": dict.fromkeys([f"{CF}.debt", *gone], "")}
    return {**update, "$set": held} if held else update


def _is_path(name: str) -> bool:
    """Whether a field's name can be said in a filter and an update."""
    return bool(name) and "." not in name and not name.startswith("$")


def _over(before: bytes, document: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """A filter for just the document that was seen, and what replaces it: a document, or a pipeline."""
    if any(name.startswith("$") for name in document):
        # Old documents have such fields; a server takes them of a pipeline, and of no replacement. The id stays where
        # it is: DocumentDB 1.0 would write a second one.
        content = {name: value for name, value in document.items() if name != "_id"}
        return _exactly(before), [{"$replaceWith": {"$literal": content}}]
    return _exactly(before), dict(document)


def _over_small(
    before: Mapping[str, Any], document: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The same of documents without their parts, which stay as they are; None: an update cannot do that."""
    names, wanted = ([name for name in one if name != CF] for one in (before, document))
    new = [name for name in wanted if name not in before]
    gone = [name for name in names if name not in document]
    stay = [name for name in names if name in document]
    if stay + new != wanted or len(new) > 1 or not all(map(_is_path, {*names, *wanted})):
        return None  # an update puts new fields to the end, several of them in an order of its own
    seen = {name: just(value) for name, value in before.items()}
    update: dict[str, Any] = {"$set": {name: value for name, value in document.items() if name != "_id"}}
    if gone:
        update["$unset"] = dict.fromkeys(gone, "")
    return {**seen, **{name: {"$exists": False} for name in new}, "_id": before["_id"]}, update


def _exactly(seen: bytes) -> dict[str, Any]:
    """A filter that matches only the document that was seen: every field, value and their order."""
    # Its id, whatever else of it does not decode; and its bytes.
    document = RawBSONDocument(seen, _RAW.with_options(unicode_decode_error_handler="replace"))
    return {"_id": document["_id"], "$expr": {"$eq": ["$$ROOT", {"$literal": document}]}}
