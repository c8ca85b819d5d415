"""In which pieces a collection is read, so that a run can stop anywhere and go on (pure).

A server orders ids of all types in one sequence, but a comparison (``$gt``) only matches ids of the *bracket*
of types that its operand belongs to: after the string "x", a query ``{"_id": {"$gt": "x"}}`` gives the other
strings and no ObjectId at all. So what lies between two ids is read in up to three pieces: the rest of the first
one's bracket, all brackets in between by their types, and the begin of the last one's.

Ranges begin and end at ids that the server has drawn by chance and put into its own order, so nothing is counted and
nothing is read twice. Whatever the order of the ids that bound them, neighbours share a bound: what the one leaves
out the other has, and no document can fall between them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import bson
from bson import Binary, Code, DatetimeMS, Decimal128, MaxKey, MinKey, ObjectId, Timestamp
from bson.dbref import DBRef

from crossfade.values import CODEC_OPTIONS

#: Brackets of types that may be an ``_id``, in the server's order, by their numbers for ``$type``.
BRACKETS: Final[tuple[tuple[int, ...], ...]] = (
    (-1,),  # MinKey
    (10,),  # null
    (16, 18, 1, 19),  # numbers
    (2, 14),  # string, symbol
    (3,),  # object
    (5,),  # binary
    (7,),  # ObjectId
    (8,),  # boolean
    (9,),  # date
    (17,),  # timestamp
    (13,),  # code
    (15,),  # code with scope
    (127,),  # MaxKey
)

Query = dict[str, Any]


def bracket_of(id_: Any) -> int:
    """Index in `BRACKETS` of the bracket that an id belongs to.

    Raises:
        ValueError: its type cannot be an ``_id``.
    """
    kind = _type_number(id_)
    for index, types in enumerate(BRACKETS):
        if kind in types:
            return index
    raise ValueError(f"a value of the type {type(id_).__name__} cannot be an _id")


@dataclass(frozen=True, slots=True)
class Range:
    """A piece of a collection: the ids above ``after``, up to and including ``last``.

    Attributes:
        after, last: ``{"_id": id}``; None: without that bound.
    """

    after: Mapping[str, Any] | None = None
    last: Mapping[str, Any] | None = None

    def queries(self, position: Mapping[str, Any] | None = None) -> list[Query]:
        """The queries, to be run one after the other and each in ``_id`` order, that read what is left of it.

        Args:
            position: ``{"_id": last id done}``; None: nothing is done yet.
        """
        after = self.after if position is None else position
        if self.last is None:
            return (
                [{}]
                if after is None
                else [*_rest_of_bracket(after["_id"]), *_types(bracket_of(after["_id"]) + 1)]
            )
        last = self.last["_id"]
        ends = bracket_of(last)
        if after is not None and bracket_of(after["_id"]) == ends:
            return [{"_id": {**query["_id"], "$lte": last}} for query in _rest_of_bracket(after["_id"])]
        queries = [] if after is None else _rest_of_bracket(after["_id"])
        queries += _types(0 if after is None else bracket_of(after["_id"]) + 1, ends)
        if BRACKETS[ends] == BRACKETS[bracket_of(0)]:
            queries.append({"_id": math.nan})  # before all numbers, and no comparison matches it
        return [*queries, {"_id": {"$lte": last}}]


def ranges_between(bounds: Sequence[Any]) -> list[Range]:
    """The pieces that these ids, in the server's order, cut a collection into."""
    ends = [None, *({"_id": id_} for id_ in bounds), None]
    return [Range(after, last) for after, last in itertools.pairwise(ends)]


def choose_bounds(drawn: Sequence[Any], pieces: int) -> list[Any]:
    """Of ids drawn by chance, in the server's order, those that cut a collection into about ``pieces`` equal ones.

    Left out are ids that no comparison finds again.
    """
    usable = [id_ for id_ in drawn if is_bound(id_)]
    if pieces < 2 or not usable:
        return []
    chosen = [usable[len(usable) * n // pieces] for n in range(1, pieces)]
    return list({encode_position(id_): id_ for id_ in chosen}.values())


def is_bound(id_: Any) -> bool:
    """Whether ``$gt`` and ``$lte`` of this id find what stands beside it."""
    return isinstance(id_, ObjectId | str | int | bytes) and not isinstance(id_, bool | Code)


def _rest_of_bracket(id_: Any) -> list[Query]:
    if (isinstance(id_, float) and math.isnan(id_)) or (
        isinstance(id_, Decimal128) and id_.to_decimal().is_nan()
    ):
        # NaN stands before all numbers, and no comparison with it matches any.
        return [{"_id": {"$gte": -math.inf}}]
    return [] if isinstance(id_, MinKey | MaxKey) or id_ is None else [{"_id": {"$gt": id_}}]


def _types(begin: int, end: int | None = None) -> list[Query]:
    kinds = [kind for types in BRACKETS[begin:end] for kind in types]
    return [{"_id": {"$type": kinds}}] if kinds else []


def encode_position(id_: Any) -> bytes:
    """A position as kept with a run."""
    return bson.encode({"_id": id_}, codec_options=CODEC_OPTIONS)


def decode_position(stored: bytes | None) -> dict[str, Any] | None:
    """The reverse of `encode_position`; None for none."""
    return None if stored is None else bson.decode(stored, CODEC_OPTIONS)


def _type_number(id_: Any) -> int:
    if isinstance(id_, Code):
        return 13 if id_.scope is None else 15
    if isinstance(id_, Mapping | DBRef):
        return 3
    return _NUMBERS.get(type(id_), 0) or (5 if isinstance(id_, Binary | bytes) else _date(id_))


def _date(id_: Any) -> int:
    from datetime import datetime

    return 9 if isinstance(id_, datetime | DatetimeMS) else 0


_NUMBERS: Final[dict[type, int]] = {
    MinKey: -1,
    type(None): 10,
    float: 1,
    int: 16,
    bson.Int64: 18,
    Decimal128: 19,
    str: 2,
    ObjectId: 7,
    bool: 8,
    Timestamp: 17,
    MaxKey: 127,
}
