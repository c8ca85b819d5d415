import math
from datetime import UTC, datetime

import bson
import pytest
from bson import Binary, Code, DatetimeMS, Decimal128, Int64, MaxKey, MinKey, ObjectId, Timestamp
from bson.dbref import DBRef
from hypothesis import given

from crossfade.bulk.convert import canonical, image_of
from crossfade.bulk.plan import (
    BRACKETS,
    Range,
    bracket_of,
    choose_bounds,
    decode_position,
    encode_position,
    ranges_between,
)
from crossfade.record import CF, Image
from crossfade.testing.bson_strategies import bson_documents, ids
from crossfade.values import CODEC_OPTIONS, Unmappable, decode_document, encode_document

IN_ORDER = [
    [MinKey()], [None], [1, Int64(2), 1.5, Decimal128("1")], ["text"], [{"a": 1}, DBRef("c", 1)],
    [b"x", Binary(b"x", 5)], [ObjectId()], [True], [datetime(2024, 1, 1, tzinfo=UTC), DatetimeMS(2**60)],
    [Timestamp(1, 1)], [Code("x")], [Code("x", {"a": 1})], [MaxKey()],
]  # fmt: skip


def test_every_type_has_its_bracket():
    assert [{bracket_of(id_) for id_ in same} for same in IN_ORDER] == [{n} for n in range(len(BRACKETS))]


def test_what_cannot_be_an_id_is_refused():
    with pytest.raises(ValueError, match="cannot be an _id"):
        bracket_of([1])


def test_a_run_that_begins_reads_everything_at_once():
    assert Range().queries() == [{}]


def test_a_run_that_goes_on_reads_the_rest_of_the_bracket_and_all_later_ones():
    last = ObjectId()
    assert Range().queries({"_id": last}) == [
        {"_id": {"$gt": last}},
        {"_id": {"$type": [8, 9, 17, 13, 15, 127]}},
    ]


@pytest.mark.parametrize("last", [math.nan, Decimal128("NaN")])
def test_after_nan_come_all_numbers(last):
    assert Range().queries({"_id": last})[0] == {"_id": {"$gte": -math.inf}}


@pytest.mark.parametrize("last", [None, MinKey()])
def test_a_type_with_one_value_is_done_with_it(last):
    [query] = Range().queries({"_id": last})
    assert list(query["_id"]) == ["$type"]


def test_nothing_comes_after_the_last_type():
    assert Range().queries({"_id": MaxKey()}) == []


def test_a_piece_of_one_type_is_one_query():
    first, last = ObjectId(), ObjectId()
    piece = Range({"_id": first}, {"_id": last})
    assert piece.queries() == [{"_id": {"$gt": first, "$lte": last}}]
    assert piece.queries({"_id": (done := ObjectId())}) == [{"_id": {"$gt": done, "$lte": last}}]


def test_a_piece_over_several_types_has_the_types_in_between():
    piece = Range({"_id": 5}, {"_id": (last := ObjectId())})
    assert piece.queries() == [
        {"_id": {"$gt": 5}},
        {"_id": {"$type": [2, 14, 3, 5]}},
        {"_id": {"$lte": last}},
    ]


def test_a_piece_that_ends_at_a_number_has_nan_too():
    [types, nan, rest] = Range(None, {"_id": 5}).queries()
    assert types == {"_id": {"$type": [-1, 10]}}
    assert math.isnan(nan["_id"])
    assert rest == {"_id": {"$lte": 5}}


def test_bounds_are_about_equally_far_apart_and_never_what_no_comparison_finds():
    drawn = [None, math.nan, *range(100), True, "a"]
    bounds = choose_bounds(drawn, 4)
    assert bounds == [25, 50, 75]
    assert choose_bounds([None, True], 4) == []
    assert choose_bounds(drawn, 1) == []
    assert choose_bounds([7, 7, 7], 3) == [7]


def test_neighbouring_pieces_share_a_bound():
    pieces = ranges_between([10, "x"])
    assert [(one.after, one.last) for one in pieces] == [
        (None, {"_id": 10}), ({"_id": 10}, {"_id": "x"}), ({"_id": "x"}, None),
    ]  # fmt: skip


@given(ids())
def test_positions_come_back_and_have_a_plan(id_):
    assert encode_document(decode_position(encode_position(id_))) == encode_document({"_id": id_})
    Range().queries({"_id": id_})


@given(bson_documents(), bson_documents())
def test_canonical_bytes_cut_from_raw_are_those_encoded_anew(document, notes):
    for stored in (document, {**document, CF: notes}, {CF: notes, **document}):
        raw = bson.encode(stored, codec_options=CODEC_OPTIONS)
        try:
            decoded = decode_document(raw)
        except Unmappable:
            continue
        assert canonical(raw, decoded) == encode_document(decoded)


@given(bson_documents())
def test_images_are_those_of_the_protocol(document):
    raw = bson.encode(
        {**document, CF: {"rev": Int64(7), "op": "a", "keys": {"r": "k"}}}, codec_options=CODEC_OPTIONS
    )
    image, content = image_of(raw)
    expected = Image.from_raw(raw)
    # By bytes, and the rest by value: a NaN is not equal to itself.
    assert content == encode_document(expected.document)
    assert (image.rev, image.op, image.keys, image.digest) == (7, "a", {"r": "k"}, expected.digest)
    assert content == encode_document(image.document)


@pytest.mark.parametrize("notes", [{"rev": "x"}, {"rev": []}, {"keys": 5}, {"debt": 5}])
def test_notes_that_are_not_ours_are_refused(notes):
    raw = bson.encode({"_id": 1, CF: notes})
    with pytest.raises(Unmappable):
        image_of(raw)
