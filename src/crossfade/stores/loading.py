"""Loading an empty table: its foreign keys and further indexes are put aside, and made anew at the end.

A row that arrives under a foreign key is checked, one look-up each; an index grows leaf by leaf in random order. Both
cost more than the rows. So where nothing is in a table yet, they are put aside, with their definitions kept in
``crossfade.aside``, and made anew once the rows are there, in ways that let the application go on: indexes
CONCURRENTLY, foreign keys NOT VALID and then validated. What guards the data stays all the time: primary keys, unique
indexes, checks. Without its foreign key a link (`crossfade.stores.references`) is set without a look; at the end those
whose target never came are cleared, and those of the application's own writes that wait are set.

Whoever is killed in between leaves the definitions in the table, and the next backfill goes on.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import AsyncConnection, sql

from crossfade import errors
from crossfade.entity import Entity
from crossfade.stores.references import PORTION, Reference, links_to, references_of

#: Rows up to which a table counts as empty: the application may have begun to write to it.
NEARLY_NONE = 1_000
#: Times and seconds that a change of a table waits for others to let go of it; what comes behind waits meanwhile.
_TRIES, _LOCK_SECONDS = 30, 1.0
#: Times that links are cleared before a foreign key is validated: a delete may leave one behind in between.
_CLEARINGS = 5

#: Hears of a step before it is done: its number from 0, how many there are, what it is.
OnStep = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Aside:
    """Something that was put aside: ``definition`` makes it anew."""

    table: str
    name: str
    kind: str
    definition: str


class Loading:
    """Puts aside and restores, over one connection (`crossfade.stores.bulk_postgres.BulkPostgres.loading`)."""

    def __init__(
        self, connection: AsyncConnection[Any], translated: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._connection = connection
        self._translated = translated

    async def is_worth_it(self, entity: Entity) -> bool:
        """Whether the entity's tables are as good as empty."""
        with self._translated():
            for table in _names(entity):
                query = sql.SQL("SELECT count(*) FROM (SELECT FROM {} LIMIT {}) AS few").format(
                    sql.SQL(table), sql.Literal(NEARLY_NONE + 1)
                )
                [(rows,)] = await (await self._connection.execute(query)).fetchall()
                if rows > NEARLY_NONE:
                    return False
        return True

    async def put_aside(self, entity: Entity) -> list[Aside]:
        """Put aside what is still there of foreign keys and further indexes of the entity's tables.

        Raises:
            crossfade.errors.Busy: others would not let go of a table.
        """
        with self._translated():
            cursor = await self._connection.execute(
                "SELECT c.conrelid::regclass::text, c.conname, 'reference', pg_get_constraintdef(c.oid) "
                "FROM pg_constraint AS c WHERE c.contype = 'f' AND c.conparentid = 0 "
                "AND c.conrelid = ANY(%(tables)s::regclass[]) "
                "UNION ALL SELECT i.indrelid::regclass::text, x.relname, 'index', pg_get_indexdef(i.indexrelid) "
                "FROM pg_index AS i JOIN pg_class AS x ON x.oid = i.indexrelid "
                "WHERE i.indrelid = ANY(%(tables)s::regclass[]) AND NOT i.indisunique AND NOT i.indisexclusion "
                "AND x.relkind = 'i' "
                "AND NOT EXISTS (SELECT FROM pg_constraint AS c WHERE c.conindid = i.indexrelid) ORDER BY 3 DESC, 1, 2",
                {"tables": _names(entity)},
            )
            # One that somebody was killed at says NOT VALID by itself.
            found = [
                Aside(table, name, kind, definition.removesuffix(" NOT VALID"))
                for table, name, kind, definition in await cursor.fetchall()
            ]
        for each in found:
            drop = (
                sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}").format(
                    sql.SQL(each.table), sql.Identifier(each.name)
                )
                if each.kind == "reference"
                else sql.SQL("DROP INDEX {}").format(await self._qualified(each))
            )
            note = sql.SQL(
                "INSERT INTO crossfade.aside (entity, table_name, name, kind, definition) VALUES ({}) "
                "ON CONFLICT (table_name, name) DO UPDATE SET definition = EXCLUDED.definition"
            ).format(
                sql.SQL(", ").join(
                    map(sql.Literal, (entity.name, each.table, each.name, each.kind, each.definition))
                )
            )
            await self._patiently(f"put {each.kind} {each.name} aside", note, drop)
        return found

    async def aside(self, entity: Entity) -> list[Aside]:
        """What was put aside and is not made anew yet, in the order in which it is to be."""
        with self._translated():
            cursor = await self._connection.execute(
                "SELECT table_name, name, kind, definition FROM crossfade.aside WHERE entity = %s "
                "ORDER BY kind, table_name, name",
                [entity.name],
            )
            return [Aside(*row) for row in await cursor.fetchall()]

    async def restore(self, entity: Entity, on_step: OnStep) -> int:
        """Make anew what was put aside, and the links true; how many things.

        ``on_step`` hears before each step what is about to be done, and at the end that all are.

        Raises:
            crossfade.errors.CrossfadeError: a foreign key does not hold, with the reason; the others are there.
            crossfade.errors.Busy: others would not let go of a table; run it again.
        """
        if not await self.aside(entity):
            return 0
        async with self._alone(entity):
            try:
                with self._translated():
                    # What is done here waits for long transactions, vacuums and its like, and nobody waits behind it.
                    await self._connection.execute("SELECT set_config('lock_timeout', '0', false)")
                return await self._restore(entity, on_step)
            finally:
                if not self._connection.closed:
                    with self._translated():
                        await self._connection.execute("RESET lock_timeout")

    @asynccontextmanager
    async def _alone(self, entity: Entity) -> AsyncIterator[None]:
        """Wait until nobody else restores this entity's tables.

        By asking again and again: who waits inside a statement has a snapshot, and an index that is made CONCURRENTLY
        waits for the end of it.
        """
        key = [f"crossfade restore:{entity.name}"]
        taken = False
        try:
            while not taken:
                with self._translated():
                    cursor = await self._connection.execute(
                        "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", key
                    )
                    [(taken,)] = await cursor.fetchall()
                if not taken:
                    await asyncio.sleep(_LOCK_SECONDS)
            yield
        finally:
            if taken and not self._connection.closed:
                with self._translated():
                    await self._connection.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", key)

    async def _restore(self, entity: Entity, on_step: OnStep) -> int:
        left = await self.aside(entity)
        if not left:
            return 0  # whoever was at it has done it
        links = references_of(entity)
        with self._translated():
            # Sorting in memory what is going to be an index.
            await self._connection.execute("SELECT set_config('maintenance_work_mem', '256MB', false)")
        linked, tables = [*dict.fromkeys([*links, *links_to(entity)])], _names(entity)
        steps, numbers = len(left) + len(linked) + len(tables), itertools.count()
        for each in left:
            on_step(next(numbers), steps, f"{each.kind} {each.name}")
            if each.kind == "index":
                await self._make_index(each)
            else:
                await self._make_reference(each, next((link for link in links if _is_of(each, link)), None))
            with self._translated():
                await self._connection.execute(
                    "DELETE FROM crossfade.aside WHERE table_name = %s AND name = %s", [each.table, each.name]
                )
        with self._translated():
            for link in linked:
                on_step(next(numbers), steps, f"links {link.table.name}.{link.column}")
                portion = PORTION
                while portion >= PORTION:
                    portion = (await self._connection.execute(link.link())).rowcount
            for table in tables:
                on_step(next(numbers), steps, f"statistics of {table}")
                await self._connection.execute(sql.SQL("ANALYZE {}").format(sql.SQL(table)))
        on_step(steps, steps, "")
        return len(left)

    async def _qualified(self, each: Aside) -> sql.Composed:
        with self._translated():
            cursor = await self._connection.execute(
                "SELECT relnamespace::regnamespace::text FROM pg_class WHERE oid = %s::regclass", [each.table]
            )
            [(schema,)] = await cursor.fetchall()
        return sql.SQL("{}.{}").format(sql.SQL(schema), sql.Identifier(each.name))

    async def _make_index(self, each: Aside) -> None:
        name = await self._qualified(each)
        with self._translated():
            cursor = await self._connection.execute(
                "SELECT i.indisvalid FROM pg_index AS i WHERE i.indexrelid = to_regclass(%s)",
                [name.as_string(self._connection)],
            )
            there = await cursor.fetchone()
            if there is not None and not there[0]:
                # One that was being built when somebody was killed.
                await self._connection.execute(sql.SQL("DROP INDEX CONCURRENTLY {}").format(name))
            if there is None or not there[0]:
                definition = each.definition.replace("CREATE INDEX ", "CREATE INDEX CONCURRENTLY ", 1)
                await self._connection.execute(definition.encode())

    async def _make_reference(self, each: Aside, link: Reference | None) -> None:
        table, name = sql.SQL(each.table), sql.Identifier(each.name)
        for attempt in range(_CLEARINGS):
            if link is not None:
                await self._patiently(f"clear links for {each.name}", link.dangling())
            with self._translated():
                cursor = await self._connection.execute(
                    "SELECT FROM pg_constraint WHERE conrelid = %s::regclass AND conname = %s",
                    [each.table, each.name],
                )
                there = await cursor.fetchone() is not None
            if not there:
                await self._patiently(
                    f"restore reference {each.name}",
                    sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} {} NOT VALID").format(
                        table, name, sql.SQL(each.definition)
                    ),
                )
            try:
                with self._translated():
                    try:
                        await self._connection.execute(
                            sql.SQL("ALTER TABLE {} VALIDATE CONSTRAINT {}").format(table, name)
                        )
                    except psycopg.errors.ForeignKeyViolation as cause:
                        raise errors.CrossfadeError(
                            f"the foreign key {each.name} does not hold: {cause.diag.message_detail}. It stays NOT "
                            "VALID: mend the row it names, then run the backfill again"
                        ) from cause
            except errors.CrossfadeError:
                if link is None or attempt == _CLEARINGS - 1:
                    raise
            else:
                return

    async def _patiently(self, what: str, *statements: sql.Composed) -> None:
        """Change a table without standing in the application's way: what waits for a lock makes others wait."""
        for attempt in range(_TRIES):
            if attempt:
                await asyncio.sleep(_LOCK_SECONDS)
            with self._translated():
                try:
                    async with self._connection.transaction():
                        await self._connection.execute(
                            "SELECT set_config('lock_timeout', %s, true)", [f"{int(_LOCK_SECONDS * 1000)}ms"]
                        )
                        for statement in statements:
                            await self._connection.execute(statement)
                    return
                except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                    continue
        raise errors.Busy(
            f"cannot {what}: others hold the table for longer than {_LOCK_SECONDS:.0f} s, again and again. End long "
            "transactions and run it again, or use --keep-indexes"
        )


def _names(entity: Entity) -> list[str]:
    tables = (entity.table, *(child.table for child in entity.children))
    quoted = ['"' + name.replace('"', '""') + '"' for table in tables for name in [table.name]]
    return [
        f'"{table.schema}".{name}' if table.schema else name
        for table, name in zip(tables, quoted, strict=True)
    ]


def _is_of(each: Aside, link: Reference) -> bool:
    # As the server writes it: FOREIGN KEY (column) REFERENCES ...
    column = each.definition.partition("(")[2].partition(")")[0].strip('"')
    return each.table.rpartition(".")[2].strip('"') == link.table.name and column == link.column
