"""The stories of looking: one's own identities, one in detail, searches, suggestions, ratings.

However long a list is, it takes a fixed number of questions to the stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from bson import ObjectId

from crossfade import Record
from scorekeeper import names
from scorekeeper.auth.current import CurrentUser
from scorekeeper.identities import ratings
from scorekeeper.identities.accounts import primary_of
from scorekeeper.identities.games import PlayedGames
from scorekeeper.identities.linking import not_there
from scorekeeper.identities.merges import entries_for, standing_for, target_of
from scorekeeper.identities.repository import Found, IdentityRepository, Page
from scorekeeper.identities.shown import document_of, id_of, name_of, pages_of, stats_of
from scorekeeper.users.repository import UserRepository
from scorekeeper.wire import document_id, plain

#: Games shown with one identity.
RECENT: Final = 10
#: Suggestions at most, and the shortest part of a name by which one is made.
SUGGESTIONS: Final = 20
SHORTEST_PART: Final = 3


class IdentityLists:
    """What there is to see of identities. Knows no HTTP and no store; changes nothing."""

    def __init__(self, identities: IdentityRepository, users: UserRepository, games: PlayedGames) -> None:
        self._identities = identities
        self._users = users
        self._games = games

    async def search(self, text: str, page: Page) -> dict[str, Any]:
        """Live identities by name or alias."""
        return _listed(await self._identities.search(text, page))

    async def everybody(
        self, text: str, kind: str | None, has_user: bool | None, page: Page
    ) -> dict[str, Any]:
        """All identities, those deleted and merged too; for administrators."""
        return _listed(await self._identities.everybody(text, kind, has_user, page))

    async def mine(self, current: CurrentUser) -> dict[str, Any]:
        """One's own identities, and the games of all that belongs to them added up."""
        own = await self._identities.live_of(document_id(current.id))
        linked = await self._identities.merged_into([each.id for each in own]) if own else []
        parts: dict[Any, list[Record]] = {each.id: [each] for each in own}
        for each in linked:
            parts.get(target_of(each), []).append(each)
        details = [
            {
                "_id": id_of(each),
                "displayName": name_of(each),
                "type": plain(each.get("type")),
                **_added(parts[each.id]),
            }
            for each in own
        ]
        stats = {"identities": len(own), **_added([*own, *linked]), "identityDetails": details}
        return {"identities": [document_of(each) for each in own], "stats": stats}

    async def one(self, identity_id: Any) -> dict[str, Any]:
        """One identity with its newest games; of a linked one also for whom it stands.

        Raises:
            Problem: 404, it is not there, or deleted.
        """
        identity = await self._existing(identity_id)
        answer: dict[str, Any] = {
            "identity": document_of(identity),
            "recentGames": await self._games.newest_of(identity.id, RECENT),
        }
        if target_of(identity) is not None:
            end = (await standing_for(self._identities, [identity]))[identity.id]
            answer["standsFor"] = None if end is None else _brief(end)
        return answer

    async def own_and_linked(self, current: CurrentUser) -> dict[str, Any]:
        """One's own identities, and those that were linked to them."""
        own = await self._identities.live_of(document_id(current.id))
        linked = await self._identities.merged_into([each.id for each in own]) if own else []
        return {
            "identities": [document_of(each) for each in own],
            "linkedIdentities": [document_of(each) for each in linked],
        }

    async def suggestions(self, current: CurrentUser) -> dict[str, Any]:
        """Guests that may be this user: by a name that it has or had, then by a part of it."""
        own = await self._identities.live_of(document_id(current.id))
        known = {names.normal_form(current.username)}
        for each in own:
            known |= _names_of(each)
        parts = {name for name in known if names.length(name) >= SHORTEST_PART}
        found = await self._identities.unlinked_guests_like(known, parts)
        shown = [{**_guest(each), "exact": bool(_names_of(each) & known)} for each in found]
        shown.sort(key=lambda each: not each["exact"])
        return {"suggestions": shown[:SUGGESTIONS]}

    async def guests(self, text: str, page: Page) -> dict[str, Any]:
        """Guests by name, and to whom they are linked."""
        found = await self._identities.guests(text, page)
        merged = [each for each in found.records if target_of(each) is not None]
        ends = await standing_for(self._identities, merged)
        targets = await self._identities.get_many(filter(None, map(target_of, merged)))
        owners = {id_: _owner_of(end) for id_, end in ends.items()}
        users = {user.id: user for user in await self._users.find_many_by_id(set(owners.values()) - {None})}
        shown = []
        for each in found.records:
            user = users.get(owners.get(each.id))
            target = next((one for one in targets if one.id == target_of(each)), None)
            entries = [] if target is None else entries_for(target, each.id)
            shown.append(
                {
                    **_guest(each),
                    "linkedAt": plain(entries[-1].get("linkedAt")) if entries else None,
                    "linkedToUser": None
                    if user is None
                    else {"_id": id_of(user), "username": str(user.get("username", ""))},
                }
            )
        return {"identities": shown, "pagination": pages_of(found)}

    async def my_rating(self, current: CurrentUser, game_type: str) -> dict[str, Any]:
        """One's own rating in a game."""
        primary = await self._primary(current)
        if primary is None:
            return {"hasIdentity": False}
        return ratings.rating_of(primary, ratings.game_type_of(game_type), entries=ratings.SHOWN)

    async def my_ratings(self, current: CurrentUser) -> dict[str, Any]:
        """One's own ratings in all games."""
        primary = await self._primary(current)
        return {"hasIdentity": False} if primary is None else ratings.ratings_of(primary)

    async def rating(self, identity_id: Any, game_type: str, entries: int) -> dict[str, Any]:
        """The rating of an identity in a game, with the newest entries of its history; 404 as for `one`."""
        identity = await self._existing(identity_id)
        return ratings.rating_of(identity, ratings.game_type_of(game_type), entries=entries)

    async def all_ratings(self, identity_id: Any) -> dict[str, Any]:
        """The ratings of an identity in all games; 404 as for `one`."""
        return ratings.ratings_of(await self._existing(identity_id))

    async def _primary(self, current: CurrentUser) -> Record | None:
        return primary_of(await self._identities.live_of(document_id(current.id)), current.username)

    async def _existing(self, identity_id: Any) -> Record:
        identity = await self._identities.get(identity_id)
        if identity is None or identity.get("isDeleted"):
            raise not_there()
        return identity


def _listed(found: Found) -> dict[str, Any]:
    return {"identities": [document_of(each) for each in found.records], "pagination": pages_of(found)}


def _owner_of(identity: Record | None) -> Any:
    """The id of an identity's user; None for none, or for what is no id."""
    user_id = None if identity is None else identity.get("userId")
    return user_id if isinstance(user_id, ObjectId | str) else None


def _brief(identity: Record) -> dict[str, Any]:
    return {
        "_id": id_of(identity),
        "displayName": name_of(identity),
        "userId": plain(identity.get("userId")),
    }


def _guest(identity: Record) -> dict[str, Any]:
    stats = stats_of(identity)
    return {
        "_id": id_of(identity),
        "displayName": name_of(identity),
        "gameCount": stats["totalGames"],
        "lastSeen": stats["lastGameAt"],
    }


def _added(identities: Sequence[Record]) -> dict[str, Any]:
    """The games of several identities as one's; dates in their written form compare as dates."""
    stats = [stats_of(each) for each in identities]
    return {
        "totalGames": sum(each["totalGames"] for each in stats),
        "totalWins": sum(each["totalWins"] for each in stats),
        "lastGameAt": max((at for each in stats if isinstance(at := each["lastGameAt"], str)), default=None),
    }


def _names_of(identity: Record) -> set[str]:
    """Every name that an identity has, had or goes by, in normal form."""
    found = {identity.get("normalizedName")}
    for field in ("aliases", "nameHistory"):
        entries = identity.get(field)
        found |= {
            entry.get("normalizedName")
            for entry in (entries if isinstance(entries, list) else [])
            if isinstance(entry, dict)
        }
    return {name for name in found if isinstance(name, str) and name}
