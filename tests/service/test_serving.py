"""The process as a whole: what it does with requests that are on their way when it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import inspect
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from scorekeeper import operations
from scorekeeper.friends import routes as friends
from scorekeeper.games import routes as games
from scorekeeper.identities import routes as identities
from scorekeeper.serving import Listener, bind
from scorekeeper.users import routes as users

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
        """On one connection as long as it lasts, or on a new one each time."""
        nonlocal answered
        limits = httpx.Limits(max_keepalive_connections=number % 2)
        async with httpx.AsyncClient(base_url=base, timeout=30, limits=limits) as http:
            for turn in range(10**6):
                try:
                    # A connection is refused, or its requests are answered: nothing in between.
                    if number < CLIENTS // 2:
                        body = {"username": f"User {number} {turn}", "password": "secret1"}
                        answer = await http.post("/api/users/register", json=body)
                    else:
                        answer = await http.get("/api/health/live")
                except httpx.ConnectError:
                    return
                assert answer.status_code in (200, 201), (tmp_path / "log").read_text()[-4000:]
                answered += 1

    async with running(tmp_path, environ, workers) as process:
        clients = [asyncio.create_task(ask(number)) for number in range(CLIENTS)]
        await asyncio.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        await asyncio.gather(*clients)
        await asyncio.to_thread(process.wait, 60)
    assert answered >= CLIENTS


@pytest.fixture(params=["tcp", "unix"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, int, str | None]:
    return ("127.0.0.1", 0, str(tmp_path / "socket") if request.param == "unix" else None)


async def test_a_listener_is_left_when_all_who_came_were_taken_and_no_other_can_come(
    place: tuple[str, int, str | None],
) -> None:
    listener = Listener(bind(*place))
    listener.socket.listen(64)
    address = listener.socket.getsockname()

    def connected() -> socket.socket:
        client = socket.socket(listener.socket.family)
        client.settimeout(10)
        client.connect(address)
        return client

    early = [connected() for _ in range(20)]
    leaving = asyncio.create_task(listener.leave())
    await asyncio.sleep(0.05)
    late = asyncio.create_task(asyncio.to_thread(connected))
    taken = []
    for number in range(len(early)):
        assert not leaving.done()
        one, _ = await asyncio.to_thread(listener.socket.accept)
        taken.append(one)
        one.sendall(bytes([number]))
        # Longer altogether than handshakes are waited for.
        await asyncio.sleep(0.05)
    await asyncio.wait_for(leaving, 10)
    listener.socket.close()
    with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
        await late
    assert [client.recv(1)[0] for client in early] == list(range(len(early)))
    for each in (*early, *taken):
        each.close()


async def test_a_listener_that_nobody_listens_on_yet_is_left_at_once(
    place: tuple[str, int, str | None],
) -> None:
    listener = Listener(bind(*place))
    await asyncio.wait_for(listener.leave(), 2)
    listener.socket.close()


def test_a_file_that_is_no_socket_is_not_taken_away(tmp_path: Path) -> None:
    (tmp_path / "letters").write_text("kept")
    with pytest.raises(OSError, match="in use"):
        bind("", 0, str(tmp_path / "letters"))
    assert (tmp_path / "letters").read_text() == "kept"


async def test_a_path_that_the_next_process_serves_already_is_left_to_it(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    old = Listener(bind("", 0, path))
    old.socket.listen()
    with bind("", 0, path) as new, socket.socket(socket.AF_UNIX) as client:
        new.listen()
        await old.leave()
        old.socket.close()
        client.connect(path)


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


@pytest.mark.parametrize("room", [friends, games, identities, operations, users])
def test_no_route_hands_anything_to_a_thread(room: Any) -> None:
    # FastAPI does, with every function that is no coroutine: several times what all else of a small answer takes.
    called = [route.dependant for route in room.router.routes]
    for dependant in called:
        called += dependant.dependencies
    assert called
    for call in (dependant.call for dependant in called):
        assert inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__), call


async def test_a_request_keeps_its_id_and_gets_one_if_it_has_none(serve: Serve) -> None:
    service = await serve()
    answer = await service.http.get("/api/health/live", headers={"X-Request-Id": "abc-123"})
    assert answer.headers["x-request-id"] == "abc-123"
    for odd in ("", "a b", "x" * 65, "\u00e9"):
        answer = await service.http.get("/api/health/live", headers={"X-Request-Id": odd.encode()})
        assert len(answer.headers["x-request-id"]) == 32
