"""Foreign keys between records that may arrive, and go, in any order.

A record names others by their ids: a friend list, a sender. The id is content, in a column of its own, whatever
has become of the record that it names. Beside it, declared by `crossfade.entity.reference`, is a *link*: the same
id under a foreign key, or NULL while no such row is there. So a record never waits for another one and never fails
for lack of it, what is missing is one query away, and the server itself keeps every link true: it refuses one to a
row that is not there, and clears it when that row goes (ON DELETE SET NULL).

Links are set behind the commit of the rows that they may belong to: those that the record names, and those that
name it. Of two transactions that cannot see each other, whoever looks later after its own commit sees the other's
row. Rows that somebody else has locked are skipped, so that linking waits for nobody and closes no circle of
waiting: whoever holds one either links it behind its own end, a refusal included, or takes it away. What a crash
leaves is linked when the debt is settled, and by the sweep.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from psycopg import sql
from sqlalchemy import Table

from crossfade.entity import REFERENCE_TO, Entity

#: Links that one statement sets: what it locks, others skip and deletes wait for.
PORTION = 5_000

_EVERYWHERE = sql.SQL("true")


@dataclass(frozen=True, slots=True)
class Reference:
    """A link: ``column`` of ``table`` follows ``of`` to ``target.id``."""

    table: Table
    column: str
    of: str
    target: Table

    def link(self, where: sql.Composable = _EVERYWHERE) -> sql.Composed:
        """Set the links of these rows (``c``) whose target is there, `PORTION` of them at most."""
        key = [column.name for column in self.table.primary_key.columns]
        # The target is locked against going until the foreign key is checked; first, so that whoever skips it holds
        # no row that its writer will want to link.
        # The rows are locked, with their links empty, so the update need not ask for that again: the condition would
        # offer the index of all that wait, which a plan without statistics reads from end to end, once for each row.
        return sql.SQL(
            "WITH ready AS (SELECT {keys} FROM {table} AS c JOIN {target} AS x ON x.id = c.{of} "
            "WHERE {where} AND c.{link} IS NULL "
            "LIMIT {portion} FOR KEY SHARE OF x SKIP LOCKED FOR NO KEY UPDATE OF c SKIP LOCKED) "
            "UPDATE {table} AS t SET {link} = t.{of} FROM ready WHERE {same}"
        ).format(
            keys=sql.SQL(", ").join(sql.SQL("c.") + sql.Identifier(name) for name in key),
            table=identifier(self.table),
            target=identifier(self.target),
            of=sql.Identifier(self.of),
            link=sql.Identifier(self.column),
            where=where,
            portion=PORTION,
            same=sql.SQL(" AND ").join(
                sql.SQL("t.{0} = ready.{0}").format(sql.Identifier(name)) for name in key
            ),
        )

    def dangling(self) -> sql.Composed:
        """Clear the links whose target is not there; for a time without the foreign key."""
        return sql.SQL(
            "UPDATE {table} AS c SET {link} = NULL WHERE c.{link} IS NOT NULL "
            "AND NOT EXISTS (SELECT FROM {target} AS x WHERE x.id = c.{link})"
        ).format(
            table=identifier(self.table),
            link=sql.Identifier(self.column),
            target=identifier(self.target),
        )

    def waiting(self) -> sql.Composed:
        """How many rows name a record that is not there."""
        return sql.SQL("SELECT count(*) FROM {} WHERE {} IS NULL AND {} IS NOT NULL").format(
            identifier(self.table), sql.Identifier(self.column), sql.Identifier(self.of)
        )


def identifier(table: Table) -> sql.Identifier:
    """A table's name, quoted."""
    return sql.Identifier(table.schema, table.name) if table.schema else sql.Identifier(table.name)


def references_of(entity: Entity) -> list[Reference]:
    """The links in an entity's own tables."""
    return [found for table in _tables(entity) for found in _links_in(table)]


def followers(table: Table) -> dict[str, str]:
    """The links of a table, each with the column that it follows."""
    return {found.of: found.column for found in _links_in(table)}


def linked_rows(
    table: Table,
    columns: Sequence[str],
    stage: sql.Identifier,
    where: sql.Composable = _EVERYWHERE,
    *,
    unchecked: bool = False,
) -> sql.Composed:
    """INSERT ... SELECT of the rows of a stage (``s``), with every link whose target is there already.

    ``unchecked``: with every link, while no foreign key is there; see `crossfade.stores.loading`.

    What is loaded with its link need not be written a second time. The targets are looked up by key, as many as the
    stage names: a table that is being filled has no statistics yet, and a guess could read the whole of it per chunk.
    """
    links = _links_in(table)
    ready = [
        sql.SQL(
            "{ready} AS (SELECT x.id FROM {target} AS x WHERE x.id = ANY(ARRAY(SELECT DISTINCT {of} FROM {stage})) "
            "FOR KEY SHARE SKIP LOCKED)"
        ).format(ready=_ready(n), target=identifier(link.target), of=sql.Identifier(link.of), stage=stage)
        for n, link in enumerate(links)
    ]
    ends = [_ready(n) + sql.SQL(".id") for n in range(len(links))]
    if unchecked:
        ready, ends = [], [sql.SQL("s.") + sql.Identifier(link.of) for link in links]
    joins = [
        sql.SQL(" LEFT JOIN {ready} ON {ready}.id = s.{of}").format(
            ready=_ready(n), of=sql.Identifier(link.of)
        )
        for n, link in enumerate(links if ready else ())
    ]
    return sql.SQL(
        "{with_}INSERT INTO {table} AS t ({names}) SELECT {values} FROM {stage} AS s{joins} WHERE {where}"
    ).format(
        with_=sql.SQL("WITH {} ").format(sql.SQL(", ").join(ready)) if ready else sql.SQL(""),
        table=identifier(table),
        names=sql.SQL(", ").join(map(sql.Identifier, (*columns, *(link.column for link in links)))),
        values=sql.SQL(", ").join(
            [
                *(sql.SQL("s.") + sql.Identifier(name) for name in columns),
                *ends,
            ]
        ),
        stage=stage,
        joins=sql.Composed(joins),
        where=where,
    )


def _ready(n: int) -> sql.Identifier:
    return sql.Identifier(f"ready_{n}")


def link_some(entity: Entity) -> list[sql.Composed]:
    """Statements that set the links that records may have made possible, of either end, given an array of their ids."""
    return _link_around(entity, sql.SQL("c.{} = ANY(%s)"))


def link_range(entity: Entity) -> list[sql.Composed]:
    """The same for the records from an id to another."""
    return _link_around(entity, sql.SQL("c.{0} >= %s AND c.{0} <= %s"))


def _link_around(entity: Entity, where: sql.SQL) -> list[sql.Composed]:
    owners = _owners(entity)
    own = [
        found.link(where.format(sql.Identifier(owners[found.table.name]))) for found in references_of(entity)
    ]
    return own + [found.link(where.format(sql.Identifier(found.of))) for found in links_to(entity)]


def lock_around(entity: Entity) -> list[sql.Composed]:
    """Statements that lock what the delete of records touches in tables of links, given their ids twice.

    Of two records that name each other, deleted at once, each delete would otherwise remove its own rows and then wait
    to clear the links in the other's.
    """
    owners = _owners(entity)
    return [
        sql.SQL("SELECT FROM {} AS c WHERE c.{} = ANY(%s) OR c.{} = ANY(%s) ORDER BY {} FOR UPDATE").format(
            identifier(found.table),
            sql.Identifier(found.column),
            sql.Identifier(owners.get(found.table.name, found.column)),
            sql.SQL(", ").join(sql.Identifier(column.name) for column in found.table.primary_key.columns),
        )
        for found in links_to(entity)
    ]


def _owners(entity: Entity) -> dict[str, str]:
    """The column that holds the record's id, by table."""
    return {entity.table.name: "id"} | {child.table.name: child.columns[0] for child in entity.children}


def links_to(entity: Entity) -> list[Reference]:
    """The links, in any entity's tables, to an entity's records."""
    tables = entity.table.metadata.sorted_tables
    return [found for table in tables for found in _links_in(table) if found.target is entity.table]


def _tables(entity: Entity) -> Iterable[Table]:
    return entity.table, *(child.table for child in entity.children)


def _links_in(table: Table) -> list[Reference]:
    found = []
    for column in table.columns:
        of: Any = column.info.get(REFERENCE_TO)
        if of is not None:
            [key] = column.foreign_keys
            found.append(Reference(table, column.name, of, key.column.table))
    return found
