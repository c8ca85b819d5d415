"""The statements on one entity's own tables, composed once from its declaration.

A record is a parent row and child rows. The guard of an upsert is the revision: a row is replaced only by a
newer image, or by the same content under a newer mapping. Child rows are replaced by a statement of its own,
after the parent's, whose snapshot is taken once the parent row is locked: a statement that did both would not
see the child rows of the transaction that it had to wait for. It also says what stands there then, so that an
image takes two statements: each costs a caller more than what it does. One is enough where there is nothing to
replace: see `RowStatements.apply_upon`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psycopg import sql
from psycopg.abc import AdaptContext
from psycopg.adapt import Dumper
from psycopg.pq import Format
from sqlalchemy import ARRAY, Column, Table
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Dialect

from crossfade.entity import DocumentId, Entity, Rows
from crossfade.errors import ConfigurationError
from crossfade.part import PART_COLUMNS, Part, digest_with
from crossfade.record import Held, Image
from crossfade.stores.references import followers, identifier, link_some, lock_around

_new_dialect: Callable[[], Dialect] = postgresql.dialect
_DIALECT = _new_dialect()
_META = ("cf_rev", "cf_op", "cf_digest", "cf_mapping")

#: At this epoch, and with no tombstone over it, an image may be put.
_MAY = sql.SQL(
    "EXISTS (SELECT FROM crossfade.control WHERE migration = %s AND epoch = %s) "
    "AND NOT EXISTS (SELECT FROM crossfade.tombstones WHERE entity = %s AND id = %s AND rev >= %s)"
)
#: A statement with its parameters, in order.
Statement = tuple[bytes, Sequence[Any]]


def rendered(query: sql.Composable) -> bytes:
    """A statement in the form that is sent: putting it together again for every record takes longer than sending it."""
    return query.as_bytes(None)


def _type(column: Column[Any]) -> sql.SQL:
    name = "text" if isinstance(column.type, DocumentId) else column.type.compile(dialect=_DIALECT)
    return sql.SQL(name)  # from the entity's own table, not from input


def _cte(what: str, child: Any) -> sql.Identifier:
    return sql.Identifier(f"{what}_{child.table.name}")


def _read_of(child: Any, *, small: bool) -> tuple[str, ...]:
    """The columns of a child that are read: its owner's id is known."""
    return PART_COLUMNS if small and child.is_part else child.stored_columns[1:]


def _is_json(column: Column[Any]) -> bool:
    return column.type.compile(dialect=_DIALECT) in ("JSONB", "JSON")


def _names(columns: Iterable[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, columns))


def assignments(table: Table, columns: Iterable[str], alias: str) -> sql.Composed:
    """The SET of an upsert; a link whose id changes, and that comes without one, is none until it is looked for."""
    links = followers(table)
    parts = []
    for name in columns:
        parts.append(sql.SQL("{0} = EXCLUDED.{0}").format(sql.Identifier(name)))
        if name in links:
            parts.append(
                sql.SQL(
                    "{link} = COALESCE(EXCLUDED.{link}, CASE WHEN {alias}.{of} = EXCLUDED.{of} THEN {alias}.{link} END)"
                ).format(
                    link=sql.Identifier(links[name]), of=sql.Identifier(name), alias=sql.Identifier(alias)
                )
            )
    return sql.SQL(", ").join(parts)


@dataclass(frozen=True, slots=True)
class _ChildStatements:
    columns: tuple[str, ...]
    key: tuple[str, ...]
    json: tuple[bool, ...]
    drop_others: sql.Composed
    put: sql.Composed
    action: sql.Composable
    drop_all: bytes
    drop_covered: bytes
    drop_now: bytes
    part: str | None


class NoRows:
    """A column of no rows: an array that is empty, whatever its type."""


NO_ROWS = NoRows()


class NoRowsDumper(Dumper):
    """`NoRows` as a parameter. Most records have no children, and a list takes psycopg ten calls, each column anew."""

    #: What is asked for; and, of an array without a type, what PostgreSQL cannot be given: it gets text.
    format = Format.BINARY

    def __init__(self, cls: type, context: AdaptContext | None = None) -> None:
        super().__init__(cls, context)
        self.format = Format.TEXT

    def dump(self, obj: NoRows) -> bytes:  # noqa: ARG002 - as psycopg calls it
        """An empty array, as text."""
        return b"{}"


class RowStatements:
    """Statements for one entity; see the module's docstring for why there are several per image."""

    def __init__(self, entity: Entity) -> None:
        self.entity = entity
        table = entity.table
        self.table = identifier(table)
        self.columns = (*entity.parent_columns, *_META)
        self._json = tuple(_is_json(table.c[name]) for name in self.columns)
        self._children = tuple(self._child(child) for child in entity.children)

        values = sql.SQL(", ").join(sql.SQL("%s::") + _type(table.c[name]) for name in self.columns)
        updated = [name for name in self.columns if name != "id"]
        assigned = assignments(table, updated, "t")
        self._apply = rendered(
            sql.SQL(
                "INSERT INTO {table} AS t ({columns}) SELECT {values} WHERE {may} "
                "ON CONFLICT (id) DO UPDATE SET {assigned} "
                "WHERE t.cf_rev < EXCLUDED.cf_rev OR (t.cf_rev = EXCLUDED.cf_rev "
                "AND t.cf_digest = EXCLUDED.cf_digest AND t.cf_mapping < EXCLUDED.cf_mapping)"
            ).format(
                table=self.table, columns=_names(self.columns), values=values, may=_MAY, assigned=assigned
            )
        )
        self._insert = rendered(
            sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(self.table, _names(self.columns), values)
        )
        # A link whose id changes is none until it is looked for.
        self._followed = tuple(self.columns.index(of) for of in followers(table))
        links = [
            sql.SQL(", {link} = CASE WHEN {of} = %s THEN {link} END").format(
                link=sql.Identifier(link), of=sql.Identifier(of)
            )
            for of, link in followers(table).items()
        ]
        self._update = rendered(
            sql.SQL("UPDATE {} SET ({}) = ROW({}){} WHERE id = %s AND cf_rev = %s").format(
                self.table,
                _names(updated),
                sql.SQL(", ").join(sql.SQL("%s::") + _type(table.c[name]) for name in updated),
                sql.Composed(links),
            )
        )
        self._compose_many(values=self._arrays(table, self.columns), assigned=assigned)
        self._links = [rendered(query) for query in link_some(entity)]
        #: The fields whose values links follow.
        self.references = frozenset(
            [column.field for column in entity.columns if column.to in followers(table)]
            + [child.field for child in entity.children if followers(child.table)]
        )
        self._around = [rendered(query) for query in lock_around(entity)]
        held = sql.SQL(
            "SELECT r.cf_rev, r.cf_op, r.cf_digest, r.cf_mapping, "
            "(SELECT rev FROM crossfade.tombstones WHERE entity = %s AND id = %s), "
            "EXISTS (SELECT FROM crossfade.control WHERE migration = %s AND epoch = %s) "
            "FROM (SELECT) AS one LEFT JOIN {} AS r ON r.id = %s"
        ).format(self.table)
        self._held, self._held_of = rendered(held), held
        self._held_each = rendered(
            sql.SQL(
                "SELECT r.cf_rev, r.cf_op, r.cf_digest, r.cf_mapping, "
                "(SELECT rev FROM crossfade.tombstones AS d WHERE d.entity = %s AND d.id = i.id), "
                "EXISTS (SELECT FROM crossfade.control WHERE migration = %s AND epoch = %s) "
                "FROM unnest(%s::text[]) WITH ORDINALITY AS i (id, place) LEFT JOIN {} AS r ON r.id = i.id "
                "ORDER BY i.place"
            ).format(self.table)
        )
        self._followed_sets = sql.Composed(links)
        self._compose_upon(values, updated)
        self._replacing: dict[frozenset[str], bytes] = {}
        self._applying_small: dict[frozenset[str], bytes] = {}
        self._covered = rendered(
            sql.SQL(
                "SELECT p.id FROM crossfade.tombstones AS t JOIN {} AS p ON p.id = t.id "
                "WHERE t.entity = %s AND t.id = ANY(%s) AND t.rev >= p.cf_rev"
            ).format(self.table)
        )
        self._drop = rendered(sql.SQL("DELETE FROM {} WHERE id = %s AND cf_rev <= %s").format(self.table))
        self._drop_now = rendered(sql.SQL("DELETE FROM {} WHERE id = %s AND cf_rev = %s").format(self.table))
        self._drop_covered = rendered(
            sql.SQL(
                "DELETE FROM {} AS p USING crossfade.tombstones AS t "
                "WHERE p.id = ANY(%s) AND t.entity = %s AND t.id = p.id AND t.rev >= p.cf_rev"
            ).format(self.table)
        )
        self._reading: dict[tuple[bool, tuple[str, ...]], bytes] = {}
        self._selects: dict[bool, tuple[bytes, bytes]] = {}

    def select(self, behind: sql.Composable, *, small: bool = False) -> bytes:
        """What reads images, with the condition on the parent row ``p``, and what else comes ``behind``; ``small``:
        without the values of parts.
        """
        if small not in self._selects:
            before, after = self._select(small=small)
            self._selects[small] = rendered(before), rendered(after)
        before_it, after_it = self._selects[small]
        return before_it + rendered(behind) + after_it

    def _select(self, *, small: bool) -> tuple[sql.Composed, sql.Composed]:
        """What stands before the condition, and behind it: one look at each child table, for what was found."""
        children = [
            sql.SQL(
                " LEFT JOIN LATERAL (SELECT {arrays} FROM (SELECT {names} FROM {table} AS c WHERE c.{owner} = q.id "
                "ORDER BY {key}) AS c) AS {alias} ON true"
            ).format(
                arrays=sql.SQL(", ").join(
                    sql.SQL("array_agg(c.{})").format(sql.Identifier(name)) for name in columns
                ),
                names=_names(columns),
                table=identifier(child.table),
                owner=sql.Identifier(child.columns[0]),
                key=_names(statements.key),
                alias=_cte("of", child),
            )
            for child, statements in zip(self.entity.children, self._children, strict=True)
            for columns in [_read_of(child, small=small)]
        ]
        own = sql.SQL(", ").join(sql.SQL("p.") + sql.Identifier(name) for name in self.columns)
        parent = sql.SQL("SELECT {} FROM {} AS p").format(own, self.table)
        return sql.SQL("SELECT * FROM ({}").format(parent), sql.SQL(") AS q{}").format(sql.Composed(children))

    def _replace_children(self, left_out: frozenset[str]) -> bytes:
        if left_out not in self._replacing:
            replacing = [
                sql.SQL("{} AS ({}), {} AS ({})").format(
                    _cte("gone", child), statements.drop_others, _cte("put", child), statements.put
                )
                for child, statements in zip(self.entity.children, self._children, strict=True)
                if child.field not in left_out
            ]
            held = self._held_of
            self._replacing[left_out] = rendered(
                sql.SQL("WITH {} {}").format(sql.SQL(", ").join(replacing), held) if replacing else held
            )
        return self._replacing[left_out]

    def _apply_small(self, left_out: frozenset[str]) -> bytes:
        """An image without parts replaces only a row that holds just these, and under the present mapping."""
        if left_out not in self._applying_small:
            table = self.entity.table
            updated = [name for name in self.columns if name != "id"]
            held = [
                sql.SQL(
                    "AND EXISTS (SELECT FROM {} AS c WHERE c.{} = t.id AND c.cf_rev = %s AND c.cf_digest = %s)"
                ).format(identifier(child.table), sql.Identifier(child.columns[0]))
                for child in self.entity.children
                if child.field in left_out
            ]
            self._applying_small[left_out] = rendered(
                sql.SQL(
                    "UPDATE {table} AS t SET ({columns}) = ROW({values}){links} "
                    "WHERE id = %s AND cf_rev < %s AND cf_mapping = %s "
                    "AND EXISTS (SELECT FROM crossfade.control WHERE migration = %s AND epoch = %s) "
                    "AND NOT EXISTS (SELECT FROM crossfade.tombstones AS d "
                    "WHERE d.entity = %s AND d.id = t.id AND d.rev >= %s) {held}"
                ).format(
                    table=self.table,
                    columns=_names(updated),
                    values=sql.SQL(", ").join(sql.SQL("%s::") + _type(table.c[name]) for name in updated),
                    links=self._followed_sets,
                    held=sql.SQL(" ").join(held),
                )
            )
        return self._applying_small[left_out]

    def _compose_upon(self, values: sql.Composed, updated: Sequence[str]) -> None:
        """See `apply_upon`; what stands there is null where nothing was put."""
        around = sql.SQL(
            "WITH put AS ({} RETURNING cf_rev, cf_op, cf_digest, cf_mapping) SELECT put.*, "
            "(SELECT rev FROM crossfade.tombstones WHERE entity = %s AND id = %s), "
            "EXISTS (SELECT FROM crossfade.control WHERE migration = %s AND epoch = %s) "
            "FROM (SELECT) AS one LEFT JOIN put ON true"
        )
        first = sql.SQL("INSERT INTO {} ({}) SELECT {} WHERE {} ON CONFLICT (id) DO NOTHING").format(
            self.table, _names(self.columns), values, _MAY
        )
        table = self.entity.table
        upon = sql.SQL(
            "UPDATE {} SET ({}) = ROW({}){} WHERE id = %s AND cf_rev = %s AND cf_op IS NOT DISTINCT FROM %s::uuid "
            "AND cf_digest = %s AND cf_mapping = %s AND {}"
        ).format(
            self.table,
            _names(updated),
            sql.SQL(", ").join(sql.SQL("%s::") + _type(table.c[name]) for name in updated),
            self._followed_sets,
            _MAY,
        )
        self._first, self._upon = rendered(around.format(first)), rendered(around.format(upon))

    @staticmethod
    def _arrays(table: Table, columns: Iterable[str]) -> sql.Composed:
        # Binary: the text form of an array is put together element by element, with regular expressions.
        return sql.SQL(", ").join(sql.SQL("%b::") + _type(table.c[c]) + sql.SQL("[]") for c in columns)

    def _compose_many(self, *, values: sql.Composed, assigned: sql.Composed) -> None:
        """The same for many records of one entity; see `apply_many`."""
        #: A column that holds arrays itself cannot be given as an array of them.
        self.has_many = not any(isinstance(self.entity.table.c[name].type, ARRAY) for name in self.columns)
        self._apply_many = rendered(
            sql.SQL(
                "INSERT INTO {table} AS t ({columns}) SELECT u.* FROM unnest({values}) AS u ({columns}) "
                "WHERE EXISTS (SELECT FROM crossfade.control WHERE migration = %s AND epoch = %s) "
                "AND NOT EXISTS (SELECT FROM crossfade.tombstones AS d "
                "WHERE d.entity = %s AND d.id = u.id AND d.rev >= u.cf_rev) "
                "ON CONFLICT (id) DO UPDATE SET {assigned} "
                "WHERE t.cf_rev < EXCLUDED.cf_rev OR (t.cf_rev = EXCLUDED.cf_rev "
                "AND t.cf_digest = EXCLUDED.cf_digest AND t.cf_mapping < EXCLUDED.cf_mapping)"
            ).format(table=self.table, columns=_names(self.columns), values=values, assigned=assigned)
        )
        ours = sql.SQL(
            "images AS (SELECT * FROM unnest(%b::text[], %b::bigint[], %b::uuid[], %b::bytea[]) WITH ORDINALITY "
            "AS i (id, rev, op, digest, place)), ours AS (SELECT p.id FROM images AS i JOIN {} AS p ON p.id = i.id "
            "AND p.cf_rev = i.rev AND p.cf_op IS NOT DISTINCT FROM i.op AND p.cf_digest = i.digest)"
        ).format(self.table)
        replacing: list[sql.Composable] = [sql.SQL("")]
        for child, statements in zip(self.entity.children, self._children, strict=True):
            replacing.append(
                sql.SQL(
                    "{gone} AS (DELETE FROM {name} AS c USING ours WHERE c.{owner} = ours.id AND NOT EXISTS "
                    "(SELECT FROM unnest({keys}) AS k ({key}) WHERE ({mine}) = ({theirs})) RETURNING 1), "
                    "{put} AS (INSERT INTO {name} AS t ({columns}) SELECT u.* FROM unnest({arrays}) AS u ({columns}) "
                    "JOIN ours ON ours.id = u.{owner} WHERE (SELECT count(*) FROM {gone}) >= 0 "
                    "ON CONFLICT ({key}) DO {action})"
                ).format(
                    gone=_cte("gone", child),
                    put=_cte("put", child),
                    name=identifier(child.table),
                    owner=sql.Identifier(child.columns[0]),
                    keys=self._arrays(child.table, statements.key),
                    arrays=self._arrays(child.table, child.stored_columns),
                    columns=_names(child.stored_columns),
                    key=_names(statements.key),
                    mine=sql.SQL(", ").join(sql.SQL("k.") + sql.Identifier(c) for c in statements.key),
                    theirs=sql.SQL(", ").join(sql.SQL("c.") + sql.Identifier(c) for c in statements.key),
                    action=statements.action,
                )
            )
        self._replace_many = rendered(
            sql.SQL(
                "WITH {ours}{replacing} SELECT r.cf_rev, r.cf_op, r.cf_digest, r.cf_mapping, "
                "(SELECT rev FROM crossfade.tombstones AS d WHERE d.entity = %s AND d.id = i.id), "
                "EXISTS (SELECT FROM crossfade.control WHERE migration = %s AND epoch = %s) "
                "FROM images AS i LEFT JOIN {table} AS r ON r.id = i.id ORDER BY i.place"
            ).format(ours=ours, replacing=sql.SQL(", ").join(replacing), table=self.table)
        )

    def reading(self, where: str, *columns: str, small: bool = False) -> bytes:
        """The statement that reads images: `select`, and what comes behind it, with ``columns`` for its braces."""
        key = (small, (where, *columns))
        if key not in self._reading:
            condition = sql.SQL(where).format(*map(sql.Identifier, columns))
            self._reading[key] = self.select(condition, small=small)
        return self._reading[key]

    def _child(self, child: Any) -> _ChildStatements:
        table: Table = child.table
        columns: tuple[str, ...] = child.stored_columns
        key = tuple(column.name for column in table.primary_key.columns)
        if not key or key[0] != columns[0]:
            raise ConfigurationError(
                f"entity {self.entity.name!r}: the primary key of {table.name} must begin with {columns[0]}"
            )
        owner = sql.Identifier(columns[0])
        name = identifier(table)
        rest = [column for column in columns if column not in key]
        arrays = self._arrays(table, columns)
        #: The parent row as this image left it: only then are its child rows ours to write.
        ours = sql.SQL(
            "p.id = %s AND p.cf_rev = %s AND p.cf_op IS NOT DISTINCT FROM %s::uuid AND p.cf_digest = %s"
        )
        action = sql.SQL("UPDATE SET ") + assignments(table, rest, "t") if rest else sql.SQL("NOTHING")
        put = sql.SQL(
            "INSERT INTO {name} AS t ({columns}) SELECT u.* FROM unnest({arrays}) AS u, {parent} AS p "
            "WHERE {ours} {after} ON CONFLICT ({key}) DO {action}"
        ).format(
            name=name,
            columns=_names(columns),
            arrays=arrays,
            parent=self.table,
            ours=ours,
            # Reads what the deletion gives back, so that values are free before they are taken.
            after=sql.SQL("AND (SELECT count(*) FROM {}) >= 0").format(_cte("gone", child)),
            key=_names(key),
            action=action,
        )
        key_arrays = self._arrays(table, key)
        drop_others = sql.SQL(
            "DELETE FROM {name} AS c USING {parent} AS p WHERE c.{owner} = p.id AND {ours} AND NOT EXISTS "
            "(SELECT FROM unnest({keys}) AS k ({key}) WHERE ({mine}) = ({theirs})) RETURNING 1"
        ).format(
            name=name,
            parent=self.table,
            owner=owner,
            ours=ours,
            keys=key_arrays,
            key=_names(key),
            mine=sql.SQL(", ").join(sql.SQL("k.") + sql.Identifier(c) for c in key),
            theirs=sql.SQL(", ").join(sql.SQL("c.") + sql.Identifier(c) for c in key),
        )
        drop = "DELETE FROM {} AS c USING {} AS p WHERE c.{} = p.id AND p.id = %s AND p.cf_rev "
        drop_covered = (
            "DELETE FROM {} AS c USING {} AS p, crossfade.tombstones AS t WHERE c.{} = p.id AND p.id = ANY(%s) "
            "AND t.entity = %s AND t.id = p.id AND t.rev >= p.cf_rev"
        )
        around = (name, self.table, owner)
        return _ChildStatements(
            columns,
            key,
            tuple(_is_json(table.c[c]) for c in columns),
            drop_others,
            put,
            action,
            rendered(sql.SQL(drop + "<= %s").format(*around)),
            rendered(sql.SQL(drop_covered).format(*around)),
            rendered(sql.SQL(drop + "= %s").format(*around)),
            child.field if child.is_part else None,
        )

    def _parent_values(self, image: Image, rows: Rows) -> list[Any]:
        values = (*rows.parent, image.rev, image.op, image.digest, self.entity.mapping_version)
        return [
            value.decode() if json and isinstance(value, bytes) else value
            for value, json in zip(values, self._json, strict=True)
        ]

    def apply(self, image: Image, rows: Rows, *, migration: str, epoch: int) -> Statement:
        """Put an image where it is newer than what is there, and where no tombstone covers it; its parent row.

        One without parts: where the row holds them.
        """
        parent = self._parent_values(image, rows)
        if left_out := image.left_out:
            followed = [parent[at] for at in self._followed]
            held = [
                value
                for child in self._children
                if child.part in left_out
                for value in (image.parts[child.part].rev, image.parts[child.part].digest)
            ]
            return self._apply_small(left_out), [
                *parent[1:], *followed, rows.parent[0], image.rev, self.entity.mapping_version,
                migration, epoch, self.entity.name, image.rev, *held,
            ]  # fmt: skip
        return self._apply, [*parent, migration, epoch, self.entity.name, rows.parent[0], image.rev]

    def replace_children(
        self, image: Image, rows: Rows, *, migration: str = "", epoch: int = -1
    ) -> Statement:
        """Give the parent row, where this image is the one that stands there, its child rows; then `held_of`."""
        guard = [rows.parent[0], image.rev, image.op, image.digest]
        parameters: list[Any] = []
        left_out = image.left_out
        for child, child_rows in zip(self._children, rows.children, strict=True):
            if child.part is None or child.part not in left_out:
                noted = _noted(child, image, child_rows)
                parameters += [*guard, *self._child_arrays(child, noted), *guard]
        _, look = self.held_of(rows.parent[0], migration=migration, epoch=epoch)
        return self._replace_children(left_out), [*parameters, *look]

    def apply_upon(
        self, image: Image, rows: Rows, before: Image | None, *, migration: str, epoch: int
    ) -> Statement | None:
        """`apply` of an image whose child rows stand there already, and what stands there then, as of `held_of`.

        It is put upon the row of ``before``, whose children it has; or, ``before`` of None, where there is no row. Else
        nothing is put, and the revision is null. None: it has children that nobody has put yet.
        """
        if before is None:
            if any(rows.children):
                return None
            own = self._parent_values(image, rows)
        else:
            parent = self._parent_values(image, rows)
            followed = [parent[at] for at in self._followed]
            own = [
                *parent[1:], *followed, rows.parent[0], before.rev, before.op, before.digest,
                self.entity.mapping_version,
            ]  # fmt: skip
        name, key = self.entity.name, rows.parent[0]
        may = [migration, epoch, name, key, image.rev]
        return self._first if before is None else self._upon, [*own, *may, name, key, migration, epoch]

    def apply_many(
        self, images: Sequence[tuple[Image, Rows]], *, migration: str, epoch: int
    ) -> tuple[Statement, Statement]:
        """`apply` and `replace_children` of many records, no id twice and none without a part, in one statement each.

        The second gives a row as of `held_of` for each of them, in their order.
        """
        parents = [self._parent_values(image, rows) for image, rows in images]
        columns: list[Any] = [list(column) for column in zip(*parents, strict=True)]
        put = (self._apply_many, [*columns, migration, epoch, self.entity.name])
        guard: list[list[Any]] = [
            [rows.parent[0] for _, rows in images],
            [image.rev for image, _ in images],
            [image.op for image, _ in images],
            [image.digest for image, _ in images],
        ]
        parameters: list[Any] = [*guard]
        for number, child in enumerate(self._children):
            every = [row for image, rows in images for row in _noted(child, image, rows.children[number])]
            parameters += self._child_arrays(child, every)
        return put, (self._replace_many, [*parameters, self.entity.name, migration, epoch])

    @staticmethod
    def _child_arrays(child: _ChildStatements, rows: Sequence[Sequence[Any]]) -> list[Any]:
        """Child rows by column: those of the key, then all."""
        if not rows:
            return [NO_ROWS] * (len(child.key) + len(child.columns))
        arrays = [
            [row[i].decode() if json and isinstance(row[i], bytes) else row[i] for row in rows]
            for i, json in enumerate(child.json)
        ]
        return [*(arrays[child.columns.index(name)] for name in child.key), *arrays]

    def insert(self, image: Image, rows: Rows) -> list[Statement]:
        """A new record; PostgreSQL primary only."""
        return [(self._insert, self._parent_values(image, rows)), self.replace_children(image, rows)]

    def update(self, image: Image, rows: Rows, *, rev: int) -> list[Statement]:
        """Replace the record that stands at ``rev``; PostgreSQL primary only."""
        parent = self._parent_values(image, rows)
        id_, *values = parent
        followed = [parent[at] for at in self._followed]
        return [
            (self._update, [*values, *followed, id_, rev]),
            self.replace_children(image, rows),
        ]

    def drop(self, id_: str, rev: int) -> list[Statement]:
        """Remove the rows of a record at or under a revision."""
        drops = [*((c.drop_all, [id_, rev]) for c in self._children), (self._drop, [id_, rev])]
        return [*self._lock_around([id_]), *drops]

    def drop_exactly(self, id_: str, rev: int) -> list[Statement]:
        """Remove the rows of a record at exactly this revision."""
        drops = [*((c.drop_now, [id_, rev]) for c in self._children), (self._drop_now, [id_, rev])]
        return [*self._lock_around([id_]), *drops]

    def drop_covered(self, ids: Sequence[str]) -> list[Statement]:
        """Remove the rows of records that a tombstone covers."""
        of = [list(ids), self.entity.name]
        return [
            *self._lock_around(ids),
            *((child.drop_covered, of) for child in self._children),
            (self._drop_covered, of),
        ]

    def _lock_around(self, ids: Sequence[str]) -> list[Statement]:
        return [(query, [list(ids), list(ids)]) for query in self._around]

    def covered(self, ids: Sequence[str]) -> Statement:
        """Which of these records a tombstone covers: asked after one's own commit, when there is hardly ever one."""
        return self._covered, [self.entity.name, list(ids)]

    def link(self, ids: Sequence[str]) -> list[Statement]:
        """Set the links of records, and those to them, a portion of them: run after one's own commit."""
        return [(query, [list(ids)]) for query in self._links]

    def held_of(self, id_: str, *, migration: str, epoch: int) -> Statement:
        """What PostgreSQL holds of a record, and whether it is at this epoch."""
        return self._held, [self.entity.name, id_, migration, epoch, id_]

    def held_of_each(self, ids: Sequence[str], *, migration: str, epoch: int) -> Statement:
        """`held_of` of several, in their order."""
        return self._held_each, [self.entity.name, migration, epoch, list(ids)]

    def image(self, row: Sequence[Any], *, small: bool = False) -> Image:
        """The image that a row of `select` stands for."""
        entity = self.entity
        parent = row[: len(entity.parent_columns)]
        rev, op, stored, _mapping = row[len(parent) : len(self.columns)]
        at = len(self.columns)
        children: list[tuple[tuple[Any, ...], ...]] = []
        noted: dict[str, tuple[int | None, bytes | None]] = {}
        for child in entity.children:
            read = row[at : at + len(_read_of(child, small=small))]
            at += len(read)
            rows: list[tuple[Any, ...]] = [] if read[0] is None else list(zip(*read, strict=True))
            if child.is_part:
                for one in rows:
                    noted[child.field] = one[-2:]
                rows = [] if small else [one[:-2] for one in rows]
            children.append(tuple((parent[0], *one) for one in rows))
        document = entity.from_rows(parent, children)
        keys = {rule.rule: parent[entity.parent_columns.index(rule.to)] for rule in entity.unique}
        parts, unknown = _parts_of_row(document, noted, left_out=small)
        if small:
            document.update(parts)
        return Image(
            id=document["_id"],
            document=document,
            rev=rev,
            op=None if op is None else op.hex,
            keys={name: key for name, key in keys.items() if key is not None},
            digest=bytes(stored) if stored is not None else digest_with(document, parts),
            parts=parts,
            noted=parts,
            unknown=unknown,
        )


def _noted(child: _ChildStatements, image: Image, rows: Sequence[Sequence[Any]]) -> Sequence[Sequence[Any]]:
    """Child rows with what is noted of a part beside its values."""
    if child.part is None or not rows:
        return rows
    part = image.parts[child.part]
    return [(*row, part.rev, part.digest) for row in rows]


def _parts_of_row(
    document: Mapping[str, Any], noted: Mapping[str, tuple[int | None, bytes | None]], *, left_out: bool
) -> tuple[dict[str, Part], bool]:
    """The parts of which a row notes a state; and whether one was left out that it notes nothing of."""
    parts = {}
    for at, name in enumerate(field for field in document if field != "_id"):
        rev, own = noted.get(name, (None, None))
        if rev is not None and own is not None:
            parts[name] = Part(rev, bytes(own), at)
    return parts, left_out and len(parts) < len(noted)


def held(row: Sequence[Any]) -> tuple[Held, bool]:
    """What a row of `RowStatements.held_of` says; the bool: PostgreSQL is at that epoch."""
    rev, op, stored, mapping, tombstone, fenced_in = row
    return (
        Held(
            rev, None if op is None else op.hex, None if stored is None else bytes(stored), mapping, tombstone
        ),
        bool(fenced_in),
    )
