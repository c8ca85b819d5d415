"""One step after another, in any order that hypothesis thinks of: workers, failures, another application, reconcilers.

The model knows of each record every state that it may be in by what its callers were told. A step is told success: all
of them change. It is refused: none does. Nobody knows: both. Whatever is read is one of them, and so is what both
stores hold at the end, when every debt is settled. What concurrency adds is for the other tests of this folder.

A failing sequence is shortened and printed as a program. ``make soak`` plays many more of them.
"""

import asyncio
import contextlib
import itertools
import os
from dataclasses import replace

import pytest
from bson import ObjectId
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from crossfade import Crossfade, DuplicateKey, FailureStrategy, NotFound, OutcomeUnknown, UndoPending
from crossfade.errors import CrossfadeError
from crossfade.record import CF

from ..protocol.conftest import FAST, PATIENCE, World, create_tables, users_entity

SOAK = int(os.environ.get("SOAK", "0"))
#: Sequences that are played; of at most so many steps.
SEQUENCES = max(12, SOAK // 20)
STEPS = 25
NAMES = ["ann", "Ann", "bob", "cat"]
_numbers = itertools.count()

which = st.integers(0, 2)
fields = st.one_of(
    st.fixed_dictionaries({"n": st.integers(0, 5)}),
    st.fixed_dictionaries({"m": st.integers(0, 5)}),
    st.fixed_dictionaries({"username": st.sampled_from(NAMES)}),
    st.fixed_dictionaries({"username": st.sampled_from(NAMES), "n": st.integers(0, 5)}),
)
strategies = st.sampled_from([None, None, FailureStrategy.ROLLBACK_BOTH])


class Servers:
    """Two workers, one of them behind proxies that fail, in a loop that runs only for a step."""

    def __init__(self, phase, mongo_uri, database_url, mongo_proxy, postgres_proxy):
        self.phase, self.runner = phase, asyncio.Runner()
        self.mongo_proxy, self.postgres_proxy = mongo_proxy, postgres_proxy
        self.primary = postgres_proxy if phase == "postgres_primary" else mongo_proxy
        self.stack = contextlib.AsyncExitStack()
        options = replace(
            FAST, lease=3.0, primary_deadline=1.0, secondary_deadline=0.2, board_age=5.0, tentative=0.05
        )

        async def open_(mongo, postgres):
            cf = Crossfade(
                mongo_uri=mongo, database_url=postgres, initial_phase=phase, options=options, background=False
            )
            migration = cf.migration("accounts", [users_entity()])
            await self.stack.enter_async_context(cf)
            # Known to be young: nobody looks by himself here.
            migration.board.options = replace(options, board_age=0.05)
            return World(cf, migration, users_entity(), None, database_url)

        self.sound = self.run(open_(mongo_uri, database_url))
        self.troubled = self.run(open_(mongo_proxy.uri, postgres_proxy.uri))

    def run(self, work):
        return self.runner.run(work)

    def close(self):
        self.run(self.stack.aclose())
        self.runner.close()


class Machine(RuleBasedStateMachine):
    """Three records."""

    def __init__(self, servers, documents):
        super().__init__()
        self.servers, self.documents = servers, documents
        example = next(_numbers)
        self.name = lambda name: f"{name} {example}"
        self.ids = [ObjectId() for _ in range(3)]
        #: What each record may be; None: it is not there.
        self.may_be = {id_: [None] for id_ in self.ids}
        #: What a reader may be shown besides: of an open write that is to be taken back.
        self.shown = {id_: [] for id_ in self.ids}
        self.foreign = False

    # --- what applications do ---

    @rule(
        i=which, troubled=st.booleans(), strategy=strategies, name=st.sampled_from(NAMES), n=st.integers(0, 5)
    )
    def insert(self, i, troubled, strategy, name, n):
        state = {"username": self.name(name), "n": n}
        self._write(
            self.ids[i], troubled, lambda users: users.insert({"_id": self.ids[i], **state}, strategy=strategy),
            lambda before: state if before is None else before, state["username"],
        )  # fmt: skip

    @rule(i=which, troubled=st.booleans(), strategy=strategies, changes=fields)
    def update(self, i, troubled, strategy, changes):
        if "username" in changes:
            changes = changes | {"username": self.name(changes["username"])}
        self._write(
            self.ids[i], troubled, lambda users: users.update(self.ids[i], changes, strategy=strategy),
            lambda before: None if before is None else before | changes, changes.get("username"),
        )  # fmt: skip

    @rule(i=which, troubled=st.booleans(), changes=fields)
    def update_what_is_held(self, i, troubled, changes):
        """Written upon the record as it was read, without asking for it again."""
        world = self._world(troubled)
        with contextlib.suppress(CrossfadeError):
            held = self.servers.run(world.users.get(self.ids[i]))
            self.update(i, troubled, None, changes)
            del held

    @rule(i=which, troubled=st.booleans(), strategy=strategies)
    def delete(self, i, troubled, strategy):
        self._write(
            self.ids[i],
            troubled,
            lambda users: users.delete(self.ids[i], strategy=strategy),
            lambda _: None,
            None,
        )

    @rule(i=which, n=st.integers(6, 9))
    def another_application_writes(self, i, n):
        if self.servers.phase == "postgres_primary":
            return
        found = self.documents.update_one(
            {"_id": self.ids[i], f"{CF}.deleted": {"$ne": True}}, {"$set": {"n": n}}
        )
        if found.matched_count:
            self.foreign = True
            id_ = self.ids[i]
            # A reader of PostgreSQL sees it when a sweep has found it.
            self.shown[id_] += self.may_be[id_]
            self.may_be[id_] = [state | {"n": n} for state in self.may_be[id_] if state is not None]

    @rule(i=which, troubled=st.booleans())
    def read(self, i, troubled):
        world = self._world(troubled)
        try:
            record = self.servers.run(world.users.get(self.ids[i]))
        except CrossfadeError:
            assert troubled
            return
        state = None if record is None else {k: v for k, v in record.document.items() if k != "_id"}
        if record is None or not record.stale:
            assert state in self.may_be[self.ids[i]] + self.shown[self.ids[i]]

    # --- what goes wrong ---

    @rule(
        secondary=st.booleans(),
        how=st.sampled_from(["cut_before_request", "cut_after_request"]),
        n=st.integers(1, 3),
    )
    def connections_break(self, secondary, how, n):
        getattr(self._proxy(secondary), how)(n)

    @rule(secondary=st.booleans(), how=st.sampled_from(["refuse", "swallow_answers"]))
    def a_store_is_gone(self, secondary, how):
        getattr(self._proxy(secondary), how)()

    @rule()
    def all_stores_are_back(self):
        self.servers.mongo_proxy.pass_through()
        self.servers.postgres_proxy.pass_through()

    # --- who puts it right ---

    @rule(troubled=st.booleans())
    def a_reconciler_comes_by(self, troubled):
        world = self._world(troubled)

        async def reconcile():
            with contextlib.suppress(CrossfadeError):
                async with asyncio.timeout(10):
                    await world.m.reconciler.reconcile(wait_for_open=False)

        self.servers.run(reconcile())

    @invariant()
    def a_name_is_given_once(self):
        names = [
            document["username"].strip().lower()
            for document in self.documents.find({"_id": {"$in": self.ids}, f"{CF}.deleted": {"$ne": True}})
        ]
        assert len(names) == len(set(names))

    def teardown(self):
        self.all_stores_are_back()
        servers = self.servers
        servers.run(servers.sound.reconcile())
        if servers.phase != "postgres_primary":
            adopted = servers.run(servers.sound.m.reconciler.full_sweep())
            assert self.foreign or not adopted, "a difference that was owed by nobody"
        servers.run(servers.sound.reconcile())
        found, rows = servers.run(servers.sound.contents())
        assert found == rows
        assert servers.run(servers.sound.owed()) == ()
        for id_ in self.ids:
            image = servers.run(servers.sound.image(id_))
            state = None if image is None else {k: v for k, v in image.document.items() if k != "_id"}
            assert state in self.may_be[id_], f"{state} is none of {self.may_be[id_]}"

    # --- the model ---

    def _world(self, troubled):
        return self.servers.troubled if troubled else self.servers.sound

    def _proxy(self, secondary):
        both = [self.servers.mongo_proxy, self.servers.postgres_proxy]
        return next(proxy for proxy in both if (proxy is self.servers.primary) is not secondary)

    def _write(self, id_, troubled, write, effect, name):
        world, before = self._world(troubled), self.may_be[id_]
        after = [effect(state) for state in before]

        async def step():
            async with asyncio.timeout(PATIENCE):
                await world.m.board.refresh()
                await write(world.users)

        try:
            self.servers.run(step())
        except DuplicateKey:
            others = [state for other in self.ids if other != id_ for state in self._any(other)]
            taken = name is not None and any(
                state is not None and state["username"].lower() == name.lower() for state in others
            )
            assert taken or any(state is not None for state in self._any(id_)), "nobody has it"
            return
        except NotFound:
            assert None in self._any(id_)
        except OutcomeUnknown:
            self.may_be[id_] = before + [state for state in after if state not in before]
        except UndoPending:
            self.shown[id_] += after
        except CrossfadeError:
            # Told that nothing was written; where that had to be taken back it may still be seen by who may be late.
            self.shown[id_] += after
            assert troubled or self._in_doubt(id_)
        else:
            self.may_be[id_] = after

    def _any(self, id_):
        return self.may_be[id_] + self.shown[id_]

    def _in_doubt(self, id_):
        """Whether an earlier write of it may still be open: then a sound worker waits for its outcome in vain."""
        return bool(self.shown[id_]) or len(self.may_be[id_]) > 1


@pytest.mark.long
@pytest.mark.timeout(180 + SOAK)
@pytest.mark.parametrize("phase", ["dual_write", "postgres_read", "postgres_primary"])
def test_any_sequence_of_steps_leaves_what_was_told(
    phase, mongo_uri, database_url, mongo_proxy, postgres_proxy
):
    import pymongo

    create_tables(database_url)
    servers = Servers(phase, mongo_uri, database_url, mongo_proxy, postgres_proxy)
    with pymongo.MongoClient(mongo_uri) as client:
        documents = client.get_default_database()["users"]
        try:
            run_state_machine_as_test(
                lambda: Machine(servers, documents),
                settings=settings(
                    max_examples=SEQUENCES, stateful_step_count=STEPS, deadline=None, database=None,
                    derandomize="SOAK" not in os.environ, suppress_health_check=list(HealthCheck),
                ),
            )  # fmt: skip
        finally:
            servers.close()
