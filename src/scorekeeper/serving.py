"""Stopping without losing a request.

A client that has a connection gets an answer; one that has none yet is refused, so that a load balancer, or the client
itself, asks elsewhere. There are three ways in between, and each is closed here:

1. *A connection that waits to be taken.* The system makes connections by itself and queues them; when the last holder
   closes the listening socket, it resets those that nobody took. So new ones are stopped first, while the socket stays
   open: a packet filter drops attempts (the client's system repeats one after a second, and is refused then), begun
   handshakes end well, and the queue is emptied. Only then the socket is closed. With several workers the process above
   them does so, since the socket ends with that one, before it tells them to stop.
2. *A request on its way on an idle connection.* uvicorn would close those at once. Here they stay open for a moment.
3. *An answer that has begun, and did not say that its connection ends.* The client may send the next request at once,
   so this connection too stays open for a moment.

Every answer that begins after the stop says that its connection ends with it; the server waits for the open ones, for a
bounded time. The filter is Linux's. Elsewhere the queue is emptied all the same, but what is begun within the instant
before the socket is closed may be reset. To stop several workers, signal the process above them, not all at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import select
import socket
import stat
import struct
import sys
import time
from typing import Final

from uvicorn import Config, Server
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

#: Seconds for which an idle connection stays open: some round trips on a bad network.
LINGER: Final = 1.0

#: Seconds for handshakes that have begun: shorter than the second after which a client tries again, so that it is
#: refused then and not later.
HANDSHAKES: Final = 0.5

#: Seconds at most that the queue is waited for; only workers that hang do not empty it at once.
PATIENCE: Final = 5.0

_LAST_ANSWER: Final = (b"connection", b"close")

#: Linux's number for attaching a filter; Python has no name for it.
_SO_ATTACH_FILTER: Final = 26

#: The filter, in the system's instructions (code, jump if true, jump if false, operand): load the byte of TCP's flags;
#: with SYN among them, which only the first packet of a connection has, drop the packet; else let it pass.
_DROP_NEW: Final = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))


class Listener:
    """A bound socket that can be left without resetting a connection."""

    def __init__(self, bound: socket.socket) -> None:
        """Take over a socket, bound by this process."""
        self.socket = bound
        self._path = bound.getsockname() if bound.family == socket.AF_UNIX else None
        self._file = os.stat(self._path) if self._path else None

    async def leave(self) -> None:
        """Return when no new connection can begin and none is left in the queue; whoever takes them goes on."""
        self._refuse()
        began = time.monotonic()
        await asyncio.sleep(HANDSHAKES)
        while self._has_waiting() and time.monotonic() < began + PATIENCE:  # noqa: ASYNC110 - it is the system's
            await asyncio.sleep(0.01)

    def _refuse(self) -> None:
        if self._path is not None and self._file is not None:
            # Unless the next one has bound the path already.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self._path), self._file):
                    os.unlink(self._path)
        elif sys.platform == "linux":
            code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in _DROP_NEW))
            program = struct.pack("HP", len(_DROP_NEW), ctypes.addressof(code))
            # A sandbox without filters: as on other systems.
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)

    def _has_waiting(self) -> bool:
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        # What is no listening socket yet only says that it is not connected.
        return any(event & select.POLLIN for _, event in poll.poll(0))


class DrainingProtocol(HttpToolsProtocol):
    """uvicorn's HTTP, with another end."""

    _stopping = False

    def shutdown(self) -> None:
        """The server stops: end the connection with its next answer, or when none was asked for in a while."""
        self._stopping = True
        # All connections share this list, and read it when they begin with a request.
        if _LAST_ANSWER not in self.server_state.default_headers:
            self.server_state.default_headers.append(_LAST_ANSWER)
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(LINGER, super().shutdown)
        elif not self.cycle.response_started:
            # Its answer will say so.
            super().shutdown()

    def on_response_complete(self) -> None:
        """An answer was given."""
        super().on_response_complete()
        if self._stopping and not self.transport.is_closing():
            self.loop.call_later(LINGER, super().shutdown)


class DrainingServer(Server):
    """uvicorn's server in a process of its own, which leaves its listener first."""

    def __init__(self, config: Config, listener: Listener) -> None:
        super().__init__(config)
        self._listener = listener

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop: the queue, then the connections, then the application."""
        await self._listener.leave()
        await super().shutdown(sockets)


class Workers(Multiprocess):
    """uvicorn's worker processes, with the same end."""

    def __init__(self, config: Config, listener: Listener) -> None:
        super().__init__(config, [listener.socket])
        self._listener = listener

    def terminate_all(self) -> None:
        """Leave the socket, let go of it, and tell every worker to stop."""
        asyncio.run(self._listener.leave())
        self._listener.socket.close()
        super().terminate_all()


def keep_what_is_loaded() -> None:
    """Tell the garbage collector to leave alone what is there now, for a process that serves from here on.

    It is modules, routes and models: nothing of it ever becomes garbage, and looking through it again and again takes
    a worker under load a tenth of its time.
    """
    gc.collect()
    gc.freeze()


def bind(host: str, port: int, path: str | None = None) -> socket.socket:
    """A socket to serve on: the path's if there is one, else the address's.

    Raises:
        OSError: there is no such address, or another process has it.
    """
    if path is not None:
        bound = socket.socket(socket.AF_UNIX)
        # What a process left that was killed; one that still serves there keeps its connections.
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode):
                os.unlink(path)
        try:
            bound.bind(path)
        except OSError:
            bound.close()
            raise
        os.chmod(path, 0o666)  # noqa: S103 - for whoever may enter the folder: the proxy in front is another user
        return bound
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound
