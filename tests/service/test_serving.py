"""The process as a whole: what it does with requests that are on their way when it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from .conftest import SECRET, Serve
from .test_accounts import person, picture
from .test_start import free_port

CLIENTS = 8


@contextlib.asynccontextmanager
async def running(cwd: Path, environ: dict[str, str], workers: int) -> AsyncIterator[subprocess.Popen[bytes]]:
    log = (cwd / "log").open("wb")
    process = subprocess.Popen(  # noqa: ASYNC220 - it is done before anything else is awaited
        [sys.executable, "-m", "scorekeeper", "--workers", str(workers)],
        cwd=cwd, env={"PATH": os.environ["PATH"], **environ}, stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60), httpx.AsyncClient() as http:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    await http.get(f"http://127.0.0.1:{environ['PORT']}/api/health/live")
                    break
                assert process.poll() is None
                await asyncio.sleep(0.1)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.faults
@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
async def test_no_request_is_lost_when_it_is_told_to_stop(
    mongo_uri: str, database_url: str, redis_url: str, tmp_path: Path, workers: int
) -> None:
    environ = {
        "MONGO_URI": mongo_uri, "DATABASE_URL": database_url, "REDIS_URL": redis_url, "JWT_SECRET": SECRET,
        "BCRYPT_ROUNDS": "4", "USE_POSTGRES": "true", "PORT": str(free_port()),
    }  # fmt: skip
    base = f"http://127.0.0.1:{environ['PORT']}"
    answered = 0

    async def ask(number: int) -> None:
        nonlocal answered
        async with httpx.AsyncClient(base_url=base, timeout=30) as http:
            for turn in range(10**6):
                body = {"username": f"User {number} {turn}", "password": "secret1"}
                try:
                    # A connection is refused, or its requests are answered: nothing in between.
                    answer = await http.post("/api/users/register", json=body)
                except httpx.ConnectError:
                    return
                assert answer.status_code == 201, (tmp_path / "log").read_text()[-4000:]
                answered += 1

    async with running(tmp_path, environ, workers) as process:
        clients = [asyncio.create_task(ask(number)) for number in range(CLIENTS)]
        await asyncio.sleep(1.5)
        process.send_signal(signal.SIGTERM)
        await asyncio.gather(*clients)
        await asyncio.to_thread(process.wait, 60)
    assert answered >= CLIENTS


async def test_large_answers_are_compressed_for_who_can_read_that(serve: Serve) -> None:
    service = await serve()
    ann = await person(service, "Ann")
    url = picture("JPEG", size=(600, 600))
    assert len(url) > 4_000
    await ann.call("PUT", "/me/profile-picture", {"profilePicture": url})
    sizes = []
    for accepted in ("gzip", "identity"):
        headers = {"Authorization": f"Bearer {ann.token}", "Accept-Encoding": accepted}
        async with service.http.stream("GET", "/api/users/me/profile-picture", headers=headers) as answer:
            raw = b"".join([chunk async for chunk in answer.aiter_raw()])
        assert answer.headers.get("content-encoding", "identity") == accepted
        assert "accept-encoding" in answer.headers["vary"].lower()
        assert url.encode() in (gzip.decompress(raw) if accepted == "gzip" else raw)
        sizes.append(len(raw))
    assert sizes[0] < sizes[1]
    small = await service.get("/api/health/live")
    assert "content-encoding" not in small.headers


async def test_a_request_keeps_its_id_and_gets_one_if_it_has_none(serve: Serve) -> None:
    service = await serve()
    answer = await service.http.get("/api/health/live", headers={"X-Request-Id": "abc-123"})
    assert answer.headers["x-request-id"] == "abc-123"
    for odd in ("", "a b", "x" * 65, "\u00e9"):
        answer = await service.http.get("/api/health/live", headers={"X-Request-Id": odd.encode()})
        assert len(answer.headers["x-request-id"]) == 32
