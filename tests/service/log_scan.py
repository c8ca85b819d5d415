"""No log holds a secret: after every test of the service, all that was written while it ran is looked through.

What is looked for are the test's own secrets: the passwords that its HTTP clients sent, the tokens that they sent or
were given, and what the fixtures tell (JWT secrets, password hashes). What is looked through are structlog's lines from
DEBUG on, the standard library's from INFO on, both streams of the process, and the logs of processes that it started.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from crossfade import observe

_PASSWORDS: Final = ("password", "currentPassword", "newPassword")

#: Characters of the shortest password that the service takes; shorter texts are in every log by chance.
_SHORTEST: Final = 6


class LogScan(logging.Handler):
    """The secrets of one test, and what was logged while it ran."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        #: Each with what it is.
        self.secrets: dict[str, str] = {}
        self._written: list[str] = []

    # -- secrets -----------------------------------------------------------------------------------

    def keep(self, kind: str, value: Any) -> None:
        """Look for this one."""
        if isinstance(value, str) and len(value.strip()) >= _SHORTEST:
            self.secrets[value] = kind

    def sent(self, request: httpx.Request) -> None:
        """Keep the secrets of a request."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            self.keep("token", token.strip())
        try:
            body = json.loads(request.content)
        except (httpx.RequestNotRead, ValueError, RecursionError):
            return
        for name in _PASSWORDS if isinstance(body, dict) else ():
            self.keep("password", body.get(name))

    def answered(self, answer: httpx.Response) -> None:
        """Keep the token that an answer brings."""
        try:
            body = json.loads(answer.content)
        except (httpx.ResponseNotRead, ValueError, RecursionError):
            return
        if isinstance(body, dict):
            self.keep("token", body.get("token"))

    # -- what was written --------------------------------------------------------------------------

    def write(self, text: str) -> None:
        """Take what structlog writes, as a stream; on to the process's own, where pytest shows it."""
        self._written.append(text)
        print(text, end="")  # noqa: T201 - a log line, in the place of the test's own output

    def isatty(self) -> bool:
        """Whether lines are for a person."""
        return False

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line of the standard library's."""
        self._written.append(self.format(record) + "\n")

    def leaks(self, *others: str) -> list[str]:
        """The lines with a secret in them, of what was logged and of these further texts; the first of each."""
        found = []
        for text in ("".join(self._written), *others):
            for secret, kind in self.secrets.items():
                at = min((at for form in _forms(secret) if (at := text.find(form)) >= 0), default=-1)
                if at >= 0:
                    line = text[text.rfind("\n", 0, at) + 1 :].partition("\n")[0]
                    found.append(f"{kind} {secret!r} in: {line}")
        return found


def _forms(secret: str) -> set[str]:
    """How a text may stand in a line."""
    written = (json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret))
    return {secret, *(text[1:-1] for text in written)}


@contextlib.contextmanager
def scanning() -> Iterator[LogScan]:
    """Collect what is logged, and the secrets of every HTTP client."""
    scan = LogScan()
    observe.configure_logging("DEBUG", stream=scan, json=True)  # type: ignore[arg-type]
    root = logging.getLogger()
    ask, ask_async = httpx.Client.send, httpx.AsyncClient.send

    def send(self: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        scan.sent(request)
        answer = ask(self, request, **options)
        scan.answered(answer)
        return answer

    async def send_async(self: httpx.AsyncClient, request: httpx.Request, **options: Any) -> httpx.Response:
        scan.sent(request)
        answer = await ask_async(self, request, **options)
        scan.answered(answer)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpx.Client, "send", send)
        patch.setattr(httpx.AsyncClient, "send", send_async)
        patch.setattr(root, "level", logging.INFO)
        root.addHandler(scan)
        yield scan
        root.removeHandler(scan)


def written_by_processes(folder: Path | None) -> list[str]:
    """The logs that processes of a test have left in its folder."""
    return (
        [path.read_text(errors="replace") for path in folder.rglob("*log") if path.is_file()]
        if folder
        else []
    )
