"""The words in which an entity is declared: which field goes to which column, table and unique rule.

Declarations only: they hold what was said. `crossfade.entity.Entity` checks it against the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import orjson
from sqlalchemy import BigInteger, Column, ForeignKey, Integer, LargeBinary, Table, Uuid
from sqlalchemy.dialects.postgresql import JSONB

from crossfade.columns import DocumentId
from crossfade.errors import ConfigurationError
from crossfade.part import PART_COLUMNS
from crossfade.values import Unmappable, id_to_text

META_COLUMNS: Final = ("cf_rev", "cf_op", "cf_digest", "cf_mapping")
"""Columns of a parent row that the store fills, not the mapping."""

MISSING: Final[Any] = type("Missing", (), {"__repr__": lambda _self: "<missing>"})()
"""Stands for a field that is not there, which is not null."""

MAX_KEY_LENGTH: Final = 500
"""Characters of a normalised key: at most 2,000 bytes, below PostgreSQL's 2,704 for an index entry."""

REFERENCE_TO: Final = "crossfade.reference"
"""Where a column made by `reference` notes which column it follows."""

ToColumns = Callable[[Any], "Mapping[str, Any] | None"]
FromColumns = Callable[[Mapping[str, Any]], Any]


def record_columns() -> list[Column[Any]]:
    """The columns that a parent table has besides its `id` (a `DocumentId` primary key) and the mapped ones.

    `extra` what no mapped column holds; `cf_rev` revision; `cf_op` operation id; `cf_digest` digest of the
    document; `cf_mapping` mapping version of the entity that wrote the row; `cf_shape` fields present, where
    not the usual. New Column objects on every call: SQLAlchemy ties a Column to one table.
    """
    return [
        Column("extra", JSONB),
        Column("cf_rev", BigInteger, nullable=False),
        Column("cf_op", Uuid),
        Column("cf_digest", LargeBinary, nullable=False),
        Column("cf_mapping", Integer, nullable=False),
        Column("cf_shape", JSONB),
    ]


def part_columns() -> list[Column[Any]]:
    """The columns that the table of a part has besides its owner and its values (``single_child(..., part=True)``).

    `cf_rev` revision of the image that brought the value; `cf_digest` digest of the value. Nullable: a row that was
    there before them is brought anew. New Column objects on every call: SQLAlchemy ties a Column to one table.
    """
    return [Column("cf_rev", BigInteger), Column("cf_digest", LargeBinary)]


def reference(name: str, target: str, *, of: str) -> Column[Any]:
    """A foreign key beside a column of ids, which need not name anything: NULL while what it names is not there.

    Crossfade sets it when both rows are there, in whatever order they came; the server clears it when the target
    goes. It is no part of the document: ``of`` is. Give it an index, and another one to ``of`` WHERE it is NULL.

    Args:
        name: the column's name.
        target: ``table.id`` of the entity that is referred to.
        of: the column of this table that holds the id as the document has it.
    """
    return Column(name, DocumentId, ForeignKey(target, ondelete="SET NULL"), info={REFERENCE_TO: of})


@dataclass(frozen=True, slots=True)
class FieldColumn:
    """A top-level field kept in a column of the parent table. Made by `column`."""

    field: str
    to: str
    required: bool | None
    stand_in: Callable[[Any], Any] | None
    missing: Any
    fits: Callable[[Any], bool] | None


def column(
    field: str,
    *,
    to: str | None = None,
    required: bool | None = None,
    stand_in: Callable[[Any], Any] | None = None,
    missing: Any = MISSING,
    fits: Callable[[Any], bool] | None = None,
) -> FieldColumn:
    """A top-level field of the document that has a column of its own.

    Args:
        field: the field's name in the document.
        to: the column's name; default: the same.
        required: whether the column must have a value; default: as the table says (NOT NULL). A document for
            which nothing can be put there is `Unmappable`.
        stand_in: makes a value for the column out of a BSON value that the column cannot hold; None where it
            has none. The true value is in `extra`.
        missing: what the column says while the document lacks the field (a missing role means "user"): a
            value or a function of the document. The document stays without it.
        fits: for a column with a CHECK of its own: whether it takes this column value. What does not fit
            goes to `extra`.
    """
    return FieldColumn(field, to or field, required, stand_in, missing, fits)


def ignoring_case(text: str) -> str:
    """The default normal form of a key: without blanks around it, lower case."""
    return text.strip().lower()


@dataclass(frozen=True, slots=True)
class UniqueRule:
    """A rule "unique after normalising", with its key in a column. Made by `normalised`."""

    field: str
    to: str
    rule: str
    normalise: Callable[[str], str]


def normalised(
    field: str, *, to: str, rule: str | None = None, normalise: Callable[[str], str] = ignoring_case
) -> UniqueRule:
    """A unique rule on a normal form of a string field; both stores enforce it by an index on the key.

    Args:
        field: the top-level field whose string is normalised. Where it holds no string there is no key.
        to: the column that holds the key.
        rule: the rule's name, in `_cf.keys.<rule>` and in errors; default: the field's name.
        normalise: makes the key; default: `ignoring_case`.
    """
    return UniqueRule(field, to, rule or field, normalise)


def key_of(rule: UniqueRule, value: Any) -> str | None:
    """The normalised key of a field's value; None when it is no string, for which there is no key.

    NUL becomes U+2400 (its picture), since PostgreSQL's text has no NUL, and a key of more than 500
    characters ends in a hash, since no index takes keys without limit: so both stores hold the same key.

    Raises:
        Unmappable: the rule's function failed on this value.
    """
    if not isinstance(value, str):
        return None
    try:
        key = rule.normalise(value)
    except Exception as error:
        raise Unmappable(
            f"field {rule.field!r}: the function of the rule {rule.rule!r} raised {type(error).__name__}",
            rule.field,
        ) from error
    if "\0" in key:
        key = key.replace("\0", "\u2400")
    if len(key) > MAX_KEY_LENGTH:
        shortened = blake2b(key.encode(errors="surrogatepass"), digest_size=16).hexdigest()
        key = f"{key[: MAX_KEY_LENGTH - 33]}~{shortened}"
    return key


@dataclass(frozen=True, slots=True)
class NestedIds:
    """Ids found at a path inside documents, beside them in a column to search. Made by `ids_at`."""

    path: str
    to: str

    def found_in(self, document: Mapping[str, Any]) -> bytes | None:
        """The ids at the path as a JSON array of id texts, each once; None where there are none."""
        found: dict[str, None] = {}
        for value in _values_at(document, self.path.split(".")):
            try:
                found[id_to_text(value)] = None
            except Unmappable:
                continue
        return orjson.dumps(list(found)) if found else None


def _values_at(value: Any, path: Sequence[str]) -> Iterator[Any]:
    """What MongoDB compares when it is asked for this path: it looks into each array on the way, and one deep."""
    if not path:
        yield from value if isinstance(value, list) else (value,)
        return
    for holder in value if isinstance(value, list) else (value,):
        if isinstance(holder, Mapping) and path[0] in holder:
            yield from _values_at(holder[path[0]], path[1:])


def ids_at(path: str, *, to: str) -> NestedIds:
    """Ids deep inside a document that records are searched by (``gameData.players.identityId``).

    The column is for SQL alone: the document keeps its ids where they are. ``find({path: id})`` then asks PostgreSQL
    as it asks MongoDB.

    Args:
        path: field names joined by dots, the first a top-level field; arrays on the way are looked into.
        to: a JSONB column, nullable. Give it an index: ``USING gin``.
    """
    return NestedIds(path, to)


@dataclass(frozen=True, slots=True)
class Child:
    """A top-level field kept in rows of a table of its own. Made by `list_child` and `single_child`.

    Attributes:
        field: the field's name in the document.
        table: the child table.
        columns: owner's id first, then the position if the field is a list, then the values.
        is_list: whether the field is a list, one row per element.
        split: how an element is spread over the value columns, and put together; None: one column holds it.
        is_part: whether images leave it out while PostgreSQL holds it.
    """

    field: str
    table: Table
    columns: tuple[str, ...]
    is_list: bool
    split: tuple[ToColumns, FromColumns] | None
    is_part: bool = False

    @property
    def values(self) -> tuple[str, ...]:
        """The columns after owner and position."""
        return self.columns[2:] if self.is_list else self.columns[1:]

    @property
    def stored_columns(self) -> tuple[str, ...]:
        """All columns that are written: of a part also what the store notes of it."""
        return (*self.columns, *PART_COLUMNS) if self.is_part else self.columns


def list_child(
    field: str,
    *,
    table: Table,
    owner: str,
    position: str,
    value: str | None = None,
    split: tuple[ToColumns, FromColumns] | None = None,
    columns: Sequence[str] | None = None,
) -> Child:
    """A list field with one row per element. Order, duplicates and references to nobody are kept.

    If one element does not fit, or the field is no list, the whole field goes to `extra` and there are no
    rows. An empty list has no rows either.

    Args:
        field: the field's name in the document.
        table: the child table.
        owner: its column for the document's id.
        position: its integer column for the place in the list, from 0.
        value: the column that holds an element. Either this or `split`.
        split: as in `single_child`, for each element.
        columns: the value columns of `split`; default: all others of the table.
    """
    return _child(field, table, (owner, position), value, split, columns)


def single_child(
    field: str,
    *,
    table: Table,
    owner: str,
    value: str | None = None,
    split: tuple[ToColumns, FromColumns] | None = None,
    columns: Sequence[str] | None = None,
    part: bool = False,
) -> Child:
    """A field with one row in a table of its own, and none when it is null or missing.

    Args:
        field: the field's name in the document.
        table: the child table.
        owner: its column for the document's id.
        value: the column that holds the value. Either this or `split`.
        split: two functions: from the BSON value to a dict by column, or None when the value is not of that
            form (it then goes to `extra`); and from that dict to the value. The second is called on every
            result of the first; where it gives another value the field goes to `extra`.
        columns: the value columns of `split`; default: all others of the table.
        part: a large field that must not travel with every small write (`crossfade.part`); the table has
            `part_columns()`. A value that goes to `extra` travels all the same. Declare it before phase 1: the digest
            of a record that has the field is another one afterwards, and a backfill or sweep lifts it.
    """
    return _child(field, table, (owner,), value, split, columns, part=part)


def _child(
    field: str,
    table: Table,
    head: tuple[str, ...],
    value: str | None,
    split: tuple[ToColumns, FromColumns] | None,
    columns: Sequence[str] | None,
    *,
    part: bool = False,
) -> Child:
    if (value is None) == (split is None):
        raise ConfigurationError(f"child {field!r}: give either value= (one column) or split= (several)")
    if value is not None:
        names: tuple[str, ...] = (value,)
    elif columns is not None:
        names = tuple(columns)
    else:
        ours = PART_COLUMNS if part else ()
        names = tuple(
            c.name for c in table.columns if c.name not in (*head, *ours) and REFERENCE_TO not in c.info
        )
    return Child(field, table, (*head, *names), len(head) == 2, split, part)
