"""FaultProxy: a TCP proxy in front of a store that fails in exactly the way a test asks for.

Design
    One thread with one event loop per proxy, so it serves synchronous and asynchronous tests alike. The
    proxy reads the framing of the MongoDB and PostgreSQL protocols (`framing.py`), so "the next request" is
    one whole request, wherever TCP cuts it. What belongs to opening and watching a connection (greeting,
    login, heartbeat) is passed on and is no request, unless a test's own predicate matches it.

    Faults act at points that are certain. `cut_after_request` first receives the server's whole answer to
    that request and only then cuts: the server *has* acted, the client cannot know.

Modes (how the proxy treats all connections): `pass_through`, `refuse`, `delay`, `swallow_answers`.
Faults (one at a time, on the next requests that match): `cut_before_request`, `cut_after_request`.
At once: `cut`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from crossfade.embedded.ports import free_port
from crossfade.testing.framing import Answers, Request, Requests, protocol_of

T = TypeVar("T")
When = Callable[[bytes], bool]
#: Bytes read at a time.
_CHUNK = 256 * 1024
#: Seconds a method of the proxy may take before it is a defect of the proxy.
_PATIENCE = 10.0
#: Seconds the server has to answer a request that is to be cut after.
_ANSWER_WITHIN = 30.0


class Mode(Enum):
    """How the proxy treats every connection."""

    FORWARD = "forward"
    REFUSE = "refuse"
    SWALLOW = "swallow"


@dataclass
class Fault:
    """What happens to the next `left` requests for which `when` is true."""

    deliver: bool
    left: int
    when: When | None


@dataclass
class Counts:
    """What the proxy has seen and done since its start.

    connections: accepted; refused: turned away; requests: whole ones, cut or not; passed: bytes that were passed
    on, either way; faults: requests that met
    a fault; swallowed: bytes of answers not passed on; cut: connections reset on purpose; unanswered:
    requests to be cut after, to which the server gave no answer (in 30 seconds, or it ended the connection).
    """

    connections: int = 0
    refused: int = 0
    requests: int = 0
    passed: int = 0
    faults: int = 0
    swallowed: int = 0
    cut: int = 0
    unanswered: int = 0


class FaultProxy:
    """A proxy on a port of 127.0.0.1 in front of `uri`; starts passing everything through.

    uri: of the server; a URI of the scheme mongodb, postgresql or redis, with one host.
    The methods may be called from any thread, and return once the new behaviour is in force.
    """

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        if parts.hostname is None or parts.port is None:
            raise ValueError(f"the proxy needs a URI with one host and a port: {uri!r}")
        self._upstream = (parts.hostname, parts.port)
        scheme = parts.scheme.partition("+")[0]
        self._protocol = protocol_of(scheme)
        self._parts = parts
        self._mode = Mode.FORWARD
        self._delay = 0.0
        self._fault: Fault | None = None
        self._counts = Counts()
        self._pairs: set[_Pair] = set()
        self._server: asyncio.Server | None = None
        self._port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._call(self._listen())

    @property
    def port(self) -> int:
        """The port of 127.0.0.1 that the proxy listens on; it stays the same while refusing."""
        return self._port

    @property
    def uri(self) -> str:
        """The server's URI, with the proxy's address in place of the server's."""
        user, at, _ = self._parts.netloc.rpartition("@")
        return urlunsplit(self._parts._replace(netloc=f"{user}{at}127.0.0.1:{self._port}"))

    @property
    def counts(self) -> Counts:
        """What the proxy has seen and done until now; a copy."""
        return Counts(**vars(self._counts))

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._pairs)

    # --- modes ---

    def pass_through(self) -> None:
        """Forward everything at once; ends every other mode, takes back a fault that has not met its request.

        What was swallowed stays lost; connections that lost answers may be in any state, so they are cut.
        """
        self._call(self._pass_through())

    def refuse(self) -> None:
        """Refuse new connections (nothing listens), and reset the open ones."""
        self._call(self._refuse())

    def delay(self, seconds: float) -> None:
        """Hold back every piece of data for so long, in each direction; 0: no longer."""
        self._call(self._set_delay(seconds))

    def cut(self) -> int:
        """Reset the open connections now; new ones are served. Returns how many were reset."""
        return self._call(self._cut_all())

    def swallow_answers(self) -> None:
        """Deliver requests, and pass on no answer; connections stay open, new ones are accepted."""
        self._call(self._set_mode(Mode.SWALLOW))

    # --- faults ---

    def cut_before_request(self, n: int = 1, *, when: When | None = None) -> None:
        """Cut the connection of the next `n` requests that match, without delivering them.

        when: says of a request's bytes whether it matches; None: every request does.
        """
        self._call(self._set_fault(Fault(deliver=False, left=n, when=when)))

    def cut_after_request(self, n: int = 1, *, when: When | None = None) -> None:
        """Deliver the next `n` requests that match, wait until the server has answered, swallow the answer
        and cut the connection: the server has acted and the client does not know.

        when: says of a request's bytes whether it matches; None: every request does.
        """
        self._call(self._set_fault(Fault(deliver=True, left=n, when=when)))

    def close(self) -> None:
        """End the proxy and its connections. May be called again."""
        if self._loop.is_closed():
            return
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE)
        self._loop.close()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside the loop ---

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(_PATIENCE)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(
                self._accept, "127.0.0.1", self._port or free_port(), reuse_address=True, limit=_CHUNK
            )
            self._port = self._server.sockets[0].getsockname()[1]

    async def _pass_through(self) -> None:
        if self._mode is Mode.SWALLOW:
            for pair in [pair for pair in self._pairs if pair.swallowed]:
                await pair.reset()
        self._mode, self._delay, self._fault = Mode.FORWARD, 0.0, None
        await self._listen()

    async def _set_mode(self, mode: Mode) -> None:
        self._mode = mode
        await self._listen()

    async def _set_delay(self, seconds: float) -> None:
        self._delay = seconds

    async def _set_fault(self, fault: Fault) -> None:
        self._fault = fault

    async def _refuse(self) -> None:
        self._mode = Mode.REFUSE
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._cut_all()

    async def _end(self) -> None:
        await self._refuse()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _refuses(self) -> bool:
        return self._mode is Mode.REFUSE

    async def _cut_all(self) -> int:
        pairs = list(self._pairs)
        for pair in pairs:
            await pair.reset()
        return len(pairs)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refuses():
            # Was in the queue of the listening socket when it closed.
            self._counts.refused += 1
            _abort(writer)
            return
        self._counts.connections += 1
        try:
            upstream = await asyncio.open_connection(*self._upstream, limit=_CHUNK)
        except OSError:
            # The server itself is down: the client sees a reset, as from a host without a listener behind.
            _abort(writer)
            return
        if self._refuses():
            # It has begun to refuse meanwhile: what it resets then did not know of this one yet.
            self._counts.refused += 1
            _abort(upstream[1])
            _abort(writer)
            return
        pair = _Pair(self, (reader, writer), upstream)
        self._pairs.add(pair)
        try:
            await pair.run()
        finally:
            self._pairs.discard(pair)

    def take_fault(self, request: Request) -> Fault | None:
        """The fault that meets this request, counted down."""
        self._counts.requests += not request.opening
        fault = self._fault
        if fault is None or not (fault.when(request.data) if fault.when else not request.opening):
            return None
        fault.left -= 1
        if fault.left <= 0:
            self._fault = None
        self._counts.faults += 1
        return fault


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Pair:
    """One connection of a client, and the one to the server that belongs to it."""

    def __init__(self, proxy: FaultProxy, client: Ends, server: Ends) -> None:
        self._proxy = proxy
        self._client_reader, self._client = client
        self._server_reader, self._server = server
        self._requests = Requests(proxy._protocol)
        self._answers = Answers(proxy._protocol)
        # Set while answers are held back for `cut_after_request`; the event: the server has acted.
        self._acted: asyncio.Event | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.swallowed = False

    async def run(self) -> None:
        """Forward both ways until one side ends."""
        self._tasks = [
            asyncio.create_task(self._forward_requests()),
            asyncio.create_task(self._forward_answers()),
        ]
        try:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for writer in (self._client, self._server):
                writer.close()

    async def reset(self) -> None:
        """Cut both connections with a reset."""
        self._proxy._counts.cut += 1
        self._proxy._pairs.discard(self)
        _abort(self._client)
        _abort(self._server)
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def _forward_requests(self) -> None:
        while data := await _read(self._client_reader):
            if self._proxy._delay:
                await asyncio.sleep(self._proxy._delay)
            for request in self._requests.feed(data):
                fault = self._proxy.take_fault(request)
                if fault is None:
                    self._answers.expect(request)
                    self._proxy._counts.passed += len(request.data)
                    await _write(self._server, request.data)
                elif fault.deliver:
                    await self._deliver_and_cut(request)
                    return
                else:
                    await self.reset()
                    return

    async def _deliver_and_cut(self, request: Request) -> None:
        self._acted = asyncio.Event()
        self._answers.expect(request)
        await _write(self._server, request.data)
        try:
            await asyncio.wait_for(self._acted.wait(), _ANSWER_WITHIN)
        except TimeoutError:
            self._proxy._counts.unanswered += 1
        await self.reset()

    async def _forward_answers(self) -> None:
        while data := await _read(self._server_reader):
            answered = self._answers.feed(data)
            if self._acted is not None:
                self._proxy._counts.swallowed += len(data)
                if answered:
                    self._acted.set()
                continue
            if self._proxy._delay:
                await asyncio.sleep(self._proxy._delay)
            if self._proxy._mode is Mode.SWALLOW:
                self.swallowed = True
                self._proxy._counts.swallowed += len(data)
            else:
                self._proxy._counts.passed += len(data)
                await _write(self._client, data)
        if self._acted is not None:
            # The server ended the connection instead of answering; `_deliver_and_cut` cuts the other end.
            self._proxy._counts.unanswered += 1
            self._acted.set()
            await asyncio.sleep(_PATIENCE)


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(_CHUNK)
    except OSError:
        return b""


async def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    if not data or writer.is_closing():
        return
    writer.write(data)
    try:
        await writer.drain()
    except OSError:
        # The other side is gone; reading from it says so next.
        pass


def _abort(writer: asyncio.StreamWriter) -> None:
    """Close with a reset instead of a goodbye, and drop what was not sent."""
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
