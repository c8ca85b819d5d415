"""The tables that everything else goes by: phases, strategies, the breaker. No store needed."""

import asyncio

import pytest

from crossfade import ConfigurationError, FailureStrategy, NotAllowedInPhase, Phase, StoreUnavailable
from crossfade.breaker import Breaker
from crossfade.control import Control
from crossfade.phase import check_transition
from crossfade.strategy import check_strategy, default_strategy

MONGO, BOTH, POSTGRES = (
    FailureStrategy.PRIORITIZE_MONGO,
    FailureStrategy.ROLLBACK_BOTH,
    FailureStrategy.PRIORITIZE_POSTGRES,
)


@pytest.mark.parametrize(
    ("phase", "primary", "dual", "read"),
    [
        ("mongo_only", "mongo", False, "mongo"),
        ("dual_write", "mongo", True, "mongo"),
        ("shadow_read", "mongo", True, "shadow"),
        ("postgres_read", "mongo", True, "postgres"),
        ("postgres_primary", "postgres", True, "postgres"),
        ("postgres_only", "postgres", False, "postgres"),
    ],
)
def test_each_phase_names_its_primary_its_secondary_and_where_reads_go(phase, primary, dual, read):
    rules = Phase(phase).rules
    assert (rules.primary, rules.dual, rules.read) == (primary, dual, read)
    assert {rules.primary, rules.secondary} == {"mongo", "postgres"}


def test_phases_are_numbered_in_their_order_and_parsed_by_name_or_number():
    assert [phase.number for phase in Phase] == [0, 1, 2, 3, 4, 5]
    assert all(Phase.parse(str(p.number)) is p and Phase.parse(p.value) is p for p in Phase)


def test_an_unknown_phase_is_refused_with_the_list_of_phases():
    with pytest.raises(ConfigurationError, match=r"unknown phase 'six'.*0 mongo_only.*5 postgres_only"):
        Phase.parse("six")


def test_a_phase_is_left_by_one_step_forward_or_back_on_the_same_primary():
    allowed = {
        (here.number, there.number)
        for here in Phase
        for there in Phase
        if not _raises(lambda here=here, there=there: check_transition(here, there))
    }
    forward = {(n, n + 1) for n in range(5)}
    back = {(3, 2), (3, 1), (3, 0), (2, 1), (2, 0), (1, 0), (4, 3)}
    assert allowed == forward | back


def _raises(call):
    try:
        call()
    except NotAllowedInPhase:
        return True
    return False


def test_a_refused_step_names_the_step_that_is_allowed():
    with pytest.raises(NotAllowedInPhase, match="set dual_write first"):
        check_transition(Phase.MONGO_ONLY, Phase.POSTGRES_READ)
    with pytest.raises(NotAllowedInPhase, match="in phase dual_write already"):
        check_transition(Phase.DUAL_WRITE, Phase.DUAL_WRITE)


@pytest.mark.parametrize(
    ("phase", "default", "allowed"),
    [
        (Phase.MONGO_ONLY, MONGO, {MONGO}),
        (Phase.DUAL_WRITE, MONGO, {MONGO, BOTH}),
        (Phase.SHADOW_READ, MONGO, {MONGO, BOTH}),
        (Phase.POSTGRES_READ, MONGO, {MONGO, BOTH}),
        (Phase.POSTGRES_PRIMARY, POSTGRES, {POSTGRES, BOTH}),
        (Phase.POSTGRES_ONLY, POSTGRES, {POSTGRES}),
    ],
)
def test_each_phase_allows_only_strategies_that_let_its_primary_decide(phase, default, allowed):
    assert default_strategy(phase) is default
    for strategy in FailureStrategy:
        if strategy in allowed:
            check_strategy(strategy, phase)
        else:
            with pytest.raises(NotAllowedInPhase, match=rf"{strategy.name} is not allowed in phase {phase}"):
                check_strategy(strategy, phase)


def test_an_asynchronous_write_cannot_promise_both_stores():
    check_strategy(MONGO, Phase.DUAL_WRITE, asynchronous=True)
    with pytest.raises(NotAllowedInPhase, match="async"):
        check_strategy(BOTH, Phase.DUAL_WRITE, asynchronous=True)


# --- the control record's own arithmetic ---


def test_every_change_is_a_new_version_and_only_phase_or_state_make_a_new_epoch():
    first = Control("accounts", phase=Phase.DUAL_WRITE)
    flagged = first.changed(by="x", reason="y", unreadable="token")
    moved = flagged.changed(by="x", reason="y", phase=Phase.SHADOW_READ)
    assert (flagged.version, flagged.epoch) == (first.version + 1, first.epoch)
    assert (moved.version, moved.epoch) == (first.version + 2, first.epoch + 1)


def test_a_control_record_survives_its_stored_form_and_fields_of_a_newer_release():
    control = Control("accounts", phase=Phase.POSTGRES_READ, target=Phase.POSTGRES_PRIMARY, unreadable="t")
    assert Control.from_document({**control.to_document(), "of_next_year": 1}) == control


def test_phase_1_reads_postgres_first_only_if_it_began_empty_and_nobody_else_writes():
    def reads(**fields):
        return Control("a", phase=Phase.DUAL_WRITE, **fields).postgres_first

    assert reads(began_empty=True)
    assert not reads(began_empty=False)
    assert not reads(began_empty=True, foreign_writers=True)


# --- the breaker ---


class _Store:
    """What a breaker asks: there or not."""

    def __init__(self) -> None:
        self.there = False
        self.questions: asyncio.Queue[None] = asyncio.Queue()

    async def ping(self) -> None:
        self.questions.put_nowait(None)
        if not self.there:
            raise StoreUnavailable("postgres", "not there")


async def _closed(breaker: Breaker) -> None:
    assert breaker._probing is not None
    await breaker._probing
    assert breaker.allows()


async def test_a_breaker_opens_after_failures_in_a_row_and_not_after_scattered_ones():
    breaker = Breaker(_Store().ping, failures_to_open=3, rest=60)
    for report in (breaker.failed, breaker.failed, breaker.succeeded, breaker.failed, breaker.failed):
        assert breaker.allows()
        report()
    assert breaker.allows()
    breaker.failed()
    assert not breaker.allows()
    await breaker.close()


async def test_an_open_breaker_asks_the_store_itself_and_lets_no_call_find_out():
    store = _Store()
    breaker = Breaker(store.ping, failures_to_open=1, rest=0.5)
    breaker.failed()
    for _ in range(3):
        await store.questions.get()
        assert not breaker.allows()
    store.there = True
    await _closed(breaker)
    await breaker.close()


async def test_a_question_that_ends_by_an_unforeseen_error_is_asked_again():
    ends = [RuntimeError("unforeseen"), None]

    async def ping() -> None:
        if (end := ends.pop(0)) is not None:
            raise end

    breaker = Breaker(ping, failures_to_open=1, rest=0.5)
    breaker.failed()
    await _closed(breaker)
    assert ends == []
    await breaker.close()


async def test_an_open_breaker_whose_question_was_cancelled_asks_anew_after_the_next_failure():
    store = _Store()
    store.there = True
    breaker = Breaker(store.ping, failures_to_open=1, rest=0.5)
    breaker.failed()
    await breaker.close()
    assert not breaker.allows()
    breaker.failed()
    await _closed(breaker)
    await breaker.close()


async def test_a_store_that_answers_the_breaker_alone_is_left_alone_at_the_next_failure():
    store = _Store()
    store.there = True
    breaker = Breaker(store.ping, failures_to_open=3, rest=0)
    for _ in range(3):
        breaker.failed()
    await _closed(breaker)
    store.there = False
    breaker.failed()
    assert not breaker.allows()
    await breaker.close()


async def test_a_call_that_succeeds_closes_an_open_breaker():
    breaker = Breaker(_Store().ping, failures_to_open=1, rest=60)
    breaker.failed()
    breaker.succeeded()
    assert breaker.allows()
    await breaker.close()


async def test_a_caller_that_gives_up_says_nothing_and_the_store_is_asked():
    store = _Store()
    store.there = True
    breaker = Breaker(store.ping, failures_to_open=1, rest=60)
    for _ in range(3):
        breaker.given_up()
        await breaker._doubting
    assert (breaker.failures, breaker.allows(), store.questions.qsize()) == (0, True, 3)
    store.there = False
    breaker.given_up()
    await breaker._doubting
    assert not breaker.allows()
    # Open, it asks by itself, and goes on to.
    breaker.given_up()
    assert store.questions.qsize() == 4
    assert not breaker._probing.done()
    await breaker.close()


async def test_a_breaker_is_closed_by_a_driver_that_loses_a_cancellation_too():
    asked = asyncio.Event()

    async def probe():
        asked.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise StoreUnavailable("mongo", "the connection failed") from None

    breaker = Breaker(probe, failures_to_open=1, rest=0.5)
    breaker.failed()
    await asked.wait()
    closing = asyncio.create_task(breaker.close())
    _, waiting = await asyncio.wait({closing}, timeout=5)
    breaker.is_open = False  # ends it, however it was closed
    breaker._probing.cancel()
    assert not waiting
