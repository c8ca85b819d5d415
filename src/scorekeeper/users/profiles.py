"""What is shown of accounts to others: a look-up by name, a public profile, the lists.

A profile is found by id, else by name as a user's, else by name as a player's: who plays under an old guest's name that
was merged into an account is that account.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any, Final

from crossfade import Record
from scorekeeper import names
from scorekeeper.errors import Problem
from scorekeeper.games.played import ProfileGames
from scorekeeper.identities.accounts import AccountIdentities, primary_of
from scorekeeper.users.repository import UserRepository
from scorekeeper.users.shown import listed_for_admin, named, person_of, user_of
from scorekeeper.wire import document_id

#: Roles of those who have an account; a document without one is a user's.
WITH_ACCOUNT: Final = ("user", "admin")


class ProfileService:
    """Accounts as others see them. Knows no HTTP and no store."""

    def __init__(self, users: UserRepository, identities: AccountIdentities, played: ProfileGames) -> None:
        self._users = users
        self._identities = identities
        self._played = played

    async def look_up(self, username: str) -> dict[str, Any]:
        """Whether there is an account of this name, in any letter case.

        Raises:
            Problem: 404 with ``found: false`` and the ``message`` that the client shows.
        """
        record = await self._users.find_by_case_insensitive_username(username, picture=False)
        if record is None:
            sentence = "User not found"
            raise Problem(404, "not-found", sentence, members={"found": False, "message": sentence})
        shown = named(record)
        del shown["role"]
        return {"found": True, "user": shown}

    async def profile(self, username_or_id: str) -> dict[str, Any]:
        """The public profile of an account.

        Raises:
            Problem: 404, neither a user nor a player of an account.
        """
        record = await self._find(username_or_id)
        if record is None:
            raise Problem(404, "not-found", "User not found")
        user = person_of(record)
        identities = await self._identities.live_of(record.id)
        primary = primary_of(identities, str(user["username"]))
        totals = [identity.get("stats") or {} for identity in identities]
        return {
            **user,
            "_id": user["id"],
            "isRegisteredUser": True,
            "totalGames": _sum(totals, "totalGames"),
            "totalWins": _sum(totals, "totalWins"),
            "identities": [str(identity.get("displayName", "")) for identity in identities],
            "primaryIdentityId": None if primary is None else str(primary.id),
            "games": await self._played.newest_of(identities),
        }

    async def _find(self, username_or_id: str) -> Record | None:
        name = names.trimmed(username_or_id)
        if not name or names.fault(name) is not None:
            return None
        id_ = document_id(name)
        found = await self._users.find_by_id(id_)
        if found is None:
            found = await self._users.find_by_exact_username(name)
        if found is not None and found.get("role") != "guest":
            return found
        owner = await self._identities.owner_of_name(name)
        owned = None if owner is None else await self._users.find_by_id(owner[0])
        return owned or found

    async def everybody(self) -> AsyncIterator[dict[str, Any]]:
        """All accounts without guests, by name, as they are read."""
        async for record in self._users.in_order_of_name(roles=WITH_ACCOUNT):
            yield user_of(record)

    async def everybody_for_admin(self) -> AsyncIterator[dict[str, Any]]:
        """All users, guests too, by name, as they are read."""
        async for record in self._users.in_order_of_name():
            yield listed_for_admin(record)


def _sum(stats: list[Any], field: str) -> int:
    counts = [each.get(field) for each in stats if isinstance(each, dict)]
    return sum(int(count) for count in counts if isinstance(count, int | float) and math.isfinite(count))
