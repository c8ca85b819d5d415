"""PostgreSQL, as the protocol needs it: images applied under a revision guard, and a transactional outbox.

Every writing transaction first takes a shared advisory lock and is bound to one epoch of the control record;
a change of epoch takes the lock exclusively. So no write of an older epoch commits after the change.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import orjson
from psycopg import AsyncConnection, AsyncCursor, Rollback, sql
from psycopg_pool import PoolTimeout

from crossfade import errors
from crossfade.entity import Entity, Rows
from crossfade.query import Order, Query
from crossfade.record import CF, Applied, Held, Image, new_operation
from crossfade.stores.conditions import Clause, as_clause, as_clauses_behind, as_order, can_order
from crossfade.stores.errors import Fenced
from crossfade.stores.references import PORTION, identifier, references_of
from crossfade.stores.rows import RowStatements, Statement, held
from crossfade.stores.server import QUERIES, PostgresServer, reaching
from crossfade.stores.shadow_notes import ShadowNotes
from crossfade.values import decode_document, encode_document, id_texts, id_to_text, text_to_id

SCHEMA_VERSION = "4"

_LOCKED = " WHERE p.id = %s FOR NO KEY UPDATE OF p"
#: Images of one entity that are worth a statement for all of them.
_MANY = 8
#: Seconds for the caller to go on before what is left to do behind its back takes the processor from it.
_CALLER_FIRST = 0.002
#: Seconds without a word of its client after which a transaction keeps no change of epoch waiting; and for which one
#: that waits does not ask who that may be.
_SILENT, _AT_ONCE = 0.5, 0.1


@dataclass(frozen=True, slots=True)
class Delivery:
    """A row of the outbox: a revision that MongoDB has not confirmed.

    Attributes:
        base_digest: digest of what the last confirmed delivery left in MongoDB; None: nothing.
        tentative: ``ROLLBACK_BOTH``: ``{"kind": ..., "before": hex of the BSON before}``; None once confirmed.
        parked: why MongoDB refuses it, or None.
        parts: the parts that were written since the last confirmed delivery.
    """

    entity: str
    id: Any
    rev: int
    op: str
    base_digest: bytes | None
    tentative: Mapping[str, Any] | None
    parked: str | None
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """What a write decided, inside PostgreSQL's transaction.

    Attributes:
        image: the new image; None deletes the record at ``rev``.
        rows: its rows.
        tentative: kept in the outbox row until success may be told.
        parts: the parts that it writes.
    """

    image: Image | None
    rows: Rows | None
    rev: int
    op: str
    tentative: Mapping[str, Any] | None = None
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Claim:
    """A matter of speed alone: whoever stands still for longer than a second loses it, and is not told.

    Attributes:
        mine: nobody else has it.
        stay: to be called more often than that, to keep it.
    """

    mine: bool
    stay: Callable[[], Coroutine[Any, Any, None]]


class PostgresStore(PostgresServer):
    """One PostgreSQL database, as the protocol needs it; see `PostgresServer`."""

    def __init__(self, url: str, *, max_pool: int = 20, connect_timeout: int = 2) -> None:
        super().__init__(url, max_pool=max_pool, connect_timeout=connect_timeout)
        self._statements: dict[str, RowStatements] = {}
        self._waiting_for_primary = 0
        self.shadow = ShadowNotes(self._ask)

    def statements(self, entity: Entity) -> RowStatements:
        """The statements of an entity, composed once."""
        if entity.name not in self._statements:
            self._statements[entity.name] = RowStatements(entity)
        return self._statements[entity.name]

    # --- applying images (PostgreSQL is the secondary) -----------------------------------------------------

    async def apply(
        self,
        images: Sequence[tuple[Entity, Image, Rows | None]],
        *,
        migration: str,
        epoch: int,
        timeout: float,
        behind: list[asyncio.Task[None]] | None = None,
    ) -> list[tuple[Applied, Held]]:
        """Apply images in one transaction, rules checked at its end; what became of each.

        ``rows`` of None: a decided delete; its rows go, a tombstone comes. ``behind``: do not wait for what is done
        behind the commit; its task is put there, and until it has succeeded nothing may be settled.

        Raises:
            RuleBroken: one of them breaks a rule; none was applied.
            Fenced: PostgreSQL is at another epoch; none was applied.
        """
        committed: asyncio.Future[list[tuple[Any, ...]]] = asyncio.get_running_loop().create_future()
        prompt = behind is not None
        work = self._applying(
            images, committed, migration=migration, epoch=epoch, timeout=timeout, prompt=prompt
        )
        if behind is None:
            await self._bounded(work, timeout)
        else:
            task = reaching(committed, work)
            await self._until(committed, task, timeout)
            behind.append(task)
        return [
            (_verdict(image, *held(answer), deleted=rows is None), held(answer)[0])
            for (_, image, rows), answer in zip(images, committed.result(), strict=True)
        ]

    def apply_ahead(
        self,
        entity: Entity,
        image: Callable[[], Image],
        upon: Image | None,
        *,
        migration: str,
        epoch: int,
        timeout: float,
    ) -> Ahead | None:
        """Begin to apply what a record will be, in a transaction that waits for the primary; see `Ahead`.

        ``upon``: what it was before, if it has the same children. None: so many wait already that others would not get
        a connection.
        """
        if self._waiting_for_primary >= self._pool.max_size // 2:
            return None
        loop = asyncio.get_running_loop()
        committed: asyncio.Future[list[tuple[Any, ...]]] = loop.create_future()
        decided: asyncio.Future[bool] = loop.create_future()

        async def work() -> None:
            await asyncio.sleep(0)  # the primary is asked first: it is what takes longer
            its = image()
            await self._applying_ahead(
                (entity, its, entity.to_rows(its.document, its.keys)), upon, committed, decided,
                migration=migration, epoch=epoch, timeout=timeout,
            )  # fmt: skip

        def ended(_: object) -> None:
            self._waiting_for_primary -= 1

        self._waiting_for_primary += 1
        applying = work()
        task = reaching(committed, applying)
        task.add_done_callback(ended)
        return Ahead(self, image, task, decided, committed, timeout)

    async def _applying(
        self,
        images: Sequence[tuple[Entity, Image, Rows | None]],
        committed: asyncio.Future[list[tuple[Any, ...]]],
        *,
        migration: str,
        epoch: int,
        timeout: float,
        prompt: bool,
    ) -> None:
        """The work of `apply`: ``committed`` gets the answers, ``prompt``: and the caller goes on."""
        statements, looks = self._statements_of(images, migration, epoch)
        records = [(entity, id_to_text(image.id)) for entity, image, _ in images]
        async with self._connection(timeout) as connection:
            answers = await self._transaction(
                connection, migration, statements, looks, records=records, defer=len(images) > 1,
                deletes_of={entity.name for entity, _, rows in images if rows is None},
            )  # fmt: skip
            await self._committed(connection, answers, committed, migration, records, timeout, prompt=prompt)

    async def _applying_ahead(
        self,
        image: tuple[Entity, Image, Rows],
        upon: Image | None,
        committed: asyncio.Future[list[tuple[Any, ...]]],
        decided: asyncio.Future[bool],
        *,
        migration: str,
        epoch: int,
        timeout: float,
    ) -> None:
        """The work of `Ahead`."""
        entity, its, rows = image
        own, records = self.statements(entity), [(entity, id_to_text(its.id))]
        first = None
        if upon is not None or its.op == its.born:
            first = own.apply_upon(its, rows, upon, migration=migration, epoch=epoch)
        async with self._connection(timeout) as connection:
            if decided.done() and not decided.result():
                return
            answers: list[tuple[Any, ...]] = []
            if first is not None:
                answers = await self._transaction(
                    connection, migration, [], [first], records=records, commit=False
                )
            if not answers or answers[0][0] is None:
                statements, looks = self._statements_of([image], migration, epoch)
                answers = await self._transaction(
                    connection, migration, statements, looks,
                    records=records, begin=first is None, commit=False,
                )  # fmt: skip
            # Others wait for this record meanwhile, and have as much time in all.
            if not await _decision(decided, timeout / 2):
                await connection.execute(b"ROLLBACK")
                # What was locked, others have left for whoever had locked it, and no debt says so.
                await self._set_links(connection, records)
                return
            await connection.execute(b"COMMIT")
            await self._committed(connection, answers, committed, migration, records, timeout, prompt=True)

    async def _committed(
        self,
        connection: AsyncConnection[Any],
        answers: list[tuple[Any, ...]],
        committed: asyncio.Future[list[tuple[Any, ...]]],
        migration: str,
        records: Sequence[tuple[Entity, str]],
        timeout: float,
        *,
        prompt: bool,
    ) -> None:
        if not committed.done():
            committed.set_result(answers)
        if prompt:
            await asyncio.sleep(_CALLER_FIRST)
        async with asyncio.timeout(timeout):
            await self._look_again(connection, migration, records)

    def _statements_of(
        self, images: Sequence[tuple[Entity, Image, Rows | None]], migration: str, epoch: int
    ) -> tuple[list[Statement], list[Statement]]:
        """What applies these images, and what then says, in their order, what is there."""
        own = self.statements(images[0][0])
        alike = [
            (image, rows)
            for entity, image, rows in images
            if entity is own.entity and rows is not None and not image.left_out
        ]
        if len(images) >= _MANY and len(alike) == len(images) and own.has_many:
            put, look = own.apply_many(alike, migration=migration, epoch=epoch)
            # Their sizes are unknown to a plan that is made once, and a table that is being filled has no statistics.
            return [(QUERIES["by_index"], {}), put], [look]  # type: ignore[list-item]
        statements: list[Statement] = []
        looks: list[Statement] = []
        for entity, image, rows in images:
            own, key = self.statements(entity), id_to_text(image.id)
            if rows is not None:
                statements.append(own.apply(image, rows, migration=migration, epoch=epoch))
                looks.append(own.replace_children(image, rows, migration=migration, epoch=epoch))
            else:
                statements += self._delete(entity, [(key, image.rev, image.op)], migration, epoch)
                looks.append(own.held_of(key, migration=migration, epoch=epoch))
        return statements, looks

    async def apply_deletes(
        self,
        entity: Entity,
        deletes: Sequence[tuple[Any, int, str | None]],
        *,
        migration: str,
        epoch: int,
        timeout: float,
    ) -> list[tuple[Applied, Held]]:
        """Put tombstones, (id, revision, operation) of each, and remove the rows at or under their revisions.

        What became of each, in their order.

        Raises:
            Fenced: PostgreSQL is at another epoch; nothing was changed.
        """
        buried = [(id_to_text(id_), rev, op) for id_, rev, op in deletes]
        keys = [key for key, _, _ in buried]

        async def work() -> list[tuple[Any, ...]]:
            look = self.statements(entity).held_of_each(keys, migration=migration, epoch=epoch)
            records = [(entity, key) for key in keys]
            async with self._connection(timeout) as connection:
                answers = await self._transaction(
                    connection,
                    migration,
                    self._delete(entity, buried, migration, epoch),
                    [look],
                    records=records,
                    deletes_of=[entity.name],
                )
                await self._look_again(connection, migration, records, link=False)
            return answers

        found: list[tuple[Applied, Held]] = []
        for (_, rev, _), answer in zip(buried, await self._bounded(work(), timeout), strict=True):
            now, same_epoch = held(answer)
            if not same_epoch:
                raise Fenced(f"PostgreSQL is not at epoch {epoch} of {migration}")
            covered = now.rev is None and now.tombstone is not None and now.tombstone >= rev
            found.append((Applied.APPLIED if covered else Applied.BEHIND, now))
        return found

    async def apply_delete(
        self, entity: Entity, id_: Any, *, rev: int, op: str, migration: str, epoch: int, timeout: float
    ) -> tuple[Applied, Held]:
        """`apply_deletes` of one."""
        [one] = await self.apply_deletes(
            entity, [(id_, rev, op)], migration=migration, epoch=epoch, timeout=timeout
        )
        return one

    def _delete(
        self, entity: Entity, deletes: Sequence[tuple[str, int, str | None]], migration: str, epoch: int
    ) -> list[Statement]:
        keys = [key for key, _, _ in deletes]
        return [
            _bury(entity, deletes, migration, epoch),
            *self.statements(entity).drop_covered(keys),
        ]

    @staticmethod
    async def _transaction(
        connection: AsyncConnection[Any],
        migration: str,
        statements: Sequence[Statement],
        looks: Sequence[Statement],
        *,
        records: Sequence[tuple[Entity, str]] = (),
        deletes_of: Collection[str] = (),
        defer: bool = False,
        begin: bool = True,
        commit: bool = True,
    ) -> list[tuple[Any, ...]]:
        """One transaction in one round trip; the rows of ``looks``. Without ``commit`` it is left open, and without
        ``begin`` it is one that was.

        ``records`` are locked, so that a delete waits for an image that is still under way: whose writer has given up
        may commit it, and be cancelled before it has looked again.
        """
        async with connection.pipeline():
            if begin:
                await connection.execute(b"BEGIN")
                await connection.execute(QUERIES["lock"], _locks(migration, records))
            if defer:
                await connection.execute(b"SET CONSTRAINTS ALL DEFERRED")
            for query, parameters in statements:
                await connection.execute(query, parameters)
            cursors = [await connection.execute(query, parameters) for query, parameters in looks]
            for name in sorted(deletes_of):
                await connection.execute(QUERIES["lock_deletes"], {"entity": name})
            if commit:
                await connection.execute(b"COMMIT")
        return [row for cursor in cursors for row in await cursor.fetchall()]

    async def _look_again(
        self,
        connection: AsyncConnection[Any],
        migration: str,
        records: Sequence[tuple[Entity, str]],
        *,
        link: bool = True,
    ) -> None:
        """What a commit leaves to do: remove rows that a tombstone covers, and set the links of the others.

        Whoever may have inserted looks again after its own commit. Any image may have: of a revision whose
        predecessors never arrived, or of a row that a delete removed while this one waited. Links are set when that
        is done: they wait for nobody, and nobody is to wait for them.
        """
        by_entity = _by_entity(records)
        async with connection.pipeline():
            looks = [
                (entity, await connection.execute(*self.statements(entity).covered(keys)))
                for entity, keys in by_entity
            ]
        covered = [(entity, key) for entity, look in looks for (key,) in await look.fetchall()]
        if covered:
            drops = [
                s for entity, keys in _by_entity(covered) for s in self.statements(entity).drop_covered(keys)
            ]
            await self._transaction(connection, migration, drops, [], records=covered)
        if link:
            await self._set_links(connection, records)

    async def _set_links(
        self, connection: AsyncConnection[Any], records: Sequence[tuple[Entity, str]]
    ) -> None:
        statements = [
            statement
            for entity, keys in _by_entity(records)
            for statement in self.statements(entity).link(keys)
        ]
        while statements:
            async with connection.pipeline():
                asked = [(each, await connection.execute(*each)) for each in statements]
            # Each sets a portion.
            statements = [each for each, cursor in asked if cursor.rowcount >= PORTION]

    @contextlib.asynccontextmanager
    async def claim(self, work: str, *, timeout: float) -> AsyncIterator[Claim]:
        """Try to be the only one at this work; see `Claim`.

        Raises:
            crossfade.errors.StoreUnavailable: no answer; within the block, from `Claim.stay` too.
        """
        got: asyncio.Future[tuple[AsyncConnection[Any], bool]] = asyncio.get_running_loop().create_future()
        over = asyncio.Event()

        async def hold() -> None:
            async with self._connection(timeout) as connection:
                await connection.execute(b"BEGIN")
                cursor = await connection.execute(QUERIES["claim"], {"work": work})
                [(mine,)] = await cursor.fetchall()
                if not got.done():
                    got.set_result((connection, bool(mine)))
                await over.wait()

        # A task of its own: a server that stands still must not keep whoever lets go of the claim.
        holding = hold()
        task = reaching(got, holding)
        await self._until(got, task, timeout)
        connection, mine = got.result()
        try:
            yield Claim(mine, lambda: self._bounded(_executed(connection, b"SELECT"), timeout))
        finally:
            over.set()
            if not (await asyncio.wait({task}, timeout=timeout))[0]:
                self._abandon(task)

    async def held(self, entity: Entity, id_: Any, *, timeout: float) -> Held:
        """What PostgreSQL holds of a record."""
        query, parameters = self.statements(entity).held_of(id_to_text(id_), migration="", epoch=-1)
        [row] = await self._rows(query, parameters, timeout)
        return held(row)[0]

    async def held_many(
        self, entity: Entity, ids: Sequence[Any], *, timeout: float
    ) -> dict[str, tuple[int, bytes]]:
        """(revision, digest) by id text, of the rows that there are under the entity's present mapping."""
        query = sql.SQL("SELECT id, cf_rev, cf_digest FROM {} WHERE id = ANY(%s) AND cf_mapping = %s").format(
            self.statements(entity).table
        )
        rows = await self._rows(query, [[id_to_text(i) for i in ids], entity.mapping_version], timeout)
        return {id_: (rev, bytes(stored)) for id_, rev, stored in rows}

    async def ids_after(
        self, entity: Entity, after: str, *, limit: int, timeout: float
    ) -> list[tuple[str, Any, int]]:
        """The next (id text, id, revision) after an id text, in its order."""
        query = sql.SQL("SELECT id, cf_rev FROM {} WHERE id > %s ORDER BY id LIMIT %s").format(
            self.statements(entity).table
        )
        return [(i, text_to_id(i), rev) for i, rev in await self._rows(query, [after, limit], timeout)]

    async def holder(self, entity: Entity, rule_column: str, key: str, *, timeout: float) -> Any | None:
        """The id of the row that holds this normalised key; None for nobody."""
        query = sql.SQL("SELECT id FROM {} WHERE {} = %s").format(
            self.statements(entity).table, sql.Identifier(rule_column)
        )
        rows = await self._rows(query, [key], timeout)
        return text_to_id(rows[0][0]) if rows else None

    async def drop_exactly(
        self, entity: Entity, id_: Any, rev: int, *, migration: str, timeout: float
    ) -> None:
        """Remove a row that the primary does not have, if it is still at this revision."""

        async def work() -> None:
            own = self.statements(entity)
            key = id_to_text(id_)
            async with self._connection(timeout) as connection:
                await self._transaction(connection, migration, own.drop_exactly(key, rev), [])

        await self._bounded(work(), timeout)

    async def _rows(
        self, query: bytes | sql.Composed, parameters: Sequence[Any], timeout: float
    ) -> list[tuple[Any, ...]]:
        async def work() -> list[tuple[Any, ...]]:
            async with self._connection(timeout) as connection:
                return await (await connection.execute(query, parameters)).fetchall()

        return await self._bounded(work(), timeout)

    # --- reading -----------------------------------------------------------------------------------------

    async def read(self, entity: Entity, id_: Any, *, timeout: float, small: bool = False) -> Image | None:
        """A record, in one statement; None where there is no row. ``small``: without its parts."""
        return await self.read_where(entity, "id", id_to_text(id_), timeout=timeout, small=small)

    async def as_kept(self, entity: Entity, id_: Any, *, timeout: float) -> Any:
        """This id as its record has it: a number may be of another type there. Itself where there is no record."""
        texts = id_texts(id_)
        if len(texts) == 1:
            return id_
        query = sql.SQL("SELECT id FROM {} WHERE id = ANY(%s::text[])").format(self.statements(entity).table)
        rows = await self._rows(query, [list(texts)], timeout)
        return text_to_id(rows[0][0]) if rows else id_

    async def read_where(
        self, entity: Entity, column: str, value: Any, *, timeout: float, small: bool = False
    ) -> Image | None:
        """The record whose column holds this value (the lowest id of several)."""
        own = self.statements(entity)
        query = own.reading(" WHERE p.{} = %s ORDER BY p.id LIMIT 1", column, small=small)
        rows = await self._rows(query, [value], timeout)
        return own.image(rows[0], small=small) if rows else None

    async def look_up(
        self,
        entity: Entity,
        column: str,
        value: str,
        key_column: str,
        key: str,
        *,
        timeout: float,
        small: bool = False,
    ) -> Image | None:
        """The record whose column holds this value, else the one that holds its normalised key; in one round trip."""
        own = self.statements(entity)
        query = own.reading(
            " WHERE p.{} = %s OR p.{} = %s ORDER BY p.{} = %s DESC, p.id LIMIT 1",
            column, key_column, column, small=small,
        )  # fmt: skip
        rows = await self._rows(query, [value, key, value], timeout)
        return own.image(rows[0], small=small) if rows else None

    async def read_many(
        self, entity: Entity, ids: Sequence[Any], *, timeout: float, small: bool = False
    ) -> list[Image]:
        """The records of these ids that there are, a number in any of its types; in no order, in one statement.

        ``small``: without their parts.
        """
        own = self.statements(entity)
        query = own.reading(" WHERE p.{} = ANY(%s::text[])", "id", small=small)
        rows = await self._rows(query, [[text for id_ in ids for text in id_texts(id_)]], timeout)
        return [own.image(row, small=small) for row in rows]

    def can_find(self, entity: Entity, where: Sequence[Mapping[str, Any]], order: Order) -> bool:
        """Whether these conditions, and this order, can be asked of PostgreSQL's columns exactly."""
        return can_order(entity, order) and as_clause(entity, where) is not None

    async def find(self, entity: Entity, query: Query, *, timeout: float, small: bool = False) -> list[Image]:
        """The records that a query asks for; see `can_find`. One statement, behind a place in an order at most two."""
        own = self.statements(entity)
        condition, values = self._condition(entity, query.where, query.order)
        clauses = as_clauses_behind(entity, query)

        async def work() -> list[tuple[Any, ...]]:
            rows: list[tuple[Any, ...]] = []
            async with contextlib.AsyncExitStack() as stack:
                connection = await stack.enter_async_context(self._connection(timeout))
                if len(clauses) > 1:
                    # A record that moves from one range to the other between two snapshots would be in neither.
                    await stack.enter_async_context(connection.transaction())
                    await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
                for behind, place in clauses:
                    asked = sql.SQL(" WHERE ({}) AND ({}) ORDER BY {} LIMIT %s OFFSET %s").format(
                        condition, behind, as_order(entity, query.order)
                    )
                    parameters = [*values, *place, query.limit - len(rows), query.skip]
                    cursor = await connection.execute(own.select(asked, small=small), parameters)
                    rows += await cursor.fetchall()
                    if len(rows) == query.limit:
                        break
            return rows

        return [own.image(row, small=small) for row in await self._bounded(work(), timeout)]

    async def count(self, entity: Entity, where: Sequence[Mapping[str, Any]], *, timeout: float) -> int:
        """How many records match these conditions; see `can_find`."""
        condition, values = self._condition(entity, where, Order())
        query = sql.SQL("SELECT count(*) FROM {} AS p WHERE {}").format(
            self.statements(entity).table, condition
        )
        [(number,)] = await self._rows(query, values, timeout)
        return int(number)

    @staticmethod
    def _condition(entity: Entity, where: Sequence[Mapping[str, Any]], order: Order) -> Clause:
        condition = as_clause(entity, where) if can_order(entity, order) else None
        if condition is None:
            keys = sorted({key for each in where for key in each} | {order.field})
            raise errors.ConfigurationError(
                f"entity {entity.name!r} cannot be searched by {', '.join(keys)} in PostgreSQL: map these fields to "
                "columns"
            )
        return condition

    # --- writing (PostgreSQL is the primary) ---------------------------------------------------------------

    async def write(
        self,
        writes: Sequence[tuple[Entity, Any, Callable[[Image | None, int], Change | None]]],
        *,
        migration: str,
        epoch: int,
        timeout: float,
        keep_in_outbox: bool = True,
        op: str | None = None,
        small: bool = False,
    ) -> list[Change | None]:
        """Read records under their locks, let each ``decide`` make its change, write them and their outbox rows.

        ``writes`` are (entity, id, decide). ``decide`` gets the image (None: no row) and the highest revision that a
        tombstone of this id has (0: none); it returns None to leave this record alone, and raises to change nothing
        at all. ``op``: the operation that asks; its own open write does not stand in its way. ``small``: read the
        records without their parts, where the rows say which these are. All in one transaction bound to ``epoch``.

        Raises:
            Fenced: PostgreSQL is at another epoch.
            RuleBroken: another row holds a value of a unique rule.
            crossfade.errors.Busy: one of the records, or a value, is an open write's.
        """

        names_anew = True

        async def work() -> list[Change | None]:
            nonlocal names_anew
            # Whatever is raised in here, the connection rolls back as it is given back.
            async with self._connection(timeout) as connection:
                there = await self._lock(
                    connection, writes, migration=migration, epoch=epoch, op=op, small=small
                )
                changes = [
                    decide(before, buried)
                    for (_, _, decide), (before, buried) in zip(writes, there, strict=True)
                ]
                for (entity, id_, _), (before, _), change in zip(writes, there, changes, strict=True):
                    if before is None and change is not None and change.image is not None:
                        await self._assert_new(connection, entity, id_)
                held_open: list[AsyncCursor[Any]] = []
                async with connection.pipeline():
                    for (entity, id_, _), (before, _), change in zip(writes, there, changes, strict=True):
                        if change is None:
                            continue
                        for query, parameters in self._put(
                            entity, id_, before, change, migration, epoch, keep_in_outbox=keep_in_outbox
                        ):
                            await connection.execute(query, parameters)
                        own = {} if before is None else before.keys
                        taken = {rule: key for rule, key in _keys(change).items() if own.get(rule) != key}
                        if taken:
                            held_open.append(
                                await connection.execute(
                                    QUERIES["reserved"],
                                    {
                                        "entity": entity.name, "id": id_to_text(id_), "op": change.op,
                                        "keys": orjson.dumps(taken).decode(),
                                    },
                                )
                            )  # fmt: skip
                    if not held_open:
                        # Nobody else's values are wanted: one round trip less.
                        await connection.execute(b"COMMIT")
                    for cursor in held_open:
                        [(is_reserved,)] = await cursor.fetchall()
                        if is_reserved:
                            # Seen after the unique index let us through: whoever freed it may yet take it back.
                            raise errors.Busy("a value of this record is another open write's")
                if held_open:
                    await connection.execute(b"COMMIT")
                names_anew = not all(
                    self._names_the_same(entity, before, change)
                    for (entity, _, _), (before, _), change in zip(writes, there, changes, strict=True)
                )
                return changes

        ends = time.monotonic() + timeout
        try:
            return await self._bounded(work(), timeout)
        except (errors.StoreUnavailable, asyncio.CancelledError):
            ends = 0.0  # the sweep links
            raise
        finally:
            # After a refusal, too: what it had locked, others have left for it to link.
            linking = self._link([(entity, id_) for entity, id_, _ in writes], ends)
            if names_anew:
                await linking
            else:
                self._leave(asyncio.create_task(linking))

    def _names_the_same(self, entity: Entity, before: Image | None, change: Change | None) -> bool:
        """Whether a change leaves every reference of a record as it was: what it had locked is all there is to link."""
        if change is None:
            return True
        if before is None or change.image is None:
            return False
        old, new = before.document, change.image.document
        return all(old.get(name) == new.get(name) for name in self.statements(entity).references)

    async def _link(self, records: Iterable[tuple[Entity, Any]], ends: float) -> None:
        """Set the links of records that are committed, and those to them, until ``ends`` (`time.monotonic`).

        Whatever becomes of it, the write stands; the sweep sets what is missed here.
        """
        linked = [(entity, id_to_text(id_)) for entity, id_ in records if self.statements(entity).link(())]
        left = ends - time.monotonic()
        if not linked or left <= 0:
            return

        async def work() -> None:
            async with self._connection(left) as connection:
                await self._set_links(connection, linked)

        with contextlib.suppress(errors.CrossfadeError):
            await self._bounded(work(), left)

    async def link_all(self, entities: Iterable[Entity], *, timeout: float) -> int:
        """Set every link whose target is there and that was missed; how many. ``timeout`` is for a portion of them."""
        linked = 0
        for entity in entities:
            for found in references_of(entity):
                portion = PORTION
                while portion >= PORTION:
                    portion = await self._execute(found.link(), timeout)
                    linked += portion
        return linked

    async def waiting_references(self, entities: Iterable[Entity], *, timeout: float) -> dict[str, int]:
        """How many rows name a record that is not in PostgreSQL, by ``table.column``; those without any left out."""
        waiting = {}
        for entity in entities:
            for found in references_of(entity):
                [(number,)] = await self._rows(found.waiting(), [], timeout)
                if number:
                    waiting[f"{found.table.name}.{found.column}"] = int(number)
        return waiting

    async def _lock(
        self,
        connection: AsyncConnection[Any],
        writes: Sequence[tuple[Entity, Any, Any]],
        *,
        migration: str,
        epoch: int,
        op: str | None,
        small: bool,
    ) -> list[tuple[Image | None, int]]:
        """Begin a transaction and lock these records in it; (image, revision of the tombstone) of each as given."""
        names = [{"entity": entity.name, "id": id_to_text(id_)} for entity, id_, _ in writes]
        cursors = []
        async with connection.pipeline():
            records = [(entity, id_to_text(id_)) for entity, id_, _ in writes]
            await connection.execute(b"BEGIN")
            await connection.execute(QUERIES["lock"], _locks(migration, records))
            fence = await connection.execute(QUERIES["epoch_is"], {"migration": migration, "epoch": epoch})
            for (entity, _, _), name in zip(writes, names, strict=True):
                # NO KEY: a writer that changes its mind must not keep others from linking to the record meanwhile.
                select = self.statements(entity).reading(_LOCKED, small=small)
                row = await connection.execute(select, [name["id"]])
                buried = await connection.execute(QUERIES["tombstone"], name)
                cursors.append((row, buried, await connection.execute(QUERIES["outbox_row"], name)))
            [(same_epoch,)] = await fence.fetchall()
            found = [(await r.fetchone(), await b.fetchone(), await o.fetchone()) for r, b, o in cursors]
        if not same_epoch:
            raise Fenced(f"PostgreSQL is not at epoch {epoch} of {migration}")
        answers: list[tuple[Image | None, int]] = []
        for (entity, _, _), (stored, tombstone, owed) in zip(writes, found, strict=True):
            if owed is not None and owed[3] is not None and owed[1].hex != op:
                raise errors.Busy(f"a write of this record of {entity.name} waits for its outcome")
            own = self.statements(entity)
            image = None if stored is None else own.image(stored, small=small)
            if image is not None and image.unknown:
                # A row from before its part had a revision.
                cursor = await connection.execute(own.reading(_LOCKED), [id_to_text(image.id)])
                image = own.image((await cursor.fetchall())[0])
            answers.append((image, 0 if tombstone is None else int(tombstone[0])))
        return answers

    async def _assert_new(self, connection: AsyncConnection[Any], entity: Entity, id_: Any) -> None:
        """Refuse a number that is a record's id in another of its types: to MongoDB the two are one.

        Raises:
            crossfade.errors.DuplicateKey: it is.
            crossfade.errors.Busy: it was, and MongoDB has not heard of the delete, which would take the new one along.
        """
        others = list(id_texts(id_)[1:])
        if not others:
            return
        query = sql.SQL(
            "SELECT EXISTS (SELECT FROM {} WHERE id = ANY(%s::text[])), "
            "EXISTS (SELECT FROM crossfade.outbox WHERE entity = %s AND id = ANY(%s::text[]))"
        ).format(self.statements(entity).table)
        cursor = await connection.execute(query, [others, entity.name, others])
        [(there, owed)] = await cursor.fetchall()
        if there:
            raise errors.DuplicateKey(entity.name, "_id")
        if owed:
            raise errors.Busy(
                f"the delete of this id of {entity.name}, a number of another type, is not in MongoDB yet"
            )

    def _put(
        self,
        entity: Entity,
        id_: Any,
        before: Image | None,
        change: Change,
        migration: str,
        epoch: int,
        *,
        keep_in_outbox: bool,
    ) -> list[Statement]:
        """The statements that make a change, of a record that is locked."""
        key, own = id_to_text(id_), self.statements(entity)
        statements: list[Statement]
        if change.image is None:
            bury = _bury(entity, [(key, change.rev, change.op)], migration, epoch)
            statements = [bury, *own.drop(key, change.rev)]
        else:
            assert change.rows is not None
            if before is None:
                statements = own.insert(change.image, change.rows)
            else:
                statements = own.update(change.image, change.rows, rev=before.rev)
        tentative = None if change.tentative is None else orjson.dumps(change.tentative).decode()
        note = {
            "entity": entity.name, "id": key, "rev": change.rev, "op": change.op, "epoch": epoch,
            "base_digest": None if before is None else before.digest, "tentative": tentative,
            "parts": list(change.parts),
        }  # fmt: skip
        query = QUERIES["outbox_put" if keep_in_outbox else "outbox_follow"]
        return [*statements, (query, note)]  # type: ignore[list-item]

    async def undo(
        self,
        writes: Sequence[tuple[Entity, Any, int]],
        op: str,
        *,
        migration: str,
        epoch: int,
        timeout: float,
    ) -> bool:
        """Put back what stood before an open operation, as next revisions; False: it is no longer open.

        ``writes`` are (entity, id, revision) of all of its records. Nobody else writes a record whose outbox row is
        tentative, so each is put back whole.
        """
        new_op = new_operation()

        async def work() -> bool:
            async with self._connection(timeout) as connection, connection.transaction():
                # As a write does: all of them first.
                records = [(entity, id_to_text(id_)) for entity, id_, _ in writes]
                await connection.execute(QUERIES["lock"], _locks(migration, records))
                for entity, id_, rev in sorted(writes, key=_by_name):
                    name = _name(entity, id_to_text(id_))
                    opened = await (await connection.execute(QUERIES["outbox_row"], name)).fetchone()
                    taken = await connection.execute(
                        QUERIES["outbox_undo"],
                        {
                            **name,
                            "rev": rev,
                            "op": op,
                            "new_op": new_op,
                            "epoch": epoch,
                            "migration": migration,
                        },
                    )
                    if taken.rowcount == 0 or opened is None:
                        raise Rollback
                    await self._put_back(
                        connection, entity, id_, rev + 1, new_op, orjson.loads(opened[3]),
                        migration=migration, epoch=epoch,
                    )  # fmt: skip
                return True
            return False

        ends = time.monotonic() + timeout
        undone = await self._bounded(_or_rolled_back(work()), timeout)
        await self._link([(entity, id_) for entity, id_, _ in writes], ends)
        return undone

    async def _put_back(
        self,
        connection: AsyncConnection[Any],
        entity: Entity,
        id_: Any,
        rev: int,
        op: str,
        tentative: Mapping[str, Any],
        *,
        migration: str,
        epoch: int,
    ) -> None:
        key, own = id_to_text(id_), self.statements(entity)
        statements: list[Statement]
        if tentative["before"] is None:
            statements = [_bury(entity, [(key, rev, op)], migration, epoch), *own.drop(key, rev)]
        else:
            before = decode_document(base64.b64decode(tentative["before"]))
            notes = {"rev": rev, "op": op, "keys": tentative["keys"]}
            image = Image.from_document({**before, CF: notes}, entity.parts)
            rows = entity.to_rows(image.document, image.keys)
            cursor = await connection.execute(own.reading(_LOCKED), [key])
            there = await cursor.fetchone() is not None
            statements = own.update(image, rows, rev=rev - 1) if there else own.insert(image, rows)
        for query, parameters in statements:
            await connection.execute(query, parameters)

    async def confirm(self, writes: Sequence[tuple[Entity, Any, int]], op: str, *, timeout: float) -> bool:
        """Turn an operation's tentative outbox rows into confirmed ones; False: it was undone, or they are gone.

        ``writes`` are (entity, id, revision) of all of its records.
        """

        async def work() -> bool:
            async with self._connection(timeout) as connection, connection.transaction():
                for entity, id_, rev in sorted(writes, key=_by_name):
                    done = await connection.execute(
                        QUERIES["outbox_confirm"],
                        {"entity": entity.name, "id": id_to_text(id_), "rev": rev, "op": op},
                    )
                    if done.rowcount == 0:
                        raise Rollback
                return True
            return False

        return await self._bounded(_or_rolled_back(work()), timeout)

    async def outbox(self, entities: Iterable[str], *, limit: int, timeout: float) -> list[Delivery]:
        """Up to ``limit`` owed deliveries, the oldest first, those that are parked behind all others."""
        rows = await self._ask("outbox", timeout, entities=list(entities), limit=limit)
        return [
            Delivery(
                entity, text_to_id(id_), rev, op.hex, None if base is None else bytes(base),
                None if tentative is None else orjson.loads(tentative), parked, tuple(parts),
            )
            for entity, id_, rev, op, base, tentative, parked, parts in rows
        ]  # fmt: skip

    async def outbox_row(self, entity: Entity, id_: Any, *, timeout: float) -> Delivery | None:
        """What is owed of one record."""
        rows = await self._ask("outbox_row", timeout, entity=entity.name, id=id_to_text(id_))
        return _delivery(entity, id_, rows[0]) if rows else None

    async def outbox_rows(
        self, entity: Entity, ids: Sequence[Any], *, timeout: float
    ) -> dict[str, tuple[Delivery, int]]:
        """What is owed of these records, by id text, and how many bytes their rows have without their parts."""
        by_text = {id_to_text(id_): id_ for id_ in ids}
        children = [
            sql.SQL(
                " + (SELECT coalesce(sum(pg_column_size(c.*)), 0) FROM {} AS c WHERE c.{} = o.id)"
            ).format(identifier(child.table), sql.Identifier(child.columns[0]))
            for child in entity.children
            if not child.is_part
        ]
        query = sql.SQL(
            "SELECT o.id, coalesce(pg_column_size(r.*), 0){}, o.rev, o.op, o.base_digest, o.tentative, o.parked, "
            "o.parts FROM crossfade.outbox AS o LEFT JOIN {} AS r ON r.id = o.id "
            "WHERE o.entity = %s AND o.id = ANY(%s::text[])"
        ).format(sql.Composed(children), self.statements(entity).table)
        rows = await self._rows(query, [entity.name, list(by_text)], timeout)
        return {key: (_delivery(entity, by_text[key], columns), size) for key, size, *columns in rows}

    async def settle(self, entity: Entity, id_: Any, rev: int, op: str, *, timeout: float) -> bool:
        """Remove the outbox row if it is still at this revision and operation."""
        done = await self._count(
            "outbox_settle", timeout, entity=entity.name, id=id_to_text(id_), rev=rev, op=op
        )
        return done == 1

    async def settle_many(
        self, entity: Entity, delivered: Sequence[tuple[str, int, str | None]], *, timeout: float
    ) -> set[str]:
        """Remove outbox rows that are still at these revisions and operations, (id text, rev, op) of each.

        The id texts of those that were removed; one that is being written is left.
        """
        ids, revs, ops = (list(column) for column in zip(*delivered, strict=True))
        rows = await self._ask("outbox_settle_many", timeout, entity=entity.name, ids=ids, revs=revs, ops=ops)
        return {key for (key,) in rows}

    async def park(self, entity: Entity, id_: Any, rev: int, op: str, cause: str, *, timeout: float) -> None:
        """Note in the outbox why MongoDB refuses this revision."""
        await self._count(
            "outbox_park", timeout, entity=entity.name, id=id_to_text(id_), rev=rev, op=op, cause=cause
        )

    async def tombstone(self, entity: Entity, id_: Any, *, timeout: float) -> tuple[int, str | None] | None:
        """Revision and operation id of a record's tombstone."""
        rows = await self._ask("tombstone", timeout, entity=entity.name, id=id_to_text(id_))
        return (rows[0][0], None if rows[0][1] is None else rows[0][1].hex) if rows else None

    # --- notes for a person --------------------------------------------------------------------------------

    async def note_conflict(
        self,
        entity: Entity,
        image: Image,
        *,
        cause: str,
        store: str,
        timeout: float,
        document: bytes | None = None,
    ) -> None:
        """Keep content that lost and that the primary never held, once; ``document``: its bytes as found."""
        await self._count(
            "conflict_insert", timeout, entity=entity.name, id=id_to_text(image.id), cause=cause, store=store,
            rev=image.rev, document=encode_document(image.document) if document is None else document,
        )  # fmt: skip

    async def conflicts(
        self, entities: Iterable[str], *, limit: int, timeout: float
    ) -> list[tuple[Any, ...]]:
        """(number, entity, id, cause, store, rev, BSON, seen at UTC), the newest first."""
        return await self._ask("conflicts", timeout, entities=list(entities), limit=limit)

    async def quarantine(
        self,
        entity: Entity,
        image: Image,
        *,
        reason: str,
        field: str | None,
        timeout: float,
        document: bytes | None = None,
    ) -> None:
        """Keep a document that cannot be carried, whole (``document``: its bytes as found), with the reason."""
        await self._count(
            "quarantine_put", timeout, entity=entity.name, id=id_to_text(image.id), reason=reason, field=field,
            rev=image.rev, digest=image.digest,
            document=encode_document(image.document) if document is None else document,
        )  # fmt: skip

    async def release(self, entity: Entity, ids: Sequence[Any], *, timeout: float) -> int:
        """Take records out of quarantine: they could be carried after all, or are gone."""
        return await self._count(
            "quarantine_drop", timeout, entity=entity.name, ids=[id_to_text(i) for i in ids]
        )

    async def quarantined_among(
        self, entity: Entity, ids: Sequence[Any], *, timeout: float
    ) -> dict[str, bytes]:
        """Digest of the document in quarantine by id text, for those of ``ids`` that are there."""
        rows = await self._ask(
            "quarantined_among", timeout, entity=entity.name, ids=[id_to_text(i) for i in ids]
        )
        return {id_: bytes(stored) for id_, stored in rows}

    async def waived_among(self, entity: Entity, texts: Sequence[str], *, timeout: float) -> set[str]:
        """Which of these id texts are in quarantine and waived, as they are now."""
        rows = await self._ask("waived_among", timeout, entity=entity.name, ids=list(texts))
        return {row[0] for row in rows}

    async def quarantined_entities(self, entities: Iterable[str], *, timeout: float) -> set[str]:
        """Which of these entities have a record in quarantine."""
        return {row[0] for row in await self._ask("quarantined_entities", timeout, entities=list(entities))}

    async def counts(self, entities: Iterable[str], *, timeout: float) -> tuple[int, int]:
        """How many records are in quarantine, and how many conflicts are noted."""
        [(quarantined, conflicts)] = await self._ask("counts", timeout, entities=list(entities))
        return int(quarantined), int(conflicts)

    async def outbox_depth(self, entities: Iterable[str], *, timeout: float) -> tuple[int, float]:
        """How many deliveries are owed, and the age of the oldest in seconds."""
        [(depth, age)] = await self._ask("outbox_depth", timeout, entities=list(entities))
        return int(depth), float(age)

    async def last_runs(
        self, migration: str, entities: Iterable[str], *, timeout: float
    ) -> list[dict[str, Any]]:
        """The newest run of each kind and entity."""
        names = ("entity", "kind", "state", "epoch", "mapping", "counts", "started_at", "finished_at")
        rows = await self._ask("last_runs", timeout, migration=migration, entities=list(entities))
        runs = [dict(zip(names, row, strict=True)) for row in rows]
        for run in runs:
            run["counts"] = orjson.loads(run["counts"])
        return runs

    # --- preparing and the control record ------------------------------------------------------------------

    async def prepare(self, *, timeout: float = 30.0) -> None:
        """Create Crossfade's own tables; idempotent, and safe for two processes at once."""
        script = resources.files(__package__).joinpath("schema.sql").read_bytes()

        async def work() -> None:
            async with self._connection(timeout) as connection, connection.transaction():
                await connection.execute(QUERIES["lock_exclusive"], {"migration": ""})
                await connection.execute(script)

        await self._bounded(work(), timeout)

    async def missing(self, entities: Iterable[Entity], *, timeout: float) -> list[str]:
        """What of the schema is not there: Crossfade's own tables, the entities' tables and columns."""
        try:
            [(version,)] = await self._ask("schema_version", timeout)
        except (errors.SchemaNotReady, ValueError):
            return ["Crossfade's own tables"]
        missing = [] if version == SCHEMA_VERSION else [f"Crossfade's tables at version {SCHEMA_VERSION}"]
        for entity in entities:
            own = self.statements(entity)
            try:
                await self._rows(own.select(sql.SQL(" LIMIT 0")), [], timeout)
            except errors.SchemaNotReady as cause:
                missing.append(f"table {entity.table.name} ({str(cause.__cause__).splitlines()[0]})")
        return missing

    async def unvalidated(self, entities: Iterable[Entity], *, timeout: float) -> list[str]:
        """Constraints of the entities' tables that hold for new rows only: ``table.constraint``."""
        rows = await self._ask("unvalidated", timeout, tables=_tables(entities))
        return [f"{table}.{name}" for table, name in rows]

    async def validate(self, entities: Iterable[Entity], *, timeout: float) -> list[str]:
        """Let PostgreSQL check the old rows too, one constraint after the other, beside reads and writes.

        Raises:
            crossfade.stores.errors.RuleBroken: a row breaks one; those before it are validated.
        """
        done = []
        for table, name in await self._ask("unvalidated", timeout, tables=_tables(entities)):
            statement = sql.SQL("ALTER TABLE {} VALIDATE CONSTRAINT {}").format(
                sql.SQL(table),
                sql.Identifier(name),  # as regclass writes it, quoted where need be
            )
            await self._execute(statement, timeout)
            done.append(f"{table}.{name}")
        return done

    async def count_tombstones(self, entities: Iterable[str], *, timeout: float) -> int:
        """How many tombstones there are."""
        [(number,)] = await self._ask("tombstones_count", timeout, entities=list(entities))
        return int(number)

    async def drop_tombstones(self, entities: Iterable[str], *, batch: int, timeout: float) -> int:
        """Remove up to ``batch`` tombstones; how many. Only once no image of an older epoch can arrive."""
        return await self._count("tombstones_drop", timeout, entities=list(entities), limit=batch)

    async def is_empty(self, entities: Iterable[Entity], *, timeout: float) -> bool:
        """Whether none of the entities' tables has a row."""
        for entity in entities:
            query = sql.SQL("SELECT 1 FROM {} LIMIT 1").format(self.statements(entity).table)
            if await self._rows(query, [], timeout):
                return False
        return True

    async def control(self, migration: str, *, timeout: float) -> dict[str, Any] | None:
        """The copy of the control record that PostgreSQL holds."""
        rows = await self._ask("control", timeout, migration=migration)
        return orjson.loads(rows[0][0]) if rows else None

    async def change_control(
        self,
        migration: str,
        record: Mapping[str, Any],
        *,
        expected: int | None,
        timeout: float,
    ) -> bool:
        """Replace the control record that is at version ``expected`` (None: where there is none).

        Waits for every writing transaction under way: none of the older epoch commits afterwards. One whose client has
        been silent for half a second is ended: nobody was told that it succeeded.
        """
        return await self._control_statement(
            "control_insert" if expected is None else "control_change", migration, record, expected, timeout
        )

    async def copy_control(self, migration: str, record: Mapping[str, Any], *, timeout: float) -> bool:
        """Copy a record that MongoDB decided; an older one never replaces a newer one."""
        return await self._control_statement("control_copy", migration, record, None, timeout)

    async def _control_statement(
        self,
        name: str,
        migration: str,
        record: Mapping[str, Any],
        expected: int | None,
        timeout: float,
    ) -> bool:
        parameters = {
            "migration": migration,
            "epoch": record["epoch"],
            "record": orjson.dumps(record).decode(),
            "expected": expected,
        }

        async def work() -> bool:
            async with self._connection(timeout) as connection, connection.transaction():
                await connection.execute(QUERIES["lock_exclusive"], {"migration": migration})
                return (await connection.execute(QUERIES[name], parameters)).rowcount == 1

        ending = asyncio.create_task(self._end_silent(migration, timeout))
        try:
            return await self._bounded(work(), timeout)
        finally:
            ending.cancel()

    async def _end_silent(self, migration: str, timeout: float) -> None:
        """End the sessions that keep a change of epoch waiting because their client has stopped."""
        seen: list[str] = []
        await asyncio.sleep(_AT_ONCE)
        while True:
            with contextlib.suppress(errors.CrossfadeError):
                rows = await self._ask("end_silent", timeout, migration=migration, seen=seen)
                seen = [mark for mark, _ in rows]
            await asyncio.sleep(_SILENT)

    async def note_history(
        self, migration: str, entries: Sequence[Mapping[str, Any]], *, timeout: float
    ) -> None:
        """Keep who changed the control record, and why; what is kept already stays as it is."""
        for entry in entries:
            await self._count("history_insert", timeout, migration=migration, **entry)

    async def history(self, migration: str, *, after: int, timeout: float) -> list[dict[str, Any]]:
        """What `note_history` kept of later versions than ``after``, the oldest first."""
        names = ("version", "epoch", "phase", "state", "changed_at", "changed_by", "reason")
        rows = await self._ask("history", timeout, migration=migration, after=after)
        return [dict(zip(names, row, strict=True)) for row in rows]

    # --- who works on it -----------------------------------------------------------------------------------

    async def put_worker(
        self, migration: str, worker: str, entry: Mapping[str, Any], *, timeout: float
    ) -> None:
        """Write a worker's entry in the registry, new or again."""
        await self._count(
            "worker_put", timeout, migration=migration, worker=worker, beat=entry["beat"],
            entry=orjson.dumps(entry).decode(),
        )  # fmt: skip

    async def workers(self, migration: str, *, timeout: float) -> list[tuple[str, dict[str, Any]]]:
        """(worker, entry) of everybody in the registry."""
        rows = await self._ask("workers", timeout, migration=migration)
        return [(worker, orjson.loads(entry)) for worker, entry, _ in rows]

    async def silent_for(self, migration: str, *, timeout: float) -> dict[str, float]:
        """Seconds since each worker's entry was written, by this store's own clock."""
        return {
            worker: silent for worker, _, silent in await self._ask("workers", timeout, migration=migration)
        }

    async def drop_worker(self, migration: str, worker: str, *, beat: int | None, timeout: float) -> None:
        """Take a worker out of the registry; with ``beat``: only if it has not been heard of since."""
        await self._count("worker_drop", timeout, migration=migration, worker=worker, beat=beat)


class Ahead:
    """An image that PostgreSQL is given while the primary is still being asked: caller and stores wait at once.

    It stands in an open transaction. Nobody sees it before `commit`, which comes after the primary has decided just
    this image; whoever decides otherwise, or dies, leaves nothing of it.
    """

    def __init__(
        self,
        store: PostgresStore,
        image: Callable[[], Image],
        task: asyncio.Task[None],
        decided: asyncio.Future[bool],
        committed: asyncio.Future[list[tuple[Any, ...]]],
        timeout: float,
    ) -> None:
        self._store, self._image, self._task, self._timeout = store, image, task, timeout
        self._decided, self._committed = decided, committed
        self._began = time.monotonic()
        self._taken = False

    def brings(self, image: Image) -> bool:
        """Whether what the primary decided is what was foreseen, and may still be committed."""
        if self._taken or (self._decided.done() and not self._decided.result()):
            return False
        mine = self._image()
        return (mine.rev, mine.op, mine.digest, mine.keys, mine.parts) == (
            image.rev, image.op, image.digest, image.keys, image.parts,
        )  # fmt: skip

    async def decide(self, image: Image) -> None:
        """Have it committed if it brings ``image``, beside what the caller goes on with; `commit` waits for that.

        A commit that nobody waits for is one that was not answered: the debt stands.
        """
        if self.brings(image) and not self._decided.done() and (image.debt is None or not image.debt.group):
            self._decided.set_result(True)
            await asyncio.sleep(0)

    async def commit(self, behind: list[asyncio.Task[None]]) -> tuple[Applied, Held] | None:
        """Commit it, as `PostgresStore.apply` does; None: it never got a connection, and nothing is there.

        Raises: as `PostgresStore.apply`, and what stood in the way before.
        """
        task, committed = self._task, self._committed
        self._taken = True
        if committed.done() and not committed.cancelled() and isinstance(committed.exception(), PoolTimeout):
            # The others that waited for the primary had all connections: nothing is wrong with the server.
            return None
        if not self._decided.done():
            self._decided.set_result(True)
        # Its time began when PostgreSQL was asked, not now: a caller waits for a server that stands still no longer
        # because the primary has answered meanwhile. A commit gets its share in any case.
        waited = time.monotonic() - self._began
        await self._store._until(committed, task, max(self._timeout - waited, self._timeout / 2))
        behind.append(task)
        [answer] = committed.result()
        return _verdict(self._image(), *held(answer)), held(answer)[0]

    def drop(self) -> None:
        """Take it back, unless it was decided; behind the caller's back."""
        if self._taken:
            return
        self._taken = True
        if not self._decided.done():
            self._decided.set_result(False)
        self._store._leave(self._task)
        asyncio.get_running_loop().call_later(self._timeout, self._task.cancel)


async def _decision(decided: asyncio.Future[bool], timeout: float) -> bool:
    """What was decided; after ``timeout`` seconds it is no."""

    def give_up() -> None:
        if not decided.done():
            decided.set_result(False)

    timer = asyncio.get_running_loop().call_later(timeout, give_up)
    try:
        return await decided
    finally:
        timer.cancel()


async def _executed(connection: AsyncConnection[Any], statement: bytes) -> None:
    await connection.execute(statement)


async def _or_rolled_back(work: Coroutine[Any, Any, bool]) -> bool:
    """False, too, where a transaction could not even be rolled back: its connection was lost, and it with it."""
    try:
        return await work
    except Rollback:
        return False


def _keys(change: Change) -> Mapping[str, str]:
    return {} if change.image is None else change.image.keys


def _verdict(image: Image, now: Held, same_epoch: bool, *, deleted: bool = False) -> Applied:
    if not same_epoch:
        raise Fenced("PostgreSQL is at another epoch")
    if deleted:
        return Applied.APPLIED if now.rev is None and (now.tombstone or -1) >= image.rev else Applied.BEHIND
    if now.rev == image.rev and now.digest == image.digest and (now.tombstone or -1) < image.rev:
        return Applied.APPLIED if now.op == image.op else Applied.SAME
    return Applied.BEHIND


def _tables(entities: Iterable[Entity]) -> list[str]:
    """The tables of these entities, as PostgreSQL reads their names."""
    tables = {table for entity in entities for table in (entity.table, *(c.table for c in entity.children))}
    return sorted(identifier(table).as_string(None) for table in tables)


def _name(entity: Entity, key: str) -> dict[str, str]:
    return {"entity": entity.name, "id": key}


def _by_entity(records: Iterable[tuple[Entity, str]]) -> list[tuple[Entity, list[str]]]:
    keys: dict[str, tuple[Entity, list[str]]] = {}
    for entity, key in records:
        keys.setdefault(entity.name, (entity, []))[1].append(key)
    return list(keys.values())


def _delivery(entity: Entity, id_: Any, columns: Sequence[Any]) -> Delivery:
    rev, op, base, tentative, parked, parts = columns
    return Delivery(
        entity.name, id_, rev, op.hex, None if base is None else bytes(base),
        None if tentative is None else orjson.loads(tentative), parked, tuple(parts),
    )  # fmt: skip


def _bury(
    entity: Entity, deletes: Sequence[tuple[str, int, str | None]], migration: str, epoch: int
) -> Statement:
    """What puts tombstones: (id text, revision, operation) of each."""
    ids, revs, ops = (list(column) for column in zip(*deletes, strict=True))
    parameters = {
        "entity": entity.name, "ids": ids, "revs": revs, "ops": ops, "migration": migration, "epoch": epoch,
    }  # fmt: skip
    return QUERIES["bury"], parameters  # type: ignore[return-value]


def _locks(migration: str, records: Sequence[tuple[Entity, str]]) -> dict[str, Any]:
    """Parameters of the query ``lock``: the records in one order everywhere."""
    # A number under one name, whatever its type: to MongoDB it is one id.
    names = sorted(
        (entity.name, min(id_texts(text_to_id(key))) if key.startswith("j:") else key)
        for entity, key in records
    )
    return {"migration": migration, "records": [f"{entity}:{key}" for entity, key in names]}


def _by_name(write: tuple[Entity, Any, int]) -> tuple[str, str]:
    return write[0].name, id_to_text(write[1])
