"""The demo from end to end, small: what `crossfade demo` promises, and that nothing of it is left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pymongo
import pytest

from crossfade.embedded.supervisor import descendants, started

pytestmark = pytest.mark.long

MAIN = [sys.executable, "-c", "from crossfade.cli.main import main; main()", "demo"]


@pytest.fixture
def environment():
    """Without servers of one's own."""
    own = ("MONGO_URI", "DATABASE_URL", "REDIS_URL")
    return {name: value for name, value in os.environ.items() if name not in own} | {"COLUMNS": "120"}


def play(*words, environment, **more):
    return subprocess.Popen(
        [*MAIN, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **more
    )


@pytest.mark.timeout(420)
def test_users_move_under_traffic_through_two_outages_over_and_back_and_nothing_is_lost(environment):
    process = play("--users", "150", "--seconds", "1", "--json", environment=environment)
    out, err = process.communicate(timeout=400)
    result = json.loads(out)
    assert process.returncode == 0, (result.get("error"), result.get("problems"), result.get("failures"), err)
    assert result["ok"]
    assert result["failed"] == 0
    assert result["answers_503"] == 0
    assert result["own_check"]["lost"] == 0
    assert result["own_check"]["checked"]["acknowledged registrations"] > 10
    assert result["own_check"]["checked"]["acknowledged writes of the old application"] > 10
    assert len(result["verify"]) == 7
    assert not any(report["counts"]["mismatches"] for report in result["verify"])
    assert result["migrated"]["users"] >= result["legacy"]["users"]
    assert [outage["phase"] for outage in result["outages"]] == ["dual_write", "postgres_read"]
    assert all(outage["deepest"] > 0 for outage in result["outages"])
    assert [switched["phase"] for switched in result["switches"]] == ["postgres_primary", "postgres_read"]
    assert all(switched["held"] > 0 and switched["failed"] == 0 for switched in result["switches"])
    assert result["left_in_debt"] == 0
    assert any(read["source"] == "postgres" for read in result["reads"])
    assert result["added_ms"]["all"]["dual_write"]


def test_a_killed_demo_leaves_no_process(environment):
    process = play("--users", "50", environment=environment, start_new_session=True)
    deadline = time.monotonic() + 90
    while not any("scorekeeper" in _command(pid) for pid in descendants(process.pid)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    there = {pid: started(pid) for pid in descendants(process.pid)}
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 30
    while left := [pid for pid, since in there.items() if since and started(pid) == since]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_own_servers_get_a_database_of_the_demos_own_that_goes_away(servers, environment):
    named = {
        "MONGO_URI": servers.mongo_uri,
        "DATABASE_URL": servers.database_url,
        "REDIS_URL": servers.redis_url,
    }
    process = play("--users", "50", environment=environment | named)
    for line in process.stderr:
        if line.startswith("two workers"):
            break
    databases = demo_databases(servers)
    assert len(databases) == 2
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert not demo_databases(servers) & databases


def demo_databases(servers):
    with (
        pymongo.MongoClient(servers.mongo_uri) as client,
        psycopg.connect(servers.database_url) as connection,
    ):
        there = {("mongo", name) for name in client.list_database_names()}
        there |= {("postgres", name) for (name,) in connection.execute("SELECT datname FROM pg_database")}
    return {(store, name) for store, name in there if name.startswith("crossfade_demo_")}


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
