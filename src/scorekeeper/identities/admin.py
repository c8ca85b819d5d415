"""The stories of administrators: whose an identity is, and whether it is there at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crossfade import NotFound, Record, StaleRevision
from scorekeeper.errors import Problem, invalid
from scorekeeper.identities.linking import ATTEMPTS, LinkingService, contended, not_there
from scorekeeper.identities.merges import is_live, target_of
from scorekeeper.identities.repository import IdentityRepository
from scorekeeper.users.repository import UserRepository
from scorekeeper.wire import now


class IdentityAdministration:
    """What only administrators do with identities. Knows no HTTP and no store."""

    def __init__(
        self, identities: IdentityRepository, linking: LinkingService, users: UserRepository
    ) -> None:
        self._identities = identities
        self._linking = linking
        self._users = users

    async def assign(self, identity_id: Any, user_id: Any) -> Record:
        """Make an identity a user's.

        Raises:
            Problem: 400, it was merged or deleted; 404, it is not there, or the user is not.
        """
        if await self._users.find_by_id(user_id) is None:
            raise Problem(404, "not-found", "User not found")

        def assigned(identity: Record) -> dict[str, Any]:
            if not is_live(identity):
                raise invalid("An identity that has been merged or deleted cannot be assigned")
            return {"userId": user_id, "type": "user"}

        return await self._change(identity_id, assigned, "Identity Assignment")

    async def unlink(self, identity_id: Any) -> Record:
        """Part an identity from what it belongs to: from the one that it was merged into, else from its user.

        Raises:
            Problem: 400, it belongs to nobody; 404, it is not there.
        """
        if target_of(await self._existing(identity_id)) is not None:
            return (await self._linking.undo(identity_id)).guest

        def parted(identity: Record) -> dict[str, Any]:
            if identity.get("userId") is None:
                raise invalid("This identity belongs to no user")
            return {"userId": None, "type": "guest"}

        return await self._change(identity_id, parted, "Identity Unassignment")

    async def delete(self, identity_id: Any) -> Record:
        """Delete an identity; it stays in its games, and can be had back.

        Raises:
            Problem: 404, it is not there, or deleted already.
        """

        def deleted(identity: Record) -> dict[str, Any]:
            if identity.get("isDeleted"):
                raise not_there()
            return {"isDeleted": True, "deletedAt": now()}

        return await self._change(identity_id, deleted, "Identity Deletion")

    async def restore(self, identity_id: Any) -> Record:
        """Have a deleted identity back; one that was deleted by being merged, as it was before.

        Raises:
            Problem: 400, it is not deleted; 404, it is not there.
        """
        identity = await self._existing(identity_id)
        if identity.get("isDeleted") and target_of(identity) is not None:
            return (await self._linking.undo(identity_id)).guest

        def restored(identity: Record) -> dict[str, Any]:
            if not identity.get("isDeleted"):
                raise invalid("This identity is not deleted")
            return {"isDeleted": False, "deletedAt": None}

        return await self._change(identity_id, restored, "Identity Restoration")

    async def _change(
        self, identity_id: Any, change: Callable[[Record], dict[str, Any]], context: str
    ) -> Record:
        for _ in range(ATTEMPTS):
            identity = await self._existing(identity_id)
            fields = {**change(identity), "updatedAt": now()}
            try:
                return await self._identities.update(
                    identity.id, fields, if_revision=identity.rev, context=context
                )
            except StaleRevision:
                continue
            except NotFound:
                raise not_there() from None
        raise contended()

    async def _existing(self, identity_id: Any) -> Record:
        identity = await self._identities.get(identity_id)
        if identity is None:
            raise not_there()
        return identity
