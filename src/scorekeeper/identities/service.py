"""Player identities, as far as accounts need them: the one that a new account claims, and those it owns."""

from __future__ import annotations

from typing import Any

import structlog

from crossfade import CrossfadeError, EntityHandle, NotFound, Record, StaleRevision
from scorekeeper.metrics import DEGRADED
from scorekeeper.names import normal_form
from scorekeeper.wire import now, plain

log = structlog.get_logger("scorekeeper")

#: Of one name or one user; far more than any real account has, and a bound on what one answer holds.
MOST = 200
_SHOWN = ("_id", "displayName", "aliases", "nameHistory", "eloByGameType", "linkedIdentities")
_EMPTY: dict[str, Any] = {"aliases": [], "nameHistory": [], "eloByGameType": {}, "linkedIdentities": []}


class IdentityService:
    """What accounts do with identities."""

    def __init__(self, identities: EntityHandle) -> None:
        self._identities = identities

    async def of_user(self, user_id: Any) -> list[dict[str, Any]]:
        """The live identities of a user, as the client knows them."""
        records = await self._identities.find({"userId": user_id}, limit=MOST)
        return [_shown(record) for record in records if _is_live(record)]

    async def claim_or_create(self, user_id: Any, username: str) -> None:
        """Give a new account the unclaimed guest identity of its name, or one of its own.

        A failure is counted and mended at the next log-in: the account exists either way.
        """
        try:
            if not await self._claim(user_id, username):
                await self._create(user_id, username)
        except CrossfadeError as error:
            DEGRADED.labels("identity").inc()
            log.warning("identity not written, the next log-in makes up for it", cause=type(error).__name__)

    async def _claim(self, user_id: Any, username: str) -> bool:
        for guest in await self._identities.find({"normalizedName": normal_form(username)}, limit=MOST):
            if guest.get("type") != "guest" or guest.get("userId") is not None or not _is_live(guest):
                continue
            try:
                await self._identities.update(
                    guest.id,
                    {"userId": user_id, "type": "user", "updatedAt": now()},
                    if_revision=guest.rev,
                    context="Identity Claim",
                )
            except (StaleRevision, NotFound):
                continue
            return True
        return False

    async def _create(self, user_id: Any, username: str) -> None:
        moment = now()
        await self._identities.insert(
            {
                "displayName": username,
                "normalizedName": normal_form(username),
                "userId": user_id,
                "type": "user",
                "nameHistory": [],
                "aliases": [],
                "stats": {"totalGames": 0, "totalWins": 0, "lastGameAt": None},
                "eloByGameType": {},
                "linkedIdentities": [],
                "mergedInto": None,
                "createdBy": user_id,
                "isDeleted": False,
                "deletedAt": None,
                "createdAt": moment,
                "updatedAt": moment,
                "__v": 0,
            },
            context="Identity Creation",
        )


def _is_live(record: Record) -> bool:
    return not record.get("isDeleted") and record.get("mergedInto") is None


def _shown(record: Record) -> dict[str, Any]:
    return {name: plain(record.get(name, _EMPTY.get(name))) for name in _SHOWN}
