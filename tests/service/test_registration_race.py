"""1,000 registrations of 500 names at once, each name twice in different letter case, over two workers."""

from __future__ import annotations

import asyncio

import pytest

from crossfade import Options
from scorekeeper import http

from .conftest import Serve
from .test_users import eventually

pytestmark = pytest.mark.long

NAMES = 500
#: What is tested is who gets a name. How long a store may take on a machine that runs other tests is not.
PATIENT = Options(primary_deadline=30, secondary_deadline=30, lease=30, board_age=10)


@pytest.mark.timeout(300)
async def test_of_two_who_want_a_name_one_gets_it_in_both_stores(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "PATIENCE", 250.0)
    workers = [await serve("dual_write", options=PATIENT) for _ in range(2)]
    wanted = [spelling for n in range(NAMES) for spelling in (f"Player {n}", f"pLAYER {n}")]
    answers = await asyncio.gather(*(workers[n % 3 % 2].register(name) for n, name in enumerate(wanted)))
    # A driver that takes its server for dead, on a machine that has no time for it, leaves a request without an answer.
    unknown = [n for n, answer in enumerate(answers) if answer.status_code == 503]
    assert len(unknown) < 10
    for n in unknown:
        answers[n] = await workers[0].register(wanted[n])
    statuses = [answer.status_code for answer in answers]
    assert (statuses.count(201), statuses.count(400)) == (NAMES, NAMES), set(statuses)
    assert {answer.json()["error"] for answer in answers if answer.status_code == 400} == {
        "Username already exists"
    }
    acknowledged = {answer.json()["user"]["id"] for answer in answers if answer.status_code == 201}
    documents = workers[0].documents
    assert {str(document["_id"]) for document in documents["users"].find({}, {"_id": 1})} == acknowledged
    assert documents["playeridentities"].count_documents({}) == NAMES

    async def rows_are_equal() -> bool:
        return {row[0] for row in workers[0].rows("SELECT id FROM users")} == acknowledged

    await eventually(rows_are_equal, 60)
    assert workers[0].rows("SELECT count(*), count(DISTINCT user_id) FROM player_identities") == [
        (NAMES, NAMES)
    ]
