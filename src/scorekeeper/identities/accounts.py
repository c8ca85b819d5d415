"""What an account does to its player identities when it is renamed or deleted, and which account a player's name means.

Renaming and deleting an account are operations of several records, of which the user's decides; the steps for its
identities are named here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bson import ObjectId

from crossfade import Operation, Record
from scorekeeper.identities.merges import is_live, standing_for
from scorekeeper.identities.repository import IdentityRepository
from scorekeeper.names import normal_form
from scorekeeper.wire import now


class AccountIdentities:
    """Identities, as far as accounts touch them."""

    def __init__(self, identities: IdentityRepository) -> None:
        self._identities = identities

    async def live_of(self, user_id: Any) -> list[Record]:
        """The live identities of a user, oldest first."""
        return await self._identities.live_of(user_id)

    async def is_anothers_alias(self, name: str, user_id: Any) -> bool:
        """Whether a live identity that is not this user's goes by the name as an alias."""
        known = await self._identities.live_with_alias(name)
        return any(identity.get("userId") != user_id for identity in known)

    async def owner_of_name(self, name: str) -> tuple[Any, Any] | None:
        """The user whose live identity has this name, or has taken in one that has: (user id, identity id)."""
        bearers = await self._identities.named(name)
        for standing in (await standing_for(self._identities, bearers)).values():
            if standing is not None and is_live(standing) and standing.get("userId") is not None:
                return standing.get("userId"), standing.id
        return None


def primary_of(identities: Iterable[Record], username: str) -> Record | None:
    """Of a user's live identities the one that bears the user's name, else the first."""
    found = list(identities)
    name = normal_form(username)
    return next((each for each in found if each.get("normalizedName") == name), next(iter(found), None))


def rename_with(operation: Operation, identity: Record, name: str, *, by: Any) -> None:
    """The identity takes the account's new name, and remembers the one it had."""
    moment = now()
    past = {
        "name": identity.get("displayName"),
        "normalizedName": identity.get("normalizedName"),
        "changedAt": moment,
        "changedBy": by,
        "_id": ObjectId(),
    }
    operation.also(
        "identities",
        identity.id,
        {"displayName": name, "normalizedName": normal_form(name), "updatedAt": moment},
        add={"nameHistory": [past]},
    )


def release_with(operation: Operation, identity: Record) -> None:
    """The identity stays as a player in its games, and is nobody's.

    As ``imported``, not ``guest``: whoever registers the name next must not come into the games of the one before.
    """
    operation.also("identities", identity.id, {"userId": None, "type": "imported", "updatedAt": now()})
