"""Each store's history is fine, and yet the secondary may see A take a name before it has seen B leave it."""

import itertools
import random

import pytest
from bson import ObjectId

from crossfade import DuplicateKey
from crossfade.record import Settled

from .conftest import BOTH_PRIMARIES, World, eventually


async def named(w: World, *names):
    return [(await w.users.insert({"username": name})).id for name in names]


async def rename_chain(w: World):
    """Each takes the name that the one before it has just left."""
    a, b, c, d = await named(w, "a", "b", "c", "d")

    async def story():
        for id_, name in ((d, "e"), (c, "d"), (b, "c"), (a, "b")):
            await w.users.update(id_, {"username": name})

    return story, {a: "b", b: "c", c: "d", d: "e"}


async def swap(w: World):
    a, b = await named(w, "a", "b")

    async def story():
        for id_, name in ((a, "x"), (b, "a"), (a, "b")):
            await w.users.update(id_, {"username": name})

    return story, {a: "b", b: "a"}


async def delete_and_register_anew(w: World):
    [a] = await named(w, "a")
    anew = ObjectId()

    async def story():
        await w.users.delete(a)
        await w.users.insert({"_id": anew, "username": "A"})

    return story, {anew: "A"}


async def a_name_that_goes_round(w: World):
    a, b, c = await named(w, "a", "b", "c")

    async def story():
        for id_, name in ((a, "x"), (c, "a"), (b, "c"), (a, "b")):
            await w.users.update(id_, {"username": name})
        await w.users.delete(c)
        await w.users.update(b, {"username": "A"})

    return story, {a: "b", b: "A"}


STORIES = [rename_chain, swap, delete_and_register_anew, a_name_that_goes_round]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("prepare", STORIES)
async def test_names_change_hands_at_postgres_whatever_order_the_images_arrive_in(
    open_world, postgres_proxy, prepare, seed
):
    w = await open_world("dual_write", postgres=postgres_proxy, foreign_writers=True)
    story, expected = await prepare(w)
    postgres_proxy.refuse()
    await story()
    postgres_proxy.pass_through()
    await w.postgres_answers()
    random.seed(seed)
    await w.reconcile()
    assert dict(w.sql("SELECT id, username FROM users")) == {str(i): name for i, name in expected.items()}
    await w.assert_equal()


async def test_one_image_alone_brings_along_those_that_must_give_way(open_world, postgres_proxy):
    """In every order, one after the other: not by luck of a retry."""
    w = await open_world("dual_write", postgres=postgres_proxy, foreign_writers=True)
    for number, order in enumerate(itertools.permutations(range(3))):
        ids = await named(w, *(f"{letter}{number}" for letter in "abc"))
        postgres_proxy.refuse()
        for who, name in ((2, "d"), (1, "c"), (0, "b")):
            await w.users.update(ids[who], {"username": f"{name}{number}"})
        postgres_proxy.pass_through()
        await w.postgres_answers()
        for who in order:
            settled = await w.settler.settle_one(w.entity, ids[who], w.control)
            assert settled is Settled.CONFIRMED, order
    await w.assert_equal()


@pytest.mark.parametrize("prepare", STORIES)
async def test_names_change_hands_at_mongo_when_postgres_is_primary(open_world, mongo_proxy, prepare):
    w = await open_world("postgres_primary", mongo=mongo_proxy)
    story, expected = await prepare(w)
    mongo_proxy.refuse()
    await story()
    mongo_proxy.pass_through()
    await w.reconcile()
    assert {d["_id"]: d["username"] for d in w.documents.find()} == expected
    # What we moved aside for a moment is no foreign writer's content.
    assert w.conflicts() == []
    await w.assert_equal()


async def test_a_foreign_write_beside_a_name_that_changes_hands_is_journaled(open_world, mongo_proxy):
    w = await open_world("postgres_primary", mongo=mongo_proxy)
    a, b = await named(w, "a", "b")
    mongo_proxy.refuse()
    await w.users.update(b, {"username": "c"})
    await w.users.update(a, {"username": "b"})
    mongo_proxy.pass_through()
    w.documents.update_one({"_id": b}, {"$set": {"n": 99}})
    owed = {debt.id: debt for debt in await w.owed()}
    await w.settler.deliverer.deliver(owed[a], w.control, timeout=5)
    await w.reconcile()
    assert [(store, document["n"]) for store, document in w.conflicts()] == [("mongo", 99)]
    await w.assert_equal()


async def test_a_rule_that_only_postgres_has_is_parked_with_its_cause_and_shown(open_world):
    w = await open_world()
    made = await w.users.insert({"username": "Bob", "n": 1})
    record = await w.users.update(made.id, {"n": 666})
    assert record["n"] == 666  # MongoDB decided
    assert "users_n_allowed" in w.debt(made.id)["parked"]
    assert (await w.row(made.id)).document["n"] == 1
    [debt] = await w.owed()
    assert "users_n_allowed" in debt.parked
    # PostgreSQL answers: it stays readable, but for this record.
    assert w.control.unreadable is None
    # The other records go on.
    other = await w.users.insert({"username": "Eve"})
    await w.reconcile()
    assert await w.row(other.id) is not None


async def test_a_parked_debt_is_not_tried_again_in_a_hot_loop(open_world):
    w = await open_world(parked_retry=60.0)
    made = await w.users.insert({"username": "Bob", "n": 666})
    w.sql("ALTER TABLE users DROP CONSTRAINT users_n_allowed")
    for _ in range(5):
        assert (await w.m.reconciler.reconcile(retry_parked=False)).parked == 1
    assert await w.row(made.id) is None  # it would have gone through: nobody tried
    assert w.debt(made.id)["parked"]


async def test_a_parked_record_is_tried_again_when_it_changes_and_when_a_person_asks(open_world):
    w = await open_world()
    made = await w.users.insert({"username": "Bob", "n": 666})
    await w.users.update(made.id, {"n": 5})
    await w.assert_equal()
    other = await w.users.insert({"username": "Eve", "n": 666})
    w.sql("ALTER TABLE users DROP CONSTRAINT users_n_allowed")
    await w.reconcile(retry_parked=True)
    assert (await w.row(other.id)).document["n"] == 666
    await w.assert_equal()


async def test_a_worker_forgets_when_it_tried_what_is_no_longer_owed(open_world):
    w = await open_world(background=True)
    made = await w.users.insert({"username": "Bob", "n": 666})

    async def rests_at(rev):
        return any(key[2] == rev for key in w.m.reconciler._parked)

    for number in range(3):
        rev = (await w.users.update(made.id, {"other": number})).rev
        await eventually(lambda rev=rev: rests_at(rev))
    await w.users.update(made.id, {"n": 1})

    async def nothing():
        return w.m.reconciler._parked == {}

    await eventually(nothing, timeout=10)


@pytest.mark.parametrize("phase", ["dual_write", "postgres_primary"])
async def test_as_many_parked_debts_as_the_board_shows_keep_no_other_from_being_settled(
    open_world, mongo_proxy, postgres_proxy, phase
):
    w = await open_world(phase, board_limit=3, mongo=mongo_proxy, postgres=postgres_proxy)
    ids = [(await w.users.insert({"username": f"user {n}", "n": n})).id for n in range(6)]
    await w.settle()
    if phase == "postgres_primary":
        w.documents.create_index("n", unique=True, sparse=True)
    for id_ in ids[1:5]:
        await w.users.update(id_, {"n": 666 if phase == "dual_write" else 0})
    if phase == "dual_write":
        await w.set_phase("shadow_read")  # under another epoch: in an index these come behind the others
    proxy = postgres_proxy if phase == "dual_write" else mongo_proxy
    proxy.refuse()
    await w.users.update(ids[5], {"other": 7})
    proxy.pass_through()
    await w.postgres_answers()
    await w.m.reconciler.reconcile(retry_parked=False)
    held = await (w.row(ids[5]) if phase == "dual_write" else w.image(ids[5]))
    assert held.document["other"] == 7


async def test_a_rule_that_only_mongo_has_parks_the_delivery_with_its_cause(open_world):
    w = await open_world("postgres_primary")
    w.documents.create_index("n", unique=True, sparse=True)
    await w.users.insert({"username": "Bob", "n": 1})
    other = await w.users.insert({"username": "Eve", "n": 1})
    assert other["n"] == 1  # PostgreSQL decided
    [(_, _, _, parked)] = w.outbox()
    assert "unique" in parked
    await w.users.update(other.id, {"n": 2})
    await w.assert_equal()


async def test_what_is_owed_of_a_row_that_somebody_deleted_by_hand_is_parked_with_its_cause(
    open_world, mongo_proxy
):
    w = await open_world("postgres_primary", mongo=mongo_proxy)
    made = await w.users.insert({"username": "Bob", "n": 1})
    mongo_proxy.refuse()
    await w.users.update(made.id, {"n": 2})
    mongo_proxy.pass_through()
    w.sql("DELETE FROM users")
    assert (await w.m.reconciler.reconcile(wait_for_open=False)).parked == 1
    [(_, _, _, parked)] = w.outbox()
    assert "deleted" in parked
    assert w.document(made.id)["n"] == 1, "a person decides what becomes of it"
    for _ in range(2):
        assert (await w.m.reconciler.reconcile(retry_parked=False)).parked == 1
    # What the cause tells a person to do.
    await w.users.insert({"_id": made.id, "username": "Bob"})
    await w.users.delete(made.id)
    await w.reconcile()
    assert w.document(made.id) is None
    await w.assert_equal()


@pytest.mark.parametrize("phase", BOTH_PRIMARIES)
async def test_a_name_freed_by_an_unsent_rename_can_be_found_under_both_names(open_world, phase):
    w = await open_world(phase)
    [a] = await named(w, "Ann")
    await w.users.update(a, {"username": "Beth"})
    [b] = await named(w, "ANN")
    assert (await w.users.find_by_key("username", "ann")).id == b
    assert (await w.users.find_by_key("username", "beth")).id == a
    with pytest.raises(DuplicateKey):
        await w.users.update(b, {"username": "bETH"})


# --- keys that collide already ---


async def two_of_a_name_and_a_third(w, mongo_proxy):
    """The oldest Bob, who has the key, another, and one made when the oldest was renamed; MongoDB has neither yet."""
    oldest, other = (w.documents.insert_one({"username": "Bob"}).inserted_id for _ in range(2))
    await w.m.prepare()
    await w.set_phase("dual_write")
    await w.m.reconciler.full_sweep()
    await w.reconcile()
    await w.set_phase("postgres_primary")
    mongo_proxy.refuse()
    await w.users.update(oldest, {"username": "Robert"})
    made = (await w.users.insert({"username": "Bob"})).id
    return oldest, other, made


async def test_a_name_that_two_old_documents_have_is_delivered_once_the_holder_of_its_key_gives_way(
    open_world, mongo_proxy
):
    """The other one, whose key is its own, is in nobody's way."""
    w = await open_world("mongo_only", mongo=mongo_proxy)
    oldest, other, made = await two_of_a_name_and_a_third(w, mongo_proxy)
    mongo_proxy.pass_through()
    owed = {debt.id: debt for debt in await w.owed()}
    assert await w.settler.deliverer.deliver(owed[made], w.control, timeout=5) is Settled.CONFIRMED
    await w.reconcile()
    assert {d["_id"]: d["username"] for d in w.documents.find()} == {
        oldest: "Robert", other: "Bob", made: "Bob",
    }  # fmt: skip
    await w.assert_equal()


async def test_a_name_that_was_just_delivered_is_not_set_aside_for_a_record_of_the_same_name(
    open_world, mongo_proxy
):
    """Whoever delivered it settles it next: nothing would ever bring the name back."""
    w, quick = await open_world("mongo_only", mongo=mongo_proxy), await open_world("mongo_only")
    _, other, made = await two_of_a_name_and_a_third(w, mongo_proxy)
    await w.users.update(other, {"n": 2})
    mongo_proxy.pass_through()
    owed = {debt.id: debt for debt in await quick.owed()}
    settle = quick.postgres.settle

    async def late(entity, id_, rev, op, **how):
        assert w.document(other)["n"] == 2
        await w.settler.deliverer.deliver(owed[made], w.control, timeout=5)
        return await settle(entity, id_, rev, op, **how)

    quick.postgres.settle = late
    assert await quick.settler.deliverer.deliver(owed[other], quick.control, timeout=5) is Settled.CONFIRMED
    await w.reconcile()
    assert w.document(other)["username"] == "Bob"
    await w.assert_equal()


async def test_documents_that_collide_already_are_all_kept_the_oldest_with_the_plain_key(open_world):
    w = await open_world("mongo_only")
    ids = [ObjectId() for _ in range(3)]
    for id_, name in zip(ids, ("Bob", "bob", "BOB"), strict=True):
        w.documents.insert_one({"_id": id_, "username": name})
    prepared = await w.m.prepare()
    assert prepared.colliding == {"username": [("users", ids[1]), ("users", ids[2])]}
    keys = [w.notes(id_)["keys"]["username"] for id_ in ids]
    assert keys[0] == "bob"
    assert len(set(keys)) == 3
    # Again: nothing is left to stamp.
    assert (await w.m.prepare()).colliding == {"username": []}
    await w.set_phase("dual_write")
    await w.m.reconciler.full_sweep()
    await w.assert_equal()
    for id_, name in zip(ids, ("Bob", "bob", "BOB"), strict=True):
        assert (await w.users.find_by_key("username", name)).id == id_
    assert (await w.users.find_by_key("username", "boB")).id == ids[0]
    # A colliding record takes writes like any other, and keeps its key.
    await w.users.update(ids[1], {"n": 1})
    assert w.notes(ids[1])["keys"]["username"] == keys[1]
    await w.assert_equal()
