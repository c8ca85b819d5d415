"""Any BSON value leaves MongoDB's world and comes back as it was, or is refused with a reason."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import uuid4

import bson
import psycopg
import pytest
from bson import Code, DatetimeMS, DBRef, Decimal128, Int64, ObjectId, Regex
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from crossfade.record import CF, Image
from crossfade.testing import bson_strategies as bs
from crossfade.values import (
    CODEC_OPTIONS,
    MAX_DEPTH,
    Unmappable,
    decode_canonical,
    decode_document,
    digest,
    digest_of_bytes,
    dump_json,
    encode_document,
    from_json,
    id_texts,
    id_to_text,
    load_json,
    normal_form,
    text_to_id,
    to_json,
)

unhurried = settings(deadline=None)  # a busy machine is no failure
OID = ObjectId("65f0c0ffee0123456789abcd")


def raw_of(document: dict[str, Any]) -> bytes:
    return bson.encode(document, codec_options=CODEC_OPTIONS)


def document_of(elements: bytes) -> bytes:
    return struct.pack("<i", len(elements) + 5) + elements + b"\0"


def nested(levels: int, kind: type = dict) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value} if kind is dict else [value]
    return value


def wrapped(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"$a": value}
    return value


def same_types(one: Any, other: Any) -> bool:
    # A document in which PyMongo would reorder one DBRef is decoded with plain documents for all of them.
    one, other = (dict(value.as_doc()) if isinstance(value, DBRef) else value for value in (one, other))
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same_types(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_types, one, other))
    return True


# -- a model of what jsonb does to JSON text ----------------------------------------------------------------


class Number:
    """A number as PostgreSQL's numeric prints it: written out, scale kept, no negative zero."""

    def __init__(self, text: str) -> None:
        number = Decimal(text)
        self.text = f"{number or abs(number):f}"


def jsonb(text: bytes) -> bytes:
    """JSON text after a round through a jsonb column."""

    def ordered(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return dict(sorted(dict(pairs).items(), key=lambda pair: (len(pair[0].encode()), pair[0].encode())))

    def refuse(constant: str) -> None:
        raise ValueError(f"jsonb does not take {constant}")

    tree = json.loads(
        text, parse_float=Number, parse_int=Number, parse_constant=refuse, object_pairs_hook=ordered
    )
    return "".join(print_json(tree)).encode()


def print_json(tree: Any) -> Iterator[str]:
    if isinstance(tree, Number):
        yield tree.text
    elif isinstance(tree, dict):
        yield "{"
        for n, (key, value) in enumerate(tree.items()):
            yield ", " * (n > 0)
            yield from print_json(key)
            yield ": "
            yield from print_json(value)
        yield "}"
    elif isinstance(tree, list):
        yield "["
        for n, value in enumerate(tree):
            yield ", " * (n > 0)
            yield from print_json(value)
        yield "]"
    else:
        if isinstance(tree, str) and "\0" in tree:
            raise ValueError("jsonb does not take NUL")
        yield json.dumps(tree, ensure_ascii=False)


# -- canonical bytes and digests ----------------------------------------------------------------------------


@unhurried
@given(bs.bson_documents())
@example({"_id": 1, "like a reference": {"$id": 1, "$ref": "users"}})
def test_a_decoded_document_encodes_to_the_bytes_it_came_from(document: dict[str, Any]) -> None:
    raw = raw_of(document)
    assert raw_of(decode_document(raw)) == raw
    assert raw_of(decode_canonical(raw)) == raw
    assert digest(document) == digest_of_bytes(raw)
    assert len(digest(document)) == 16


@unhurried
@given(bs.bson_documents(), bs.bson_documents())
@example({"_id": 1, "a": 1}, {"_id": 1, "a": 2})
@example({"_id": 1}, {"_id": 1, "a": 2})
def test_a_document_is_known_again_by_its_bytes_alone_and_no_other_is(
    foreseen: dict[str, Any], other: dict[str, Any]
) -> None:
    image = Image.from_raw(raw_of(foreseen))
    notes = {"rev": 7, "op": "a", "keys": {"r": "k"}, "born": "b", "debt": {"epoch": 3}}
    for stored in (
        {**foreseen, CF: notes},
        {**other, CF: notes},
        {CF: notes, **foreseen},
        foreseen,
        {"_id": 1, CF: 5},
    ):
        raw = raw_of(stored)
        try:
            read = Image.from_raw(raw)
        except Unmappable:
            continue
        known = image.in_raw(raw, ())
        if known is None:
            assert raw != raw_of({**foreseen, CF: notes})
            continue
        # By bytes, and the rest by value: a NaN is not equal to itself.
        assert encode_document(known.document) == encode_document(read.document)
        assert replace(known, document={}, id=None) == replace(read, document={}, id=None)


@unhurried
@given(bs.raw_documents())
def test_bytes_that_cannot_be_carried_back_are_refused_with_a_reason(case: tuple[bytes, str]) -> None:
    raw, word = case
    with pytest.raises(Unmappable) as refused:
        decode_document(raw)
    assert word in refused.value.reason
    assert refused.value.field
    assert "\0" not in refused.value.reason
    refused.value.reason.encode()


@unhurried
@given(st.binary(max_size=60), st.data())
def test_bytes_that_are_no_bson_are_refused(noise: bytes, data: st.DataObject) -> None:
    raw = raw_of({"_id": 1, "a": {"b": [1, "x", 2.5]}, "re": Regex("a", 2)})
    at = data.draw(st.integers(0, len(raw)))
    for damaged in (noise, raw[:at], raw[:at] + noise + raw[at + len(noise) :]):
        try:
            document = decode_document(damaged)
        except Unmappable:
            continue
        assert raw_of(document) == damaged or next(iter(document)) == "_id"


def test_bookkeeping_is_no_part_of_the_content() -> None:
    assert digest({"_id": 1, "a": 2, "_cf": {"rev": 7}}) == digest({"_id": 1, "a": 2})
    assert digest({"_id": 1, "a": {"_cf": 1}}) != digest({"_id": 1, "a": {}})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, Int64(1)),
        (1, 1.0),
        (0.0, -0.0),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (None, False),
        (b"x", "x"),
        (OID, str(OID)),
        (Code("x"), Code("x", {})),
    ],
)
def test_the_digest_tells_values_apart_that_python_may_call_equal(one: Any, other: Any) -> None:
    assert digest({"v": one}) != digest({"v": other})


def test_an_id_that_does_not_stand_first_is_moved_there() -> None:
    inside = raw_of({"a": 1})[4:-1] + raw_of({"_id": 5})[4:-1]
    assert decode_document(document_of(inside)) == {"_id": 5, "a": 1}


def test_a_reference_in_unusual_order_stays_a_plain_document() -> None:
    raw = raw_of({"_id": 1, "r": {"$id": 1, "$ref": "users"}, "s": {"$ref": "users", "x": 1, "$id": 2}})
    document = decode_document(raw)
    assert document["s"] == {"$ref": "users", "x": 1, "$id": 2}
    assert raw_of(document) == raw


def test_a_reference_in_usual_order_is_one_again_after_json() -> None:
    reference = DBRef("users", OID, "app", {"x": 1})
    assert load_json(dump_json(reference)) == reference


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("\ud800", "lone surrogate"),
        (2**63, "64 bits"),
        (uuid4(), "no BSON form"),
        (object(), "no BSON form"),
        ({"a\0b": 1}, "no BSON form"),
        (nested(20_000), "nested too deeply"),
    ],
)
def test_what_bson_cannot_hold_is_refused_by_the_field_and_without_the_value(value: Any, words: str) -> None:
    with pytest.raises(Unmappable, match=words) as refused:
        encode_document({"_id": 1, "fine": 2, "bad": value})
    assert refused.value.field == "bad"


def test_a_very_deep_document_is_refused_not_a_recursion_error() -> None:
    raw = b""
    for _ in range(50_000):
        raw = document_of(b"\x03a\0" + (raw or document_of(b"")))
        if len(raw) > 400_000:
            break
    with pytest.raises(Unmappable):
        decode_document(raw)


def test_the_normal_form_is_what_mongodb_gives_back() -> None:
    written = {
        "at": datetime(2024, 1, 1, 12, 0, 0, 123_456, tzinfo=timezone(timedelta(hours=2))),
        "big": 2**40,
        "pair": (1, 2),
        "_cf": {"rev": 1},
    }
    read = normal_form(written)
    assert read == {"at": datetime(2024, 1, 1, 10, 0, 0, 123_000, tzinfo=UTC), "big": 2**40, "pair": [1, 2]}
    assert type(read["big"]) is Int64


# -- ids as text --------------------------------------------------------------------------------------------


@unhurried
@given(bs.ids())
@example("65f0c0ffee0123456789abcd")
@example("s:aaaaaaaaaaaaaaaaaaaaaa")
@example("j:5")
@example("a\0b")
@example("")
@example(None)
def test_an_id_comes_back_from_its_text(value: Any) -> None:
    _id = normal_form({"_id": value})["_id"]
    try:
        text = id_to_text(_id)
    except Unmappable:
        assert len(raw_of({"v": _id})) > 1000
        return
    assert "\0" not in text
    text.encode()
    assert raw_of({"v": text_to_id(text)}) == raw_of({"v": _id})


@unhurried
@given(bs.ids(), bs.ids())
@example("65f0c0ffee0123456789abcd", OID)
@example(5, Int64(5))
@example(5, "5")
@example(0.0, -0.0)
def test_two_ids_have_two_texts(one: Any, other: Any) -> None:
    try:
        texts = id_to_text(one), id_to_text(other)
    except Unmappable:
        return
    assert (texts[0] == texts[1]) == (raw_of({"v": one}) == raw_of({"v": other}))


@pytest.mark.parametrize(
    "equal",
    [
        [5, Int64(5), 5.0, Decimal128("5"), Decimal128("5.00"), Decimal128("0.5E+1")],
        [2**40, Int64(2**40), 2.0**40, Decimal128("1099511627776")],
        [2**53 + 1, Decimal128("9007199254740993.0")],
        [-2.5, Decimal128("-2.5"), Decimal128("-2.500")],
        [0, Int64(0), 0.0, -0.0, Decimal128("0"), Decimal128("-0.00")],
        [float("inf"), Decimal128("Infinity")],
        [float("nan"), Decimal128("NaN")],
        [1e300, float("1e300")],
    ],
    ids=repr,
)
def test_numbers_that_mongodb_takes_for_one_id_have_the_same_texts(equal: list[Any]) -> None:
    for number in equal:
        texts = id_texts(number)
        assert texts[0] == id_to_text(number)
        assert len(texts) == len(set(texts))
        assert {id_to_text(other) for other in equal} <= set(texts)
        assert set(texts) == set(id_texts(equal[0]))


@unhurried
@given(bs.ids(), bs.ids())
@example(5, Decimal128("5.0"))
@example(5, 5.5)
@example(1, True)
@example(0.1, Decimal128("0.1"))
@example(Decimal128("0E+10"), 0)
def test_only_numbers_that_are_equal_share_a_text(one: Any, other: Any) -> None:
    try:
        texts = [id_texts(value) for value in (one, other)]
    except Unmappable:
        return
    for value, own in zip((one, other), texts, strict=True):
        assert own[0] == id_to_text(value)
        assert len(own) == 1 or (isinstance(value, int | float | Decimal128) and not isinstance(value, bool))
    if set(texts[0]) & set(texts[1]) and texts[0][0] != texts[1][0]:
        exact = [v.to_decimal() if isinstance(v, Decimal128) else Decimal(v) for v in (one, other)]
        assert exact[0] == exact[1] or all(number.is_nan() for number in exact)


def test_the_text_of_an_object_id_is_its_hex() -> None:
    assert id_to_text(OID) == "65f0c0ffee0123456789abcd"
    assert id_to_text("bob") == "s:bob"


@pytest.mark.parametrize("value", [[1], (1,), Regex("a"), "x" * 5000, "\ud800", 2**64])
def test_what_cannot_be_an_id_is_refused(value: Any) -> None:
    with pytest.raises(Unmappable):
        id_to_text(value)


@pytest.mark.parametrize(
    "text", ["", "x", "bob", "x:bob", "65f0", "z" * 24, "j:", "j:{", 'j:{"$oid": 5}', ":" * 24]
)
def test_a_text_that_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        text_to_id(text)


# -- any value as JSON --------------------------------------------------------------------------------------


@settings(max_examples=250, deadline=None)
@given(bs.bson_values())
@example({"$keys": ["a"], "a": 1})
@example({"$doc": []})
@example({"b": 1, "a": 2})
@example({"aa": 1, "b": 2})
@example({"é": 1, "zz": 2, "a": 3})
@example({"a": 1, "é": 2, "zz": 3})
@example([1e16, -0.0, 0.0, 1e-4, 1e15, 9999999999999998.0, 123456.7])
@example({"$scope": {}, "$code": "x"})
@example(Code("a\0b", {}))
@example({"$ref": "users", "$id": {"$id": None, "$ref": ""}, "$db": "app"})
def test_a_value_comes_back_from_json_and_from_jsonb(value: Any) -> None:
    value = normal_form({"v": value})["v"]
    text = dump_json(value)
    for read in (load_json(text), load_json(jsonb(text)), load_json(jsonb(jsonb(text)).decode())):
        assert raw_of({"v": read}) == raw_of({"v": value})
        assert same_types(read, value)


@unhurried
@given(st.one_of(st.text(), st.booleans(), st.none(), bs.int32s()))
def test_what_json_can_say_is_plain_json(value: Any) -> None:
    try:
        plain = to_json(value)
    except Unmappable:
        assert isinstance(value, str)
        return
    assert plain == value or (isinstance(value, str) and "\0" in value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (OID, {"$oid": str(OID)}),
        (Int64(5), {"$numberLong": "5"}),
        (2**31, {"$numberLong": "2147483648"}),
        (1e16, {"$numberDouble": "1e+16"}),
        (float("inf"), {"$numberDouble": "Infinity"}),
        (float("nan"), {"$numberDouble": "NaN"}),
        (2.5, 2.5),
        (datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC), {"$date": {"$numberLong": "1000"}}),
        (datetime(1970, 1, 1, 0, 0, 1), {"$date": {"$numberLong": "1000"}}),
        (DatetimeMS(2**60), {"$date": {"$numberLong": str(2**60)}}),
        (b"\0", {"$binary": {"base64": "AA==", "subType": "00"}}),
        (re.compile("a", re.IGNORECASE), {"$regularExpression": {"pattern": "a", "options": "iu"}}),
        ("a\0", {"$utf8": "YQA="}),
        ({"b": 1, "a": 2}, {"b": 1, "a": 2, "$keys": ["b", "a"]}),
        ({"a": 1, "b": 2}, {"a": 1, "b": 2}),
        ({"$set": 1}, {"$doc": [["$set", 1]]}),
        ((1, 2), [1, 2]),
    ],
)
def test_the_form_of_a_value_in_json(value: Any, expected: Any) -> None:
    assert to_json(value) == expected


@pytest.mark.parametrize("kind", [dict, list])
def test_nesting_is_carried_to_its_limit_and_refused_beyond(kind: type) -> None:
    # Wrapping a document with a key like "$a" takes three JSON levels for one.
    for deep in (nested(MAX_DEPTH, kind), wrapped(MAX_DEPTH)):
        assert load_json(jsonb(dump_json(deep))) == deep
    for levels in (MAX_DEPTH + 1, 5000):
        with pytest.raises(Unmappable, match="nested"):
            to_json(nested(levels, kind))


@pytest.mark.parametrize("value", ["\ud800", {"\ud800": 1}, {"a\0": 1}, 2**63, Regex("a\0"), object()])
def test_what_json_cannot_carry_is_refused(value: Any) -> None:
    with pytest.raises(Unmappable):
        to_json(value)


@pytest.mark.parametrize(
    "tree",
    [{"$oid": 5}, {"$oid": "zz"}, {"$what": 1}, {"$date": 1}, {"$keys": ["a"]}, {"$doc": 5}, {"$binary": {}}],
)
def test_json_of_another_origin_is_refused(tree: Any) -> None:
    with pytest.raises(ValueError):
        from_json(tree)


# -- a real PostgreSQL --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(bs.bson_values(), min_size=1, max_size=10), texts=st.lists(bs.ids(), max_size=5))
def test_postgresql_gives_json_and_id_texts_back(
    database_url: str, values: list[Any], texts: list[Any]
) -> None:
    values = [normal_form({"v": value})["v"] for value in values]
    with psycopg.connect(database_url) as connection:
        for value in values:
            row = connection.execute("SELECT (%s::jsonb)::text", [dump_json(value).decode()]).fetchone()
            assert row is not None
            assert raw_of({"v": load_json(row[0])}) == raw_of({"v": value})
            assert jsonb(dump_json(value)).decode() == row[0] or "\\" in row[0]
        for _id in texts:
            try:
                text = id_to_text(_id)
            except Unmappable:
                continue
            assert connection.execute("SELECT %s::text", [text]).fetchone() == (text,)
