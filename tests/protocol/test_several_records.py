"""Operations of several records: a friend request is accepted, and two users become friends, or nothing happens."""

import asyncio

import pytest
from bson import CodecOptions, Decimal128, ObjectId
from bson.int64 import Int64
from bson.raw_bson import RawBSONDocument

from crossfade import (
    Busy,
    ConditionNotMet,
    ConfigurationError,
    FailureStrategy,
    OutcomeUnknown,
    Quarantined,
    StoreUnavailable,
    Undone,
    UndoPending,
)
from crossfade.clock import boot_clock
from crossfade.record import CF, Settled
from crossfade.stores.errors import Unanswered
from crossfade.values import id_to_text

from .conftest import BOTH_PRIMARIES, MONGO_PHASES, PATIENCE, eventually, requests_entity
from .test_rollback_both import leave_open

ROLLBACK = FailureStrategy.ROLLBACK_BOTH


@pytest.fixture
def open_friends(open_world):
    """A worker that knows users and friend requests."""

    async def open_(phase="dual_write", **how):
        return await open_world(phase, others=[requests_entity()], **how)

    return open_


async def asked(w):
    """Ann has asked Bob: (request, Ann, Bob)."""
    ann = (await w.users.insert({"username": "Ann", "friends": []})).id
    bob = (await w.users.insert({"username": "Bob", "friends": [ObjectId()], "__v": 3})).id
    made = await w.m["friend_requests"].insert({"sender": ann, "receiver": bob, "status": "pending"})
    return made.id, ann, bob


async def accept(w, request, ann, bob, strategy=None):
    async with w.m.operation("Friend Accept", strategy=strategy) as op:
        op.update("friend_requests", request, {"status": "accepted"}, where={"status": "pending"})
        op.also("users", ann, {"n": 1}, add={"friends": [bob]})
        op.also("users", bob, add={"friends": [ann]})
    return op.result


async def with_an_operation_owed(open_friends, postgres_proxy):
    """A worker, and (request, Ann, Bob): PostgreSQL, which answers again, has nothing of what was accepted."""
    w = await open_friends(postgres=postgres_proxy)
    ids = await asked(w)
    await w.settle()
    postgres_proxy.refuse()
    await accept(w, *ids)
    postgres_proxy.pass_through()
    await w.postgres_answers()
    return w, ids


async def withdraw(w, request, ann, bob, strategy=None):
    async with w.m.operation("Friend Withdraw", strategy=strategy) as op:
        op.delete("friend_requests", request)
        op.also("users", ann, {"n": 7})
        op.also("users", bob, {"n": 8})


async def found(w, request, ann, bob):
    """(status, Ann and Bob are friends, as each of them has it), by the worker's own reads."""
    status = (await w.m["friend_requests"].get(request)).document["status"]
    of_ann = (await w.users.get(ann)).document["friends"]
    of_bob = (await w.users.get(bob)).document["friends"]
    return status, bob in of_ann, ann in of_bob


async def assert_all_equal(w):
    await w.assert_equal()
    assert w.documents.count_documents({f"{CF}.steps": {"$exists": True}}) == 0
    other = w.documents.database["friendrequests"]
    assert other.count_documents({f"{CF}.steps": {"$exists": True}}) == 0
    stored = {id_to_text(d["_id"]): d["status"] for d in other.find()}
    assert dict(w.sql("SELECT id, status FROM friend_requests")) == stored


STRATEGIES = [
    *((phase, strategy) for phase in BOTH_PRIMARIES for strategy in (None, ROLLBACK)),
    ("mongo_only", None),
]


@pytest.mark.parametrize(("phase", "strategy"), STRATEGIES)
async def test_accepting_a_request_makes_two_friends(open_friends, phase, strategy):
    w = await open_friends(phase)
    ids = await asked(w)
    done = await accept(w, *ids, strategy)
    assert done.document["status"] == "accepted"
    assert await found(w, *ids) == ("accepted", True, True)
    ann, bob = await w.users.get(ids[1]), await w.users.get(ids[2])
    assert ann["n"] == 1
    assert bob["__v"] == 4, "Mongoose is told that an array has changed"
    await w.settle()
    if phase != "mongo_only":
        await assert_all_equal(w)
    for document in w.documents.find():
        assert "done" not in document[CF] or document[CF]["done"] == []


@pytest.mark.parametrize(("phase", "strategy"), STRATEGIES)
async def test_a_request_that_is_no_longer_pending_changes_nobody(open_friends, phase, strategy):
    w = await open_friends(phase)
    ids = await asked(w)
    await w.m["friend_requests"].update(ids[0], {"status": "rejected"})
    with pytest.raises(ConditionNotMet, match="status"):
        await accept(w, *ids, strategy)
    assert await found(w, *ids) == ("rejected", False, False)


@pytest.mark.parametrize("strategy", [None, ROLLBACK])
async def test_a_step_waits_for_an_open_delete_that_may_be_undone(open_friends, strategy):
    w = await open_friends()
    ids = await asked(w)
    await w.settle()
    await leave_open(w, "delete", ids[1])
    accepting = asyncio.create_task(accept(w, *ids, strategy))
    await asyncio.wait({accepting}, timeout=0.3)
    assert not accepting.done()
    image = await w.image(ids[1])
    assert await w.settler.undo(w.entity, image, w.control) is Settled.CONFIRMED
    await accepting
    assert await found(w, *ids) == ("accepted", True, True)
    await w.reconcile()
    await assert_all_equal(w)


@pytest.mark.parametrize("phase", BOTH_PRIMARIES)
async def test_of_two_who_accept_at_once_one_does(open_friends, phase):
    w = await open_friends(phase)
    ids = await asked(w)
    told = await asyncio.gather(*(accept(w, *ids) for _ in range(4)), return_exceptions=True)
    assert sum(not isinstance(answer, BaseException) for answer in told) == 1, told
    assert {type(answer) for answer in told if isinstance(answer, BaseException)} == {ConditionNotMet}
    await w.settle()
    assert await found(w, *ids) == ("accepted", True, True)
    assert (await w.users.get(ids[2]))["__v"] == 4
    await assert_all_equal(w)


@pytest.mark.parametrize("phase", BOTH_PRIMARIES)
@pytest.mark.parametrize("strategy", [None, ROLLBACK])
async def test_a_friend_who_is_gone_has_nothing_to_take(open_friends, phase, strategy):
    w = await open_friends(phase)
    request, ann, bob = await asked(w)
    await w.users.delete(ann)
    await accept(w, request, ann, bob, strategy)
    assert await w.users.get(ann) is None
    assert ann in (await w.users.get(bob))["friends"]
    await w.settle()
    await assert_all_equal(w)


@pytest.mark.parametrize("phase", MONGO_PHASES)
@pytest.mark.parametrize("taken", [0, 1, 2])
async def test_who_finds_a_decided_operation_carries_it_out(open_friends, phase, taken):
    """The writer dies after so many of the steps."""
    w = await open_friends(phase)
    ids = await asked(w)
    await w.settle()
    die_after(w, taken)
    with pytest.raises(Died):
        await accept(w, *ids)
    other = await open_friends(phase)
    await other.reconcile()
    assert await found(other, *ids) == ("accepted", True, True)
    assert (await other.users.get(ids[2]))["__v"] == 4, "the step was taken once"
    await assert_all_equal(other)


@pytest.mark.parametrize("taken", [0, 1, 2])
@pytest.mark.parametrize("how", ["reconcile", "prepare"])
async def test_what_was_decided_in_phase_0_is_carried_out_before_phase_1(open_friends, how, taken):
    w = await open_friends("mongo_only")
    ids = await asked(w)
    die_after(w, taken)
    with pytest.raises(Died):
        await accept(w, *ids)
    other = await open_friends("mongo_only")
    await (other.m.prepare() if how == "prepare" else other.m.reconciler.reconcile())
    assert await found(other, *ids) == ("accepted", True, True)
    assert (await other.users.get(ids[2]))["__v"] == 4, "the step was taken once"
    for document in other.documents.find():
        assert "done" not in document[CF] or document[CF]["done"] == []


@pytest.mark.parametrize("taken", [0, 1, 2])
async def test_what_a_worker_that_was_still_in_phase_0_had_decided_is_carried_out_although_it_was_copied(
    open_friends, taken
):
    """It died before it heard of phase 1; a backfill came by before the full pass."""
    w = await open_friends("mongo_only")
    await w.m.prepare()
    ids = await asked(w)
    die_after(w, taken)
    with pytest.raises(Died):
        await accept(w, *ids)
    other = await open_friends("mongo_only")
    await other.set_phase("dual_write", dual_epoch=2)
    for entity in other.m.entities.values():
        async for image in other.mongo.scan(entity, batch=10, timeout=PATIENCE):
            rows = entity.to_rows(image.document, image.keys)
            await other.postgres.apply(
                [(entity, image, rows)],
                migration="accounts", epoch=other.control.epoch, timeout=PATIENCE,
            )  # fmt: skip
    await other.m.reconciler.full_sweep()
    assert await found(other, *ids) == ("accepted", True, True)
    await other.reconcile()
    await assert_all_equal(other)


async def test_a_step_that_mongo_refuses_in_phase_0_does_not_keep_a_migration_there(open_friends):
    w = await open_friends("mongo_only")
    await w.m.prepare()
    request, ann, bob = await asked(w)
    await w.users.insert({"username": "Eve", "n": 1})
    w.documents.create_index("n", unique=True, sparse=True)
    with pytest.raises(OutcomeUnknown, match="carried out"):
        await accept(w, request, ann, bob)
    await w.m.prepare()
    await w.set_phase("dual_write")
    await w.m.reconciler.full_sweep()
    [parked] = [debt for debt in await w.owed() if debt.parked]
    assert parked.id == request
    w.documents.drop_index("n_1")
    await w.reconcile(retry_parked=True)
    assert await found(w, request, ann, bob) == ("accepted", True, True)
    await assert_all_equal(w)


async def test_a_decided_operation_is_carried_out_in_mongo_although_postgres_is_away(
    open_friends, postgres_proxy
):
    w = await open_friends()
    ids = await asked(w)
    await w.settle()
    die_after(w, 1)
    postgres_proxy.refuse()
    with pytest.raises(Died):
        await accept(w, *ids)
    other = await open_friends(postgres=postgres_proxy, background=True)

    async def carried_out():
        return await found(other, *ids) == ("accepted", True, True)

    await eventually(carried_out, timeout=10)
    postgres_proxy.pass_through()
    await other.postgres_answers()
    await other.reconcile()
    await assert_all_equal(other)


async def test_a_step_that_mongo_refuses_is_parked_with_its_cause_and_shown(open_friends):
    w = await open_friends()
    request, ann, bob = await asked(w)
    await w.users.insert({"username": "Eve", "n": 1})
    w.documents.create_index("n", unique=True, sparse=True)  # a rule that only MongoDB has
    with pytest.raises(OutcomeUnknown, match="carried out"):
        await accept(w, request, ann, bob)
    await w.m.reconciler.reconcile(wait_for_open=False)
    [debt] = await w.owed()
    assert debt.id == request
    assert "unique" in debt.parked
    w.documents.drop_index("n_1")
    await w.reconcile(retry_parked=True)
    assert await found(w, request, ann, bob) == ("accepted", True, True)
    await assert_all_equal(w)


async def test_a_record_whose_operation_another_one_refuses_is_not_brought_again_and_again(open_friends):
    """It has taken its step, and its mark stands as long as the other step does: its debt with it."""
    w = await open_friends()
    request, ann, bob = await asked(w)
    await w.users.insert({"username": "Eve", "n": 1})
    await w.settle()
    w.documents.create_index("n", unique=True, sparse=True)
    op = w.m.operation("Friend Accept")
    op.update("friend_requests", request, {"status": "accepted"})
    op.also("users", bob, add={"friends": [ann]})
    op.also("users", ann, {"n": 1}, add={"friends": [bob]})
    with pytest.raises(OutcomeUnknown, match="carried out"):
        await op.__aexit__(None, None, None)
    async with asyncio.timeout(PATIENCE):
        done = await w.m.reconciler.reconcile()
    assert (done.settled, done.parked) == (0, 2)
    w.documents.drop_index("n_1")
    await w.reconcile(retry_parked=True)
    assert await found(w, request, ann, bob) == ("accepted", True, True)
    await assert_all_equal(w)


async def test_a_step_that_waited_for_an_open_write_in_vain_is_taken_once_that_is_taken_back(open_friends):
    """By the same reconciler, which does not rest as over what is refused."""
    w = await open_friends()
    ids = await asked(w)
    await w.settle()
    die_after(w, 0)
    with pytest.raises(Died):
        await accept(w, *ids)
    dying = await open_friends()

    async def die(*_write):
        raise Died

    dying.m.writer.mongo._confirm = die
    with pytest.raises(Died):
        await dying.users.update(ids[1], {"n": 9}, strategy=ROLLBACK)
    other = await open_friends(background=True, primary_deadline=0.5, tentative=1.0)

    async def carried_out():
        return await found(other, *ids) == ("accepted", True, True)

    await eventually(carried_out, timeout=10)
    assert (await other.users.get(ids[1]))["n"] == 1


@pytest.mark.parametrize("phase", MONGO_PHASES)
@pytest.mark.parametrize("taken", [0, 1, 2])
async def test_an_open_operation_whose_writer_died_is_taken_back_everywhere(open_friends, phase, taken):
    w = await open_friends(phase)
    ids = await asked(w)
    await w.settle()
    die_after(w, taken)
    with pytest.raises(Died):
        await accept(w, *ids, ROLLBACK)
    other = await open_friends(phase)
    await other.reconcile()
    assert await found(other, *ids) == ("pending", False, False)
    assert "n" not in (await other.users.get(ids[1])).document
    await assert_all_equal(other)


@pytest.mark.parametrize("taken", [0, 1, 2])
async def test_an_open_operation_from_before_a_step_back_to_phase_0_is_taken_back_there(open_friends, taken):
    w = await open_friends()
    ids = await asked(w)
    await w.settle()
    die_after(w, taken)
    with pytest.raises(Died):
        await accept(w, *ids, ROLLBACK)
    other = await open_friends()
    await other.set_phase("mongo_only")
    await other.m.reconciler.reconcile()
    assert await found(other, *ids) == ("pending", False, False)
    await other.set_phase("dual_write")
    await other.reconcile()
    await assert_all_equal(other)


async def test_who_comes_late_does_not_take_a_step_again(open_friends):
    """A reconciler read the steps, slept, and wakes after the friends have parted."""
    w = await open_friends()
    ids = await asked(w)
    request, ann, bob = ids
    die_after(w, 0)
    with pytest.raises(Died):
        await accept(w, *ids)
    late = await open_friends()
    anchor = await late.m.pair.mongo.read(requests_entity(), request, timeout=PATIENCE)
    assert anchor.steps is not None
    other = await open_friends()
    await other.reconcile()
    await other.users.update(ann, {"friends": []})
    await other.users.update(bob, {"friends": []})
    await late.m.settler.roll_forward(
        late.m.entities["friend_requests"], anchor, late.m.control, ends=boot_clock() + PATIENCE
    )
    assert (await other.users.get(ann))["friends"] == []
    assert (await other.users.get(bob))["friends"] == []
    await other.settle()
    await assert_all_equal(other)


async def test_a_record_that_is_made_anew_does_not_take_again_a_step_that_the_deleted_one_had_taken(
    open_friends,
):
    """The steps still stand, because another record refuses its own."""
    w = await open_friends()
    request, ann, bob = await asked(w)
    await w.users.insert({"username": "Eve", "n": 1})
    w.documents.create_index("n", unique=True, sparse=True)
    op = w.m.operation("Friend Accept")
    op.update("friend_requests", request, {"status": "accepted"})
    op.also("users", bob, add={"friends": [ann]})
    op.also("users", ann, {"n": 1}, add={"friends": [bob]})
    with pytest.raises(OutcomeUnknown, match="carried out"):
        await op.__aexit__(None, None, None)
    assert ann in w.document(bob)["friends"]
    for _ in range(2):
        await w.users.delete(bob)
        await w.users.insert({"_id": bob, "username": "Bob", "friends": []})
    w.documents.drop_index("n_1")
    await w.reconcile(retry_parked=True)
    assert bob in (await w.users.get(ann))["friends"]
    assert (await w.users.get(bob))["friends"] == []
    await assert_all_equal(w)


@pytest.mark.parametrize("phase", BOTH_PRIMARIES)
async def test_both_stores_or_neither(open_friends, postgres_proxy, mongo_proxy, phase):
    broken = {"postgres_primary": {"mongo": mongo_proxy}}.get(phase, {"postgres": postgres_proxy})
    w = await open_friends(phase, **broken)
    ids = await asked(w)
    await w.settle()
    [proxy] = broken.values()
    proxy.refuse()
    with pytest.raises(Undone):
        await accept(w, *ids, ROLLBACK)
    proxy.pass_through()
    await w.postgres_answers()
    await w.reconcile()
    assert await found(w, *ids) == ("pending", False, False)
    await assert_all_equal(w)


@pytest.mark.parametrize("phase", BOTH_PRIMARIES)
async def test_a_dead_secondary_is_owed_all_of_it(open_friends, postgres_proxy, mongo_proxy, phase):
    broken = {"postgres_primary": {"mongo": mongo_proxy}}.get(phase, {"postgres": postgres_proxy})
    w = await open_friends(phase, **broken)
    ids = await asked(w)
    await w.settle()
    [proxy] = broken.values()
    proxy.refuse()
    await accept(w, *ids)
    assert await found(w, *ids) == ("accepted", True, True)
    assert len(await w.owed()) == 3
    proxy.pass_through()
    await w.postgres_answers()
    await w.reconcile()
    assert await found(w, *ids) == ("accepted", True, True)
    await assert_all_equal(w)


async def one_of_them_is_written(w, ids):
    await w.users.update(ids[1], {"n": 7})


async def one_of_them_is_written_and_that_taken_back(w, ids):
    with pytest.raises(Undone):
        await w.users.update(ids[1], {"n": 7}, strategy=ROLLBACK)


async def one_of_them_takes_an_open_step_that_is_taken_back(w, ids):
    other = await w.users.insert({"username": "Cid"})
    with pytest.raises(Undone):
        await like(w, other.id, ids[1], ROLLBACK)


async def like(w, one, other, strategy=None):
    async with w.m.operation("Like", strategy=strategy) as op:
        op.update("users", one, {"n": 1})
        op.also("users", other, {"n": 7})


async def one_of_them_is_lifted(w, ids):
    assert await w.settler.lift(w.entity, ids[1], above=50, control=w.control) is not None


@pytest.mark.parametrize(
    "meanwhile",
    [
        one_of_them_is_written,
        one_of_them_is_written_and_that_taken_back,
        one_of_them_takes_an_open_step_that_is_taken_back,
        one_of_them_is_lifted,
    ],
)
async def test_postgres_never_shows_half_of_an_operation(open_friends, postgres_proxy, meanwhile):
    """Owed by three documents, brought by a reconciler that may begin with any of them."""
    w = await open_friends(postgres=postgres_proxy)
    ids = await asked(w)
    await w.settle()
    postgres_proxy.refuse()
    await accept(w, *ids)
    await meanwhile(w, ids)
    postgres_proxy.pass_through()
    await w.postgres_answers()
    looks = halves_seen(w, ids)
    await w.settler.settle_one(w.entity, ids[1], w.control)  # as if it had begun with this one
    await w.reconcile()
    assert set(looks) == {3}
    await assert_all_equal(w)


async def test_a_step_whose_record_keeps_an_open_write_that_cannot_be_taken_back_is_parked(open_friends):
    """Nothing ends that by itself, so a person is shown it, and nobody waits for it again and again."""
    w = await open_friends(primary_deadline=0.5, tentative=0.5)
    ids = await asked(w)
    await w.settle()
    die_after(w, 0)
    with pytest.raises(Died):
        await accept(w, *ids)
    dying = await open_friends()
    w.documents.create_index("n", unique=True, sparse=True)
    await dying.users.update(ids[1], {"n": 1})

    async def die(*_write):
        raise Died

    dying.m.writer.mongo._confirm = die
    with pytest.raises(Died):
        await dying.users.update(ids[1], {"n": 9}, strategy=ROLLBACK)
    w.documents.insert_one({"username": "Eve", "n": 1})
    other = await open_friends(primary_deadline=0.5, tentative=0.5)
    for _ in range(2):
        done = await other.m.reconciler.reconcile()
    assert (done.open, done.parked) == (0, 2)
    request = w.documents.database["friendrequests"].find_one({"_id": ids[0]})
    assert "open" in request[CF]["debt"]["parked"]
    w.documents.delete_one({"username": "Eve"})
    for _ in range(2):
        await other.reconcile(retry_parked=True)
    assert await found(other, *ids) == ("accepted", True, True)
    await assert_all_equal(other)


async def test_what_one_of_an_operation_writes_openly_holds_the_others_off_postgres_until_its_outcome(
    open_friends, postgres_proxy
):
    w, ids = await with_an_operation_owed(open_friends, postgres_proxy)
    dying = await open_friends()
    die_after(dying, 0)
    with pytest.raises(Died):
        await dying.users.update(ids[1], {"n": 7}, strategy=ROLLBACK)
    looks = halves_seen(w, ids)
    assert await w.settler.settle_one(w.entity, ids[2], w.control) is Settled.OPEN
    await w.reconcile()  # an open write past its deadline is taken back
    assert set(looks) == {3}
    assert (await w.users.get(ids[1]))["n"] == 1
    await assert_all_equal(w)


async def test_a_step_that_was_taken_waits_for_the_others_before_postgres_gets_it(open_friends):
    w = await open_friends()
    ids = await asked(w)
    await w.settle()
    die_after(w, 1)
    with pytest.raises(Died):
        await accept(w, *ids)
    other = await open_friends()
    looks = halves_seen(other, ids)
    assert await other.settler.settle_one(other.entity, ids[1], other.control) is Settled.OPEN
    await other.reconcile()
    assert set(looks) == {3}
    await assert_all_equal(other)


@pytest.mark.parametrize("first", ["the record that decided", "a step"])
async def test_an_operation_is_taken_back_in_one_transaction_of_postgres(open_friends, first):
    """Its writer brought it, and died before it was confirmed."""
    w = await open_friends()
    ids = await asked(w)
    await w.settle()

    async def dying(*_write):
        raise Died

    w.m.writer.mongo._confirm = dying
    with pytest.raises(Died):
        await accept(w, *ids, ROLLBACK)
    other = await open_friends()
    looks = halves_seen(other, ids)
    entity, id_ = (
        (other.entity, ids[1]) if first == "a step" else (other.m.entities["friend_requests"], ids[0])
    )
    await other.settler.settle_one(entity, id_, other.control, undo_tentative=True)
    await other.reconcile()
    assert set(looks) == {0}
    await assert_all_equal(other)


async def test_a_record_that_is_brought_anew_brings_all_of_an_operation_that_is_still_owed(
    open_friends, postgres_proxy
):
    w, ids = await with_an_operation_owed(open_friends, postgres_proxy)
    looks = halves_seen(w, ids)
    assert await w.settler.bring_anew(w.entity, ids[1], w.control) is Settled.CONFIRMED
    assert set(looks) == {3}
    await assert_all_equal(w)


async def test_a_record_of_two_operations_that_are_still_owed_brings_all_of_both(
    open_friends, postgres_proxy
):
    w = await open_friends(postgres=postgres_proxy)
    request, ann, bob = await asked(w)
    cid = (await w.users.insert({"username": "Cid"})).id
    await w.settle()
    postgres_proxy.refuse()
    await accept(w, request, ann, bob)
    await like(w, cid, bob)
    postgres_proxy.pass_through()
    await w.postgres_answers()
    looks = halves_seen(w, (request, ann, bob))
    assert await w.settler.settle_one(w.entity, ann, w.control) is Settled.CONFIRMED
    assert set(looks) == {3}
    assert [(await w.row(id_)).document["n"] for id_ in (cid, bob)] == [1, 7]
    assert await w.owed() == ()
    await assert_all_equal(w)


@pytest.mark.parametrize("strategy", [None, ROLLBACK])
async def test_an_operation_upon_a_record_that_is_still_owed_with_others_brings_those_too(
    open_friends, postgres_proxy, strategy
):
    w = await open_friends(postgres=postgres_proxy)
    ids = await asked(w)
    cid = (await w.users.insert({"username": "Cid"})).id
    await w.settle()
    postgres_proxy.refuse()
    await accept(w, *ids)
    postgres_proxy.pass_through()
    await w.postgres_answers()
    w.m.pair.postgres_breaker.succeeded()
    looks = halves_seen(w, ids)
    await like(w, cid, ids[1], strategy)
    assert set(looks) == {3}
    await w.reconcile()
    await assert_all_equal(w)


def halves_seen(w, ids):
    """After each transaction of this worker's: how much of the accepted request PostgreSQL shows, 3 is all of it."""
    looks = []
    applied = w.m.pair.postgres.apply

    async def watched(*args, **how):
        answer = await applied(*args, **how)
        [(look,)] = w.sql(
            "SELECT (SELECT count(*) FROM friend_requests WHERE status = 'accepted')"
            " + (SELECT count(*) FROM user_friends WHERE friend_id IN (%s, %s))",
            *(id_to_text(id_) for id_ in ids[1:]),
        )
        looks.append(look)
        return answer

    w.m.pair.postgres.apply = watched
    return looks


async def test_an_operation_is_taken_back_in_time_while_postgres_is_silent(open_friends, postgres_proxy):
    """Its caller waits for the deadlines of a secondary, not for those of a primary."""
    w = await open_friends(postgres=postgres_proxy, primary_deadline=PATIENCE)
    ids = await asked(w)
    await w.settle()
    postgres_proxy.swallow_answers()
    async with asyncio.timeout(PATIENCE / 2):
        with pytest.raises(Undone):
            await accept(w, *ids, ROLLBACK)
    assert await found(w, *ids) == ("pending", False, False)
    postgres_proxy.pass_through()
    await w.postgres_answers()
    await w.reconcile()
    await assert_all_equal(w)


async def test_an_operation_whose_steps_are_not_taken_back_yet_is_not_told_as_undone(
    open_friends, postgres_proxy, monkeypatch
):
    """The undo of the record that decides is made and not answered, so nobody has come to the steps."""
    w = await open_friends(postgres=postgres_proxy)
    ids = await asked(w)
    await w.settle()
    postgres_proxy.refuse()
    change = w.mongo.compare_and_set

    async def unheard(entity, id_, **how):
        image = await change(entity, id_, **how)
        if id_ == ids[0] and image is not None and not image.is_open:
            raise Unanswered("mongo", "no answer")
        return image

    monkeypatch.setattr(w.mongo, "compare_and_set", unheard)
    with pytest.raises(UndoPending):
        await accept(w, *ids, ROLLBACK)
    assert ids[2] in w.document(ids[1])["friends"]
    monkeypatch.undo()
    postgres_proxy.pass_through()
    await w.postgres_answers()
    await w.reconcile()
    assert await found(w, *ids) == ("pending", False, False)
    await assert_all_equal(w)


async def test_an_operation_is_not_told_as_made_while_its_outcome_stands_in_one_record_alone(
    open_friends, monkeypatch
):
    """It is confirmed where it was decided; then another application deletes that record."""
    w = await open_friends()
    ids = await asked(w)
    await w.settle()

    async def unanswered(*_step, **_how):
        raise Unanswered("mongo", "no answer")

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(w.mongo, "close_step", unanswered)
        with pytest.raises(OutcomeUnknown):
            await accept(w, *ids, ROLLBACK)
    w.documents.database["friendrequests"].delete_one({"_id": ids[0]})
    await w.reconcile()
    assert ids[2] not in (await w.users.get(ids[1]))["friends"]


async def test_an_operation_with_a_step_that_may_yet_arrive_is_not_told_as_undone(open_friends, monkeypatch):
    w = await open_friends(primary_deadline=0.5)
    ids = await asked(w)
    await w.settle()
    change = w.mongo.compare_and_set
    requests = []

    async def delayed(entity, id_, **how):
        if id_ == ids[2]:
            requests.append((entity, id_, how))
            await asyncio.sleep(0.2)
            raise Unanswered("mongo", "no answer")
        return await change(entity, id_, **how)

    monkeypatch.setattr(w.mongo, "compare_and_set", delayed)
    with pytest.raises(UndoPending):
        await accept(w, *ids, ROLLBACK)
    monkeypatch.undo()
    entity, id_, how = requests[0]
    assert (await change(entity, id_, **how)).is_open
    await w.reconcile()
    assert await found(w, *ids) == ("pending", False, False)
    await assert_all_equal(w)


async def test_an_open_step_holds_other_writers_of_its_record(open_friends):
    w = await open_friends(tentative=30.0)
    ids = await asked(w)
    die_after(w, 2)
    with pytest.raises(Died):
        await accept(w, *ids, ROLLBACK)
    other = await open_friends(primary_deadline=0.5)
    with pytest.raises(Busy):
        await other.users.update(ids[1], {"n": 5})


async def test_an_open_write_leaves_the_steps_of_an_earlier_operation_alone(open_friends):
    w = await open_friends()
    request, ann, bob = await asked(w)
    die_after(w, 1)
    with pytest.raises(Died):
        await accept(w, request, ann, bob)
    other = await open_friends()
    await other.m["friend_requests"].update(request, {"note": "seen"}, strategy=ROLLBACK)
    await other.reconcile()
    assert await found(other, request, ann, bob) == ("accepted", True, True)
    await assert_all_equal(other)


async def test_a_record_that_owes_steps_is_not_deleted_before_they_are_taken(open_friends):
    w = await open_friends()
    ids = await asked(w)
    die_after(w, 1)
    with pytest.raises(Died):
        await accept(w, *ids)
    other = await open_friends()
    await other.m["friend_requests"].delete(ids[0])
    await other.m.board.refresh()
    assert ids[2] in (await other.users.get(ids[1]))["friends"]
    assert ids[1] in (await other.users.get(ids[2]))["friends"]
    await other.reconcile()
    await assert_all_equal(other)


async def test_a_store_that_dies_in_between_leaves_the_outcome_to_the_reconciler(open_friends, mongo_proxy):
    w = await open_friends(mongo=mongo_proxy, primary_deadline=1.0)
    ids = await asked(w)
    await w.settle()
    take = w.m.settler.stepper._take

    async def cut(*args):
        mongo_proxy.refuse()
        return await take(*args)

    w.m.settler.stepper._take = cut
    with pytest.raises(OutcomeUnknown, match="carried out"):
        await accept(w, *ids)
    mongo_proxy.pass_through()
    other = await open_friends()
    await other.reconcile()
    assert await found(other, *ids) == ("accepted", True, True)
    await assert_all_equal(other)


async def test_what_cannot_be_a_step_is_refused_before_anything_is_written(open_friends):
    w = await open_friends()
    _, ann, bob = await asked(w)
    op = w.m.operation("Rename")
    with pytest.raises(ConfigurationError, match="unique rule"):
        op.also("users", ann, {"username": "Anna"})
    with pytest.raises(ConfigurationError, match="no entity"):
        op.also("people", ann, {"n": 1})
    # Decided, they could never be done.
    for odd in ("", "a.b", "$n", "_id", CF, "a\0b"):
        with pytest.raises(ConfigurationError, match="cannot be set"):
            op.also("users", ann, unset=[odd])
        with pytest.raises(ConfigurationError, match="cannot be set"):
            op.also("users", ann, add={odd: [1]})
    for how in ({"unset": ["n"]}, {"add": {"n": [1]}}, {"remove": {"n": [1]}}):
        with pytest.raises(ConfigurationError, match="two ways"):
            op.also("users", ann, {"n": 1}, **how)
    op.also("users", bob, {"n": 1})
    with pytest.raises(ConfigurationError, match="already"):
        op.also("users", bob, {"n": 2})
    with pytest.raises(ConfigurationError, match="no record decides"):
        await op.__aexit__(None, None, None)
    # To MongoDB they are one record, which takes one step of an operation.
    op.also("users", 5, {"n": 1})
    with pytest.raises(ConfigurationError, match="already"):
        op.also("users", Decimal128("5.00"), {"n": 2})
    op.update("users", bob, {"n": 3})
    with pytest.raises(ConfigurationError, match="cannot have a step"):
        await op.__aexit__(None, None, None)
    op = w.m.operation("Rename")
    op.also("users", Decimal128("5.00"), {"n": 1})
    op.update("users", 5, {"n": 3})
    with pytest.raises(ConfigurationError, match="cannot have a step"):
        await op.__aexit__(None, None, None)
    assert "n" not in (await w.users.get(bob)).document


class Died(BaseException):
    """The process ended here."""


def die_after(w, taken):
    """Let the worker die once it has taken so many steps; after both: before PostgreSQL hears of any."""
    left = [taken]

    def dying(work):
        async def once(*args, **how):
            if left[0] == 0:
                raise Died
            left[0] -= 1
            return await work(*args, **how)

        return once

    stepper = w.m.settler.stepper
    stepper._take = dying(stepper._take)
    stepper._take_open = dying(stepper._take_open)
    stepper.erase = w.m.settler.bring_together = dying(None)


@pytest.mark.parametrize("strategy", [None, ROLLBACK])
@pytest.mark.parametrize("phase", BOTH_PRIMARIES)
async def test_a_delete_that_decides_and_its_steps_are_one_transaction_in_postgres(
    open_friends, phase, strategy
):
    w = await open_friends(phase)
    request, ann, bob = await asked(w)
    await w.settle()
    await withdraw(w, request, ann, bob, strategy)
    assert len(made_by(w)) == 1
    assert {(await w.users.get(ann))["n"], (await w.users.get(bob))["n"]} == {7, 8}
    await w.settle()
    await assert_all_equal(w)


@pytest.mark.parametrize("first", ["what was deleted", "what is left"])
async def test_a_delete_that_decided_and_its_steps_are_one_transaction_after_an_outage_too(
    open_friends, postgres_proxy, first
):
    w = await open_friends(postgres=postgres_proxy)
    request, ann, bob = await asked(w)
    await w.settle()
    postgres_proxy.refuse()
    await withdraw(w, request, ann, bob)
    postgres_proxy.pass_through()
    await w.postgres_answers()
    entity, id_ = (
        (w.m.entities["friend_requests"], request) if first == "what was deleted" else (w.entity, ann)
    )
    assert await w.settler.settle_one(entity, id_, w.control) is Settled.CONFIRMED
    assert len(made_by(w)) == 1
    assert await w.owed() == ()
    await assert_all_equal(w)


@pytest.mark.parametrize("first", ["what was deleted", "what is left"])
async def test_a_delete_that_decided_and_whose_document_is_still_there_is_brought_with_its_steps(
    open_friends, postgres_proxy, monkeypatch, first
):
    """Its writer could carry out the steps, and then no more."""
    w = await open_friends(postgres=postgres_proxy)
    request, ann, bob = await asked(w)
    await w.settle()

    async def unanswered(*_record, **_how):
        raise StoreUnavailable("mongo", "no answer")

    postgres_proxy.refuse()
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(w.mongo, "bury", unanswered)
        await withdraw(w, request, ann, bob)
    postgres_proxy.pass_through()
    await w.postgres_answers()
    entity, id_ = (
        (w.m.entities["friend_requests"], request) if first == "what was deleted" else (w.entity, ann)
    )
    assert await w.settler.settle_one(entity, id_, w.control) is Settled.CONFIRMED
    assert len(made_by(w)) == 1
    assert await w.owed() == ()
    await assert_all_equal(w)


async def test_a_record_that_is_made_anew_brings_along_those_it_was_deleted_with(
    open_friends, postgres_proxy
):
    w = await open_friends(postgres=postgres_proxy)
    request, ann, bob = await asked(w)
    await w.settle()
    postgres_proxy.refuse()
    await withdraw(w, request, ann, bob)
    again = {"_id": request, "sender": ann, "receiver": bob, "status": "again"}
    postgres_proxy.pass_through()
    await w.postgres_answers()
    w.m.pair.postgres_breaker.succeeded()
    await w.m["friend_requests"].insert(again)
    assert w.sql("SELECT status FROM friend_requests") == [("again",)]
    assert sorted(w.sql("SELECT n FROM users")) == [(7,), (8,)]
    await w.reconcile()
    await assert_all_equal(w)


async def test_a_record_that_is_deleted_brings_along_those_it_is_still_owed_with(
    open_friends, postgres_proxy
):
    w = await open_friends(postgres=postgres_proxy)
    request, ann, bob = await asked(w)
    await w.settle()
    postgres_proxy.refuse()
    await accept(w, request, ann, bob)
    postgres_proxy.pass_through()
    await w.postgres_answers()
    w.m.pair.postgres_breaker.succeeded()
    await w.users.delete(bob)
    assert len(made_by(w)) == 1
    await w.reconcile()
    await assert_all_equal(w)


def made_by(w):
    """The transactions of PostgreSQL that made what it holds now."""
    return w.sql(
        "SELECT xmin::text FROM users UNION SELECT xmin::text FROM friend_requests"
        " UNION SELECT xmin::text FROM crossfade.tombstones"
    )


async def unreadable(w, id_):
    """A foreign writer leaves bytes in a document that are no text; BSON's drivers cannot give them back."""
    whole = w.documents.with_options(codec_options=CodecOptions(document_class=RawBSONDocument))
    raw = bytes(whole.find_one({"_id": id_}).raw)
    body = raw[4:-1] + b"\x02odd\x00\x03\x00\x00\x00\xff\xfe\x00\x00"
    w.documents.delete_one({"_id": id_})
    w.documents.insert_one(RawBSONDocument((len(body) + 4).to_bytes(4, "little") + body))


def mend(w, id_):
    w.documents.update_one({"_id": id_}, {"$unset": {"odd": ""}})


async def test_a_delivered_insert_that_cannot_be_read_any_more_holds_up_nobody(open_friends):
    w = await open_friends("postgres_primary")
    broken, other = [(await w.users.insert({"username": name})).id for name in ("Ann", "Bob")]
    await w.settle()
    # As a worker leaves them that dies behind the delivery.
    for id_ in (broken, other):
        w.documents.update_one({"_id": id_}, {"$set": {f"{CF}.debt": {"epoch": 1, "delivery": True}}})
    await unreadable(w, broken)
    await w.m.reconciler.reconcile()
    assert w.debt(other) is None


async def test_a_step_upon_a_record_that_cannot_be_read_is_taken_all_the_same(open_friends):
    w = await open_friends()
    request, ann, bob = await asked(w)
    await w.settle()
    await unreadable(w, bob)
    await accept(w, request, ann, bob)
    await w.m.reconciler.reconcile()
    [(quarantined, _)] = w.quarantined()
    assert quarantined == id_to_text(bob)
    mend(w, bob)
    await w.reconcile()
    assert await found(w, request, ann, bob) == ("accepted", True, True)
    assert w.quarantined() == []
    await assert_all_equal(w)


async def test_an_operation_that_could_not_be_taken_back_is_refused_before_it_begins(open_friends):
    w = await open_friends()
    request, ann, bob = await asked(w)
    await w.settle()
    await unreadable(w, bob)
    with pytest.raises(Quarantined):
        await w.users.update(bob, {"n": 5}, strategy=ROLLBACK)
    with pytest.raises(Undone):
        await accept(w, request, ann, bob, ROLLBACK)
    mend(w, bob)
    await w.reconcile()
    assert await found(w, request, ann, bob) == ("pending", False, False)
    await assert_all_equal(w)


async def test_a_record_that_cannot_be_read_is_asked_of_nobody_but_mongo(open_friends):
    """PostgreSQL holds what it was before: whoever reads it there would get that for the truth."""
    w = await open_friends("postgres_read", foreign_writers=True)
    _, _, bob = await asked(w)
    await w.settle()
    await unreadable(w, bob)
    await w.m.reconciler.full_sweep()
    await w.m.board.refresh()
    with pytest.raises(Quarantined):
        await w.users.get(bob)
    with pytest.raises(Quarantined):
        await w.users.update(bob, {"n": 5})
    mend(w, bob)
    await w.reconcile()
    assert (await w.users.update(bob, {"n": 5}))["n"] == 5
    await w.settle()
    await assert_all_equal(w)


async def test_a_slow_mongo_keeps_the_caller_of_an_operation_no_longer_than_that_of_one_write(
    open_friends, monkeypatch
):
    w = await open_friends("postgres_primary")
    there = await asked(w)
    await w.settle()
    deliver, limit = w.settler.deliverer.deliver, w.m.pair.options.secondary_deadline * 4
    begun = []

    async def slowly(owed, control, *, timeout):
        begun.append(owed.entity)
        await asyncio.sleep(limit * 0.6)
        return await deliver(owed, control, timeout=timeout)

    monkeypatch.setattr(w.settler.deliverer, "deliver", slowly)
    await accept(w, *there)
    # The second is still on its way when the time of all is over, and the third is not begun.
    assert begun == ["friend_requests", "users"]
    assert {row[0] for row in w.outbox()} >= {id_to_text(there[1]), id_to_text(there[2])}
    monkeypatch.undo()
    await w.reconcile()
    await assert_all_equal(w)
    assert await found(w, *there) == ("accepted", True, True)


async def test_a_step_does_not_write_over_a_list_that_a_filter_finds_by_its_element(
    open_friends, monkeypatch
):
    """Another application has made one of a single value since the step looked."""
    w = await open_friends()
    one, other = [(await w.users.insert({"username": name, "tags": "a"})).id for name in ("Ann", "Bob")]
    write = w.mongo.compare_and_set

    async def overtaken(entity, id_, **how):
        if id_ == other:
            monkeypatch.setattr(w.mongo, "compare_and_set", write)
            w.documents.update_one({"_id": other}, {"$set": {"tags": ["a"]}})
        return await write(entity, id_, **how)

    monkeypatch.setattr(w.mongo, "compare_and_set", overtaken)
    async with w.m.operation("Tag") as op:
        op.update("users", one, {"n": 1})
        op.also("users", other, add={"tags": ["b"]})
    assert w.document(other)["tags"] == ["a", "b"]
    await w.reconcile()
    await w.assert_equal()


async def test_an_operation_that_others_have_carried_out_before_it_was_answered_is_told_as_made(
    open_friends, monkeypatch
):
    w, other = await open_friends(), await open_friends()
    ids = await asked(w)
    await w.settle()
    compare_and_set, answers = w.mongo.compare_and_set, []

    async def unanswered(entity, id_, **how):
        image = await compare_and_set(entity, id_, **how)
        if image is None or image.id != ids[0] or answers:
            return image
        answers.append(image)
        with pytest.raises(ConditionNotMet):
            await accept(other, *ids)  # comes upon the steps, and carries them out
        raise Unanswered("mongo", "a test")

    monkeypatch.setattr(w.mongo, "compare_and_set", unanswered)
    assert (await accept(w, *ids)).document["status"] == "accepted"
    assert len(answers) == 1
    assert await found(w, *ids) == ("accepted", True, True)
    await w.reconcile()
    await assert_all_equal(w)


async def test_a_step_whose_operation_is_confirmed_between_two_looks_is_not_undone(open_friends, monkeypatch):
    w = await open_friends()
    ids = await asked(w)
    await w.settle()
    outcome, looks = w.settler.stepper.outcome, []

    async def confirmed_behind(note):
        answer = await outcome(note)
        if not looks:
            looks.append(answer[2])
            deciding.set()
            await accepting
        return answer

    deciding, confirm = asyncio.Event(), w.m.reconciler.writer.mongo._confirm

    async def held(*what):
        open_ = await w.image(ids[2])
        monkeypatch.setattr(w.settler.stepper, "outcome", confirmed_behind)
        reconciling.append(
            asyncio.create_task(w.settler.settle_one(w.entity, open_.id, w.control, undo_tentative=True))
        )
        await deciding.wait()
        return await confirm(*what)

    reconciling = []
    monkeypatch.setattr(w.m.reconciler.writer.mongo, "_confirm", held)
    accepting = asyncio.create_task(accept(w, *ids, ROLLBACK))
    await accepting
    assert await reconciling[0] is Settled.OPEN
    assert looks[0].state != "confirmed"
    assert await found(w, *ids) == ("accepted", True, True)
    await w.reconcile()
    await assert_all_equal(w)


async def test_a_number_named_in_two_types_has_one_place_in_its_group(open_world, postgres_proxy):
    """Enough of them are applied by one statement, which takes no record twice."""
    w = await open_world(postgres=postgres_proxy)
    for n in range(1, 8):
        await w.users.insert({"_id": Int64(n), "username": f"u{n}"})
    await w.settle()
    postgres_proxy.refuse()
    for n in range(1, 8):
        async with w.m.operation("Ring") as op:
            op.update("users", n, {"a": n})
            op.also("users", n % 7 + 1, {"b": n})
    postgres_proxy.pass_through()
    await w.postgres_answers()
    placed, _ = await w.settler.with_groups([(w.entity, await w.image(Int64(1)))])
    assert sorted(int(image.id) for _, image in placed) == list(range(1, 8))
    await w.reconcile()
    await w.assert_equal()
