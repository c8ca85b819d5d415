"""One case in a process of its own, which ends by SIGKILL: MONGO_URI DATABASE_URL PHASE STORY STRATEGY PLACE FAILURE.

Says on its standard output which records the story is about, and after that what the caller was told, if anything.
"""

import asyncio
import base64
import json
import os
import pickle
import signal
import sys

from crossfade import FailureStrategy
from crossfade.testing.failure_points import Failure

from .conftest import Case, Stage
from .stories import Telling


async def main() -> None:
    mongo_uri, database_url, phase, story, strategy, place, failure = sys.argv[1:]
    step, task, call, number = json.loads(place)
    case = Case(
        story,
        FailureStrategy(strategy) if strategy != "default" else None,
        {(step, task, call, number): Failure(failure)},
    )

    def begins(telling: Telling) -> None:
        what = (telling.records, telling.before, telling.after, telling.names)
        print("records", base64.b64encode(pickle.dumps(what)).decode(), flush=True)  # noqa: T201

    async with Stage.open(phase, mongo_uri, database_url) as stage:
        await stage.play(case, kill=lambda: os.kill(os.getpid(), signal.SIGKILL), begins=begins)


if __name__ == "__main__":
    asyncio.run(main())
