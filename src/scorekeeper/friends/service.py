"""The stories of friends: one asks, the other accepts or rejects, and either may part again.

Accepting is an operation of three records, of which the request decides: it becomes accepted only from pending, and
that same write owes both users their new friend. So nobody is half a friend, whatever crashes.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any

from bson import ObjectId

from crossfade import ConditionNotMet, DuplicateKey, Migration, NotFound, Record, StaleRevision
from scorekeeper.auth.current import CurrentUser, normalised
from scorekeeper.errors import Problem, forbidden, invalid
from scorekeeper.wire import document_id, now, plain

#: How often a friend list that somebody else changes meanwhile is read again.
ATTEMPTS = 5


class FriendService:
    """Friend requests and friendships. Knows no HTTP and no store."""

    def __init__(self, accounts: Migration) -> None:
        self._accounts = accounts
        self._users = accounts["users"]
        self._requests = accounts["friend_requests"]

    async def ask(self, current: CurrentUser, receiver: str) -> dict[str, Any]:
        """A new request, or the old one of this pair once more after it was rejected or the two have parted.

        Raises:
            Problem: 400, to oneself, to a friend, or open already in either direction; 404, nobody is there.
        """
        sender_id, receiver_id = document_id(current.id), _object_id(receiver, "receiverId")
        if sender_id == receiver_id:
            raise invalid("You cannot send a friend request to yourself")
        own = await self._user(sender_id)
        await self._user(receiver_id)
        if receiver_id in _friends(own):
            raise invalid("You are already friends")
        if await self._of_pair(receiver_id, sender_id, "pending"):
            raise invalid("This user has already sent you a friend request")
        try:
            record = await self._open(sender_id, receiver_id)
        except (DuplicateKey, StaleRevision, NotFound):
            # Of two who ask at once, one does.
            record = None
        if record is None:
            raise invalid("Friend request already sent")
        return {
            "message": "Friend request sent successfully",
            "friendRequest": {
                name: plain(record.get(name)) for name in ("sender", "receiver", "status", "createdAt")
            }
            | {"id": plain(record.id)},
        }

    async def _open(self, sender: Any, receiver: Any) -> Record | None:
        moment = now()
        there = await self._of_pair(sender, receiver)
        if there is None:
            return await self._requests.insert(
                {
                    "_id": _id_of_pair(sender, receiver),
                    "sender": sender,
                    "receiver": receiver,
                    "status": "pending",
                    "createdAt": moment,
                    "updatedAt": moment,
                    "__v": 0,
                },
                context="Friend Request",
            )
        if there.get("status") == "pending":
            return None
        return await self._requests.update(
            there.id,
            {"status": "pending", "createdAt": moment, "updatedAt": moment},
            if_revision=there.rev,
            context="Friend Request",
        )

    async def accept(self, current: CurrentUser, request_id: str) -> dict[str, Any]:
        """Make sender and receiver friends of each other, all or nothing.

        Raises:
            Problem: 400, processed already; 403, not its receiver; 404, no such request, or its sender is gone.
        """
        receiver = document_id(current.id)
        request = await self._received(request_id, receiver)
        sender = request.get("sender")
        friend = await self._user(sender)
        moment = now()
        try:
            async with self._accounts.operation("Friend Accept") as operation:
                operation.update(
                    "friend_requests",
                    request.id,
                    {"status": "accepted", "updatedAt": moment},
                    where={"status": "pending"},
                )
                operation.also("users", sender, {"updatedAt": moment}, add={"friends": [receiver]})
                operation.also("users", receiver, {"updatedAt": moment}, add={"friends": [sender]})
        except ConditionNotMet:
            raise _processed() from None
        return {"message": "Friend request accepted", "friend": _shown(friend)}

    async def reject(self, current: CurrentUser, request_id: str) -> dict[str, Any]:
        """Turn a request down.

        Raises:
            Problem: as for `accept`.
        """
        request = await self._received(request_id, document_id(current.id))
        await self._close(request, "Friend Reject")
        return {"message": "Friend request rejected"}

    async def part(self, current: CurrentUser, friend: str) -> dict[str, Any]:
        """End a friendship on both sides; of somebody who is no friend, nothing happens.

        Raises:
            Problem: 400, malformed id.
        """
        own_id, friend_id = document_id(current.id), _object_id(friend, "friendId")
        for attempt in range(1, ATTEMPTS + 1):
            own = await self._user(own_id)
            moment = now()
            try:
                async with self._accounts.operation("Friend Removal") as operation:
                    operation.update(
                        "users",
                        own_id,
                        {
                            "friends": [each for each in _friends(own) if each != friend_id],
                            "updatedAt": moment,
                        },
                        if_revision=own.rev,
                    )
                    if friend_id != own_id:
                        operation.also(
                            "users", friend_id, {"updatedAt": moment}, remove={"friends": [own_id]}
                        )
                break
            except StaleRevision:
                if attempt == ATTEMPTS:
                    raise
        return {"message": "Friend removed successfully"}

    async def cancel(self, current: CurrentUser, request_id: str) -> dict[str, Any]:
        """Take one's own request back; the pair may ask again.

        Raises:
            Problem: 400, processed already; 403, not its sender; 404, no such request.
        """
        request = await self._request(request_id)
        if request.get("sender") != document_id(current.id):
            raise forbidden("Only the sender can cancel a friend request")
        await self._close(request, "Friend Request Cancel")
        return {"message": "Friend request cancelled"}

    async def _close(self, request: Record, context: str) -> None:
        try:
            await self._requests.update(
                request.id,
                {"status": "rejected", "updatedAt": now()},
                where={"status": "pending"},
                context=context,
            )
        except ConditionNotMet:
            raise _processed() from None

    async def _received(self, request_id: str, receiver: Any) -> Record:
        request = await self._request(request_id)
        if request.get("receiver") != receiver:
            raise forbidden("Only the receiver can answer a friend request")
        if request.get("status") != "pending":
            raise _processed()
        return request

    async def _request(self, request_id: str) -> Record:
        record = await self._requests.get(_object_id(request_id, "requestId"))
        if record is None:
            raise Problem(404, "not-found", "Friend request not found")
        return record

    async def _of_pair(self, sender: Any, receiver: Any, status: str | None = None) -> Record | None:
        where = {"sender": sender, "receiver": receiver}
        return await self._requests.find_one(where if status is None else where | {"status": status})

    async def _user(self, id_: Any) -> Record:
        record = await self._users.get(id_)
        if record is None:
            raise Problem(404, "not-found", "User not found")
        return record


def _object_id(text: str, name: str) -> ObjectId:
    if not ObjectId.is_valid(text):
        raise invalid(f"{name} is not a valid id")
    return ObjectId(text)


def _id_of_pair(sender: Any, receiver: Any) -> ObjectId:
    """The id of the first request of a pair: the same on every attempt, so that two of them make one."""
    return ObjectId(sha256(f"friend request {sender} {receiver}".encode()).digest()[:12])


def _friends(user: Record) -> list[Any]:
    friends = user.get("friends")
    return friends if isinstance(friends, list) else []


def _processed() -> Problem:
    return Problem(400, "processed", "This friend request has already been processed")


def _shown(record: Record) -> dict[str, Any]:
    user = normalised(record)
    shown: dict[str, Any] = {"id": user["id"], "username": user["username"]}
    picture = record.get("profilePicture")
    shown["profilePicture"] = picture if isinstance(picture, str) else None
    if record.get("createdAt") is not None:
        shown["createdAt"] = plain(record.get("createdAt"))
    return shown
