"""How a friend request of the old back end is laid out in PostgreSQL."""

from __future__ import annotations

from crossfade.entity import Entity, column
from scorekeeper.friends.tables import STATUSES
from scorekeeper.friends.tables import friend_requests as table

friend_requests = Entity(
    "friend_requests",
    collection="friendrequests",
    table=table,
    columns=[
        column("sender"),
        column("receiver"),
        column("status", fits=STATUSES.__contains__),
        column("createdAt", to="created_at"),
        column("updatedAt", to="updated_at"),
        column("__v", to="version"),
    ],
    mapping_version=1,
)
