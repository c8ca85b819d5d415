"""One question in two languages: a filter for MongoDB, a clause for PostgreSQL, with the same answer.

What they differ in, and what is done about it:

- A column holds only what fits it; any other value is in ``extra``, and the column is NULL or holds a stand-in. So
  null is asked as "NULL, and not in ``extra``", and a value that its column cannot hold is looked for in ``extra``.
- A field declared with a `missing` value has it in the column; the filter says "or does not exist".
- MongoDB compares values of one type only (``$lt`` of a date finds no text, and no null), but sorts all types together.
  So whatever comes behind a place in an order is asked for by type, too.
- PostgreSQL sorts text by the database's rules unless told: it is told to go by bytes, as MongoDB does. A column that
  ignores letter case (CITEXT) is taken for the text that it holds; an index that serves it is on the column as text.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

import orjson
from bson import Binary, DatetimeMS, Decimal128, ObjectId, Timestamp
from psycopg import sql
from sqlalchemy import Column, Enum, String
from sqlalchemy.dialects.postgresql import CITEXT, JSONB

from crossfade.entity import MISSING, DocumentId, Entity, FieldColumn, NestedIds
from crossfade.errors import ConfigurationError
from crossfade.query import AnyOf, Contains, IsSet, Order, Query
from crossfade.stores.references import identifier
from crossfade.values import Unmappable, can_be_id, dump_json, id_texts, id_to_text

Filter = dict[str, Any]
#: A clause with its parameters, in order.
Clause = tuple[sql.Composable, list[Any]]

_EVERYTHING: Clause = (sql.SQL("true"), [])
_NOTHING: Clause = (sql.SQL("false"), [])

#: MongoDB's order of types, those that a field can be ordered by: ``$type`` names, and Python's types.
_BRACKETS: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("null", (type(None),)),
    ("number", (int, float, Decimal128)),
    ("string", (str,)),
    ("object", (Mapping,)),
    ("array", (list,)),
    ("binData", (bytes, Binary)),
    ("objectId", (ObjectId,)),
    ("bool", (bool,)),
    ("date", (datetime, DatetimeMS)),
    ("timestamp", (Timestamp,)),
    ("regex", ()),
)


def _values(condition: Any) -> tuple[Any, ...]:
    return condition.values if isinstance(condition, AnyOf) else (condition,)


def _declared(entity: Entity, field: str) -> FieldColumn | None:
    return next((column for column in entity.columns if column.field == field), None)


# --- MongoDB ---------------------------------------------------------------------------------------------


def as_filter(entity: Entity, where: Sequence[Mapping[str, Any]]) -> Filter:
    """The filter for these alternatives."""
    found = [
        {"$and": [_filter(entity, key, condition) for key, condition in each.items()]} if each else {}
        for each in where
    ]
    if {} in found:
        return {}
    # No alternative at all: nothing. An empty $in matches nothing; an empty $or is refused.
    return {"$or": found} if found else {"_id": {"$in": []}}


def _filter(entity: Entity, key: str, condition: Any) -> Filter:
    declared = _declared(entity, key)
    values = () if isinstance(condition, Contains | IsSet) else _values(condition)
    single = declared is not None and not isinstance(entity.table.c[declared.to].type, JSONB)
    lists = tuple(value for value in values if isinstance(value, list))
    if single and 0 < len(lists) < len(values):
        others = AnyOf(tuple(value for value in values if not isinstance(value, list)))
        return {"$or": [_filter(entity, key, AnyOf(lists)), _filter(entity, key, others)]}
    # To a filter a list is each of its elements, too; to a column of single values it is something else.
    itself: Filter = {"$not": {"$type": "array"}} if single and not lists else {}
    if isinstance(condition, Contains):
        if "\0" in condition.text:
            return {"_id": {"$in": []}}  # neither store can be asked for it
        return {key: {"$regex": re.escape(condition.text), **itself}}
    if isinstance(condition, IsSet):
        return {"$or": [{key: {"$ne": None}}, {key: {"$type": "array"}}]} if single else {key: {"$ne": None}}
    stands_for_missing = MISSING if declared is None else declared.missing
    if stands_for_missing is MISSING:
        return {key: {**({"$in": list(values)} if len(values) != 1 else {"$eq": values[0]}), **itself}}
    ways: list[Filter] = [{key: {"$in": [value for value in values if value is not None], **itself}}]
    if None in values:
        ways.append({key: {"$type": "null", **itself}})
    if stands_for_missing in values:
        ways.append({key: {"$exists": False}})
    return {"$or": ways}


def as_sort(order: Order) -> list[tuple[str, int]]:
    """The sort of MongoDB for an order."""
    direction = -1 if order.descending else 1
    return (
        [(order.field, direction)] if order.field == "_id" else [(order.field, direction), ("_id", direction)]
    )


def as_filter_behind(query: Query) -> Filter:
    """What comes behind ``query.after``, in the query's order.

    A list is sorted by the least of its elements, or by the greatest where the order descends, and an empty one before
    null; but a condition looks at each of its elements. So of lists only those are asked for that have no element on
    this side of the place.
    """
    if query.after is None:
        return {}
    value, id_ = query.after
    field, descending = query.order.field, query.order.descending
    among_equals = [{"_id": beyond} for beyond in _beyond(id_, descending=descending)]
    if field == "_id":
        return {"$or": among_equals}
    an_empty_list: Filter = {field: {"$size": 0}}
    if value == []:
        behind = [] if descending else [{"$nor": [an_empty_list]}]
        return {"$or": [*behind, {**an_empty_list, "$or": among_equals}]}
    if isinstance(value, list):
        value = (max if descending else min)(value, key=_rank)
    before = _among_elements(field, _beyond(value, descending=not descending))
    not_behind = _among_elements(field, _beyond(value, descending=not descending, or_equal=True))
    ways: list[Filter] = [
        {field: {"$eq": value}, "$or": among_equals, **({"$nor": before} if before else {})}
    ]
    if descending:
        ways.append(an_empty_list)
    else:
        not_behind.append(an_empty_list)
    beyond = [{field: condition} for condition in _beyond(value, descending=descending)]
    if beyond:
        ways.append({"$or": beyond, "$nor": not_behind})
    return {"$or": ways}


def _among_elements(field: str, conditions: Sequence[Filter]) -> list[Filter]:
    return [{field: {"$elemMatch": condition}} for condition in conditions]


def _beyond(value: Any, *, descending: bool, or_equal: bool = False) -> list[Filter]:
    """Conditions, any of them: greater (or less) than ``value`` within its type, or of a type that sorts so."""
    own = _bracket(value)
    names = [name for name, _ in _BRACKETS]
    others = names[1:own] if descending else names[own + 1 :]
    ways: list[Filter] = []
    if _is_nan(value):
        # The least of all numbers to an order, and beside them to a comparison.
        if not descending:
            ways.append({"$gte": -math.inf})
        if or_equal:
            ways.append({"$eq": math.nan})
    elif value is not None:
        ways.append({("$lt" if descending else "$gt") + ("e" if or_equal else ""): value})
        if descending and names[own] == "number":
            ways.append({"$eq": math.nan})
    if others:
        ways.append({"$type": others})
    if (descending and value is not None) or (or_equal and value is None):
        ways.append({"$eq": None})
    return ways


def _is_nan(value: Any) -> bool:
    if isinstance(value, Decimal128):
        return value.to_decimal().is_nan()
    return isinstance(value, float) and math.isnan(value)


def _bracket(value: Any) -> int:
    if isinstance(value, bool):
        return [name for name, _ in _BRACKETS].index("bool")
    for place, (_, types) in enumerate(_BRACKETS):
        if isinstance(value, types):
            return place
    raise ConfigurationError(f"a page cannot begin behind a value of type {type(value).__name__}")


def _rank(value: Any) -> tuple[int, Any]:
    """By what MongoDB sorts a value that is in a list."""
    within: Any = value
    match value:
        case None:
            within = ()
        case bool():
            pass
        case int() | float() | Decimal128():
            number = value.to_decimal() if isinstance(value, Decimal128) else Decimal(value)
            within = (not number.is_nan(), Decimal() if number.is_nan() else number)
        case str():
            within = value.encode()
        case Mapping():
            within = [(_bracket(each), name.encode(), _rank(each)) for name, each in value.items()]
        case list():
            within = [_rank(each) for each in value]
        case bytes():
            within = (len(value), getattr(value, "subtype", 0), bytes(value))
        case DatetimeMS():
            within = int(value)
        case datetime():
            within = int(DatetimeMS(value))
    return _bracket(value), within


# --- PostgreSQL ------------------------------------------------------------------------------------------


def as_clause(entity: Entity, where: Sequence[Mapping[str, Any]]) -> Clause | None:
    """The clause for these alternatives on the parent table ``p``; None: a key has no column that can be asked."""
    ways: list[Clause] = []
    for each in where:
        parts = [_clause(entity, key, condition) for key, condition in each.items()]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        ways.append(_joined(" AND ", known) if known else _EVERYTHING)
    return _joined(" OR ", ways) if ways else _NOTHING


def _joined(word: str, clauses: Sequence[Clause]) -> Clause:
    if len(clauses) == 1:
        return clauses[0]
    text = sql.SQL(word).join(sql.SQL("({})").format(clause) for clause, _ in clauses)
    return text, [value for _, values in clauses for value in values]


def _clause(entity: Entity, key: str, condition: Any) -> Clause | None:
    if key == "_id":
        return None if isinstance(condition, Contains | IsSet) else _by_id(_values(condition))
    field, *steps = key.split(".")
    declared = _declared(entity, field)
    nested = next((ids for ids in entity.nested_ids if ids.path == key), None)
    if nested is not None and _are_ids(_values(condition)):
        return _among_ids(nested, _values(condition))
    if declared is None:
        return None if steps else _among_rows(entity, field, condition)
    column = entity.table.c[declared.to]
    if isinstance(condition, IsSet):
        return _is_set(declared, column) if not steps else None
    if isinstance(column.type, JSONB):
        return _within(column, steps, condition)
    if steps:
        return None
    if isinstance(condition, Contains):
        return _containing(column, condition.text)
    return _equal(entity, declared, column, _values(condition))


def _by_id(values: Sequence[Any]) -> Clause:
    return sql.SQL("p.id = ANY(%s::text[])"), [_id_texts(values)]


def _id_texts(values: Sequence[Any]) -> list[str]:
    """Of those that a record can have for its id: what cannot be one is nobody's, which is an answer."""
    texts: list[str] = []
    for value in values:
        if value is not None and can_be_id(value):
            with contextlib.suppress(Unmappable):
                texts += id_texts(value)
    return texts


def _are_ids(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str | ObjectId) for value in values)


def _among_ids(nested: NestedIds, values: Sequence[Any]) -> Clause:
    return sql.SQL("p.{} ?| %s::text[]").format(sql.Identifier(nested.to)), [_id_texts(values)]


def _spelt(column: Column[Any]) -> sql.Composable:
    """A column's value, letter case and all."""
    value = sql.SQL("p.{}").format(sql.Identifier(column.name))
    return sql.SQL("{}::text").format(value) if isinstance(column.type, CITEXT) else value


def _containing(column: Column[Any], text: str) -> Clause | None:
    if not isinstance(column.type, String) or isinstance(column.type, Enum | DocumentId):
        return None
    if "\0" in text:
        return _NOTHING
    return sql.SQL("{} LIKE %s").format(_spelt(column)), [_pattern(text)]


def _pattern(text: str) -> str:
    escaped = re.sub(r"([\\%_])", r"\\\1", text)
    return f"%{escaped}%"


def _overridden(declared: FieldColumn) -> sql.Composable:
    """Whether the field has a value that its column could not hold."""
    return sql.SQL("COALESCE(p.extra ? {}, false)").format(sql.Literal(declared.field))


def _is_set(declared: FieldColumn, column: Column[Any]) -> Clause | None:
    if declared.missing is not MISSING or not column.nullable:
        return None
    name = sql.Identifier(column.name)
    return sql.SQL("p.{} IS NOT NULL OR {}").format(name, _overridden(declared)), []


def _equal(
    entity: Entity, declared: FieldColumn, column: Column[Any], values: Sequence[Any]
) -> Clause | None:
    if callable(declared.missing):
        return None
    name = sql.Identifier(column.name)
    overridden = _overridden(declared)
    held: list[Any] = []
    ways: list[Clause] = []
    for value in values:
        if value is None:
            if not column.nullable:
                return None
            ways.append((sql.SQL("p.{} IS NULL AND NOT {}").format(name, overridden), []))
            continue
        sought = entity.sought(declared.field, value)
        if sought is not MISSING:
            held += id_texts(value) if isinstance(column.type, DocumentId) else [sought]
        elif isinstance(value, Mapping | list):
            return None
        else:
            said = dump_json({declared.field: value}).decode()
            ways.append((sql.SQL("p.extra @> %s::jsonb"), [said]))
    if held:
        equal = sql.SQL("{} = %s" if len(held) == 1 else "{} = ANY(%s)").format(_spelt(column))
        # A number in `extra` is found by its column (any width); for what else is there, it holds no equal value.
        numbers = all(isinstance(v, int | float | Decimal) and not isinstance(v, bool) for v in held)
        if declared.stand_in is not None or not numbers:
            equal = sql.SQL("{} AND NOT {}").format(equal, overridden)
        ways.append((equal, held if len(held) == 1 else [held]))
    return _joined(" OR ", ways) if ways else _NOTHING


def _within(column: Column[Any], steps: Sequence[str], condition: Any) -> Clause | None:
    """What is anywhere at a path into JSON. In its lax mode a path goes into lists on its way, as MongoDB's do."""
    path = "$" + "".join(f".{orjson.dumps(step).decode()}" for step in steps)
    name = sql.Identifier(column.name)
    if isinstance(condition, Contains):
        if "\0" in condition.text:
            return _NOTHING
        query = sql.SQL(
            "EXISTS (SELECT FROM jsonb_path_query(p.{}, %s::jsonpath) AS v "
            "WHERE jsonb_typeof(v) = 'string' AND v #>> '{{}}' LIKE %s)"
        ).format(name)
        return query, [f"{path}[*]", _pattern(condition.text)]
    values = _values(condition)
    if not all(isinstance(value, str | bool | ObjectId) for value in values):
        return None
    if not values:
        return _NOTHING
    equals = " || ".join(map(_equals_in_json, values))
    return sql.SQL("p.{} @? %s::jsonpath").format(name), [f"{path} ? ({equals})"]


def _equals_in_json(value: Any) -> str:
    """A jsonpath predicate: the item is this value, in the form that JSON has for it."""
    written = orjson.loads(dump_json(value))
    if isinstance(written, dict):
        [(kind, said)] = written.items()
        return f"@.{orjson.dumps(kind).decode()} == {orjson.dumps(said).decode()}"
    return f"@ == {orjson.dumps(written).decode()}"


def _among_rows(entity: Entity, field: str, condition: Any) -> Clause | None:
    """Any element of a list that has a table of its own; a list that does not fit its table is not looked into."""
    child = next((child for child in entity.children if child.field == field and child.is_list), None)
    if child is None or child.split is not None or isinstance(condition, Contains | IsSet):
        return None
    values = _values(condition)
    if not isinstance(child.table.c[child.values[0]].type, DocumentId) or None in values:
        return None
    query = sql.SQL("EXISTS (SELECT FROM {} AS c WHERE c.{} = p.id AND c.{} = ANY(%s::text[]))").format(
        identifier(child.table), sql.Identifier(child.columns[0]), sql.Identifier(child.values[0])
    )
    return query, [_id_texts(values)]


def can_order(entity: Entity, order: Order) -> bool:
    """Whether PostgreSQL has a column for an order."""
    if order.field == "_id":
        return True
    declared = _declared(entity, order.field)
    return (
        declared is not None
        and declared.missing is MISSING
        and not isinstance(entity.table.c[declared.to].type, JSONB)
    )


def _ordered_by(entity: Entity, order: Order) -> tuple[sql.Composable, bool]:
    """The expression that an order goes by, and whether it can be NULL."""
    declared = _declared(entity, order.field)
    if declared is None:
        raise ConfigurationError(f"entity {entity.name!r} cannot be ordered by {order.field!r}")
    column = entity.table.c[declared.to]
    value = _spelt(column)
    if isinstance(column.type, String) and not isinstance(column.type, Enum):
        value = sql.SQL('{} COLLATE "C"').format(value)
    return value, bool(column.nullable)


def as_order(entity: Entity, order: Order) -> sql.Composable:
    """ORDER BY's list. An index serves it that has the column NULLS FIRST (text: COLLATE "C") and the id."""
    word = sql.SQL("DESC" if order.descending else "ASC")
    if order.field == "_id":
        return sql.SQL("p.id {}").format(word)
    expression, nullable = _ordered_by(entity, order)
    nulls = sql.SQL((" NULLS LAST" if order.descending else " NULLS FIRST") if nullable else "")
    return sql.SQL("{} {}{}, p.id {}").format(expression, word, nulls, word)


def as_clauses_behind(entity: Entity, query: Query) -> list[Clause]:
    """What comes behind ``query.after``: clauses whose records come one after the other, each by one range of an index.

    One clause for all of it would have an OR in it, for which a server reads its index from the beginning.
    """
    if query.after is None:
        return [_EVERYTHING]
    value, id_ = query.after
    order, key = query.order, id_to_text(id_)
    operator = sql.SQL("<" if order.descending else ">")
    if order.field == "_id":
        return [(sql.SQL("p.id {} %s").format(operator), [key])]
    expression, nullable = _ordered_by(entity, order)
    place = entity.column_value(order.field, value)
    if place is None:
        nulls: Clause = (sql.SQL("{} IS NULL AND p.id {} %s").format(expression, operator), [key])
        rest: Clause = (sql.SQL("{} IS NOT NULL").format(expression), [])
        return [nulls] if order.descending else [nulls, rest]
    behind: Clause = (sql.SQL("({}, p.id) {} (%s, %s)").format(expression, operator), [place, key])
    if order.descending and nullable:
        return [behind, (sql.SQL("{} IS NULL").format(expression), [])]
    return [behind]
