"""The stories of linking: a guest's games become an account's, and may be a guest's again.

Of the records that change, the merged identity decides: its one write says where it went, from a revision at which it
was free. So of two who link one guest, one does; a crash leaves either nothing or all of it. What it had before is kept
in the target's entry, so that undoing it gives both back as they were.

Games follow after a merge, and go back before it is undone: whatever fails in between, a game names the right identity,
or one that leads to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from crossfade import NotFound, Record, StaleRevision
from scorekeeper.errors import Problem, forbidden, invalid, unavailable
from scorekeeper.identities.accounts import primary_of
from scorekeeper.identities.games import GamesMoved, PlayedGames
from scorekeeper.identities.merges import (
    entry_of,
    is_live,
    standing_for,
    target_of,
    unmerged,
    without_entries,
)
from scorekeeper.identities.repository import IdentityRepository
from scorekeeper.identities.service import IdentityService
from scorekeeper.identities.shown import document_of
from scorekeeper.users.repository import UserRepository
from scorekeeper.wire import now

#: How often a record that somebody else changes meanwhile is read again.
ATTEMPTS: Final = 5


@dataclass(frozen=True, slots=True)
class Linked:
    """What linking or unlinking has made of both identities, and how many games have followed."""

    guest: Record
    own: Record | None
    games: GamesMoved

    def shown(self, message: str) -> dict[str, Any]:
        """As the client knows it."""
        return {
            "message": message,
            "guestIdentity": document_of(self.guest),
            "userIdentity": None if self.own is None else document_of(self.own),
            "gamesUpdated": self.games.shown(),
        }


class LinkingService:
    """Merging identities of guests into those of accounts, and back. Knows no HTTP and no store."""

    def __init__(
        self,
        identities: IdentityRepository,
        accounts: IdentityService,
        users: UserRepository,
        games: PlayedGames,
    ) -> None:
        self._identities = identities
        self._accounts = accounts
        self._users = users
        self._games = games

    async def link(self, user_id: Any, guest_id: Any, *, by: Any, as_admin: bool = False) -> Linked:
        """Merge a guest into the identity of a user; where that is done already, only games are looked after.

        An administrator may link what is left of a deleted account, too.

        Raises:
            Problem: 400, it is not a guest's, or another user's; 404, it is not there, or the user is not.
        """
        for _ in range(ATTEMPTS):
            own = await self._own(user_id)
            guest = await self._existing(guest_id)
            if target_of(guest) is not None:
                end = (await standing_for(self._identities, [guest]))[guest.id]
                if end is None or end.get("userId") != user_id:
                    raise invalid("This identity is linked to another player already")
                return Linked(guest, end, await self._games.follow(guest.id, end.id))
            await self._refuse_unless_guest(guest, user_id, ("guest", "imported") if as_admin else ("guest",))
            merged = await self._merge(guest, own, by=by)
            if merged is not None:
                return merged
        raise contended()

    async def _merge(self, guest: Record, own: Record, *, by: Any) -> Linked | None:
        """None where somebody else was faster; look again."""
        moment = now()
        entry = entry_of(guest, own, by=by, at=moment)
        try:
            async with self._identities.operation("Identity Link") as operation:
                operation.update(
                    "identities",
                    guest.id,
                    {"mergedInto": own.id, "type": "imported", "updatedAt": moment},
                    if_revision=guest.rev,
                )
                operation.also("identities", own.id, {"updatedAt": moment}, add={"linkedIdentities": [entry]})
        except (StaleRevision, NotFound):
            return None
        assert operation.result is not None
        guest = operation.result
        end = (await standing_for(self._identities, [guest]))[guest.id]
        if end is None or end.get("isDeleted"):
            # Its target was deleted, or merged the other way, at the same time: who looks last takes it back.
            await self._unmerge(guest, "Identity Link")
            return None
        games = await self._games.follow(guest.id, end.id)
        return Linked(guest, end if end.id == own.id else await self._identities.get(own.id), games)

    async def unlink(self, user_id: Any, guest_id: Any) -> Linked:
        """Undo a link to one of a user's identities: both are as before.

        Raises:
            Problem: 400, it is not linked; 403, it is linked to somebody else; 404, it is not there.
        """
        guest = await self._existing(guest_id)
        if target_of(guest) is None:
            raise invalid("This identity is not linked")
        end = (await standing_for(self._identities, [guest]))[guest.id]
        if end is None or end.get("userId") != user_id:
            raise forbidden("This identity is linked to another player")
        return await self._unmerge(guest, "Identity Unlink")

    async def undo(self, merged_id: Any) -> Linked:
        """Undo whatever merge an identity was part of; for administrators.

        Raises:
            Problem: 400, it was not merged; 404, it is not there.
        """
        merged = await self._identities.get(merged_id)
        if merged is None:
            raise not_there()
        if target_of(merged) is None:
            raise invalid("This identity is not merged into another")
        return await self._unmerge(merged, "Identity Unlink")

    async def _unmerge(self, merged: Record, context: str) -> Linked:
        for _ in range(ATTEMPTS):
            target_id = target_of(merged)
            target = await self._identities.get(target_id)
            holders = {target_id}
            if target is not None:
                end = (await standing_for(self._identities, [target]))[target.id]
                holders |= set() if end is None else {end.id}
            games = await self._games.give_back(merged.id, holders)
            moment = now()
            set_, unset = unmerged(merged, target, at=moment)
            try:
                async with self._identities.operation(context) as operation:
                    operation.update("identities", merged.id, set_, unset=unset, if_revision=merged.rev)
                    if target is not None:
                        own, gone, entries = without_entries(target, merged.id, at=moment)
                        operation.also(
                            "identities", target.id, own, unset=gone, remove={"linkedIdentities": entries}
                        )
            except StaleRevision:
                merged = await self._existing(merged.id, deleted=True)
                if target_of(merged) is None:
                    raise invalid("This identity is not linked") from None
                continue
            except NotFound:
                raise not_there() from None
            assert operation.result is not None
            after = None if target is None else await self._identities.get(target.id)
            return Linked(operation.result, after, games)
        raise contended()

    async def merge(self, target_id: Any, source_ids: Sequence[Any], *, by: Any) -> tuple[Record, GamesMoved]:
        """Merge many identities into one, all or nothing; they are deleted, and can be had back one by one.

        The target decides: it takes all of them in at one revision.

        Raises:
            Problem: 400, one of them was merged or deleted already, or is the target; 404, one is not there.
        """
        asked = list(dict.fromkeys(source_ids))
        if target_id in asked:
            raise invalid("An identity cannot be merged into itself")
        for _ in range(ATTEMPTS):
            found = {each.id: each for each in await self._identities.get_many([target_id, *asked])}
            if len(found) <= len(asked):
                raise not_there()
            if not all(map(is_live, found.values())):
                raise invalid("An identity that has been merged or deleted already cannot be merged")
            target, sources = found[target_id], [found[id_] for id_ in asked]
            taken_in = await self._take_in(target, sources, by=by)
            if taken_in is None:
                continue
            merged = await self._identities.get_many(asked)
            if not all((await standing_for(self._identities, merged)).values()):
                # The target was merged into one of them at the same time: who looks last takes it back.
                for source in merged:
                    await self._unmerge(source, "Identity Merge")
                continue
            games = GamesMoved()
            for source in sources:
                games += await self._games.follow(source.id, target.id)
            return taken_in, games
        raise contended()

    async def _take_in(self, target: Record, sources: Sequence[Record], *, by: Any) -> Record | None:
        """None where somebody else was faster; look again."""
        moment = now()
        links, version = target.get("linkedIdentities"), target.get("__v")
        entries = [entry_of(source, target, by=by, at=moment) for source in sources]
        changed = {
            "linkedIdentities": [*(links if isinstance(links, list) else []), *entries],
            "updatedAt": moment,
            **({"__v": version + 1} if isinstance(version, int) else {}),
        }
        gone = {
            "mergedInto": target.id,
            "type": "imported",
            "isDeleted": True,
            "deletedAt": moment,
            "updatedAt": moment,
        }
        try:
            async with self._identities.operation("Identity Merge") as operation:
                operation.update("identities", target.id, changed, if_revision=target.rev)
                for source in sources:
                    operation.also("identities", source.id, gone)
        except (StaleRevision, NotFound):
            return None
        return operation.result

    async def _own(self, user_id: Any) -> Record:
        """The identity that a user's links go to; made where an old account has none."""
        user = await self._users.find_by_id(user_id)
        if user is None:
            raise Problem(404, "not-found", "User not found")
        name = str(user.get("username", ""))
        for _ in range(2):
            own = primary_of(await self._identities.live_of(user_id), name)
            if own is not None:
                return own
            await self._accounts.claim_or_create(user_id, name)
        raise Problem(404, "not-found", "This user has no player identity")

    async def _existing(self, id_: Any, *, deleted: bool = False) -> Record:
        record = await self._identities.get(id_)
        if record is None or (record.get("isDeleted") and not deleted):
            raise not_there()
        return record

    async def _refuse_unless_guest(self, guest: Record, user_id: Any, kinds: Sequence[str]) -> None:
        owner_id = guest.get("userId")
        if owner_id == user_id:
            raise invalid("This identity is your own already")
        owner = None if owner_id is None else await self._users.find_by_id(owner_id)
        if guest.get("type") not in kinds or (owner is not None and owner.get("role") != "guest"):
            raise invalid("Only the identity of a guest can be linked")


def not_there() -> Problem:
    """404: there is no such identity, or it has been deleted."""
    return Problem(404, "not-found", "Identity not found")


def contended() -> Problem:
    """503: others keep changing the record."""
    return unavailable("The identity is being changed by somebody else, please try again", "busy")
