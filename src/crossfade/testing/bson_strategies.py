"""Hypothesis strategies for BSON: every type, and the dirt that real collections hold.

`bson_values` and `bson_documents` give what decoding a stored document gives; `user_documents` gives
documents as an application keeps them, with dirt here and there; `raw_documents` gives bytes, also such as
Python's BSON types cannot carry (invalid UTF-8, a field twice, deprecated types).
"""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta
from typing import Any

import bson
from bson import (
    Binary,
    Code,
    DatetimeMS,
    DBRef,
    Decimal128,
    Int64,
    MaxKey,
    MinKey,
    ObjectId,
    Regex,
    Timestamp,
)
from hypothesis import strategies as st

from crossfade.values import CODEC_OPTIONS

Strategy = st.SearchStrategy[Any]

INT32 = (-(2**31), 2**31 - 1)
INT64 = (-(2**63), 2**63 - 1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_DATE_MS = (datetime(1, 1, 1, tzinfo=UTC) - _EPOCH) // timedelta(milliseconds=1)
_LAST_DATE_MS = (datetime(9999, 12, 31, 23, 59, 59, 999000, tzinfo=UTC) - _EPOCH) // timedelta(milliseconds=1)

_characters = st.characters(codec="utf-8")
_words = st.sampled_from(["Bob", "bob ", "ÅSA", "ß", "İ", "e\u0301", "日本", "🂡", "a.b", "$set", "65f0", ""])


def object_ids() -> Strategy:
    """ObjectIds."""
    return st.binary(min_size=12, max_size=12).map(ObjectId)


def strings() -> Strategy:
    """Strings, some with NUL, some that look like something else, some long (to 20,000 characters)."""
    return st.one_of(
        st.text(_characters, max_size=20),
        _words,
        st.text(st.sampled_from("a\0é"), min_size=1, max_size=5),
        object_ids().map(str),
        st.sampled_from(["null", "\\u0000", "\\", '"', "\x7f\x1f", "\ufeff", "\uffff", "s:x", "j:1", "{}"]),
        st.integers(200, 20_000).map(lambda size: "x" * size),
    )


def keys() -> Strategy:
    """Field names: plain, dotted, empty, with `$`, names of JSON wrappers, not ASCII. BSON allows no NUL."""
    return st.one_of(
        st.sampled_from(["a", "b", "aa", "ab", "name", "__v", "é", "zz", "日本"]),
        st.sampled_from(["", ".", "a.b", "$", "$set", "a$", "__proto__", "0", "1", "_id", "_cf", "extra"]),
        st.sampled_from(
            [
                "$oid",
                "$date",
                "$keys",
                "$doc",
                "$numberLong",
                "$utf8",
                "$code",
                "$scope",
                "$ref",
                "$id",
                "$db",
            ]
        ),
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6),
    )


def doubles() -> Strategy:
    """Doubles: any bits (NaN with payloads, both zeros, infinities, subnormals) and where notations
    change."""
    return st.one_of(
        st.binary(min_size=8, max_size=8).map(lambda bits: struct.unpack("<d", bits)[0]),
        st.floats(),
        st.floats(-1e6, 1e6).map(lambda number: round(number, 2)),
        st.integers(-(2**60), 2**60).map(float),
        st.sampled_from([0.0, -0.0, 1e-4, 9.999e-5, 1e15, 1e16, 9999999999999998.0, 2.0**53, 5e-324, 1e308]),
        nans(),
    )


def nans() -> Strategy:
    """NaNs of either sign, with any payload."""
    return st.builds(
        lambda sign, payload: struct.unpack("<d", struct.pack("<Q", sign << 63 | 0x7FF << 52 | payload))[0],
        st.integers(0, 1),
        st.integers(1, 2**52 - 1),
    )


def int32s() -> Strategy:
    """32-bit integers, the ends among them."""
    return st.one_of(st.integers(*INT32), st.sampled_from([*INT32, 0, 1, -1]))


def int64s() -> Strategy:
    """64-bit integers, also small ones (5 stored as a long) and those past 2^53."""
    edges = [*INT64, *INT32, 2**31, -(2**31) - 1, 2**53, 2**53 + 1, 0, 5]
    return st.one_of(st.integers(*INT64), st.sampled_from(edges)).map(Int64)


def decimals() -> Strategy:
    """Decimal128: ordinary and special values, and any 128 bits, canonical or not."""
    texts = ["0", "-0", "1.10", "1E+3", "0E-6176", "NaN", "-NaN", "sNaN", "Infinity", "-Infinity", "9" * 34]
    return st.one_of(
        st.sampled_from(texts).map(Decimal128),
        st.decimals(allow_nan=False, allow_infinity=False, places=2).map(
            lambda number: Decimal128(f"{number:.20E}")
        ),
        st.binary(min_size=16, max_size=16).map(Decimal128.from_bid),
    )


def dates() -> Strategy:
    """Dates by their milliseconds: year 1 to 9999 as datetime in UTC, others as DatetimeMS."""
    edges = [*INT64, _FIRST_DATE_MS, _FIRST_DATE_MS - 1, _LAST_DATE_MS, _LAST_DATE_MS + 1, -1, 0]
    return st.one_of(
        st.integers(0, 2_000_000_000_000), st.integers(_FIRST_DATE_MS, _LAST_DATE_MS), st.integers(*INT64),
        st.sampled_from(edges),
    ).map(_date)  # fmt: skip


def _date(milliseconds: int) -> datetime | DatetimeMS:
    if _FIRST_DATE_MS <= milliseconds <= _LAST_DATE_MS:
        return _EPOCH + timedelta(milliseconds=milliseconds)
    return DatetimeMS(milliseconds)


def binaries() -> Strategy:
    """Binary data of the subtypes in use: generic, function, old, both UUIDs, MD5, column, user-defined."""
    return st.one_of(
        st.binary(max_size=40),
        st.builds(Binary, st.binary(min_size=16, max_size=16), st.sampled_from([3, 4, 5])),
        st.builds(Binary, st.binary(max_size=10), st.sampled_from([1, 2, 6, 7, 8, 128, 255])),
    )


def regexes() -> Strategy:
    """Regular expressions as stored: pattern and option letters, not compiled."""
    patterns = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
    return st.builds(Regex, patterns, st.sets(st.sampled_from([2, 4, 8, 16, 32, 64])).map(sum))


def scalars() -> Strategy:
    """Values of every type that holds no others."""
    return st.one_of(
        strings(), st.none(), st.booleans(), int32s(), int64s(), doubles(), decimals(), dates(), binaries(),
        object_ids(), regexes(),
        st.builds(Timestamp, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
        st.builds(MinKey), st.builds(MaxKey), strings().map(Code),
    )  # fmt: skip


def bson_values(max_leaves: int = 12) -> Strategy:
    """Any BSON value: scalars, arrays, documents, DBRefs, code with scope, in one another."""

    def holding(inner: Strategy) -> Strategy:
        documents = st.dictionaries(keys(), inner, max_size=5)
        return st.one_of(
            st.lists(inner, max_size=4),
            documents,
            st.builds(Code, strings(), documents),
            st.builds(DBRef, st.text(_characters, max_size=5).filter(lambda t: "\0" not in t), inner),
            st.builds(
                lambda _id, more: {"$ref": "users", "$id": _id, "$db": "app", **more},
                inner,
                st.dictionaries(st.sampled_from("xyz"), inner, max_size=2),
            ),
        )

    return st.recursive(scalars(), holding, max_leaves=max_leaves)


def ids() -> Strategy:
    """Values that may be an `_id`: any but arrays and regular expressions."""
    small = st.dictionaries(st.sampled_from(["a", "b", "$x", ""]), scalars(), max_size=3)
    return st.one_of(object_ids(), strings(), int32s(), scalars(), small).filter(
        lambda value: not isinstance(value, Regex)
    )


def bson_documents() -> Strategy:
    """Any document, in the form that decoding gives, with an `_id`."""
    return st.builds(
        lambda _id, rest: _decoded(
            {"_id": _id, **{k: v for k, v in rest.items() if k not in ("_id", "_cf")}}
        ),
        ids(),
        st.dictionaries(keys(), bson_values(), max_size=6),
    )


def _decoded(document: dict[str, Any]) -> dict[str, Any]:
    return bson.decode(bson.encode(document, codec_options=CODEC_OPTIONS), CODEC_OPTIONS)


def user_documents() -> Strategy:
    """A user of the reference service; each field is now and then missing, of another type, or out of
    place."""
    pictures = st.sampled_from([
        "data:image/png;base64,iVBORw0KGgo=", "data:image/jpeg;base64,", "data:image/png;base64,iVBO\nRw==",
        "data:image/png;base64,iVB", "data:;base64,AA==", "https://example.org/a.png",
    ])  # fmt: skip
    stamps = st.integers(1_500_000_000_000, 1_800_000_000_000).map(_date)
    guests = st.fixed_dictionaries({
        "createdByUserId": st.none() | object_ids(), "originalGuestId": st.none() | strings(),
    })  # fmt: skip
    clean: dict[str, Strategy] = {
        "username": st.one_of(st.text(_characters, min_size=3, max_size=20), _words, st.just("n" * 60)),
        "passwordHash": st.none() | st.just("$2a$12$" + "x" * 53),
        "role": st.sampled_from(["user", "admin", "guest"]),
        "guestMetadata": st.none() | guests,
        "lastLogin": st.none() | stamps,
        "profilePicture": st.none() | pictures,
        "friends": st.lists(object_ids(), max_size=4),
        "createdAt": stamps,
        "updatedAt": stamps,
        "__v": int32s(),
    }

    @st.composite
    def draw_user(draw: st.DrawFn) -> dict[str, Any]:
        dirt = draw(st.integers(0, 3))
        user = {"_id": draw(object_ids())} | {name: draw(values) for name, values in clean.items()}
        for _ in range(dirt):
            name = draw(st.sampled_from(sorted(clean)))
            kind = draw(st.sampled_from(["missing", "null", "other", "last", "unknown", "id", "friends"]))
            if kind == "missing":
                user.pop(name, None)
            elif kind == "null":
                user[name] = None
            elif kind == "other":
                user[name] = draw(bson_values(4))
            elif kind == "last" and name in user:
                user[name] = user.pop(name)
            elif kind == "unknown":
                user[draw(keys().filter(lambda key: key not in ("_id", "_cf")))] = draw(bson_values(4))
            elif kind == "id":
                user["_id"] = draw(ids())
            elif kind == "friends":
                user["friends"] = draw(st.lists(st.one_of(object_ids(), ids(), st.none()), max_size=3)) * 2
        return _decoded(user)

    return draw_user()


# -- bytes that Python's types cannot carry -----------------------------------------------------------------


def _document(elements: bytes) -> bytes:
    return struct.pack("<i", len(elements) + 5) + elements + b"\0"


def _element(kind: int, name: bytes, value: bytes) -> bytes:
    return bytes([kind]) + name + b"\0" + value


def _string(value: bytes) -> bytes:
    return struct.pack("<i", len(value) + 1) + value + b"\0"


def unmappable_elements() -> Strategy:
    """One raw element that must be refused, with a word that the reason has to contain."""
    return st.sampled_from([
        (_element(0x02, b"text", _string(b"\xed\xa0\x80")), "UTF-8"),  # a lone surrogate
        (_element(0x02, b"text", _string(b"ab\xff")), "UTF-8"),
        (_element(0x10, b"na\xffme", b"\0\0\0\0"), "UTF-8"),
        (_element(0x06, b"gone", b""), "undefined"),
        (_element(0x0E, b"sym", _string(b"x")), "symbol"),
        (_element(0x0C, b"ptr", _string(b"users") + bytes(12)), "DBPointer"),
        (_element(0x0A, b"two", b"") * 2, "twice"),
        (_element(0x08, b"flag", b"\x02"), "boolean"),
        (_element(0x0B, b"re", b"a\0zi\0"), "regular expression"),
        (_element(0x04, b"list", _document(_element(0x0A, b"1", b""))), "array"),
    ])  # fmt: skip


def raw_documents() -> Strategy:
    """Raw BSON of a document that holds one unmappable element at the top, in a document or in an array, with
    the word that the reason has to contain."""

    def build(bad: tuple[bytes, str], rest: dict[str, Any], wrap: int) -> tuple[bytes, str]:
        element, word = bad
        if wrap == 1:
            element = _element(0x03, b"sub", _document(element))
        elif wrap == 2:
            element = _element(0x04, b"many", _document(_element(0x03, b"0", _document(element))))
        inside = bson.encode({"_id": 1, **rest}, codec_options=CODEC_OPTIONS)[4:-1]
        return _document(inside + element), word

    rest = st.dictionaries(st.sampled_from("abc"), bson_values(3), max_size=2)
    return st.builds(build, unmappable_elements(), rest, st.integers(0, 2))
