"""Document -> rows -> document gives back an equal document, or the document is refused with a reason."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from bson import Binary, DatetimeMS, Decimal128, Int64, ObjectId
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg import sql
from psycopg.types.json import set_json_loads
from sqlalchemy import (
    CHAR,
    REAL,
    BigInteger,
    Boolean,
    Column,
    Computed,
    DateTime,
    Double,
    Enum,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    SmallInteger,
    String,
    Table,
    Text,
    Uuid,
    create_engine,
    select,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import JSONB

from crossfade.entity import (
    META_COLUMNS,
    DocumentId,
    Entity,
    Rows,
    column,
    ids_at,
    ignoring_case,
    list_child,
    normalised,
    record_columns,
    single_child,
)
from crossfade.errors import ConfigurationError
from crossfade.testing import bson_strategies as bs
from crossfade.values import MAX_DEPTH, Unmappable, encode_document, load_json

unhurried = settings(deadline=None)  # a busy machine is no failure
ME, FRIEND, OTHER = (ObjectId(bytes([n]) * 12) for n in (1, 2, 3))
NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)

# -- a mapping like that of the reference service ------------------------------------------------------------

metadata = MetaData()
user_table = Table(
    "users",
    metadata,
    Column("id", DocumentId, primary_key=True),
    Column("username", String(50), nullable=False),
    Column("username_norm", Text),
    Column("password_hash", Text),
    Column("role", Enum("user", "admin", "guest", name="role"), nullable=False),
    Column("guest_metadata", JSONB),
    Column("last_login", DateTime(timezone=True)),
    Column("created_at", DateTime(timezone=True)),
    Column("updated_at", DateTime(timezone=True)),
    *record_columns(),
)
user_friends = Table(
    "user_friends",
    metadata,
    Column("user_id", DocumentId, primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("friend_id", DocumentId, nullable=False),
)
user_pictures = Table(
    "user_pictures",
    metadata,
    Column("user_id", DocumentId, primary_key=True),
    Column("content_type", Text, nullable=False),
    Column("data", LargeBinary, nullable=False),
)


def picture_to_columns(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, str) or not value.startswith("data:"):
        return None
    head, found, body = value.partition(";base64,")
    try:
        return {"content_type": head[5:], "data": base64.b64decode(body)} if found else None
    except ValueError:
        return None


def picture_from_columns(columns: Mapping[str, Any]) -> str:
    return f"data:{columns['content_type']};base64,{base64.b64encode(columns['data']).decode()}"


def readable(value: Any) -> str | None:
    return None if value is None else str(value).replace("\0", "")[:50]


users = Entity(
    "users",
    collection="users",
    table=user_table,
    columns=[
        column("username", stand_in=readable),
        column("passwordHash", to="password_hash"),
        column("role", missing="user", stand_in=lambda _value: "guest"),
        column("guestMetadata", to="guest_metadata"),
        column("lastLogin", to="last_login"),
        column("createdAt", to="created_at"),
        column("updatedAt", to="updated_at"),
    ],
    children=[
        single_child(
            "profilePicture",
            table=user_pictures,
            owner="user_id",
            split=(picture_to_columns, picture_from_columns),
        ),
        list_child("friends", table=user_friends, owner="user_id", position="position", value="friend_id"),
    ],
    unique=[normalised("username", to="username_norm")],
    order=[
        "username",
        "passwordHash",
        "role",
        "guestMetadata",
        "lastLogin",
        "profilePicture",
        "friends",
        "createdAt",
        "updatedAt",
    ],
)


def user(**changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "_id": ME,
        "username": "Bob",
        "passwordHash": None,
        "role": "user",
        "guestMetadata": None,
        "lastLogin": NOON,
        "profilePicture": None,
        "friends": [FRIEND, OTHER],
        "createdAt": NOON,
        "updatedAt": NOON,
        "__v": 3,
    }
    plain.update(changes)
    return {name: value for name, value in plain.items() if value is not Ellipsis}


# -- a table with a column of every type -----------------------------------------------------------

every_table = Table(
    "every",
    metadata,
    Column("id", DocumentId, primary_key=True),
    Column("text", Text),
    Column("short", String(5)),
    Column("choice", Enum("a", "b", name="choice")),
    Column("at", DateTime(timezone=True)),
    Column("tiny", SmallInteger),
    Column("int", Integer),
    Column("long", BigInteger),
    Column("double", Double),
    Column("price", Numeric(10, 2)),
    Column("number", Numeric),
    Column("flag", Boolean),
    Column("data", LargeBinary),
    Column("uuid", Uuid),
    Column("any", JSONB),
    Column("ref", DocumentId),
    *record_columns(),
)
every_value = Table(
    "every_value",
    metadata,
    Column("owner", DocumentId, primary_key=True),
    Column("value", BigInteger, nullable=False),
)
every_list = Table(
    "every_list",
    metadata,
    Column("owner", DocumentId, primary_key=True),
    Column("place", Integer, primary_key=True),
    Column("value", Text),
)
every_part = Table(
    "every_part",
    metadata,
    Column("owner", DocumentId, primary_key=True),
    Column("place", Integer, primary_key=True),
    Column("name", Text, nullable=False),
    Column("changed", DateTime(timezone=True)),
)


def part_to_columns(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict) or list(value) != ["name", "changed"]:
        return None
    return dict(value)


EVERY = [c.name for c in every_table.columns][1:16]
every = Entity(
    "every",
    collection="every",
    table=every_table,
    columns=[column(name) for name in EVERY],
    children=[
        single_child("one", table=every_value, owner="owner", value="value"),
        list_child("many", table=every_list, owner="owner", position="place", value="value"),
        list_child("parts", table=every_part, owner="owner", position="place", split=(part_to_columns, dict)),
    ],
)

EXACT: dict[str, list[Any]] = {
    "text": ["", "x" * 10_000, "a\tb", "日本", None],
    "short": ["12345", "日本日本日"],
    "choice": ["a", "b"],
    "at": [datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999000, tzinfo=UTC), NOON],
    "tiny": [-(2**15), 2**15 - 1],
    "int": [-(2**31), 2**31 - 1, 0],
    "long": [Int64(-(2**63)), Int64(2**63 - 1), Int64(5)],
    "double": [0.1, -0.0, 1e308, 5e-324, float("inf"), float("-inf"), 1e16],
    "price": [Decimal128("1.10"), Decimal128("-99999999.99"), Decimal128("0.00")],
    "number": [Decimal128("1.10"), Decimal128("0"), Decimal128("1234567890123456789012345678901234")],
    "flag": [True, False],
    "data": [b"", b"\0\xff"],
    "uuid": [Binary(bytes(range(16)), 4)],
    "any": [1, "x", {"b": 1, "a": [NOON]}, ["a\0"], False, Int64(1)],
    "ref": [ME, "bob", 5, "a\0b", {"a": 1}],
    "one": [Int64(7)],
    "many": [[], ["b", "a", "a"], [None, "x"]],
    "parts": [[], [{"name": "x", "changed": NOON}, {"name": "y", "changed": None}]],
}
"""Values that a column or child table holds itself, so that nothing is left for `extra`."""

BEYOND = Decimal128.from_bid(bytes.fromhex("ff" * 14 + "4130"))
"""Bits of a decimal with more than 34 digits, which the standard reads as zero and no driver writes."""

INEXACT: dict[str, list[tuple[Any, Any]]] = {
    "text": [("a\0b", None), (5, None), (b"x", None)],
    "short": [("123456", None)],
    "choice": [("c", None)],
    "at": [
        (DatetimeMS(2**60), None),
        ("2024-05-01T12:00:00.000Z", NOON),
        ("2024-05-01T14:00:00+02:00", NOON),
        ("yesterday", None),
        ("2024-05-01", None),
        (0, None),
    ],
    "tiny": [(2**15, None), (3.0, 3)],
    "int": [
        (Int64(5), 5),
        (5.0, 5),
        (5.5, None),
        (Decimal128("5"), 5),
        (2**31, None),
        (True, None),
        (Decimal128("sNaN"), None),
    ],
    "long": [(5, 5), (5.0, 5), (1e30, None), ("5", None), (float("nan"), None), (float("inf"), None)],
    "double": [
        (5, 5.0),
        (Int64(2**53 + 1), 2.0**53),
        (Decimal128("0.5"), 0.5),
        (Decimal128("sNaN"), None),
        (Decimal128("1E+6000"), None),
    ],
    "price": [(1, Decimal(1)), (2.5, Decimal("2.5")), (Decimal128("1.1"), Decimal("1.1")), (1e9, None)],
    "number": [
        (Decimal128("1E+3"), Decimal(1000)),
        (Decimal128("-0"), Decimal(0)),
        (float("nan"), None),
        (BEYOND, Decimal(0)),
        (Decimal128("sNaN"), None),
    ],
    "flag": [(1, None), ("true", None)],
    "data": [(Binary(b"x", 128), b"x"), ("x", None)],
    "uuid": [(Binary(bytes(16), 3), None), (Binary(b"x", 4), None)],
    "ref": [([1], None)],
}
"""Values that are kept in `extra`, and what the column says meanwhile."""


def there_and_back(entity: Entity, document: Mapping[str, Any]) -> Rows:
    rows = entity.to_rows(document)
    assert len(rows.parent) == len(entity.parent_columns)
    assert encode_document(entity.from_rows(rows.parent, rows.children)) == encode_document(document)
    return rows


def parent_of(entity: Entity, rows: Rows) -> dict[str, Any]:
    return dict(zip(entity.parent_columns, rows.parent, strict=True))


# -- any document ----------------------------------------------------------------------------------


def carried_or_refused(entity: Entity, document: Mapping[str, Any]) -> Rows | None:
    """Rows of a document, or None where it is refused for one of the reasons that a document may have."""
    try:
        return there_and_back(entity, document)
    except Unmappable as refusal:
        reason = refusal.reason
    no_name = "must have a value" in reason and document.get("username") is None
    long_id = "too long for an index" in reason and len(encode_document({"v": document["_id"]})) > 1000
    assert no_name or long_id, reason
    return None


@settings(max_examples=150, deadline=None)
@given(bs.user_documents())
def test_a_user_comes_back_as_it_was(document: dict[str, Any]) -> None:
    rows = carried_or_refused(users, document)
    # The second time the shape is known, and the compiled way takes what it can.
    assert repr(carried_or_refused(users, document)) == repr(rows)


@unhurried
@example({"_id": None, "$ref": "", "$id": []})
@given(bs.bson_documents())
def test_any_document_comes_back_as_it_was_or_is_refused(document: dict[str, Any]) -> None:
    for entity in (users, every):
        assert repr(carried_or_refused(entity, document)) == repr(carried_or_refused(entity, document))


@unhurried
@given(st.fixed_dictionaries({}, optional={name: bs.bson_values(4) for name in EXACT}))
def test_a_column_of_any_type_meets_a_value_of_any_type(fields: dict[str, Any]) -> None:
    rows = there_and_back(every, {"_id": 1, **fields})
    assert repr(there_and_back(every, {"_id": 1, **fields})) == repr(rows)


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in EXACT for value in EXACT[field]])
def test_a_value_that_fits_is_in_its_column_and_nowhere_else(field: str, value: Any) -> None:
    parent = parent_of(every, there_and_back(every, {"_id": ME, field: value}))
    assert parent["extra"] is None


@pytest.mark.parametrize(
    ("field", "value", "useful"), [(field, *case) for field, cases in INEXACT.items() for case in cases]
)
def test_a_value_that_does_not_fit_is_whole_in_extra_and_useful_in_its_column(
    field: str, value: Any, useful: Any
) -> None:
    parent = parent_of(every, there_and_back(every, {"_id": ME, field: value}))
    assert encode_document(load_json(parent["extra"])) == encode_document({field: value})
    assert parent[field] == useful
    assert type(parent[field]) is type(useful)


def test_both_ways_to_rows_agree() -> None:
    for document in (
        user(),
        user(role=...),
        user(guestMetadata={"createdByUserId": ME}),
        user(x=[1, {"$y": 1}]),
    ):
        careful = users._to_rows_carefully(document, None)
        assert users._compiled_to_rows(document, None) == careful == users.to_rows(document)


# -- what a person sees in the tables ------------------------------------------------------------------------


def test_a_plain_user_lies_in_columns() -> None:
    rows = users.to_rows(user())
    assert parent_of(users, rows) == {
        "id": str(ME),
        "username": "Bob",
        "password_hash": None,
        "role": "user",
        "guest_metadata": None,
        "last_login": NOON,
        "created_at": NOON,
        "updated_at": NOON,
        "username_norm": "bob",
        "extra": b'{"__v":3}',
        "cf_shape": None,
    }
    assert rows.children == ((), ((str(ME), 0, str(FRIEND)), (str(ME), 1, str(OTHER))))
    assert [child.columns for child in users.children] == [
        ("user_id", "content_type", "data"),
        ("user_id", "position", "friend_id"),
    ]


def test_a_picture_lies_as_bytes_in_its_own_table() -> None:
    rows = there_and_back(users, user(profilePicture="data:image/png;base64,AAEC"))
    assert rows.children[0] == ((str(ME), "image/png", b"\0\1\2"),)


@pytest.mark.parametrize(
    "text", ["data:image/png;base64,AA\nEC", "data:image/png;base64,AAF=", "no picture", 5]
)
def test_a_picture_that_would_come_back_altered_stays_in_extra(text: Any) -> None:
    rows = there_and_back(users, user(profilePicture=text))
    assert rows.children[0] == ()
    assert load_json(parent_of(users, rows)["extra"])["profilePicture"] == text


def test_an_absent_role_means_user_in_sql_and_stays_absent_in_the_document() -> None:
    rows = there_and_back(users, user(role=...))
    assert parent_of(users, rows)["role"] == "user"
    assert "role" not in users.from_rows(rows.parent, rows.children)


def test_a_value_without_an_exact_column_has_its_stand_in_there() -> None:
    parent = parent_of(users, there_and_back(users, user(username="B\0b", role="owner")))
    assert (parent["username"], parent["role"]) == ("Bb", "guest")
    assert parent["username_norm"] == "b\u2400b"


@pytest.mark.parametrize(
    "friends", [..., None, [], [ME], [FRIEND, FRIEND], ["bob", 5, FRIEND], [[1]], [None], "x", {}]
)
def test_missing_null_empty_and_odd_lists_of_friends_stay_apart(friends: Any) -> None:
    there_and_back(users, user(friends=friends))


def test_friends_of_any_kind_of_id_are_rows_and_anything_else_keeps_the_list_whole() -> None:
    assert len(users.to_rows(user(friends=["bob", 5, FRIEND, FRIEND])).children[1]) == 4
    assert users.to_rows(user(friends=[FRIEND, [1]])).children[1] == ()


def test_rows_of_children_may_come_in_any_order() -> None:
    rows = users.to_rows(user())
    picture, friends = rows.children
    assert users.from_rows(rows.parent, (picture, friends[::-1]))["friends"] == [FRIEND, OTHER]


def test_the_order_of_fields_is_kept() -> None:
    document = dict(reversed(user(z=1, a=2).items()))
    rows = there_and_back(users, document)
    assert list(users.from_rows(rows.parent, rows.children)) == ["_id", *(n for n in document if n != "_id")]


def test_a_document_as_an_application_writes_it_gives_the_rows_of_what_mongodb_stores() -> None:
    written = user(
        lastLogin=datetime(2024, 5, 1, 12, 0, 0, 999), createdAt=NOON, friends=(FRIEND, OTHER), _cf={"rev": 9}
    )
    assert users.to_rows(written) == users.to_rows(user())


def test_a_date_is_cut_to_the_milliseconds_that_mongodb_keeps() -> None:
    users.to_rows(user())  # its shape is known from here on
    assert users.to_rows(user(lastLogin=NOON.replace(microsecond=999))) == users.to_rows(user())


def test_bookkeeping_is_left_out() -> None:
    assert users.to_rows(user(_cf={"rev": 1})) == users.to_rows(user())


def test_shapes_remembered_are_bounded() -> None:
    entity = Entity("t", collection="t", table=small_table(), columns=[column("a")])
    for n in range(3000):
        entity.to_rows({"_id": 1, "a": "x", f"k{n}": 1})
    entity.to_rows({"_id": 1, "k" * 10_000: 1})
    assert len(entity._shapes) <= 1024
    assert sum(len(name) for names in entity._shapes for name in names) < 100_000


# -- refusals --------------------------------------------------------------------------------------


def small_table(*more: Column[Any], leave_out: Sequence[str] = ()) -> Table:
    columns = [Column("id", DocumentId, primary_key=True), Column("a", Text), *record_columns(), *more]
    return Table("small", MetaData(), *(c for c in columns if c.name not in leave_out))


@pytest.mark.parametrize("document", [{"_id": ME}, {"_id": ME, "need": None}, {"_id": ME, "need": 5}])
def test_a_column_that_must_have_a_value_and_has_none_refuses_the_record(document: dict[str, Any]) -> None:
    table = small_table(Column("need", Text, nullable=False))
    entity = Entity("small", collection="small", table=table, columns=[column("need")])
    with pytest.raises(Unmappable, match=r"'need' .*small\.need") as refused:
        entity.to_rows(document)
    assert refused.value.field == "need"


def test_required_may_be_asked_of_a_nullable_column() -> None:
    entity = Entity("t", collection="t", table=small_table(), columns=[column("a", required=True)])
    with pytest.raises(Unmappable, match="must have a value"):
        entity.to_rows({"_id": 1})


def test_a_missing_value_may_come_from_the_document() -> None:
    table = small_table(Column("made", DateTime(timezone=True), nullable=False))
    made = column("made", missing=lambda document: document["_id"].generation_time)
    entity = Entity("t", collection="t", table=table, columns=[made])
    rows = there_and_back(entity, {"_id": ME})
    assert rows.parent[1] == ME.generation_time


def test_a_check_of_the_column_decides_too() -> None:
    long = column("a", fits=lambda text: len(text) > 2)
    entity = Entity("t", collection="t", table=small_table(), columns=[long])
    for _ in range(2):
        assert there_and_back(entity, {"_id": 1, "a": "xx"}).parent[1:3] == (None, b'{"a":"xx"}')
        assert there_and_back(entity, {"_id": 1, "a": "xxx"}).parent[1:3] == ("xxx", None)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"username": "x"}, "no _id"),
        ({"_id": [1]}, "cannot be an _id"),
        ({"_id": "x" * 3000}, "2000 bytes"),
        (user(x="\ud800"), "lone surrogate"),
        (user(username="\udfff"), "lone surrogate"),
        (user(x=2**70), "64 bits"),
        (user(x=object()), "no BSON form"),
    ],
)
def test_a_document_that_cannot_be_carried_is_refused(document: dict[str, Any], words: str) -> None:
    for _ in range(2):
        with pytest.raises(Unmappable, match=words):
            users.to_rows(document)


def test_a_function_of_the_mapping_that_fails_refuses_the_record_and_is_named() -> None:
    def fail(_value: Any) -> Any:
        raise KeyError("oops")

    table = small_table(Column("key", Text))
    for columns, unique, children in (
        ([column("a", stand_in=fail)], [], []),
        ([column("a")], [normalised("b", to="key", normalise=fail)], []),
        ([column("a")], [], [single_child("b", table=every_value, owner="owner", split=(fail, fail))]),
    ):
        entity = Entity("t", collection="t", table=table, columns=columns, unique=unique, children=children)
        with pytest.raises(Unmappable, match="KeyError"):
            entity.to_rows({"_id": 1, "a": 5, "b": "x"})


@pytest.mark.parametrize(
    ("name", "value"),
    [("ref", "bob"), ("any", b"{"), ("any", b'{"$oid": 1}'), ("short", "123456"), ("tiny", 2**20)],
)
def test_a_stand_in_that_its_column_could_not_give_back_is_not_used(name: str, value: Any) -> None:
    stand_in = column(name, stand_in=lambda _value: value)
    entity = Entity("t", collection="t", table=every_table, columns=[stand_in])
    assert there_and_back(entity, {"_id": 1, name: [[1]] if name != "any" else None}).parent[1] is None


def test_a_mapping_that_does_not_give_the_document_back_refuses_it() -> None:
    answers = iter(["x", "y"])  # right when it is checked, wrong when the document is put together
    split = (lambda _: {"value": 1}), (lambda _: next(answers))
    child = single_child("b", table=every_value, owner="owner", split=split)
    entity = Entity("t", collection="t", table=small_table(), columns=[column("a")], children=[child])
    with pytest.raises(Unmappable, match="carried back unchanged"):
        entity.to_rows({"_id": 1, "b": "x"})


def test_rows_of_another_origin_are_refused() -> None:
    parent, children = users.to_rows(user()).parent, users.to_rows(user()).children
    for wrong in (
        ("bob", *parent[1:]),
        parent[:-1],
        (*parent[:-1], b'["nobody"]'),
        (*parent[:-2], b"{", None),
    ):
        with pytest.raises(ValueError):
            users.from_rows(wrong, children)


# -- unique rules ----------------------------------------------------------------------------------


def test_keys_are_normalised_and_can_be_replaced() -> None:
    assert users.keys(user(username=" BoB ")) == {"username": "bob"}
    assert users.keys(user(username=5)) == {}
    assert parent_of(users, users.to_rows(user()))["username_norm"] == "bob"
    assert parent_of(users, users.to_rows(user(), {"username": "bob~2"}))["username_norm"] == "bob~2"
    assert parent_of(users, users.to_rows(user(username=5), {"username": "5"}))["username_norm"] == "5"


def test_a_long_key_is_shortened_to_what_an_index_takes_and_stays_its_own() -> None:
    keys = [users.keys(user(username="日" * 5000 + end))["username"] for end in ("a", "b", "b")]
    assert keys[0] != keys[1] == keys[2]
    assert {len(key) for key in keys} == {500}


games = Entity(
    "games",
    collection="games",
    table=Table(
        "games",
        MetaData(),
        Column("id", DocumentId, primary_key=True),
        Column("data", JSONB),
        Column("player_ids", JSONB),
        *record_columns(),
    ),
    columns=[column("data")],
    nested_ids=[ids_at("data.players.id", to="player_ids")],
)


def player_ids(document: dict[str, Any]) -> list[str] | None:
    found = games.to_rows(document).parent[games.parent_columns.index("player_ids")]
    return None if found is None else json.loads(found)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ({"players": [{"id": FRIEND}, {"id": str(FRIEND)}, {"id": FRIEND}]}, [str(FRIEND), f"s:{FRIEND}"]),
        ({"players": {"id": [FRIEND, OTHER]}}, [str(FRIEND), str(OTHER)]),
        # An odd key puts the whole document into another form of JSON; what is searched by does not change.
        ({"$odd": 1, "players": [{"$odd": 2, "id": FRIEND}]}, [str(FRIEND)]),
        # MongoDB looks into an array on the way, and not into one inside of it.
        ({"players": [[{"id": FRIEND}], "id", None]}, None),
        ([{"players": [{"id": OTHER}]}], [str(OTHER)]),
        ({"players": [{"id": "x" * 3000}, {"id": "\0"}]}, ['j:{"$utf8":"AA=="}']),
        ({"players": []}, None),
        (None, None),
    ],
)
def test_ids_inside_a_document_have_a_column_to_be_searched_by(data: Any, found: list[str] | None) -> None:
    document = {"_id": ME, "data": data}
    for _ in ("careful", "compiled"):
        assert player_ids(document) == found
        rows = games.to_rows(document)
        assert games.from_rows(rows.parent, rows.children) == document
    assert player_ids({"_id": ME}) is None


@pytest.mark.parametrize(
    ("path", "to", "words"),
    [
        ("data..id", "player_ids", "no path"),
        ("_id.x", "player_ids", "no path"),
        ("data.id", "cf_digest", "keeps for itself"),
        ("data.id", "other", "does not exist"),
        ("data.id", "data", "both go to"),
    ],
)
def test_ids_to_search_by_that_cannot_be_kept_are_refused(path: str, to: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Entity(
            "games",
            collection="games",
            table=games.table,
            columns=[column("data")],
            nested_ids=[ids_at(path, to=to)],
        )


def test_a_key_that_the_column_must_have_and_cannot_refuses_the_record() -> None:
    table = small_table(Column("key", String(3), nullable=False))
    rule = normalised("a", to="key", rule="r")
    entity = Entity("t", collection="t", table=table, columns=[column("a")], unique=[rule])
    for document, words in (({"_id": 1}, "no key"), ({"_id": 1, "a": "long"}, "cannot hold")):
        with pytest.raises(Unmappable, match=words):
            entity.to_rows(document)
    assert ignoring_case(" Ab ") == "ab"


# -- declarations that do not fit ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "arguments", "words"),
    [
        (small_table(leave_out=["cf_rev", "extra"]), {}, "lacks extra, cf_rev; add \\*record_columns"),
        (small_table(leave_out=["id"]), {}, "no id column"),
        (small_table(), {"columns": [column("b")]}, "'b' goes to small.b, which does not exist"),
        (small_table(), {"columns": [column("x", to="extra")]}, "keeps for itself"),
        (small_table(), {"columns": [column("a"), column("b", to="a")]}, "'a' and 'b' both go to small.a"),
        (
            small_table(Column("b", Text)),
            {"columns": [column("a"), column("a", to="b")]},
            "'a' is mapped twice",
        ),
        (small_table(), {"columns": [column("_id", to="a")]}, "'_id'"),
        (small_table(Column("n", Text, nullable=False)), {}, "no field goes to small.n"),
        (
            small_table(Column("n", Text, nullable=False)),
            {"columns": [column("n", required=False)]},
            "required=False",
        ),
        (small_table(Column("n", REAL)), {"columns": [column("n")]}, "small.n of the type REAL"),
        (small_table(Column("n", CHAR(3))), {"columns": [column("n")]}, "cannot give BSON values back"),
        (small_table(Column("n", DateTime)), {"columns": [column("n")]}, "cannot give BSON values back"),
        (small_table(Column("n", Text, Computed("a"))), {"columns": [column("n")]}, "computes"),
        (small_table(), {"columns": [column("a", missing=5)]}, "missing=5"),
        (small_table(), {"columns": [column("a")], "order": ["a", "b"]}, "differ in b"),
        (small_table(), {"unique": [normalised("a", to="key")]}, "rule a.* does not exist"),
        (small_table(Column("n", Integer)), {"unique": [normalised("a", to="n")]}, "no text"),
        (
            small_table(Column("k", Text), Column("l", Text)),
            {"unique": [normalised("a", to="k"), normalised("a", to="l")]},
            "one name",
        ),
        (
            small_table(),
            {"children": [single_child("b", table=every_value, owner="owner", value="nothing")]},
            "every_value.nothing, which does not exist",
        ),
        (
            small_table(),
            {"children": [single_child("b", table=every_value, owner="value", value="owner")]},
            "owner column value",
        ),
        (
            small_table(),
            {"children": [single_child("b", table=user_friends, owner="user_id", value="friend_id")]},
            "no field goes to user_friends.position",
        ),
    ],
)
def test_a_declaration_that_does_not_fit_its_table_says_what_to_change(
    table: Table, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words) as refused:
        Entity("things", **{"collection": "things", "table": table, "columns": [], **arguments})
    assert str(refused.value).startswith("entity 'things': ")


def test_a_child_has_either_a_value_or_a_split() -> None:
    with pytest.raises(ConfigurationError, match="either"):
        single_child("b", table=every_value, owner="owner")


def test_an_id_column_takes_ids_and_id_text() -> None:
    statement = select(user_table.c.username).where(user_table.c.id == ME)
    compiled = statement.compile(dialect=postgresql.dialect())
    convert = compiled._bind_processors["id_1"]
    assert convert(ME) == convert(str(ME)) == str(ME)
    assert convert(5) == "j:5"
    assert 'COLLATE "C"' in DocumentId().dialect_impl(postgresql.dialect()).compile(postgresql.dialect())


# -- a real PostgreSQL -----------------------------------------------------------------------------


def write(connection: psycopg.Connection[Any], entity: Entity, rows: Rows) -> None:
    meta = (1, None, b"d", 1)
    insert(connection, entity.table.name, (*entity.parent_columns, *META_COLUMNS), [(*rows.parent, *meta)])
    for child, made in zip(entity.children, rows.children, strict=True):
        insert(connection, child.table.name, child.columns, made)


def insert(
    connection: psycopg.Connection[Any], table: str, columns: Sequence[str], rows: Sequence[Any]
) -> None:
    statement = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
        sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL(", ").join(sql.Placeholder() * len(columns)),
    )  # fmt: skip
    types = {c.name: c.type for c in metadata.tables[table].columns}
    for row in rows:
        values = [
            value.decode() if isinstance(value, bytes) and isinstance(types[name], JSONB) else value
            for name, value in zip(columns, row, strict=True)
        ]
        connection.execute(statement, values)


def read(connection: psycopg.Connection[Any], entity: Entity, id_text: str) -> dict[str, Any]:
    def fetch(table: Table, columns: Sequence[str], key: str) -> list[Any]:
        statement = sql.SQL("SELECT {} FROM {} WHERE {} = %s").format(
            sql.SQL(", ").join(map(sql.Identifier, columns)), sql.Identifier(table.name), sql.Identifier(key)
        )
        return connection.execute(statement, [id_text]).fetchall()

    (parent,) = fetch(entity.table, entity.parent_columns, "id")
    return entity.from_rows(
        parent, [fetch(child.table, child.columns, child.columns[0]) for child in entity.children]
    )


@pytest.fixture
def connection(database_url: str) -> Any:
    engine = create_engine(database_url.replace("postgresql://", "postgresql+psycopg://"))
    metadata.create_all(engine)
    engine.dispose()
    with psycopg.connect(database_url) as connection:
        connection.execute("SET TIME ZONE 'UTC'")
        set_json_loads(lambda text: text, connection)
        yield connection


unisolated = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@unisolated
@given(documents=st.lists(bs.user_documents(), min_size=1, max_size=5))
def test_users_come_back_from_postgresql(connection: Any, documents: list[dict[str, Any]]) -> None:
    for document in documents:
        write_and_compare(connection, users, document)


@unisolated
@given(
    document=st.fixed_dictionaries(
        {"_id": bs.ids()},
        optional={
            name: st.one_of(
                bs.bson_values(3),
                st.sampled_from(EXACT[name]),
                st.sampled_from([value for value, _ in INEXACT.get(name, [(None, None)])]),
            )
            for name in EXACT
        },
    )
)
@example(document={"_id": 1, "double": -0.0, "at": datetime(9999, 12, 31, 23, 59, 59, 999000, tzinfo=UTC)})
def test_every_type_of_column_gives_its_values_back(connection: Any, document: dict[str, Any]) -> None:
    write_and_compare(connection, every, document)


def test_every_listed_value_comes_back_from_postgresql(connection: Any) -> None:
    for field, values in EXACT.items():
        for value in [*values, *(value for value, _ in INEXACT.get(field, []))]:
            write_and_compare(connection, every, {"_id": ME, field: value})


def test_the_deepest_documents_come_back_from_postgresql(connection: Any) -> None:
    for key in ("a", "$a"):
        deep: Any = 1
        for _ in range(MAX_DEPTH - 2):
            deep = {key: deep}
        write_and_compare(connection, every, {"_id": ME, "any": deep, "other": deep})


def write_and_compare(connection: psycopg.Connection[Any], entity: Entity, document: dict[str, Any]) -> None:
    rows = carried_or_refused(entity, document)
    if rows is None:
        return
    with connection.transaction(force_rollback=True):
        write(connection, entity, rows)
        assert encode_document(read(connection, entity, rows.parent[0])) == encode_document(document)
