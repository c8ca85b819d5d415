"""What is watched while the demo runs, by plain drivers: the debt in MongoDB, a backfill's progress, read sources."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx
import psycopg
from bson import encode
from pymongo.database import Database
from pymongo.errors import PyMongoError

#: Where the entities of the migration live.
COLLECTIONS = ("users", "playeridentities", "friendrequests", "games", "wizard", "tablegames")
#: And the tables that they move to.
TABLES = ("users", "player_identities", "friend_requests", "games", "wizard_games", "table_games")
_READS = re.compile(r"crossfade_reads_total\{(?P<labels>[^}]*)\} (?P<number>\S+)")


@dataclass
class Debts:
    """Records that PostgreSQL has not confirmed, as their notes in MongoDB say; parked ones left out.

    Attributes:
        depth: at the latest look.
        deepest: at any look since `mark`.
        settled_at: by note (id and operation), when it was last seen, by `time.monotonic`.
    """

    database: Database[Any]
    depth: int = 0
    deepest: int = 0
    last_seen: dict[bytes, float] = field(default_factory=dict)
    _owed: frozenset[bytes] = frozenset()

    async def run(self) -> None:
        """Look four times a second, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(0.25)

    async def look(self) -> None:
        """Look once; a store that does not answer changes nothing."""
        try:
            owed = await asyncio.to_thread(self._read)
        except PyMongoError:
            return
        now = time.monotonic()
        self._owed = owed
        self.depth = len(owed)
        self.deepest = max(self.deepest, self.depth)
        self.last_seen |= dict.fromkeys(owed, now)

    def mark(self) -> None:
        """Begin to count anew."""
        self.deepest = self.depth
        self.last_seen = {}

    def any_left_of(self, notes: Iterable[bytes]) -> bool:
        """Whether any of these is still owed."""
        return not self._owed.isdisjoint(notes)

    def _read(self) -> frozenset[bytes]:
        query = {"_cf.debt": {"$exists": True}, "_cf.debt.parked": {"$exists": False}}
        found = set()
        for name in COLLECTIONS:
            for note in self.database[name].find(query, {"_cf.op": 1}):
                found.add(encode({"id": note["_id"], "op": note["_cf"].get("op")}))
        return frozenset(found)


async def read_sources(addresses: Iterable[str]) -> Counter[tuple[str, str]]:
    """Reads by (store that served them, why it was that one), of all workers, since they began."""
    found: Counter[tuple[str, str]] = Counter()
    async with httpx.AsyncClient(timeout=5.0, trust_env=False) as http:
        for address in addresses:
            for match in _READS.finditer((await http.get(f"{address}/metrics")).text):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', match["labels"]))
                found[labels["source"], labels["reason"]] += int(float(match["number"]))
    return found


async def run_progress(connection: psycopg.AsyncConnection[Any], kind: str) -> int:
    """Documents that the unfinished runs of this kind have read, and the finished ones of this migration."""
    cursor = await connection.execute(
        "SELECT coalesce(sum((counts->>'read')::bigint), 0) FROM crossfade.runs WHERE kind = %s", [kind]
    )
    row = await cursor.fetchone()
    return 0 if row is None else int(row[0])


async def shadow_progress(connection: psycopg.AsyncConnection[Any]) -> tuple[int, int]:
    """Reads compared since the phase was entered, and records of which the two stores gave different answers."""
    cursor = await connection.execute(
        "SELECT coalesce(sum(equal + mismatch), 0), "
        "(SELECT count(*) FROM crossfade.mismatches WHERE resolved_at IS NULL) FROM crossfade.shadow"
    )
    row = await cursor.fetchone()
    return (0, 0) if row is None else (int(row[0]), int(row[1]))


def quarantined_by_reason(database_url: str) -> dict[str, int]:
    """Records in quarantine, by reason; names of fields are left out, so that equal reasons add up."""
    found: Counter[str] = Counter()
    with psycopg.connect(database_url) as connection:
        for entity, reason in connection.execute("SELECT entity, reason FROM crossfade.quarantine"):
            # The name of the field is the document's own; the reason is what is around it.
            found[f"{entity}: {re.sub(chr(39) + '[^' + chr(39) + ']*' + chr(39), '…', reason)}"] += 1
    return dict(found.most_common())


def rows_by_table(database_url: str) -> dict[str, int]:
    """Rows of the entities' tables."""
    found = {}
    with psycopg.connect(database_url) as connection:
        for table in TABLES:
            row = connection.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608 - names of our own
            found[table] = 0 if row is None else int(row[0])
    return found
