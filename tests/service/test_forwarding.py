"""What this service does not know goes to the old back end: a real server, in this process, on a port of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import httpx
import pytest
import uvicorn

from scorekeeper.settings import SettingsError, load_settings

from .conftest import Serve, assert_problem


@dataclass
class Request:
    """What the old back end got, byte for byte."""

    line: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return dict(self.headers).get(name)


Answer = Callable[[Request, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class OldBackEnd:
    """Speaks HTTP as a test tells it to, one request to a connection."""

    answer: Answer | None = None
    requests: list[Request] = field(default_factory=list)
    seen: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = [
                (name.lower(), value.strip())
                for name, _, value in (line.partition(":") for line in head[1:-2])
            ]
            request = Request(head[0], headers, b"")
            async for part in self._body(reader, request):
                request.body += part
                self.seen.put_nowait(part)
            self.requests.append(request)
            if self.answer is None:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
            else:
                await self.answer(request, writer)
            await writer.drain()
        writer.close()

    @staticmethod
    async def _body(reader: asyncio.StreamReader, request: Request) -> AsyncIterator[bytes]:
        if request.header("transfer-encoding") == "chunked":
            while size := int(await reader.readuntil(b"\r\n"), 16):
                yield (await reader.readexactly(size + 2))[:-2]
            await reader.readuntil(b"\r\n")
        elif length := int(request.header("content-length") or 0):
            yield await reader.readexactly(length)


def says(head: str, *parts: bytes) -> Answer:
    async def answer(_request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()

    return answer


@pytest.fixture
async def old() -> AsyncIterator[OldBackEnd]:
    back_end = OldBackEnd()
    server = await asyncio.start_server(back_end.serve, "127.0.0.1", 0)
    back_end.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield back_end


@pytest.fixture
async def client(serve: Serve, old: OldBackEnd) -> AsyncIterator[httpx.AsyncClient]:
    """Speaks to the service over a socket, so that streaming is streaming."""
    service = await serve("dual_write", legacy_url=f"{old.url}/api/", legacy_patience=1.0)
    async with listening(service.app) as url, httpx.AsyncClient(base_url=url, timeout=30) as http:
        yield http


@contextlib.asynccontextmanager
async def listening(app: object) -> AsyncIterator[str]:
    config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off")  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    running = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no other word for it
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await running


async def test_a_request_arrives_as_it_was_sent(client: httpx.AsyncClient, old: OldBackEnd) -> None:
    old.answer = says(
        "HTTP/1.1 418 I'm a teapot\nContent-Type: text/x-tea\nContent-Length: 5\nX-Odd: a\nSet-Cookie: a=1\n"
        "Set-Cookie: b=2\nKeep-Alive: timeout=5\nConnection: close, X-Hop\nX-Hop: 1\n"
        "Access-Control-Allow-Origin: https://old.example\nServer: old",
        b"\x00tea\xff",
    )
    answer = await client.post(
        "/api/templates/a%2Fb/%C3%A9?x=1&x=2&y=%20",
        content=b"\x00body\xff",
        headers={
            "Authorization": "Bearer t", "Content-Type": "text/x-odd", "X-Mine": "1", "TE": "trailers",
            "Connection": "keep-alive, X-Private", "X-Private": "secret", "X-Request-Id": "mine-1",
            "Origin": "https://one.example",
        },
    )  # fmt: skip
    assert (answer.status_code, answer.content) == (418, b"\x00tea\xff")
    assert (answer.headers["content-type"], answer.headers["x-odd"]) == ("text/x-tea", "a")
    assert answer.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert answer.headers.get_list("access-control-allow-origin") == ["*"]
    for gone in ("keep-alive", "x-hop"):
        assert gone not in answer.headers
    assert len(answer.headers.get_list("date")) == 1

    [request] = old.requests
    assert request.line == "POST /api/templates/a%2Fb/%C3%A9?x=1&x=2&y=%20 HTTP/1.1"
    assert request.body == b"\x00body\xff"
    assert request.header("content-length") == "6"
    expected = {
        "authorization": "Bearer t", "content-type": "text/x-odd", "x-mine": "1", "host": old.url[7:],
        "x-forwarded-for": "127.0.0.1", "x-forwarded-proto": "http", "via": "1.1 scorekeeper",
        "x-forwarded-host": client.base_url.netloc.decode(), "x-request-id": "mine-1",
    }  # fmt: skip
    assert {name: request.header(name) for name in expected} == expected
    for gone in ("te", "x-private", "transfer-encoding"):
        assert request.header(gone) is None
    # A cookie that one caller was given is never another's.
    await httpx.AsyncClient(base_url=client.base_url).get("/api/templates")
    assert old.requests[1].header("cookie") is None


async def test_only_what_no_route_takes_is_sent_on(client: httpx.AsyncClient, old: OldBackEnd) -> None:
    assert (await client.get("/api/health/live")).status_code == 200
    assert_problem(await client.get("/api/users/me"), 401)
    assert_problem(await client.get("/elsewhere"), 404)
    for path in ("/api/../secret", "/api/%2e%2e/secret"):
        raw = httpx.Request("GET", client.base_url, extensions={"target": path.encode()})
        assert (await client.send(raw)).status_code == 404
    assert old.requests == []
    # A path that is known, with a method that is not.
    for method, path in (
        ("POST", "/api/wizard-games/migrate"),
        ("GET", "/api/users/x/y/z"),
        ("DELETE", "/api/elo"),
    ):
        assert (await client.request(method, path)).json() == {}
        assert old.requests[-1].line == f"{method} {path} HTTP/1.1"
    assert [request.header("transfer-encoding") for request in old.requests] == [None] * 3


async def test_bodies_are_streamed_both_ways(client: httpx.AsyncClient, old: OldBackEnd) -> None:
    go_on = asyncio.Event()

    async def sent() -> AsyncIterator[bytes]:
        yield b"first"
        # The old back end has this part before there is another.
        assert await asyncio.wait_for(old.seen.get(), 10) == b"first"
        yield b"second"

    async def answer(_request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        await writer.drain()
        await go_on.wait()
        writer.write(b"3\r\ntwo\r\n0\r\n\r\n")

    old.answer = answer
    async with client.stream("PUT", "/api/templates", content=sent()) as answered:
        parts = answered.aiter_raw()
        assert await asyncio.wait_for(anext(parts), 10) == b"one"
        go_on.set()
        assert [part async for part in parts] == [b"two"]
    assert old.requests[0].body == b"firstsecond"


async def test_an_old_back_end_that_fails_is_an_error_of_the_contract(
    client: httpx.AsyncClient, old: OldBackEnd
) -> None:
    async def is_silent(_request: Request, _writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(20)

    async def hangs_up(_request: Request, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def speaks_nonsense(_request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"what?\r\n\r\n")

    for behaviour, status in ((is_silent, 504), (hangs_up, 502), (speaks_nonsense, 502)):
        old.answer = behaviour
        assert_problem(await client.get("/api/templates"), status)
    assert len(old.requests) == 3

    async def breaks_off(_request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")

    old.answer = breaks_off
    with pytest.raises(httpx.RemoteProtocolError):
        await client.get("/api/templates")


async def test_an_old_back_end_that_hangs_keeps_no_other_request_waiting(
    client: httpx.AsyncClient, old: OldBackEnd
) -> None:
    released = asyncio.Event()

    async def is_held(_request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{")
        await writer.drain()
        await released.wait()
        writer.write(b"}")

    old.answer = is_held
    # More than this service serves of its own at a time.
    many = [asyncio.create_task(client.get("/api/templates")) for _ in range(20)]
    while len(old.requests) < len(many):  # noqa: ASYNC110 - what it waits for is the other server
        await asyncio.sleep(0.01)
    assert (await client.get("/api/users/lookup/ann")).status_code == 404
    released.set()
    assert {answer.status_code for answer in await asyncio.gather(*many)} == {200}


async def test_an_address_where_nobody_is_and_one_that_leads_back(
    serve: Serve, unused_tcp_port: int, old: OldBackEnd
) -> None:
    service = await serve("dual_write", legacy_url=f"http://127.0.0.1:{unused_tcp_port}")
    assert_problem(await service.get("/api/templates"), 502)
    async with listening(service.app) as url:
        looped = await serve("dual_write", legacy_url=url)
        body = assert_problem(await looped.get("/api/templates"), 502)
    assert "LEGACY_URL" in body["error"]


async def test_without_an_old_back_end_it_is_not_found(serve: Serve) -> None:
    service = await serve("dual_write")
    assert_problem(await service.get("/api/templates"), 404)
    assert_problem(await service.http.post("/api/wizard-games/migrate"), 405)


@pytest.mark.parametrize("url", ["old:5000", "ftp://old", "http://", "http://old:port", "http://old/?x=1"])
def test_an_address_that_cannot_be_is_named_at_start(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEGACY_URL", url)
    with pytest.raises(SettingsError, match="LEGACY_URL is not the address"):
        load_settings(
            mongo_uri="mongodb://h/d",
            database_url="postgresql://h/d",
            redis_url="redis://h",
            jwt_secret="s",
            _env_file=None,
        )
