"""The command line, as a user types it: phases, their guards, and one clear error for each mistake."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import bson
import psycopg
import pytest
from bson import ObjectId

from .conftest import Command, Worker, compared, said

pytestmark = pytest.mark.long


async def test_a_migration_goes_all_the_way_and_the_primary_comes_back(
    crossfade: Command, notes: Any, worker: Worker
) -> None:
    assert crossfade("init").returncode == 0
    for step in (
        ("phase", "set", "dual_write"),
        ("backfill",),
        ("verify",),
        ("phase", "set", "shadow_read"),
    ):
        done = crossfade(*step)
        assert done.returncode == 0, (step, done.stdout, done.stderr)
    async with worker() as migration:
        for note in await migration.notes.find(limit=20):
            await migration.notes.get(note.id)
        await compared(migration, 20)
    for step in (
        ("phase", "set", "postgres_read"),
        ("phase", "set", "postgres_primary"),
        ("phase", "set", "postgres_read"),
        ("verify",),
    ):
        done = crossfade(*step)
        assert done.returncode == 0, (step, done.stdout, done.stderr)
    status = json.loads(crossfade("status", "--json").stdout)
    assert status["phase"] == "postgres_read"
    assert status["primary"] == "mongo"
    assert status["debts"]["total"] == 0
    assert {run["kind"]: run["state"] for run in status["runs"]} == {
        "backfill": "complete",
        "verify": "complete",
    }
    history = json.loads(crossfade("history", "--json").stdout)
    assert [row["phase"] for row in history][-1] == "postgres_read"


def test_all_debts_are_counted_however_many_a_board_shows(crossfade: Command, notes: Any) -> None:
    """As many deletes of phase 0 as that."""
    crossfade("init")
    notes.database["crossfade_tombstones"].insert_many(
        {"_id": {"entity": "notes", "id": str(ObjectId())}, "rev": 2, "op": str(n), "debt": True}
        for n in range(2_100)
    )
    crossfade("phase", "set", "dual_write")
    assert json.loads(crossfade("debts", "--json", "--limit", "1").stdout)["total"] == 2_100


def test_the_guard_names_what_is_missing_and_the_command_that_mends_it(
    crossfade: Command, notes: Any
) -> None:
    crossfade("init")
    crossfade("phase", "set", "dual_write")
    done = crossfade("phase", "set", "shadow_read")
    assert done.returncode == 1
    assert "[backfill]" in said(done)
    assert "mend: crossfade backfill" in said(done)


def test_a_verify_is_as_old_as_what_it_compared_first(
    crossfade: Command, notes: Any, database_url: str
) -> None:
    for step in (("init",), ("phase", "set", "dual_write"), ("backfill",), ("verify",)):
        assert crossfade(*step).returncode == 0
    # Interrupted, it went on two days later.
    with psycopg.connect(database_url) as sql:
        sql.execute(
            "UPDATE crossfade.runs SET started_at = started_at - interval '2 days' WHERE kind = 'verify'"
        )
    done = crossfade("phase", "set", "shadow_read")
    assert done.returncode == 1
    assert "[verify]" in said(done)
    assert "mend: crossfade verify --restart" in said(done)
    assert crossfade("verify", "--restart").returncode == 0
    assert crossfade("phase", "set", "shadow_read").returncode == 0


def test_a_guard_is_forced_only_by_name_and_the_history_says_so(crossfade: Command, notes: Any) -> None:
    crossfade("init")
    crossfade("phase", "set", "dual_write")
    assert crossfade("phase", "set", "shadow_read", "--force", "everything").returncode == 2
    done = crossfade("phase", "set", "shadow_read", "--force", "backfill", "--force", "verify")
    assert done.returncode == 0, done.stderr
    assert "forced: backfill, verify" in crossfade("history", "--json").stdout


def test_a_phase_cannot_be_skipped(crossfade: Command, notes: Any) -> None:
    crossfade("init")
    done = crossfade("phase", "set", "postgres_read")
    assert done.returncode == 1
    assert "set dual_write first" in said(done)


def test_an_unknown_phase_lists_the_phases(crossfade: Command) -> None:
    done = crossfade("phase", "set", "postgres_onyl")
    assert done.returncode == 2
    assert "unknown phase 'postgres_onyl'" in said(done)
    assert "5 postgres_only" in said(done)


def test_init_keeps_both_of_two_names_equal_but_for_case(crossfade: Command, notes: Any) -> None:
    notes.insert_many([{"_id": ObjectId(), "title": "Same"}, {"_id": ObjectId(), "title": "same"}])
    done = crossfade("init", "--json")
    assert done.returncode == 1
    assert len(json.loads(done.stdout)["colliding"]["title"]) == 1
    keys = {
        note["title"]: note["_cf"]["keys"]["title"]
        for note in notes.find({"title": {"$in": ["Same", "same"]}})
    }
    assert keys["Same"] == "same"
    assert keys["same"].startswith("same#")


def test_init_names_a_document_that_has_no_room_for_its_key_and_goes_on_with_the_others(
    crossfade: Command, notes: Any
) -> None:
    full, late = {"_id": ObjectId(), "title": "Full", "text": ""}, {"_id": ObjectId(), "title": "Late"}
    full["text"] = "x" * (16 * 2**20 - len(bson.encode(full)))
    notes.insert_many([full, late])
    done = crossfade("init")
    assert done.returncode == 1, (done.stdout, done.stderr)
    [line] = [line for line in done.stdout.splitlines() if "16 MiB" in line]
    assert line.startswith(f"notes {full['_id']}: ")
    assert "its key of title" in line
    assert line.endswith("Make it smaller in MongoDB, then: crossfade init")
    assert notes.find_one({"_id": late["_id"]})["_cf"]["keys"] == {"title": "late"}
    # Phase 1 wants its key, and says who names it.
    done = crossfade("phase", "set", "dual_write")
    assert done.returncode == 1
    assert "crossfade init, which names those that have no room for one" in done.stderr.splitlines()[-1]
    assert crossfade("phase", "set", "dual_write", "--force", "keys").returncode == 0
    notes.update_one({"_id": full["_id"]}, {"$set": {"text": "x"}})
    done = crossfade("init", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["no_room"] == {"title": []}
    assert notes.find_one({"_id": full["_id"]})["_cf"]["keys"] == {"title": "full"}


def test_a_dead_postgres_is_named_with_its_address(crossfade: Command) -> None:
    done = crossfade("init", DATABASE_URL="postgresql://nobody@127.0.0.1:1/nowhere")
    assert done.returncode == 3
    assert "cannot reach PostgreSQL at 127.0.0.1:1" in said(done)
    assert "DATABASE_URL" in said(done)


def test_a_dead_mongo_is_named_with_its_address(crossfade: Command) -> None:
    done = crossfade("init", MONGO_URI="mongodb://127.0.0.1:1/nowhere")
    assert done.returncode == 3
    assert "cannot reach MongoDB at 127.0.0.1:1" in said(done)
    assert "MONGO_URI" in said(done)


def test_a_wrong_password_is_told_and_not_repeated(crossfade: Command, database_url: str) -> None:
    head, tail = database_url.rsplit("@", 1)
    wrong = head.rsplit(":", 1)[0] + ":s3cret-but-wrong@" + tail
    done = crossfade("status", DATABASE_URL=wrong)
    assert done.returncode == 3
    assert "password" in said(done)
    assert "s3cret-but-wrong" not in done.stderr + done.stdout


def test_a_missing_setting_is_named(crossfade: Command) -> None:
    done = crossfade("status", MONGO_URI="")
    assert done.returncode == 2
    assert "MONGO_URI is not set" in said(done)


def test_a_mongo_address_without_a_database_is_explained(crossfade: Command) -> None:
    done = crossfade("status", MONGO_URI="mongodb://127.0.0.1:27017")
    assert done.returncode == 2
    assert "names no database" in said(done)


def test_a_schema_that_is_not_at_head_is_named(crossfade: Command, mongo_uri: str, database_url: str) -> None:
    import psycopg

    with psycopg.connect(database_url) as connection:
        connection.execute("ALTER TABLE notes DROP COLUMN stars")
    done = crossfade("init")
    assert done.returncode == 2
    assert "schema is not at head" in said(done)
    assert "alembic upgrade head" in said(done)


def test_status_before_init_says_what_to_do(crossfade: Command) -> None:
    done = crossfade("status")
    assert done.returncode == 2
    assert "run `crossfade init`" in said(done)


def test_status_without_postgresql_does_not_count_what_it_cannot_ask(crossfade: Command) -> None:
    crossfade("init")
    done = crossfade("status", DATABASE_URL="postgresql://nobody@127.0.0.1:9/none")
    assert done.returncode == 0
    assert "postgres down" in done.stdout
    assert "not known while PostgreSQL is down" in done.stdout
    assert "None" not in done.stdout


def test_an_application_that_cannot_be_loaded_is_explained(crossfade: Command) -> None:
    done = crossfade("status", CROSSFADE_APP="nowhere:notes")
    assert done.returncode == 2
    assert "write module:function" in said(done)


def test_the_version_is_what_is_installed(crossfade: Command) -> None:
    done = crossfade("--version")
    assert done.stdout == f"crossfade {version('crossfade')}\n"
