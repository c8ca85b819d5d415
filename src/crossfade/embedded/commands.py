"""Runs the programs of the set-up; none of them outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from crossfade.embedded.errors import EmbeddedError
from crossfade.embedded.places import Account
from crossfade.embedded.supervisor import die_with_parent


class CommandFailed(Exception):
    """A program ended with a status other than 0.

    program: its name; status: its exit status, negative for a signal; output: what it printed.
    """

    def __init__(self, program: str, status: int, output: str) -> None:
        super().__init__(f"{program} ended with status {status}: {last_line(output)}")
        self.program = program
        self.status = status
        self.output = output


def last_line(output: str) -> str:
    """The last line that says something, for a one-line message; an error line is preferred."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    wrong = [line for line in lines if line.startswith(("E:", "FATAL", "fatal", "error", "initdb: error"))]
    return (wrong or lines or ["(it printed nothing)"])[-1]


class Commands:
    """Runs programs from several threads, and ends them all at once when the set-up is given up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._given_up = False

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        environ: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        account: Account | None = None,
        stdin: str | None = None,
    ) -> str:
        """Run a program to its end and return what it printed, both streams together.

        account: whom to run it as, when it differs from the caller. Raises CommandFailed for an exit status
        other than 0, EmbeddedError when there is no such program.
        """
        identity: dict[str, int | list[int]] = {}
        if account is not None and account.switches:
            identity = {"user": account.uid, "group": account.gid, "extra_groups": []}
        with self._lock:
            if self._given_up:
                raise CommandFailed(str(argv[0]), -signal.SIGTERM, "given up")
            try:
                process = subprocess.Popen(  # type: ignore[call-overload]
                    [str(word) for word in argv],
                    env={**os.environ, **(environ or {})},
                    cwd=cwd,
                    stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    start_new_session=True,
                    preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call, no lock
                    **identity,
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise EmbeddedError(f"cannot run {argv[0]} ({error}).") from error
            self._running.add(process)
        try:
            output, _ = process.communicate(stdin)
        finally:
            with self._lock:
                self._running.discard(process)
        if process.returncode != 0:
            raise CommandFailed(Path(argv[0]).name, process.returncode, output)
        return str(output)

    def give_up(self) -> None:
        """End everything that runs; later runs fail at once."""
        with self._lock:
            self._given_up = True
            for process in self._running:
                try:
                    # Each is the leader of its own session, so its group is the whole of it.
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
