"""Friends over HTTP: asking, accepting, rejecting, parting, in every phase; and what the stores hold afterwards."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from bson import ObjectId

from .conftest import PHASES, Serve, Service, assert_problem


@dataclass
class Person:
    """Somebody who is signed in."""

    service: Service
    id: str
    token: str

    async def call(
        self, method: str, path: str, body: Any = None, *, of: str | None = None
    ) -> httpx.Response:
        return await self.service.http.request(
            method,
            f"/api/users/{of or self.id}/{path}",
            json=body,
            headers={"Authorization": f"Bearer {self.token}"},
        )

    async def ask(self, other: Person) -> httpx.Response:
        return await self.call("POST", "friend-requests", {"receiverId": other.id})


async def person(service: Service, name: str) -> Person:
    answer = (await service.register(name)).json()
    return Person(service, answer["user"]["id"], answer["token"])


async def two(service: Service) -> tuple[Person, Person]:
    return await person(service, "Ann"), await person(service, "Bob")


async def friends(someone: Person) -> list[str]:
    """As the worker itself reads them."""
    record = await someone.service.app.state.accounts["users"].get(ObjectId(someone.id))
    return [str(friend) for friend in record["friends"]]


async def settled(service: Service) -> None:
    """Nothing is owed any more: what is in one store is in the other."""
    accounts = service.app.state.accounts
    async with asyncio.timeout(30):
        while True:
            await accounts.settler._queue.join()
            look = await accounts.board.refresh()
            if not look.owed and not look.deliveries:
                return
            await asyncio.sleep(0.05)


def assert_stores_agree(service: Service) -> None:
    """Friends and requests are the same in both stores, and every friend who is there is linked."""
    documents = {
        (str(user["_id"]), str(friend))
        for user in service.documents["users"].find()
        for friend in user["friends"]
    }
    rows = service.rows("SELECT user_id, friend_id, friend_ref FROM user_friends")
    assert {(user, friend) for user, friend, _ in rows} == documents
    assert all(friend == link for _, friend, link in rows)
    requests = {
        (str(r["_id"]), str(r["sender"]), str(r["receiver"]), r["status"])
        for r in service.documents["friendrequests"].find()
    }
    assert set(service.rows("SELECT id, sender_ref, receiver_ref, status FROM friend_requests")) == requests


@pytest.mark.parametrize("phase", PHASES)
async def test_an_accepted_request_makes_two_friends(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    ann, bob = await two(service)
    asked = await ann.ask(bob)
    assert asked.status_code == 201
    request = asked.json()["friendRequest"]
    assert (request["sender"], request["receiver"], request["status"]) == (ann.id, bob.id, "pending")
    accepted = await bob.call("POST", f"friend-requests/{request['id']}/accept")
    assert accepted.status_code == 200
    assert accepted.json()["friend"].keys() == {"id", "username", "createdAt", "profilePicture"}
    assert accepted.json()["friend"]["id"] == ann.id
    assert (await friends(ann), await friends(bob)) == ([bob.id], [ann.id])
    if phase != "mongo_only":
        await settled(service)
        assert_stores_agree(service)


@pytest.mark.parametrize("phase", PHASES)
async def test_a_request_is_answered_once_by_whom_it_was_sent_to(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    ann, bob = await two(service)
    request = (await ann.ask(bob)).json()["friendRequest"]["id"]
    path = f"friend-requests/{request}"
    assert_problem(await ann.call("POST", f"{path}/accept"), 403)
    assert_problem(await bob.call("DELETE", path), 403)
    assert_problem(await ann.call("POST", f"{path}/accept", of=bob.id), 403)
    assert_problem(await bob.call("POST", f"friend-requests/{ObjectId()}/accept"), 404)
    assert_problem(await bob.call("POST", "friend-requests/nonsense/accept"), 400)
    assert (await bob.call("POST", f"{path}/reject")).status_code == 200
    assert_problem(await bob.call("POST", f"{path}/accept"), 400)
    assert_problem(await ann.call("DELETE", path), 400)
    assert (await friends(ann), await friends(bob)) == ([], [])


@pytest.mark.parametrize("phase", PHASES)
async def test_who_was_turned_down_or_has_parted_may_ask_again(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    ann, bob = await two(service)
    first = (await ann.ask(bob)).json()["friendRequest"]["id"]
    assert_problem(await ann.ask(bob), 400)
    assert_problem(await bob.ask(ann), 400)
    assert (await bob.call("POST", f"friend-requests/{first}/reject")).status_code == 200
    again = (await ann.ask(bob)).json()["friendRequest"]
    assert again["id"] == first, "the pair has one request"
    assert (await bob.call("POST", f"friend-requests/{first}/accept")).status_code == 200
    assert_problem(await ann.ask(bob), 400)
    assert (await bob.call("DELETE", f"friends/{ann.id}")).status_code == 200
    assert (await friends(ann), await friends(bob)) == ([], [])
    assert (await bob.call("DELETE", f"friends/{ann.id}")).status_code == 200, "who is no friend is no error"
    assert (await ann.ask(bob)).status_code == 201
    assert (await ann.call("DELETE", f"friend-requests/{first}")).status_code == 200
    if phase != "mongo_only":
        await settled(service)
        assert_stores_agree(service)


async def test_what_cannot_be_asked_is_refused(serve: Serve) -> None:
    service = await serve()
    ann, bob = await two(service)
    assert_problem(await ann.ask(ann), 400)
    assert_problem(await ann.call("POST", "friend-requests", {"receiverId": "nonsense"}), 400)
    assert_problem(await ann.call("POST", "friend-requests", {}), 400)
    assert_problem(await ann.call("POST", "friend-requests", {"receiverId": str(ObjectId())}), 404)
    assert_problem(await ann.call("POST", "friend-requests", {"receiverId": bob.id}, of=bob.id), 403)
    assert service.documents["friendrequests"].count_documents({}) == 0


@pytest.mark.parametrize("phase", ["dual_write", "postgres_primary"])
async def test_of_those_who_ask_or_accept_at_once_one_does(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    ann, bob = await two(service)
    asked = await asyncio.gather(*(ann.ask(bob) for _ in range(5)))
    assert sorted(answer.status_code for answer in asked) == [201, 400, 400, 400, 400]
    [request] = [answer.json()["friendRequest"]["id"] for answer in asked if answer.status_code == 201]
    accepted = await asyncio.gather(
        *(bob.call("POST", f"friend-requests/{request}/accept") for _ in range(5))
    )
    assert sorted(answer.status_code for answer in accepted) == [200, 400, 400, 400, 400]
    assert (await friends(ann), await friends(bob)) == ([bob.id], [ann.id])
    await settled(service)
    assert_stores_agree(service)


async def test_a_friend_whose_account_is_gone_is_accepted_by_nobody(serve: Serve) -> None:
    service = await serve()
    ann, bob = await two(service)
    request = (await ann.ask(bob)).json()["friendRequest"]["id"]
    await service.app.state.accounts["users"].delete(ObjectId(ann.id))
    assert_problem(await bob.call("POST", f"friend-requests/{request}/accept"), 404)
    assert service.rows("SELECT sender_ref, receiver_ref FROM friend_requests") == [(None, bob.id)]
