import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import resources

import psycopg
import pymongo
import pytest
from bson import ObjectId
from sqlalchemy import create_engine

import scorekeeper.audit.tables
import scorekeeper.friends.tables
import scorekeeper.games.tables
import scorekeeper.identities.tables  # noqa: F401 - registers its tables
from crossfade.bulk.backfill import Backfill
from crossfade.bulk.verify import Verify
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres
from crossfade.values import CODEC_OPTIONS
from scorekeeper.schema import metadata
from scorekeeper.users.entity import users

MIGRATION = "accounts"


def user(number, **fields):
    """A user as the old back end wrote it, with up to 3 friends."""
    made = datetime(2024, 1, 1, 12, 0, 0, 1000 * (number % 1000), tzinfo=UTC)
    return {
        "_id": ObjectId(f"{0x65000000 + number:08x}0123456789abcdef"),
        "username": f"Name{number}",
        "passwordHash": "$2a$12$" + "x" * 53,
        "role": "user",
        "guestMetadata": None,
        "lastLogin": made,
        "profilePicture": None,
        "friends": [ObjectId(f"{0x65000000 + n:08x}0123456789abcdef") for n in range(number % 4)],
        "createdAt": made,
        "updatedAt": made,
        "__v": 0,
        **fields,
    }


class Bench:
    """Both stores of one test, and a backfill or verify on them in a line."""

    def __init__(self, mongo_uri, database_url):
        self.mongo_uri, self.database_url = mongo_uri, database_url
        self.client = pymongo.MongoClient(mongo_uri)
        self.collection = self.client.get_default_database(codec_options=CODEC_OPTIONS)["users"]
        self.sql = psycopg.connect(database_url, autocommit=True)

    def close(self):
        self.client.close()
        self.sql.close()

    def rows(self, query, *parameters):
        return self.sql.execute(query, parameters).fetchall()

    def wait_until(self, query, seconds=30):
        """Until a query gives a row."""
        ends = time.monotonic() + seconds
        while not self.rows(query):
            assert time.monotonic() < ends, query
            time.sleep(0.01)

    def ids(self):
        return [text for [text] in self.rows("SELECT id FROM users ORDER BY id")]

    def content(self):
        """Everything in the entity's tables, and the versions of its rows."""
        return [
            self.rows(f"SELECT xmin::text, * FROM {table} ORDER BY 2, 3")
            for table in ("users", "user_friends", "user_pictures")
        ]

    async def backfill(self, *, epoch=1, restart=False, stop=None, hook=None, **arguments):
        """hook: called with the target before the run, to put something in its way."""
        source, target = BulkMongo(self.mongo_uri), await BulkPostgres.connect(self.database_url)
        try:
            if hook is not None:
                hook(target)
            made = Backfill(users, source, target, migration=MIGRATION, epoch=epoch, **arguments)
            return await made.run(restart=restart, stop=stop)
        finally:
            await target.close()
            await asyncio.to_thread(source.close)

    async def verify(self, *, epoch=1, stop=None, **arguments):
        source, target = BulkMongo(self.mongo_uri), await BulkPostgres.connect(self.database_url)
        try:
            arguments = {"wait": 0.01, "looks": 2, **arguments}
            made = Verify(users, source, target, migration=MIGRATION, epoch=epoch, **arguments)
            return await made.run(stop=stop)
        finally:
            await target.close()
            await asyncio.to_thread(source.close)


@pytest.fixture
def stores(mongo_uri, database_url):
    engine = create_engine(database_url.replace("postgresql://", "postgresql+psycopg://", 1))
    metadata.create_all(engine)
    engine.dispose()
    made = Bench(mongo_uri, database_url)
    made.sql.execute(resources.files("crossfade.stores").joinpath("schema.sql").read_bytes())
    made.sql.execute(
        "INSERT INTO crossfade.control (migration, epoch, record) VALUES (%s, 1, '{}')", [MIGRATION]
    )
    yield made
    made.close()


@pytest.fixture(name="user")
def make_user():
    """The function `user`; test modules cannot import it from here."""
    return user


MAIN = [sys.executable, "-c", "from crossfade.cli.main import main; main()"]


@pytest.fixture
def crossfade(stores, tmp_path):
    """Runs a command, or begins one (``wait=False``), as a user types it; ``status``: that it has to end with."""
    stores.sql.execute("DELETE FROM crossfade.control")
    # Apart from what other tests have running; a socket's path has to be short.
    own = tempfile.mkdtemp(prefix="cf")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "COLUMNS": "200",
        "CROSSFADE_APP": "scorekeeper.migration:accounts",
        "MONGO_URI": stores.mongo_uri,
        "DATABASE_URL": stores.database_url,
        "XDG_RUNTIME_DIR": own,
        **({"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}),
    }

    def run(*words, wait=True, status=0):
        begun = subprocess.Popen(
            [*MAIN, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            env=environment, start_new_session=True,
        )  # fmt: skip
        if not wait:
            return begun
        out, told = begun.communicate(timeout=150)
        assert begun.returncode == status, (words, out, told)
        assert out or "--json" not in words, told
        return json.loads(out.splitlines()[-1]) if "--json" in words else out

    run.environment = environment
    yield run
    shutil.rmtree(own)


@pytest.fixture
def in_dual_write(crossfade):
    crossfade("init")
    crossfade("phase", "set", "dual_write")
    return crossfade


def of_users(report):
    """What a command's report says of its one entity."""
    [one] = report["entities"]
    return one
