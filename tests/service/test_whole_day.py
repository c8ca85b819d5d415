"""A day of the web client, from registering to deleting a game: the same answers in every phase, beside the old back
end, and with either store gone in the middle of it, as far as the contract allows."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from bson import ObjectId

from crossfade import Options
from crossfade.testing.proxy import FaultProxy
from scorekeeper.legacy import LegacyApplication

from .conftest import PHASES, Serve, Service, assert_problem
from .test_games import table_game, wizard_game
from .test_round_trip import mismatches

pytestmark = pytest.mark.long

PATIENT = Options(primary_deadline=10.0, secondary_deadline=2.0)
#: A store that is gone is noticed soon.
IMPATIENT = Options(primary_deadline=1.5, secondary_deadline=0.5)


@dataclass(frozen=True)
class Step:
    """One request, and what its answer is. A write that got 503 may have been carried out: then sending it again is
    answered by ``again``."""

    who: str
    method: str
    path: str
    body: Any = None
    status: int = 200
    again: int | None = None
    keep: tuple[tuple[str, str], ...] = ()


@dataclass
class Day:
    """Carries out steps, and remembers ids and tokens that later ones need."""

    service: Service
    known: dict[str, str] = field(default_factory=dict)
    refused: int = 0

    async def send(self, step: Step) -> Any:
        headers = {"Authorization": f"Bearer {self.known[step.who]}"} if step.who else {}
        path = step.path.format_map(self.known)
        body = {
            k: v.format_map(self.known) if isinstance(v, str) else v for k, v in (step.body or {}).items()
        }
        return await self.service.http.request(
            step.method, path, json=body if step.body is not None else None, headers=headers
        )

    async def run(self, step: Step, *, may_be_unavailable: bool = False) -> bool:
        """Whether it was answered as the contract has it; False: with 503, if that may be."""
        answer = await self.send(step)
        if may_be_unavailable and answer.status_code == 503:
            assert "Retry-After" in answer.headers
            assert_problem(answer, 503)
            self.refused += 1
            return False
        assert answer.status_code in {step.status, step.again or step.status}, (step, answer.text)
        for name, path in step.keep:
            value = answer.json()
            for part in path.split("."):
                value = value[int(part)] if part.isdigit() else value[part]
            self.known[name] = value
        return True


def registering(name: str) -> Iterator[Step]:
    credentials = {"username": name, "password": "secret1"}
    yield Step("", "POST", "/api/users/register", credentials, 201, again=400)
    kept = ((name, "token"), (f"{name}_id", "user.id"))
    yield Step("", "POST", "/api/users/login", credentials, keep=kept)


def day() -> list[Step]:
    kept = {"gameData": wizard_game("Ann", "Bob", "Gus"), "localId": "day-1"}
    table = {"gameData": table_game(), "localId": "day-2"}
    return [
        *registering("Ann"),
        *registering("Bob"),
        Step("", "POST", "/api/users/register", {"username": "ANN", "password": "secret1"}, 400),
        Step("Ann", "GET", "/api/users/me"),
        Step("", "GET", "/api/users/lookup/bOB"),
        Step(
            "Ann", "POST", "/api/users/{Ann_id}/friend-requests", {"receiverId": "{Bob_id}"}, 201, again=400
        ),
        Step(
            "Bob", "GET", "/api/users/{Bob_id}/friend-requests/received", keep=(("request", "requests.0.id"),)
        ),
        Step("Bob", "POST", "/api/users/{Bob_id}/friend-requests/{request}/accept", {}, again=400),
        Step("Ann", "GET", "/api/users/{Ann_id}/friends"),
        Step("Ann", "POST", "/api/wizard-games", kept, 201, again=409),
        Step("Bob", "POST", "/api/wizard-games", kept, 409),
        Step("Ann", "GET", "/api/wizard-games?allGames=true", keep=(("game", "games.0._id"),)),
        Step("Bob", "GET", "/api/wizard-games/{game}"),
        Step("Ann", "PUT", "/api/games/{game}/share", {"shareId": "day"}),
        Step("", "GET", "/api/games/shared/day"),
        Step("Bob", "POST", "/api/table-games", table, 201, again=200),
        Step("Bob", "GET", "/api/table-games", keep=(("table", "games.0._id"),)),
        Step("Ann", "PATCH", "/api/users/{Ann_id}/name", {"name": "Anna"}, keep=(("Ann", "token"),)),
        Step("", "GET", "/api/users/lookup/anna"),
        Step("", "GET", "/api/games/recent"),
        Step("Bob", "DELETE", "/api/wizard-games/{game}", status=403),
        Step("Ann", "DELETE", "/api/wizard-games/{game}", again=404),
        Step("Ann", "GET", "/api/wizard-games/{game}", status=404),
        Step("Ann", "DELETE", "/api/users/{Ann_id}/friends/{Bob_id}"),
        Step("Bob", "GET", "/api/users/me"),
    ]


@pytest.mark.parametrize("phase", PHASES)
async def test_a_day_has_the_same_answers_in_every_phase(serve: Serve, phase: str) -> None:
    today = Day(await serve(phase, options=PATIENT))
    for step in day():
        await today.run(step)


@pytest.mark.parametrize("phase", PHASES[1:5])
@pytest.mark.parametrize("gone", ["mongo", "postgres"])
async def test_either_store_may_go_in_the_middle_of_the_day(
    serve: Serve,
    phase: str,
    gone: str,
    mongo_proxy: FaultProxy,
    postgres_proxy: FaultProxy,
    mongo_uri: str,
    database_url: str,
) -> None:
    service = await serve(
        phase, mongo_uri=mongo_proxy.uri, database_url=postgres_proxy.uri, options=IMPATIENT
    )
    decides = service.app.state.accounts.primary == gone
    proxy = mongo_proxy if gone == "mongo" else postgres_proxy
    today, steps = Day(service), day()
    middle = len(steps) // 3
    for step in steps[:middle]:
        await today.run(step)
    proxy.refuse()
    if not decides:
        # The one that only follows: nobody notices.
        for step in steps[middle:]:
            await today.run(step)
    else:
        for step in steps[middle : middle + 4]:
            await today.run(step, may_be_unavailable=True)
        assert today.refused
    proxy.pass_through()
    if decides:
        for step in steps[middle:]:
            while not await today.run(step, may_be_unavailable=True):  # noqa: ASYNC110 - of a store
                await asyncio.sleep(0.2)
    accounts = service.app.state.accounts
    async with asyncio.timeout(60):
        while (await accounts.board.refresh()).debts:
            await accounts.reconciler.reconcile()
    [(name,)] = service.rows("SELECT username FROM users WHERE id = %s", today.known["Ann_id"])
    document = service.documents["users"].find_one({"_id": ObjectId(today.known["Ann_id"])})
    assert (name, document["username"], document["friends"]) == ("Anna", "Anna", [])
    assert await mismatches(accounts, mongo_uri, database_url) == dict.fromkeys(accounts.entities, 0)


@dataclass
class OldBackEnd:
    """Writes as the old back end does, to users of its own and to the new one's, until it is told to stop."""

    database: Any
    written: dict[ObjectId, dict[str, Any]] = field(default_factory=dict)
    stamped: dict[ObjectId, datetime] = field(default_factory=dict)
    failure: BaseException | None = None
    stopping: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        try:
            self._run()
        except BaseException as failure:
            self.failure = failure

    def _run(self) -> None:
        application, number = LegacyApplication(self.database), 0
        users, games = self.database["users"], self.database["wizard"]
        # At an old back end's pace, and so much of it that a slow machine is not given ever more to do.
        while (not self.stopping.wait(0.05) and number < 60) or number < 8:
            number += 1
            id_ = application.register(f"Old {number}", "hash")
            application.rename(id_, f"Older {number}")
            application.change_role(id_, "admin")
            previous = next(reversed(self.written), None)
            if previous is not None:
                application.add_friend(previous, id_)
                self.written[previous]["friends"].append(id_)
                self.written[previous]["__v"] += 1
            friends = [] if previous is None else [previous]
            self.written[id_] = {
                "username": f"Older {number}", "role": "admin", "friends": friends, "__v": len(friends),
            }  # fmt: skip
            # A field that the new back end does not write, in a document that it does.
            for user in users.find({"username": {"$in": ["Ann", "Anna", "Bob"]}}, {"_id": 1}):
                moment = datetime.now(UTC).replace(microsecond=0)
                change = {"$set": {"lastSeenByOld": moment, "updatedAt": moment}, "$inc": {"__v": 1}}
                if users.update_one({"_id": user["_id"]}, change).matched_count:
                    self.stamped[user["_id"]] = moment
            games.insert_one({"userId": id_, "localId": f"old {number}", "gameData": {"n": number}, "__v": 0})

    def assert_nothing_is_lost(self) -> None:
        for id_, expected in self.written.items():
            document = self.database["users"].find_one({"_id": id_})
            assert {name: document[name] for name in expected} == expected
        for id_, moment in self.stamped.items():
            assert self.database["users"].find_one({"_id": id_})["lastSeenByOld"] == moment
        assert self.database["wizard"].count_documents({"localId": {"$regex": "^old "}}) == len(self.written)


@contextlib.asynccontextmanager
async def old_back_end(service: Service) -> AsyncIterator[OldBackEnd]:
    """Writes while the block runs."""
    old = OldBackEnd(service.documents)
    thread = threading.Thread(target=old.run)
    thread.start()
    try:
        yield old
    finally:
        old.stopping.set()
        await asyncio.to_thread(thread.join)
    if old.failure is not None:
        raise old.failure


@pytest.mark.parametrize("phase", PHASES[:4])
async def test_the_old_back_end_writes_at_the_same_time_and_nothing_is_lost(serve: Serve, phase: str) -> None:
    service = await serve(phase, options=PATIENT)
    today = Day(service)
    async with old_back_end(service) as old:
        for step in day():
            # Newest first: the old back end's games are listed too, so the day's own is asked for by its owner.
            path = step.path.replace("?allGames=true", "")
            await today.run(Step(step.who, step.method, path, step.body, step.status, step.again, step.keep))
    assert len(old.written) >= 8
    assert old.stamped
    old.assert_nothing_is_lost()
    if phase == "mongo_only":
        return
    accounts = service.app.state.accounts
    async with asyncio.timeout(60):
        await accounts.reconciler.full_sweep()
        while (await accounts.board.refresh()).debts:
            await accounts.reconciler.reconcile()
    old.assert_nothing_is_lost()
    rows = dict(service.rows("SELECT id, username FROM users WHERE username LIKE 'Older %%'"))
    assert rows == {str(id_): expected["username"] for id_, expected in old.written.items()}
    [(seen,)] = service.rows(
        "SELECT count(*) FROM users WHERE id = ANY(%s) AND extra ? 'lastSeenByOld'", [*map(str, old.stamped)]
    )
    assert seen == len(old.stamped)
