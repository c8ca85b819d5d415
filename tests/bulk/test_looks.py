"""What is plainly equal, without understanding the document: the same as what the whole judgement calls equal."""

import bson
import pytest
from bson import Int64
from hypothesis import given
from hypothesis import strategies as st

from crossfade.bulk.findings import Notes, Source, judge
from crossfade.bulk.looks import Revisions, plainly_equal
from crossfade.stores.bulk_postgres import StoredRecord
from crossfade.values import CODEC_OPTIONS, digest, id_to_text
from scorekeeper.users.entity import users

from .conftest import user


def stored(document, *, rev=0, keys=None, mapping=users.mapping_version, content=None):
    """The row of a document; ``content``: what its digest is of, if another."""
    rows = users.to_rows(document, keys)
    return StoredRecord(
        rows.parent[0], rows.parent, rows.children, rev, None, content or digest(document), mapping
    )


def raw_of(document, notes=None, *, first=False):
    whole = {**document} if notes is None else {**document, "_cf": notes}
    if first:
        whole = {"_id": document["_id"], "_cf": notes, **document}
    return bson.encode(whole, codec_options=CODEC_OPTIONS)


NOTES = st.fixed_dictionaries(
    {},
    optional={
        "rev": st.integers(0, 3).map(Int64),
        "op": st.just("1" * 32),
        "keys": st.dictionaries(st.just("username"), st.sampled_from(["name1", "name1~2", "other"])),
        "deleted": st.booleans(),
        "debt": st.just({"epoch": Int64(1)}),
    },
)


@given(
    notes=st.none() | NOTES, first=st.booleans(), rev=st.integers(0, 3),
    mapping=st.sampled_from([0, users.mapping_version]),
    keys=st.sampled_from([None, {"username": "name1~2"}]), change=st.sampled_from([{}, {"role": "admin"}, {"x": 1}]),
    other=st.booleans(),
)  # fmt: skip
def test_what_is_plainly_equal_is_judged_equal(notes, first, rev, mapping, keys, change, other):
    document = user(1)
    raw = raw_of({**document, **change}, notes, first=first and notes is not None)
    row = stored(document, rev=rev, keys=keys, mapping=mapping, content=b"x" * 16 if other else None)
    plain = plainly_equal(users, raw, row)
    source = Source.of(raw)
    equal = not source.is_gone and judge(users, source, row, Notes()) is None
    if plain is not None:
        assert equal
        assert plain == source.image.rev
    elif notes is None or not first:
        assert not equal


def test_a_second_field_of_notes_is_never_plainly_equal():
    document = user(1)
    raw = raw_of(document, {"rev": Int64(0)})
    more = bson.encode({"_cf": {"rev": Int64(0)}})[4:-1]
    twice = (len(raw) + len(more)).to_bytes(4, "little") + raw[4:-1] + more + b"\0"
    assert plainly_equal(users, raw, stored(document)) == 0
    assert plainly_equal(users, twice, stored(document)) is None


@pytest.mark.parametrize("id_", [user(1)["_id"], "a string", 5])
@pytest.mark.parametrize(
    "notes", [None, {}, {"rev": Int64(0)}, {"rev": Int64(7)}, {"rev": Int64(7), "deleted": True}]
)
def test_the_fast_mode_reads_the_revision_however_it_was_written(id_, notes):
    raw = bson.encode({"_id": id_} if notes is None else {"_id": id_, "_cf": notes})
    text, rev = id_to_text(id_), (notes or {}).get("rev", 0)
    gone = bool(notes and "deleted" in notes)
    look = Revisions()
    assert look.compare(users, text, raw, rev) == (gone, not gone, None if gone else f"{text} {rev}")
    assert look.compare(users, text, raw, rev + 1)[0]
    assert look.compare(users, text, raw, None)[0] is not gone
    assert look.compare(users, text, None, rev)[0]
