"""How a user document of the old back end is laid out in PostgreSQL."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

from crossfade.entity import Entity, column, list_child, normalised, single_child
from scorekeeper.names import normal_form, without_nul
from scorekeeper.users.tables import ROLES, user_friends, user_pictures
from scorekeeper.users.tables import users as users_table

#: The rule "one name, whatever its letter case"; errors and ``_cf.keys`` name it.
USERNAME_RULE = "username"

_DATA_URL = re.compile(r"data:(image/[a-z0-9.+-]{1,64});base64,([A-Za-z0-9+/]*={0,2})", re.ASCII)


def picture_to_columns(value: Any) -> Mapping[str, Any] | None:
    """A data URL as content type and bytes; None for any other text, which stays whole in ``extra``."""
    match = _DATA_URL.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    try:
        return {"content_type": match[1], "data": base64.b64decode(match[2], validate=True)}
    except binascii.Error:
        return None


def picture_from_columns(columns: Mapping[str, Any]) -> str:
    """The data URL that `picture_to_columns` took apart, to the letter."""
    return f"data:{columns['content_type']};base64,{base64.b64encode(columns['data']).decode('ascii')}"


def _some_role(_value: object) -> str:
    # What SQL sees of a role that is none of the three; the document keeps the true value.
    return "user"


users = Entity(
    "users",
    collection="users",
    table=users_table,
    columns=[
        column("username", stand_in=without_nul),
        column("passwordHash", to="password_hash", stand_in=without_nul),
        column("role", missing="user", stand_in=_some_role, fits=ROLES.__contains__),
        column("guestMetadata", to="guest_metadata"),
        column("lastLogin", to="last_login"),
        column("createdAt", to="created_at"),
        column("updatedAt", to="updated_at"),
        column("__v", to="version"),
    ],
    children=[
        single_child(
            "profilePicture",
            table=user_pictures,
            owner="user_id",
            split=(picture_to_columns, picture_from_columns),
            columns=("content_type", "data"),
            part=True,
        ),
        list_child("friends", table=user_friends, owner="user_id", position="position", value="friend_id"),
    ],
    unique=[normalised("username", to="username_norm", rule=USERNAME_RULE, normalise=normal_form)],
    order=[
        "username",
        "passwordHash",
        "role",
        "guestMetadata",
        "lastLogin",
        "profilePicture",
        "friends",
        "createdAt",
        "updatedAt",
        "__v",
    ],
    mapping_version=2,
)
