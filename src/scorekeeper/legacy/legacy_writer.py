"""The old back end during the move: it goes on writing to MongoDB, and knows nothing of any migration."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

from bson import ObjectId
from pymongo.database import Database

from scorekeeper.legacy.population import whole_ms

Role = Literal["user", "admin", "guest"]


def _now() -> datetime:
    return whole_ms(datetime.now(UTC))


class LegacyApplication:
    """Writes users as the Node/Mongoose application does.

    Each change names the fields it changes and sets `updatedAt`; pushing to an array also increments `__v`. Fields that
    the schema does not name, such as a migration's own, are never read, written or removed, save by a delete.

    Errors are PyMongo's own: a name that is taken (in exactly this case) is a `DuplicateKeyError`, or the
    `OperationFailure` that a compatible service makes of it in an update.
    """

    def __init__(self, database: Database[Any], *, now: Callable[[], datetime] = _now) -> None:
        """Write to `database.users`. `now` gives the dates, timezone-aware; whole milliseconds are kept."""
        self._users = database["users"]
        self._now = now

    def register(self, name: str, password_hash: str | None) -> ObjectId:
        """Make a user with every default of the schema, and return the new id. A hash of None makes a guest."""
        now = self._now()
        user_id = ObjectId()
        self._users.insert_one(
            {
                "_id": user_id,
                "username": name,
                "passwordHash": password_hash,
                "role": "guest" if password_hash is None else "user",
                "guestMetadata": {"createdByUserId": None, "originalGuestId": None},
                "lastLogin": None,
                "profilePicture": None,
                "friends": [],
                "createdAt": now,
                "updatedAt": now,
                "__v": 0,
            }
        )
        return user_id

    def rename(self, user_id: ObjectId, name: str) -> bool:
        """Change the username; whether there is such a user."""
        return self._set(user_id, {"username": name})

    def touch_last_login(self, user_id: ObjectId) -> bool:
        """Stamp a login; whether there is such a user."""
        return self._set(user_id, {"lastLogin": self._now()})

    def change_role(self, user_id: ObjectId, role: Role) -> bool:
        """Change the role; whether there is such a user."""
        return self._set(user_id, {"role": role})

    def add_friend(self, first: ObjectId, second: ObjectId) -> bool:
        """Make two users friends: two saves, one after the other, as the old code has it; a crash leaves one side.

        Returns whether anything changed; a friend who stands in the list already is not pushed again.
        """
        return self._push_friend(first, second) | self._push_friend(second, first)

    def delete(self, user_id: ObjectId) -> bool:
        """Remove the document; what refers to it is left as it is. Whether there was one."""
        return self._users.delete_one({"_id": user_id}).deleted_count == 1

    def _set(self, user_id: ObjectId, fields: dict[str, Any]) -> bool:
        change = {"$set": {**fields, "updatedAt": self._now()}}
        return self._users.update_one({"_id": user_id}, change).matched_count == 1

    def _push_friend(self, owner: ObjectId, friend: ObjectId) -> bool:
        # Mongoose loads, looks with includes(), pushes and saves: two requests, and a push carries no version check.
        user = self._users.find_one({"_id": owner}, projection={"friends": 1})
        if user is None or friend in user.get("friends", ()):
            return False
        change = {
            "$push": {"friends": {"$each": [friend]}},
            "$set": {"updatedAt": self._now()},
            "$inc": {"__v": 1},
        }
        return self._users.update_one({"_id": owner}, change).matched_count == 1
