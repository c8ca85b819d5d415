"""Users as Mongoose wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from random import Random
from typing import Any

from bson import Binary, ObjectId, encode

from scorekeeper.legacy.dirt import Document, Labelled, Pen, documents, finish, pen_for, stain
from scorekeeper.legacy.passwords import FOREIGN_PASSWORDS, PASSWORDS
from scorekeeper.legacy.pictures import avatars, largest_picture, photographs
from scorekeeper.legacy.population import AS_OF, Population, whole_ms
from scorekeeper.legacy.rates import DEFAULT_RATES, DirtRates

#: What a near-limit document leaves of MongoDB's 16 MiB, in bytes: room for a writer's own bookkeeping.
_ROOM_LEFT = 32 * 1024
_LIMIT = 16 * 1024 * 1024

_HASHES = tuple(PASSWORDS.values())
_FOREIGN_HASHES = tuple(FOREIGN_PASSWORDS.values())

# The oldest users were made before these fields were: a later login or upload appended them behind `__v`.
_BEFORE_LATER_FIELDS = 0.08


def users(seed: int, n: int, rates: DirtRates = DEFAULT_RATES) -> Iterator[Document]:
    """The `n` documents of collection `users`, oldest first, without any server.

    The same arguments give the same documents, field order included. Memory does not grow with `n`.
    Dates are timezone-aware, UTC, in whole milliseconds, or `DatetimeMS` where Python has no such date. A document with
    a lone surrogate is a `RawBSONDocument`.
    """
    return documents(labelled_users(Population(seed, n, rates)))


def labelled_users(population: Population) -> Iterator[Labelled]:
    """Every user of the population with the kinds of dirt in it."""
    return (_labelled_user(population, index) for index in range(population.users))


def password_of(document: Document) -> str | None:
    """The password of a generated user, or None for one that has none."""
    known = {hashed: password for password, hashed in (*PASSWORDS.items(), *FOREIGN_PASSWORDS.items())}
    return known.get(document.get("passwordHash") or "")


def _labelled_user(population: Population, index: int) -> Labelled:
    document = _clean_user(population, index)
    pen = pen_for(population, "users", index)
    username, kind = population.username(index)
    document["username"] = username
    if kind is not None:
        pen.note(kind)
    document["_id"] = population.user_id(index)
    if population.has_string_id(index):
        pen.note("string_id")
    if pen.strikes("missing_later_fields"):
        for name in ("lastLogin", "profilePicture", "friends", "guestMetadata"):
            document.pop(name, None)
    else:
        _stain_friends(population, index, document, pen)
    _stain_fields(document, pen)
    stain(
        document,
        pen,
        dates=[(document, "lastLogin")],
        free=lambda: document.setdefault("preferences", {}),
        shape=_another_shape,
    )
    if population.is_near_limit(index):
        _fill_up(document)
        pen.note("near_limit_documents")
    return finish(document, pen)


def _clean_user(population: Population, index: int) -> dict[str, Any]:
    random = population.random("user", index)
    created = population.created_at(index)
    role = population.role(index)
    is_guest = role == "guest"
    last_login = None if is_guest else _last_login(random, created)
    friends = [population.user_oid(friend) for friend in population.friends(index)[0]]
    later_fields: dict[str, Any] = {
        "lastLogin": last_login,
        "profilePicture": None if is_guest else _picture(random),
        "friends": friends,
    }
    head = {
        "_id": population.user_oid(index),
        "username": population.base_name(index),
        "passwordHash": None if is_guest else random.choice(_HASHES),
        "role": role,
    }
    if is_guest:
        head["guestMetadata"] = {
            "createdByUserId": population.user_oid(random.randrange(index)) if index else None,
            "originalGuestId": f"guest_{int(created.timestamp() * 1000)}" if random.random() < 0.7 else None,
        }
    else:
        head["guestMetadata"] = {"createdByUserId": None, "originalGuestId": None}
    tail = {
        "createdAt": created,
        "updatedAt": max(created, last_login or created),
        "__v": len(friends),
    }
    if index < population.users * _BEFORE_LATER_FIELDS:
        del head["guestMetadata"]
        return head | tail | later_fields
    return head | later_fields | tail


def _last_login(random: Random, created: datetime) -> datetime | None:
    if random.random() < 0.06:
        return None
    # Half of all were here within the last weeks, the rest ever longer ago, down to the day they came.
    back = timedelta(days=random.expovariate(1 / 20) if random.random() < 0.5 else random.uniform(0, 1400))
    return whole_ms(max(created, AS_OF - back))


def _picture(random: Random) -> str | None:
    draw = random.random()
    if draw < 0.0005:
        return random.choice(photographs())
    return random.choice(avatars()) if draw < 0.12 else None


def _stain_friends(population: Population, index: int, document: dict[str, Any], pen: Pen) -> None:
    friends: list[ObjectId] = document["friends"]
    random = pen.random
    if population.friends(index)[1]:
        pen.note("one_sided_friend")
    if pen.strikes("dangling_reference"):
        friends.insert(random.randint(0, len(friends)), population.gone(random))
    if pen.strikes("duplicate_friend"):
        friends.append(random.choice(friends) if friends else population.user_oid(0))
        if friends.count(friends[-1]) == 1:
            friends.append(friends[-1])
    if pen.strikes("self_friend"):
        friends.insert(random.randint(0, len(friends)), population.user_oid(index))


def _stain_fields(document: dict[str, Any], pen: Pen) -> None:
    random = pen.random
    if random.random() < pen.rates.missing_role and document["role"] == "user":
        del document["role"]
        pen.note("missing_role")
    if random.random() < pen.rates.foreign_hash and document["passwordHash"] is not None:
        document["passwordHash"] = random.choice(_FOREIGN_HASHES)
        pen.note("foreign_hash")


def _another_shape(document: dict[str, Any], random: Random) -> None:
    """Let a field of the schema have the shape that another version of the application gave it."""
    if random.random() < 0.5:
        document["guestMetadata"] = json.dumps({"createdByUserId": None})
    else:
        document["profilePicture"] = {"url": avatars()[0], "width": 48, "height": 48}


def _fill_up(document: dict[str, Any]) -> None:
    document["profilePicture"] = largest_picture()
    document["importBackup"] = Binary(b"")
    document["importBackup"] = Binary(Random(1).randbytes(_LIMIT - _ROOM_LEFT - len(encode(document))))
