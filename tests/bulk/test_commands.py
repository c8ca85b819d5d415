"""The commands, as a user types them, on a legacy database with its dirt."""

import json
import os
import signal
import subprocess
import sys

import bson
import pymongo
import pytest
from bson.raw_bson import RawBSONDocument

from scorekeeper.legacy import DirtRates, generate

pytestmark = pytest.mark.long

MAIN = [sys.executable, "-c", "from crossfade.cli.main import main; main()"]


@pytest.fixture
def command(stores, tmp_path):
    # `init` writes the control record.
    stores.sql.execute("DELETE FROM crossfade.control")
    environment = {
        "PATH": os.environ["PATH"],
        "COLUMNS": "200",
        "CROSSFADE_APP": "scorekeeper.migration:accounts",
        "MONGO_URI": stores.mongo_uri,
        "DATABASE_URL": stores.database_url,
        **({"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}),
    }

    def run(*words, **more):
        return subprocess.run(
            [*MAIN, *words],
            capture_output=True,
            text=True,
            timeout=150,
            cwd=tmp_path,
            env={**environment, **more},
        )

    run.environment = environment
    run.folder = tmp_path
    return run


@pytest.fixture
def legacy(stores):
    sizes = {"playeridentities": 300, "friendrequests": 0, "games": 0, "wizard": 0, "tablegames": 0}
    with pymongo.MongoClient(stores.mongo_uri) as client:
        generate(
            client.get_default_database(), seed=3, users=1500, sizes=sizes, rates=DirtRates(lone_surrogate=0)
        )
    return stores


def with_lone_surrogate(document):
    """As another language's driver could write it; Python's refuses to."""
    raw = bson.encode({**document, "username": "half X\ue000 pair"})
    return RawBSONDocument(raw.replace("\ue000".encode(), b"\xed\xa0\x80"))


def report_of(done):
    return json.loads(done.stdout.splitlines()[-1])


def test_a_legacy_database_is_rehearsed_moved_and_verified(legacy, command, user):
    rehearsed = command("backfill", "--dry-run", "--json", "--report", "dry.json")
    assert rehearsed.returncode in (0, 1), rehearsed.stderr
    dry = json.loads((command.folder / "dry.json").read_text())
    assert [one["entity"] for one in dry["entities"]][:3] == ["users", "friend_requests", "identities"]
    assert dry["entities"][0]["read"] == 1500
    assert dry["entities"][0]["collisions"] > 0
    assert legacy.ids() == []

    refused = command("backfill")
    assert refused.returncode == 2
    assert "crossfade init" in refused.stderr
    assert command("init").returncode in (0, 1)
    refused = command("backfill")
    assert refused.returncode == 1
    assert "dual_write" in refused.stderr
    assert command("phase", "set", "dual_write").returncode == 0

    # Comes from an old writer, in the middle of it all.
    broken = user(77_777)
    legacy.collection.insert_one(with_lone_surrogate(broken))
    done = command("backfill", "--json", "--batch-size", "400")
    assert done.returncode in (0, 1), done.stderr
    report = report_of(done)
    moved = report["entities"][0]
    assert (moved["state"], moved["counts"]["read"]) == ("complete", 1501)
    assert moved["counts"]["quarantined"] == dry["entities"][0]["quarantined"] + 1
    assert moved["counts"]["parked"] == 0
    assert done.returncode == (1 if report["found"] else 0)

    verified = command("verify", "--json")
    found = report_of(verified)
    assert verified.returncode == 0, found
    assert found["entities"][0]["counts"]["mismatches"] == 0
    quarantined = found["entities"][0]["counts"]["quarantined"]
    assert quarantined == moved["counts"]["quarantined"]

    again = report_of(command("backfill", "--json", "--entity", "users"))
    assert again["entities"][0]["counts"]["inserted"] == 0
    assert again["entities"][0]["counts"]["same"] + quarantined == 1501

    legacy.sql.execute(
        "UPDATE users SET role = 'admin' WHERE id = (SELECT min(id) FROM users WHERE role = 'user')"
    )
    verified = command("verify", "--entity", "users")
    assert verified.returncode == 1
    assert "different role" in verified.stdout


def test_quarantine_is_listed_and_shown(stores, command, user):
    bad = user(1)
    del bad["username"]
    stores.collection.insert_one(bad)
    stores.sql.execute(
        "INSERT INTO crossfade.control (migration, epoch, record) VALUES ('accounts', 1, '{}')"
    )
    assert command("quarantine", "list").returncode == 0
    stores.sql.execute(
        "INSERT INTO crossfade.quarantine (entity, id, reason, rev, digest, document) "
        "VALUES ('users', 's:x', 'no [name]', 0, '', %s)",
        [b"\x0c\x00\x00\x00\x10a\x00\x01\x00\x00\x00\x00"],
    )
    listed = command("quarantine", "list")
    assert listed.returncode == 1
    assert "no [name]" in listed.stdout
    shown = command("quarantine", "show", "users", "s:x", "--json")
    assert json.loads(shown.stdout)["document"] == '{"a": {"$numberInt": "1"}}'
    missing = command("quarantine", "show", "users", "s:y")
    assert (missing.returncode, missing.stdout) == (2, "")


@pytest.mark.parametrize("words", [("backfill", "--dry-run"), ("verify",)])
def test_a_store_that_cannot_be_reached_is_status_3(stores, command, words):
    done = command(*words, DATABASE_URL="postgresql://nobody:none@127.0.0.1:9/none")
    assert done.returncode == 3
    assert "127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_entity_is_wrong_use(stores, command):
    done = command("backfill", "--dry-run", "--entity", "nobody")
    assert done.returncode == 2
    assert "users, friend_requests, identities" in done.stderr


def test_control_c_finishes_the_chunk_and_says_how_to_go_on(stores, command, user):
    stores.collection.insert_many([user(n) for n in range(2000)])
    assert command("init").returncode == 0
    assert command("phase", "set", "dual_write").returncode == 0
    process = subprocess.Popen(
        [*MAIN, "backfill", "--entity", "users", "--batch-size", "5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=command.folder,
        env=command.environment,
        # A shell starts background jobs with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not stores.ids():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on behind the last chunk" in told
    assert 0 < len(stores.ids()) < 2000
    assert command("backfill", "--entity", "users").returncode == 0
    assert len(stores.ids()) == 2000
