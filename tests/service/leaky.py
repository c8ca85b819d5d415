"""Tests that write a secret into a log, each in its own way: not of the suite, run by `test_log_scan`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import structlog

PASSWORD, TOKEN = 'corr"ect hörse', "head.payload.signature"
log = structlog.get_logger("scorekeeper")


def _traceback(_: Path) -> None:
    try:
        raise RuntimeError(f"cannot insert {TOKEN}")
    except RuntimeError:
        log.exception("request failed")


WAYS: dict[str, Callable[[Path], object]] = {
    "field": lambda _: log.debug("a line", given={"body": [PASSWORD]}),
    "traceback": _traceback,
    "library": lambda _: logging.getLogger("driver").warning("sent %s", PASSWORD),
    "stderr": lambda _: sys.stderr.write(TOKEN),
    "process": lambda folder: (folder / "log").write_text(f"a line\n{TOKEN}"),
    "nowhere": lambda _: log.info("a line"),
}


@pytest.mark.parametrize("way", WAYS)
def test_leak(way: str, tmp_path: Path) -> None:
    answers = httpx.MockTransport(lambda _: httpx.Response(200, json={"token": TOKEN}))
    with httpx.Client(transport=answers, base_url="http://service") as http:
        http.post("/api/users/login", json={"username": "Ann", "password": PASSWORD})
    WAYS[way](tmp_path)
