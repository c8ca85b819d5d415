"""Writing a generated database to a server, with plain PyMongo.

Documents are made and sent batch by batch, unordered, so memory stays that of one batch. A server may refuse some of
the dirt (another MongoDB, a compatible service, a newer version): such documents are left out, *and listed*. A batch
that fails as a whole is sent again as its clean documents together and each dirty one alone, so that one document never
takes others with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from bson import InvalidDocument
from pymongo.collection import Collection
from pymongo.database import Database
from pymongo.errors import AutoReconnect, BulkWriteError, ConnectionFailure, OperationFailure, PyMongoError

from scorekeeper.legacy.deployment import BATCH, INDEXES, documents_of, sizes_for
from scorekeeper.legacy.dirt import Document, Labelled
from scorekeeper.legacy.population import Population
from scorekeeper.legacy.rates import DEFAULT_RATES, DirtRates
from scorekeeper.legacy.user import password_of

#: Called after each batch with the collection, its documents so far, and how many there are to be.
OnProgress = Callable[[str, int, int], None]

_EXAMPLES = 5
_LOGINS = 500


class TargetNotEmpty(Exception):
    """A collection that was to be generated holds documents already."""


class Login(NamedTuple):
    """A user who can log in: both as the user would type them."""

    username: str
    password: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A document, or an index, that the server would not take.

    Attributes:
        collection: where it belonged.
        what: the `_id` as text, or the name of the index.
        kinds: the dirt in the document; empty for an index.
        cause: what the server said.
    """

    collection: str
    what: str
    kinds: tuple[str, ...]
    cause: str


@dataclass(frozen=True, slots=True)
class LegacySummary:
    """What `generate` wrote.

    Attributes:
        counts: collection -> documents that the server took.
        dirt: collection -> kind of dirt -> documents that have it and that the server took.
        examples: collection -> kind of dirt -> `_id`s of up to five of them.
        logins: up to 500 users, oldest first, whose documents are clean and whose names nobody has in another case.
        admin_logins: those of them who are admins.
        refused: everything that the server would not take; nothing else is missing.
    """

    counts: dict[str, int] = field(default_factory=dict)
    dirt: dict[str, dict[str, int]] = field(default_factory=dict)
    examples: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    logins: list[Login] = field(default_factory=list)
    admin_logins: list[Login] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The summary in types that JSON has; ids as text."""
        plain = asdict(self)
        plain["examples"] = {
            collection: {kind: [str(each) for each in ids] for kind, ids in kinds.items()}
            for collection, kinds in self.examples.items()
        }
        plain["logins"] = [login._asdict() for login in self.logins]
        plain["admin_logins"] = [login._asdict() for login in self.admin_logins]
        return plain


def generate(
    database: Database[Any],
    *,
    seed: int = 1,
    users: int = 20_000,
    rates: DirtRates = DEFAULT_RATES,
    sizes: Mapping[str, int] | None = None,
    on_progress: OnProgress | None = None,
) -> LegacySummary:
    """Fill `database` with what a legacy deployment holds, documents and indexes.

    Args:
        database: of a synchronous client. The collections written to must be empty.
        seed: the same seed, users, rates and sizes give the same documents, byte for byte.
        users: documents of `users`; the other collections follow in realistic ratios.
        rates: how much dirt of each kind.
        sizes: collection -> documents, in place of what the ratio gives.
        on_progress: called after each batch.

    Raises:
        TargetNotEmpty: a collection holds documents; nothing was written.
        ValueError: a size that cannot be; nothing was written.
        pymongo.errors.PyMongoError: the server cannot be reached, or fails for another reason than a document's dirt.
    """
    planned = sizes_for(users, sizes)
    for name in planned:
        if database[name].find_one({}, projection={"_id": 1}) is not None:
            raise TargetNotEmpty(
                f"{database.name}.{name} holds documents already. Choose an empty database, or drop it first."
            )
    summary = LegacySummary()
    population = Population(seed, users, rates)
    for name, n in planned.items():
        _Writer(database[name], population, n, summary, on_progress).write()
    return summary


def drop_collections(database: Database[Any]) -> None:
    """Drop every collection that `generate` writes, and no other."""
    for name in sizes_for(0):
        database.drop_collection(name)


class _Writer:
    """Writes one collection and counts in the summary."""

    def __init__(
        self,
        collection: Collection[Any],
        population: Population,
        n: int,
        summary: LegacySummary,
        on_progress: OnProgress | None,
    ) -> None:
        self._collection = collection
        self._population = population
        self._n = n
        self._summary = summary
        self._on_progress = on_progress
        self._taken = 0
        self._dirt: Counter[str] = Counter()
        self._examples: dict[str, list[Any]] = {}
        # Kinds that made a whole batch fail; their documents go alone from then on.
        self._suspects: set[str] = set()

    def write(self) -> None:
        name = self._collection.name
        self._create_indexes(unique=True)
        batches = _batches(documents_of(name, self._population, self._n), BATCH.get(name, 1000))
        done = 0
        for batch in batches:
            self._insert(batch, done)
            done += len(batch)
            if self._on_progress is not None:
                self._on_progress(name, done, max(self._n, done))
        self._create_indexes(unique=False)
        self._summary.counts[name] = self._taken
        self._summary.dirt[name] = dict(sorted(self._dirt.items()))
        self._summary.examples[name] = self._examples

    def _create_indexes(self, *, unique: bool) -> None:
        # Rules first, so that they judge each document; the others last: built at once they cost a third as much.
        for index in INDEXES.get(self._collection.name, ()):
            if index.document.get("unique", False) is not unique:
                continue
            try:
                self._collection.create_indexes([index])
            except OperationFailure as error:
                refusal = Refusal(self._collection.name, index.document["name"], (), _cause(error))
                self._summary.refused.append(refusal)

    def _insert(self, batch: list[Labelled], first: int) -> None:
        places = list(enumerate(batch, first))
        alone = [(i, one) for i, one in places if self._suspects.intersection(one.kinds)]
        together = [(i, one) for i, one in places if not self._suspects.intersection(one.kinds)]
        try:
            self._insert_together(together)
        except BulkWriteError:
            raise
        except (OperationFailure, InvalidDocument, AutoReconnect):
            dirty = [(i, one) for i, one in together if one.kinds]
            if not dirty:
                raise
            # Whatever part of the batch arrived is taken away again, so that what was refused is known for each.
            with suppress(AutoReconnect):
                self._collection.delete_many({"_id": {"$in": [_id(one.document) for _, one in together]}})
            self._insert_together([(i, one) for i, one in together if not one.kinds])
            for i, one in dirty:
                if not self._insert_alone(i, one):
                    self._suspects.update(one.kinds)
        for i, one in alone:
            self._insert_alone(i, one)

    def _insert_together(self, places: list[tuple[int, Labelled]]) -> None:
        if not places:
            return
        refused: set[int] = set()
        try:
            self._collection.insert_many([one.document for _, one in places], ordered=False)
        except BulkWriteError as error:
            for problem in error.details.get("writeErrors", ()):
                _, one = places[problem["index"]]
                if not one.kinds:
                    # Not the dirt's fault: the database is not what this run made, or the generator is wrong.
                    raise
                refused.add(problem["index"])
                self._refuse(one, f"{problem.get('errmsg', '')} (code {problem.get('code')})")
            if not error.details.get("writeErrors"):
                raise
        for place, (i, one) in enumerate(places):
            if place not in refused:
                self._take(i, one)

    def _insert_alone(self, index: int, one: Labelled) -> bool:
        try:
            self._collection.insert_one(one.document)
        except ConnectionFailure as error:
            # A server that hangs up on one document is still there; one that is gone is not a matter of dirt.
            self._collection.database.client.admin.command("ping")
            self._refuse(one, _cause(error))
        except (PyMongoError, InvalidDocument) as error:
            self._refuse(one, _cause(error))
        else:
            self._take(index, one)
            return True
        return False

    def _refuse(self, one: Labelled, cause: str) -> None:
        self._summary.refused.append(
            Refusal(self._collection.name, str(_id(one.document)), one.kinds, cause[:300])
        )

    def _take(self, index: int, one: Labelled) -> None:
        self._taken += 1
        if one.kinds:
            identifier = _id(one.document)
            for kind in one.kinds:
                self._dirt[kind] += 1
                examples = self._examples.setdefault(kind, [])
                if len(examples) < _EXAMPLES:
                    examples.append(identifier)
        elif self._collection.name == "users":
            self._note_login(index, one.document)

    def _note_login(self, index: int, document: Document) -> None:
        # Spread over all users: the oldest alone would be another sample than those who do log in.
        is_admin = document.get("role") == "admin"
        step = max(1, self._n // (2 * _LOGINS))
        if len(self._summary.logins) >= _LOGINS or not (index % step == 0 or is_admin):
            return
        password = password_of(document)
        if password is None or self._population.has_rivals(index):
            return
        login = Login(document["username"], password)
        self._summary.logins.append(login)
        if is_admin:
            self._summary.admin_logins.append(login)


def _batches(documents: Iterator[Labelled], size: int) -> Iterator[list[Labelled]]:
    while batch := list(islice(documents, size)):
        yield batch


def _id(document: Document) -> Any:
    return document["_id"]


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
