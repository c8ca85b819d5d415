"""Friend requests as the stories ask for them: the row of a pair, and what is open on either side."""

from __future__ import annotations

from hashlib import sha256
from typing import Any, Final

from bson import ObjectId

from crossfade import EntityHandle, Migration, Operation, Record
from scorekeeper.wire import now

#: Open requests that a list shows: the newest.
MOST: Final = 500


class FriendRequestRepository:
    """The records of friend requests.

    Two people have one row, whoever asked last: it decides every change between them, so that of changes at the same
    time each finds what the one before it has left. Old data may hold two, one for each direction.
    """

    def __init__(self, accounts: Migration) -> None:
        self._accounts = accounts
        self._requests: EntityHandle = accounts["friend_requests"]

    async def get(self, id_: Any) -> Record | None:
        """The request of this ``_id``, or None."""
        return await self._requests.get(id_)

    async def of_pair(self, one: Any, other: Any) -> list[Record]:
        """What there is between two people, in either direction."""
        return await self._requests.find(
            [{"sender": one, "receiver": other}, {"sender": other, "receiver": one}]
        )

    async def received(self, user_id: Any) -> list[Record]:
        """Open requests to somebody, the newest first."""
        return await self._requests.find(
            {"receiver": user_id, "status": "pending"}, order_by="-createdAt", limit=MOST
        )

    async def sent(self, user_id: Any) -> list[Record]:
        """Open requests of somebody, the newest first."""
        return await self._requests.find(
            {"sender": user_id, "status": "pending"}, order_by="-createdAt", limit=MOST
        )

    async def open(self, sender: Any, receiver: Any, there: list[Record]) -> Record:
        """Open a request between two who have none open; ``there`` is what `of_pair` has found.

        Raises:
            crossfade.DuplicateKey, StaleRevision, NotFound: somebody else was faster, in either direction.
        """
        moment = now()
        fields = {
            "sender": sender, "receiver": receiver, "status": "pending", "createdAt": moment, "updatedAt": moment,
        }  # fmt: skip
        for row in there:
            # The row of this direction, if old data has one of its own: no other may name the same two.
            if row.get("sender") == sender or len(there) == 1:
                return await self._requests.update(
                    row.id, fields, if_revision=row.rev, context="Friend Request"
                )
        return await self._requests.insert(
            {"_id": id_of_pair(sender, receiver), **fields, "__v": 0}, context="Friend Request"
        )

    async def close(self, request: Record, context: str, *, if_revision: bool = False) -> None:
        """Make an open request a rejected one.

        Raises:
            crossfade.ConditionNotMet, StaleRevision: it is not open, or not as it was, any more.
        """
        await self._requests.update(
            request.id,
            {"status": "rejected", "updatedAt": now()},
            where={"status": "pending"},
            if_revision=request.rev if if_revision else None,
            context=context,
        )

    def decide(
        self, operation: Operation, row: Record | None, sender: Any, receiver: Any, status: str
    ) -> None:
        """Let the row of a pair decide an operation; where there is none, a new one does."""
        moment = now()
        if row is not None:
            changed = {"status": status, "updatedAt": moment}
            operation.update("friend_requests", row.id, changed, if_revision=row.rev)
            return
        operation.insert(
            "friend_requests",
            {
                "_id": id_of_pair(sender, receiver),
                "sender": sender,
                "receiver": receiver,
                "status": status,
                "createdAt": moment,
                "updatedAt": moment,
                "__v": 0,
            },
        )

    def operation(self, context: str) -> Operation:
        """Several records, all or nothing (`crossfade.Operation`)."""
        return self._accounts.operation(context)


def id_of_pair(one: Any, other: Any) -> ObjectId:
    """The id of the row of a pair: the same on every attempt and from both sides, so that two of them make one."""
    first, second = sorted((str(one), str(other)))
    return ObjectId(sha256(f"friends {first} {second}".encode()).digest()[:12])
