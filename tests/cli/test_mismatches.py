"""What a shadow read found to differ, as a person sees it and sees to it."""

from __future__ import annotations

import json

import psycopg
import pytest

from .conftest import Command, Worker, compared, said

pytestmark = pytest.mark.long


@pytest.fixture
async def differing(crossfade: Command, worker: Worker, database_url: str) -> str:
    """In phase 2, one note of ten was changed in PostgreSQL, and read; its id."""
    async with worker("shadow_read") as migration:
        made = [await migration.notes.insert({"title": f"note {n}", "stars": n}) for n in range(10)]
        with psycopg.connect(database_url) as connection:
            connection.execute("UPDATE notes SET stars = 99, cf_digest = '' WHERE title = 'note 3'")
        for note in made:
            await migration.notes.get(note.id)
        assert await migration.notes.count() == 10
        await compared(migration, 11)
    return str(made[3].id)


async def test_a_mismatch_is_listed_shown_mended_and_resolved(crossfade: Command, differing: str) -> None:
    listed = crossfade("mismatches", "list", "--json")
    assert listed.returncode == 1
    [one] = json.loads(listed.stdout)["mismatches"]
    assert (one["entity"], one["id"], one["cause"]) == ("notes", differing, "different")
    assert (one["fields"], one["seen"], one["resolved_at"]) == (["stars"], 1, None)
    assert "note 3" not in crossfade("mismatches", "list").stdout, "values are shown to nobody"

    refused = crossfade("phase", "set", "postgres_read")
    assert refused.returncode == 1
    assert "[shadow] 1 records were read otherwise" in said(refused)
    status = json.loads(crossfade("status", "--json").stdout)
    assert status["shadow"]["open"] == 1

    shown = crossfade("mismatches", "show", "notes", differing, "--json")
    assert shown.returncode == 1
    assert json.loads(shown.stdout)["now"]["cause"] == "different"
    stays = crossfade("mismatches", "resolve", "--json")
    assert stays.returncode == 1
    assert json.loads(stays.stdout) == {
        "resolved": 0,
        "open": [{"entity": "notes", "id": differing, "now": "different stars"}],
    }

    assert crossfade("verify").returncode == 1
    assert crossfade("repair", "--apply").returncode == 0
    assert json.loads(crossfade("mismatches", "resolve", "--json").stdout) == {"resolved": 1, "open": []}
    assert crossfade("mismatches", "list").returncode == 0
    [kept] = json.loads(crossfade("mismatches", "list", "--all", "--json").stdout)["mismatches"]
    assert kept["resolved_why"] == "the same in both stores"
    lacking = said(crossfade("phase", "set", "postgres_read"))
    assert "[shadow] 11 of 20 reads compared" in lacking


async def test_a_mismatch_is_accepted_by_name_with_a_reason(crossfade: Command, differing: str) -> None:
    assert crossfade("mismatches", "resolve", "--accept", "known").returncode == 2
    unknown = crossfade("mismatches", "show", "notes", "0" * 24)
    assert unknown.returncode == 2
    assert "no mismatch" in said(unknown)
    assert (
        crossfade("mismatches", "resolve", "notes", differing, "--accept", "counted by hand").returncode == 0
    )
    [kept] = json.loads(crossfade("mismatches", "list", "--all", "--json").stdout)["mismatches"]
    assert kept["resolved_why"] == "counted by hand"


async def test_too_few_comparisons_are_forced_by_name_only(crossfade: Command, differing: str) -> None:
    crossfade("mismatches", "resolve", "notes", differing, "--accept", "a test")
    rest = ("--force", "backfill", "--force", "verify")
    refused = crossfade("phase", "set", "postgres_read", *rest)
    assert "[shadow] 11 of 20 reads compared" in said(refused)
    assert crossfade("phase", "set", "postgres_read", *rest, "--force", "shadow").returncode == 0
    assert "forced: backfill, verify, shadow" in crossfade("history", "--json").stdout


def test_a_setting_that_is_no_part_of_the_reads_is_named(crossfade: Command) -> None:
    done = crossfade("status", CROSSFADE_SHADOW_SAMPLE="2")
    assert done.returncode == 2
    assert "CROSSFADE_SHADOW_SAMPLE is '2'" in said(done)
