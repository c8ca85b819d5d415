"""What every request passes: a request id, its time, security headers, the body limit, and CORS."""

from __future__ import annotations

import asyncio
import re
import time
import uuid

import structlog
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
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

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


#: On every answer. The API gives JSON to scripts and nothing to frame, run or sniff; the page at /docs is its own.
_SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
]
_NOTHING_TO_RUN = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
_NO_STORE = (b"cache-control", b"no-store")
_HTTPS_ONLY = (b"strict-transport-security", b"max-age=31536000")
_PAGES = ("/docs", "/redoc")


class RequestContext:
    """Gives each request an id (its own ``X-Request-Id`` if it has a sane one), in logs and answer; times it; puts
    the security headers on the answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        began = time.perf_counter()
        status = 500
        client = scope.get("client")
        caller.set(Caller(client[0] if client else None, request_id))

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(message["headers"], scope, request_id)
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                route = getattr(scope.get("route"), "path", "unknown")
                seconds = time.perf_counter() - began
                REQUESTS.labels(scope["method"], route, str(status)).observe(seconds)


def _add_headers(headers: list[tuple[bytes, bytes]], scope: Scope, request_id: str) -> None:
    headers.append((b"x-request-id", request_id.encode("ascii")))
    # What is there already is a route's own, or the old back end's.
    there = {name.lower() for name, _ in headers}
    headers += [header for header in _SECURITY_HEADERS if header[0] not in there]
    if b"content-security-policy" not in there and not scope["path"].startswith(_PAGES):
        headers.append(_NOTHING_TO_RUN)
    if scope["scheme"] == "https":
        headers.append(_HTTPS_ONLY)
    if b"cache-control" not in there:
        headers.append(_NO_STORE)


class Turns:
    """Lets a worker serve so many requests at a time; the others wait here, for a bounded time.

    A burst that reached the stores at once would wait in their pools instead, where every deadline runs: all
    of it would fail together. Operators' routes do not wait.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["path"].startswith(("/api/health", "/metrics")):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(PATIENCE):
                await self._turns.acquire()
        except TimeoutError:
            crowded = unavailable("The service is very busy at the moment, please try again", "overloaded")
            await crowded.response()(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._turns.release()


class IdentityChanges:
    """Tells the cache that identities have changed, before a request that may have changed some is answered.

    By the path: whatever those routes do, and whoever adds one, what people are shown of themselves is never older.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if (
            scope["type"] != "http"
            or scope["method"] in ("GET", "HEAD", "OPTIONS")
            or not scope["path"].startswith("/api/identities")
        ):
            await self._app(scope, receive, send)
            return
        cache: UserCache = scope["app"].state.cache

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                await cache.forget_identities()
            await send(message)

        await self._app(scope, receive, telling)


class ErrorBoundary:
    """Answers 500 for what nobody caught, inside CORS, so that a browser lets the client read it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            if scope["type"] != "http" or begun:
                raise
            log.exception("request failed")
            await internal().response()(scope, receive, send)


class BodyLimit:
    """Refuses a body over the route's limit with 413, declared or counted as it comes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = SMALL_BODY if _SMALL.fullmatch(scope["path"]) else LARGEST_BODY
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > limit:
            await body_too_large(limit).response()(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise _TooLarge
            return message

        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, counted, noting)
        except _TooLarge:
            if not begun:
                await body_too_large(limit).response()(scope, receive, send)


class _TooLarge(BaseException):
    """Passes the framework's handlers of ordinary exceptions, up to `BodyLimit`."""


class Cors(CORSMiddleware):
    """CORS whose preflight answers 204, as the old back end's does."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Without a body."""
        response = super().preflight_response(request_headers)
        if response.status_code != 200:
            return response
        headers = {k: v for k, v in response.headers.items() if k not in ("content-length", "content-type")}
        return Response(status_code=204, headers=headers)
