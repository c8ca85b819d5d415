"""Who the players of a game are: each name means an identity, and a name that nobody has gets a guest's.

A guest is a user with the role guest, who cannot log in, and an identity that names it. Whoever registers the name
later takes both over, and the games with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bson import ObjectId

from crossfade import DuplicateKey, Record
from scorekeeper import names
from scorekeeper.games.data import innermost, players_of
from scorekeeper.identities.merges import is_live, standing_for
from scorekeeper.identities.repository import IdentityRepository
from scorekeeper.identities.service import IdentityService, derived_id, first_identity_id, identity_document
from scorekeeper.users.repository import UserRepository
from scorekeeper.wire import document_id


class Players:
    """Finds the identities that names mean, and makes those of guests."""

    def __init__(
        self,
        users: UserRepository,
        identities: IdentityRepository,
        registration: IdentityService,
    ) -> None:
        self._users = users
        self._identities = identities
        self._registration = registration

    async def identified(self, game_data: Mapping[str, Any], *, by: str) -> dict[str, Any]:
        """The same data, with an ``identityId`` for each player who had none.

        Args:
            game_data: judged already; see `scorekeeper.games.data`.
            by: id of the user who sends the game.
        """
        nameless = [player for player in players_of(game_data) if not player.get("identityId")]
        means = await self._meant({names.trimmed(player["name"]) for player in nameless}, by)

        def identified(player: dict[str, Any]) -> dict[str, Any]:
            if player.get("identityId"):
                return player
            return {**player, "identityId": means[names.normal_form(player["name"])]}

        players = [identified(player) for player in players_of(game_data)]
        if not nameless:
            return dict(game_data)
        inner = {**innermost(game_data), "players": players}
        return inner if innermost(game_data) is game_data else {**game_data, "gameData": inner}

    async def identities_of(self, user_id: str) -> set[str]:
        """The ids, as text, of the identities that are a user's, and of those merged into them."""
        own = await self._identities.all_of(document_id(user_id))
        merged = await self._identities.merged_into([identity.id for identity in own]) if own else []
        return {str(identity.id) for identity in (*own, *merged)}

    async def _meant(self, called: Iterable[str], by: str) -> dict[str, Any]:
        """By normal form of a name, the id of the identity that it means."""
        spelt = {names.normal_form(name): name for name in sorted(called)}
        if not spelt:
            return {}
        found = await self._identities.called(spelt)
        means: dict[str, Any] = {}
        for normal, name in spelt.items():
            identity = await self._standing_for(normal, found)
            means[normal] = identity.id if identity is not None else await self._guest(name, by)
        return means

    async def _standing_for(self, normal: str, found: list[Record]) -> Record | None:
        """Of the identities found: a live one of this name, else one of this alias, else whom a merged one became."""
        of_name = [identity for identity in found if identity.get("normalizedName") == normal]
        of_alias = [identity for identity in found if normal in _aliases(identity)]
        live = [identity for identity in (*of_name, *of_alias) if is_live(identity)]
        if live:
            # An account's before a guest's: the name is the account's.
            return min(live, key=lambda identity: (identity.get("type") != "user", identity not in of_name))
        merged = [identity for identity in of_name if not identity.get("isDeleted")]
        standing = (await standing_for(self._identities, merged)).values() if merged else ()
        return next((each for each in standing if each is not None and is_live(each)), None)

    async def _guest(self, name: str, by: str) -> Any:
        """The id of an identity for a name that none has yet."""
        user = await self._user_called(name, by)
        if user is not None and user.get("role") != "guest":
            # An account from before there were identities.
            await self._registration.claim_or_create(user.id, str(user.get("username")))
            own = await self._identities.live_of(user.id)
            if own:
                return own[0].id
        return await self._insert(name, None if user is None else user.id, by)

    async def _user_called(self, name: str, by: str) -> Record | None:
        """The user of this name, a new guest where there is none; None for a name that no user can have."""
        found = await self._users.find_by_case_insensitive_username(name)
        if found is not None or names.fault_of_new(name) is not None:
            return found
        metadata = {"createdByUserId": document_id(by), "originalGuestId": None}
        try:
            return await self._users.create(
                name, None, role="guest", guest_metadata=metadata, context="Guest Creation"
            )
        except DuplicateKey:
            return await self._users.find_by_case_insensitive_username(name)

    async def _insert(self, name: str, user_id: Any, by: str) -> Any:
        # The same id on every attempt, so that two games sent at once make one guest; and another one
        # when that identity is there and means somebody else by now.
        if user_id is None:
            first = derived_id(f"identity of guest {names.normal_form(name)}")
        else:
            first = first_identity_id(user_id)
        for id_ in (first, ObjectId()):
            document = identity_document(name, user_id, kind="guest", by=document_id(by), id_=id_)
            try:
                return (await self._identities.create(document, context="Guest Creation")).id
            except DuplicateKey:
                there = await self._identities.get(id_)
                if there is not None and is_live(there):
                    return there.id
        raise AssertionError("a fresh id was taken")


def _aliases(identity: Record) -> list[Any]:
    aliases = identity.get("aliases")
    return (
        [each.get("normalizedName") for each in aliases if isinstance(each, Mapping)]
        if isinstance(aliases, list)
        else []
    )
