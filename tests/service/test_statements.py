"""A list takes as many questions to the stores for thirty entries as for three."""

from __future__ import annotations

from collections import Counter
from typing import Any

import psycopg
import pytest
from bson import ObjectId
from psycopg import sql
from pymongo.asynchronous.collection import AsyncCollection

from crossfade import Options
from scorekeeper.wire import now

from .conftest import Serve, Service
from .test_friends import Person, person, settled
from .test_identities import identity

#: Route, and the reads that it may take besides who is signed in; the same whichever store decides.
LISTS = {
    "/api/users/{own}/friends": 2,
    "/api/users/{own}/friends/batch-check": 4,
    "/api/users/{own}/friend-requests/received": 2,
    "/api/users/{own}/friend-requests/sent": 2,
    "/api/identities/me": 2,
    "/api/identities/search?q=player&limit=50": 2,
    "/api/identities/link/my-identities": 2,
    "/api/identities/link/suggestions": 2,
    "/api/identities/link/guest-identities?limit=50": 5,
}


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Reads of the service's own tables and collections, by their names, as the drivers are given them."""
    asked: Counter[str] = Counter()
    execute = psycopg.AsyncConnection.execute

    async def counted(self: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        text = query.as_string(None) if isinstance(query, sql.Composable) else query
        text = text.decode() if isinstance(text, bytes) else text
        if text.startswith("SELECT") and " AS p" in text:
            asked[text.split(" FROM ", 1)[1].split(" AS p")[0].split(" FROM ")[-1]] += 1
        return await execute(self, query, *args, **kwargs)

    monkeypatch.setattr(psycopg.AsyncConnection, "execute", counted)
    for method in ("find", "count_documents"):
        ask = getattr(AsyncCollection, method)

        def counting(self: Any, *args: Any, ask: Any = ask, **kwargs: Any) -> Any:
            # Not the debt board's look, which goes on in the background.
            if self.name in ("users", "friendrequests", "playeridentities") and "_cf.debt" not in str(args):
                asked[self.name] += 1
            return ask(self, *args, **kwargs)

        monkeypatch.setattr(AsyncCollection, method, counting)
    return asked


async def populate(service: Service, ann: Person, size: int, first: int) -> None:
    """Friends, requests of both sides, and guests that are linked to Ann's identity, ``size`` of each."""
    accounts, own = service.app.state.accounts, ObjectId(ann.id)
    identities = (await accounts["identities"].find({"userId": own}))[0].id
    ids = []
    for n in range(first, first + size):
        made = await accounts["users"].insert({"username": f"Friend {n}", "createdAt": now()})
        ids.append(made.id)
        for pair in ({"sender": own, "receiver": made.id}, {"sender": made.id, "receiver": own}):
            await accounts["friend_requests"].insert({**pair, "status": "pending", "createdAt": now()})
        await identity(service, f"Player Ann {n}", type="imported", mergedInto=identities)
        await identity(service, f"Player Ann guest {n}")
    user = await accounts["users"].get(own)
    await accounts["users"].update(own, {"friends": [*user["friends"], *ids]})
    await settled(service)


async def asked_for(service: Service, ann: Person, questions: Counter[str]) -> dict[str, int]:
    found = {}
    for route in LISTS:
        path = route.format(own=ann.id)
        assert (
            await service.get(path, ann.token)
        ).status_code == 200  # who is signed in is known from here on
        questions.clear()
        answer = await service.get(path, ann.token)
        assert answer.status_code == 200
        found[route] = questions.total()
    return found


@pytest.mark.parametrize("phase", ["dual_write", "postgres_primary"])
async def test_a_longer_list_takes_no_more_questions(
    serve: Serve, questions: Counter[str], phase: str
) -> None:
    service = await serve(phase, options=Options(sweep=0, full_sweep=0), cache_ttl=60.0)
    ann = await person(service, "Ann")
    await populate(service, ann, 3, 0)
    few = await asked_for(service, ann, questions)
    await populate(service, ann, 12, 3)
    assert await asked_for(service, ann, questions) == few
    assert all(0 < few[route] <= most for route, most in LISTS.items()), few
