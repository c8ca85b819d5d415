"""What the judge of histories must find, and what it must let pass; no store is asked."""

import pytest

from .history import Event, History

ACKNOWLEDGED = "acknowledged"


def event(kind, began, ended, value=None, told=ACKNOWLEDGED, rev=None, stale=False):
    return Event(kind, "a", began, ended, value, told, rev, stale)


def judged(final, *events):
    return History(list(events)).violations({"a": final})


MADE = event("insert", 0, 1, value=1, rev=1)
CHANGED = event("update", 2, 3, value=2, rev=2)


def test_what_happened_one_after_the_other_passes():
    reads = [event("read", 1, 2, value=1, rev=1), event("read", 3.5, 4, value=2, rev=2)]
    assert judged((2, 2), MADE, CHANGED, *reads) == []


def test_a_lift_gives_a_value_a_higher_revision():
    assert judged((7, 2), MADE, CHANGED, event("read", 4, 5, value=2, rev=6)) == []


@pytest.mark.parametrize(
    ("final", "event_", "found"),
    [
        ((2, 2), event("update", 4, 5, value=3, rev=2), "revision told twice"),
        ((3, 2), event("update", 4, 5, value=3, rev=1), "later write, no higher revision"),
        ((2, 2), event("read", 4, 5, value=1, rev=1), "read older than acknowledged"),
        ((2, 2), event("read", 4, 5, value=9, rev=3), "nobody had written"),
        ((2, 2), event("read", 4, 5), "nobody had deleted it"),
        ((2, 2), event("update", 4, 5, value=3, rev=3), "older than acknowledged"),
        ((3, 2), event("update", 4, 5, value=3, rev=3), "another value"),
        ((4, 2), event("update", 4, 5, value=3, rev=3), "was acknowledged after it"),
        ((3, 3), event("update", 4, 5, value=3, told="Undone"), "refused or taken back"),
        ((3, 3), event("update", 4, 5, value=3, told="DuplicateKey"), "refused or taken back"),
        ((3, 9), event("read", 4, 5, value=2, rev=2), "nobody wrote"),
        ((2, 2), event("delete", 4, 5), "back from the dead"),
        (None, event("read", 4, 5, value=2, rev=2), "gone, and nobody"),
    ],
)
def test_what_cannot_have_happened_is_named(final, event_, found):
    violations = judged(final, MADE, CHANGED, event_)
    assert any(found in violation for violation in violations), violations


@pytest.mark.parametrize("told", ["OutcomeUnknown", "killed"])
def test_a_write_of_unknown_outcome_may_stand_or_not(told):
    unknown = event("update", 4, 5, value=3, told=told)
    assert judged((2, 2), MADE, CHANGED, unknown) == []
    assert judged((3, 3), MADE, CHANGED, unknown) == []


def test_a_read_that_says_that_it_may_be_old_may_be_old():
    assert judged((2, 2), MADE, CHANGED, event("read", 4, 5, value=1, rev=1, stale=True)) == []


def test_a_delete_that_may_have_happened_explains_a_missing_record():
    gone = event("delete", 4, 5, told="OutcomeUnknown")
    assert judged(None, MADE, CHANGED, gone, event("read", 6, 7)) == []
