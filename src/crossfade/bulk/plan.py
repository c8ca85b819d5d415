"""In which pieces a collection is read, so that a run can stop anywhere and go on (pure).

A server orders ids of all types in one sequence, but a comparison (``$gt``) only matches ids of the *bracket*
of types that its operand belongs to: after the string "x", a query ``{"_id": {"$gt": "x"}}`` gives the other
strings and no ObjectId at all. So a run that begins reads everything in one query, and a run that goes on
reads two pieces: the rest of the bracket that it was in, and then all later brackets by their types.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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


def queries_after(position: Mapping[str, Any] | None) -> list[Query]:
    """The queries, to be run one after the other and each in ``_id`` order, that read what is left.

    Args:
        position: ``{"_id": last id done}``; None: nothing is done yet.
    """
    if position is None:
        return [{}]
    last = position["_id"]
    bracket = bracket_of(last)
    queries: list[Query] = []
    if (isinstance(last, float) and math.isnan(last)) or (
        isinstance(last, Decimal128) and last.to_decimal().is_nan()
    ):
        # NaN stands before all numbers, and no comparison with it matches any.
        queries.append({"_id": {"$gte": -math.inf}})
    elif not isinstance(last, MinKey | MaxKey) and last is not None:
        queries.append({"_id": {"$gt": last}})
    later = [kind for types in BRACKETS[bracket + 1 :] for kind in types]
    if later:
        queries.append({"_id": {"$type": later}})
    return queries


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
