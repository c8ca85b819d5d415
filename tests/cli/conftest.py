"""A small application, its commands as a user types them, and workers of it in this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pymongo
import pytest
from bson import ObjectId
from sqlalchemy import create_engine

sys.path.insert(0, str(Path(__file__).parent))
from notes_app import metadata
from notes_app import notes as entities

from crossfade import Crossfade, Migration, Options

Command = Callable[..., subprocess.CompletedProcess[str]]
Worker = Callable[..., contextlib.AbstractAsyncContextManager[Migration]]


@pytest.fixture
def crossfade(mongo_uri: str, database_url: str, tmp_path: Path) -> Command:
    engine = create_engine(database_url.replace("postgresql://", "postgresql+psycopg://", 1))
    metadata.create_all(engine)
    engine.dispose()

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from crossfade.cli.main import main; main()", *words],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "COLUMNS": "200",
                "PYTHONPATH": os.pathsep.join(
                    [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
                ),
                "CROSSFADE_APP": "notes_app:notes",
                "MONGO_URI": mongo_uri,
                "DATABASE_URL": database_url,
                "CROSSFADE_SHADOW_COMPARISONS": "20",
                **environment,
            },
        )

    return run


@pytest.fixture
def notes(mongo_uri: str) -> Any:
    with pymongo.MongoClient[dict[str, Any]](mongo_uri) as client:
        collection = client.get_default_database()["notes"]
        collection.insert_many([{"_id": ObjectId(), "title": f"note {n}", "stars": n} for n in range(20)])
        yield collection


@pytest.fixture
def worker(mongo_uri: str, database_url: str) -> Worker:
    """A worker of the application in this process, which compares every read; a new migration begins in ``phase``."""

    @contextlib.asynccontextmanager
    async def open_(phase: str | None = None) -> AsyncIterator[Migration]:
        options = Options(shadow_sample=1.0, shadow_looks=(0.05, 0.1), shadow_flush=3600.0)
        cf = Crossfade(mongo_uri=mongo_uri, database_url=database_url, initial_phase=phase, options=options)
        migration = cf.migration("notes", entities())
        async with cf:
            yield migration

    return open_


async def compared(migration: Migration, number: int) -> None:
    """Wait until this worker has compared so many reads."""
    async with asyncio.timeout(30):
        while sum(each.total() for each in migration.shadow._counts.values()) < number:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    await migration.shadow.flush()


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error, and no more than that."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]
