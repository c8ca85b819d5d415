"""What is asked of an entity: conditions on fields, an order, a portion (pure).

The words are few, because each of them must have the same answer in both stores, whatever old documents hold:

- a value: the field equals it; None: it is null or missing. A field that is declared with a `missing` value has that
  value where it is missing. A list where the mapping has a single value is none of its elements.
- `any_of`: the field equals one of these values.
- `is_set`: the field is neither null nor missing.
- `contains`: the field is text with this text somewhere in it. Letter case counts, since servers differ in what the
  other case of a letter is: ask for a field that is kept in a normal form.

A key names a mapped field, or a path into one that is kept as JSON, ``stats.best``. A list on the way, or at the end,
stands for any of its elements: ``aliases.name`` is the ``name`` of one of the aliases, ``friends`` one of the friends.
In JSON, text, ids and booleans are compared. Ids at a path that is declared with `ids_at` have an index there.

Whatever else is asked is refused here, before any store is: each of them would say something else of it, one that it
cannot be reached.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bson import Regex

from crossfade.errors import ConfigurationError
from crossfade.values import Unmappable, can_be_id, is_unicode, normal_form

#: All of a mapping's conditions hold; of a sequence of mappings, all those of at least one.
Where = Mapping[str, Any] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """A condition: equal to one of ``values``. Made by `any_of`."""

    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Contains:
    """A condition: text with ``text`` in it. Made by `contains`."""

    text: str


@dataclass(frozen=True, slots=True)
class IsSet:
    """A condition: neither null nor missing. Made by `is_set`."""


def any_of(values: Iterable[Any]) -> AnyOf:
    """The field equals one of these values; of none of them, nothing does."""
    return AnyOf(tuple(values))


def contains(text: str) -> Contains:
    """The field is text that has ``text`` somewhere in it, in this letter case."""
    return Contains(text)


def is_set() -> IsSet:
    """The field is there, and not null."""
    return IsSet()


@dataclass(frozen=True, slots=True)
class Order:
    """By one field, and by ``_id`` among equals, both in one direction. Null and missing come before everything.

    Attributes:
        field: a mapped field with a column, or ``_id``.
        descending: the last first.
    """

    field: str = "_id"
    descending: bool = False

    @classmethod
    def parse(cls, order_by: str) -> Order:
        """``field``, or ``-field`` for descending."""
        return cls(order_by.removeprefix("-"), order_by.startswith("-"))


@dataclass(frozen=True, slots=True)
class Query:
    """One question.

    Attributes:
        where: alternatives; of each, all conditions hold.
        order: in which order.
        after: value of the order's field, and id, of the record behind which to begin; None: at the beginning. By
            ``_id`` the first of the two says nothing.
        limit: records at most, 1 or more.
        skip: records left out first.
    """

    where: tuple[Mapping[str, Any], ...]
    order: Order = Order()
    after: tuple[Any, Any] | None = None
    limit: int = 100
    skip: int = 0


_CONDITIONS = "a value, any_of(...), is_set() or contains(...)"


def alternatives(entity: str, where: Where | None) -> tuple[Mapping[str, Any], ...]:
    """`Query.where` for what an application asks of the entity of this name; None: everything.

    Raises:
        ConfigurationError: a key or a condition cannot be.
    """
    if where is None:
        return ({},)
    said = f"where= of {entity!r}"
    found = (where,) if isinstance(where, Mapping) else () if isinstance(where, str) else tuple(where)
    if isinstance(where, str) or not all(isinstance(each, Mapping) for each in found):
        raise ConfigurationError(
            f"{said} is {type(where).__name__}: write a mapping of fields to conditions, or a list of such mappings, "
            "of which one has to hold"
        )
    return tuple({key: _condition(said, key, condition) for key, condition in each.items()} for each in found)


def _condition(said: str, key: Any, condition: Any) -> Any:
    """The condition without the texts that no store can hold: nothing equals them, as nobody has such an id."""
    _assert_path(said, key, f"give a field {_CONDITIONS}")
    if isinstance(condition, IsSet):
        return condition
    if isinstance(condition, Contains):
        if not isinstance(condition.text, str):
            raise ConfigurationError(
                f"{said} has contains() of {type(condition.text).__name__} in {key!r}: give it a text"
            )
        return condition if is_unicode(condition.text) else AnyOf(())
    values = condition.values if isinstance(condition, AnyOf) else (condition,)
    held = tuple(
        _as_stored(said, key, value, f"a field has {_CONDITIONS}")
        for value in values
        if not isinstance(value, str) or is_unicode(value)
    )
    return AnyOf(held) if isinstance(condition, AnyOf) or not held else held[0]


def assert_values(entity: str, where: Mapping[str, Any]) -> None:
    """That an update may be made upon these values, each of a top-level field.

    Raises:
        ConfigurationError: a key or a value cannot be.
    """
    said, instead = f"where= of an update of {entity!r}", "give a top-level field the value that it must have"
    for key, value in where.items():
        _assert_path(said, key, instead)
        if "." in key:
            raise ConfigurationError(f"{said} has the path {key!r}: {instead}")
        _as_stored(said, key, value, instead)


def _assert_path(said: str, key: Any, instead: str) -> None:
    if not isinstance(key, str) or not all(key.split(".")):
        raise ConfigurationError(f"{said} has the key {key!r}, which names no field: {instead}")
    if key.startswith("$"):
        raise ConfigurationError(f"{said} has the operator {key!r}, which there is not: {instead}")
    if "[" in key:
        raise ConfigurationError(f"{said} has the key {key!r}: a path goes into lists by itself, without []")
    _storable(said, key, None)


def _as_stored(said: str, key: str, value: Any, instead: str) -> Any:
    """The value as both stores keep it: a date is the same one in whatever zone, and in milliseconds."""
    operator = (
        next((str(name) for name in value if str(name)[:1] == "$"), "") if isinstance(value, Mapping) else ""
    )
    if operator:
        raise ConfigurationError(
            f"{said} has the operator {operator!r} in {key!r}, which there is not: {instead}"
        )
    if isinstance(value, AnyOf | Contains | IsSet | Regex | re.Pattern):
        # In a list of values a server takes a pattern for a condition.
        raise ConfigurationError(f"{said} has {type(value).__name__} in {key!r} for a value: {instead}")
    return _storable(said, key, value)


def _storable(said: str, key: str, value: Any) -> Any:
    try:
        return normal_form({key: value}).get(key, value)
    except Unmappable as cause:
        raise ConfigurationError(f"{said} can be met by no record: {cause}") from None


def query(
    entity: str,
    where: Where | None,
    *,
    order_by: str,
    after: Sequence[Any] | None,
    limit: int,
    skip: int,
) -> Query:
    """The question that `EntityHandle.find` was given, of the entity of this name.

    Raises:
        ConfigurationError: an argument cannot be.
    """
    order = Order.parse(order_by)
    _assert_path(f"order_by= of {entity!r}", order.field, "name a field, with - before it for the last first")
    if limit < 1 or skip < 0:
        raise ConfigurationError(f"find() with limit={limit} and skip={skip}: at least 1 and 0 are needed")
    place: tuple[Any, Any] | None = None
    if after is not None:
        if skip:
            raise ConfigurationError("find() with after= and skip=: give one of the two")
        wanted = 1 if order.field == "_id" else 2
        if len(after) != wanted:
            names = "(id,)" if wanted == 1 else f"({order.field}, id)"
            raise ConfigurationError(f"find(order_by={order_by!r}) begins behind after={names}")
        said = f"after= of {entity!r}"
        if not can_be_id(after[-1]):
            raise ConfigurationError(f"{said} ends with {type(after[-1]).__name__}, which is no id")
        place = (_storable(said, order.field, after[0]), _storable(said, "_id", after[-1]))
    return Query(alternatives(entity, where), order, place, limit, skip)
