"""A reconciler that fails at any of its awaits: whatever it had begun, another one finishes it.

It finds what an outage of the secondary leaves, of every operation and as many as are settled together, and what
workers leave that were killed in the middle of a ``ROLLBACK_BOTH`` write.
"""

import contextlib
import itertools
import os
import random

import pytest

from crossfade import FailureStrategy, reconcile
from crossfade.testing.failure_points import Failure

from .conftest import Case, Outcome
from .stories import STORIES
from .test_failure_points import PHASES, batched, told

#: Deletes enough to be settled together, too.
TOLD = [*STORIES, "delete"]
#: Left open by a worker that is killed behind the first COMMIT or change of a document.
OPEN = ["update", "delete", "accept"]
DECIDES = ("COMMIT", "find_one_and_update")
#: And whether the store is dead from there on.
FAILURES = [
    (Failure.KILLED_BEFORE, False),
    (Failure.KILLED_AFTER, False),
    (Failure.ANSWER_LOST, False),
    (Failure.ANSWER_LATE, False),
    (Failure.REQUEST_LATE, False),
    (Failure.REFUSED, True),
    (Failure.REQUEST_LOST, True),
]
#: Fewer points than this in a run without failures: the counting is broken.
FEWEST = 100
#: Cases between two restarts.
BATCH = 10


class Debts:
    """Leaves debts of every kind, again and again."""

    def __init__(self, stage, owing):
        self.stage, self.owing = stage, owing
        self.open = []

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, stage, mongo_proxy, postgres_proxy):
        primary_is_mongo = stage.phase != "postgres_primary"
        secondary = {"postgres": postgres_proxy} if primary_is_mongo else {"mongo": mongo_proxy}
        async with stage.worker(**secondary) as owing:
            debts = cls(stage, owing)
            for story in OPEN:
                first = await stage.play(Case(story, FailureStrategy.ROLLBACK_BOTH))
                decides = next(point for point in first.points if point.call.endswith(DECIDES))
                debts.open.append(
                    Case(story, FailureStrategy.ROLLBACK_BOTH, {decides.place: Failure.KILLED_AFTER})
                )
            [proxy] = secondary.values()
            proxy.refuse()
            yield debts

    async def make(self):
        """Outcomes of which the last step is still owed."""
        outcomes = []
        for story in TOLD:
            case = Case(story, None)
            telling = await self.stage.prepared(case)
            await telling.tell(self.owing.m)
            outcomes.append(Outcome(case, telling, "acknowledged", [], {}))
        outcomes += [await self.stage.play(case) for case in self.open]
        await self.stage.clear_flag()
        return outcomes


async def settle(migration):
    """Open writes are nobody's any more: as behind a fence, and then as anybody does."""
    await migration.reconciler.drain()
    await migration.reconciler.reconcile(wait_for_open=False)


async def counted(stage, debts, chosen):
    """Every failure at every await that a reconciler has in its source, of one of the records that come there."""
    outcomes = await debts.make()
    told_, points = await stage.fail(settle, {})
    assert told_ == "acknowledged"
    assert len(points.points) >= FEWEST
    left = (await stage.healthy.m.board.refresh()).debts
    assert left == (), "a reconciler that does not fail leaves nothing"
    assert await stage.violations(outcomes) == []
    alike = {}
    for point in points.points:
        alike.setdefault(point.place[:3], []).append(point)
    return [
        ({chosen.choice(points_).place: failure}, lasting)
        for points_, (failure, lasting) in itertools.product(alike.values(), FAILURES)
        if failure in points_[0].failures
    ]


async def play_all(stage, debts, cases):
    """How often a failure was met, and what does not hold afterwards."""
    struck, found = 0, []
    for batch in batched(cases, BATCH):
        outcomes = []
        for failures, lasting in batch:
            outcomes += await debts.make()
            _, points = await stage.fail(settle, failures, lasting=lasting)
            struck += bool(points.struck)
        violations = await stage.violations(outcomes)
        if violations:
            found.append((violations, [str(case) for case in batch]))
    return struck, found


@pytest.fixture(autouse=True)
def a_few_are_many(monkeypatch):
    monkeypatch.setattr(reconcile, "_MANY", 2)


@pytest.fixture
def play(open_stage, record_property, mongo_proxy, postgres_proxy):
    """Plays the cases of a phase, or so many of them by seed: how many there were, and how many were met."""

    async def played(phase, number=None):
        seed = os.environ["FAULTS_SEED"]
        chosen = random.Random(f"{seed} reconciler {phase}")
        stage = await open_stage(phase)
        async with Debts.of(stage, mongo_proxy, postgres_proxy) as debts:
            cases = await counted(stage, debts, chosen)
            if number is not None:
                cases = chosen.sample(cases, number)
            struck, found = await play_all(stage, debts, cases)
        record_property("failure_points", struck)
        assert not found, f"FAULTS_SEED={seed}\n{told(found)}\n{[batch for _, batch in found]}"
        return len(cases), struck

    return played


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("phase", PHASES)
async def test_a_reconciler_fails_at_every_kind_of_await(play, phase):
    cases, struck = await play(phase)
    assert struck > 0.8 * cases, "points were not met"


@pytest.mark.parametrize("phase", PHASES)
async def test_a_reconciler_fails_at_some_awaits(play, phase):
    await play(phase, 5)
