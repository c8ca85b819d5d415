"""A legacy deployment goes over to PostgreSQL and comes back, and every document is what it was."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pymongo
import pytest
from bson import encode
from bson.raw_bson import RawBSONDocument
from pymongo.errors import OperationFailure

from crossfade import Crossfade, CrossfadeError, Migration, Options, Phase
from crossfade.bulk.backfill import Backfill
from crossfade.bulk.verify import Verify
from crossfade.guard import guard
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres
from crossfade.transition import change_phase
from crossfade.values import Unmappable, decode_document
from scorekeeper.legacy import RAW_OPTIONS, DirtRates, generate
from scorekeeper.legacy.deployment import documents_of
from scorekeeper.legacy.population import Population
from scorekeeper.migration import accounts

pytestmark = pytest.mark.long

SIZES = dict.fromkeys(("playeridentities", "friendrequests", "games", "wizard", "tablegames"), 60)
USERS = 60
#: Each of some twenty kinds of dirt in six documents of a hundred: most of the documents have some.
DIRTY = DirtRates.all(0.06, near_limit_documents=0)


def exact(value: Any) -> Any:
    """A value with its types, its bits and the order of its fields, to be compared by ``==``."""
    if isinstance(value, Mapping):
        return [(name, exact(item)) for name, item in value.items() if name != "_cf"]
    if isinstance(value, list):
        return ["list", *map(exact, value)]
    if isinstance(value, datetime):
        return ("datetime", value.astimezone(UTC).isoformat())
    if isinstance(value, float):
        return ("float", struct.pack(">d", value))
    return (type(value).__name__, value)


def snapshot(database: Any) -> dict[str, dict[str, str]]:
    """Every document of our six collections, by collection and ``_id``, without what Crossfade keeps in them."""
    options = RAW_OPTIONS.with_options(document_class=dict)
    return {
        entity.collection: {
            repr(document["_id"]): repr(exact(document))
            for document in database.get_collection(entity.collection, codec_options=options).find()
        }
        for entity in accounts()
    }


def differing(one: Mapping[str, Mapping[str, str]], other: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The documents of ``one`` that ``other`` has not just so, the beginnings of both where they part."""
    found = []
    for collection, documents in one.items():
        for id_, said in documents.items():
            there = other[collection].get(id_, "nothing")
            if said != there:
                place = next((n for n, (a, b) in enumerate(zip(said, there, strict=False)) if a != b), 0)
                around = slice(max(0, place - 60), place + 60)
                found.append(f"{collection} {id_}: {said[around]} / {there[around]}")
    return found


async def moved(migration: Migration, phase: Phase) -> None:
    """On to a phase. What its guard holds against it is what is dirty on purpose, or is looked at here itself."""
    failing = [statement.name for statement in await guard(migration, phase) if not statement.holds]
    assert not {"reachable", "schema", "keys", "debt"} & set(failing), failing
    await change_phase(migration, phase, by="a test", reason="round trip", force=tuple(failing))
    await migration.board.refresh()


async def backfilled(migration: Migration, mongo_uri: str, database_url: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for entity in migration.entities.values():
        source, target = BulkMongo(mongo_uri), await BulkPostgres.connect(database_url)
        try:
            run = Backfill(entity, source, target, migration=migration.name, epoch=migration.control.epoch)
            report = await run.run()
        finally:
            await target.close()
            await asyncio.to_thread(source.close)
        found["quarantined"] += report.counts.quarantined
    return found


async def mismatches(migration: Migration, mongo_uri: str, database_url: str) -> dict[str, int]:
    found = {}
    for entity in migration.entities.values():
        source, target = BulkMongo(mongo_uri), await BulkPostgres.connect(database_url)
        try:
            verify = Verify(
                entity,
                source,
                target,
                migration=migration.name,
                epoch=migration.control.epoch,
                wait=0.1,
                looks=2,
            )
            report = await verify.run()
            found[entity.name] = report.counts.mismatches
        finally:
            await target.close()
            await asyncio.to_thread(source.close)
    return found


async def settled(migration: Migration) -> None:
    for _ in range(20):
        done = await migration.reconciler.reconcile()
        await migration.board.refresh()
        if not done.settled:
            return


async def test_every_document_comes_back_from_postgresql_as_it_was(mongo_uri: str, database_url: str) -> None:
    client: pymongo.MongoClient[Any] = pymongo.MongoClient(mongo_uri)
    database = client.get_default_database()
    summary = await asyncio.to_thread(generate, database, users=USERS, sizes=SIZES, rates=DIRTY)
    assert min(len(kinds) for name, kinds in summary.dirt.items() if name in SIZES) > 8
    with suppress(OperationFailure):
        # The embedded document engine's text index reads past a NUL, and refuses any update of such a user.
        database["users"].drop_index("username_text")
    before = snapshot(database)

    cf = Crossfade(
        mongo_uri=mongo_uri, database_url=database_url, background=False,
        options=Options(lease=5.0, board_age=2.0, secondary_deadline=2.0),
    )  # fmt: skip
    migration = cf.migration("accounts", accounts())
    async with cf:
        colliding = (await migration.prepare()).colliding
        assert colliding["username"]
        await moved(migration, Phase.DUAL_WRITE)
        quarantined = (await backfilled(migration, mongo_uri, database_url))["quarantined"]
        # Rows that a rule refused, each by the protocol of single writes.
        await settled(migration)
        assert not any((await mismatches(migration, mongo_uri, database_url)).values())
        assert differing(before, snapshot(database)) == []
        for phase in (Phase.SHADOW_READ, Phase.POSTGRES_READ, Phase.POSTGRES_PRIMARY):
            await moved(migration, phase)

        # PostgreSQL decides: each record is written there once more, and delivered from its rows.
        touched = await asyncio.gather(*(touch_all(migration, name) for name in migration.entities))
        assert sum(touched) > sum(map(len, before.values())) - quarantined - 10
        inserted = await insert_others(migration)
        await settled(migration)

        await moved(migration, Phase.POSTGRES_READ)
        await settled(migration)
        assert not any((await mismatches(migration, mongo_uri, database_url)).values())
        await moved(migration, Phase.SHADOW_READ)
        await moved(migration, Phase.DUAL_WRITE)
    after = snapshot(database)
    assert differing(before, after) == []
    assert differing(inserted, after) == []
    assert {name: len(after[name]) for name in after} == {
        name: len(before[name]) + len(inserted[name]) for name in after
    }
    assert min(map(len, inserted.values())) > 8
    client.close()


async def touch_all(migration: Migration, name: str) -> int:
    """Write a field of every record that PostgreSQL has to what it is; how many there were."""
    handle, after, touched = migration[name], None, 0
    while found := await handle.find(after=after, limit=100):
        for record in found:
            field = next(field for field in record.document if field != "_id")
            with suppress(CrossfadeError):
                await handle.update(record.id, {field: record[field]}, if_revision=record.rev)
                touched += 1
        after = (found[-1].id,)
    return touched


async def insert_others(migration: Migration) -> dict[str, dict[str, str]]:
    """Insert what another deployment holds, as far as it can be and collides with nothing here."""
    population = Population(7, 25, DirtRates.all(0.05, near_limit_documents=0))
    inserted: dict[str, dict[str, str]] = {}
    for entity in migration.entities.values():
        found = inserted.setdefault(entity.collection, {})
        for labelled in documents_of(entity.collection, population, 25):
            raw = labelled.document
            bson = bytes(raw.raw) if isinstance(raw, RawBSONDocument) else encode(raw)
            with suppress(CrossfadeError, Unmappable):
                document = decode_document(bson)
                await migration[entity.name].insert(document)
                found[repr(document["_id"])] = repr(exact(document))
    return inserted
