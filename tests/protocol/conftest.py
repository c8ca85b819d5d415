"""One small entity on real servers: users, with friends in a table of their own, and one unique rule.

`open_world` opens a worker: a `Crossfade` with short times. Several may be open at once, directly or through a
proxy. Nothing runs behind a test's back unless it asks for it (``background=True``), so a test says when the
reconciler comes by.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psycopg
import pymongo
import pytest
from sqlalchemy import (
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from crossfade import (
    Crossfade,
    DocumentId,
    Entity,
    Options,
    column,
    list_child,
    normalised,
    part_columns,
    record_columns,
    reference,
    single_child,
)
from crossfade.control import Control
from crossfade.record import CF, Image
from crossfade.testing.failure_points import Killed
from crossfade.values import CODEC_OPTIONS, encode_document, id_to_text, text_to_id

SCHEMA = MetaData()
USERS = Table(
    "users",
    SCHEMA,
    Column("id", DocumentId, primary_key=True),
    Column("username", Text, nullable=False),
    Column("username_norm", Text, nullable=False),
    Column("n", Integer),
    Column("updated_at", DateTime(timezone=True)),
    *record_columns(),
    UniqueConstraint("username_norm", name="users_username_norm_key", deferrable=True, initially="IMMEDIATE"),
    # A rule that only PostgreSQL has.
    CheckConstraint("n <> 666", name="users_n_allowed"),
)
FRIENDS = Table(
    "user_friends",
    SCHEMA,
    Column("user_id", DocumentId, ForeignKey("users.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("friend_id", DocumentId, nullable=False),
    reference("friend_ref", "users.id", of="friend_id"),
)
PICTURES = Table(
    "user_pictures",
    SCHEMA,
    Column("user_id", DocumentId, ForeignKey("users.id"), primary_key=True),
    Column("data", LargeBinary, nullable=False),
    *part_columns(),
)


REQUESTS = Table(
    "friend_requests",
    SCHEMA,
    Column("id", DocumentId, primary_key=True),
    Column("sender", DocumentId, nullable=False),
    Column("receiver", DocumentId, nullable=False),
    Column("status", Text, nullable=False),
    reference("sender_ref", "users.id", of="sender"),
    reference("receiver_ref", "users.id", of="receiver"),
    *record_columns(),
)


def requests_entity() -> Entity:
    return Entity(
        "friend_requests",
        collection="friendrequests",
        table=REQUESTS,
        columns=[
            column("sender", required=True),
            column("receiver", required=True),
            column("status", required=True),
        ],
    )


def users_entity(mapping_version: int = 1, *, pictures: bool = False) -> Entity:
    """``pictures``: with a part."""
    picture = single_child("picture", table=PICTURES, owner="user_id", value="data", part=True)
    return Entity(
        "users",
        collection="users",
        table=USERS,
        columns=[column("username", required=True), column("n"), column("updatedAt", to="updated_at")],
        children=[
            list_child("friends", table=FRIENDS, owner="user_id", position="position", value="friend_id"),
            *([picture] if pictures else []),
        ],
        unique=[normalised("username", to="username_norm")],
        mapping_version=mapping_version,
    )


#: Short enough for tests, long enough for two busy cores.
FAST = Options(
    primary_deadline=2.0,
    secondary_deadline=0.5,
    poll=0.05,
    board_age=0.4,
    lease=3.0,
    tentative=0.4,
    reconcile_age=0.2,
    parked_retry=60.0,
    sweep=0,
    full_sweep=0,
    mongo_pool=10,
    postgres_pool=6,
)
#: Against hanging only; no test's meaning depends on it.
PATIENCE = 30.0


@dataclass
class World:
    """One worker, and the two stores as an outsider sees them.

    Attributes:
        cf, m, users: the worker, its migration, the handle of the entity.
        documents: the collection, as a foreign writer with plain PyMongo has it (synchronous).
        mongo_uri, database_url: straight to the servers, past any proxy.
    """

    cf: Crossfade
    m: Any
    entity: Entity
    documents: Any
    database_url: str

    @property
    def users(self) -> Any:
        return self.m.users

    @property
    def mongo(self) -> Any:
        return self.cf.mongo

    @property
    def postgres(self) -> Any:
        return self.cf.postgres

    @property
    def settler(self) -> Any:
        return self.m.settler

    @property
    def control(self) -> Control:
        return self.m.control

    def sql(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Ask PostgreSQL past Crossfade."""
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            cursor = connection.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []

    # --- what the stores hold ---

    def document(self, id_: Any) -> dict[str, Any] | None:
        return self.documents.find_one({"_id": id_})

    def notes(self, id_: Any) -> dict[str, Any]:
        found = self.document(id_)
        assert found is not None, "no such document"
        return found.get(CF, {})

    def debt(self, id_: Any) -> dict[str, Any] | None:
        return self.notes(id_).get("debt")

    async def row(self, id_: Any) -> Image | None:
        return await self.postgres.read(self.entity, id_, timeout=PATIENCE)

    async def image(self, id_: Any) -> Image | None:
        return await self.mongo.read(self.entity, id_, timeout=PATIENCE)

    def tombstone_in_mongo(self, id_: Any) -> dict[str, Any] | None:
        found = self.documents.database["crossfade_tombstones"]
        return found.find_one({"_id": {"entity": "users", "id": id_to_text(id_)}})

    def tombstone_in_postgres(self, id_: Any) -> int | None:
        rows = self.sql("SELECT rev FROM crossfade.tombstones WHERE id = %s", id_to_text(id_))
        return rows[0][0] if rows else None

    def conflicts(self) -> list[tuple[str, dict[str, Any]]]:
        import bson

        rows = self.sql("SELECT store, document FROM crossfade.conflicts ORDER BY number")
        return [(store, bson.decode(bytes(document), CODEC_OPTIONS)) for store, document in rows]

    def quarantined(self) -> list[tuple[str, str]]:
        return self.sql("SELECT id, reason FROM crossfade.quarantine ORDER BY id")  # type: ignore[return-value]

    def outbox(self) -> list[tuple[Any, ...]]:
        return self.sql("SELECT id, rev, tentative IS NOT NULL, parked FROM crossfade.outbox ORDER BY id")

    # --- driving ---

    async def reconcile(self, **how: Any) -> Any:
        """What `crossfade reconcile` does, until nothing but parked debts is left: both stores must be up."""
        async with asyncio.timeout(PATIENCE):
            while True:
                done = await self.m.reconciler.reconcile(**how)
                left = await self.owed()
                if not done.failed and all(debt.parked for debt in left):
                    return done
                await asyncio.sleep(0.05)

    async def owed(self) -> tuple[Any, ...]:
        """The debts that there are now."""
        await self.settle()
        look = await self.m.board.refresh()
        return (*look.owed, *look.deliveries)

    async def settle(self) -> None:
        """Let debts that are confirmed be erased."""
        await self.settler.eraser.join()

    async def postgres_answers(self) -> None:
        """Wait until PostgreSQL is back for this worker, every connection of its pool."""

        async def answers() -> bool:
            return all([(await self.cf.health())["postgres"][0] for _ in range(8)])

        await eventually(answers)

    async def set_phase(self, phase: str, **fields: Any) -> None:
        from crossfade import Phase

        old = (await self.m.board.refresh()).control
        new = old.changed(by="a test", reason="a test", phase=Phase(phase), **fields)
        assert await self.m.record.change(old, new, timeout=PATIENCE)
        await self.m.board.refresh()

    # --- the end of every story ---

    async def contents(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """{id text: (revision, canonical bytes)} of MongoDB and of PostgreSQL."""
        found, rows = {}, {}
        async for image in self.mongo.scan(self.entity, batch=100, timeout=PATIENCE):
            assert isinstance(image, Image)
            assert not image.deleted, f"{image.id}: a delete was left half done"
            found[id_to_text(image.id)] = (image.rev, encode_document(image.document))
        for text, id_, _ in await self.postgres.ids_after(self.entity, "", limit=10_000, timeout=PATIENCE):
            image = await self.row(id_)
            assert image is not None
            rows[text] = (image.rev, encode_document(image.document))
        return found, rows

    async def assert_equal(self) -> None:
        """Both stores hold the same records at the same revisions, and nothing is owed."""
        assert await self.owed() == ()
        found, rows = await self.contents()
        assert found == rows, [self.notes(text_to_id(text)) for text in set(found) ^ set(rows)]
        for text, rev in self.sql("SELECT id, rev FROM crossfade.tombstones"):
            there = found.get(text)
            assert there is None or there[0] > rev, "a record stands at or under its tombstone"
            buried = self.tombstone_in_mongo(text_to_id(text))
            assert buried is None or "debt" not in buried
        await self.m.reconciler.link()
        missed = self.sql(
            "SELECT friend_id FROM user_friends JOIN users ON users.id = friend_id WHERE friend_ref IS NULL"
        )
        assert missed == [], "a link whose target is there was not set"


OpenWorld = Callable[..., Awaitable[World]]


@pytest.fixture
def tables(database_url: str) -> None:
    """The application's tables, as its own migrations would make them."""
    create_tables(database_url)


def create_tables(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        for table in SCHEMA.sorted_tables:
            connection.execute(str(CreateTable(table).compile(dialect=postgresql.dialect())))


@pytest.fixture
async def open_world(mongo_uri, database_url, tables):
    """Opens workers: ``await open_world("dual_write", postgres=postgres_proxy, poll=1.0)``.

    ``mongo``, ``postgres``: the proxy to go through; ``background``: look, settle and reconcile by itself;
    ``enlisted=False``: no worker before its first write, so nobody waits for it to acknowledge an epoch;
    everything else replaces one of `FAST`.
    """

    async def close(cf: Crossfade) -> None:
        try:
            await cf.__aexit__(None, None, None)
        except Killed:  # a process that was killed takes leave of nobody
            await cf.mongo.close()
            await cf.postgres.close()

    async with contextlib.AsyncExitStack() as stack:

        async def open_(
            phase: str = "dual_write",
            *,
            mongo: Any = None,
            postgres: Any = None,
            background: bool = False,
            foreign_writers: bool = False,
            entity: Entity | None = None,
            others: Sequence[Entity] = (),
            enlisted: bool = True,
            **options: Any,
        ) -> World:
            cf = Crossfade(
                mongo_uri=mongo.uri if mongo else mongo_uri,
                database_url=postgres.uri if postgres else database_url,
                initial_phase=phase,
                foreign_writers=foreign_writers,
                # Who never looks again by itself needs a lease for the whole test.
                options=replace(FAST, **({} if background else {"lease": 60.0}) | options),
                background=background,
            )
            entity = entity or users_entity()
            migration = cf.migration("accounts", [entity, *others])
            await cf.__aenter__()
            stack.push_async_callback(close, cf)
            if enlisted and not background:
                await migration.board.obtain_lease()  # else with the first write, in whatever trouble that is
            client = stack.enter_context(pymongo.MongoClient(mongo_uri, tz_aware=True))
            return World(cf, migration, entity, client.get_default_database()["users"], database_url)

        yield open_


MONGO_PHASES = ["dual_write", "postgres_read"]
BOTH_PRIMARIES = ["dual_write", "postgres_read", "postgres_primary"]


async def eventually(holds: Callable[[], Awaitable[bool]], timeout: float = PATIENCE) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(timeout):
        while not await holds():  # noqa: ASYNC110 - what is waited for happens in a server
            await asyncio.sleep(0.02)
