"""A backfill in a process that a test kills: MONGO_URI DATABASE_URL BATCH [bury-and-die ID]."""

import asyncio
import os
import signal
import sys

import psycopg

from crossfade.bulk.backfill import Backfill
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres
from scorekeeper.users.entity import users


async def main() -> None:
    mongo_uri, database_url, batch, *rest = sys.argv[1:]
    target = await BulkPostgres.connect(database_url)

    async def bury_and_die(_tables: object, _first: str, _last: str) -> int:
        with psycopg.connect(database_url, autocommit=True) as other:
            other.execute(
                "INSERT INTO crossfade.tombstones (entity, id, rev) VALUES ('users', %s, 0)", [rest[1]]
            )
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    if rest:
        target.look_again = bury_and_die  # type: ignore[method-assign]
    made = Backfill(
        users,
        BulkMongo(mongo_uri),
        target,
        migration="accounts",
        epoch=1,
        batch_size=int(batch),
        on_progress=lambda _: print("chunk", flush=True),  # noqa: T201
    )
    await made.run()


asyncio.run(main())
