"""Everything that is wrong in real data, a document in a hundred each: carried to the letter, or named and kept."""

import asyncio

import bson
import pytest
from sqlalchemy.dialects.postgresql import JSONB

from crossfade import Crossfade, Options
from crossfade.bulk.pieces import in_dependency_order
from crossfade.cli.crew import backfill_of, verify_of
from crossfade.stores.bulk_mongo import BulkMongo, id_of
from crossfade.stores.bulk_postgres import BulkPostgres
from crossfade.values import CODEC_OPTIONS, id_to_text
from scorekeeper.legacy import DirtRates, generate
from scorekeeper.legacy.rates import KINDS
from scorekeeper.migration import accounts

from .conftest import MIGRATION

pytestmark = pytest.mark.long

SIZES = {"playeridentities": 900, "friendrequests": 900, "games": 250, "wizard": 250, "tablegames": 250}
USERS = 2500
#: What a reason may say, so that whoever reads it knows what is wrong and where.
UNDERSTOOD = (
    "holds a string that is not valid UTF-8",
    "is missing, and the column",
    "cannot hold, and that column must have a value",
)


@pytest.fixture
def dirty(stores):
    database = stores.client.get_default_database()
    made = generate(database, seed=11, users=USERS, sizes=SIZES, rates=DirtRates.all(0.01))
    refused = {kind for refusal in made.refused for kind in refusal.kinds}
    for collection in ("users", "playeridentities", "friendrequests"):
        assert set(KINDS[collection]) - refused <= set(made.dirt[collection])
    return made


def raw_documents(stores, entity):
    batches = stores.client.get_default_database()[entity.collection].find_raw_batches()
    for batch in batches:
        at = 0
        while at < len(batch):
            size = int.from_bytes(batch[at : at + 4], "little")
            yield batch[at : at + size]
            at += size


def select(stores, table, names):
    """Columns of every row, JSON as text."""
    columns = ", ".join(
        f"{name}::text" if isinstance(table.columns[name].type, JSONB) else name for name in names
    )
    return stores.rows(f"SELECT {columns} FROM {table.name}")


def rows_of(stores, entity):
    """Of each id: the document that the rows give, in BSON."""
    stores.sql.execute("SET timezone = 'UTC'")
    children = []
    for child in entity.children:
        owned = {}
        for row in select(stores, child.table, child.columns):
            owned.setdefault(row[0], []).append(row)
        children.append(owned)
    return {
        row[0]: bson.encode(
            entity.from_rows(row, [owned.get(row[0], []) for owned in children]), codec_options=CODEC_OPTIONS
        )
        for row in select(stores, entity.table, entity.parent_columns)
    }


def without_notes(raw):
    document = bson.decode(raw, CODEC_OPTIONS)
    document.pop("_cf", None)
    return bson.encode(document, codec_options=CODEC_OPTIONS)


async def moved_and_compared(stores, migration, entity):
    source, target = BulkMongo(stores.mongo_uri), await BulkPostgres.connect(stores.database_url)
    try:
        moved = await backfill_of(migration, entity, source, target, batch_size=None).run()
        return moved, await verify_of(migration, entity, source, target, fast=False).run()
    finally:
        await target.close()
        await asyncio.to_thread(source.close)


async def test_every_document_is_equal_in_both_directions_or_kept_with_a_reason(
    stores, dirty, mongo_uri, database_url
):
    stores.sql.execute("DELETE FROM crossfade.control")
    entities = accounts()
    cf = Crossfade(
        mongo_uri=mongo_uri, database_url=database_url, initial_phase="dual_write",
        # Or what the sweep adopts would be there before the backfill comes.
        options=Options(sweep=0, full_sweep=0),
    )  # fmt: skip
    migration = cf.migration(MIGRATION, entities)
    async with cf:
        await migration.prepare()
        for entity in in_dependency_order(entities):
            report, seen = await moved_and_compared(stores, migration, entity)
            counts = report.counts
            found = stores.rows(
                "SELECT id, reason, document FROM crossfade.quarantine WHERE entity = %s", entity.name
            )
            quarantined = {text: (reason, bytes(document)) for text, reason, document in found}
            rows = rows_of(stores, entity)
            number = 0
            for raw in raw_documents(stores, entity):
                number += 1
                text = id_to_text(id_of(raw))
                if text in quarantined:
                    reason, kept = quarantined.pop(text)
                    assert kept == raw
                    assert any(words in reason for words in UNDERSTOOD), reason
                    assert text not in rows
                else:
                    assert rows.pop(text) == without_notes(raw), text
            assert (rows, quarantined) == ({}, {})
            assert (report.state, counts.read, counts.parked) == ("complete", number, 0)
            assert counts.inserted + counts.quarantined + counts.behind == number
            assert not seen.found, seen.samples
            assert (seen.counts.documents, seen.counts.rows, seen.counts.equal) == (
                number, counts.inserted, counts.inserted,
            )  # fmt: skip
            assert seen.counts.findings["quarantined"] == counts.quarantined
