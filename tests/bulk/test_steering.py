"""A run that is steered while it goes on: from another terminal, over its socket, with the options it began with."""

import json
import socket
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

NUMBER = 3000


@pytest.fixture
def begin(stores, in_dual_write, user):
    """Begins a backfill that takes a while, and waits until it is at work."""
    stores.collection.insert_many([user(n) for n in range(NUMBER)])
    begun = []

    def begin(*words):
        begun.append(in_dual_write("backfill", "--entity", "users", *words, wait=False))
        until(stores.ids)
        return begun[-1]

    yield begin
    for command in begun:
        command.kill()
        command.communicate()


def until(condition):
    ends = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < ends
        time.sleep(0.02)
    return found


def only(told):
    [job] = told["jobs"]
    return job


def test_a_job_pauses_goes_on_and_stops(stores, in_dual_write, begin):
    # So slowly that it is not done before it is told anything, however busy the machine.
    command = begin("--batch-size", "5", "--max-rate", "20")
    assert only(in_dual_write("pause", "--json"))["state"] == "paused"
    time.sleep(0.5)
    waiting = len(stores.ids())
    assert waiting < NUMBER
    time.sleep(1.0)
    assert len(stores.ids()) == waiting
    job = only(in_dual_write("jobs", "--json"))
    assert (job["kind"], job["entity"], job["state"], job["done"], job["total"], job["pid"]) == (
        "backfill", "users", "paused", waiting, NUMBER, command.pid,
    )  # fmt: skip
    in_dual_write("resume")
    until(lambda: len(stores.ids()) > waiting)
    in_dual_write("stop")
    _, told = command.communicate(timeout=60)
    assert command.returncode == 130
    assert "goes on behind the last chunk" in told
    assert len(stores.ids()) < NUMBER
    in_dual_write("backfill", "--entity", "users")
    assert len(stores.ids()) == NUMBER


def test_a_job_that_is_stopped_at_the_end_of_an_entity_is_not_done_with_the_others(
    stores, in_dual_write, user
):
    stores.collection.insert_many([user(n) for n in range(20)])
    # One chunk, and behind it a rest, in which the first entity is as good as complete.
    command = in_dual_write("backfill", "--max-rate", "1", "--json", wait=False)
    until(stores.ids)
    in_dual_write("stop")
    out, told = command.communicate(timeout=60)
    assert command.returncode == 130, (out, told)
    report = json.loads(out.splitlines()[-1])
    assert report["state"] == "interrupted"
    assert [one["state"] for one in report["entities"]] == ["complete"]


def test_what_a_job_was_told_does_not_outlive_its_command(stores, in_dual_write, begin):
    command = begin("--batch-size", "5", "--max-rate", "20")
    in_dual_write("rate", "1")
    in_dual_write("pause")
    command.kill()
    command.communicate()
    in_dual_write("backfill", "--entity", "users")
    assert len(stores.ids()) == NUMBER


def test_a_rate_holds_for_all_workers_together(stores, in_dual_write, begin):
    began = time.monotonic()
    command = begin("--workers", "2", "--batch-size", "50", "--max-rate", "500")
    until(lambda: len(stores.ids()) >= 1500)
    assert time.monotonic() - began > 0.7 * 1500 / 500
    assert only(in_dual_write("rate", "none", "--json"))["max_rate"] is None
    command.communicate(timeout=60)
    assert len(stores.ids()) == NUMBER


def test_a_size_of_chunks_takes_effect(stores, in_dual_write, begin):
    command = begin("--batch-size", "5", "--max-rate", "20")
    assert only(in_dual_write("chunk-size", "700", "--json"))["chunk_size"] == 700
    in_dual_write("rate", "none")
    command.communicate(timeout=60)
    # The rows of a chunk have one transaction.
    [[largest]] = stores.rows(
        "SELECT max(n) FROM (SELECT count(*) AS n FROM users GROUP BY xmin::text) AS chunks"
    )
    assert largest == 700


def test_a_line_that_is_not_understood_changes_nothing_and_is_answered(stores, in_dual_write, begin):
    begin("--batch-size", "5", "--max-rate", "20")
    [path] = Path(in_dual_write.environment["XDG_RUNTIME_DIR"]).glob("crossfade/job-*.sock")
    assert path.stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as job:
        job.connect(str(path))
        for line, wrong in (
            ("faster", "there are: status"),
            ("rate ten", "whole number"),
            ("rate 9e9", "number"),
        ):
            job.sendall(line.encode() + b"\n")
            answer = json.loads(job.recv(4096))
            assert not answer["ok"]
            assert wrong in answer["error"]
    assert only(in_dual_write("jobs", "--json"))["max_rate"] == 20


def test_of_two_jobs_one_has_to_be_named(stores, in_dual_write, begin):
    one = begin("--batch-size", "5", "--max-rate", "20")
    begin("--batch-size", "5", "--max-rate", "20")
    until(lambda: len(in_dual_write("jobs", "--json")["jobs"]) == 2)
    assert str(one.pid) in in_dual_write("pause", "--json", status=2)["error"]
    assert only(in_dual_write("pause", "--pid", str(one.pid), "--json"))["pid"] == one.pid
    assert "no such job" in in_dual_write("pause", "--pid", "1", "--json", status=1)["error"]


def test_a_store_that_answers_late_slows_a_job_down(stores, in_dual_write, begin, postgres_proxy):
    in_dual_write.environment["DATABASE_URL"] = postgres_proxy.uri
    postgres_proxy.delay(0.05)
    begin("--batch-size", "50", "--max-latency", "20")
    job = until(lambda: (told := only(in_dual_write("jobs", "--json")))["throttled"] and told)
    assert "PostgreSQL answers in" in job["throttled"]
    assert until(lambda: (told := only(in_dual_write("jobs", "--json")))["duty"] < 1 and told)
    postgres_proxy.delay(0)
    until(lambda: len(stores.ids()) == NUMBER)
