"""What every request passes: a request id, its time, security headers, the body limit, CORS, and its turn.

Two layers, not one for each, because every layer costs every request a wrapper around each of its messages: `Front`
answers for the connection as a whole, `Turns` for what this service does itself. What is sent on to the old back end
(`scorekeeper.forwarding`) passes the first alone.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Final

import structlog
from prometheus_client import Histogram
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipResponder, IdentityResponder
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scorekeeper.cache import UserCache
from scorekeeper.caller import Caller, caller
from scorekeeper.errors import body_too_large, internal, unavailable
from scorekeeper.metrics import REQUESTS

log = structlog.get_logger("scorekeeper")

#: Bytes of a whole request body; the old back end's limit.
LARGEST_BODY = 10_485_760

#: Bytes where only a few names and ids are taken: nobody can make a worker parse megabytes without an account.
SMALL_BODY = 1_048_576
_SMALL = re.compile(r"/api/(users|identities)(?!/me/profile-picture$)(/.*)?")

#: Requests that one worker serves at a time: enough to keep two stores busy, few enough for each to be
#: answered well within the shortest deadline (0.25 s for the secondary).
AT_ONCE = 16

#: Seconds that a request waits for its turn.
PATIENCE = 60.0

#: Bytes from which on an answer is compressed: those below a packet's size gain nothing.
COMPRESSED_FROM: Final = 1400

#: A third of level 9's time for a few percent.
_LEVEL: Final = 5

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")

_Header = tuple[bytes, bytes]

#: On every answer. The API gives JSON to scripts and nothing to frame, run or sniff; the page at /docs is its own.
_ALWAYS: Final[list[_Header]] = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
_NOTHING_TO_RUN: Final = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
_HTTPS_ONLY: Final = (b"strict-transport-security", b"max-age=31536000")
_PAGES: Final = ("/docs", "/redoc")


class Front:
    """Gives each request an id (its own ``X-Request-Id`` if it has a sane one), in logs and answer; times it; puts
    security and CORS headers on the answer; refuses a body over the route's limit with 413, declared or counted as it
    comes.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        """Pages of these ``origins`` may read the answers (``*``: of any)."""
        self._app = app
        self._cors = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "PUT", "PATCH", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
        self._times: dict[tuple[str, str, int], Histogram] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500
        given: dict[bytes, bytes] = dict(scope["headers"])
        request_id = _named(given, scope)
        of_page = b"origin" in given
        limit = SMALL_BODY if _SMALL.fullmatch(scope["path"]) else LARGEST_BODY
        size, begun = 0, False

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise _TooLarge
            return message

        async def completed(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                begun, status = True, message["status"]
                headers = message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
                _secure(headers, scope)
                if not of_page:
                    _vary(headers)
            await send(message)

        answer: Send = completed
        if of_page:
            answer = functools.partial(self._cors.send, send=completed, request_headers=Headers(scope=scope))
        try:
            if of_page and scope["method"] == "OPTIONS" and b"access-control-request-method" in given:
                await self._preflight(scope)(scope, receive, completed)
                return
            declared = given.get(b"content-length", b"")
            if declared.isdigit() and int(declared) > limit:
                raise _TooLarge
            await self._app(scope, counted, answer)
        except _TooLarge:
            if not begun:
                await body_too_large(limit).response()(scope, receive, answer)
        finally:
            self._time(scope, status).observe(time.perf_counter() - began)

    def _preflight(self, scope: Scope) -> Response:
        """CORS's own answer, but 204, as the old back end's is."""
        response = self._cors.preflight_response(Headers(scope=scope))
        if response.status_code != 200:
            return response
        headers = {k: v for k, v in response.headers.items() if k not in ("content-length", "content-type")}
        return Response(status_code=204, headers=headers)

    def _time(self, scope: Scope, status: int) -> Histogram:
        key = scope["method"], getattr(scope.get("route"), "path", "unknown"), status
        if key not in self._times:
            self._times[key] = REQUESTS.labels(key[0], key[1], str(status))
        return self._times[key]


def _named(given: Mapping[bytes, bytes], scope: Scope) -> bytes:
    """The request's id, which log lines and audit events have from here on."""
    request_id = given.get(b"x-request-id", b"")
    if not _REQUEST_ID.fullmatch(request_id):
        request_id = os.urandom(16).hex().encode()
    text, client = request_id.decode(), scope.get("client")
    # Neither is taken back: a server gives every request a context of its own.
    caller.set(Caller(client[0] if client else None, text))
    structlog.contextvars.bind_contextvars(request_id=text)
    return request_id


def _secure(headers: list[_Header], scope: Scope) -> None:
    # What is there already is a route's own, or the old back end's.
    there = {name for name, _ in headers}
    headers += [header for header in _ALWAYS if header[0] not in there]
    if _NOTHING_TO_RUN[0] not in there and not scope["path"].startswith(_PAGES):
        headers.append(_NOTHING_TO_RUN)
    if scope["scheme"] == "https":
        headers.append(_HTTPS_ONLY)


def _vary(headers: list[_Header]) -> None:
    """The answer to a page of some origin would have further headers."""
    there = b", ".join(value for name, value in headers if name == b"vary")
    if there:
        headers[:] = [header for header in headers if header[0] != b"vary"]
    headers.append((b"vary", there + b", Origin" if there else b"Origin"))


class Turns:
    """What this service answers itself: so many requests at a time, errors that nobody caught as 500, large answers
    compressed.

    A burst that reached the stores at once would wait in their pools instead, where every deadline runs: all
    of it would fail together. So the others wait here, for a bounded time. Operators' routes do not wait.

    Before a request that may have changed identities is answered, the cache is told. By the path: whatever those routes
    do, and whoever adds one, what people are shown of themselves is never older.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(self._app, scope, send)
        if scope["path"].startswith(("/api/health", "/metrics")):
            await self._serve(scope, receive, answer)
            return
        if self._turns.locked():
            try:
                async with asyncio.timeout(PATIENCE):
                    await self._turns.acquire()
            except TimeoutError:
                crowded = unavailable(
                    "The service is very busy at the moment, please try again", "overloaded"
                )
                await crowded.response()(scope, receive, send)
                return
        else:
            # Nobody is before it: this returns at once, and needs no alarm clock.
            await self._turns.acquire()
        try:
            await self._serve(scope, receive, answer)
        finally:
            self._turns.release()

    async def _serve(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            await self._app(scope, receive, answer.send)
        except Exception:
            if answer.begun:
                raise
            log.exception("request failed")
            await internal().response()(scope, receive, answer.send)


class _Answer:
    """An answer on its way out."""

    def __init__(self, app: ASGIApp, scope: Scope, send: Send) -> None:
        self.begun = False
        self._app = app
        self._scope = scope
        self._send = send
        self._start: Message | None = None
        self._compressing: IdentityResponder | None = None

    async def send(self, message: Message) -> None:
        """Send a message on; the first waits for the second, which shows whether to compress."""
        if self._compressing is not None:
            await self._compressing.send_with_compression(message)
        elif message["type"] == "http.response.start":
            if _may_change_identities(self._scope):
                cache: UserCache = self._scope["app"].state.cache
                await cache.forget_identities()
            self._start, self.begun = message, True
        elif self._start is None:
            await self._send(message)
        elif not message.get("more_body") and len(message.get("body", b"")) < COMPRESSED_FROM:
            await self._send(self._start)
            await self._send(message)
        else:
            self._compressing = self._compressor()
            await self._compressing.send_with_compression(self._start)
            await self._compressing.send_with_compression(message)

    def _compressor(self) -> IdentityResponder:
        accepted = Headers(scope=self._scope).get("accept-encoding", "")
        responder = (
            GZipResponder(self._app, COMPRESSED_FROM, _LEVEL)
            if "gzip" in accepted
            else IdentityResponder(self._app, COMPRESSED_FROM)
        )
        responder.send = self._send
        return responder


def _may_change_identities(scope: Scope) -> bool:
    return scope["method"] not in ("GET", "HEAD", "OPTIONS") and scope["path"].startswith("/api/identities")


class _TooLarge(BaseException):
    """Passes the framework's handlers of ordinary exceptions, up to `Front`."""
