"""A sample by real means, to show that the enumerated failures are like them: SIGKILL, connections cut by a proxy."""

import asyncio
import base64
import os
import pickle
import random
import sys
from pathlib import Path

import pytest

from crossfade import FailureStrategy
from crossfade.testing.failure_points import Failure

from .conftest import Case, Outcome
from .stories import STORIES, Telling
from .test_failure_points import PHASES, STRATEGIES, count

ROOT = Path(__file__).parents[2]


async def played_in_a_child(stage, case):
    """The case's outcome, of a process that was killed."""
    [(number, failure)] = case.failures.items()
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.faults.killed", stage.mongo_uri, stage.database_url, stage.phase, case.story,
        case.strategy.value if case.strategy else "default", str(number), failure.value,
        cwd=ROOT, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    said, _ = await child.communicate()
    assert child.returncode == -9, "it was not killed"
    [records] = [line.split()[1] for line in said.decode().splitlines() if line.startswith("records ")]
    about, before, after, names = pickle.loads(base64.b64decode(records))
    return Outcome(case, Telling(about, before, after, None, names), "killed", [], {})


async def assert_a_killed_process_is_like_a_killed_worker(stage, strategy, stories, chosen, each):
    pairs = []
    for story in stories:
        first = await count(stage, story, strategy)
        kills = [
            Case(story, strategy, {point.number: failure})
            for point in first.points
            for failure in (Failure.KILLED_BEFORE, Failure.KILLED_AFTER)
            if failure in point.failures
        ]
        pairs += [
            (await stage.play(case), await played_in_a_child(stage, case))
            for case in chosen.sample(kills, each)
        ]
    ends = []
    assert await stage.violations([outcome for pair in pairs for outcome in pair]) == []
    for inside, child in pairs:
        ends.append((await stage.end_of(inside), await stage.end_of(child)))
        assert ends[-1][0] == ends[-1][1], inside.describe()
    return len(pairs)


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=["default", "rollback_both"])
@pytest.mark.parametrize("phase", PHASES)
async def test_a_killed_process_leaves_what_a_killed_worker_leaves(
    open_stage, record_property, phase, strategy
):
    stage = await open_stage(phase)
    chosen = random.Random(f"{os.environ['FAULTS_SEED']} {phase} {strategy}")
    number = await assert_a_killed_process_is_like_a_killed_worker(stage, strategy, STORIES, chosen, 2)
    record_property("failure_points", 2 * number)


async def test_one_killed_process_leaves_what_a_killed_worker_leaves(open_stage, record_property):
    chosen = random.Random(os.environ["FAULTS_SEED"])
    stage = await open_stage(chosen.choice(PHASES))
    number = await assert_a_killed_process_is_like_a_killed_worker(
        stage, FailureStrategy.ROLLBACK_BOTH, [chosen.choice(list(STORIES))], chosen, 1
    )
    record_property("failure_points", 2 * number)
