"""What scorekeeper asks Crossfade to move: the accounts, that is users, and the friend requests, identities and games
that name them, and the audit events about them."""

from __future__ import annotations

from crossfade.entity import Entity
from scorekeeper.audit.entity import audit_events
from scorekeeper.friends.entity import friend_requests
from scorekeeper.games.entity import games, table_games, wizard_games
from scorekeeper.identities.entity import identities
from scorekeeper.users.entity import users

#: Name of the migration, in the control record and on the command line.
name = "accounts"


def accounts() -> list[Entity]:
    """The entities of the migration ``accounts``; they reference each other and so move together."""
    return [users, friend_requests, identities, games, wizard_games, table_games, audit_events]
