"""The demo's own look into both stores at the end, by plain drivers and not through Crossfade.

Is everything there that was acknowledged, with one id and one name, in both stores? And is whatever else stands in
one store in the other one, too?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import psycopg
import pymongo
from bson import BSON, ObjectId
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument
from pymongo.collection import Collection

from scorekeeper.demo.old_application import COLUMNS, OldApplication
from scorekeeper.demo.traffic import Traffic

_READABLE: CodecOptions[dict[str, Any]] = CodecOptions(
    tz_aware=True, tzinfo=UTC, datetime_conversion=DatetimeConversion.DATETIME_AUTO
)
#: Lines of evidence that are kept; the counts are whole.
_MOST_LINES = 50


@dataclass
class Findings:
    """What the look found.

    Attributes:
        checked: how many of each thing were looked for.
        lost: how many are not where they must be.
        lines: the first of them, one line each.
    """

    checked: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        """Something is not where it must be."""
        self.lost += 1
        if len(self.lines) < _MOST_LINES:
            self.lines.append(line)


@dataclass(frozen=True)
class _Stores:
    documents: Mapping[str, Mapping[str, Any]]
    unreadable: int
    rows: Mapping[str, Mapping[str, Any]]
    quarantined: frozenset[str]


def look_at_both(mongo_uri: str, database_url: str, traffic: Traffic, old: OldApplication) -> Findings:
    """Compare what was acknowledged with what both stores hold. With all writers stopped.

    Raises:
        psycopg.Error, pymongo.errors.PyMongoError: a store cannot be read.
    """
    with (
        pymongo.MongoClient[dict[str, Any]](mongo_uri) as client,
        psycopg.connect(database_url) as postgres,
    ):
        documents, unreadable = _documents(client)
        rows = {
            row[0]: {"username": row[1], "role": row[2], "lastLogin": row[3], "passwordHash": row[4]}
            for row in postgres.execute("SELECT id, username, role, last_login, password_hash FROM users")
        }
        in_quarantine = postgres.execute("SELECT id FROM crossfade.quarantine WHERE entity = 'users'")
        stores = _Stores(documents, unreadable, rows, frozenset(row[0] for row in in_quarantine))
        twice = postgres.execute(
            "SELECT username_norm FROM users GROUP BY username_norm HAVING count(*) > 1"
        ).fetchall()
    found = Findings()
    _registrations(found, traffic, stores)
    _foreign_writes(found, old, stores)
    _all_users(found, stores)
    for (name,) in twice:
        found.add(f"two rows share the name {name!r}")
    return found


def _documents(client: pymongo.MongoClient[dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], int]:
    """Users with an ObjectId by its text; and how many others there are, or cannot be decoded."""
    plain = client.get_default_database()["users"]
    collection: Collection[RawBSONDocument] = plain.with_options(CodecOptions(document_class=RawBSONDocument))
    wanted = dict.fromkeys((*COLUMNS, "passwordHash", "_cf.deleted"), 1)
    found: dict[str, dict[str, Any]] = {}
    others = 0
    for raw in collection.find({}, wanted):
        try:
            document = BSON(raw.raw).decode(_READABLE)
        except (BSONError, UnicodeDecodeError):
            others += 1
            continue
        if not isinstance(document["_id"], ObjectId):
            others += 1
        elif not document.get("_cf", {}).get("deleted"):
            found[str(document["_id"])] = document
    return found, others


def _registrations(found: Findings, traffic: Traffic, stores: _Stores) -> None:
    found.checked["acknowledged registrations"] = len(traffic.accounts)
    ids = [account.id for account in traffic.accounts]
    if len(set(ids)) != len(ids):
        found.add("two registrations were given one id")
    for account in traffic.accounts:
        for store, held in (("MongoDB", stores.documents), ("PostgreSQL", stores.rows)):
            there = held.get(account.id)
            if there is None or there.get("username") != account.name:
                found.add(f"the registration of {account.name} ({account.id}) is not in {store}")


def _foreign_writes(found: Findings, old: OldApplication, stores: _Stores) -> None:
    found.checked["acknowledged writes of the old application"] = old.writes
    for user_id, fields in old.written.items():
        for name, value in fields.items():
            for store, held in (("MongoDB", stores.documents), ("PostgreSQL", stores.rows)):
                if held.get(str(user_id), {}).get(name) != value:
                    found.add(f"the old application's {name} of {user_id} is not in {store}")


def _all_users(found: Findings, stores: _Stores) -> None:
    """Every document is in PostgreSQL or in quarantine, every row has its document, and they say the same."""
    found.checked["users compared one by one"] = len(stores.documents)
    rows = {id_ for id_ in stores.rows if len(id_) == 24 and ":" not in id_}
    for id_, document in stores.documents.items():
        row = stores.rows.get(id_)
        if row is None:
            if id_ not in stores.quarantined:
                found.add(f"user {id_} is in MongoDB alone")
            continue
        for name in _differing(document, row):
            found.add(f"{name} of user {id_} differs")
    for id_ in rows - stores.documents.keys():
        found.add(f"user {id_} is in PostgreSQL alone")
    others = len(stores.rows) - len(rows)
    if others > stores.unreadable:
        found.add(f"{others} rows with ids that are no ObjectIds, {stores.unreadable} such documents")


def _differing(document: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[str]:
    """Fields whose column says something else; of values that a column can hold as they are."""
    for name in ("username", "passwordHash"):
        value = document.get(name)
        if isinstance(value, str) and row[name] != value.replace("\0", "\u2400"):
            yield name
    if row["role"] != document.get("role", "user"):
        yield "role"
    stamp = document.get("lastLogin")
    if isinstance(stamp, datetime) and row["lastLogin"] != stamp:
        yield "lastLogin"
