"""Supervisor: the process that holds one set of servers, so that none is ever left behind.

What it promises
    Every server is a child of this process. When its owner ends, however it ends (SIGKILL included), the
    supervisor stops them all, children of servers too, and then ends itself. When the supervisor is killed,
    the kernel kills the servers (PR_SET_PDEATHSIG, Linux), and PostgreSQL's children end with their parent.
    A set without an owner (`crossfade servers up`) runs until it is told to stop.

Why it holds
    The owner is watched by a pidfd: the kernel reports its death, whatever the cause, and no reused process
    number can be mistaken for it. The supervisor has one thread, and the parent-death signal is tied to the
    *thread* that forked. As a child subreaper it inherits the children of a killed server, so it still finds
    them.

What breaks it
    Killing owner and supervisor both while a server is paused: stopped children of PostgreSQL do not notice.
    The next start finds them by the folder they work in and ends them (`sweep`).

This file uses the standard library only and is run by its path (`python -I -S`), so it starts in some 30 ms.
It speaks one JSON object per connection over a Unix socket.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

#: Seconds that the servers have to end by themselves before they are killed, at the end of the supervisor.
GRACE = 10.0


def die_with_parent() -> None:
    """In a forked child: ask the kernel to kill it when the thread that forked it ends (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


# --- processes ------------------------------------------------------------------------------------------


def process_table() -> dict[int, tuple[int, str]]:
    """Every live process: number -> (parent's number, start time as the system writes it).

    The start time tells a process from a later one with the same number. Zombies are left out.
    """
    if sys.platform != "linux":
        return _process_table_from_ps()
    table = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (row := _stat(int(entry))) is not None:
            table[int(entry)] = row
    return table


def _stat(pid: int) -> tuple[int, str] | None:
    try:
        # The name in parentheses may hold spaces and parentheses itself.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (int(fields[1]), fields[19])


def _process_table_from_ps() -> dict[int, tuple[int, str]]:
    listing = subprocess.run(
        ["ps", "-axo", "pid=,ppid=,stat=,lstart="], capture_output=True, text=True, check=True
    ).stdout
    rows = (line.split(None, 3) for line in listing.splitlines())
    return {int(row[0]): (int(row[1]), row[3]) for row in rows if not row[2].startswith("Z")}


def started(pid: int) -> str | None:
    """The start time of a live process, None if there is none."""
    row = _stat(pid) if sys.platform == "linux" else process_table().get(pid)
    return row[1] if row else None


def descendants(pid: int) -> list[int]:
    """All live children of `pid`, theirs included."""
    children: dict[int, list[int]] = {}
    for child, (parent, _) in process_table().items():
        children.setdefault(parent, []).append(child)
    found: list[int] = []
    waiting = list(children.get(pid, []))
    while waiting:
        found.append(waiting.pop())
        waiting += children.get(found[-1], [])
    return found


#: What the servers' processes are called. A person's shell in the same folder is not among them.
PROGRAMS = {"postgres", "gateway", "redis-server", "mongod"}


def working_in(folder: Path) -> list[int]:
    """Live processes of servers whose working directory is `folder` or below it (Linux; else none).

    PostgreSQL and its children work in the data directory, so this finds even children whose parent is gone.
    """
    if sys.platform != "linux":
        return []
    root = os.path.realpath(folder)
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            where = os.readlink(f"/proc/{entry}/cwd").removesuffix(" (deleted)")
            name = Path(f"/proc/{entry}/comm").read_text().strip()
        except OSError:
            continue
        inside = where == root or where.startswith(root + "/")
        if inside and name in PROGRAMS and started(int(entry)) is not None:
            found.append(int(entry))
    return found


def send(pids: Iterable[int], number: int) -> None:
    """Send a signal to each that still lives and is ours."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            pass


def sweep(folder: Path) -> list[int]:
    """Kill what an earlier run left working in `folder`; returns the process numbers."""
    found = working_in(folder)
    for _ in range(100):
        left = working_in(folder)
        if not left:
            break
        send(left, signal.SIGKILL)
        time.sleep(0.02)
    return found


def _wait_until_gone(pids: Iterable[int], seconds: float) -> None:
    """Wait until none lives. A killed process with much memory takes a moment to end."""
    deadline = time.monotonic() + seconds
    while any(started(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.005)


# --- the supervisor -------------------------------------------------------------------------------------


class Supervisor:
    """Starts, signals and watches named processes, on request.

    directory: the folder of the set; the socket and `processes.json` are in it.
    owner: process number and start time of whom the set lives and dies with; None: nobody (`release`).
    remove: the folder goes away at the end.
    """

    def __init__(self, directory: Path, control: str, owner: tuple[int, str] | None, *, remove: bool) -> None:
        self.directory = directory
        self.control = control
        self.owner = owner
        self.remove = remove
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.stop_signals: dict[str, int] = {}
        self.ending = False
        self._selector = selectors.DefaultSelector()
        self._owner_descriptor: int | None = None

    def serve(self, ready: Callable[[], None]) -> None:
        """Answer requests until told to stop, or until the owner is gone; then end every server."""
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        wake_read, wake_write = socket.socketpair()
        for end in (wake_read, wake_write):
            end.setblocking(False)
        signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        selector = self._selector
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.control)
        os.chmod(self.control, 0o600)
        listener.listen(64)
        selector.register(listener, selectors.EVENT_READ)
        selector.register(wake_read, selectors.EVENT_READ)
        self._watch_owner()
        ready()
        while not self.ending and self._owner_lives():
            # Without a descriptor of the owner (old kernel, other system), look every 0.3 seconds.
            blind = self.owner is not None and self._owner_descriptor is None
            for key, _ in selector.select(0.3 if blind else None):
                if key.fileobj is listener:
                    self._answer(listener)
                elif key.fileobj is wake_read:
                    wake_read.recv(4096)
            self._reap()
        self._stop_all()
        Path(self.control).unlink(missing_ok=True)
        if self.remove:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _end(self, *_: object) -> None:
        self.ending = True

    def _watch_owner(self) -> None:
        if self.owner is None:
            return
        try:
            self._owner_descriptor = os.pidfd_open(self.owner[0])
        except (AttributeError, OSError):
            return
        self._selector.register(self._owner_descriptor, selectors.EVENT_READ)

    def _owner_lives(self) -> bool:
        return self.owner is None or started(self.owner[0]) == self.owner[1]

    def _answer(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        # A client that sends nothing must not hold up the rest.
        connection.settimeout(2.0)
        with connection:
            try:
                request = json.loads(connection.makefile("rb").readline())
                try:
                    answer = getattr(self, f"do_{request.pop('do')}")(**request)
                except Exception as error:
                    answer = {"error": f"{type(error).__name__}: {error}"}
                connection.sendall(json.dumps(answer).encode() + b"\n")
            except (OSError, ValueError):
                pass

    def do_spawn(
        self,
        name: str,
        argv: list[str],
        environ: dict[str, str],
        cwd: str,
        log: str,
        stop_signal: int,
        account: list[int] | None,
    ) -> dict[str, Any]:
        """Start a process under a name. account: [uid, gid] to run it as."""
        self._reap()
        if name in self.running:
            raise ValueError(f"{name} runs already")
        identity: dict[str, Any] = {}
        if account is not None:
            identity = {"user": account[0], "group": account[1], "extra_groups": []}
        with open(log, "ab") as output:
            self.running[name] = subprocess.Popen(
                argv,
                env=environ,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - this process has one thread
                **identity,
            )
        self.stop_signals[name] = stop_signal
        self._record()
        return {"pid": self.running[name].pid}

    def do_list(self) -> dict[str, Any]:
        """The processes that run: name -> process number."""
        self._reap()
        return {"running": {name: process.pid for name, process in self.running.items()}}

    def do_stop(self, name: str) -> dict[str, Any]:
        """Ask a process to end in its own good way, paused or not."""
        if name in self.running:
            send(self._tree(name), signal.SIGCONT)
            send([self.running[name].pid], self.stop_signals[name])
        return self.do_list()

    def do_kill(self, name: str) -> dict[str, Any]:
        """SIGKILL a process and all its children."""
        if name in self.running:
            pid = self.running[name].pid
            # Stopped first, it cannot fork between the listing and the killing.
            send([pid], signal.SIGSTOP)
            tree = [*descendants(pid), pid]
            send(tree, signal.SIGKILL)
            self.running[name].wait()
            _wait_until_gone(tree, 5.0)
        return self.do_list()

    def do_pause(self, name: str) -> dict[str, Any]:
        """SIGSTOP a process and all its children."""
        if name in self.running:
            send([self.running[name].pid], signal.SIGSTOP)
            send(descendants(self.running[name].pid), signal.SIGSTOP)
        return self.do_list()

    def do_resume(self, name: str) -> dict[str, Any]:
        """SIGCONT a process and all its children."""
        if name in self.running:
            send(self._tree(name), signal.SIGCONT)
        return self.do_list()

    def do_release(self) -> dict[str, Any]:
        """From now on nobody's end ends the set."""
        self.owner = None
        if self._owner_descriptor is not None:
            self._selector.unregister(self._owner_descriptor)
            os.close(self._owner_descriptor)
            self._owner_descriptor = None
        return {}

    def do_end(self) -> dict[str, Any]:
        """End every server, then the supervisor."""
        self.ending = True
        return {}

    def _tree(self, name: str) -> list[int]:
        pid = self.running[name].pid
        return [*descendants(pid), pid]

    def _reap(self) -> None:
        ended = [name for name, process in self.running.items() if process.poll() is not None]
        for name in ended:
            del self.running[name]
        # Adopted children of killed servers.
        known = {process.pid for process in self.running.values()}
        for pid in self._zombies() - known:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass
        if ended:
            self._record()

    def _zombies(self) -> set[int]:
        """Children that ended and wait to be seen (Linux), without touching those that Popen looks after."""
        try:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        except OSError:
            return set()
        return {int(pid) for pid in children if _stat(int(pid)) is None}

    def _record(self) -> None:
        running = {
            name: {"pid": process.pid, "started": started(process.pid)}
            for name, process in self.running.items()
        }
        aside = self.directory / "processes.json.new"
        aside.write_text(json.dumps(running))
        aside.replace(self.directory / "processes.json")

    def _stop_all(self) -> None:
        """The servers end in the reverse order of their start: who uses another ends before it."""
        deadline = time.monotonic() + (GRACE if not self.remove else 2.0)
        send(descendants(os.getpid()), signal.SIGCONT)
        for name in reversed(list(self.running)):
            # Data that goes away needs no checkpoint: PostgreSQL's immediate shutdown is SIGQUIT.
            quick = self.remove and self.stop_signals[name] == signal.SIGINT
            send([self.running[name].pid], signal.SIGQUIT if quick else self.stop_signals[name])
            if name.endswith("gateway"):
                self._wait_for(name, min(deadline, time.monotonic() + 1.0))
        for name in list(self.running):
            self._wait_for(name, deadline)
        for _ in range(50):
            left = descendants(os.getpid())
            if not left:
                break
            send(left, signal.SIGKILL)
            time.sleep(0.02)
        sweep(self.directory)
        self._reap()

    def _wait_for(self, name: str, deadline: float) -> None:
        try:
            self.running[name].wait(max(deadline - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            pass


def main() -> None:
    """`supervisor.py DIRECTORY CONTROL_SOCKET OWNER_PID OWNER_STARTED keep|remove`."""
    directory, control, owner_pid, owner_started, end = sys.argv[1:]
    owner = (int(owner_pid), owner_started)
    supervisor = Supervisor(Path(directory), control, owner, remove=end == "remove")

    def ready() -> None:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        # The pipe to the starter closes here; later words go to the log, which is the error stream.
        os.dup2(2, 1)

    supervisor.serve(ready)


if __name__ == "__main__":
    main()
