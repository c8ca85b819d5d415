"""Users as the stories ask for them. Which store answers, and in which order both are written, is Crossfade's.

A service holds a repository, a repository holds Crossfade's handle of an entity, and nobody else does: so every
question that is asked of the stores has a name here. ``docs/repositories.md`` shows how to use and extend it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from crossfade import DuplicateKey, EntityHandle, FailureStrategy, Migration, Operation, Record, any_of
from scorekeeper import names
from scorekeeper.users.entity import USERNAME_RULE
from scorekeeper.wire import now

#: Records of one portion of a list: each may hold a picture of 10 MiB.
PORTION = 100


class UserRepository:
    """The records of users.

    Every write takes ``strategy``: what becomes of it when one of the two stores fails; None is the phase's default
    (`crossfade.FailureStrategy`). ``context`` names the operation in log lines. What is raised is Crossfade's
    (`crossfade.errors`).
    """

    def __init__(self, accounts: Migration) -> None:
        self._accounts = accounts
        self._users: EntityHandle = accounts["users"]

    # -- finding -----------------------------------------------------------------------------------

    async def find_by_id(self, id_: Any, *, picture: bool = True) -> Record | None:
        """The user of this ``_id``, or None; without ``picture`` its megabytes stay where they are."""
        return await self._users.get(id_, parts=picture)

    async def find_many_by_id(self, ids: Iterable[Any]) -> list[Record]:
        """Those of these users that are there, in this order; in one round trip."""
        return await self._users.get_many(ids)

    async def with_picture(self, record: Record) -> Record | None:
        """The same user with the picture, which no write brings along; None: deleted meanwhile."""
        return await self._users.get(record.id) if record.without else record

    async def find_by_case_insensitive_username(
        self, username: str, *, picture: bool = True
    ) -> Record | None:
        """The user of this name in any letter case, blanks around it aside; the exact spelling comes first.

        Old data may hold two names that differ only in letter case; both are found as they are spelt. ``picture``: see
        `find_by_id`.
        """
        name = names.trimmed(username)
        if not name or names.fault(name) is not None:
            return None
        return await self._users.find_by_key(USERNAME_RULE, name, parts=picture)

    async def find_by_exact_username(self, username: str) -> Record | None:
        """The user whose name is spelt exactly so, or None."""
        return await self._users.find_one({"username": username})

    async def in_order_of_name(self, roles: Iterable[str] | None = None) -> AsyncIterator[Record]:
        """Every user, or those of these roles, by name, read in portions."""
        where = {} if roles is None else {"role": any_of(roles)}
        after = None
        while True:
            found = await self._users.find(where, order_by="username", after=after, limit=PORTION)
            for record in found:
                yield record
            if len(found) < PORTION:
                return
            after = (found[-1].get("username"), found[-1].id)

    async def count(self) -> int:
        """How many users there are, guests included."""
        return await self._users.count()

    # -- writing -----------------------------------------------------------------------------------

    async def create(
        self,
        username: str,
        password_hash: str | None,
        *,
        role: str = "user",
        guest_metadata: Mapping[str, Any] | None = None,
        context: str = "User Registration",
        strategy: FailureStrategy | None = None,
    ) -> Record:
        """A new user, laid out as the old back end lays out its documents.

        Raises:
            crossfade.DuplicateKey: the name is taken in any letter case; decided by an index, not by looking first.
        """
        moment = now()
        document: dict[str, Any] = {
            "username": username,
            "passwordHash": password_hash,
            "role": role,
            "guestMetadata": guest_metadata,
            "lastLogin": None,
            "profilePicture": None,
            "friends": [],
            "createdAt": moment,
            "updatedAt": moment,
            "__v": 0,
        }
        return await self._users.insert(document, context=context, strategy=strategy)

    async def create_from_mongo(
        self, document: Mapping[str, Any], *, strategy: FailureStrategy | None = None
    ) -> Record:
        """The user of a document as the old back end wrote it: same ``_id``, every field kept, in both stores.

        May be called again: where that ``_id`` is there already, what the stores hold stands, not ``document``; it is
        brought to the store that lacks it.

        Raises:
            crossfade.DuplicateKey: another user has this name.
            crossfade.Quarantined: PostgreSQL cannot hold this document unchanged.
        """
        context = "User From MongoDB"
        try:
            return await self._users.insert(document, context=context, strategy=strategy)
        except DuplicateKey as taken:
            if taken.rule != "_id":
                raise
        # An empty write gives what is there the next revision, and that goes to both.
        return await self._users.update(document["_id"], context=context, strategy=strategy)

    async def update(
        self,
        id_: Any,
        fields: Mapping[str, Any],
        *,
        if_revision: int | None = None,
        context: str,
        strategy: FailureStrategy | None = None,
    ) -> Record:
        """Set fields and the time of the change; with ``if_revision``, only on that one. See `with_picture`.

        Raises:
            crossfade.NotFound, StaleRevision, DuplicateKey: nothing was written.
        """
        return await self._users.update(
            id_, {**fields, "updatedAt": now()}, if_revision=if_revision, context=context, strategy=strategy
        )

    async def stamp_login(self, id_: Any) -> None:
        """Note the time of a log-in; acknowledged by the store that decides alone."""
        moment = now()
        await self._users.update(
            id_, {"lastLogin": moment, "updatedAt": moment}, context="User Login", mode="async"
        )

    async def delete_by_id(
        self, id_: Any, *, context: str = "Account Deletion", strategy: FailureStrategy | None = None
    ) -> None:
        """Delete a user for good: a tombstone keeps late writes from bringing them back.

        Raises:
            crossfade.NotFound: there is no such user.
        """
        await self._users.delete(id_, context=context, strategy=strategy)

    def operation(self, context: str, *, strategy: FailureStrategy | None = None) -> Operation:
        """Several records, all or nothing (`crossfade.Operation`)."""
        return self._accounts.operation(context, strategy=strategy)
