"""The way into phase 5, back, and to MongoDB's end, as typed."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest

from .conftest import Command, Worker, said

pytestmark = pytest.mark.long


async def test_phase_5_wants_a_reverse_check_and_valid_constraints_and_ends_in_retiring(
    crossfade: Command, notes: Any, worker: Worker, database_url: str
) -> None:
    notes.delete_many({})
    async with worker("postgres_primary") as migration:
        for n in range(5):
            await migration.notes.insert({"title": f"n{n}", "stars": n})
    with psycopg.connect(database_url) as connection:
        connection.execute("ALTER TABLE notes ADD CONSTRAINT few_stars CHECK (stars < 9) NOT VALID")
    refused = said(crossfade("phase", "set", "postgres_only"))
    assert "[verify] notes was not verified" in refused
    assert "notes.few_stars (mend: crossfade validate-constraints)" in refused
    assert crossfade("verify").returncode == 0
    validated = crossfade("validate-constraints", "--json")
    assert json.loads(validated.stdout) == {"validated": ["notes.few_stars"]}
    for phase in ("postgres_only", "postgres_primary"):
        done = crossfade("phase", "set", phase)
        assert done.returncode == 0, done.stderr
    # The evidence of one stay in phase 4 says nothing of the next.
    assert "[verify]" in said(crossfade("phase", "set", "postgres_only"))
    assert crossfade("phase", "set", "postgres_only", "--force", "verify").returncode == 0

    looked = crossfade("retire", "--json")
    assert looked.returncode == 1
    assert json.loads(looked.stdout)["documents"] == {"notes": 5}
    assert "name the migration" in said(crossfade("retire", "--apply"))
    done = crossfade("retire", "notes", "--apply", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["retired"]
    assert all("_cf" not in note for note in notes.find())
    assert "no longer fed" in said(crossfade("phase", "set", "postgres_primary"))
