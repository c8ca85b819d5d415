"""The primary moved from the command line, as a user types it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from crossfade.phase import Phase

from .conftest import Command, Worker, said

pytestmark = pytest.mark.long


def test_the_primary_goes_over_and_back_step_by_step(crossfade: Command, notes: Any) -> None:
    for step in (
        ("init",), ("advance",), ("backfill",), ("verify",), ("advance",), ("advance", "--force", "shadow"),
        ("switch", "--dry-run"),
    ):  # fmt: skip
        done = crossfade(*step)
        assert done.returncode == 0, (step, done.stdout, done.stderr)
    shown = crossfade("switch")
    steps = ["compare", "announce", "fence", "drain", "verify", "decide", "resume", "report"]
    found = [shown.stdout.find(f"{number} {step}") for number, step in enumerate(steps)]
    assert -1 not in found, shown.stdout
    assert found == sorted(found), shown.stdout
    assert "postgres is primary" in shown.stdout
    assert crossfade("workers").returncode == 0
    chosen = crossfade("strategy", "prioritize_mongo")
    assert "not allowed in phase postgres_primary" in said(chosen)
    assert json.loads(crossfade("strategy", "rollback_both", "--json").stdout) == {
        "strategy": "rollback_both"
    }
    back = json.loads(crossfade("back", "--json", "--reason", "to see it").stdout)
    assert back["phase"] == "postgres_read"
    assert back["held"]["failed"] == 0
    history = json.loads(crossfade("history", "--json").stdout)
    assert [row["state"] for row in history[-4:]] == ["announced", "switching", "prepared", "steady"]
    assert history[-1]["reason"] == "to see it"
    assert crossfade("switch", "--abort").returncode == 1
    assert "no switch of notes is under way" in said(crossfade("switch", "--resume"))
    assert "nothing to resolve" in said(crossfade("switch", "--resolve", "--primary", "postgres"))


def test_each_statement_of_a_guard_says_whether_it_holds_why_and_what_mends_it(
    crossfade: Command, notes: Any
) -> None:
    crossfade("init")
    crossfade("advance")
    done = crossfade("advance", "--dry-run", "--json")
    assert done.returncode == 1
    statements = {statement["name"]: statement for statement in json.loads(done.stdout)}
    assert statements["reachable"]["holds"]
    assert not statements["backfill"]["holds"]
    assert statements["backfill"]["mend"] == "crossfade backfill"
    assert "not backfilled" in statements["backfill"]["why"]


@pytest.mark.parametrize("words", [("back",), ("phase", "set", "postgres_primary")], ids=["back", "set"])
async def test_what_would_be_refused_is_not_told_to_be_open(
    crossfade: Command, worker: Worker, words: tuple[str, ...]
) -> None:
    async with worker("postgres_only"):
        pass  # where MongoDB is not fed
    for more in ((), ("--dry-run",)):
        done = crossfade(*words, *more)
        assert done.returncode == 1, (more, done.stdout)
        assert "MongoDB is no longer fed" in said(done)


async def test_a_phase_that_is_skipped_or_under_way_is_not_told_to_be_open(
    crossfade: Command, worker: Worker
) -> None:
    async with worker("postgres_read") as migration:
        assert "the migration is in phase postgres_read already" in said(
            crossfade("phase", "set", "postgres_read", "--dry-run")
        )
        assert "set postgres_primary first" in said(crossfade("phase", "set", "postgres_only", "--dry-run"))
        now = migration.control
        coming = now.announced(
            Phase.POSTGRES_PRIMARY, by="somebody", reason="", limit=2.0, coordinator="gone", forced=()
        )
        assert await migration.record.change(now, coming, timeout=5)
        assert "is switching to postgres_primary" in said(crossfade("switch", "--dry-run"))


async def test_a_switch_that_is_asked_for_in_two_ways_is_not_made(crossfade: Command, worker: Worker) -> None:
    async with worker("postgres_read") as migration:
        assert "--primary is for --resolve" in said(crossfade("switch", "--primary", "mongo"))
        now = migration.control
        coming = now.announced(
            Phase.POSTGRES_PRIMARY, by="somebody", reason="", limit=2.0, coordinator="gone", forced=()
        )
        assert await migration.record.change(now, coming, timeout=5)
        for way in ("--abort", "--resume"):
            assert "exclude each other" in said(crossfade("switch", way, "--dry-run"))
        assert (await migration.board.refresh()).control == coming
