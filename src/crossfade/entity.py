"""An entity: how one kind of record is laid out in PostgreSQL, declared once and used both ways.

The promise: document -> rows -> document gives back an equal document (types, values, order of fields, at
every level), or `Unmappable` says why not. It holds by one rule, *the column is for SQL, `extra` is the
truth*:

- A field whose value its column holds exactly is in the column, and nowhere else.
- Any other value of a mapped field is kept whole in `extra` under the field's name, which overrides the
  column on the way back. The column then holds something useful (the same number in another width, what a
  `stand_in` makes of the value) or NULL.
- Fields that are not mapped are in `extra`, in their order.
- `cf_shape` is NULL when the document has every mapped field, in the declared order, and then the unmapped
  ones. Otherwise it lists the names of the fields that are there, in order; that is also how a missing field
  is told from null.

Each entity compiles two functions when it is declared, one per direction, from the expressions in
columns.py. The compiled way to rows takes only what it knows for certain: documents of a shape seen before
whose values fit their columns. It hands everything else to the *careful* way, which decides field by field
and then checks that the rows give the document back. So an oddity costs time, never fidelity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bson.dbref import DBRef
from bson.decimal128 import Decimal128
from sqlalchemy import Enum, String, Table
from sqlalchemy.dialects.postgresql import JSONB

from crossfade.columns import (
    EXPRESSION_NAMES,
    SUPPORTED,
    ColumnKind,
    DocumentId,
    dump_checked,
    kind_of,
)
from crossfade.compiled import call, compile_function, exact_value, split_rows, value_of, value_rows
from crossfade.errors import ConfigurationError
from crossfade.fields import (
    META_COLUMNS,
    MISSING,
    REFERENCE_TO,
    Child,
    FieldColumn,
    NestedIds,
    UniqueRule,
    column,
    ids_at,
    ignoring_case,
    key_of,
    list_child,
    normalised,
    part_columns,
    record_columns,
    reference,
    single_child,
)
from crossfade.part import Part
from crossfade.values import (
    BOOKKEEPING,
    Document,
    Unmappable,
    decode_document,
    dump_json,
    encode_document,
    id_to_text,
    load_json,
)

__all__ = [
    "META_COLUMNS",
    "MISSING",
    "REFERENCE_TO",
    "Child",
    "DocumentId",
    "Entity",
    "FieldColumn",
    "NestedIds",
    "Rows",
    "UniqueRule",
    "column",
    "ids_at",
    "ignoring_case",
    "list_child",
    "normalised",
    "part_columns",
    "record_columns",
    "reference",
    "single_child",
]

MAX_SHAPES: Final = 1024
"""Shapes remembered per entity. A collection has a handful; the bound is for documents with keys at
random."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows that stand for one document, as values that psycopg writes to the columns' types.

    Attributes:
        parent: values in the order of `Entity.parent_columns`. JSONB values are JSON text in bytes, ids are
            id text, dates are aware and in UTC.
        children: for each of `Entity.children`, its rows; values in the order of `Child.columns`, the
            owner's id included, list positions counted from 0.
    """

    parent: tuple[Any, ...]
    children: tuple[tuple[tuple[Any, ...], ...], ...]


# -- the entity ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Mapped:
    """A field's column with what the table says about it."""

    field: str
    to: str
    kind: ColumnKind
    required: bool
    stand_in: Callable[[Any], Any] | None
    missing: Any
    fits: Callable[[Any], bool] | None
    exact: Callable[[Any], Any]


class Entity:
    """A kind of record with its mapping between a collection and tables. Immutable, safe to share.

    Attributes:
        name: the entity's name.
        collection: name of the MongoDB collection.
        table: the parent table.
        columns: the fields with a column, as declared.
        children: the child tables, as declared.
        unique: the unique rules, as declared.
        nested_ids: the ids inside documents that have a column to be searched by, as declared.
        mapping_version: goes up whenever the same document would give other rows; a row of an older one is
            written again even when its digest is equal.
        parent_columns: columns of `Rows.parent`: id, mapped columns, key columns, columns of nested ids, extra,
            cf_shape.
        order: the usual order of the mapped fields in a document.
        parts: the fields that are parts (`crossfade.part`).
    """

    def __init__(
        self,
        name: str,
        *,
        collection: str,
        table: Table,
        columns: Sequence[FieldColumn],
        children: Sequence[Child] = (),
        unique: Sequence[UniqueRule] = (),
        nested_ids: Sequence[NestedIds] = (),
        order: Sequence[str] | None = None,
        mapping_version: int = 1,
    ) -> None:
        """Declare an entity.

        Args:
            name: the entity's name.
            collection: name of the MongoDB collection.
            table: the parent table: `id` (a `DocumentId`, primary key), the mapped columns,
                `record_columns()`.
            columns: the fields that have a column.
            children: the fields that have a table.
            unique: the rules "unique after normalising".
            nested_ids: ids inside documents that records are searched by.
            order: the usual order of the mapped fields, children included, without `_id`; documents that
                follow it need no `cf_shape`. Default: columns, then children, as declared.
            mapping_version: see the class.

        Raises:
            ConfigurationError: the declaration and the tables do not fit; the message says what to change.
        """
        self.name = name
        self.collection = collection
        self.table = table
        self.columns = tuple(columns)
        self.children = tuple(children)
        self.unique = tuple(unique)
        self.nested_ids = tuple(nested_ids)
        self.mapping_version = mapping_version
        self.parts = tuple(child.field for child in children if child.is_part)
        fields = [c.field for c in columns] + [c.field for c in children]
        self.order = tuple(fields if order is None else order)
        self.parent_columns = (
            "id",
            *(c.to for c in columns),
            *(rule.to for rule in unique),
            *(ids.to for ids in nested_ids),
            "extra",
            "cf_shape",
        )
        self._check_table(columns)
        self._check_fields(fields)
        self._check_nested_ids()
        self._mapped = tuple(self._bind(c) for c in columns)
        self._keys = tuple((rule, *self._bind_key(rule)) for rule in unique)
        self._child_rows = tuple(self._bind_child(child) for child in self.children)
        self._field_set = frozenset(fields)
        self._shapes: dict[tuple[str, ...], tuple[bytes | None, tuple[str, ...]]] = {}
        self._compiled_to_rows = self._compile_to_rows()
        self._compiled_from_rows = self._compile_from_rows()

    def __repr__(self) -> str:
        return f"Entity({self.name!r}, collection={self.collection!r}, table={self.table.name!r})"

    def to_rows(self, document: Mapping[str, Any], keys: Mapping[str, str] | None = None) -> Rows:
        """The rows that stand for a document. Of a part that was left out of it there are none.

        Args:
            document: the document with its `_id`; a `_cf` in it is left out.
            keys: normalised keys by rule that replace the computed ones (a name that collides is given a key
                of its own).

        Raises:
            Unmappable: the document cannot be carried to these tables and back unchanged.
        """
        if any(isinstance(document.get(name), Part) for name in self.parts):
            document = {n: None if isinstance(value, Part) else value for n, value in document.items()}
        try:
            rows = self._compiled_to_rows(document, keys)
        except Unmappable:
            # Perhaps only a value that MongoDB would store in another form; the careful way knows, and says
            # where.
            rows = None
        return self._to_rows_carefully(document, keys) if rows is None else rows

    def from_rows(self, parent: Sequence[Any], children: Sequence[Sequence[Sequence[Any]]]) -> Document:
        """The document that rows stand for, `_id` first, without `_cf`.

        Args:
            parent: values in the order of `parent_columns`; JSONB as text (bytes or str), dates aware, read
                in a session whose time zone is UTC (another would move year 1 or 9999 out of Python's range).
            children: for each of `self.children` its rows, in any order, columns as in `Child.columns`.

        Raises:
            ValueError: the rows were not made by `to_rows`.
        """
        try:
            return self._compiled_from_rows(parent, children)
        except (LookupError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"a row of {self.table.name} does not fit the mapping of {self.name}: {error!r}"
            ) from None

    def keys(self, document: Mapping[str, Any]) -> dict[str, str]:
        """Normalised keys of a document by rule; a rule whose field holds no string is left out.

        Raises:
            Unmappable: a rule's function failed on this document's value.
        """
        keys: dict[str, str] = {}
        for rule in self.unique:
            key = key_of(rule, document.get(rule.field))
            if key is not None:
                keys[rule.rule] = key
        return keys

    def column_value(self, field: str, value: Any) -> Any:
        """What the column of a mapped field holds where the field has this value; None: nothing.

        Raises:
            Unmappable: the column must have a value, and there is none for this one.
        """
        return self._column_value(self._mapped_field(field), {field: value})[0]

    def sought(self, field: str, value: Any) -> Any:
        """The value by which the column of a mapped field finds the rows whose field equals ``value``.

        `MISSING` where the column holds no such value: the field is in `extra` then. A number is found in any width.
        """
        mapped = self._mapped_field(field)
        exact = mapped.exact(value)
        if exact is not MISSING or isinstance(value, bool | str):
            return exact
        nearest = mapped.kind.nearest(value) if isinstance(value, int | float | Decimal128) else None
        return nearest if nearest is not None and self._takes(mapped, nearest) else MISSING

    def _mapped_field(self, field: str) -> _Mapped:
        return next(mapped for mapped in self._mapped if mapped.field == field)

    def keeps_apart(self, name: str, value: Any) -> bool:
        """Whether this value of a part has a row of its own, and need not travel: it is not null, and it fits.

        Raises:
            Unmappable: the part's split function failed on this value.
        """
        for child, make in zip(self.children, self._child_rows, strict=True):
            if child.field == name:
                return child.is_part and value is not None and make("", value) is not None
        return False

    # -- checks of the declaration -----------------------------------------------------------------

    def _refuse(self, problem: str, fix: str) -> ConfigurationError:
        return ConfigurationError(f"entity {self.name!r}: {problem}; {fix}")

    def _check_table(self, columns: Sequence[FieldColumn]) -> None:
        table, known = self.table, self.table.columns
        absent = [c for c in ("extra", *META_COLUMNS, "cf_shape") if c not in known]
        if absent:
            raise self._refuse(
                f"table {table.name} lacks {', '.join(absent)}", "add *record_columns() to the table"
            )
        if "id" not in known or not isinstance(known["id"].type, DocumentId):
            raise self._refuse(
                f"table {table.name} has no id column of the type DocumentId",
                'add Column("id", DocumentId, primary_key=True)',
            )
        reserved = {"id", "extra", "cf_shape", *META_COLUMNS}
        holders: dict[str, str] = {}
        declared = [
            *((c.field, c.to) for c in columns),
            *((f"{rule.field} (rule {rule.rule})", rule.to) for rule in self.unique),
            *((ids.path, ids.to) for ids in self.nested_ids),
        ]
        for field, to in declared:
            if to in reserved:
                raise self._refuse(
                    f"field {field!r} goes to {to}, which Crossfade keeps for itself", "give another to="
                )
            if to not in known:
                raise self._refuse(
                    f"field {field!r} goes to {table.name}.{to}, which does not exist",
                    f"add the column, or name one of {', '.join(sorted({*known.keys()} - reserved))} in to=",
                )
            if to in holders:
                raise self._refuse(
                    f"fields {holders[to]!r} and {field!r} both go to {table.name}.{to}",
                    "give one another to=",
                )
            if known[to].computed is not None:
                raise self._refuse(
                    f"field {field!r} goes to {table.name}.{to}, which the database computes",
                    "map it elsewhere",
                )
            holders[to] = field
        self._check_unfilled(table, {*holders, "id", *reserved})
        for each in (table, *(child.table for child in self.children)):
            self._check_references(each)

    def _check_references(self, table: Table) -> None:
        for c in table.columns:
            followed = c.info.get(REFERENCE_TO)
            if followed is not None and followed not in table.columns:
                raise self._refuse(
                    f"{table.name}.{c.name} refers to what {followed} names, which does not exist",
                    "name a column of the same table in of=",
                )

    def _check_unfilled(self, table: Table, filled: Iterable[str]) -> None:
        for c in table.columns:
            unfilled = (
                not c.nullable and c.server_default is None and c.identity is None and c.computed is None
            )
            if unfilled and c.name not in filled and c.autoincrement is not True:
                raise self._refuse(
                    f"no field goes to {table.name}.{c.name}, which is NOT NULL without a default",
                    "map a field to it, give it a server_default, or make it nullable",
                )

    def _check_fields(self, fields: Sequence[str]) -> None:
        for field in fields:
            if field in ("_id", BOOKKEEPING):
                raise self._refuse(f"field {field!r} is mapped by hand", "leave it out, Crossfade keeps it")
            if fields.count(field) > 1:
                raise self._refuse(f"field {field!r} is mapped twice", "leave one of the two out")
        if sorted(self.order) != sorted(fields):
            odd = sorted(set(self.order) ^ set(fields)) or sorted(self.order)
            raise self._refuse(
                f"order= and the mapped fields differ in {', '.join(odd)}", "list each mapped field once"
            )
        for rule in self.unique:
            if rule.field in self.parts:
                raise self._refuse(
                    f"rule {rule.rule!r} is on the part {rule.field!r}, which images leave out",
                    "leave part= out",
                )
        rules = [rule.rule for rule in self.unique]
        if len(set(rules)) != len(rules):
            raise self._refuse("two unique rules have one name", "give each its own rule=")

    def _check_nested_ids(self) -> None:
        for ids in self.nested_ids:
            to = self.table.columns[ids.to]
            if not isinstance(to.type, JSONB) or not to.nullable:
                raise self._refuse(
                    f"the ids at {ids.path!r} go to {self.table.name}.{ids.to}, which cannot hold a list of them",
                    "make it a nullable JSONB column",
                )
            if not all(ids.path.split(".")) or ids.path.split(".")[0] in ("_id", BOOKKEEPING):
                raise self._refuse(f"{ids.path!r} is no path of a field", "join the names of fields by dots")

    def _kind(self, what: str, table: Table, name: str) -> ColumnKind:
        if name not in table.columns:
            raise self._refuse(f"{what} goes to {table.name}.{name}, which does not exist", "add the column")
        kind = kind_of(table.columns[name])
        if kind is None:
            raise self._refuse(
                f"{what} goes to {table.name}.{name} of the type {table.columns[name].type!r}, "
                "which cannot give BSON values back",
                f"use one of {SUPPORTED}",
            )
        return kind

    def _bind(self, declared: FieldColumn) -> _Mapped:
        what = f"field {declared.field!r}"
        kind = self._kind(what, self.table, declared.to)
        not_null = not self.table.columns[declared.to].nullable
        if not_null and declared.required is False:
            raise self._refuse(
                f"{what} has required=False, but {self.table.name}.{declared.to} is NOT NULL",
                "make the column nullable, or leave required out",
            )
        required = not_null if declared.required is None else declared.required
        missing = declared.missing
        if missing is not MISSING and not callable(missing):
            takes = (missing is None and not required) or (
                kind.storable(missing) and (declared.fits is None or declared.fits(missing))
            )
            if not takes:
                raise self._refuse(
                    f"{what} has missing={missing!r}, which {self.table.name}.{declared.to} cannot hold",
                    "give a value of the column's type",
                )
        return _Mapped(
            declared.field,
            declared.to,
            kind,
            required,
            declared.stand_in,
            missing,
            declared.fits,
            exact_value(kind, declared.fits),
        )

    def _bind_key(self, rule: UniqueRule) -> tuple[ColumnKind, bool]:
        kind = self._kind(f"rule {rule.rule!r}", self.table, rule.to)
        sql_type = self.table.columns[rule.to].type
        if not isinstance(sql_type, String) or isinstance(sql_type, Enum):
            raise self._refuse(
                f"rule {rule.rule!r} goes to {self.table.name}.{rule.to}, which is no text",
                "use a Text column",
            )
        return kind, not self.table.columns[rule.to].nullable

    def _bind_child(self, child: Child) -> Callable[[str, Any], Any]:
        what = f"child {child.field!r}"
        kinds = [self._kind(what, child.table, name) for name in child.columns]
        if not isinstance(child.table.columns[child.columns[0]].type, DocumentId):
            raise self._refuse(
                f"{what} has the owner column {child.columns[0]} of another type", "make it a DocumentId"
            )
        absent = [name for name in child.stored_columns if name not in child.table.columns]
        if absent:
            raise self._refuse(
                f"{what} is a part, and table {child.table.name} lacks {', '.join(absent)}",
                "add *part_columns() to the table",
            )
        self._check_unfilled(child.table, child.stored_columns)
        nullable = [child.table.columns[name].nullable is not False for name in child.values]
        if child.split is None:
            return value_rows(child, kinds[-1], nullable[0])
        return split_rows(child, kinds[-len(child.values) :], nullable)

    # -- to rows, the compiled way -----------------------------------------------------------------

    def _compile_to_rows(self) -> Callable[[Any, Any], Rows | None]:
        """Write the function that converts plain documents, and gives None for any other.

        Generated because the alternative, a loop over fields with a call for each, takes twice as long, and a
        backfill spends most of its time here.
        """
        names: dict[str, Any] = {
            **EXPRESSION_NAMES, "M": MISSING, "Rows": Rows, "shapes": self._shapes, "id_": id_to_text,
        }  # fmt: skip
        lines = [
            "def to_rows(d, given):",
            "    known = shapes.get(tuple(d))",
            "    if known is None: return None",
            "    shape, unmapped = known",
            '    i = d["_id"]',
            "    i = i.binary.hex() if type(i) is ObjectId else id_(i)",
        ]
        parent = ["i"]
        for n, mapped in enumerate(self._mapped):
            v = f"c{n}"
            test = mapped.kind.accepts.replace("@", v)
            if mapped.kind.accepts.startswith("@ is not None"):
                test = f"{v} is not M and {test}"
            store = mapped.kind.store.replace("@", v)
            if mapped.fits is not None:
                names[f"fits{n}"] = mapped.fits
                test += f" and fits{n}({store})"
            lines += [f"    {v} = d.get({mapped.field!r}, M)", f"    if {test}:", f"        {v} = {store}"]
            if not mapped.required:
                lines += [f"    elif {v} is None: pass"]
            if mapped.missing is not MISSING and not callable(mapped.missing):
                names[f"missing{n}"] = mapped.missing
                lines += [f"    elif {v} is M: {v} = missing{n}"]
            elif mapped.missing is MISSING and not mapped.required:
                lines += [f"    elif {v} is M: {v} = None"]
            lines += ["    else: return None"]
            parent.append(v)
        for n, (rule, kind, required) in enumerate(self._keys):
            names[f"key{n}"], names[f"rule{n}"] = key_of, rule
            lines += [
                f"    k{n} = given.get({rule.rule!r}) if given else None",
                f"    if k{n} is None: k{n} = key{n}(rule{n}, d.get({rule.field!r}))",
                f"    if k{n} is None:",
                "        return None" if required else "        pass",
                f"    elif not ({kind.accepts.replace('@', f'k{n}')}): return None",
            ]
            parent.append(f"k{n}")
        for n, ids in enumerate(self.nested_ids):
            names[f"found{n}"] = ids.found_in
            parent.append(f"found{n}(d)")
        rows = []
        for n, (child, make) in enumerate(zip(self.children, self._child_rows, strict=True)):
            names[f"rows{n}"] = make
            lines += [
                f"    r{n} = d.get({child.field!r}, M)",
                f"    if r{n} is M{'' if child.is_list else f' or r{n} is None'}: r{n} = ()",
                "    else:",
                f"        r{n} = rows{n}(i, r{n})",
                f"        if r{n} is None: return None",
            ]
            rows.append(f"r{n}")
        lines += [
            "    x = dump_checked({name: d[name] for name in unmapped}) if unmapped else None",
            f"    return Rows(({', '.join([*parent, 'x', 'shape'])}), ({''.join(f'{r}, ' for r in rows)}))",
        ]
        compiled: Callable[[Any, Any], Rows | None] = compile_function(lines, names, "to_rows", self.name)
        return compiled

    def _compile_from_rows(self) -> Callable[[Any, Any], Document]:
        """Write the function that puts a document together from rows."""
        names: dict[str, Any] = {**EXPRESSION_NAMES, "finish": self._finish}
        values: dict[str, str] = {}
        parent = ["i"]
        for n, mapped in enumerate(self._mapped):
            load = mapped.kind.load.replace("@", f"c{n}")
            values[mapped.field] = load if load == f"c{n}" else f"(None if c{n} is None else {load})"
            parent.append(f"c{n}")
        parent += [f"_k{n}" for n in range(len(self._keys) + len(self.nested_ids))]
        for n, child in enumerate(self.children):
            kinds = [kind_of(child.table.columns[name]) for name in child.values]
            names[f"value{n}"] = value_of(child, [kind for kind in kinds if kind is not None])
            values[child.field] = f"value{n}(r{n})"
        rows = "".join(f"r{n}, " for n in range(len(self.children)))
        fields = ", ".join(f"{field!r}: {values[field]}" for field in self.order)
        lines = [
            "def from_rows(parent, children):",
            f"    ({', '.join([*parent, 'x', 's'])}) = parent",
            *([f"    ({rows}) = children"] if rows else []),
            f'    d = {{"_id": text_to_id(i), {fields}}}',
            "    return d if x is None and s is None else finish(d, x, s)",
        ]
        compiled: Callable[[Any, Any], Document] = compile_function(lines, names, "from_rows", self.name)
        return compiled

    @staticmethod
    def _finish(document: Document, extra: Any, shape: Any) -> Document:
        """Lay `extra` over the columns (a field that is there keeps its place), then keep what the shape
        lists."""
        if extra is not None:
            rest = load_json(extra)
            # At the top of a document $ref and $id are fields like any other.
            document.update(rest.as_doc() if isinstance(rest, DBRef) else rest)
        if shape is None:
            return document
        return {"_id": document["_id"], **{name: document[name] for name in load_json(shape)}}

    # -- to rows, the careful way ------------------------------------------------------------------

    def _to_rows_carefully(self, document: Mapping[str, Any], keys: Mapping[str, str] | None) -> Rows:
        canonical = encode_document(document)
        plain = decode_document(canonical)
        if "_id" not in plain:
            raise Unmappable("the document has no _id", "_id")
        owner = id_to_text(plain["_id"])
        extra: Document = {}
        parent: list[Any] = [owner]
        for mapped in self._mapped:
            value, exact = self._column_value(mapped, plain)
            if not exact:
                extra[mapped.field] = plain[mapped.field]
            parent.append(value)
        for rule, kind, required in self._keys:
            parent.append(self._key_value(rule, kind, required, plain, keys))
        parent.extend(ids.found_in(plain) for ids in self.nested_ids)
        rows = []
        for child, make in zip(self.children, self._child_rows, strict=True):
            value = plain.get(child.field, MISSING)
            made = () if value is MISSING or (value is None and not child.is_list) else make(owner, value)
            if made is None:
                extra[child.field] = value
            rows.append(made or ())
        names = [name for name in plain if name != "_id"]
        unmapped = tuple(name for name in names if name not in self._field_set)
        extra.update((name, plain[name]) for name in unmapped)
        shape = None if names == [*self.order, *unmapped] else dump_json(names)
        result = Rows((*parent, dump_checked(extra) if extra else None, shape), tuple(rows))
        try:
            back = encode_document(self.from_rows(result.parent, result.children))
        except ValueError:
            back = b""
        if back != canonical:
            raise Unmappable("the document cannot be carried back unchanged")
        self._remember(document, shape, unmapped)
        return result

    def _remember(self, document: Mapping[str, Any], shape: bytes | None, unmapped: tuple[str, ...]) -> None:
        """Let the compiled way take documents with these fields from now on; a first one came back equal."""
        names = tuple(document)
        # 2,048: a shape of ordinary field names; documents keyed by data must not fill the memory.
        if sum(map(len, names)) > 2048:
            return
        if len(self._shapes) >= MAX_SHAPES:
            self._shapes.clear()
        self._shapes[names] = (shape, unmapped)

    def _column_value(self, mapped: _Mapped, document: Document) -> tuple[Any, bool]:
        """What goes to the column, and whether it says it all (the field need not go to `extra`)."""
        value = document.get(mapped.field, MISSING)
        if value is MISSING:
            return self._value_for_missing(mapped, document), True
        exact = mapped.exact(value)
        if exact is not MISSING:
            return exact, True
        if value is None and not mapped.required:
            return None, True
        where = f"field {mapped.field!r}"
        useful = None
        if mapped.stand_in is not None:
            useful = call(mapped.stand_in, value, f"{where}: its stand_in function")
        if useful is None and value is not None:
            useful = mapped.kind.nearest(value)
        if useful is not None and self._takes(mapped, useful):
            return useful, False
        if mapped.required:
            raise Unmappable(
                f"{where} holds {_described(value)}, which the column {self.table.name}.{mapped.to} "
                "cannot hold, and that column must have a value",
                mapped.field,
            )
        return None, False

    def _value_for_missing(self, mapped: _Mapped, document: Document) -> Any:
        value = mapped.missing
        if callable(value):
            value = call(value, document, f"field {mapped.field!r}: its missing function")
        elif value is MISSING:
            value = None
        if value is None and not mapped.required:
            return None
        if value is None or not self._takes(mapped, value):
            raise Unmappable(
                f"field {mapped.field!r} is missing, and the column {self.table.name}.{mapped.to} "
                "must have a value",
                mapped.field,
            )
        return value

    @staticmethod
    def _takes(mapped: _Mapped, value: Any) -> bool:
        return mapped.kind.storable(value) and (mapped.fits is None or mapped.fits(value))

    def _key_value(
        self,
        rule: UniqueRule,
        kind: ColumnKind,
        required: bool,
        document: Document,
        given: Mapping[str, str] | None,
    ) -> str | None:
        key = given.get(rule.rule) if given else None
        if key is None:
            key = key_of(rule, document.get(rule.field))
        if key is not None and kind.storable(key):
            return key
        if key is None and not required:
            return None
        problem = (
            "gives no key" if key is None else f"gives a key that {self.table.name}.{rule.to} cannot hold"
        )
        raise Unmappable(f"field {rule.field!r} {problem} for the unique rule {rule.rule!r}", rule.field)


def _described(value: Any) -> str:
    """A value in words, without the value: it may be a secret."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "text with NUL" if "\0" in value else f"text of {len(value)} characters"
    return f"a value of the type {type(value).__name__}"
