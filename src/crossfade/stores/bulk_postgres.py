"""Writing whole collections to PostgreSQL, a chunk in a transaction, and reading them back in ranges.

What a chunk promises
    The chunk's rows, the quarantine entries and the checkpoint are one transaction, bound to one epoch of the
    control record under the shared advisory lock: after a kill at any instant the run goes on behind what is
    there. The upsert carries the same guard as a single image's: it replaces a row only by a newer revision
    (or the same content under a newer mapping), and inserts nothing that a tombstone covers. A delete that
    commits while the chunk is under way cannot be seen by it; therefore `look_again`, after the commit.

Why it is fast
    Parents go through a temporary table, because only an INSERT can be guarded. Child rows, most of the
    volume, are copied straight into their table, once it is known which parents won; those with links to other
    records go through a temporary table, too, and arrive with the links whose target is there. Those whose target
    comes later are a second write of the row, about half of all: that is done beside the next chunk (`link`).

Gentle with whoever else writes
    A chunk locks the rows it writes until its commit, a second or so. Where it has to wait for others it gives up
    after `LOCK_SECONDS`, lets go of everything, and tries again: so it never keeps anybody waiting for long because
    of what a third one holds.

One bad row and its neighbours
    A chunk is written at once inside a savepoint. If the server refuses it, rows that collide on a unique key
    are found by joins and set aside; what still fails is halved until the one row is found.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.pq import Format
from psycopg.types.string import TextBinaryLoader
from sqlalchemy import Table

from crossfade import errors
from crossfade.entity import META_COLUMNS, Entity
from crossfade.fields import Child
from crossfade.stores.copy_format import HEADER, TRAILER, ColumnType, compile_row, compile_rows
from crossfade.stores.errors import Fenced
from crossfade.stores.loading import Loading
from crossfade.stores.references import PORTION, followers, identifier, link_range, linked_rows
from crossfade.stores.rows import assignments
from crossfade.stores.runs import LEASE, Piece, Run, Runs
from crossfade.stores.server import address_of

STORE = "postgres"
#: Times a chunk is tried when the server breaks a deadlock or a snapshot conflict by refusing it.
ATTEMPTS = 5
#: Seconds that a chunk waits for a lock that somebody else holds, before it gives its own free and rests as long; and
#: how often, within a lease. Who is kept waiting by a chunk is so for this long, whatever the chunk itself waits for.
LOCK_SECONDS, LOCK_TRIES = 1.0, 20
#: Seconds.
CONNECT_TIMEOUT = 5

T = TypeVar("T")

#: Above the text of every id, which begins with a hexadecimal digit, "s:" or "j:".
_LAST_TEXT = "t"

# What a row is to blame for: bad values (class 22), broken rules (class 23), too large for an index or a page.
_ROW_FAULTS = (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.ProgramLimitExceeded)
_PASSING = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """A document, converted and encoded.

    Attributes:
        id: the document's ``_id``; ``text`` is its id text.
        raw: the document as found.
        rev, digest: of its image.
        parent: the parent row in binary COPY form.
        children: for each child table, the rows in binary COPY form, joined.
    """

    id: Any
    text: str
    raw: bytes
    rev: int
    digest: bytes
    parent: bytes
    children: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class BadDocument:
    """A document that cannot be carried over, as it goes to quarantine.

    Attributes:
        id: its ``_id`` as far as it can be told; ``text`` is its id text.
        reason, field: for a person, without the value.
        digest: of the bytes as found.
    """

    id: Any
    text: str
    raw: bytes
    rev: int
    digest: bytes
    reason: str
    field: str | None


@dataclass(slots=True)
class Written:
    """What became of a chunk's rows.

    Attributes:
        inserted, updated, same: rows.
        removed: of those, that a delete has covered before the chunk was committed.
        behind: ids of documents whose row is newer, or a fork, or covered by a tombstone.
        violations: (id, rule) of documents that break a unique rule or a reference; not written.
        refused: documents that the table does not take for another reason; in quarantine.
    """

    inserted: int = 0
    updated: int = 0
    same: int = 0
    removed: int = 0
    behind: list[Any] = field(default_factory=list)
    violations: list[tuple[Any, str]] = field(default_factory=list)
    refused: list[BadDocument] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record as PostgreSQL holds it.

    Attributes:
        text: id text.
        parent, children: as `Entity.from_rows` takes them.
        rev, op, digest, mapping: as noted in the row.
    """

    text: str
    parent: tuple[Any, ...]
    children: tuple[tuple[tuple[Any, ...], ...], ...]
    rev: int
    op: str | None = None
    digest: bytes = b""
    mapping: int = 0


class _RawJson(Loader):
    format = Format.BINARY

    def load(self, data: Buffer) -> bytes:
        # The first byte is the version of jsonb's binary form.
        return bytes(data)[1:]


def _list(columns: Iterable[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, columns))


@dataclass(frozen=True, slots=True)
class _UniqueIndex:
    name: str
    columns: tuple[str, ...]


class EntityTables:
    """What the database says about an entity's tables, and the statements composed from it.

    Attributes:
        write_parent: encodes a parent row: `Entity.parent_columns`, then the meta columns.
        write_children: for each child table, encodes the rows of one document.
    """

    def __init__(
        self,
        entity: Entity,
        types: dict[str, dict[str, ColumnType]],
        unique: Sequence[_UniqueIndex],
        deferred: bool,
        loading: bool = False,
    ) -> None:
        self.entity = entity
        self._loading = loading
        self.columns = (*entity.parent_columns, *META_COLUMNS)
        self.unique = tuple(unique)
        self.deferred = deferred
        self._rules = {rule.to: rule.rule for rule in entity.unique}
        parent = types[_key(entity.table)]
        self.write_parent: Callable[[tuple[Any, ...]], bytes] = compile_row([parent[c] for c in self.columns])
        self.write_children: tuple[Callable[[Any], bytes], ...] = tuple(
            compile_rows(
                [types[_key(child.table)][c] for c in child.stored_columns],
                [child.columns.index(of) for of in followers(child.table)] if loading else [],
            )
            for child in entity.children
        )
        self._compose()

    def rule_of(self, constraint: str) -> str:
        """The rule that a unique index stands for; the constraint's own name where no rule is declared."""
        for index in self.unique:
            if index.name == constraint:
                for column in index.columns:
                    if column in self._rules:
                        return self._rules[column]
        return constraint

    def _compose(self) -> None:
        entity, columns = self.entity, _list(self.columns)
        table = self.table = identifier(entity.table)
        stage = sql.Identifier(f"crossfade_stage_{entity.name}")
        owners = [(identifier(child.table), sql.Identifier(child.columns[0])) for child in entity.children]
        assigned = assignments(entity.table, [c for c in self.columns if c != "id"], "t")
        stages = [stage]
        self.create_stages = [_create_stage(stage, columns, table)]
        self.copy_stage = _copy(stage, columns)
        # xmax is 0 only in a row that this statement inserted.
        self.upsert = sql.SQL(
            "WITH won AS ("
            "{arrivals} ON CONFLICT (id) DO UPDATE SET {assigned} "
            "WHERE t.cf_rev < EXCLUDED.cf_rev OR (t.cf_rev = EXCLUDED.cf_rev "
            "AND t.cf_digest = EXCLUDED.cf_digest AND t.cf_mapping < EXCLUDED.cf_mapping) "
            "RETURNING id, xmax = 0 AS fresh) "
            "SELECT count(*) FILTER (WHERE won.fresh), array_agg(s.id) FILTER (WHERE NOT won.fresh), "
            "array_agg(s.id) FILTER (WHERE won.id IS NULL) FROM {stage} AS s LEFT JOIN won USING (id)"
        ).format(
            arrivals=linked_rows(
                entity.table,
                self.columns,
                stage,
                sql.SQL(
                    "NOT EXISTS (SELECT FROM crossfade.tombstones AS d "
                    "WHERE d.entity = %s AND d.id = s.id AND d.rev >= s.cf_rev)"
                ),
                unchecked=self._loading,
            ),
            stage=stage,
            assigned=assigned,
        )
        self.classify = sql.SQL(
            "SELECT s.id FROM {stage} AS s LEFT JOIN {table} AS t USING (id) "
            "LEFT JOIN crossfade.tombstones AS d ON d.entity = %s AND d.id = s.id AND d.rev >= s.cf_rev "
            "WHERE s.id = ANY(%s) AND NOT (d.id IS NULL AND t.id IS NOT NULL "
            "AND t.cf_rev = s.cf_rev AND t.cf_digest = s.cf_digest)"
        ).format(stage=stage, table=table)
        self.copy_children: list[sql.Composed] = []
        self.insert_children: list[sql.Composed | None] = []
        for number, child in enumerate(entity.children):
            into, columns_ = identifier(child.table), child.stored_columns
            if self._loading:
                columns_ += tuple(followers(child.table).values())
                self.insert_children.append(None)
            elif followers(child.table):
                into = sql.Identifier(f"crossfade_stage_{entity.name}_{number}")
                stages.append(into)
                self.create_stages.append(_create_stage(into, _list(columns_), identifier(child.table)))
                self.insert_children.append(linked_rows(child.table, columns_, into))
            else:
                self.insert_children.append(None)
            self.copy_children.append(_copy(into, _list(columns_)))
        self.empty_stages = sql.SQL("TRUNCATE {}").format(sql.SQL(", ").join(stages))
        self.drop_children = [
            sql.SQL("DELETE FROM {} WHERE {} = ANY(%s)").format(child, owner) for child, owner in owners
        ]
        self.leave_quarantine = sql.SQL(
            "DELETE FROM crossfade.quarantine AS q USING {} AS s "
            "WHERE q.entity = %s AND q.id = s.id AND q.rev <= s.cf_rev"
        ).format(stage)
        self.violators = [self._violators(index, stage) for index in self.unique]
        self.covered = sql.SQL(
            "SELECT t.id FROM crossfade.tombstones AS d JOIN {} AS t ON t.id = d.id "
            "WHERE d.entity = %s AND d.id >= %s AND d.id <= %s AND t.cf_rev <= d.rev FOR UPDATE OF t"
        ).format(table)
        #: While a table is loaded, rows come with their links, and those that wait are linked at its end.
        self.links = [] if self._loading else link_range(entity)
        self.drop_parents = sql.SQL("DELETE FROM {} WHERE id = ANY(%s)").format(table)
        self.select_range = sql.SQL(
            "SELECT {} FROM {} WHERE id > %s AND id <= %s ORDER BY id LIMIT %s"
        ).format(columns, table)
        self.select_revisions = sql.SQL(
            "SELECT id, cf_rev FROM {} WHERE id > %s AND id <= %s ORDER BY id LIMIT %s"
        ).format(table)
        self.select_ids = sql.SQL("SELECT {} FROM {} WHERE id = ANY(%s)").format(columns, table)
        self.select_children_of = [
            _select_children(child, sql.SQL("{} = ANY(%s)")) for child in entity.children
        ]
        self.select_children_within = [
            _select_children(child, sql.SQL("{0} >= %s AND {0} <= %s")) for child in entity.children
        ]

    def _violators(self, index: _UniqueIndex, stage: sql.Identifier) -> sql.Composed:
        """Rows of the stage whose key another row has: one in the table, or an earlier one in the stage."""
        same_key = sql.SQL(" AND ").join(
            sql.SQL("t.{0} = s.{0}").format(sql.Identifier(c)) for c in index.columns
        )
        present = sql.SQL(" AND ").join(
            sql.SQL("{} IS NOT NULL").format(sql.Identifier(c)) for c in index.columns
        )
        return sql.SQL(
            "SELECT s.id FROM {stage} AS s JOIN {table} AS t ON {same_key} AND t.id <> s.id UNION "
            "SELECT id FROM (SELECT id, row_number() OVER (PARTITION BY {columns} ORDER BY id) AS place "
            "FROM {stage} WHERE {present}) AS twins WHERE place > 1"
        ).format(
            stage=stage, table=self.table, same_key=same_key, columns=_list(index.columns), present=present
        )


def _select_children(child: Child, where: sql.SQL) -> sql.Composed:
    """Rows of the owners that ``where`` says of, those of one owner together and in their order."""
    return sql.SQL("SELECT {} FROM {} WHERE {} ORDER BY {}").format(
        _list(child.columns),
        identifier(child.table),
        where.format(sql.Identifier(child.columns[0])),
        _list(child.columns[: 2 if child.is_list else 1]),
    )


def _create_stage(stage: sql.Identifier, columns: sql.Composed, table: sql.Identifier) -> sql.Composed:
    # AS SELECT, not LIKE: constraints must bind where the row is to stay, not here.
    return sql.SQL(
        "CREATE TEMPORARY TABLE IF NOT EXISTS {} ON COMMIT DELETE ROWS AS SELECT {} FROM {} WITH NO DATA"
    ).format(stage, columns, table)


def _copy(into: sql.Identifier, columns: sql.Composed) -> sql.Composed:
    return sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(into, columns)


def _key(table: Table) -> str:
    return f"{table.schema}.{table.name}" if table.schema else table.name


class BulkPostgres:
    """A connection to PostgreSQL for one bulk run, and one more where records link to each other.

    Made by `connect`. Not for use by two tasks at once.
    """

    def __init__(self, connection: AsyncConnection[Any], url: str, address: str) -> None:
        self._connection = connection
        self._url = url
        #: The one that links are set over; opened when there are some.
        self._beside: AsyncConnection[Any] | None = None
        self.address = address
        self.runs = Runs(connection, lambda: translated(address))
        self.loading = Loading(connection, lambda: translated(address))

    @classmethod
    async def connect(cls, url: str, *, connect_timeout: int = CONNECT_TIMEOUT) -> BulkPostgres:
        """Connect.

        Args:
            url: ``postgresql://...``.
            connect_timeout: seconds.

        Raises:
            crossfade.errors.ConfigurationError: the URL cannot be understood.
            crossfade.errors.StoreUnavailable: no connection to be had.
        """
        address = address_of(url)
        with translated(address):
            connection = await _open(url, connect_timeout)
        connection.adapters.register_loader("jsonb", _RawJson)
        return cls(connection, url, address)

    async def close(self) -> None:
        """Close the connections; an open transaction is rolled back."""
        await self._connection.close()
        if self._beside is not None:
            await self._beside.close()

    # --- getting ready -----------------------------------------------------------------------------------

    async def tables_of(self, entity: Entity, *, loading: bool = False) -> EntityTables:
        """What the catalogue says about an entity's tables; ``loading``: see `crossfade.stores.loading`.

        Raises:
            crossfade.errors.SchemaNotReady: a table or column is missing, or one is char(n).
        """
        types = {}
        with translated(self.address):
            for table, wanted in [
                (entity.table, (*entity.parent_columns, *META_COLUMNS)),
                *((child.table, child.stored_columns) for child in entity.children),
            ]:
                found = types[_key(table)] = await self._column_types(table)
                missing = [c for c in wanted if c not in found]
                if missing:
                    raise errors.SchemaNotReady(
                        f"PostgreSQL at {self.address} has no table or column for "
                        f"{', '.join(f'{_key(table)}.{c}' for c in missing)}. The schema is not at head: run the "
                        "application's migrations (alembic upgrade head)"
                    )
                padded = [c for c in wanted if found[c].name == "bpchar"]
                if padded:
                    raise errors.SchemaNotReady(
                        f"PostgreSQL at {self.address} has {', '.join(f'{_key(table)}.{c}' for c in padded)} as "
                        "char(n), which pads text with blanks: what comes back is not what was written. Make it text"
                    )
            cursor = await self._connection.execute(
                "SELECT c.relname, array_agg(a.attname ORDER BY k.place) FROM pg_index AS i "
                "JOIN pg_class AS c ON c.oid = i.indexrelid "
                "CROSS JOIN unnest(i.indkey::int[]) WITH ORDINALITY AS k (number, place) "
                "JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.number "
                "WHERE i.indrelid = to_regclass(%s) AND i.indisunique AND NOT i.indisprimary "
                "AND i.indexprs IS NULL AND i.indpred IS NULL AND k.place <= i.indnkeyatts GROUP BY c.relname",
                [_quoted(entity.table)],
            )
            ours = {*entity.parent_columns, *META_COLUMNS}
            unique = [_UniqueIndex(n, tuple(cs)) for n, cs in await cursor.fetchall() if set(cs) <= ours]
            cursor = await self._connection.execute(
                "SELECT EXISTS (SELECT FROM pg_constraint WHERE condeferred AND conrelid = "
                "ANY(SELECT to_regclass(name) FROM unnest(%s::text[]) AS name))",
                [[_quoted(t) for t in (entity.table, *(c.table for c in entity.children))]],
            )
            [deferred] = await cursor.fetchone() or (False,)
            return EntityTables(entity, types, unique, bool(deferred), loading)

    async def _column_types(self, table: Table) -> dict[str, ColumnType]:
        cursor = await self._connection.execute(
            "WITH RECURSIVE base (attname, oid) AS (SELECT attname, atttypid FROM pg_attribute "
            "WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped UNION ALL "
            "SELECT b.attname, t.typbasetype FROM base AS b JOIN pg_type AS t USING (oid) WHERE t.typtype = 'd') "
            "SELECT b.attname, t.typname, t.oid::int8, t.typtype = 'e' FROM base AS b "
            "JOIN pg_type AS t USING (oid) WHERE t.typtype <> 'd'",
            [_quoted(table)],
        )
        types = {name: ColumnType(kind, oid, is_enum) for name, kind, oid, is_enum in await cursor.fetchall()}
        # The driver does not know the types that a database made itself; their binary form is their text.
        for column in types.values():
            if column.is_enum or column.name == "citext":
                self._connection.adapters.register_loader(column.oid, TextBinaryLoader)
        return types

    # --- writing -----------------------------------------------------------------------------------------

    async def write_chunk(
        self,
        tables: EntityTables,
        rows: Sequence[PreparedRow],
        bad: Sequence[BadDocument],
        *,
        migration: str,
        epoch: int,
        checkpoint: Callable[[Written], Awaitable[None]],
    ) -> Written:
        """Write a chunk and its checkpoint in one transaction; what became of the rows.

        Args:
            rows: in the order of their ids, no id twice.
            bad: documents for quarantine.
            checkpoint: notes how far the run is, in the same transaction, from what became of the rows. What it raises
                undoes the chunk.

        Raises:
            crossfade.stores.errors.Fenced: PostgreSQL is at another epoch; nothing was written.
            crossfade.errors.Busy: others hold what it needs, again and again; nothing was written.
            crossfade.errors.StoreUnavailable: nothing is known to be written; a new run finds out.
        """
        return await self._patiently(
            self._connection, lambda: self._write(tables, rows, bad, migration, epoch, checkpoint)
        )

    async def _patiently(self, connection: AsyncConnection[Any], work: Callable[[], Awaitable[T]]) -> T:
        """Do something in a transaction: again where a deadlock is broken by refusing it, or others hold a lock."""
        refused = held = 0
        while True:
            with translated(self.address):
                try:
                    async with connection.transaction():
                        return await work()
                except _PASSING:
                    refused += 1
                    if refused == ATTEMPTS:
                        raise
                except psycopg.errors.LockNotAvailable as cause:
                    held += 1
                    if held == LOCK_TRIES:
                        raise errors.Busy(
                            f"others hold rows or tables for longer than {LOCK_SECONDS:g} s, again and again "
                            f"({cause.diag.context or cause.diag.message_primary}). End long transactions, then run "
                            "it again: it goes on"
                        ) from cause
                    await asyncio.sleep(LOCK_SECONDS)

    async def _write(
        self,
        tables: EntityTables,
        rows: Sequence[PreparedRow],
        bad: Sequence[BadDocument],
        migration: str,
        epoch: int,
        checkpoint: Callable[[Written], Awaitable[None]],
    ) -> Written:
        connection, name = self._connection, tables.entity.name
        # Two statements: the epoch must be read by a snapshot that is taken once the lock is held.
        await connection.execute(
            "SELECT pg_advisory_xact_lock_shared(hashtextextended('crossfade:' || %s, 0))", [migration]
        )
        cursor = await connection.execute(
            "SELECT (SELECT epoch FROM crossfade.control WHERE migration = %s), "
            "EXISTS (SELECT FROM crossfade.quarantine WHERE entity = %s)",
            [migration, name],
        )
        found, quarantined = await cursor.fetchone() or (None, False)
        if found != epoch:
            raise Fenced(
                f"the migration {migration} went from epoch {epoch} to {found} during the run: another phase "
                "began. Nothing is lost; run the command again"
            )
        written = Written()
        if rows:
            for create in tables.create_stages:
                await connection.execute(create)
            await self._put(tables, rows, written, quarantined=bool(quarantined), whole=True)
        await self._quarantine(name, [*bad, *written.refused])
        if rows:
            # A delete since the statement before has found no row, and may have been told of: see `lock_deletes`.
            await connection.execute(
                "SELECT pg_advisory_xact_lock(hashtextextended('crossfade:' || %s, 4))", [name]
            )
            texts = [row.text for row in rows]
            written.removed = await self._drop_covered(tables, min(texts), max(texts))
        await checkpoint(written)
        return written

    async def _put(
        self,
        tables: EntityTables,
        rows: Sequence[PreparedRow],
        written: Written,
        *,
        quarantined: bool,
        whole: bool = False,
    ) -> None:
        """Write rows in a savepoint; when the server refuses them, set the guilty ones aside."""
        try:
            async with self._connection.transaction():
                if not whole:
                    # An earlier part of the chunk may be in it; a new transaction finds it empty.
                    await self._connection.execute(tables.empty_stages)
                outcome = await self._put_at_once(tables, rows, quarantined)
        except _ROW_FAULTS as fault:
            if len(rows) == 1:
                self._set_aside(tables, rows[0], fault, written)
                return
            good: Sequence[PreparedRow] = rows
            if whole and isinstance(fault, psycopg.errors.UniqueViolation):
                violators = await self._find_violators(tables, rows)
                written.violations += [(row.id, violators[row.text]) for row in rows if row.text in violators]
                good = [row for row in rows if row.text not in violators]
            if len(good) < len(rows):
                if good:
                    await self._put(tables, good, written, quarantined=quarantined)
                return
            middle = len(rows) // 2
            await self._put(tables, rows[:middle], written, quarantined=quarantined)
            await self._put(tables, rows[middle:], written, quarantined=quarantined)
            return
        written.inserted += outcome.inserted
        written.updated += outcome.updated
        written.same += outcome.same
        written.behind += outcome.behind

    async def _put_at_once(
        self, tables: EntityTables, rows: Sequence[PreparedRow], quarantined: bool
    ) -> Written:
        connection, name = self._connection, tables.entity.name
        await self._stage(tables, rows)
        cursor = await connection.execute(tables.upsert, [name])
        inserted, updated, lost = await cursor.fetchone() or (0, None, None)
        outcome = Written(inserted=inserted, updated=len(updated or ()))
        if lost:
            cursor = await connection.execute(tables.classify, [name, lost])
            behind = {text for [text] in await cursor.fetchall()}
            outcome.behind = [row.id for row in rows if row.text in behind]
            outcome.same = len(lost) - len(behind)
            losers = set(lost)
            rows = [row for row in rows if row.text not in losers]
        if updated:
            # All of them first: links lock other records, and whoever holds a lock must not wait for child rows.
            for drop in tables.drop_children:
                await connection.execute(drop, [updated])
        for number, (copy, insert) in enumerate(
            zip(tables.copy_children, tables.insert_children, strict=True)
        ):
            blocks = [data for row in rows if (data := row.children[number])]
            if blocks:
                await self._copy(copy, blocks)
                if insert is not None:
                    await connection.execute(insert)
        if quarantined:
            await connection.execute(tables.leave_quarantine, [name])
        if tables.deferred:
            # A rule checked only at the commit would take the whole chunk with it.
            await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
        return outcome

    async def _stage(self, tables: EntityTables, rows: Sequence[PreparedRow]) -> None:
        await self._copy(tables.copy_stage, [row.parent for row in rows])

    async def _copy(self, statement: sql.Composed, blocks: Iterable[bytes]) -> None:
        async with self._connection.cursor().copy(statement) as copy:
            for part in _parts(blocks):
                await copy.write(part)

    async def _find_violators(self, tables: EntityTables, rows: Sequence[PreparedRow]) -> dict[str, str]:
        """Id text -> rule of the rows that collide on a unique key; {} when staging itself fails."""
        found: dict[str, str] = {}
        try:
            async with self._connection.transaction():
                await self._stage(tables, rows)
                for index, query in zip(tables.unique, tables.violators, strict=True):
                    cursor = await self._connection.execute(query)
                    for [text] in await cursor.fetchall():
                        found.setdefault(text, tables.rule_of(index.name))
        except _ROW_FAULTS:
            return {}
        return found

    @staticmethod
    def _set_aside(tables: EntityTables, row: PreparedRow, fault: psycopg.Error, written: Written) -> None:
        constraint = fault.diag.constraint_name or ""
        rules = (
            psycopg.errors.UniqueViolation,
            psycopg.errors.ExclusionViolation,
            psycopg.errors.ForeignKeyViolation,
        )
        if isinstance(fault, rules):
            written.violations.append((row.id, tables.rule_of(constraint)))
            return
        reason = f"PostgreSQL does not take the row: {fault.diag.message_primary or type(fault).__name__}"
        written.refused.append(
            BadDocument(row.id, row.text, row.raw, row.rev, row.digest, reason, fault.diag.column_name)
        )

    async def _quarantine(self, name: str, documents: Sequence[BadDocument]) -> None:
        if not documents:
            return
        cursor = self._connection.cursor()
        await cursor.executemany(
            "INSERT INTO crossfade.quarantine (entity, id, reason, field, rev, digest, document) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (entity, id) DO UPDATE SET "
            "reason = EXCLUDED.reason, field = EXCLUDED.field, rev = EXCLUDED.rev, digest = EXCLUDED.digest, "
            "document = EXCLUDED.document, last_seen = now()",
            [(name, d.text, d.reason, d.field, d.rev, d.digest, d.raw) for d in documents],
        )

    async def quarantine_release(self, entity: Entity, ids: Sequence[str]) -> None:
        """Take documents that are gone out of quarantine, by id text."""
        if ids:
            with translated(self.address):
                await self._connection.execute(
                    "DELETE FROM crossfade.quarantine WHERE entity = %s AND id = ANY(%s)",
                    [entity.name, list(ids)],
                )

    async def look_again(self, tables: EntityTables, first: str, last: str) -> int:
        """Remove the rows from ``first`` to ``last`` (id texts) that a tombstone covers; how many.

        To be called after the commit that may have put them there.
        """
        return await self._patiently(self._connection, lambda: self._drop_covered(tables, first, last))

    async def link(self, tables: EntityTables, first: str, last: str) -> None:
        """Set the links of the records from ``first`` to ``last`` (id texts), and those to them.

        To be called after the commit that put them there. It may go on beside everything else, over a connection of
        its own: it waits for no row that another transaction has locked.
        """
        if not tables.links:
            return
        if self._beside is None:
            with translated(self.address):
                self._beside = await _open(self._url)
        for link in tables.links:
            portion = PORTION
            while portion >= PORTION:
                portion = await self._patiently(self._beside, partial(_link, self._beside, link, first, last))

    async def drop_covered(self, tables: EntityTables) -> int:
        """Remove every row that a tombstone covers; how many.

        Who is killed behind the commit of a chunk leaves looking again to whoever goes on with its run; a run that
        began anew does not.
        """
        return await self._patiently(self._connection, lambda: self._drop_covered(tables, "", _LAST_TEXT))

    async def _drop_covered(self, tables: EntityTables, first: str, last: str) -> int:
        cursor = await self._connection.execute(tables.covered, [tables.entity.name, first, last])
        ids = [text for [text] in await cursor.fetchall()]
        if ids:
            for drop in (*tables.drop_children, tables.drop_parents):
                await self._connection.execute(drop, [ids])
        return len(ids)

    # --- rehearsing --------------------------------------------------------------------------------------

    async def keep_keys(self, keys: Sequence[tuple[str, str, str]]) -> None:
        """Note (rule, key, id text) in a temporary table, for `twins`."""
        with translated(self.address):
            await self._connection.execute(
                'CREATE TEMPORARY TABLE IF NOT EXISTS crossfade_keys (rule text, key text COLLATE "C", id text)'
            )
            async with self._connection.cursor().copy("COPY crossfade_keys FROM STDIN") as copy:
                for row in keys:
                    await copy.write_row(row)

    async def twins(self, *, limit: int) -> tuple[int, list[tuple[str, str, list[str]]]]:
        """How many noted keys occur more than once, and ``limit`` of them: (rule, key, id texts)."""
        with translated(self.address):
            cursor = await self._connection.execute(
                "SELECT rule, key, (array_agg(id ORDER BY id))[:20], count(*) OVER () FROM crossfade_keys "
                "GROUP BY rule, key HAVING count(*) > 1 ORDER BY rule, key LIMIT %s",
                [limit],
            )
            rows = await cursor.fetchall()
        return (rows[0][3] if rows else 0), [(rule, key, ids) for rule, key, ids, _ in rows]

    # --- reading back ------------------------------------------------------------------------------------

    async def epoch(self, migration: str) -> int | None:
        """The epoch of the migration's control record; None without one."""
        with translated(self.address):
            cursor = await self._connection.execute(
                "SELECT epoch FROM crossfade.control WHERE migration = %s", [migration]
            )
            row = await cursor.fetchone()
        return None if row is None else int(row[0])

    @contextlib.asynccontextmanager
    async def _snapshot(self) -> AsyncIterator[None]:
        """A record is read in one snapshot, or it can be half of two revisions."""
        with translated(self.address):
            async with self._connection.transaction():
                await self._connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
                yield

    async def read_range(
        self, tables: EntityTables, after: str, last: str, *, limit: int
    ) -> list[StoredRecord]:
        """Up to ``limit`` records whose id text is above ``after`` and not above ``last``, in order."""
        async with self._snapshot():
            return await self._records(tables, tables.select_range, [after, last, limit], in_order=True)

    async def read_revisions(
        self, tables: EntityTables, after: str, last: str, *, limit: int
    ) -> list[tuple[str, int]]:
        """Id text and revision of up to ``limit`` records, as `read_range` reads them."""
        with translated(self.address):
            cursor = self._connection.cursor(binary=True)
            await cursor.execute(tables.select_revisions, [after, last, limit])
            return await cursor.fetchall()

    async def read_ids(self, tables: EntityTables, ids: Sequence[str]) -> dict[str, StoredRecord]:
        """The records with these id texts, those that there are."""
        async with self._snapshot():
            found = await self._records(tables, tables.select_ids, [list(ids)])
        return {record.text: record for record in found}

    async def _records(
        self, tables: EntityTables, query: sql.Composed, parameters: Sequence[Any], *, in_order: bool = False
    ) -> list[StoredRecord]:
        cursor = self._connection.cursor(binary=True)
        await cursor.execute(query, parameters)
        parents = await cursor.fetchall()
        by_owner: list[dict[str, tuple[tuple[Any, ...], ...]]] = []
        for within, of in zip(tables.select_children_within, tables.select_children_of, strict=True):
            owned: dict[str, tuple[tuple[Any, ...], ...]] = {}
            if parents:
                if in_order:
                    await cursor.execute(within, [parents[0][0], parents[-1][0]])
                else:
                    await cursor.execute(of, [[row[0] for row in parents]])
                owned = {
                    owner: tuple(rows) for owner, rows in groupby(await cursor.fetchall(), itemgetter(0))
                }
            by_owner.append(owned)
        width = len(tables.entity.parent_columns)
        return [
            StoredRecord(
                row[0],
                row[:width],
                tuple([owned.get(row[0], ()) for owned in by_owner]),
                row[width],
                None if row[width + 1] is None else row[width + 1].hex,
                bytes(row[width + 2]),
                row[width + 3],
            )
            for row in parents
        ]

    async def notes(self, entity: Entity, ids: Sequence[str]) -> tuple[dict[str, bytes], dict[str, int]]:
        """Of these id texts: digests of quarantined documents, and revisions of tombstones."""
        with translated(self.address):
            cursor = await self._connection.execute(
                "SELECT id, digest FROM crossfade.quarantine WHERE entity = %s AND id = ANY(%s)",
                [entity.name, list(ids)],
            )
            quarantined = {text: bytes(digest) for text, digest in await cursor.fetchall()}
            cursor = await self._connection.execute(
                "SELECT id, rev FROM crossfade.tombstones WHERE entity = %s AND id = ANY(%s)",
                [entity.name, list(ids)],
            )
            buried = {text: int(rev) for text, rev in await cursor.fetchall()}
        return quarantined, buried

    async def deliveries_owed(self, entity: Entity, ids: Sequence[str]) -> set[str]:
        """Those of these id texts that the outbox has: MongoDB has not confirmed them."""
        with translated(self.address):
            cursor = await self._connection.execute(
                "SELECT id FROM crossfade.outbox WHERE entity = %s AND id = ANY(%s)", [entity.name, list(ids)]
            )
            return {text for (text,) in await cursor.fetchall()}

    # --- what a verify notes -------------------------------------------------------------------------------

    async def note(
        self,
        piece: Piece,
        findings: Sequence[tuple[str, str, list[str]]],
        checksums: Sequence[tuple[str, str, int, str]],
        checkpoint: Callable[[], Awaitable[None]],
    ) -> None:
        """Keep what a verify found in a piece, (id text, finding, fields), and what it saw, in one transaction with its
        checkpoint: (first, last, documents, checksum) of ``crossfade.chunks``.

        Raises:
            crossfade.stores.runs.LeaseLost: somebody else has the piece; nothing was kept.
        """
        with translated(self.address):
            async with self._connection.transaction():
                cursor = self._connection.cursor()
                await cursor.executemany(
                    "INSERT INTO crossfade.findings (run, id, finding, fields) VALUES (%s, %s, %s, %s) "
                    "ON CONFLICT (run, id) DO UPDATE SET finding = EXCLUDED.finding, fields = EXCLUDED.fields",
                    [(piece.run, *finding) for finding in findings],
                )
                await cursor.executemany(
                    "INSERT INTO crossfade.chunks (run, first, last, documents, checksum) "
                    "VALUES (%s, %s, %s, %s, %s) ON CONFLICT (run, first, last) DO UPDATE "
                    "SET documents = EXCLUDED.documents, checksum = EXCLUDED.checksum",
                    [(piece.run, *each) for each in checksums],
                )
                await checkpoint()

    async def findings(self, run: Run, *, limit: int, after: str = "") -> list[dict[str, Any]]:
        """What a verify found, by id: id text, finding and fields; ``after``: above this id text."""
        with translated(self.address):
            cursor = await self._connection.execute(
                "SELECT id, finding, fields FROM crossfade.findings WHERE run = %s AND id > %s ORDER BY id LIMIT %s",
                [run.run, after, limit],
            )
            return [
                {"id": id_, "finding": finding, "fields": fields}
                for id_, finding, fields in await cursor.fetchall()
            ]

    async def begin_repair(
        self, run: Run, entity: Entity, text: str, finding: str, action: str, by: str, before: StoredRecord | None,
        content: bytes | None,
    ) -> int:  # fmt: skip
        """Note a repair that is about to be done; its number, for `end_repair`."""
        with translated(self.address):
            cursor = await self._connection.execute(
                "INSERT INTO crossfade.repairs (run, entity, id, finding, action, done_by, rev_before, before) "
                "VALUES (%s, %s, %s, %s, %s, %s, %s, %s) RETURNING number",
                [run.run, entity.name, text, finding, action, by, before and before.rev, content],
            )
            [(number,)] = await cursor.fetchall()
        return int(number)

    async def end_repair(self, number: int, after: StoredRecord | None, content: bytes | None) -> None:
        """Note what a repair has made of the row."""
        with translated(self.address):
            await self._connection.execute(
                "UPDATE crossfade.repairs SET rev_after = %s, after = %s WHERE number = %s",
                [after and after.rev, content, number],
            )

    async def quarantine_list(self, entity: str | None, *, limit: int) -> list[dict[str, Any]]:
        """The entries of the quarantine that were seen last, without their documents."""
        with translated(self.address):
            cursor = await self._connection.execute(
                "SELECT entity, id, reason, field, rev, first_seen, last_seen, octet_length(document), "
                "CASE WHEN waived_digest = digest THEN waived_by END, "
                "CASE WHEN waived_digest = digest THEN waived_reason END "
                "FROM crossfade.quarantine WHERE %(entity)s::text IS NULL OR entity = %(entity)s "
                "ORDER BY last_seen DESC, entity, id LIMIT %(limit)s",
                {"entity": entity, "limit": limit},
            )
            names = ("entity", "id", "reason", "field", "rev", "first_seen", "last_seen", "bytes", "waived_by",
                     "waived_reason")  # fmt: skip
            return [dict(zip(names, row, strict=True)) for row in await cursor.fetchall()]

    async def quarantine_document(self, entity: str, text: str) -> tuple[str, bytes] | None:
        """Reason and document of one entry; None without one."""
        with translated(self.address):
            cursor = await self._connection.execute(
                "SELECT reason, document FROM crossfade.quarantine WHERE entity = %s AND id = %s",
                [entity, text],
            )
            row = await cursor.fetchone()
        return None if row is None else (row[0], bytes(row[1]))

    async def quarantine_waive(self, entity: str, text: str, by: str | None, reason: str | None) -> bool:
        """Note that a person accepts this document's absence; ``by`` None: take that back. False: no such entry."""
        with translated(self.address):
            cursor = await self._connection.execute(
                "UPDATE crossfade.quarantine SET waived_digest = CASE WHEN %(by)s::text IS NOT NULL THEN digest END, "
                "waived_by = %(by)s, waived_reason = %(reason)s, "
                "waived_at = CASE WHEN %(by)s::text IS NOT NULL THEN now() END "
                "WHERE entity = %(entity)s AND id = %(id)s",
                {"entity": entity, "id": text, "by": by, "reason": reason},
            )
        return cursor.rowcount == 1

    async def quarantine_after(
        self, entity: str, after: str, *, limit: int
    ) -> list[tuple[str, dict[str, Any], bytes]]:
        """Entries of an entity above this id text, by id: (id text, what is known of it, document)."""
        with translated(self.address):
            cursor = await self._connection.execute(
                "SELECT id, reason, field, rev, first_seen, last_seen, waived_digest IS NOT DISTINCT FROM digest, "
                "document FROM crossfade.quarantine WHERE entity = %s AND id > %s ORDER BY id LIMIT %s",
                [entity, after, limit],
            )
            names = ("reason", "field", "rev", "first_seen", "last_seen", "waived")
            return [
                (text, dict(zip(names, about, strict=True)), bytes(document))
                for text, *about, document in await cursor.fetchall()
            ]


def _quoted(table: Table) -> str:
    """A table's name for ``to_regclass``."""
    parts = [table.schema, table.name] if table.schema else [table.name]
    return ".".join('"' + part.replace('"', '""') + '"' for part in parts)


def _parts(blocks: Iterable[bytes], size: int = 1 << 18) -> Iterator[bytes]:
    """Header, rows and trailer in pieces of about ``size`` bytes: few calls, and no second copy of it all."""
    waiting, length = [HEADER], len(HEADER)
    for block in blocks:
        waiting.append(block)
        length += len(block)
        if length >= size:
            yield b"".join(waiting)
            waiting, length = [], 0
    waiting.append(TRAILER)
    yield b"".join(waiting)


async def _open(url: str, connect_timeout: int = CONNECT_TIMEOUT) -> AsyncConnection[Any]:
    return await AsyncConnection.connect(
        url,
        autocommit=True,
        connect_timeout=connect_timeout,
        application_name="crossfade bulk",
        # A worker that stands still must not keep the rows of its chunk for longer than its lease.
        options="-c synchronous_commit=on -c timezone=UTC -c client_min_messages=warning -c jit=off "
        f"-c idle_in_transaction_session_timeout={int(LEASE * 1000)} -c lock_timeout={int(LOCK_SECONDS * 1000)}",
    )


async def _link(connection: AsyncConnection[Any], link: sql.Composed, first: str, last: str) -> int:
    """Set a portion of the links; how many."""
    # A table that is being filled has no statistics yet, and guesses of it would read whole tables per chunk.
    await connection.execute(
        "SELECT set_config(name, 'off', true) FROM unnest(ARRAY["
        "'enable_hashjoin', 'enable_mergejoin', 'enable_seqscan']) AS name"
    )
    return (await connection.execute(link, [first, last])).rowcount


@contextlib.contextmanager
def translated(address: str) -> Iterator[None]:
    """Turn the driver's exceptions into Crossfade's."""
    try:
        yield
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn) as cause:
        raise errors.SchemaNotReady(
            f"PostgreSQL at {address}: {cause.diag.message_primary}. The schema is not at head: run the "
            "application's migrations (alembic upgrade head) and `crossfade init`"
        ) from cause
    except psycopg.Error as cause:
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise errors.StoreUnavailable(
            STORE,
            f"cannot work with PostgreSQL at {address} ({reason}). Is it running? DATABASE_URL sets the address.",
        ) from cause
