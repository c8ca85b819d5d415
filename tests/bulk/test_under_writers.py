"""A backfill while eight writers insert, update, delete and make anew the same records: equal at the end."""

import asyncio
import contextlib
import os
import random

import pytest
from bson import ObjectId

from crossfade import Crossfade, DuplicateKey, Options
from crossfade.bulk.backfill import Backfill
from crossfade.errors import Busy, CrossfadeError, NotFound, OutcomeUnknown
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.bulk_postgres import BulkPostgres
from scorekeeper.users.entity import users

WRITERS, RECORDS = 8, 60
#: `make soak-bulk` has twenty.
SEEDS = range(20 if os.environ.get("SOAK") else 3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("loading", [False, True], ids=["", "loading"])
async def test_a_backfill_among_writers_of_the_same_records_leaves_both_stores_equal(
    stores, user, mongo_uri, database_url, seed, loading
):
    stores.sql.execute("DELETE FROM crossfade.control")
    documents = [user(n) for n in range(RECORDS)]
    stores.collection.insert_many(documents)
    ids = [document["_id"] for document in documents]
    options = Options(poll=0.05, board_age=0.4, lease=3.0, sweep=0, full_sweep=0, reconcile_age=0.2)
    cf = Crossfade(
        mongo_uri=mongo_uri, database_url=database_url, initial_phase="dual_write", options=options
    )
    accounts = cf.migration("accounts", [users])
    async with cf:
        await accounts.prepare()
        over = asyncio.Event()

        async def write(number: int) -> int:
            chance, done = random.Random(f"{seed} {number}"), 0
            while not over.is_set():
                id_ = chance.choice(ids)
                with contextlib.suppress(NotFound, DuplicateKey, Busy, OutcomeUnknown):
                    match chance.randrange(4):
                        case 0:
                            await accounts.users.delete(id_)
                        case 1:
                            await accounts.users.insert(user(ids.index(id_)))
                        case _:
                            friends = chance.choices([*ids, ObjectId()], k=chance.randrange(4))
                            await accounts.users.update(id_, {"friends": friends, "__v": done})
                    done += 1
            return done

        async def settle_one(entity, id_):
            await accounts.settler.settle_one(entity, id_, accounts.control)

        async def on_behind(entity, behind):
            for id_ in behind:
                with contextlib.suppress(CrossfadeError):
                    await accounts.settler.settle_one(entity, id_, accounts.control)

        async def backfill() -> None:
            source, target = BulkMongo(mongo_uri), await BulkPostgres.connect(database_url)
            for _ in range(3):
                await Backfill(
                    users, source, target, migration="accounts", epoch=accounts.control.epoch, batch_size=7,
                    settle_one=settle_one, on_behind=on_behind, loading=loading,
                ).run(restart=True)  # fmt: skip
            await target.close()
            source.close()

        writers = [asyncio.create_task(write(number)) for number in range(WRITERS)]
        await backfill()
        over.set()
        assert sum(await asyncio.gather(*writers)) > WRITERS
        async with asyncio.timeout(60):
            while (done := await accounts.reconciler.reconcile()).failed or (
                await accounts.board.refresh()
            ).debts:
                assert not done.parked, done
                await asyncio.sleep(0.05)
        report = await stores.verify(epoch=accounts.control.epoch)
        assert not report.found, report.samples
        assert report.counts.findings == dict.fromkeys(report.counts.findings, 0)
        alive = stores.collection.count_documents({"_cf.deleted": {"$ne": True}})
        assert (report.counts.documents, report.counts.rows, report.counts.equal) == (alive,) * 3
        await accounts.reconciler.link()
    [[dangling]] = stores.rows(
        "SELECT count(*) FROM user_friends AS f JOIN users AS u ON u.id = f.friend_id WHERE f.friend_ref IS NULL"
    )
    assert dangling == 0


async def test_a_backfill_begins_once_nobody_writes_without_debt(
    stores, crossfade, user, mongo_uri, database_url
):
    crossfade("init")
    document = user(1)
    stores.collection.insert_one(document)
    options = Options(lease=12.0, sweep=0, full_sweep=0)
    cf = Crossfade(mongo_uri=mongo_uri, database_url=database_url, options=options, background=False)
    accounts = cf.migration("accounts", [users])
    async with cf:
        await accounts.board.obtain_lease()
        step = crossfade("phase", "set", "dual_write", wait=False)
        await asyncio.to_thread(
            stores.wait_until, "SELECT FROM crossfade.control WHERE record ->> 'phase' = 'dual_write'"
        )
        step.kill()  # while it waits for this worker
        step.communicate()
        await asyncio.to_thread(crossfade, "backfill", "--entity", "users")
        await accounts.users.update(document["_id"], {"role": "admin"})
        await accounts.board.refresh()
        await accounts.reconciler.reconcile()
    assert stores.rows("SELECT role FROM users") == [("admin",)]
