"""The database of a legacy deployment, generated: what the service must be able to take over, as it is found.

Deterministic by seed, written with plain PyMongo as Mongoose would, with every kind of dirt that real migrations met,
each at a stated rate. Knows nothing of any migration.
"""

from scorekeeper.legacy.dirt import RAW_OPTIONS, Document, Labelled
from scorekeeper.legacy.friendrequest import friend_requests
from scorekeeper.legacy.game import games, table_games, wizard_games
from scorekeeper.legacy.generation import (
    LegacySummary,
    Login,
    Refusal,
    TargetNotEmpty,
    drop_collections,
    generate,
)
from scorekeeper.legacy.identity import player_identities
from scorekeeper.legacy.legacy_writer import LegacyApplication
from scorekeeper.legacy.passwords import FOREIGN_PASSWORDS, PASSWORDS
from scorekeeper.legacy.rates import DirtRates
from scorekeeper.legacy.user import users

__all__ = [
    "FOREIGN_PASSWORDS",
    "PASSWORDS",
    "RAW_OPTIONS",
    "DirtRates",
    "Document",
    "Labelled",
    "LegacyApplication",
    "LegacySummary",
    "Login",
    "Refusal",
    "TargetNotEmpty",
    "drop_collections",
    "friend_requests",
    "games",
    "generate",
    "player_identities",
    "table_games",
    "users",
    "wizard_games",
]
