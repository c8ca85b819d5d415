"""What the routes of every resource have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Final

import orjson
from fastapi import Depends, Request
from fastapi.responses import Response, StreamingResponse
from fastapi.routing import APIRoute

from scorekeeper.users.schemas import ProblemOut

#: Bytes that a list waits for before they are sent: as many as are worth a packet or two.
_PIECE: Final = 65_536


class Direct(APIRoute):
    """A route whose function is given the request alone and makes the answer itself.

    For what is asked for more than anything else: looking for parameters and dependencies takes FastAPI longer than
    such an answer takes. What the route declares besides (``dependencies``, models) only describes it.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The function itself."""
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


def of_app(name: str) -> Any:
    """The dependency that gives a route the service of this name, as `scorekeeper.app` has put it together."""

    # A coroutine, though it waits for nothing: FastAPI hands others to a thread, which costs more than the rest.
    async def service(request: Request) -> Any:
        return getattr(request.app.state, name)

    return Depends(service)


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route answers besides success, for its OpenAPI description."""
    return {status: {"model": ProblemOut} for status in (*statuses, 413, 503)}


async def streamed(member: str, items: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """``{member: [items]}``, sent while it is read: a long list with pictures is never in memory whole.

    The first item is read before the answer begins, so that a store that does not answer is an error like any other.
    One that fails later breaks the answer off, which no client takes for a whole one.
    """
    first = await anext(items, None)

    async def pieces() -> AsyncIterator[bytes]:
        held = bytearray(b'{"%b":[' % member.encode())
        if first is not None:
            held += orjson.dumps(first)
        async for item in items:
            held += b"," + orjson.dumps(item)
            if len(held) >= _PIECE:
                yield bytes(held)
                held.clear()
        yield bytes(held + b"]}")

    return StreamingResponse(pieces(), media_type="application/json")
