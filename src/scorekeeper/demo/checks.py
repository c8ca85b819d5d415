"""The demo's own look into both stores at the end, without Crossfade: is everything there that was acknowledged?"""

from __future__ import annotations

from typing import Any

import psycopg
import pymongo
from bson import ObjectId

from scorekeeper.demo.stage import Stage
from scorekeeper.demo.traffic import OldApplication, Traffic


def lost(stage: Stage, traffic: Traffic, old: OldApplication) -> list[str]:
    """What was acknowledged and is not in both stores, one line each; empty is what the demo promises."""
    with (
        pymongo.MongoClient[dict[str, Any]](stage.mongo_uri) as client,
        psycopg.connect(stage.database_url) as postgres,
    ):
        documents = client.get_default_database()["users"]
        rows = {
            row[0]: {"username": row[1], "role": row[2]}
            for row in postgres.execute("SELECT id, username, role FROM users")
        }
        found: list[str] = []
        for account in traffic.accounts:
            document = documents.find_one({"_id": ObjectId(account.id)}, {"username": 1})
            if document is None or document["username"] != account.name:
                found.append(f"registration of {account.name} is not in MongoDB")
            if rows.get(account.id, {}).get("username") != account.name:
                found.append(f"registration of {account.name} is not in PostgreSQL")
        for user_id, fields in old.written.items():
            for field, value in fields.items():
                if rows.get(str(user_id), {}).get(field) != value:
                    found.append(f"the old application's {field} of {user_id} is not in PostgreSQL")
        twice = postgres.execute(
            "SELECT username_norm FROM users GROUP BY username_norm HAVING count(*) > 1"
        ).fetchall()
        found += [f"two rows share the name {name}" for (name,) in twice]
        return found


def first_foreign_lag(stage: Stage, user_id: ObjectId, name: str, seconds: float = 30.0) -> float | None:
    """Rename as the old application would; seconds until PostgreSQL shows it, None: it never did."""
    import time

    from scorekeeper.legacy import LegacyApplication

    with (
        pymongo.MongoClient[dict[str, Any]](stage.mongo_uri) as client,
        psycopg.connect(stage.database_url, autocommit=True) as postgres,
    ):
        LegacyApplication(client.get_default_database()).rename(user_id, name)
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            row = postgres.execute("SELECT username FROM users WHERE id = %s", [str(user_id)]).fetchone()
            if row is not None and row[0] == name:
                return time.monotonic() - began
            time.sleep(0.05)
    return None
