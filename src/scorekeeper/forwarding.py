"""What this service does not know goes to the old back end, so that one address serves the whole client.

A request under ``/api`` that no route takes is sent on as it is, and its answer comes back as it is: both are
streamed, neither is read. Left out are the headers that belong to one connection (RFC 9110, 7.6.1); added are those
that tell the old back end who asks (``X-Forwarded-*``, ``Via``). Nothing is sent twice: a request that failed on its
way may have been carried out.

It takes no turn of `scorekeeper.http.Turns`: an old back end that hangs must not keep this one's own requests waiting.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Final

import httpx
import structlog
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scorekeeper.errors import Problem
from scorekeeper.metrics import FORWARDED

log = structlog.get_logger("scorekeeper")

#: Seconds to reach the old back end: it stands next to this service.
CONNECT: Final = 2.0

#: Requests that are with the old back end at a time; more wait as long as for a connection.
AT_ONCE: Final = 100

_NAME: Final = b"scorekeeper"
_OF_ONE_CONNECTION: Final = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
        b"trailer", b"transfer-encoding", b"upgrade",
    )
)  # fmt: skip
# The server in front answers this one itself.
_NOT_SENT: Final = _OF_ONE_CONNECTION | {b"host", b"expect", b"via"}
# This service's own server and CORS rules write these.
_NOT_RETURNED: Final = _OF_ONE_CONNECTION | {b"date", b"server"}

_Header = tuple[bytes, bytes]


class LegacyBackEnd:
    """Connections to the old back end.

    Args:
        url: its address, without the path ``/api``.
        patience: seconds that it may be silent, before its answer or within it, or take nothing of a request.
    """

    def __init__(self, url: str, patience: float) -> None:
        self._base = httpx.URL(url)
        # A transport, not a client: a client keeps cookies, and would give one caller those of another.
        self._transport = httpx.AsyncHTTPTransport(
            trust_env=False, limits=httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=20)
        )
        self._timeout = httpx.Timeout(patience, connect=CONNECT, pool=CONNECT).as_dict()

    async def send(
        self,
        method: str,
        target: bytes,
        headers: Sequence[_Header],
        body: AsyncIterator[bytes] | None,
    ) -> httpx.Response:
        """Send a request; the answer's body is not read yet, and must be closed.

        Raises:
            Problem: 502, it cannot be reached or broke off; 504, it was silent for too long.
        """
        base_path = self._base.raw_path.rstrip(b"/")
        request = httpx.Request(
            method,
            self._base.copy_with(raw_path=base_path + target),
            headers=list(headers),
            content=body,
            extensions={"timeout": self._timeout},
        )
        try:
            return await self._transport.handle_async_request(request)
        except httpx.TimeoutException as cause:
            FORWARDED.labels("timeout").inc()
            log.warning("the old back end did not answer in time", cause=type(cause).__name__)
            raise Problem(504, "legacy-timeout", "This part of the service does not answer in time") from None
        except httpx.TransportError as cause:
            FORWARDED.labels("unreachable").inc()
            log.warning("the old back end cannot be reached; LEGACY_URL sets it", cause=type(cause).__name__)
            raise Problem(502, "legacy-unreachable", "This part of the service cannot be reached") from None

    async def close(self) -> None:
        """Close every connection."""
        await self._transport.aclose()


class Forwarding:
    """Sends on what none of the routes takes.

    Args:
        app: takes the rest.
        routes: those of this service.
        legacy: where to.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute], legacy: LegacyBackEnd) -> None:
        self._app = app
        self._routes = routes
        self._legacy = legacy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or not _is_forwarded(scope) or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        try:
            await self._forward(scope, receive, send)
        except Problem as problem:
            await problem.response()(scope, receive, send)
        except ClientDisconnect:
            FORWARDED.labels("abandoned").inc()

    def _is_known(self, scope: Scope) -> bool:
        return any(route.matches(scope)[0] is Match.FULL for route in self._routes)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        if any(_NAME in value for name, value in scope["headers"] if name == b"via"):
            raise Problem(502, "legacy-loop", "LEGACY_URL leads back to this service")
        query = scope["query_string"]
        answer = await self._legacy.send(
            scope["method"],
            scope["raw_path"] + (b"?" + query if query else b""),
            list(_headers_sent(scope)),
            _body(receive) if _has_body(scope) else None,
        )
        FORWARDED.labels("answered").inc()
        streamed = StreamingResponse(_streamed(answer), answer.status_code)
        streamed.raw_headers = [
            (name.lower(), value)
            for name, value in answer.headers.raw
            if name.lower() not in _dropped(answer.headers.raw, _NOT_RETURNED)
            and not name.lower().startswith(b"access-control-")
        ]
        await streamed(scope, receive, send)


def _is_forwarded(scope: Scope) -> bool:
    path: str = scope["path"]
    # What is above /api after all is nobody's to ask for.
    return path.startswith("/api/") and ".." not in path.split("/")


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _dropped(headers: Iterable[_Header], names: frozenset[bytes]) -> frozenset[bytes]:
    """These names, and those that ``Connection`` says are of this connection too."""
    listed = (value for name, value in headers if name.lower() == b"connection")
    return names | {token.strip().lower() for value in listed for token in value.split(b",")}


def _headers_sent(scope: Scope) -> Iterable[_Header]:
    given: list[_Header] = scope["headers"]
    dropped = _dropped(given, _NOT_SENT)
    told = {b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"x-request-id"}
    yield from ((name, value) for name, value in given if name not in dropped | told)
    headers = Headers(scope=scope)
    client = scope.get("client")
    asked_for = [headers.get("x-forwarded-for"), client[0] if client else None]
    chain = ", ".join(address for address in asked_for if address)
    if chain:
        yield b"x-forwarded-for", chain.encode("latin-1")
    yield b"x-forwarded-proto", headers.get("x-forwarded-proto", scope["scheme"]).encode("latin-1")
    host = headers.get("x-forwarded-host", headers.get("host"))
    if host:
        yield b"x-forwarded-host", host.encode("latin-1")
    yield b"via", b"1.1 " + _NAME
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    if request_id:
        yield b"x-request-id", str(request_id).encode("latin-1")


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        more = message.get("more_body", False)
        if message.get("body"):
            yield message["body"]


async def _streamed(answer: httpx.Response) -> AsyncIterator[bytes]:
    assert isinstance(answer.stream, httpx.AsyncByteStream)
    try:
        async for chunk in answer.stream:
            yield chunk
    except httpx.TransportError as cause:
        # Its status is with the caller already: all that can be said is that the answer ends too early.
        FORWARDED.labels("broken_off").inc()
        log.warning("the old back end broke off its answer", cause=type(cause).__name__)
        raise
    finally:
        await answer.aclose()
