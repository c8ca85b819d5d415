"""A store that acted and did not say so: the write is decided by repeating it, never guessed, never doubled."""

import asyncio
import copy

import pytest
from bson import ObjectId

from crossfade import Busy, FailureStrategy, NotFound, OutcomeUnknown, StoreUnavailable, Undone, UndoPending
from crossfade.record import new_operation
from crossfade.stores.errors import Unanswered
from crossfade.testing.failure_points import Failure, FailurePoints

from .conftest import PATIENCE, World

ROLLBACK = FailureStrategy.ROLLBACK_BOTH
POINTS = ["cut_before_request", "cut_after_request"]
#: In BSON: that this field goes, as only a confirmation asks.
UNSETS_OPEN = b"\x02_cf.debt.tentative\0"


def command(name: str):
    """A request that carries this MongoDB command."""
    return lambda request: request[26 : 26 + len(name) + 1] == name.encode() + b"\0"


async def insert(w: World, id_, **how):
    return await w.users.insert({"_id": id_, "username": "Bob"}, **how)


async def update(w: World, id_, **how):
    return await w.users.update(id_, {"n": 2}, **how)


async def delete(w: World, id_, **how):
    await w.users.delete(id_, **how)


OPERATIONS = [(insert, "insert"), (update, "findAndModify"), (delete, "findAndModify")]
operations = pytest.mark.parametrize(("operation", "sent"), OPERATIONS, ids=["insert", "update", "delete"])


async def prepared(w: World, operation):
    id_ = ObjectId()
    if operation is not insert:
        await w.users.insert({"_id": id_, "username": "Bob", "n": 1})
        await w.settle()
    return id_


async def check(w: World, id_, operation):
    """The write was made exactly once."""
    await w.reconcile()
    await w.assert_equal()
    if operation is delete:
        assert w.document(id_) is None
        assert w.tombstone_in_postgres(id_) == 2
    else:
        assert w.notes(id_)["rev"] == (1 if operation is insert else 2)
        assert w.document(id_).get("n") == (None if operation is insert else 2)


@pytest.mark.parametrize("strategy", [None, ROLLBACK], ids=["default", "rollback"])
@pytest.mark.parametrize("point", POINTS)
@operations
async def test_a_lost_answer_of_mongo_is_decided_and_the_write_made_once(
    open_world, mongo_proxy, operation, sent, point, strategy
):
    w = await open_world("dual_write", mongo=mongo_proxy)
    id_ = await prepared(w, operation)
    faults = mongo_proxy.counts.faults
    getattr(mongo_proxy, point)(when=command(sent))
    await operation(w, id_, strategy=strategy)
    assert mongo_proxy.counts.faults == faults + 1
    await check(w, id_, operation)


@pytest.mark.parametrize("strategy", [None, ROLLBACK], ids=["default", "rollback"])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("operation", [insert, update, delete])
async def test_a_lost_commit_of_postgres_is_decided_and_the_write_made_once(
    open_world, postgres_proxy, operation, point, strategy
):
    w = await open_world("postgres_primary", postgres=postgres_proxy)
    id_ = await prepared(w, operation)
    getattr(postgres_proxy, point)(when=lambda request: b"COMMIT" in request)
    await operation(w, id_, strategy=strategy)
    assert postgres_proxy.counts.faults == 1
    await check(w, id_, operation)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("phase", ["dual_write", "postgres_primary"])
async def test_a_lost_confirmation_is_decided(open_world, mongo_proxy, postgres_proxy, phase, point):
    w = await open_world(phase, mongo=mongo_proxy, postgres=postgres_proxy, tentative=5.0)
    id_ = await prepared(w, update)
    if phase == "dual_write":
        getattr(mongo_proxy, point)(when=lambda r: command("findAndModify")(r) and UNSETS_OPEN in r)
    else:
        getattr(postgres_proxy, point)(when=lambda r: b"SET tentative = NULL" in r)
    await update(w, id_, strategy=ROLLBACK)
    assert mongo_proxy.counts.faults + postgres_proxy.counts.faults == 1
    await check(w, id_, update)


@operations
async def test_the_outcome_is_unknown_while_mongo_stays_silent_and_both_stores_are_made_equal(
    open_world, mongo_proxy, operation, sent
):
    w = await open_world("dual_write", mongo=mongo_proxy, primary_deadline=1.0)
    id_ = await prepared(w, operation)

    def silence(request):
        if command(sent)(request):
            mongo_proxy._loop.call_soon(setattr, mongo_proxy, "_mode", type(mongo_proxy._mode).SWALLOW)
        return False

    mongo_proxy.cut_before_request(when=silence)
    with pytest.raises(OutcomeUnknown):
        await operation(w, id_)
    mongo_proxy.pass_through()
    # The request did arrive, and nobody was told: so the write stands, in both stores.
    await check(w, id_, operation)


async def test_the_outcome_is_unknown_while_postgres_the_primary_stays_silent(open_world, postgres_proxy):
    w = await open_world("postgres_primary", postgres=postgres_proxy, primary_deadline=1.0)
    id_ = await prepared(w, update)

    def silence(request):
        if b"COMMIT" in request:
            postgres_proxy._loop.call_soon(
                setattr, postgres_proxy, "_mode", type(postgres_proxy._mode).SWALLOW
            )
        return False

    postgres_proxy.cut_before_request(when=silence)
    with pytest.raises(OutcomeUnknown):
        await update(w, id_)
    postgres_proxy.pass_through()
    await w.postgres_answers()
    await check(w, id_, update)


@operations
async def test_a_primary_that_is_down_changes_nothing_and_says_so(open_world, mongo_proxy, operation, sent):
    w = await open_world("dual_write", mongo=mongo_proxy, primary_deadline=1.0)
    id_ = await prepared(w, operation)
    before = w.document(id_)
    mongo_proxy.refuse()
    # An insert goes out without a look before it: it cannot know that no server was reached.
    with pytest.raises((StoreUnavailable, OutcomeUnknown)):
        await operation(w, id_)
    mongo_proxy.pass_through()
    assert w.document(id_) == before
    await w.reconcile()
    await w.assert_equal()


@pytest.mark.parametrize("silent", [False, True], ids=["refuses", "silent"])
@pytest.mark.parametrize("operation", [insert, update, delete])
async def test_a_write_that_postgres_never_heard_of_is_told_as_failed(
    open_world, postgres_proxy, operation, silent
):
    w = await open_world("postgres_primary", postgres=postgres_proxy, primary_deadline=1.0)
    id_ = await prepared(w, operation)
    before = w.document(id_)
    # Nothing is sent to be kept before PostgreSQL has said what there is.
    postgres_proxy.swallow_answers() if silent else postgres_proxy.refuse()
    with pytest.raises(StoreUnavailable):
        await operation(w, id_)
    postgres_proxy.pass_through()
    await w.postgres_answers()
    assert w.document(id_) == before
    await w.reconcile()
    await w.assert_equal()


async def test_a_delete_that_was_made_is_not_told_as_failed_because_postgres_goes_away_before_it_can_say_so(
    open_world, postgres_proxy, monkeypatch
):
    w = await open_world("postgres_primary", postgres=postgres_proxy, primary_deadline=2.0)
    id_ = await prepared(w, delete)
    tombstone = w.postgres.tombstone

    async def tombstone_out_of_reach(*of, **how):
        postgres_proxy.refuse()
        return await tombstone(*of, **how)

    monkeypatch.setattr(w.postgres, "tombstone", tombstone_out_of_reach)
    postgres_proxy.cut_after_request(when=lambda request: b"COMMIT" in request)
    with pytest.raises(OutcomeUnknown):
        await delete(w, id_)
    postgres_proxy.pass_through()
    monkeypatch.undo()
    await check(w, id_, delete)


async def test_a_delete_that_was_made_is_not_told_as_failed_because_mongo_goes_away_before_it_can_say_so(
    open_world, mongo_proxy, monkeypatch
):
    w, other = await open_world("dual_write", mongo=mongo_proxy, primary_deadline=2.0), await open_world()
    id_ = await prepared(w, delete)
    compare_and_set, tombstone = w.mongo.compare_and_set, w.mongo.tombstone

    async def carried_out_by_another(*of, **how):
        if mongo_proxy.counts.faults:
            await other.reconcile()
        return await compare_and_set(*of, **how)

    async def tombstone_out_of_reach(*of, **how):
        mongo_proxy.refuse()
        return await tombstone(*of, **how)

    monkeypatch.setattr(w.mongo, "compare_and_set", carried_out_by_another)
    monkeypatch.setattr(w.mongo, "tombstone", tombstone_out_of_reach)
    mongo_proxy.cut_after_request(when=command("findAndModify"))
    with pytest.raises(OutcomeUnknown):
        await delete(w, id_)
    mongo_proxy.pass_through()
    monkeypatch.undo()
    await check(w, id_, delete)


async def test_a_repeated_write_never_lands_on_a_rivals(open_world, postgres_proxy):
    """Its commit is lost, a rival writes upon it, and then it is repeated: the rival's write must stand."""
    w = await open_world("postgres_primary", postgres=postgres_proxy)
    rival = await open_world("postgres_primary")
    id_ = await prepared(w, update)
    written = asyncio.Event()
    loop = asyncio.get_running_loop()

    def lost(request):
        if b"COMMIT" in request:
            loop.call_soon_threadsafe(written.set)
            return True
        # Held back until the rival has written.
        return False

    postgres_proxy.cut_after_request(when=lost)
    mine = asyncio.create_task(update(w, id_))
    await written.wait()
    async with asyncio.timeout(PATIENCE):
        while (await rival.row(id_)).rev == 1:  # noqa: ASYNC110 - it changes in a server
            await asyncio.sleep(0)
        await rival.users.update(id_, {"n": 3})
    # Either it had seen its own commit before the rival wrote, or it may not say what became of it.
    try:
        await mine
    except OutcomeUnknown:
        pass
    assert (await rival.users.get(id_))["n"] == 3
    assert (await rival.users.get(id_)).rev == 3
    await w.reconcile()
    await w.assert_equal()


async def lose_lease(w, meanwhile=None):
    """The worker's next update is answered when its lease has run out, and ``meanwhile`` has happened."""
    original = w.mongo.compare_and_set

    async def late(*args, **how):
        done = await original(*args, **how)
        if meanwhile is not None:
            await meanwhile()
        while w.m.board.lease_valid:  # noqa: ASYNC110 - time has to pass
            await asyncio.sleep(0.02)
        return done

    await w.m.board.refresh()
    w.mongo.compare_and_set = late


async def test_a_lease_that_ran_out_under_a_write_is_no_matter_while_the_epoch_is_the_same(open_world):
    w = await open_world("dual_write", lease=0.5)
    id_ = await prepared(w, update)
    await lose_lease(w)
    assert (await update(w, id_)).rev == 2
    await check(w, id_, update)


async def test_a_write_under_which_the_phase_changed_has_an_unknown_outcome(open_world):
    w, other = await open_world("dual_write", lease=0.5), await open_world("dual_write")
    id_ = await prepared(w, update)
    await lose_lease(w, meanwhile=lambda: other.set_phase("shadow_read"))
    with pytest.raises(OutcomeUnknown, match="lease"):
        await update(w, id_)
    # It was made, and only the telling was late: both stores have it.
    await check(other, id_, update)


async def test_a_delete_of_nothing_is_not_found_whatever_was_lost(open_world, mongo_proxy):
    w = await open_world("dual_write", mongo=mongo_proxy)
    mongo_proxy.cut_after_request(when=command("find"))
    with pytest.raises((NotFound, StoreUnavailable)):
        await w.users.delete(ObjectId())
    await w.assert_equal()


async def test_an_image_that_commits_late_does_not_outlive_its_undo(open_world):
    """PostgreSQL sits on the COMMIT until the write has been undone, and its client is gone before it looks again."""
    w = await open_world("dual_write", secondary_deadline=0.2)
    points = FailurePoints(w.cf)
    await points.run(lambda: w.users.insert({"username": "Ann"}, strategy=FailureStrategy.ROLLBACK_BOTH))
    [commit] = [point.place for point in points.points if point.call == "COMMIT"]
    await w.settle()  # what goes on behind it would be counted among the next one's calls
    points.plan({commit: Failure.REQUEST_LATE})
    with pytest.raises((Undone, UndoPending)):
        await points.run(lambda: w.users.insert({"username": "Bob"}, strategy=FailureStrategy.ROLLBACK_BOTH))
    await points.deliver_late()
    other = await open_world("dual_write")
    await other.reconcile()
    await other.assert_equal()
    assert other.sql("SELECT username FROM users") == [("Ann",)]


# --- what arrives late, or twice, and what others did meanwhile ------------------------------------------------


def lose_answer(store, name, meanwhile, *, acts=True):
    """The next call of this method is not answered (and, ``acts``, carried out), then ``meanwhile`` happens."""
    original = getattr(store, name)

    async def lost(*args, **how):
        if acts:
            await original(*args, **how)
        setattr(store, name, original)
        await meanwhile()
        raise Unanswered("a store", "the answer was lost")

    setattr(store, name, lost)


@pytest.mark.parametrize("phase", ["dual_write", "postgres_read"])
async def test_an_insert_that_arrives_again_does_not_bring_a_deleted_record_back(open_world, phase):
    w = await open_world(phase)
    made = await w.users.insert({"username": "Bob"})
    late = w.document(made.id)
    late["_cf"]["debt"] = {"epoch": w.control.epoch}
    for _ in range(2):
        await w.settle()
        await w.users.delete(made.id)
        # The second request for it, that its writer had sent in doubt.
        w.documents.insert_one(late)
        await w.reconcile()
        await w.assert_equal()
        assert w.document(made.id) is None
        # Whoever makes the id anew is another one.
        await w.users.insert({"_id": made.id, "username": "Ann"})
    assert (await w.users.get(made.id))["username"] == "Ann"
    await w.settle()
    await w.assert_equal()


@pytest.mark.parametrize("phase", ["mongo_only", "dual_write", "postgres_read"])
async def test_an_insert_that_arrives_again_keeps_nobody_from_making_the_id_anew(open_world, phase):
    """Its record was deleted, and who asks is told so: the id is free."""
    w = await open_world(phase)
    made = await w.users.insert({"username": "Bob"})
    await w.settle()
    late = w.document(made.id)
    await w.users.delete(made.id)
    if phase != "mongo_only":
        late["_cf"]["debt"] = {"epoch": w.control.epoch}
    w.documents.insert_one(late)
    assert (await w.users.insert({"_id": made.id, "username": "Ann"})).rev == 3
    assert w.document(made.id)["username"] == "Ann"
    if phase != "mongo_only":
        await w.reconcile()
        await w.assert_equal()


@pytest.mark.parametrize("phase", ["dual_write", "postgres_read"])
@pytest.mark.parametrize("write", ["insert", "update"])
async def test_an_insert_that_arrives_again_keeps_its_name_from_nobody(open_world, phase, write):
    """Its record was deleted, and nobody sees it."""
    w = await open_world(phase)
    made, other = await w.users.insert({"username": "Bob"}), await w.users.insert({"username": "Ann"})
    await w.settle()
    late = w.document(made.id)
    await w.users.delete(made.id)
    late["_cf"]["debt"] = {"epoch": w.control.epoch}
    w.documents.insert_one(late)
    if write == "insert":
        await w.users.insert({"username": "bob"})
    else:
        await w.users.update(other.id, {"username": "bob"})
    assert w.document(made.id) is None
    await w.reconcile()
    await w.assert_equal()


@pytest.mark.parametrize("deleted_in", ["postgres_primary", "postgres_read"])
async def test_an_insert_that_arrives_again_after_a_switch_and_the_way_back_does_not_bring_a_deleted_record_back(
    open_world, deleted_in
):
    """What PostgreSQL has deleted, or delivered, does not say who had made it."""
    w = await open_world("postgres_read")
    made = await w.users.insert({"username": "Bob"})
    late = w.document(made.id)
    late["_cf"]["debt"] = {"epoch": w.control.epoch}
    await w.settle()
    for phase in ("postgres_primary", "postgres_read"):
        await w.set_phase(phase)
        await w.users.update(made.id, {"n": 1})
        await w.reconcile()
        if phase == deleted_in:
            await w.users.delete(made.id)
            await w.reconcile()
            if phase == "postgres_primary":
                await w.set_phase("postgres_read")
            break
    w.documents.insert_one(late)
    await w.reconcile()
    assert w.document(made.id) is None
    await w.assert_equal()


@pytest.mark.parametrize("phase", ["dual_write", "postgres_read"])
async def test_an_insert_that_arrives_again_is_not_written_upon_by_who_has_read_the_record_before(
    open_world, phase
):
    w = await open_world(phase, board_age=PATIENCE)
    made = await w.users.insert({"username": "Bob"})
    id_, late = made.id, w.document(made.id)
    await w.owed()
    del made
    held = await w.users.get(id_)
    assert held.source == "postgres"
    await w.users.delete(id_)
    late["_cf"]["debt"] = {"epoch": w.control.epoch}
    w.documents.insert_one(late)
    with pytest.raises(NotFound):
        await w.users.update(id_, {"n": 2})
    await w.reconcile()
    await w.assert_equal()
    assert w.document(id_) is None


@pytest.mark.parametrize("phase", ["dual_write", "postgres_read"])
@pytest.mark.parametrize("write", ["update", "operation"])
@pytest.mark.parametrize("settled", [True, False], ids=["settled", "in debt"])
async def test_an_insert_that_arrives_again_behind_the_look_of_a_writer_is_not_written_upon(
    open_world, phase, write, settled, monkeypatch
):
    w, writer = await open_world(phase), await open_world(phase)
    id_, own = (await w.users.insert({"username": "Bob"})).id, (await w.users.insert({"username": "Ann"})).id
    await w.settle()
    late = w.document(id_)
    late["_cf"]["debt"] = {"epoch": w.control.epoch, "sending": new_operation()}
    if not settled:
        owed = {"epoch": w.control.epoch, "sending": new_operation()}
        w.documents.update_one({"_id": id_}, {"$set": {"_cf.debt": owed}})
    compare_and_set, looked = writer.mongo.compare_and_set, []

    async def behind(entity, of, **how):
        if of == id_ and not looked:
            looked.append(of)
            await w.users.delete(id_)
            w.documents.insert_one(late)
        return await compare_and_set(entity, of, **how)

    monkeypatch.setattr(writer.mongo, "compare_and_set", behind)
    if write == "update":
        with pytest.raises(NotFound):
            await writer.users.update(id_, {"n": 2})
    else:
        async with writer.m.operation("Befriend") as op:
            op.update("users", own, {"n": 1})
            op.also("users", id_, {"n": 2})
    assert looked
    await w.reconcile()
    assert w.document(id_) is None
    await w.assert_equal()


@pytest.mark.parametrize("phase", ["mongo_only", "dual_write"])
async def test_a_repeated_insert_does_not_bring_back_what_was_deleted_before_the_repetition(
    open_world, phase
):
    w, other = await open_world(phase), await open_world(phase)
    id_ = ObjectId()
    lose_answer(w.mongo, "insert", lambda: other.users.delete(id_))
    with pytest.raises(OutcomeUnknown):
        await insert(w, id_)
    assert w.document(id_) is None
    if phase != "mongo_only":
        await w.reconcile()
        await w.assert_equal()


def hold(store, name):
    """Let no call of this method through before it is told to."""
    original, go = getattr(store, name), asyncio.Event()

    async def held(*args, **how):
        await go.wait()
        return await original(*args, **how)

    setattr(store, name, held)
    return go


def keep_underway(store, meanwhile=None):
    """The next insert is not answered: its request is still on its way when ``meanwhile`` happens."""
    original, underway = store.insert, []

    async def lost(entity, document, **how):
        underway.append(copy.deepcopy(document))
        store.insert = original
        if meanwhile is not None:
            await meanwhile()
        raise Unanswered("mongo", "no answer")

    store.insert = lost
    return underway


@pytest.mark.parametrize("phase", ["dual_write", "postgres_read", "postgres_primary"])
async def test_what_was_confirmed_of_one_sending_of_an_insert_does_not_settle_another(open_world, phase):
    """The record is deleted before its debt is erased, and then the other sending arrives."""
    w, other = await open_world(phase), await open_world(phase)
    erase = hold(w.mongo, "settle")
    if phase == "postgres_primary":
        made = await w.users.insert({"username": "Bob"})
        # Another worker saw the outbox row, too.
        underway = keep_underway(other.mongo)
        with pytest.raises(StoreUnavailable):
            await other.settler.deliverer._put(
                w.entity, None, None, await w.row(made.id), w.control, timeout=PATIENCE
            )
    else:
        underway = keep_underway(w.mongo)
        made = await w.users.insert({"username": "Bob"})
    await other.users.delete(made.id)
    assert w.document(made.id) is None
    w.documents.insert_one(*underway)
    erase.set()
    await w.settle()
    assert w.notes(made.id)["debt"]
    await w.reconcile()
    assert w.document(made.id) is None
    await w.assert_equal()


@pytest.mark.parametrize(
    ("phase", "lifted"), [("mongo_only", False), ("dual_write", False), ("dual_write", True)]
)
async def test_an_insert_that_arrives_late_is_not_taken_for_the_one_above_the_tombstone(
    open_world, phase, lifted
):
    """The first request arrives once its repetition has been taken back, because a delete overtook it."""
    w, other = await open_world(phase), await open_world(phase)
    id_, remove_echo = ObjectId(), w.mongo.remove_echo

    async def made_and_deleted():
        await other.users.insert({"_id": id_, "username": "Ann"})
        await other.users.delete(id_)

    async def then_it_arrives(*args, **how):
        w.mongo.remove_echo = remove_echo
        taken_back = await remove_echo(*args, **how)
        w.documents.insert_one(*underway)
        if lifted:
            await other.reconcile()
        return taken_back

    underway = keep_underway(w.mongo, meanwhile=made_and_deleted)
    w.mongo.remove_echo = then_it_arrives
    if lifted:
        with pytest.raises(OutcomeUnknown):
            await insert(w, id_)
        assert (await other.users.get(id_))["username"] == "Bob"
    else:
        made = await insert(w, id_)
        assert made.rev == w.notes(id_)["rev"] == 3, "revisions 1 and 2 were told before"
        assert (await other.users.get(id_)).rev == 3
    if phase != "mongo_only":
        await w.reconcile()
        await w.assert_equal()


async def test_a_removal_that_arrives_late_spares_what_was_made_above_the_tombstone(open_world):
    """It was sent for an earlier request of the same insert, and sent again when it was not answered."""
    w, other = await open_world("dual_write"), await open_world("dual_write")
    id_, remove_echo, removals = ObjectId(), w.mongo.remove_echo, []

    async def made_and_deleted():
        await other.users.insert({"_id": id_, "username": "Ann"})
        await other.users.delete(id_)

    async def removes(*args, **how):
        removals.append((args, how))
        if len(removals) == 2:
            raise Unanswered("mongo", "no answer")
        taken_back = await remove_echo(*args, **how)
        if len(removals) == 1:
            w.documents.insert_one(*underway)
        return taken_back

    underway = keep_underway(w.mongo, meanwhile=made_and_deleted)
    w.mongo.remove_echo = removes
    made = await insert(w, id_)
    assert (made.rev, len(removals)) == (3, 3)
    args, how = removals[1]
    await remove_echo(*args, **how)
    assert (await other.users.get(id_)).rev == 3
    await w.reconcile()
    await w.assert_equal()


async def test_a_name_taken_while_an_answer_was_lost_leaves_the_outcome_unknown(open_world):
    """The request may yet arrive, once the name is free again: "taken, nothing changed" would be a promise."""
    w, other = await open_world("dual_write"), await open_world("dual_write")
    id_ = await prepared(w, update)

    def take(name):
        return lambda: other.users.insert({"username": name})

    lose_answer(w.mongo, "compare_and_set", take("Robert"), acts=False)
    with pytest.raises(OutcomeUnknown):
        await w.users.update(id_, {"username": "Robert"})
    lose_answer(w.mongo, "insert", take("Rupert"), acts=False)
    with pytest.raises(OutcomeUnknown):
        await w.users.insert({"username": "Rupert"})
    await w.reconcile()
    await w.assert_equal()


async def test_a_busy_record_does_not_make_a_writer_forget_that_it_may_have_written(open_world):
    w, rival = await open_world("postgres_primary"), await open_world("postgres_primary")
    id_ = await prepared(w, update)

    async def then_busy():
        original = w.postgres.write

        async def busy(*args, **how):
            w.postgres.write = original
            await rival.users.update(id_, {"n": 3})
            raise Busy("another one's open write")

        w.postgres.write = busy

    lose_answer(w.postgres, "write", then_busy)
    with pytest.raises(OutcomeUnknown):
        await update(w, id_)
    assert (await rival.users.get(id_))["n"] == 3
    await w.reconcile()
    await w.assert_equal()


async def test_a_record_that_stays_busy_until_the_deadline_leaves_an_unanswered_write_unknown(open_world):
    w = await open_world("postgres_primary", primary_deadline=1.0)
    id_, original = await prepared(w, update), w.postgres.write

    async def busy_from_now_on():
        async def busy(*args, **how):
            raise Busy("another one's open write")

        w.postgres.write = busy

    lose_answer(w.postgres, "write", busy_from_now_on)
    with pytest.raises(OutcomeUnknown):
        await update(w, id_)
    w.postgres.write = original
    await check(w, id_, update)


async def test_what_others_wrote_upon_an_unanswered_write_is_not_written_over_by_its_repetition(
    open_world, mongo_proxy, monkeypatch
):
    w, other = await open_world(mongo=mongo_proxy), await open_world()
    made = await w.users.insert({"username": "Bob", "n": 1})
    await w.settle()
    again = w.m.writer.mongo._again

    async def overtaken(o, cause):
        """Before the repetition another worker writes upon what the unanswered request wrote."""
        monkeypatch.setattr(w.m.writer.mongo, "_again", again)
        await other.users.update(made.id, {"n": 3}, where={"n": 2})
        await again(o, cause)

    monkeypatch.setattr(w.m.writer.mongo, "_again", overtaken)
    mongo_proxy.cut_after_request(when=command("findAndModify"))
    with pytest.raises(OutcomeUnknown):
        await w.users.update(made.id, {"n": 2})
    assert (w.notes(made.id)["rev"], w.document(made.id)["n"]) == (3, 3)
    await other.reconcile()
    await other.assert_equal()


def keep_update_underway(w, meanwhile):
    """The next update is not answered, then ``meanwhile`` happens; what is given back lets its request arrive."""
    original, underway = w.mongo.compare_and_set, []

    async def lost(*args, **how):
        underway.append((args, copy.deepcopy(how)))
        w.mongo.compare_and_set = original
        meanwhile()
        raise Unanswered("mongo", "no answer")

    async def arrives():
        [(args, how)] = underway
        return await original(*args, **{**how, "timeout": PATIENCE})

    w.mongo.compare_and_set = lost
    return arrives


async def test_a_condition_missed_by_the_repetition_alone_leaves_the_outcome_unknown(open_world):
    """The first request may yet arrive, once the condition holds again."""
    w = await open_world("dual_write")
    made = await w.users.insert({"username": "Bob", "n": 1, "state": "open"})
    await w.settle()

    def another_application_writes(state):
        w.documents.update_one({"_id": made.id}, {"$set": {"state": state}})

    arrives = keep_update_underway(w, lambda: another_application_writes("closed"))
    with pytest.raises(OutcomeUnknown):
        await w.users.update(made.id, {"n": 2}, where={"state": "open"})
    another_application_writes("open")
    assert await arrives() is not None
    await w.reconcile()
    await w.assert_equal()


async def test_what_others_wrote_upon_a_write_that_arrives_between_two_looks_is_not_written_over(
    open_world, monkeypatch
):
    w, other = await open_world("dual_write"), await open_world("dual_write")
    made = await w.users.insert({"username": "Bob", "n": 1, "state": "open"})
    await w.settle()

    def another_application_writes(state):
        w.documents.update_one({"_id": made.id}, {"$set": {"state": state}})

    arrives = keep_update_underway(w, lambda: another_application_writes("closed"))
    look = w.mongo.read_owed

    async def then_it_arrives(*args, **how):
        monkeypatch.setattr(w.mongo, "read_owed", look)
        there = await look(*args, **how)
        another_application_writes("open")
        assert await arrives() is not None
        await other.users.update(made.id, {"n": 3}, where={"n": 2})
        return there

    monkeypatch.setattr(w.mongo, "read_owed", then_it_arrives)
    with pytest.raises(OutcomeUnknown):
        await w.users.update(made.id, {"n": 2}, where={"state": "open"})
    assert (w.notes(made.id)["rev"], w.document(made.id)["n"]) == (3, 3)
    await w.reconcile()
    await w.assert_equal()


async def test_an_unanswered_update_that_the_debt_of_its_record_kept_off_is_made_once_that_has_gone(
    open_world, monkeypatch
):
    """What was just made is written upon as it was seen, if nothing is owed: nobody has written since."""
    w = await open_world("dual_write")
    erase, id_, look = hold(w.mongo, "settle"), ObjectId(), w.mongo.read_owed
    seen = await insert(w, id_)

    async def then_it_is_erased(*args, **how):
        monkeypatch.setattr(w.mongo, "read_owed", look)
        there = await look(*args, **how)
        erase.set()
        return there

    keep_update_underway(w, lambda: monkeypatch.setattr(w.mongo, "read_owed", then_it_is_erased))
    updated = await update(w, id_)
    assert (seen.rev, updated.rev) == (1, 2)
    await check(w, id_, update)
