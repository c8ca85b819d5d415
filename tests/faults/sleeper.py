"""A worker in a process of its own, to be stopped and killed: MONGO_URI DATABASE_URL PHASE ID LEASE.

Writes one number after the other to its record, until its standard input ends. Says on its standard output ``ready``,
and then each number with what it was told: its revision, or the name of the error.
"""

import asyncio
import sys
from dataclasses import replace

from bson import ObjectId

from crossfade import Crossfade, CrossfadeError, observe

from ..protocol.conftest import FAST, users_entity


async def main() -> None:
    mongo_uri, database_url, phase, id_, lease = sys.argv[1:]
    cf = Crossfade(
        mongo_uri=mongo_uri, database_url=database_url, initial_phase=phase,
        options=replace(FAST, lease=float(lease)),
    )  # fmt: skip
    m = cf.migration("accounts", [users_entity()])
    ended = asyncio.Event()

    async def until_the_end() -> None:
        await asyncio.to_thread(sys.stdin.read)
        ended.set()

    async with cf:
        print("ready", flush=True)  # noqa: T201
        listening = asyncio.create_task(until_the_end())
        number = 1_000
        while not ended.is_set():
            number += 1
            try:
                told: object = (await m.users.update(ObjectId(id_), {"n": number})).rev
            except CrossfadeError as cause:
                told = type(cause).__name__
            print(number, told, flush=True)  # noqa: T201
        await listening


if __name__ == "__main__":
    observe.configure_logging("ERROR")
    asyncio.run(main())
