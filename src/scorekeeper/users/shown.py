"""What of a user goes over the wire, in one shape whichever document or store it came from (pure)."""

from __future__ import annotations

from typing import Any

from crossfade import Record
from scorekeeper.auth.current import normalised
from scorekeeper.wire import plain


def picture_of(record: Record) -> str | None:
    """The data URL; None where there is none, or something else than a text."""
    picture = record.get("profilePicture")
    return picture if isinstance(picture, str) else None


def named(record: Record) -> dict[str, Any]:
    """A user without the picture; ``createdAt`` is absent where the document has none."""
    user: dict[str, Any] = normalised(record)
    created = record.get("createdAt")
    if created is not None:
        user["createdAt"] = str(plain(created))
    return user


def user_of(record: Record) -> dict[str, Any]:
    """A user as their client knows them."""
    return {**named(record), "profilePicture": picture_of(record)}


def person_of(record: Record) -> dict[str, Any]:
    """The same without the role: what others see."""
    user = user_of(record)
    del user["role"]
    return user


def account_of(record: Record) -> dict[str, Any]:
    """A user as an administrator's change of it is answered, ``_id`` and all."""
    user = named(record)
    user["_id"] = user.pop("id")
    return user


def listed_for_admin(record: Record) -> dict[str, Any]:
    """A user in the administrators' list; what a document lacks is null."""
    user = user_of(record)
    email = record.get("email")
    return {
        "id": user["id"],
        "_id": user["id"],
        "username": user["username"],
        "email": email if isinstance(email, str) else None,
        "role": user["role"],
        "createdAt": user.get("createdAt"),
        "lastLogin": None if record.get("lastLogin") is None else str(plain(record.get("lastLogin"))),
        "profilePicture": user["profilePicture"],
    }
