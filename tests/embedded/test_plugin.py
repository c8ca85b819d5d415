"""The pytest plugin itself: one set of servers per run, and none after it."""

import os
import signal
import subprocess
import sys
import time

import psycopg
import pytest

from crossfade.embedded import supervisor
from crossfade.embedded.places import scratch_roots
from crossfade.embedded.servers import running_set

# Each starts interpreters and servers several times over, which is slow where others compute too.
pytestmark = pytest.mark.timeout(400)

CLEAN = {name: value for name, value in os.environ.items() if not name.endswith(("_URI", "_URL"))}

SUITE = """
import os, time, pathlib, pytest, psycopg, pymongo

@pytest.mark.parametrize("n", range(6))
def test_fresh(n, servers, mongo_uri, database_url, redis_url):
    here = pathlib.Path(__file__).parent
    with (here / "seen").open("a") as seen:
        seen.write(f"{servers.mongo_uri} {mongo_uri} {database_url} {redis_url}\\n")
    time.sleep(SECONDS)
"""


def run_pytest(folder, seconds, *options):
    (folder / "test_suite.py").write_text(SUITE.replace("SECONDS", str(seconds)))
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(folder),
            *options,
            str(folder),
        ],
        cwd=folder,
        env=CLEAN,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def seen(folder, lines):
    deadline = time.monotonic() + 170
    path = folder / "seen"
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [line.split() for line in path.read_text().splitlines()]


def set_on(uri):
    """The folder and processes of the set whose MongoDB is at `uri`."""
    for state in [each for root in scratch_roots() for each in root.glob("crossfade-servers-*/state.json")]:
        try:
            text = state.read_text()
        except OSError:
            continue  # another user's set, or one that has just gone
        if uri in text:
            supervising, _ = running_set(state.parent)
            return state.parent, [supervising, *supervisor.descendants(supervising)]
    raise AssertionError(f"no set has {uri}")


def test_workers_share_one_set_and_tests_share_no_database(tmp_path):
    run = run_pytest(tmp_path, 0.5, "-n2")
    output, _ = run.communicate(timeout=170)
    assert run.returncode == 0, output
    rows = seen(tmp_path, 6)
    assert len({row[0] for row in rows}) == 1
    assert len({row[1] for row in rows}) == len({row[2] for row in rows}) == 6
    assert len({row[3] for row in rows}) == 2
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(rows[0][2])


@pytest.mark.parametrize(
    ("options", "number"),
    [((), signal.SIGINT), (("-n2",), signal.SIGKILL)],
    ids=["alone, interrupted", "xdist, killed"],
)
def test_no_server_outlives_the_run(tmp_path, gone, number, options):
    run = run_pytest(tmp_path, 30, *options)
    folder, pids = set_on(seen(tmp_path, 1)[0][0])
    assert len(pids) > 8
    os.kill(run.pid, number)
    run.communicate(timeout=60)
    assert not gone(pids)
    assert not folder.exists()


def test_a_template_is_cloned_for_each_test(tmp_path):
    (tmp_path / "conftest.py").write_text(
        "import psycopg, pytest\n"
        "@pytest.fixture(scope='session')\n"
        "def database_template(servers, worker_number):\n"
        "    name = f'template_{worker_number}'\n"
        "    with psycopg.connect(servers.database_url, autocommit=True) as connection:\n"
        "        connection.execute(f'CREATE DATABASE {name}')\n"
        "    with psycopg.connect(servers.database_url, dbname=name, autocommit=True) as connection:\n"
        "        connection.execute('CREATE TABLE filled AS SELECT 7 AS n')\n"
        "    return name\n"
    )
    (tmp_path / "test_clone.py").write_text(
        "import psycopg, pytest\n"
        "@pytest.mark.parametrize('n', range(2))\n"
        "def test_clone(n, database_url):\n"
        "    with psycopg.connect(database_url) as connection:\n"
        "        assert connection.execute('SELECT n FROM filled').fetchall() == [(7,)]\n"
        "        connection.execute('INSERT INTO filled VALUES (8)')\n"
    )
    run = run_pytest(tmp_path, 0, "-k", "clone")
    output, _ = run.communicate(timeout=170)
    assert run.returncode == 0, output


def test_the_plugin_imports_nothing_of_the_servers_until_it_is_used():
    code = "import sys, crossfade.testing.plugin; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for needless in ("crossfade.embedded", "crossfade.testing.proxy", "filelock"):
        assert needless not in output.split()
