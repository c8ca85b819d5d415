"""What every request passes: a request id, its time, the body limit, and CORS."""

from __future__ import annotations

import asyncio
import re
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scorekeeper.errors import body_too_large, internal, unavailable
from scorekeeper.metrics import REQUESTS

log = structlog.get_logger("scorekeeper")

#: Bytes of a whole request body; the old back end's limit.
LARGEST_BODY = 10_485_760

#: Requests that one worker serves at a time: enough to keep two stores busy, few enough for each to be
#: answered well within the shortest deadline (0.25 s for the secondary).
AT_ONCE = 16

#: Seconds that a request waits for its turn.
PATIENCE = 60.0

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestContext:
    """Gives each request an id (its own ``X-Request-Id`` if it has a sane one), in logs and answer; times
    it.
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

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                route = getattr(scope.get("route"), "path", "unknown")
                seconds = time.perf_counter() - began
                REQUESTS.labels(scope["method"], route, str(status)).observe(seconds)


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
    """Refuses a body over `LARGEST_BODY` bytes with 413, declared or counted as it comes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > LARGEST_BODY:
            await body_too_large(LARGEST_BODY).response()(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGEST_BODY:
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
                await body_too_large(LARGEST_BODY).response()(scope, receive, send)


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
