"""One question has the same answer from both stores, whatever old documents hold; pages join, with no gap."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import psycopg
import pytest
from bson import Decimal128, Int64, MinKey, ObjectId, Regex
from sqlalchemy import Boolean, Column, DateTime, ForeignKey, Integer, MetaData, Table, Text
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import CITEXT, JSONB
from sqlalchemy.schema import CreateTable

from crossfade import (
    ConfigurationError,
    DocumentId,
    Entity,
    any_of,
    column,
    contains,
    ids_at,
    is_set,
    list_child,
    record_columns,
)
from crossfade.query import Query, query

from .conftest import OpenWorld, World

TABLES = MetaData()
PLAYERS = Table(
    "players",
    TABLES,
    Column("id", DocumentId, primary_key=True),
    Column("name", Text),
    Column("n", Integer),
    Column("at", DateTime(timezone=True)),
    Column("gone", Boolean),
    Column("owner", DocumentId),
    Column("role", Text, nullable=False),
    Column("aliases", JSONB),
    Column("alias_by", JSONB),
    *record_columns(),
)
LINKS = Table(
    "player_links",
    TABLES,
    Column("player_id", DocumentId, ForeignKey("players.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("link", DocumentId, nullable=False),
)
OWNER = ObjectId("6" * 24)
OTHER = ObjectId("7" * 24)
DAY = datetime(2024, 1, 1, tzinfo=UTC)

#: Every way in which a document of the old application can be odd, beside plain ones.
DOCUMENTS: list[dict[str, Any]] = [
    {"name": "ann", "n": 1, "at": DAY, "gone": False, "owner": OWNER, "role": "user", "aliases": []},
    {"name": "bob", "n": 2, "at": DAY, "gone": True, "owner": None, "role": "admin", "links": [OWNER, OTHER]},
    {"name": "Bob", "n": Int64(2), "at": DAY + timedelta(1), "owner": str(OWNER), "role": "guest"},
    {"name": "50%_off\\", "n": 2.0, "at": None, "gone": None, "role": "sovereign", "links": [OTHER]},
    {"name": "a\0b", "n": Decimal128("2"), "at": "2024-01-01T12:00:00Z", "gone": "no", "role": None},
    {
        "name": "Żółw",
        "n": 2.5,
        "at": {"$odd": 1},
        "aliases": [{"name": "ann b", "by": OWNER}, {"name": 7}, {"name": "a\0b", "tags": ["x", "yx"]}],
    },
    {"name": None, "n": None, "aliases": {"name": "bob", "by": OTHER}, "links": "none"},
    {"name": 5, "n": "2", "at": DAY - timedelta(1), "aliases": [{"by": OTHER, "on": True}, "bob"]},
    {"n": 2**40, "aliases": [{"name": 'x"y\\'}, {"name": "bob", "by": OWNER, "on": False}]},
    {},
    {"_id": "a text", "name": "ann", "n": 1, "at": DAY, "gone": False},
    # A key that begins with a dollar gives its document another form as JSON; a list in a list is not looked into.
    {"n": 8, "role": "guest", "aliases": [{"$odd": 1, "by": [OWNER, "\0"]}, {"by": "x" * 3000}]},
    {"n": 9, "role": "guest", "aliases": [[{"by": OTHER}], {"by": {"by": OTHER}}]},
    {"_id": "another", "name": "zoe", "n": -1, "at": datetime(1969, 1, 1, tzinfo=UTC)},
]

QUESTIONS: list[Any] = [
    None,
    {},
    [],
    {"name": "ann"},
    {"name": "a\0b"},
    {"name": "a\u2400b"},
    {"name": 5},
    {"name": None},
    {"name": any_of(["ann", "Bob", None])},
    {"name": any_of([])},
    {"name": contains("b")},
    {"name": contains("%_")},
    {"name": contains("\\")},
    {"name": contains("ół")},
    {"name": contains("")},
    {"name": contains(".")},
    {"name": contains("\0")},
    {"n": 2},
    {"n": 2.0},
    {"n": 2.5},
    {"n": any_of([1, 2**40])},
    {"n": None, "name": None},
    {"at": DAY},
    {"at": datetime(2024, 1, 1, 12, tzinfo=UTC)},
    {"at": DAY.replace(tzinfo=None)},
    {"at": DAY.astimezone(timezone(timedelta(hours=5)))},
    {"at": any_of([DAY + timedelta(microseconds=7)])},
    {"at": None},
    {"gone": False},
    {"gone": any_of([False, None])},
    {"gone": any_of([True, "no"])},
    {"owner": OWNER},
    {"owner": any_of([OWNER, str(OWNER)])},
    {"role": "user"},
    {"role": any_of(["user", "admin"])},
    {"role": "sovereign"},
    {"owner": is_set()},
    {"at": is_set(), "gone": is_set()},
    {"name": is_set(), "n": None},
    {"_id": "a text"},
    {"_id": any_of(["a text", "another", OWNER])},
    {"aliases.name": "bob"},
    {"aliases.name": any_of(["ann b", 'x"y\\'])},
    {"aliases.name": contains("b")},
    {"aliases.name": contains('"y\\')},
    {"aliases.by": any_of([OWNER, str(OTHER)])},
    {"aliases.by": OTHER},
    {"aliases.by": "\0"},
    {"aliases.by": any_of([])},
    {"aliases.on": True},
    {"aliases.name": "a\0b"},
    {"aliases.tags": "x"},
    {"aliases.tags": contains("x")},
    {"aliases": "bob"},
    {"links": OTHER},
    [{"name": contains("nn")}, {"aliases.name": contains("nn")}],
    [{"name": "ann", "n": 1}, {"gone": True}, {"n": 2, "role": "guest"}],
]


def id_of(number: int) -> Any:
    return DOCUMENTS[number].get("_id", ObjectId(f"{number + 1:024x}"))


def players_entity() -> Entity:
    return Entity(
        "players",
        collection="players",
        table=PLAYERS,
        columns=[
            column(
                "name", stand_in=lambda value: value.replace("\0", "\u2400") if type(value) is str else None
            ),
            column("n"),
            column("at"),
            column("gone"),
            column("owner"),
            column(
                "role",
                missing="user",
                stand_in=lambda _: "user",
                fits={"user", "admin", "guest"}.__contains__,
            ),
            column("aliases"),
        ],
        nested_ids=[ids_at("aliases.by", to="alias_by")],
        children=[list_child("links", table=LINKS, owner="player_id", position="position", value="link")],
    )


@pytest.fixture
def players_tables(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        for table in TABLES.sorted_tables:
            connection.execute(str(CreateTable(table).compile(dialect=postgresql.dialect())))


@pytest.fixture
async def world(open_world: OpenWorld, players_tables: None) -> World:
    """Old documents of an application that has never heard of us, brought to PostgreSQL."""
    w = await open_world("postgres_read", others=[players_entity()])
    documents = w.documents.database["players"]
    documents.insert_many({"_id": id_of(n), **document} for n, document in enumerate(DOCUMENTS))
    await w.m.reconciler.full_sweep()
    await w.m.board.refresh()
    return w


async def both(w: World, asked: Query) -> tuple[list[Any], list[Any]]:
    entity = w.m.entities["players"]
    from_mongo = await w.m.pair.mongo.find(entity, asked, timeout=5.0)
    from_postgres = await w.m.pair.postgres.find(entity, asked, timeout=5.0)
    return [image.document for image in from_mongo], [image.document for image in from_postgres]


def by_id(documents: list[Any]) -> list[Any]:
    return sorted(documents, key=lambda document: str(document["_id"]))


async def test_both_stores_find_and_count_the_same_records(world: World) -> None:
    entity = world.m.entities["players"]
    found_by: dict[str, int] = {}
    for where in QUESTIONS:
        asked = query("players", where, order_by="_id", after=None, limit=100, skip=0)
        assert world.m.pair.postgres.can_find(entity, asked.where, asked.order), where
        from_mongo, from_postgres = await both(world, asked)
        assert by_id(from_mongo) == by_id(from_postgres), where
        counts = [
            await store.count(entity, asked.where, timeout=5.0)
            for store in (world.m.pair.mongo, world.m.pair.postgres)
        ]
        assert counts == [len(from_mongo)] * 2, where
        found_by[str(where)] = len(from_mongo)
    # Some of the answers, so that two stores that find nothing are not taken for right.
    assert found_by["{}"] == len(DOCUMENTS)
    assert found_by["[]"] == 0
    assert found_by["{'n': 2}"] == 4
    assert found_by["{'gone': AnyOf(values=(False, None))}"] == len(DOCUMENTS) - 2
    # A date is the same one in whatever zone, and kept in milliseconds.
    dates = [found for said, found in found_by.items() if said.startswith("{'at': ") and "2024, 1, 1" in said]
    assert sorted(dates) == [0, 3, 3, 3, 3]
    assert found_by["{'role': 'user'}"] == 8
    assert found_by["{'aliases.name': 'bob'}"] == 2
    assert found_by["{'links': ObjectId('777777777777777777777777')}"] == 2


#: A list where the mapping knows a single value: to MongoDB's own words it is each of its elements, too.
LISTS: list[dict[str, Any]] = [
    {"name": ["ann", "x"], "n": [2], "at": [DAY], "gone": [True], "owner": [OWNER], "role": ["user"]},
    {"name": [None, "b"], "n": [], "owner": [None], "role": [None]},
]


async def test_a_list_in_the_place_of_a_single_value_is_none_of_its_elements(world: World) -> None:
    documents = world.documents.database["players"]
    documents.insert_many({"_id": f"list {n}", **document} for n, document in enumerate(LISTS))
    await world.m.reconciler.full_sweep()
    found = 0
    for where in QUESTIONS:
        asked = query("players", where, order_by="_id", after=None, limit=100, skip=0)
        from_mongo, from_postgres = await both(world, asked)
        assert by_id(from_mongo) == by_id(from_postgres), where
        found += sum(str(document["_id"]).startswith("list") for document in from_mongo)
    assert found > 4  # everything, and what is set
    # As in MongoDB's own words where the list itself is asked for: PostgreSQL has no column for it.
    assert [r.id for r in await world.m["players"].find({"n": [2]})] == ["list 0"]
    # And beside others, which are still nobody's elements: "b" is one of the second's.
    named = {r.id for r in await world.m["players"].find({"name": any_of([["ann", "x"], "zoe", "b"])})}
    assert named == {"list 0", "another"}


def place_of(document: dict[str, Any], order_by: str) -> tuple[Any, ...]:
    field = order_by.removeprefix("-")
    return (document["_id"],) if field == "_id" else (document.get(field), document["_id"])


@pytest.mark.parametrize(
    "order_by", ["_id", "-_id", "name", "-name", "n", "-n", "at", "-at", "gone", "-owner"]
)
async def test_pages_join_without_gap_or_repetition(world: World, order_by: str) -> None:
    whole = await both(world, query("players", None, order_by=order_by, after=None, limit=100, skip=0))
    for store, everything in enumerate(whole):
        assert len(everything) == len(DOCUMENTS)
        for size in (1, 5):
            walked: list[Any] = []
            place = None
            while True:
                asked = query("players", None, order_by=order_by, after=place, limit=size, skip=0)
                page = (await both(world, asked))[store]
                if not page:
                    break
                walked += page
                place = place_of(page[-1], order_by)
            assert walked == everything, (order_by, size)
        skipped = (await both(world, query("players", None, order_by=order_by, after=None, limit=4, skip=3)))[
            store
        ]
        assert skipped == everything[3:7]


async def test_pages_join_where_a_value_is_no_number(world: World) -> None:
    documents = world.documents.database["players"]
    for value in (math.nan, Decimal128("NaN"), -math.inf, math.inf, Decimal128("-2")):
        documents.insert_one({"n": value})
    await assert_pages_join(world)


async def test_pages_join_where_a_list_is_in_the_place_of_a_value(world: World) -> None:
    """To an order of MongoDB it is the least of its elements, or the greatest."""
    documents = world.documents.database["players"]
    lists: tuple[list[Any], ...] = (
        [2, 9], [9, 2, 5], [None, 4], [-1, "a"], ["z", "b"], [True], [2], [DAY, 3], [{"a": 1}, {"a": 0}], [0.5, DAY],
        [[1]], [b"b", b"aa"], [Decimal128("7"), math.nan],
    )  # fmt: skip
    for value in lists:
        documents.insert_one({"n": value})
    await assert_pages_join(world)
    # Beside null an empty one has its place from the server: before it, or among it.
    documents.delete_one({"n": [None, 4]})
    for _ in range(2):
        documents.insert_one({"n": []})
    await assert_pages_join(world, {"n": is_set()})


async def test_no_page_begins_behind_what_has_no_place_in_an_order(world: World) -> None:
    asked = query("players", None, order_by="n", after=(MinKey(), id_of(0)), limit=100, skip=0)
    with pytest.raises(ConfigurationError, match="cannot begin behind a value of type MinKey"):
        await both(world, asked)


async def assert_pages_join(world: World, where: Any = None) -> None:
    await world.m.reconciler.full_sweep()
    for order_by in ("n", "-n"):
        whole = await both(world, query("players", where, order_by=order_by, after=None, limit=100, skip=0))
        for store, everything in enumerate(whole):
            for number, document in enumerate(everything[:-1]):
                asked = query(
                    "players", where, order_by=order_by, after=place_of(document, order_by), limit=100, skip=0
                )
                behind = (await both(world, asked))[store]
                assert [each["_id"] for each in behind] == [each["_id"] for each in everything[number + 1 :]]


async def test_a_page_begins_behind_a_date_in_whatever_zone_it_is_said(world: World) -> None:
    place = DAY.astimezone(timezone(timedelta(hours=5))) + timedelta(microseconds=7)
    for order_by in ("at", "-at"):
        asked = [
            query("players", None, order_by=order_by, after=(value, id_of(0)), limit=100, skip=0)
            for value in (DAY, place)
        ]
        assert await both(world, asked[0]) == await both(world, asked[1])


async def test_both_stores_have_one_order_where_values_fit_their_columns(world: World) -> None:
    plain = {"_id": any_of(map(id_of, range(4)))}
    for order_by in ("name", "-name", "n", "-n", "at", "-at", "gone", "-gone"):
        one, other = await both(
            world, query("players", plain, order_by=order_by, after=None, limit=100, skip=0)
        )
        assert one == other, order_by
    newest, _ = await both(world, query("players", plain, order_by="-at", after=None, limit=100, skip=0))
    assert [each["name"] for each in newest] == ["Bob", "bob", "ann", "50%_off\\"]


async def test_many_records_are_had_in_one_round_trip_in_the_order_asked_for(world: World) -> None:
    players = world.m["players"]
    found = await players.get_many([id_of(3), ObjectId(), id_of(0), id_of(3), "a text"])
    assert [record.id for record in found] == [id_of(3), id_of(0), "a text"]
    assert {record.source for record in found} == {"postgres"}
    assert await players.get_many([]) == []


async def test_whom_postgres_lacks_among_many_is_asked_of_mongo(open_world: OpenWorld) -> None:
    w = await open_world("postgres_read", foreign_writers=True)
    made = await w.users.insert({"username": "Ann"})
    await w.settle()
    await w.m.board.refresh()
    newcomer = ObjectId()
    w.documents.insert_one({"_id": newcomer, "username": "Bob"})
    assert [r.source for r in await w.users.get_many([made.id])] == ["postgres"]
    found = await w.users.get_many([newcomer, made.id])
    assert [(r.id, r.source) for r in found] == [(newcomer, "mongo"), (made.id, "mongo")]


async def test_one_debt_sends_only_those_who_ask_for_it_to_the_primary(open_world: OpenWorld) -> None:
    w = await open_world("postgres_read", board_age=30.0)
    owed, other = [await w.users.insert({"username": name}) for name in "ab"]
    await w.settle()
    w.documents.update_one({"_id": owed.id}, {"$set": {"_cf.debt": {"epoch": 1}}})
    await w.m.board.refresh()
    assert [r.source for r in await w.users.get_many([other.id])] == ["postgres"]
    assert {r.source for r in await w.users.get_many([other.id, owed.id])} == {"mongo"}


async def test_what_postgres_has_no_column_for_is_asked_of_mongo_until_it_decides(world: World) -> None:
    players = world.m["players"]
    assert [r.source for r in await players.find({"unheard_of": None}, limit=1)] == ["mongo"]
    assert [r.source for r in await players.find(order_by="role", limit=1)] == ["mongo"]
    await world.set_phase("postgres_primary")
    with pytest.raises(ConfigurationError, match="cannot be searched by _id, unheard_of"):
        await players.find({"unheard_of": 1})
    for wrong in ({"limit": 0}, {"skip": -1}, {"after": (1, 2)}, {"after": (OWNER,), "skip": 1}):
        with pytest.raises(ConfigurationError, match=r"find\("):
            await players.find(**wrong)
    with pytest.raises(ConfigurationError, match=r"without \[\]"):
        await players.count({"aliases[].name": "bob"})


MALFORMED: list[tuple[Any, str]] = [
    ({"$x": 1}, r"'players' has the operator '\$x'.*any_of"),
    ({"n": {"$gt": 1}}, r"'players' has the operator '\$gt' in 'n'.*any_of"),
    ([{"n": 1}, {"$or": []}], r"'players' has the operator '\$or'"),
    ({"n": any_of([1, {"$in": [2]}])}, r"operator '\$in' in 'n'"),
    ({"name": any_of([contains("b")])}, "has Contains in 'name' for a value"),
    ({"name": re.compile("b")}, "has Pattern in 'name' for a value"),
    ({"name": any_of([Regex("b")])}, "has Regex in 'name' for a value"),
    ({"name": contains(5)}, "contains\\(\\) of int in 'name'"),
    ({"name": is_set}, "can be met by no record: field name holds a value that has no BSON form"),
    ({"name": ["\ud800"]}, "can be met by no record: field name holds text that is not valid Unicode"),
    ({"n": 2**64}, "can be met by no record: field n holds an integer of more than 64 bits"),
    ({"na\0me": 1}, "NUL in its name"),
    ({"": 1}, "has the key '', which names no field"),
    ({"aliases..name": "b"}, "which names no field"),
    ({5: 1}, "has the key 5, which names no field"),
    ("name", "is str: write a mapping"),
    (["name"], "is list: write a mapping"),
]
PHASES = ["mongo_only", "dual_write", "shadow_read", "postgres_read", "postgres_primary", "postgres_only"]


async def test_a_condition_that_cannot_be_is_the_callers_error_in_every_phase_and_no_store_is_asked(
    open_world: OpenWorld, players_tables: None, mongo_proxy: Any, postgres_proxy: Any
) -> None:
    w = await open_world("dual_write", mongo=mongo_proxy, postgres=postgres_proxy, others=[players_entity()])
    players = w.m["players"]
    for phase in PHASES:
        await w.set_phase(phase)
        before = mongo_proxy.counts.requests, postgres_proxy.counts.requests
        for where, words in MALFORMED:
            for ask in (players.find, players.find_one, players.count):
                with pytest.raises(ConfigurationError, match=words):
                    await ask(where)
        for order_by in ("$natural", "", "-", "name."):
            with pytest.raises(ConfigurationError, match="order_by= of 'players'"):
                await players.find(order_by=order_by)
        for after in ((object(), OWNER), ("ann", [OWNER]), ("ann", "\ud800")):
            with pytest.raises(ConfigurationError, match="after= of 'players'"):
                await players.find(order_by="name", after=after)
        for condition, words in (
            ({"$x": 1}, r"an update of 'players' has the operator '\$x'.*top-level field"),
            ({"n": {"$gt": 1}}, r"operator '\$gt' in 'n'"),
            ({"n": any_of([1])}, "has AnyOf in 'n' for a value"),
            ({"aliases.name": "bob"}, r"the path 'aliases\.name'"),
        ):
            with pytest.raises(ConfigurationError, match=words):
                await players.update(OWNER, {"n": 1}, where=condition)
        assert (mongo_proxy.counts.requests, postgres_proxy.counts.requests) == before
    assert (w.m.pair.mongo_breaker.failures, w.m.pair.postgres_breaker.failures) == (0, 0)


async def test_what_no_store_can_hold_is_nobodys(world: World) -> None:
    for where in ({"name": "\ud800"}, {"name": contains("\ud800")}, {"role": any_of(["\ud800"])}):
        assert await world.m["players"].find(where) == [], where
    count = world.m["players"].count
    assert await count({"name": any_of(["ann", "\ud800"])}) == await count({"name": "ann"}) > 0
    for where in ({"_id": [OWNER]}, {"_id": any_of([None, [OWNER], "x" * 3000])}, {"links": "x" * 3000}):
        asked = query("players", where, order_by="_id", after=None, limit=100, skip=0)
        assert await both(world, asked) == ([], []), where


async def test_an_insert_that_a_delete_overtook_takes_nobodys_place_in_a_list(
    open_world: OpenWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, other = await open_world("shadow_read"), await open_world("shadow_read")
    id_, look, insert = ObjectId(), w.mongo.tombstone, w.mongo.insert
    later = (await other.users.insert({"username": "Zoe", "n": 5})).id
    seen: dict[str, Any] = {}

    async def overtaken(entity: Any, id_: Any, **how: Any) -> Any:
        found = await look(entity, id_, **how)
        monkeypatch.setattr(w.mongo, "tombstone", look)
        await other.users.insert({"_id": id_, "username": "Bob"})
        await other.users.delete(id_)
        return found

    async def watched(entity: Any, document: Any, **how: Any) -> None:
        await insert(entity, document, **how)
        monkeypatch.setattr(w.mongo, "insert", insert)
        for order_by in ("_id", "-_id"):
            seen[order_by] = [
                found.id for found in await other.users.find({"n": 5}, order_by=order_by, limit=1)
            ]
        seen["one"] = await other.users.find_one({"n": 5})

    monkeypatch.setattr(w.mongo, "tombstone", overtaken)
    monkeypatch.setattr(w.mongo, "insert", watched)
    await w.users.insert({"_id": id_, "username": "Alice", "n": 5})
    assert seen["_id"] == seen["-_id"] == [later]
    assert seen["one"].id == later


#: As the extension makes it, which not every server has.
IGNORING_CASE = """
CREATE TYPE citext;
CREATE FUNCTION citextin(cstring) RETURNS citext AS 'textin' LANGUAGE internal IMMUTABLE STRICT;
CREATE FUNCTION citextout(citext) RETURNS cstring AS 'textout' LANGUAGE internal IMMUTABLE STRICT;
CREATE TYPE citext (INPUT = citextin, OUTPUT = citextout, LIKE = text, CATEGORY = 'S', COLLATABLE = true);
CREATE CAST (citext AS text) WITHOUT FUNCTION AS IMPLICIT;
CREATE CAST (text AS citext) WITHOUT FUNCTION AS ASSIGNMENT;
CREATE FUNCTION citext_eq(citext, citext) RETURNS bool LANGUAGE sql IMMUTABLE
    AS 'SELECT lower($1::text) = lower($2::text)';
CREATE FUNCTION citext_like(citext, text) RETURNS bool LANGUAGE sql IMMUTABLE
    AS 'SELECT lower($1::text) LIKE lower($2)';
CREATE OPERATOR = (LEFTARG = citext, RIGHTARG = citext, PROCEDURE = citext_eq);
CREATE OPERATOR ~~ (LEFTARG = citext, RIGHTARG = text, PROCEDURE = citext_like)
"""


async def test_a_column_that_ignores_letter_case_is_taken_for_the_text_that_it_holds(
    open_world: OpenWorld, database_url: str
) -> None:
    tagged = Table(
        "tagged", MetaData(), Column("id", DocumentId, primary_key=True), Column("tag", CITEXT), *record_columns()
    )  # fmt: skip
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(IGNORING_CASE)
        connection.execute(str(CreateTable(tagged).compile(dialect=postgresql.dialect())))
    entity = Entity("tagged", collection="tagged", table=tagged, columns=[column("tag")])
    w = await open_world("postgres_read", others=[entity])
    w.documents.database["tagged"].insert_many(
        {"_id": f"{n}", "tag": tag}
        for n, tag in enumerate(["bob", "Bob", "BOB", "ann", "Ann", "bobby", None])
    )
    await w.m.reconciler.full_sweep()

    async def found(where: Any, **how: Any) -> list[list[Any]]:
        asked = query("tagged", where, limit=how.pop("limit", 100), skip=0, **{"after": None} | how)
        answers = [await store.find(entity, asked, timeout=5.0) for store in (w.mongo, w.postgres)]
        return [[image.document["tag"] for image in images] for images in answers]

    for where, tags in (
        ({"tag": "Bob"}, ["Bob"]),
        ({"tag": any_of(["bob", "Ann"])}, ["bob", "Ann"]),
        ({"tag": contains("ob")}, ["bob", "Bob", "bobby"]),
    ):
        assert await found(where, order_by="_id") == [tags, tags], where
    in_order = [None, "Ann", "BOB", "Bob", "ann", "bob", "bobby"]
    assert await found(None, order_by="tag") == [in_order] * 2
    assert await found(None, order_by="tag", after=("Bob", "1")) == [in_order[4:]] * 2
