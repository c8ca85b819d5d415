"""What an application holds: `Crossfade` (two stores), `Migration` (entities that move together), `EntityHandle`.

cf = Crossfade.from_env()
accounts = cf.migration("accounts", [users, friend_requests])
async with cf:
    user = await accounts.users.insert({...}, context="User Registration")
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, Self

from crossfade import errors, observe
from crossfade.board import Board, Options, Pair
from crossfade.control import Control, ControlRecord
from crossfade.debt import Settler
from crossfade.delivery import Deliverer
from crossfade.entity import Entity, UniqueRule
from crossfade.erasing import Eraser
from crossfade.operation import Request, as_stored, assert_writable, is_same_id
from crossfade.phase import Phase
from crossfade.query import Query, Where, alternatives, query
from crossfade.read import Reader
from crossfade.reconcile import Reconciler
from crossfade.record import Record, Step, unique_key
from crossfade.shadow import Shadow
from crossfade.steps import Stepper
from crossfade.stores.mongo import MongoStore
from crossfade.stores.postgres import PostgresStore
from crossfade.strategy import FailureStrategy, default_strategy
from crossfade.strays import Strays
from crossfade.write import Writer

Mode = Literal["sync", "async"]


class EntityHandle:
    """One entity of a migration, as an application uses it. Ids, revisions and stores look after themselves."""

    def __init__(self, migration: Migration, entity: Entity) -> None:
        self._migration = migration
        self.entity = entity

    async def insert(
        self,
        document: Mapping[str, Any],
        *,
        context: str = "Insert",
        strategy: FailureStrategy | None = None,
        mode: Mode = "sync",
    ) -> Record:
        """Insert a document; an ``_id`` (an ObjectId) is made where it has none.

        ``context`` names the operation in log lines. ``mode="async"`` acknowledges once the primary has it.

        Raises:
            crossfade.errors.DuplicateKey: the id, or a value of a unique rule, is taken.
            crossfade.errors.StoreUnavailable: the primary cannot be reached; nothing was written.
            crossfade.errors.OutcomeUnknown, Undone, UndoPending, NotAllowedInPhase: see `crossfade.errors`.
        """
        return await self._migration.writer.insert(
            self.entity, document, Request(context, strategy, mode == "async")
        )

    async def get(self, id_: Any, *, parts: bool = True) -> Record | None:
        """The record with this id, or None.

        ``parts=False``: without the fields that are declared as parts, which then move from no store; `Record.without`
        names them.

        Raises:
            crossfade.errors.StoreUnavailable: no store that may answer did.
        """
        return await self._migration.reader.get(self.entity, id_, parts=parts)

    async def find_by_key(self, rule: str, value: str, *, parts: bool = True) -> Record | None:
        """The record that holds ``value`` under a unique rule: as spelt if there is one, else normalised.

        ``parts``: see `get`.
        """
        return await self._migration.reader.find_by_key(self.entity, rule, value, parts=parts)

    async def get_many(self, ids: Iterable[Any], *, parts: bool = True) -> list[Record]:
        """The records of these ids that there are, in the order of the ids, none twice; in one round trip.

        ``parts``: see `get`.
        """
        return await self._migration.reader.get_many(self.entity, ids, parts=parts)

    async def find(
        self,
        where: Where | None = None,
        *,
        order_by: str = "_id",
        after: Sequence[Any] | None = None,
        limit: int = 100,
        skip: int = 0,
        parts: bool = True,
    ) -> list[Record]:
        """The first ``limit`` records that match, the same from both stores; see `crossfade.query` for conditions.

        ``where``: fields with a value, `any_of`, `is_set` or `contains`; all of them hold. Of a list of such mappings
        all those of at least one.
        ``order_by``: a field, with ``-`` before it for the last first; the id decides among equals. Null and missing
        come before everything.
        ``after``: begin behind this place: the value of the order's field and the id of the last record seen, or its id
        alone in a tuple where the order is by id. Takes as long however far it is, and misses nothing when records come
        or go; ``skip`` leaves out so many first, and takes the longer the more.
        ``parts``: see `get`.

        Raises:
            crossfade.errors.ConfigurationError: an argument cannot be, and no store was asked; or PostgreSQL decides,
                and has no column for a key.
            crossfade.errors.StoreUnavailable: no store that may answer did.
        """
        asked = query(self.entity.name, where, order_by=order_by, after=after, limit=limit, skip=skip)
        return await self._migration.reader.find(self.entity, asked, parts=parts)

    async def find_one(self, where: Where) -> Record | None:
        """One record that matches, or None; see `find`."""
        found = await self.find(where, limit=1)
        return found[0] if found else None

    async def count(self, where: Where | None = None) -> int:
        """How many records match; see `find`."""
        return await self._migration.reader.count(self.entity, Query(alternatives(self.entity.name, where)))

    async def update(
        self,
        id_: Any,
        set: Mapping[str, Any] | None = None,  # the word of the operation
        *,
        unset: Iterable[str] = (),
        if_revision: int | None = None,
        where: Mapping[str, Any] | None = None,
        context: str = "Update",
        strategy: FailureStrategy | None = None,
        mode: Mode = "sync",
    ) -> Record:
        """Set and remove top-level fields; ``if_revision``: only if the record is still at it.

        ``where``: only if these fields of it equal these values. The record that it returns lacks the parts that it
        left alone (`Record.without`).

        Raises:
            crossfade.errors.ConfigurationError: an argument cannot be; no store was asked.
            crossfade.errors.NotFound, StaleRevision, ConditionNotMet, DuplicateKey: nothing was written.
            crossfade.errors.StoreUnavailable: the primary cannot be reached; nothing was written.
            crossfade.errors.OutcomeUnknown, Undone, UndoPending, Busy, NotAllowedInPhase: see `crossfade.errors`.
        """
        return await self._migration.writer.update(
            self.entity, id_, Request(context, strategy, mode == "async", where or {}),
            set_=set or {}, unset=unset, if_revision=if_revision,
        )  # fmt: skip

    async def delete(
        self, id_: Any, *, context: str = "Delete", strategy: FailureStrategy | None = None
    ) -> None:
        """Delete a record for good; see `update` for what it raises."""
        await self._migration.writer.delete(self.entity, id_, Request(context, strategy))


class Operation:
    """Several records, all or nothing. Made by `Migration.operation`, carried out at the end of its block.

    One record *decides*: its write, with its conditions, is made or refused. `also` says what happens to others once
    it is: changes that need no condition, and are made sooner or later whatever crashes. The other records are looked
    up when the change is made; one that is not there has nothing to take.

    Attributes:
        result: the record that decides, as it was written; None before the end of the block, and after a delete.
    """

    def __init__(self, migration: Migration, context: str, strategy: FailureStrategy | None) -> None:
        self._migration = migration
        self._context = context
        self._strategy = strategy
        self._decides: Callable[[Request], Coroutine[Any, Any, Record | None]] | None = None
        self._steps: list[Step] = []
        self.result: Record | None = None

    def insert(self, entity: str, document: Mapping[str, Any]) -> None:
        """The record that decides is a new one.

        Raises:
            crossfade.errors.ConfigurationError: another record decides already, or there is no such entity.
        """
        self._decide(lambda request: self._migration.writer.insert(self._entity(entity), document, request))

    def update(
        self,
        entity: str,
        id_: Any,
        set: Mapping[str, Any] | None = None,  # the word of the operation
        *,
        unset: Iterable[str] = (),
        where: Mapping[str, Any] | None = None,
        if_revision: int | None = None,
    ) -> None:
        """The record that decides is changed, if it has the values of ``where``; see `insert`."""

        def write(request: Request) -> Coroutine[Any, Any, Record]:
            return self._migration.writer.update(
                self._entity(entity), id_, replace(request, where=where or {}),
                set_=set or {}, unset=unset, if_revision=if_revision,
            )  # fmt: skip

        self._decide(write)

    def delete(self, entity: str, id_: Any) -> None:
        """The record that decides is deleted; see `insert`."""

        async def write(request: Request) -> None:
            await self._migration.writer.delete(self._entity(entity), id_, request)

        self._decide(write)

    def also(
        self,
        entity: str,
        id_: Any,
        set: Mapping[str, Any] | None = None,  # the word of the operation
        *,
        unset: Iterable[str] = (),
        add: Mapping[str, Iterable[Any]] | None = None,
        remove: Mapping[str, Iterable[Any]] | None = None,
    ) -> None:
        """What happens to another record: fields set and removed, values added to arrays and taken out of them.

        Raises:
            crossfade.errors.ConfigurationError: a field that cannot be written so; one of a unique rule, which may
                only be written by the record that decides.
        """
        step = Step(
            self._entity(entity).name, id_, as_stored(set or {}), tuple(unset),
            {field: tuple(values) for field, values in (add or {}).items()},
            {field: tuple(values) for field, values in (remove or {}).items()},
        )  # fmt: skip
        assert_writable(self._entity(entity), step.set, step.unset, {*step.add, *step.remove})
        ruled = [rule.field for rule in self._entity(entity).unique]
        for field in step.fields:
            if field in ruled:
                raise errors.ConfigurationError(
                    f"field {field!r} of {entity} has a unique rule, which may refuse it: let that record decide"
                )
        if any(other.entity == step.entity and is_same_id(other.id, step.id) for other in self._steps):
            raise errors.ConfigurationError(f"this record of {entity} has its part in the operation already")
        self._steps.append(step)

    def _entity(self, name: str) -> Entity:
        entity = self._migration.entities.get(name)
        if entity is None:
            raise errors.ConfigurationError(f"migration {self._migration.name!r} has no entity {name!r}")
        return entity

    def _decide(self, write: Callable[[Request], Coroutine[Any, Any, Record | None]]) -> None:
        if self._decides is not None:
            raise errors.ConfigurationError("one record decides an operation: another one does already")
        self._decides = write

    async def __aenter__(self) -> Self:
        """Begin to say what the operation does."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Carry the operation out, unless the block failed.

        Raises:
            crossfade.errors.NotFound, StaleRevision, ConditionNotMet, DuplicateKey: nothing was written.
            crossfade.errors.StoreUnavailable: the primary cannot be reached; nothing was written.
            crossfade.errors.OutcomeUnknown, Undone, UndoPending, Busy, NotAllowedInPhase: see `crossfade.errors`.
        """
        if kind is not None:
            return
        if self._decides is None:
            raise errors.ConfigurationError("no record decides this operation: call insert, update or delete")
        self.result = await self._decides(Request(self._context, self._strategy, steps=tuple(self._steps)))


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `Migration.prepare` found for a person: by rule, the (entity, id) of documents. All are kept.

    Attributes:
        colliding: another, older one has their key; they have one of their own.
        no_room: they are too large to take a key. Until they are smaller nothing in MongoDB keeps others from taking
            their name, and Crossfade cannot write upon them.
    """

    colliding: dict[str, list[tuple[str, Any]]]
    no_room: dict[str, list[tuple[str, Any]]]


class Migration:
    """Entities that move together, in one phase. Made by `Crossfade.migration`."""

    def __init__(
        self,
        name: str,
        entities: Sequence[Entity],
        mongo: MongoStore,
        postgres: PostgresStore,
        options: Options,
        first: Control,
    ) -> None:
        by_name = {entity.name: entity for entity in entities}
        if len(by_name) != len(entities) or not entities:
            raise errors.ConfigurationError(f"migration {name!r} needs entities, each with a name of its own")
        self.name = name
        self.entities = by_name
        self.record = ControlRecord(name, mongo, postgres)
        self.board = Board(name, by_name, mongo, postgres, self.record, options)
        self.pair = Pair(name, by_name, mongo, postgres, self.board, options)
        eraser = Eraser(self.pair)
        self.settler = Settler(self.pair, Stepper(self.pair), eraser, Deliverer(self.pair, eraser))
        self.writer = Writer(self.pair, self.settler)
        self.shadow = Shadow(self.pair)
        self.reader = Reader(self.pair, self.shadow)
        self.reconciler = Reconciler(self.pair, self.settler, self.writer, Strays(self.pair, self.settler))
        self._handles = {entity.name: EntityHandle(self, entity) for entity in entities}
        self._first = first

    def __getitem__(self, entity: str) -> EntityHandle:
        """The handle of an entity, by its name."""
        return self._handles[entity]

    def __getattr__(self, entity: str) -> EntityHandle:
        """``migration.users`` is ``migration["users"]``."""
        handles = self.__dict__.get("_handles", {})
        if entity in handles:
            return handles[entity]  # type: ignore[no-any-return]
        raise AttributeError(f"migration has no entity {entity!r}; it has: {', '.join(handles)}")

    def operation(self, context: str, *, strategy: FailureStrategy | None = None) -> Operation:
        """Several records as one operation::

        async with accounts.operation("Friend Accept") as op:
            op.update("friend_requests", request_id, {"status": "accepted"}, where={"status": "pending"})
            op.also("users", sender, add={"friends": [receiver]})
            op.also("users", receiver, add={"friends": [sender]})
        """
        return Operation(self, context, strategy)

    @property
    def control(self) -> Control:
        """The newest control record this worker has seen."""
        return self.board.control

    @property
    def phase(self) -> Phase:
        """Where the migration stands."""
        return self.control.phase

    @property
    def primary(self) -> str:
        """ "mongo" or "postgres"."""
        return self.phase.rules.primary

    @property
    def strategy(self) -> FailureStrategy:
        """The strategy of a write that asks for none."""
        return default_strategy(self.phase, self.control.strategy)

    async def start(self, *, background: bool) -> None:
        """Read (or begin) the control record; with ``background``, look, settle and reconcile from now on.

        Raises:
            crossfade.errors.StoreUnavailable: the store that holds the control record cannot be reached.
        """
        await self._begin()
        if background:
            await self.board.start()
            self.reconciler.start()
            self.shadow.start()
        else:
            await self.board.refresh()
        self.settler.eraser.start()

    async def _begin(self) -> None:
        options = self.pair.options
        seen = await self.record.look(timeout=options.primary_deadline)
        if seen.control is not None:
            return
        for store, name in (("mongo", "MongoDB"), ("postgres", "PostgreSQL")):
            if not seen.answered(store):
                # It may be the one that has the record: of a migration that has ended the other one keeps none.
                raise errors.StoreUnavailable(
                    store,
                    f"{name} does not answer, and the other store has no control record of migration {self.name!r}: "
                    f"whether it has begun cannot be told. Start {name}",
                )
        first = self._first
        rules = first.phase.rules
        if rules.dual:
            first = await self._prepared(first)
        elif rules.primary == "postgres":
            await self._prepare_postgres()
        elif await self.pair.mongo.is_empty(self.entities.values(), timeout=options.primary_deadline):
            # A new installation: nothing is slowed down by the indexes that hold its rules from the first write on.
            await self.pair.mongo.prepare(self.entities.values(), timeout=options.primary_deadline)
        await self.record.begin(first, timeout=options.primary_deadline)

    async def _prepared(self, first: Control) -> Control:
        await self.prepare()
        empty = await self.pair.postgres.is_empty(
            self.entities.values(), timeout=self.pair.options.primary_deadline
        )
        return first.changed(by="the first worker", reason="began here", began_empty=empty, dual_epoch=1)

    async def prepare(self) -> Prepared:
        """What `crossfade init` does: Crossfade's tables, indexes, and normalised keys on old documents.

        In phase 0 it also carries out what writers that died there had decided.

        Idempotent and resumable.

        Raises:
            crossfade.errors.SchemaNotReady: an entity's table is missing.
        """
        await self._prepare_postgres()
        timeout = self.pair.options.primary_deadline
        await self.pair.mongo.prepare(self.entities.values(), timeout=300.0)
        control = (await self.record.look(timeout=timeout)).control
        if control is not None:
            await self.settler.finish_decided(control)
        prepared = Prepared({}, {})
        for entity in self.entities.values():
            for rule in entity.unique:
                # Two entities may call a rule by one name.
                colliding = prepared.colliding.setdefault(rule.rule, [])
                no_room = prepared.no_room.setdefault(rule.rule, [])
                await self._stamp(entity, rule, control, colliding, no_room)
        return prepared

    async def _prepare_postgres(self) -> None:
        await self.pair.postgres.connect_once()
        await self.pair.postgres.prepare()
        timeout = self.pair.options.primary_deadline
        missing = await self.pair.postgres.missing(self.entities.values(), timeout=timeout)
        if missing:
            raise errors.SchemaNotReady(
                f"PostgreSQL at {self.pair.postgres.address} lacks: {'; '.join(missing)}. The schema is not at "
                "head: run the application's migrations (alembic upgrade head)"
            )

    async def _stamp(
        self,
        entity: Entity,
        rule: UniqueRule,
        control: Control | None,
        colliding: list[tuple[str, Any]],
        no_room: list[tuple[str, Any]],
    ) -> None:
        """Stamp the keys of one rule, oldest document first; says who has one of its own, and who can have none."""
        mongo, timeout = self.pair.mongo, self.pair.options.bulk_deadline
        name, path = rule.rule, rule.field
        async for documents in mongo.unstamped(entity, path, name, batch=1000, timeout=timeout):
            keys: list[tuple[Any, Any, str]] = []
            for document in documents:
                key = entity.keys(document).get(name)
                if key is not None:
                    keys.append((document["_id"], document[path], key))
            found = await mongo.stamp(entity, path, name, keys, timeout=timeout)
            too_large = [id_ for id_, _, _ in found.no_room]
            for id_, value, key in found.taken:
                if await self.settler.name_is_freed(entity, {path: value}, id_, control):
                    again = await mongo.stamp(entity, path, name, [(id_, value, key)], timeout=timeout)
                    if not again.taken:
                        too_large += [id_ for id_, _, _ in again.no_room]
                        continue
                own = await mongo.stamp(
                    entity, path, name, [(id_, value, unique_key(key, id_))], timeout=timeout
                )
                if own.no_room:
                    too_large.append(id_)
                elif not own.taken:
                    colliding.append((entity.name, id_))
                    observe.log().warning(
                        f"The key {name!r} of this document is an older one's; it gets one of its own",
                        context="Init", entity=entity.name, id=str(id_),
                    )  # fmt: skip
            for id_ in too_large:
                no_room.append((entity.name, id_))
                observe.log().warning(
                    f"This document is too large for its key {name!r}: make it smaller in MongoDB",
                    context="Init", entity=entity.name, id=str(id_),
                )  # fmt: skip

    async def stop(self) -> None:
        """Stop the background work; what is not settled stays in debt."""
        await self.shadow.stop()
        await self.writer.close()
        await self.reconciler.stop()
        await self.settler.eraser.stop()
        await self.pair.close()
        await self.board.stop()


class Crossfade:
    """The two stores and the migrations between them; an async context manager.

    Args:
        mongo_uri: ``mongodb://host:port/<database>``.
        database_url: ``postgresql://user:password@host:port/<database>``.
        use_postgres: a migration without a control record begins in phase 1 instead of 0.
        initial_phase: begin it in this phase instead: for a fresh installation with two empty stores.
        foreign_writers: an old application still writes to MongoDB (recorded when the migration begins).
        options: times and limits.
        background: look at the board, settle and reconcile in the background (a worker does; a one-shot
            command does not).

    Raises:
        crossfade.errors.ConfigurationError: an address cannot be used.
    """

    def __init__(
        self,
        *,
        mongo_uri: str,
        database_url: str,
        use_postgres: bool = False,
        initial_phase: Phase | str | None = None,
        foreign_writers: bool = False,
        options: Options | None = None,
        background: bool = True,
    ) -> None:
        self.options = options or Options()
        self.mongo = MongoStore(mongo_uri, max_pool=self.options.mongo_pool)
        self.postgres = PostgresStore(database_url, max_pool=self.options.postgres_pool)
        if initial_phase is None:
            self._initial = Phase.DUAL_WRITE if use_postgres else Phase.MONGO_ONLY
        else:
            self._initial = Phase.parse(str(initial_phase))
        self._foreign_writers = foreign_writers
        self._background = background
        self._migrations: dict[str, Migration] = {}

    @classmethod
    def from_env(cls, **settings: Any) -> Self:
        """From ``MONGO_URI``, ``DATABASE_URL`` and ``USE_POSTGRES``; ``settings`` as in the constructor.

        Without ``options`` they are those of `Options.from_env`.

        Raises:
            crossfade.errors.ConfigurationError: a variable is missing or unusable; the message names it.
        """
        values: dict[str, Any] = {}
        for name, argument, example in (
            ("MONGO_URI", "mongo_uri", "mongodb://127.0.0.1:27017/app"),
            ("DATABASE_URL", "database_url", "postgresql://app:secret@127.0.0.1:5432/app"),
        ):
            value = os.environ.get(name)
            if not value:
                raise errors.ConfigurationError(f"{name} is not set: for example {example}")
            values[argument] = value
        flag = os.environ.get("USE_POSTGRES", "false").strip().lower()
        if flag not in ("true", "false", "1", "0", ""):
            raise errors.ConfigurationError(f"USE_POSTGRES is {flag!r}: write true or false")
        if settings.get("options") is None:
            settings["options"] = Options.from_env()
        return cls(**values, use_postgres=flag in ("true", "1"), **settings)

    def migration(self, name: str, entities: Sequence[Entity]) -> Migration:
        """Declare a migration; before ``async with``."""
        first = Control(name, phase=self._initial, foreign_writers=self._foreign_writers)
        made = Migration(name, entities, self.mongo, self.postgres, self.options, first)
        self._migrations[name] = made
        return made

    async def __aenter__(self) -> Self:
        """Open the pools and start every migration."""
        await self.postgres.open()
        try:
            for migration in self._migrations.values():
                await migration.start(background=self._background)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the background work and close the pools."""
        await self._close()

    async def _close(self) -> None:
        for migration in self._migrations.values():
            await migration.stop()
        await self.mongo.close()
        await self.postgres.close()

    async def health(self, timeout: float = 1.0) -> dict[str, tuple[bool, float | None]]:
        """Per store ("mongo", "postgres"): whether it answers, and the seconds that a round trip took."""

        async def ask(store: MongoStore | PostgresStore) -> tuple[bool, float | None]:
            try:
                return True, await store.ping(timeout)
            except errors.CrossfadeError:
                return False, None

        mongo, postgres = await asyncio.gather(ask(self.mongo), ask(self.postgres))
        return {"mongo": mongo, "postgres": postgres}
