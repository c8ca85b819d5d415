"""The stories of changing an account: its name, its role, its picture, its end.

What an account is called stands in its identity as well, and who it is friends with in the friends' own records. So a
new name and a deletion are operations of several records, of which the user's own decides: it is refused or made, and
the others follow whatever crashes.

Every change is told to the cache before it is acknowledged, also when its outcome is unknown: the very next request of
that user, on every worker, sees it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from crossfade import DuplicateKey, EntityHandle, NotFound, Record, StaleRevision
from scorekeeper import names
from scorekeeper.audit.log import AuditLog
from scorekeeper.auth.current import CurrentUser
from scorekeeper.auth.tokens import Tokens
from scorekeeper.cache import UserCache
from scorekeeper.errors import Problem, forbidden, invalid, name_taken, unauthorized
from scorekeeper.identities.accounts import AccountIdentities, primary_of, release_with, rename_with
from scorekeeper.users import pictures
from scorekeeper.users.repository import UserRepository
from scorekeeper.users.shown import account_of, person_of, picture_of, user_of
from scorekeeper.wire import document_id, now, plain

#: How often a record that somebody else changes meanwhile is read again.
ATTEMPTS: Final = 5

#: Pictures that are decoded at one time: each may take 100 MB and a core.
DECODED_AT_ONCE: Final = 2

#: Friend requests of a deleted account that are removed at one time.
PORTION: Final = 200


class AccountChanges:
    """Changes of accounts. Knows no HTTP and no store."""

    def __init__(
        self,
        users: UserRepository,
        identities: AccountIdentities,
        requests: EntityHandle,
        tokens: Tokens,
        cache: UserCache,
        audit: AuditLog,
    ) -> None:
        self._users = users
        self._identities = identities
        self._requests = requests
        self._tokens = tokens
        self._cache = cache
        self._audit = audit
        self._decoding = asyncio.Semaphore(DECODED_AT_ONCE)

    # -- the name ----------------------------------------------------------------------------------

    async def rename(self, current: CurrentUser, user_id: str, name: str) -> dict[str, Any]:
        """Give oneself another name; tokens with the old one stay valid, and a new one comes with the answer.

        Raises:
            Problem: 400, the name cannot be, is taken, or is another player's alias; 403, somebody else's account.
        """
        if user_id != current.id:
            raise forbidden("You can only change your own name")
        renamed = await self._rename(user_id, name, by=document_id(current.id), context="User Rename")
        record = await self._users.with_picture(renamed)
        if record is None:
            raise unauthorized("Invalid or expired token")
        user = user_of(record)
        return {
            "message": "Name updated successfully",
            "token": self._tokens.issue(str(user["id"]), str(user["username"])),
            "user": user,
        }

    async def set_username(self, current: CurrentUser, user_id: str, username: str) -> dict[str, Any]:
        """Give anybody another name.

        Raises:
            Problem: 400 as in `rename`; 404, there is no such user.
        """
        by = document_id(current.id)
        record = await self._rename(user_id, username, by=by, context="Username Change")
        return {"message": "Username updated successfully", "user": account_of(record)}

    async def _rename(self, user_id: str, name: str, *, by: Any, context: str) -> Record:
        name = names.trimmed(name)
        if problem := names.fault_of_new(name):
            raise invalid(problem)
        id_ = document_id(user_id)
        # Before `crossfade init` has stamped old documents there is no index to decide it.
        holder = await self._users.find_by_case_insensitive_username(name, picture=False)
        if holder is not None and holder.id != id_:
            raise name_taken()
        if await self._identities.is_anothers_alias(name, id_):
            raise invalid("This name is an alias of another player")
        for attempt in range(1, ATTEMPTS + 1):
            user = await self._user(id_)
            primary = primary_of(await self._identities.live_of(id_), str(user.get("username", "")))
            try:
                async with self._changing(user_id), self._users.operation(context) as operation:
                    operation.update(
                        "users", id_, {"username": name, "updatedAt": now()}, if_revision=user.rev
                    )
                    if primary is not None and primary.get("displayName") != name:
                        rename_with(operation, primary, name, by=by)
            except DuplicateKey:
                raise name_taken() from None
            except NotFound:
                raise _no_such_user() from None
            except StaleRevision:
                if attempt == ATTEMPTS:
                    raise
                continue
            assert operation.result is not None
            await self._audit.note("account.renamed", id_, by=by, before=str(plain(user.get("username"))))
            return operation.result
        raise AssertionError("the last attempt returns or raises")

    # -- the role ----------------------------------------------------------------------------------

    async def set_role(self, current: CurrentUser, user_id: str, role: str) -> dict[str, Any]:
        """Give a user another role; holds from the next request on, on every worker, once this returns.

        Raises:
            Problem: 400, the user is a guest, who has no account; 404, there is no such user.
        """
        user = await self._user(document_id(user_id))
        if user.get("role") == "guest":
            raise invalid("A guest has no account that could have a role")
        try:
            async with self._changing(user_id):
                record = await self._users.update(user.id, {"role": role}, context="Role Change")
        except NotFound:
            raise _no_such_user() from None
        by, before = document_id(current.id), str(plain(user.get("role", "user")))
        await self._audit.note("account.role_changed", user.id, by=by, before=before, after=role)
        return {"message": "Role updated successfully", "user": account_of(record)}

    # -- the picture -------------------------------------------------------------------------------

    async def picture(self, current: CurrentUser) -> str | None:
        """One's own picture, a data URL.

        Raises:
            Problem: 401, the account is gone since the token was checked.
        """
        record = await self._users.find_by_id(document_id(current.id))
        if record is None:
            raise unauthorized("Invalid or expired token")
        return picture_of(record)

    async def set_picture(self, current: CurrentUser, picture: str) -> dict[str, Any]:
        """Take a picture for oneself, once it has been looked into.

        Raises:
            Problem: 400 or 413 as in `pictures.checked`; 401, the account is gone.
        """
        async with self._decoding:
            url = await asyncio.to_thread(pictures.checked, picture)
        record = await self._put_picture(current, url)
        return {"message": "Profile picture updated successfully", "user": person_of(record)}

    async def remove_picture(self, current: CurrentUser) -> dict[str, Any]:
        """Have no picture any more; that there was none is no error.

        Raises:
            Problem: 401, the account is gone.
        """
        record = await self._put_picture(current, None)
        return {"message": "Profile picture removed successfully", "user": person_of(record)}

    async def _put_picture(self, current: CurrentUser, picture: str | None) -> Record:
        try:
            async with self._changing(current.id):
                return await self._users.update(
                    document_id(current.id), {"profilePicture": picture}, context="Profile Picture"
                )
        except NotFound:
            raise unauthorized("Invalid or expired token") from None

    # -- the end -----------------------------------------------------------------------------------

    async def remove_oneself(self, current: CurrentUser) -> dict[str, Any]:
        """Delete one's own account.

        Raises:
            Problem: 401, it is gone already.
        """
        try:
            await self._remove(current.id, by=document_id(current.id))
        except Problem as gone:
            raise (unauthorized("Invalid or expired token") if gone.status == 404 else gone) from None
        return {"message": "Account deleted successfully"}

    async def remove(self, current: CurrentUser, user_id: str) -> dict[str, Any]:
        """Delete an account; its tokens count for nothing once this returns.

        Its friends lose it from their lists and its identities stay as players of their games, in the same operation;
        its friend requests go afterwards. What a crash leaves of those names nobody, and no list shows it.

        Raises:
            Problem: 404, there is no such user.
        """
        await self._remove(user_id, by=document_id(current.id))
        return {"message": "User deleted successfully"}

    async def _remove(self, user_id: str, *, by: Any) -> None:
        user = await self._user(document_id(user_id))
        friends = user.get("friends")
        moment = now()
        try:
            async with self._changing(user_id), self._users.operation("Account Deletion") as operation:
                operation.delete("users", user.id)
                for friend in dict.fromkeys(friends if isinstance(friends, list) else ()):
                    if friend != user.id:
                        operation.also("users", friend, {"updatedAt": moment}, remove={"friends": [user.id]})
                for identity in await self._identities.live_of(user.id):
                    release_with(operation, identity)
        except NotFound:
            raise _no_such_user() from None
        await self._audit.note("account.deleted", user.id, by=by)
        await self._remove_requests(user.id)

    async def _remove_requests(self, user_id: Any) -> None:
        for side in ("sender", "receiver"):
            while found := await self._requests.find({side: user_id}, limit=PORTION):
                for request in found:
                    try:
                        await self._requests.delete(request.id, context="Account Deletion")
                    except NotFound:
                        continue

    # -- all of them -------------------------------------------------------------------------------

    async def _user(self, id_: Any) -> Record:
        record = await self._users.find_by_id(id_, picture=False)
        if record is None:
            raise _no_such_user()
        return record

    @asynccontextmanager
    async def _changing(self, user_id: str) -> AsyncIterator[None]:
        try:
            yield
        finally:
            # Whatever became of it: an unknown outcome may be a change.
            await self._cache.forget(user_id)


def _no_such_user() -> Problem:
    return Problem(404, "not-found", "User not found")
