"""Control over real servers: stop, kill, pause, start again; and that none is ever left behind."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psycopg
import pymongo
import pymongo.errors
import pytest
import redis
import redis.exceptions

import crossfade.embedded.servers
from crossfade.embedded import EmbeddedError, EmbeddedServers, supervisor
from crossfade.embedded.ports import free_port, is_free
from crossfade.embedded.servers import running_set


def write(server, number):
    if server.name == "mongo":
        with pymongo.MongoClient(server.uri, serverSelectionTimeoutMS=3000, socketTimeoutMS=1500) as client:
            client.test.things.insert_one({"_id": number})
    elif server.name == "postgres":
        with psycopg.connect(server.uri, autocommit=True, connect_timeout=2) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS things (id int primary key)")
            connection.execute("INSERT INTO things VALUES (%s)", (number,))
    else:
        client = redis.Redis.from_url(server.uri, retry=None, socket_timeout=1.5)
        with client:
            client.sadd("things", number)


def written(server):
    if server.name == "mongo":
        with pymongo.MongoClient(server.uri) as client:
            return {thing["_id"] for thing in client.test.things.find()}
    if server.name == "postgres":
        with psycopg.connect(server.uri) as connection:
            return {row[0] for row in connection.execute("SELECT id FROM things")}
    with redis.Redis.from_url(server.uri) as client:
        return {int(number) for number in client.smembers("things")}


def whole_set(servers):
    """Every process of a running set: supervisor, servers, and PostgreSQL's children."""
    supervising, _ = running_set(servers.directory)
    return [supervising, *supervisor.descendants(supervising)]


@pytest.mark.parametrize("name", ["mongo", "postgres", "redis"])
def test_it_comes_back_on_the_same_port_with_its_data(own_servers, name):
    server = getattr(own_servers, name)
    uri = server.uri
    write(server, 1)
    server.stop()
    assert not server.is_running
    assert is_free(server.port)
    server.start()
    assert server.is_running
    write(server, 2)
    if name == "redis":
        # Its append-only file is synced each second.
        time.sleep(1.2)
    pids = [*server.pids.values()]
    server.kill()
    assert not server.is_running
    assert not [pid for pid in pids if supervisor.started(pid)]
    server.start()
    assert server.uri == uri
    assert written(server) == {1, 2}


@pytest.mark.parametrize("name", ["mongo", "postgres", "redis"])
def test_a_paused_server_keeps_connections_and_answers_nothing(own_servers, name):
    server = getattr(own_servers, name)
    write(server, 1)
    server.pause()
    with pytest.raises(
        (pymongo.errors.PyMongoError, psycopg.OperationalError, redis.exceptions.TimeoutError)
    ):
        write(server, 2)
    assert server.is_running
    server.resume()
    write(server, 3)
    assert {1, 3} <= written(server)


def test_killing_postgres_ends_its_children_at_once(own_servers):
    parent = own_servers.postgres.pids["postgres"]
    children = supervisor.descendants(parent)
    assert len(children) >= 4
    own_servers.postgres.kill()
    assert not [pid for pid in [parent, *children] if supervisor.started(pid)]


def test_leaving_the_context_ends_every_process_and_removes_the_folder(gone):
    with EmbeddedServers(environ={}) as servers:
        pids = whole_set(servers)
        assert len(pids) > 8
    assert not gone(pids)
    assert not servers.directory.exists()
    servers.stop()
    with pytest.raises(EmbeddedError, match="not running"):
        servers.postgres.kill()


def test_a_directory_keeps_data_ports_and_passwords(reachable):
    directory = reachable / "kept"
    with EmbeddedServers(directory, environ={}, durable=False) as servers:
        before = servers.environment()
        write(servers.mongo, 1)
        write(servers.postgres, 1)
    with EmbeddedServers(directory, environ={}, durable=False) as servers:
        assert servers.environment() == before
        assert written(servers.mongo) == written(servers.postgres) == {1}
        with pytest.raises(EmbeddedError, match="run already"):
            EmbeddedServers(directory, environ={}).start()


OWNER = """
import sys, time, threading
from pathlib import Path
from crossfade.embedded import EmbeddedServers

def start():
    servers = EmbeddedServers(environ={}, durable=False).start()
    PAUSE
    print(servers.directory, flush=True)

# From a thread that ends: the servers belong to the process.
thread = threading.Thread(target=start)
thread.start()
thread.join()
time.sleep(600)
"""


def start_owner(then="pass"):
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER.replace("PAUSE", then)], stdout=subprocess.PIPE, text=True
    )
    directory = Path(process.stdout.readline().strip())
    supervising, _ = running_set(directory)
    return process, directory, [supervising, *supervisor.descendants(supervising)]


def is_left(directory):
    """Whether it is there after 15 seconds: the start of another test may have begun to remove it."""
    deadline = time.monotonic() + 15
    while (there := directory.exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return there


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_its_owner(number, gone):
    owner, directory, pids = start_owner()
    assert len(pids) > 8
    time.sleep(0.3)
    owner.send_signal(number)
    owner.wait()
    assert not gone(pids)
    assert not directory.exists()


def test_no_paused_process_outlives_its_owner(gone):
    owner, directory, pids = start_owner("servers.postgres.pause(); servers.mongo.pause()")
    owner.kill()
    owner.wait()
    assert not gone(pids)
    assert not directory.exists()


def test_no_process_outlives_a_killed_supervisor(gone):
    owner, directory, pids = start_owner()
    os.kill(pids[0], signal.SIGKILL)
    try:
        assert not gone(pids[1:])
    finally:
        owner.kill()
        owner.wait()
    # What is left of it is removed by the next start.
    assert directory.exists()
    with EmbeddedServers(environ={}, mongo=False, postgres=False):
        assert not is_left(directory)


def test_paused_orphans_of_owner_and_supervisor_are_ended_by_the_next_start(gone):
    owner, directory, pids = start_owner("servers.postgres.pause()")
    os.kill(pids[0], signal.SIGKILL)
    owner.kill()
    owner.wait()
    with EmbeddedServers(environ={}, mongo=False, postgres=False):
        assert not gone(pids)
        assert not is_left(directory)


def test_a_start_that_fails_leaves_nothing(reachable):
    directory = reachable / "broken"
    with EmbeddedServers(directory, environ={}, mongo=False, durable=False):
        pass
    (directory / "postgres/data/PG_VERSION").write_text("9\n")
    servers = EmbeddedServers(directory, environ={}, mongo=False)
    with pytest.raises(EmbeddedError, match=r"postgres did not start: .*log: "):
        servers.start()
    assert running_set(directory) is None
    assert not supervisor.working_in(directory)


def test_a_port_in_use_is_named(own_servers):
    taken = own_servers.redis.port
    with pytest.raises(EmbeddedError, match=f"cannot start redis: port {taken} .* in use"):
        EmbeddedServers(environ={}, mongo=False, postgres=False, ports={"redis": taken}).start()


def test_another_port_is_chosen_when_somebody_was_faster(own_servers, monkeypatch):
    choices = itertools.chain([own_servers.postgres.port], iter(free_port, None))
    monkeypatch.setattr(crossfade.embedded.servers, "free_port", lambda: next(choices))
    with EmbeddedServers(environ={}, mongo=False, redis=False) as second:
        assert second.postgres.port != own_servers.postgres.port
        with psycopg.connect(second.database_url) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_port_taken_while_the_server_was_down_is_named(own_servers):
    import socket

    own_servers.redis.stop()
    with (
        socket.create_server(("127.0.0.1", own_servers.redis.port)),
        pytest.raises(EmbeddedError, match="in use by another program"),
    ):
        own_servers.redis.start()
    own_servers.redis.start()


def test_the_users_own_servers_come_first():
    own = {
        "MONGO_URI": "mongodb://db.example:27018/app",
        "DATABASE_URL": "postgresql://me@db.example/app",
        "REDIS_URL": "redis://db.example:6380/2",
    }
    with EmbeddedServers(environ=own) as servers:
        assert servers.environment() == own
        assert (servers.mongo.port, servers.postgres.port, servers.redis.port) == (27018, 5432, 6380)
        for server, variable in zip(servers.servers, own, strict=True):
            assert not server.is_ours
            for act in ("start", "stop", "kill", "pause", "resume"):
                with pytest.raises(EmbeddedError, match=f"not ours: {variable}"):
                    getattr(server, act)()
    with EmbeddedServers(environ={"REDIS_URL": own["REDIS_URL"]}, mongo=False, durable=False) as servers:
        assert servers.redis.uri == own["REDIS_URL"]
        assert servers.postgres.is_running


def test_a_mongod_on_path_is_preferred(tmp_path, monkeypatch):
    """A stand-in that notes its arguments; it does not speak, so the start is refused with its last words."""
    mongod = tmp_path / "mongod"
    mongod.write_text(
        '#!/bin/sh\necho "$@" > "$(dirname "$0")/arguments"\necho "no such thing" >&2\nexit 3\n'
    )
    mongod.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(EmbeddedError, match="mongo did not start: no such thing"):
        EmbeddedServers(environ={}, postgres=False, redis=False).start()
    arguments = (tmp_path / "arguments").read_text()
    assert "--bind_ip 127.0.0.1" in arguments


def test_concurrent_updates_of_one_document_are_all_kept(own_servers):
    import threading

    with pymongo.MongoClient(own_servers.mongo_uri) as client:
        things = client.test.things
        things.insert_one({"_id": 1, "n": 0})

        def count():
            for _ in range(50):
                things.update_one({"_id": 1}, {"$inc": {"n": 1}})

        threads = [threading.Thread(target=count) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert things.find_one()["n"] == 400


def test_an_index_is_built(own_servers):
    """The engine builds indexes over a connection to itself, which must be let in."""
    with pymongo.MongoClient(own_servers.mongo_uri) as client:
        client.test.things.insert_many({"_id": n, "name": str(n % 10)} for n in range(1000))
        client.test.things.create_index("name")
        client.test.things.create_index([("_id", 1), ("name", 1)], unique=True)
        assert len(client.test.things.index_information()) == 3
        client.test.other.create_index("name", unique=True)
        client.test.other.insert_one({"name": "a"})
        with pytest.raises(pymongo.errors.DuplicateKeyError):
            client.test.other.insert_one({"name": "a"})


def test_no_password_is_in_the_list_of_processes(own_servers):
    password = own_servers.redis_url.partition("://:")[2].partition("@")[0]
    postgres = own_servers.database_url.rpartition("@")[0].rpartition(":")[2]
    commands = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            commands.append(entry.read_bytes())
    assert not [
        command for command in commands if password.encode() in command or postgres.encode() in command
    ]
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(own_servers.database_url.replace(postgres, "wrong"))
    state = own_servers.directory / "state.json"
    assert state.stat().st_mode & 0o077 == 0
    assert json.loads(state.read_text())["servers"]
