"""What of an identity goes over the wire, in one shape whichever document or store it came from (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from crossfade import Record
from scorekeeper.identities.merges import RESTORES
from scorekeeper.identities.repository import Found
from scorekeeper.wire import plain

#: What Mongoose shows where an old document has no such field.
_DEFAULTS: Final[Mapping[str, Any]] = {
    "userId": None,
    "type": "guest",
    "nameHistory": [],
    "aliases": [],
    "stats": {"totalGames": 0, "totalWins": 0, "lastGameAt": None},
    "eloByGameType": {},
    "linkedIdentities": [],
    "mergedInto": None,
    "isDeleted": False,
    "deletedAt": None,
}


def document_of(identity: Record) -> dict[str, Any]:
    """The whole document, with the defaults of what it lacks."""
    shown: dict[str, Any] = plain({**_DEFAULTS, **identity.document})
    shown["_id"] = id_of(identity)
    shown["linkedIdentities"] = links_of(identity)
    return shown


def links_of(identity: Record) -> Any:
    """What was merged in, without what only undoing needs."""
    links = plain(identity.get("linkedIdentities", []))
    if not isinstance(links, list):
        return links
    return [
        {name: value for name, value in link.items() if name != RESTORES} if isinstance(link, dict) else link
        for link in links
    ]


def id_of(identity: Record) -> str:
    """The id as text, whatever made it."""
    return str(plain(identity.id))


def name_of(identity: Record) -> str:
    """The display name, as text."""
    name = identity.get("displayName")
    return name if isinstance(name, str) else ""


def whole_number(value: Any) -> int:
    """A number of games that is stored in whatever width; 0 for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if is_number and abs(value) <= 2**53 else 0


def stats_of(identity: Record) -> dict[str, Any]:
    """Games, wins and the last game of one identity, as stored."""
    stored = identity.get("stats")
    stats = stored if isinstance(stored, Mapping) else {}
    return {
        "totalGames": whole_number(stats.get("totalGames")),
        "totalWins": whole_number(stats.get("totalWins")),
        "lastGameAt": plain(stats.get("lastGameAt")),
    }


def pages_of(found: Found) -> dict[str, int]:
    """The ``pagination`` of a list."""
    pages = -(-found.total // found.page.size)
    return {
        "page": found.page.number,
        "limit": found.page.size,
        "total": found.total,
        "pages": pages,
    }
