"""The scan of the logs (`log_scan`) knows the secrets of a test, and finds one wherever it was written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from .conftest import ROOT, SECRET, Serve, password_hashes
from .leaky import WAYS
from .log_scan import LogScan


async def test_secrets_are_what_clients_send_and_get_and_what_the_stores_hold(
    serve: Serve, log_scan: LogScan
) -> None:
    service = await serve()
    token = (await service.register("Ann", "correct horse")).json()["token"]
    assert (await service.log_in("Ann", "wrong horse")).status_code == 401
    await service.get("/api/users/me", "a.forged.token")
    [hashed] = password_hashes(service.documents, service.database_url)
    assert hashed.startswith("$2b$")
    assert log_scan.secrets == {
        SECRET: "secret",
        "correct horse": "password",
        "wrong horse": "password",
        token: "token",
        "a.forged.token": "token",
    }


def test_a_test_that_logs_a_secret_fails_in_whichever_way_it_does() -> None:
    options = ["-n", "0", "-p", "no:cacheprovider", "-rA"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options, Path(__file__).with_name("leaky.py")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    leaking = {f"test_leak[{way}]" for way in WAYS if way != "nowhere"}
    assert set(re.findall(r"^ERROR \S+::(\S+)", ended.stdout, re.MULTILINE)) == leaking, ended.stdout
