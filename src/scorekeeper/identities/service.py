"""Player identities, as far as accounts need them: the one that a new account claims, and those it owns."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import structlog
from bson import ObjectId

from crossfade import CrossfadeError, DuplicateKey, EntityHandle, NotFound, Record, StaleRevision
from scorekeeper.identities.shown import document_of
from scorekeeper.metrics import DEGRADED
from scorekeeper.names import normal_form
from scorekeeper.wire import now

log = structlog.get_logger("scorekeeper")

#: Of one name or one user; far more than any real account has, and a bound on what one answer holds.
MOST = 200
_SHOWN = ("_id", "displayName", "aliases", "nameHistory", "eloByGameType", "linkedIdentities")


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
        for guest in await self._unclaimed(username, user_id):
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

    async def is_claimable(self, username: str, guest_id: Any) -> bool:
        """Whether a new account of this name takes over the guest of this id: its identity is unclaimed."""
        return bool(await self._unclaimed(username, guest_id))

    async def _unclaimed(self, username: str, user_id: Any) -> list[Record]:
        """Live guest identities of this name that are nobody's, or this user's from before it registered."""
        found = await self._identities.find({"normalizedName": normal_form(username)}, limit=MOST)
        return [
            identity
            for identity in found
            if identity.get("type") == "guest"
            and identity.get("userId") in (None, user_id)
            and _is_live(identity)
        ]

    async def _create(self, user_id: Any, username: str) -> None:
        try:
            await self._insert(user_id, username)
        except DuplicateKey:
            # Another request has made the same identity for the same account.
            pass

    async def _insert(self, user_id: Any, username: str) -> None:
        document = identity_document(
            username, user_id, kind="user", by=user_id, id_=first_identity_id(user_id)
        )
        await self._identities.insert(document, context="Identity Creation")


def identity_document(name: str, user_id: Any, *, kind: str, by: Any, id_: ObjectId) -> dict[str, Any]:
    """A new identity, laid out as the old back end lays out its documents."""
    moment = now()
    return {
        "_id": id_,
        "displayName": name,
        "normalizedName": normal_form(name),
        "userId": user_id,
        "type": kind,
        "nameHistory": [],
        "aliases": [],
        "stats": {"totalGames": 0, "totalWins": 0, "lastGameAt": None},
        "eloByGameType": {},
        "linkedIdentities": [],
        "mergedInto": None,
        "createdBy": by,
        "isDeleted": False,
        "deletedAt": None,
        "createdAt": moment,
        "updatedAt": moment,
        "__v": 0,
    }


def first_identity_id(user_id: Any) -> ObjectId:
    """The id of the identity made for an account: the same on every attempt, so that two of them make one."""
    moment = user_id.binary if isinstance(user_id, ObjectId) else b""
    return derived_id(f"identity of {user_id}", moment)


def derived_id(text: str, moment: bytes = b"") -> ObjectId:
    """An id that is the same for the same text: a hash, behind the first 4 bytes of ``moment``, an ObjectId's."""
    digest = sha256(text.encode()).digest()
    return ObjectId((moment or digest[8:])[:4] + digest[:8])


def _is_live(record: Record) -> bool:
    return not record.get("isDeleted") and record.get("mergedInto") is None


def _shown(record: Record) -> dict[str, Any]:
    document = document_of(record)
    return {name: document.get(name) for name in _SHOWN}
