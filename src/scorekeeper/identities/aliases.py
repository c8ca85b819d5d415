"""The stories of aliases: other names that a player goes by, none of which is anybody else's."""

from __future__ import annotations

from typing import Any, Final

from bson import ObjectId

from crossfade import DuplicateKey, NotFound, Record, StaleRevision
from scorekeeper import names
from scorekeeper.auth.current import CurrentUser
from scorekeeper.errors import Problem, forbidden, invalid
from scorekeeper.identities.linking import ATTEMPTS, contended, not_there
from scorekeeper.identities.merges import is_live
from scorekeeper.identities.repository import IdentityRepository
from scorekeeper.identities.service import derived_id, identity_document
from scorekeeper.wire import document_id, now

#: UTF-16 units of an alias; that of the longest names of old accounts.
LONGEST: Final = 50


class AliasService:
    """Aliases of identities. Knows no HTTP and no store."""

    def __init__(self, identities: IdentityRepository) -> None:
        self._identities = identities

    async def add(self, current: CurrentUser, identity_id: Any, alias: str) -> Record:
        """Let an identity go by one more name.

        No index can say that an alias is nobody's name: so it is looked for before, and once more behind one's own
        write. Of two who take one alias at the same time the later one sees the other then, and gives it up; where each
        sees the other, both do. Nobody keeps it over another, who may not have seen this one, and may have been told.

        Raises:
            Problem: 400, the alias cannot be, or is a live identity's; 403, not one's own; 404.
        """
        name = names.trimmed(alias)
        problem = names.fault(name)
        if problem or not name or names.length(name) > LONGEST:
            raise invalid(problem or f"An alias has 1 to {LONGEST} characters")
        for _ in range(ATTEMPTS):
            identity = await self._own(current, identity_id)
            if await self._identities.live_under(name):
                raise _taken()
            entry = {
                "name": name,
                "normalizedName": names.normal_form(name),
                "addedAt": now(),
                "addedBy": document_id(current.id),
                "_id": ObjectId(),
            }
            try:
                added = await self._write(identity, [*_aliases(identity), entry], "Identity Alias")
            except StaleRevision:
                continue
            if any(rival.id != added.id for rival in await self._identities.live_under(name)):
                await self._remove(current, identity_id, name)
                raise _taken()
            return added
        raise contended()

    async def remove(self, current: CurrentUser, identity_id: Any, alias: str) -> Record:
        """Let an identity no longer go by a name, in any letter case.

        Raises:
            Problem: 403, not one's own; 404, it has no such alias.
        """
        return await self._remove(current, identity_id, alias)

    async def _remove(self, current: CurrentUser, identity_id: Any, alias: str) -> Record:
        for _ in range(ATTEMPTS):
            identity = await self._own(current, identity_id)
            kept = [each for each in _aliases(identity) if not _is(each, alias)]
            if len(kept) == len(_aliases(identity)):
                raise _no_such_alias()
            try:
                return await self._write(identity, kept, "Identity Alias Removal")
            except StaleRevision:
                continue
        raise contended()

    async def split(self, identity_id: Any, alias: str, *, by: Any) -> tuple[Record, Record]:
        """Make an alias a guest of its own: (the identity without it, the new one). All or nothing.

        The new one decides. Its id comes from the alias, so that of two who split it off at once one does.

        Raises:
            Problem: 400, it is being split off already; 404, there is no such identity, or it has no such alias.
        """
        identity = await self._live(identity_id)
        entries = [each for each in _aliases(identity) if _is(each, alias)]
        if not entries:
            raise _no_such_alias()
        name, entry = str(entries[0].get("name")), entries[0]
        id_ = derived_id(f"alias {name} of {identity.id}, {entry.get('_id')}, {entry.get('addedAt')}")
        new = identity_document(name, None, kind="guest", by=by, id_=id_)
        try:
            async with self._identities.operation("Identity Split") as operation:
                operation.insert("identities", new)
                operation.also(
                    "identities", identity.id, {"updatedAt": new["updatedAt"]}, remove={"aliases": entries}
                )
        except DuplicateKey:
            raise invalid("This alias has been split off already") from None
        assert operation.result is not None
        return await self._live(identity_id), operation.result

    async def _write(self, identity: Record, aliases: list[Any], context: str) -> Record:
        fields: dict[str, Any] = {"aliases": aliases, "updatedAt": now()}
        version = identity.get("__v")
        if isinstance(version, int):
            fields["__v"] = version + 1
        try:
            return await self._identities.update(
                identity.id, fields, if_revision=identity.rev, context=context
            )
        except NotFound:
            raise not_there() from None

    async def _own(self, current: CurrentUser, identity_id: Any) -> Record:
        identity = await self._live(identity_id)
        if current.role != "admin" and identity.get("userId") != document_id(current.id):
            raise forbidden("You can only change your own player identities")
        return identity

    async def _live(self, identity_id: Any) -> Record:
        identity = await self._identities.get(identity_id)
        if identity is None or not is_live(identity):
            raise not_there()
        return identity


def _aliases(identity: Record) -> list[Any]:
    aliases = identity.get("aliases")
    return aliases if isinstance(aliases, list) else []


def _is(alias: Any, name: str) -> bool:
    return isinstance(alias, dict) and alias.get("normalizedName") == names.normal_form(name)


def _taken() -> Problem:
    return invalid("This name or alias is in use already")


def _no_such_alias() -> Problem:
    return Problem(404, "not-found", "This identity has no such alias")
