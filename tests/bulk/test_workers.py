"""Several processes at one run: a pool, a Dask cluster, and what happens when they are killed."""

import contextlib
import json
import os
import random
import signal
import sys
import time

import psutil
import pytest

from . import conftest
from .conftest import of_users

pytestmark = pytest.mark.long

#: Instants at which a run is killed; `make soak-bulk` has 50.
KILLS = 50 if os.environ.get("SOAK") else 8


def kill_with_its_workers(command):
    for process in [*psutil.Process(command.pid).children(recursive=True), psutil.Process(command.pid)]:
        # One that has ended since it was looked for is dead as well.
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    command.communicate()


def test_a_pool_of_processes_shares_a_run_and_each_document_is_counted_once(stores, in_dual_write, user):
    stores.collection.insert_many([user(n) for n in range(6000)])
    # In small chunks, so that the second one has begun before the first one is through.
    words = ["--entity", "users", "--workers", "2", "--batch-size", "20", "--json"]
    moved = of_users(in_dual_write("backfill", *words))
    assert (moved["state"], moved["counts"]["read"], moved["counts"]["inserted"]) == (
        "complete",
        6000,
        6000,
    ), moved
    assert stores.rows("SELECT count(DISTINCT leased_by) FROM crossfade.ranges") == [(2,)]
    for mode in ([], ["--fast"]):
        seen = of_users(in_dual_write("verify", "--entity", "users", "--workers", "2", "--json", *mode))
        assert (seen["counts"]["documents"], seen["counts"]["rows"], seen["counts"]["equal"]) == (6000,) * 3


def test_the_checksums_of_a_verify_are_those_that_sql_gives(stores, in_dual_write, user):
    stores.collection.insert_many([user(n) for n in range(3000)])
    in_dual_write("backfill", "--entity", "users")
    run = of_users(in_dual_write("verify", "--entity", "users", "--workers", "2", "--json"))["run"]
    chunks = stores.rows("SELECT first, last, documents, checksum FROM crossfade.chunks WHERE run = %s", run)
    assert sum(documents for _, _, documents, _ in chunks) == 3000
    for first, last, documents, checksum in chunks:
        assert stores.rows(
            "SELECT count(*), md5(string_agg(concat_ws(' ', id, cf_rev, encode(cf_digest, 'hex')), E'\\n' "
            "ORDER BY id)) FROM users WHERE id > %s AND id <= %s", first, last,
        ) == [(documents, checksum)]  # fmt: skip


def test_a_worker_that_is_killed_leaves_its_piece_to_the_others(stores, in_dual_write, user):
    stores.collection.insert_many([user(n) for n in range(6000)])
    command = in_dual_write(
        "backfill", "--entity", "users", "--workers", "2", "--batch-size", "50", "--json", wait=False
    )
    while len(stores.ids()) < 100:
        time.sleep(0.01)
    [[name]] = stores.rows("SELECT leased_by FROM crossfade.ranges WHERE lease IS NOT NULL LIMIT 1")
    os.kill(int(name.rpartition(":")[2]), signal.SIGKILL)
    out, told = command.communicate(timeout=150)
    assert command.returncode == 0, told
    moved = of_users(json.loads(out))
    assert (moved["state"], moved["counts"]["read"], moved["counts"]["inserted"]) == ("complete", 6000, 6000)
    assert "a worker died" in told


def test_who_presses_control_c_twice_waits_for_no_worker(stores, in_dual_write, user, monkeypatch):
    # So that the second one comes before the workers are told of the first.
    program = "from crossfade.cli import crew; crew._LOOK = 60; from crossfade.cli.main import main; main()"
    monkeypatch.setattr(conftest, "MAIN", [sys.executable, "-c", program])
    stores.collection.insert_many([user(n) for n in range(6000)])
    command = in_dual_write(
        "backfill", "--entity", "users", "--workers", "2", "--batch-size", "5", "--max-rate", "50", wait=False
    )
    while not stores.ids():
        time.sleep(0.01)
    workers = psutil.Process(command.pid).children(recursive=True)
    command.send_signal(signal.SIGINT)
    assert "once more to stop at once" in command.stderr.readline()
    time.sleep(0.2)
    command.send_signal(signal.SIGINT)
    _, told = command.communicate(timeout=30)
    assert command.returncode == 130, told
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []
    assert len(stores.ids()) < 6000


def test_workers_end_with_the_command_that_was_killed(stores, in_dual_write, user):
    stores.collection.insert_many([user(n) for n in range(6000)])
    command = in_dual_write(
        "backfill", "--entity", "users", "--workers", "2", "--batch-size", "5", wait=False
    )
    while not stores.ids():
        time.sleep(0.01)
    workers = psutil.Process(command.pid).children(recursive=True)
    command.kill()
    command.communicate()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []
    assert len(stores.ids()) < 6000


@pytest.mark.parametrize("kind", ["backfill", "verify"])
def test_killed_again_and_again_a_run_ends_complete_with_nothing_counted_twice(
    stores, in_dual_write, user, kind
):
    number = 4000
    stores.collection.insert_many([user(n) for n in range(number)])
    if kind == "verify":
        in_dual_write("backfill", "--entity", "users")
    chance = random.Random(kind)
    words = [kind, "--entity", "users", "--workers", "2"]
    if kind == "backfill":
        words += ["--batch-size", "20"]
    killed = 0
    for _ in range(KILLS):
        # So slowly that there is something left for each of them.
        command = in_dual_write(*words, "--max-rate", str(number // KILLS // 4), wait=False)
        # Begin, work and end all take their time; each is a place to die.
        time.sleep(chance.uniform(0.3, 3.5))
        if command.poll() is not None:
            command.communicate()
            break
        kill_with_its_workers(command)
        killed += 1
    # A verify is done in few large chunks.
    assert killed > (KILLS // 2 if kind == "backfill" else 2)
    done = of_users(in_dual_write(*words, "--json"))
    assert done["state"] == "complete"
    counts = done["counts"]
    if kind == "backfill":
        assert (counts["read"], counts["inserted"], counts["same"]) in [
            (number, number, 0),
            (number, 0, number),
        ]
        done = of_users(in_dual_write("verify", "--entity", "users", "--json"))
        counts = done["counts"]
    assert (counts["documents"], counts["rows"], counts["equal"]) == (number,) * 3


# --- on a cluster -----------------------------------------------------------------------------------------


@pytest.fixture
def cluster(in_dual_write, monkeypatch):
    """A real one: a scheduler and two workers, each a process with the stores' addresses in its environment."""
    from distributed import LocalCluster

    for name in ("MONGO_URI", "DATABASE_URL"):
        monkeypatch.setenv(name, in_dual_write.environment[name])
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as made:
        yield made


def test_a_cluster_moves_and_compares_everything(stores, in_dual_write, cluster, user):
    stores.collection.insert_many([user(n) for n in range(4000)])
    where = ["--dask", cluster.scheduler_address, "--entity", "users", "--json"]
    moved = of_users(in_dual_write("backfill", *where))
    assert (moved["state"], moved["counts"]["read"], moved["counts"]["inserted"]) == ("complete", 4000, 4000)
    assert stores.rows("SELECT count(DISTINCT leased_by) FROM crossfade.ranges") == [(2,)]
    seen = of_users(in_dual_write("verify", *where))
    assert (seen["counts"]["documents"], seen["counts"]["rows"], seen["counts"]["equal"]) == (4000,) * 3


def kill_a_worker(stores):
    """SIGKILL to whoever has a piece now; whether somebody has."""
    at_work = stores.rows(
        "SELECT DISTINCT leased_by FROM crossfade.ranges AS r WHERE crossfade.is_leased(r) LIMIT 1"
    )
    for [name] in at_work:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(name.rpartition(":")[2]), signal.SIGKILL)
    return bool(at_work)


def test_a_cluster_goes_on_when_its_workers_are_killed(stores, in_dual_write, cluster, user):
    stores.collection.insert_many([user(n) for n in range(4000)])
    command = in_dual_write(
        "backfill", "--dask", cluster.scheduler_address, "--entity", "users", "--batch-size", "20", "--json",
        wait=False,
    )  # fmt: skip
    for done in (200, 1500):
        while len(stores.ids()) < done:
            assert command.poll() is None
            time.sleep(0.01)
        kill_a_worker(stores)
    out, told = command.communicate(timeout=150)
    assert command.returncode == 0, told
    moved = of_users(json.loads(out.splitlines()[-1]))
    assert (moved["state"], moved["counts"]["read"], moved["counts"]["inserted"]) == ("complete", 4000, 4000)


def test_a_cluster_that_loses_all_its_workers_leaves_the_rest_to_the_command(
    stores, in_dual_write, cluster, user
):
    stores.collection.insert_many([user(n) for n in range(4000)])
    command = in_dual_write(
        "backfill", "--dask", cluster.scheduler_address, "--entity", "users", "--batch-size", "20", "--json",
        "--max-rate", "1000", wait=False,
    )  # fmt: skip
    while len(stores.ids()) < 200:
        assert command.poll() is None
        time.sleep(0.01)
    cluster.scale(0)
    out, told = command.communicate(timeout=150)
    assert command.returncode == 0, told
    moved = of_users(json.loads(out.splitlines()[-1]))
    assert (moved["state"], moved["counts"]["read"], moved["counts"]["inserted"]) == ("complete", 4000, 4000)
    assert "no worker left" in told


def man(cluster):
    """Replace workers that nobody else does: a nanny that is told of a death while it begins gives up."""
    if not cluster.scheduler.workers:
        cluster.scale(0)
        cluster.scale(2)
        cluster.wait_for_workers(2, timeout=60)


@pytest.mark.skipif(not os.environ.get("SOAK"), reason="`make soak-bulk` has it")
@pytest.mark.parametrize("kind", ["backfill", "verify"])
def test_a_cluster_whose_workers_die_at_any_instant_counts_nothing_twice(
    stores, in_dual_write, cluster, user, kind
):
    number, chance, killed = 4000, random.Random(kind), 0
    stores.collection.insert_many([user(n) for n in range(number)])
    if kind == "verify":
        in_dual_write("backfill", "--entity", "users")
    words = [kind, "--dask", cluster.scheduler_address, "--entity", "users", "--json"]
    slowly = ["--max-rate", "40", *(["--batch-size", "20"] if kind == "backfill" else [])]
    while killed < KILLS:
        man(cluster)
        # It gives up where workers die again and again; whoever begins it once more goes on.
        command = in_dual_write(*words, *slowly, wait=False)
        while command.poll() is None and killed < KILLS:
            time.sleep(chance.uniform(0.05, 1.0))
            killed += kill_a_worker(stores)
        if killed >= KILLS:
            in_dual_write("stop", wait=False).communicate()
        command.communicate(timeout=150)
        if command.returncode == 0:
            break
    man(cluster)
    done = of_users(in_dual_write(*words))
    if kind == "backfill":
        assert killed == KILLS
        counts = done["counts"]
        assert (done["state"], counts["read"], counts["inserted"]) == ("complete", number, number)
        done = of_users(in_dual_write("verify", "--entity", "users", "--json"))
    counts = done["counts"]
    assert (done["state"], counts["documents"], counts["rows"], counts["equal"]) == (
        "complete",
        *(number,) * 3,
    )


def test_a_cluster_that_is_not_there_is_one_clear_error(stores, in_dual_write):
    command = in_dual_write("verify", "--dask", "tcp://127.0.0.1:9", wait=False)
    _, told = command.communicate(timeout=60)
    assert command.returncode == 2
    assert "no Dask scheduler at tcp://127.0.0.1:9" in told
