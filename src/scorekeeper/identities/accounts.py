"""What an account does to its player identities when it is renamed or deleted, and which account a player's name means.

Renaming and deleting an account are operations of several records, of which the user's decides; the steps for its
identities are named here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from bson import ObjectId

from crossfade import EntityHandle, Operation, Record
from scorekeeper.names import normal_form
from scorekeeper.wire import now

#: Identities that one look may give: far more than any real account or name has.
MOST: Final = 200

#: Merges that are followed from one identity to the next. Old data holds chains, and cycles.
LONGEST_CHAIN: Final = 32


class AccountIdentities:
    """Identities, as far as accounts touch them."""

    def __init__(self, identities: EntityHandle) -> None:
        self._identities = identities

    async def live_of(self, user_id: Any) -> list[Record]:
        """The live identities of a user, oldest first."""
        found = await self._identities.find({"userId": user_id}, limit=MOST)
        return [identity for identity in found if is_live(identity)]

    async def is_anothers_alias(self, name: str, user_id: Any) -> bool:
        """Whether a live identity that is not this user's goes by the name as an alias."""
        sought = normal_form(name)
        found = await self._identities.find({"aliases.normalizedName": sought}, limit=MOST)
        return any(is_live(identity) and identity.get("userId") != user_id for identity in found)

    async def owner_of_name(self, name: str) -> tuple[Any, Any] | None:
        """The user whose live identity has this name, or has taken in one that has: (user id, identity id)."""
        for identity in await self._identities.find({"normalizedName": normal_form(name)}, limit=MOST):
            standing = await self._standing(identity)
            if standing is not None and standing.get("userId") is not None:
                return standing.get("userId"), standing.id
        return None

    async def _standing(self, identity: Record) -> Record | None:
        """The identity that this one has been merged into, at the end of the chain; None where that is nobody."""
        seen: set[Any] = set()
        current: Record | None = identity
        while current is not None and current.get("mergedInto") is not None:
            if current.id in seen or len(seen) == LONGEST_CHAIN:
                return None
            seen.add(current.id)
            current = await self._identities.get(current.get("mergedInto"))
        return None if current is None or current.get("isDeleted") else current


def is_live(identity: Record) -> bool:
    """Whether an identity plays for itself: neither deleted nor merged into another."""
    return not identity.get("isDeleted") and identity.get("mergedInto") is None


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
