"""Whatever fails, at whichever await on a store: after a restart and reconciling every promise holds.

The points are counted by running the operation (`crossfade.testing.failure_points`), so an await that is added adds its
cases by itself. Each case is a story told by a worker that fails at one point (or at a second one, in what it does
about the first), once or with that store dead from there on; then it is gone, another one reconciles, and both stores
must be equal, owe nothing, and hold what the caller was told.

``make test-faults`` runs them all, ``make test`` a sample by seed (``FAULTS_SEED`` repeats one).
Second failures are too many to be played all: the complete run, too, takes those of its seed.
"""

import itertools
import os
import random

import pytest

from crossfade import FailureStrategy
from crossfade.testing.failure_points import Failure

from .conftest import Case
from .stories import STORIES

PHASES = ["dual_write", "postgres_read", "postgres_primary"]
STRATEGIES = [None, FailureStrategy.ROLLBACK_BOTH]
#: Cases between two restarts.
BATCH = 50
#: Second failures, of the thousands that there are, chosen by seed for each story, phase and strategy.
SECOND = 50
#: Fewer points than this in a run without failures: the counting is broken.
FEWEST = {"accept": 12, "part": 12, "delete": 7}
#: Runs without failures that may miss a deadline: many workers share a few processors.
MOST_LATE = 3


def cases_of(first):
    """Every failure at every point of a run without failures: once, and with the store dead from there on."""
    for point, lasting in itertools.product(first.points, (False, True)):
        for failure in point.failures:
            # Of a process that has ended nothing lasts; a store that hangs for good hangs the same either way.
            if not (lasting and (failure.kills or failure is Failure.ANSWER_LATE)):
                yield Case(first.case.story, first.case.strategy, {point.place: failure}, lasting)


def second_failures_of(outcome):
    """Where it failed once and went on by another way: it ends, or loses an answer, at each point of that way."""
    [(place, failure)] = outcome.case.failures.items()
    if failure not in (Failure.REFUSED, Failure.REQUEST_LOST, Failure.ANSWER_LOST) or outcome.case.lasting:
        return
    for point in outcome.points[min(outcome.struck) + 1 :]:
        for second in (Failure.KILLED_AFTER, Failure.ANSWER_LOST):
            if second in point.failures:
                yield Case(outcome.case.story, outcome.case.strategy, {place: failure, point.place: second})


def new_ways(outcomes, first):
    """Of the runs that a failure made come by other points than the run without: one for each way they went."""
    ways = {}
    usual = {point.place for point in first.points}
    for outcome in outcomes:
        way = frozenset(point.place for point in outcome.points)
        if outcome.struck and way != usual:
            ways.setdefault((tuple(outcome.struck.values()), way), outcome)
    return list(ways.values())


async def count(stage, story, strategy):
    """A run without failures, of the way that two of them went: on a busy machine one goes by another, or is late."""
    ways, late = {}, 0
    while True:
        first = await stage.play(Case(story, strategy))
        if first.told != "acknowledged":
            late += 1
            assert late <= MOST_LATE, first.told
            continue
        assert len(first.points) >= FEWEST.get(story, 3)
        way = frozenset(point.place for point in first.points)
        if way in ways:
            return ways[way]
        ways[way] = first


async def play_all(stage, cases, violations):
    """Play the cases, judge them in batches; the outcomes."""
    outcomes = []
    for batch in batched(cases, BATCH):
        played = [await stage.play(case) for case in batch]
        found = await stage.violations(played)
        if found:
            violations.append((found, [outcome.describe() for outcome in played]))
        outcomes += played
    return outcomes


def batched(items, size):
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def told(violations):
    """All that was found; what leftovers belong to is among the cases of their batch."""
    return "\n".join(line for found, _ in violations for line in found) or ""


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("story", sorted(STORIES, reverse=True))
@pytest.mark.parametrize("strategy", STRATEGIES, ids=["default", "rollback_both"])
@pytest.mark.parametrize("phase", PHASES)
async def test_every_failure_at_every_point(open_stage, record_property, phase, strategy, story):
    stage = await open_stage(phase)
    violations = []
    first = await count(stage, story, strategy)
    assert await stage.violations([first]) == []
    once = list(cases_of(first))
    outcomes = await play_all(stage, once, violations)
    again = [case for o in new_ways(outcomes, first) for case in second_failures_of(o)]
    chosen = random.Random(f"{os.environ['FAULTS_SEED']} {phase} {strategy} {story}")
    outcomes += await play_all(stage, chosen.sample(again, min(len(again), SECOND)), violations)
    record_property("failure_points", len(outcomes))
    assert len(once) >= 10 * FEWEST.get(story, 3), "the enumeration has shrunk"
    assert sum(bool(o.struck) for o in outcomes) > 0.95 * len(outcomes), "points were not met"
    assert not violations, told(violations)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=["default", "rollback_both"])
@pytest.mark.parametrize("phase", PHASES)
async def test_a_sample_of_failures(open_stage, record_property, phase, strategy):
    seed = os.environ["FAULTS_SEED"]
    chosen = random.Random(f"{seed} {phase} {strategy}")
    stage = await open_stage(phase)
    violations = []
    outcomes = []
    for story in STORIES:
        first = await count(stage, story, strategy)
        played = [await stage.play(case) for case in chosen.sample(list(cases_of(first)), 2)]
        outcomes += [first, *played]
    again = [case for o in outcomes if o.struck for case in second_failures_of(o)]
    outcomes += [await stage.play(case) for case in chosen.sample(again, min(len(again), 4))]
    violations = await stage.violations(outcomes)
    record_property("failure_points", len(outcomes))
    assert not violations, f"FAULTS_SEED={seed}\n" + "\n".join(violations)
