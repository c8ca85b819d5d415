"""`crossfade servers`: what it prints, its exit statuses, and that the servers outlive it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psycopg
import pytest

from crossfade.embedded import supervisor
from crossfade.embedded.servers import running_set

RUN = "from crossfade.cli.servers import app; app(prog_name='crossfade servers')"
# Each starts interpreters and servers several times over, which is slow where others compute too.
pytestmark = [pytest.mark.timeout(400), pytest.mark.long]

CLEAN = {name: value for name, value in os.environ.items() if not name.endswith(("_URI", "_URL"))}


@pytest.fixture
def crossfade(reachable):
    """Runs `crossfade servers WORDS` on a folder of the test's own; stops what is left."""
    environ = {**CLEAN, "XDG_STATE_HOME": str(reachable)}

    def run(*words, **variables):
        return subprocess.run(
            [sys.executable, "-c", RUN, *words],
            env={**environ, **variables},
            capture_output=True,
            text=True,
            timeout=170,
        )

    run.place = reachable / "crossfade/servers"
    yield run
    run("down")


def test_up_status_env_logs_down(crossfade):
    up = crossfade("up")
    assert up.returncode == 0, up.stderr
    assert "crossfade servers env" in up.stdout
    supervising, _ = running_set(crossfade.place)
    status = crossfade("status", "--json")
    assert status.returncode == 0
    report = json.loads(status.stdout)
    assert [(server["name"], server["running"]) for server in report["servers"]] == [
        ("mongo", True),
        ("postgres", True),
        ("redis", True),
    ]
    assert "***" in report["servers"][1]["uri"]

    environment = json.loads(crossfade("env", "--json").stdout)
    assert sorted(environment) == ["DATABASE_URL", "MONGO_URI", "REDIS_URL"]
    with psycopg.connect(environment["DATABASE_URL"]) as connection:
        connection.execute("CREATE TABLE kept (n int)")
    shell = crossfade("env").stdout + 'echo "$MONGO_URI $DATABASE_URL $REDIS_URL"'
    said = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout
    assert said.split() == [environment[name] for name in ("MONGO_URI", "DATABASE_URL", "REDIS_URL")]

    # Again: nothing new, also with its own variables exported.
    again = crossfade("up", "--json", **environment)
    assert json.loads(again.stdout)["already_running"] is True
    assert running_set(crossfade.place)[0] == supervising

    logs = crossfade("logs", "postgres", "--lines", "3")
    assert logs.returncode == 0
    assert "ready to accept connections" in logs.stdout
    assert len(json.loads(crossfade("logs", "--json").stdout)) == 4

    pids = [supervising, *supervisor.descendants(supervising)]
    down = crossfade("down", "--json")
    assert json.loads(down.stdout)["was_running"] is True
    assert not [pid for pid in pids if supervisor.started(pid)]
    assert "ready to accept connections" in crossfade("logs", "postgres").stdout

    # The same addresses and data afterwards, with the variables still exported.
    up = crossfade("up", **environment)
    assert up.returncode == 0, up.stderr
    assert json.loads(crossfade("env", "--json").stdout) == environment
    with psycopg.connect(environment["DATABASE_URL"]) as connection:
        connection.execute("SELECT * FROM kept")


def test_up_starts_again_what_died(crossfade):
    assert crossfade("up").returncode == 0
    report = json.loads(crossfade("status", "--json").stdout)
    os.kill(report["servers"][2]["processes"]["redis"], 9)
    time.sleep(0.2)
    status = crossfade("status")
    assert status.returncode == 1
    assert "DOWN" in status.stdout
    assert crossfade("up").returncode == 0
    assert crossfade("status").returncode == 0


def test_two_ups_at_once_make_one_set(crossfade):
    environ = {**CLEAN, "XDG_STATE_HOME": str(crossfade.place.parent.parent)}
    ups = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, "up", "--json"], env=environ, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    reports = [json.loads(up.communicate(timeout=170)[0]) for up in ups]
    assert [up.returncode for up in ups] == [0, 0]
    assert reports[0]["servers"] == reports[1]["servers"]
    assert sorted(report["already_running"] for report in reports) == [False, True]


def test_a_killed_supervisor_is_found_out_and_started_anew(crossfade, gone):
    assert crossfade("up").returncode == 0
    supervising, _ = running_set(crossfade.place)
    pids = supervisor.descendants(supervising)
    os.kill(supervising, 9)
    assert not gone(pids)
    assert crossfade("status").returncode == 1
    assert crossfade("up").returncode == 0
    assert crossfade("status").returncode == 0


def test_interrupted_during_set_up_it_says_so_and_leaves_nothing(crossfade, reachable):
    cache = reachable / "cache"
    environ = {
        **CLEAN,
        "XDG_STATE_HOME": str(reachable),
        "XDG_CACHE_HOME": str(cache),
        # Of the programs only PostgreSQL is set up.
        "MONGO_URI": "mongodb://db.example",
    }
    up = subprocess.Popen([sys.executable, "-c", RUN, "up"], env=environ, stderr=subprocess.PIPE, text=True)
    while not list(cache.glob("crossfade/building-*/template/base")):
        assert up.poll() is None
        time.sleep(0.01)
    up.send_signal(signal.SIGINT)
    words = up.communicate(timeout=30)[1]
    assert up.returncode == 130
    assert words.splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in words
    assert [path.name for path in (cache / "crossfade").iterdir()] == ["setup.lock"]


def test_nothing_runs(crossfade):
    status = crossfade("status")
    assert status.returncode == 1
    assert "crossfade servers up" in status.stdout
    assert json.loads(crossfade("status", "--json").stdout)["servers"] == []
    env = crossfade("env")
    assert env.returncode == 3
    assert env.stdout == ""
    assert "crossfade servers up" in env.stderr
    assert "error" in json.loads(crossfade("env", "--json").stdout)
    assert crossfade("down").returncode == 0
    assert crossfade("logs").returncode == 1


def test_wrong_use(crossfade):
    assert crossfade("logs", "mysql").returncode == 2
    assert crossfade("up", "--mongo-port", "99999999").returncode == 2
    assert crossfade("sideways").returncode == 2


def test_a_port_in_use_is_one_line_and_leaves_nothing(crossfade):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        up = crossfade("up", "--postgres-port", port)
    assert up.returncode == 3
    assert up.stderr.count("\n") == 1
    assert f"port {port} on 127.0.0.1 is in use" in up.stderr
    assert running_set(crossfade.place) is None


def test_with_own_servers_nothing_is_started(crossfade):
    own = {
        "MONGO_URI": "mongodb://db.example:27017",
        "DATABASE_URL": "postgresql://me:secret@db.example/app",
        "REDIS_URL": "redis://db.example:6379",
    }
    up = crossfade("up", **own)
    assert up.returncode == 0
    assert "your own" in up.stdout
    assert "secret" not in up.stdout
    assert running_set(crossfade.place) is None
