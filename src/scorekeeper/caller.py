"""Who sent the request that is being served: for limits and the audit log, without passing it through every story."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """Where a request comes from.

    Attributes:
        address: of the client, as the server knows it (behind a proxy: see FORWARDED_ALLOW_IPS); None on a unix socket.
        request_id: the request's id, as in logs and in the answer.
    """

    address: str | None = None
    request_id: str = ""


_NOBODY = Caller()

#: Set by `scorekeeper.http.Front`; outside a request there is nobody.
caller: ContextVar[Caller] = ContextVar("caller", default=_NOBODY)
