"""Stopping without losing a request.

uvicorn closes connections that are idle at the moment it is told to stop; a request that is on its way on one of them
is lost. Here every answer says from then on that its connection ends with it, and an idle connection stays open for a
moment more, for what is on its way. New ones are refused; the server waits for the open ones, for a bounded time.

With several workers the process above them holds the listening socket too. While it did, the system would go on taking
connections that nobody serves, so it lets go of it first.
"""

from __future__ import annotations

from typing import Final

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

#: Seconds for which an idle connection stays open: some round trips on a bad network.
LINGER: Final = 1.0

_LAST_ANSWER: Final = (b"connection", b"close")


class DrainingProtocol(HttpToolsProtocol):
    """uvicorn's HTTP, with another end."""

    def shutdown(self) -> None:
        """The server stops: end the connection with its next answer, or when none was asked for in a while."""
        # All connections share this list, and read it when they begin an answer.
        if _LAST_ANSWER not in self.server_state.default_headers:
            self.server_state.default_headers.append(_LAST_ANSWER)
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(LINGER, super().shutdown)
        else:
            super().shutdown()


class Workers(Multiprocess):
    """uvicorn's worker processes, with the same end."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, [config.bind_socket()])

    def terminate_all(self) -> None:
        """Let go of the socket and tell every worker to stop."""
        for listener in self.sockets:
            listener.close()
        super().terminate_all()
