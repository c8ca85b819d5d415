"""Backfill into empty tables against what else moves a collection: the old script's algorithm, and dlt.

    python -m bench.peers [--users 200000] [--sample 6000]

The old script read page after page with skip and limit, looked each row up and inserted it through an ORM, and
committed user by user. A page costs more the further it is skipped to, so pages are measured at places all over the
collection and the rest is taken to lie on the lines between them. Shown as well: the rows of a user's friends left to
the ORM, which sends them together. dlt loads a sample with a PyMongo source, friends as a child table; its rate does
not depend on the number. Ends with a JSON line per figure.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import orjson
import pymongo
from bson import ObjectId
from pymongo.collection import Collection
from sqlalchemy import Table, create_engine, orm

from bench import Figure, report, with_database
from bench.backfill import NAME, backfill, empty, fill_mongo, make_database
from scorekeeper.users.entity import users

GOAL_OLD, GOAL_DLT = 75.0, 5.0
#: Documents in a page of the old script, and places at which pages are measured.
PAGE, PLACES = 100, 6
#: Columns that an ORM wants decoded.
JSON = ("extra", "cf_shape", "guest_metadata")


class OldScript:
    """What the old script did with a page; ``each``: every row by itself."""

    def __init__(self, collection: Collection[dict[str, Any]], session: orm.Session, *, each: bool) -> None:
        self._collection, self._session, self._each = collection, session, each
        self._registry = orm.registry()
        self._kinds: dict[str, type] = {}
        for table in (users.table, *(child.table for child in users.children)):
            self._kinds[table.name] = type(table.name, (), {})
            self._registry.map_imperatively(self._kinds[table.name], table)

    def close(self) -> None:
        self._registry.dispose()

    def move(self, start: int) -> float:
        """Seconds that the page from this place on took."""
        session, began = self._session, time.perf_counter()
        for document in self._collection.find().sort("_id", 1).skip(start).limit(PAGE):
            rows = users.to_rows(document, None)
            made = dict(zip(users.parent_columns, rows.parent, strict=True))
            self._add(users.table, {**made, "cf_rev": 0, "cf_digest": b"", "cf_mapping": 1}, each=True)
            for child, its in zip(users.children, rows.children, strict=True):
                for row in its:
                    self._add(child.table, dict(zip(child.columns, row, strict=True)), each=self._each)
            session.commit()
        return time.perf_counter() - began

    def _add(self, table: Table, values: dict[str, Any], *, each: bool) -> None:
        kind = self._kinds[table.name]
        key = tuple(values[column.name] for column in table.primary_key.columns)
        if each and self._session.get(kind, key) is not None:
            return
        made = kind()
        for name, value in values.items():
            is_json = name in JSON and isinstance(value, bytes)
            setattr(made, name, orjson.loads(value) if is_json else value)
        self._session.add(made)
        if each:
            self._session.flush()


def old_script(mongo_uri: str, url: str, count: int, *, each: bool) -> float:
    """Users a second of the old script over a collection of so many."""
    empty(url)
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    places = [(count - PAGE) * n // (PLACES - 1) for n in range(PLACES)]
    with pymongo.MongoClient[dict[str, Any]](mongo_uri) as client, orm.Session(engine) as session:
        script = OldScript(client.get_default_database()["users"], session, each=each)
        seconds = [script.move(place) for place in places]
        script.close()
    took = ", ".join(f"{one:.2f} s" for one in seconds)
    print(f"the old script: pages from user 0 to user {places[-1]:,} take {took}", flush=True)
    engine.dispose()
    pages = [(one + other) / 2 for one, other in itertools.pairwise(seconds)]
    return PAGE / (sum(pages) / len(pages))


def dlt_load(mongo_uri: str, url: str, count: int) -> float:
    """Users a second of dlt with a PyMongo source, default settings."""
    with tempfile.TemporaryDirectory(prefix="crossfade-dlt-") as folder:
        os.environ.update(DLT_DATA_DIR=folder, RUNTIME__DLTHUB_TELEMETRY="false", RUNTIME__LOG_LEVEL="ERROR")
        import dlt

        @dlt.resource(name="users", primary_key="_id", write_disposition="append")
        def documents() -> Iterator[list[dict[str, Any]]]:
            with pymongo.MongoClient[dict[str, Any]](mongo_uri, tz_aware=True) as client:
                found = client.get_default_database()["users"].find().sort("_id", 1).limit(count)
                while page := list(itertools.islice(found, 5_000)):
                    yield [_plain(document) for document in page]

        pipeline = dlt.pipeline(
            "crossfade_bench", pipelines_dir=folder, destination=dlt.destinations.postgres(url), dataset_name="by_dlt"
        )  # fmt: skip
        began = time.perf_counter()
        pipeline.run(documents()).raise_on_failed_jobs()
        seconds = time.perf_counter() - began
    return count / seconds


def _plain(value: Any) -> Any:
    """ObjectIds as text: dlt has no type for them."""
    if isinstance(value, ObjectId):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def run(mongo_uri: str, database_url: str, count: int, sample: int) -> bool:
    uri = with_database(mongo_uri, f"{NAME}_peers")
    print(f"making {count:,} users ...", flush=True)
    fill_mongo(uri, count)
    url = make_database(database_url)
    rate = count / backfill(uri, url, count, workers=2, loading=True)[0]
    print(f"backfill into empty tables, two processes: {rate:,.0f} users/s", flush=True)
    old = old_script(uri, url, count, each=True)
    kinder = old_script(uri, url, count, each=False)
    print(f"the old script: {old:,.0f} users/s, with an ORM that gathers {kinder:,.0f}", flush=True)
    by_dlt = dlt_load(uri, url, min(sample, count))
    print(f"dlt: {by_dlt:,.0f} users/s", flush=True)
    what = f"backfill of {count:,} users into empty tables, two processes"
    return report(
        Figure(what, rate / old, "the old script's algorithm, an ORM row by row", least=GOAL_OLD),
        Figure(what, rate / kinder, "the same, a user's friends inserted together"),
        Figure(what, rate / by_dlt, "dlt with a PyMongo source", least=GOAL_DLT),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--sample", type=int, default=6_000, help="users that dlt loads")
    arguments = parser.parse_args()
    from crossfade.embedded import EmbeddedServers

    with EmbeddedServers() as servers:
        return 0 if run(servers.mongo_uri, servers.database_url, arguments.users, arguments.sample) else 1


if __name__ == "__main__":
    sys.exit(main())
