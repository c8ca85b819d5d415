"""What is asked of an entity: conditions on fields, an order, a portion (pure).

The words are few, because each of them must have the same answer in both stores, whatever old documents hold:

- a value: the field equals it; None: it is null or missing. A field that is declared with a `missing` value has that
  value where it is missing.
- `any_of`: the field equals one of these values.
- `is_set`: the field is neither null nor missing.
- `contains`: the field is text with this text somewhere in it. Letter case counts, since servers differ in what the
  other case of a letter is: ask for a field that is kept in a normal form.

A key names a mapped field, or a path into one that is kept as JSON, ``stats.best``. A list on the way, or at the end,
stands for any of its elements: ``aliases.name`` is the ``name`` of one of the aliases, ``friends`` one of the friends.
In JSON, text, ids and booleans are compared. Ids at a path that is declared with `ids_at` have an index there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crossfade.errors import ConfigurationError

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


def alternatives(where: Where | None) -> tuple[Mapping[str, Any], ...]:
    """`Query.where` for what an application gives; None: everything.

    Raises:
        ConfigurationError: a key cannot be.
    """
    found = ({},) if where is None else (where,) if isinstance(where, Mapping) else tuple(where)
    for key in (key for each in found for key in each):
        if "[" in key:
            raise ConfigurationError(
                f"where= has the key {key!r}: a path goes into lists by itself, without []"
            )
    return found


def query(where: Where | None, *, order_by: str, after: Sequence[Any] | None, limit: int, skip: int) -> Query:
    """The question that `EntityHandle.find` was given.

    Raises:
        ConfigurationError: an argument cannot be.
    """
    order = Order.parse(order_by)
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
        place = (after[0], after[-1])
    return Query(alternatives(where), order, place, limit, skip)
