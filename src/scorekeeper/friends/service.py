"""The stories of friends: one asks, the other accepts or rejects, and either may part again.

Whatever becomes of two people is decided by one record, the row of their requests: its write names the step, and owes
both users what follows from it. So nobody is half a friend, whatever crashes; of what happens at the same time, a
request from either side, acceptance and withdrawal, acceptance and parting, one is first, and the other finds it done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

from bson import ObjectId

from crossfade import ConditionNotMet, DuplicateKey, NotFound, Record, StaleRevision
from scorekeeper.auth.current import CurrentUser
from scorekeeper.errors import Problem, forbidden, invalid, unavailable
from scorekeeper.friends.repository import FriendRequestRepository
from scorekeeper.users.repository import UserRepository
from scorekeeper.users.shown import person_of
from scorekeeper.wire import document_id, now, plain

#: How often a row that somebody else changes meanwhile is read again.
ATTEMPTS: Final = 8
_OVERTAKEN = (ConditionNotMet, DuplicateKey, StaleRevision, NotFound)


class FriendService:
    """Friend requests and friendships. Knows no HTTP and no store."""

    def __init__(self, users: UserRepository, requests: FriendRequestRepository) -> None:
        self._users = users
        self._requests = requests

    # -- looking -----------------------------------------------------------------------------------

    async def friends(self, current: CurrentUser) -> dict[str, Any]:
        """One's friends, in the order in which they became friends; those that are gone are left out."""
        own = await self._user(document_id(current.id))
        people = await self._people(_friends(own))
        return {"friends": [people[id_] for id_ in _friends(own) if id_ in people]}

    async def received(self, current: CurrentUser) -> dict[str, Any]:
        """Open requests to oneself."""
        found = await self._requests.received(document_id(current.id))
        return {"requests": _listed(found, "sender", await self._people(_each(found, "sender")))}

    async def sent(self, current: CurrentUser) -> dict[str, Any]:
        """One's own open requests."""
        found = await self._requests.sent(document_id(current.id))
        return {"requests": _listed(found, "receiver", await self._people(_each(found, "receiver")))}

    async def everything(self, current: CurrentUser) -> dict[str, Any]:
        """Friends and open requests of both sides; as many questions as for one of them."""
        own_id = document_id(current.id)
        own, received, sent = await asyncio.gather(
            self._user(own_id), self._requests.received(own_id), self._requests.sent(own_id)
        )
        people = await self._people([*_friends(own), *_each(received, "sender"), *_each(sent, "receiver")])
        return {
            "friends": [people[id_] for id_ in _friends(own) if id_ in people],
            "receivedRequests": _listed(received, "sender", people),
            "sentRequests": _listed(sent, "receiver", people),
        }

    # -- asking ------------------------------------------------------------------------------------

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
        there = await self._requests.of_pair(sender_id, receiver_id)
        _refuse_if_open(there, sender_id)
        try:
            opened = await self._requests.open(sender_id, receiver_id, there)
        except _OVERTAKEN:
            # Of two who ask at once, one does.
            _refuse_if_open(await self._requests.of_pair(sender_id, receiver_id), sender_id)
            raise invalid("Friend request already sent") from None
        if len(there) > 1:
            await self._refuse_if_crossed(opened, sender_id, receiver_id)
        shown = {name: plain(opened.get(name)) for name in ("sender", "receiver", "status", "createdAt")}
        return {
            "message": "Friend request sent successfully",
            "friendRequest": {"id": str(plain(opened.id)), **shown},
        }

    async def _refuse_if_crossed(self, opened: Record, sender: Any, receiver: Any) -> None:
        """Two rows, of old data, may have been opened at the same time: whoever sees both takes the own one back."""
        now_there = await self._requests.of_pair(sender, receiver)
        if any(row.id != opened.id and row.get("status") == "pending" for row in now_there):
            try:
                await self._requests.close(opened, "Friend Request", if_revision=True)
            except _OVERTAKEN:
                return  # answered already
            raise invalid("This user has already sent you a friend request")

    async def accept(self, current: CurrentUser, request_id: str) -> dict[str, Any]:
        """Make sender and receiver friends of each other, all or nothing.

        Raises:
            Problem: 400, processed already; 403, not its receiver; 404, no such request, or its sender is gone.
        """
        receiver = document_id(current.id)
        request = await self._received(request_id, receiver)
        sender = request.get("sender")
        if not isinstance(sender, ObjectId | str) or sender == receiver:
            # Old data; nobody else asks like that.
            raise Problem(404, "not-found", "User not found")
        friend = await self._user(sender)
        # Old data, and the old back end beside this one, may have a row for each direction.
        crossed = await self._requests.of_pair(sender, receiver)
        moment = now()
        try:
            async with self._requests.operation("Friend Accept") as operation:
                operation.update(
                    "friend_requests",
                    request.id,
                    {"status": "accepted", "updatedAt": moment},
                    where={"status": "pending", "sender": sender, "receiver": receiver},
                )
                operation.also("users", sender, {"updatedAt": moment}, add={"friends": [receiver]})
                operation.also("users", receiver, {"updatedAt": moment}, add={"friends": [sender]})
                for row in crossed:
                    if row.id != request.id:
                        operation.also("friend_requests", row.id, {"status": "accepted", "updatedAt": moment})
        except (ConditionNotMet, NotFound):
            raise _processed() from None
        return {"message": "Friend request accepted", "friend": person_of(friend)}

    async def reject(self, current: CurrentUser, request_id: str) -> dict[str, Any]:
        """Turn a request down.

        Raises:
            Problem: as for `accept`.
        """
        await self._close(await self._received(request_id, document_id(current.id)), "Friend Reject")
        return {"message": "Friend request rejected"}

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
            await self._requests.close(request, context)
        except (ConditionNotMet, NotFound):
            raise _processed() from None

    # -- being friends, and no longer --------------------------------------------------------------

    async def befriend(self, current: CurrentUser, friend: str) -> dict[str, Any]:
        """Make somebody a friend, on both sides; a friend stays one. Requests between the two are answered by it.

        Raises:
            Problem: 400, oneself, or a malformed id; 404, nobody is there.
        """
        own_id, friend_id = document_id(current.id), _object_id(friend, "friendId")
        if own_id == friend_id:
            raise invalid("You cannot be a friend of yourself")
        for _ in range(ATTEMPTS):
            own, other = await self._user(own_id), await self._user(friend_id)
            there = await self._requests.of_pair(own_id, friend_id)
            are_settled = (
                friend_id in _friends(own)
                and own_id in _friends(other)
                and not any(row.get("status") == "pending" for row in there)
            )
            if are_settled or await self._settle(own_id, friend_id, there, "accepted"):
                return {"message": "Friend added successfully", "friend": person_of(other)}
        raise _contended()

    async def part(self, current: CurrentUser, friend: str) -> dict[str, Any]:
        """End a friendship on both sides; of somebody who is no friend, nothing happens.

        Raises:
            Problem: 400, malformed id.
        """
        own_id, friend_id = document_id(current.id), _object_id(friend, "friendId")
        for _ in range(ATTEMPTS):
            there = await self._requests.of_pair(own_id, friend_id)
            people = {user.id: user for user in await self._users.find_many_by_id([own_id, friend_id])}
            # A row that says so counts, too: what it owes both users may not have reached them yet.
            are_friends = (
                any(row.get("status") == "accepted" for row in there)
                or friend_id in _friends(people.get(own_id))
                or own_id in _friends(people.get(friend_id))
            )
            if not are_friends or await self._settle(own_id, friend_id, there, "rejected"):
                return {"message": "Friend removed successfully"}
        raise _contended()

    async def _settle(self, own: Any, friend: Any, there: list[Record], status: str) -> bool:
        """Decide by the row of a pair what the two are from now on; False where somebody else was faster."""
        moment = now()
        # The row that last made them friends decides, so that this comes behind it.
        row = next((row for row in there if row.get("status") == "accepted"), next(iter(there), None))
        change = "add" if status == "accepted" else "remove"
        try:
            async with self._requests.operation(f"Friend {change.title()}") as operation:
                self._requests.decide(operation, row, own, friend, status)
                for user, other in {own: friend, friend: own}.items():
                    operation.also("users", user, {"updatedAt": moment}, **{change: {"friends": [other]}})
                for other_row in there:
                    if row is not None and other_row.id != row.id:
                        operation.also(
                            "friend_requests", other_row.id, {"status": status, "updatedAt": moment}
                        )
        except _OVERTAKEN:
            return False
        return True

    # -- all of them -------------------------------------------------------------------------------

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

    async def _user(self, id_: Any) -> Record:
        record = await self._users.find_by_id(id_)
        if record is None:
            raise Problem(404, "not-found", "User not found")
        return record

    async def _people(self, ids: Iterable[Any]) -> dict[Any, dict[str, Any]]:
        """Those of these users that are there, as others see them, by id."""
        return {user.id: person_of(user) for user in await self._users.find_many_by_id(ids)}


def _listed(requests: list[Record], side: str, people: dict[Any, dict[str, Any]]) -> list[dict[str, Any]]:
    """Requests with whom they come from, or go to; those of people who are gone are left out."""
    shown = []
    for request in requests:
        person = people.get(request.get(side))
        if person is not None:
            one = {"id": str(plain(request.id)), side: person, "status": plain(request.get("status"))}
            created = request.get("createdAt")
            shown.append(one if created is None else one | {"createdAt": plain(created)})
    return shown


def _each(requests: list[Record], side: str) -> list[Any]:
    return [request.get(side) for request in requests if isinstance(request.get(side), ObjectId | str)]


def _friends(user: Record | None) -> list[Any]:
    """The ids in a user's list, none twice, nor the user's own: old data holds all of that."""
    friends = None if user is None else user.get("friends")
    ids = [id_ for id_ in friends if isinstance(id_, ObjectId | str)] if isinstance(friends, list) else []
    return [id_ for id_ in dict.fromkeys(ids) if user is None or id_ != user.id]


def _object_id(text: str, name: str) -> ObjectId:
    if not ObjectId.is_valid(text):
        raise invalid(f"{name} is not a valid id")
    return ObjectId(text)


def _refuse_if_open(there: list[Record], sender: Any) -> None:
    for row in there:
        if row.get("status") == "pending":
            own = row.get("sender") == sender
            raise invalid(
                "Friend request already sent" if own else "This user has already sent you a friend request"
            )


def _processed() -> Problem:
    return Problem(400, "processed", "This friend request has already been processed")


def _contended() -> Problem:
    return unavailable("Somebody else is changing this friendship, please try again", "busy")
