"""Noting a decision about who somebody is or what they may do.

An event is acknowledged by the store that decides before the request is answered. One that cannot be noted keeps nobody
from anything: it is counted, and logged. What anybody can cause without an account (refused tokens) is noted up to a
limit per address, so that nobody fills the stores with it.

No event holds a password, a token, or a name that was typed where nobody has it: people type passwords there.
"""

from __future__ import annotations

from typing import Any, Final

import structlog

from crossfade import CrossfadeError, EntityHandle
from scorekeeper.caller import caller
from scorekeeper.limits import RateLimits, network_of, parse
from scorekeeper.metrics import AUDIT, DEGRADED
from scorekeeper.wire import now

log = structlog.get_logger("scorekeeper")

#: Refusals of one address that are noted; the rest is only counted.
NOTED: Final = parse("60 per 1 minute")


class AuditLog:
    """Notes audit events."""

    def __init__(self, events: EntityHandle, limits: RateLimits) -> None:
        self._events = events
        self._limits = limits

    async def note(self, event: str, user_id: Any = None, *, by: Any = None, **details: Any) -> None:
        """Note what was decided.

        Args:
            event: what, ``login.refused``.
            user_id: whom it is about, an ``_id``; None for nobody who is known.
            by: who did it, where that is somebody else.
            details: what else is to be known; JSON-able.
        """
        AUDIT.labels(event).inc()
        asking = caller.get()
        document = {
            "event": event,
            "userId": user_id,
            "by": by,
            "address": asking.address,
            "requestId": asking.request_id,
            "details": details or None,
            "createdAt": now(),
        }
        try:
            await self._events.insert(document, context="Audit")
        except CrossfadeError as error:
            DEGRADED.labels("audit").inc()
            log.warning("audit event not noted", what=event, cause=type(error).__name__)

    async def note_refusal(self, event: str, user_id: Any = None, **details: Any) -> None:
        """The same for what anybody may cause as often as they like."""
        if await self._limits.count(NOTED, "audit", network_of(caller.get().address)):
            await self.note(event, user_id, **details)
        else:
            AUDIT.labels(event).inc()
            DEGRADED.labels("audit").inc()
