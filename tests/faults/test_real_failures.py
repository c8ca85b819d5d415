"""A sample by real means, to show that the enumerated failures are like them: SIGKILL, connections cut by a proxy."""

import asyncio
import base64
import itertools
import json
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
    [(place, failure)] = case.failures.items()
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.faults.killed", stage.mongo_uri, stage.database_url, stage.phase, case.story,
        case.strategy.value if case.strategy else "default", json.dumps(place), failure.value,
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
            Case(story, strategy, {point.place: failure})
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


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("story", sorted(STORIES))
@pytest.mark.parametrize("strategy", STRATEGIES, ids=["default", "rollback_both"])
@pytest.mark.parametrize("phase", ["dual_write", "postgres_primary"])
async def test_requests_cut_on_their_way(
    open_stage, record_property, mongo_proxy, postgres_proxy, phase, strategy, story
):
    """Real bytes: each request of the operation to either store is cut before it arrives, or its answer is."""
    stage = await open_stage(phase)
    outcomes = []
    proxies = {"mongo": mongo_proxy, "postgres": postgres_proxy}
    if phase == "postgres_primary":
        # Its writes ask for answers in the middle of a pipeline (Flush), where the proxy sees no end of a request.
        del proxies["postgres"]
    for proxy in proxies.values():
        for fault in (proxy.cut_before_request, proxy.cut_after_request):
            for number in range(100):
                struck = proxy.counts.faults
                outcomes.append(
                    await stage.play(
                        Case(story, strategy), **proxies,
                        begins=lambda _, fault=fault, number=number: fault(when=nth(number)),
                    )
                )  # fmt: skip
                if proxy.counts.faults == struck:
                    break  # that many requests it does not have
            proxy.pass_through()
    assert await stage.violations(outcomes) == []
    assert len(outcomes) >= 6 * len(proxies)
    record_property("failure_points", len(outcomes))


def nth(number):
    """True for the request of this number, from 0, and for no other."""
    left = itertools.count(-number)
    return lambda _: next(left) == 0
