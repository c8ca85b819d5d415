"""Friends over HTTP: asking, accepting, rejecting, parting, in every phase; and what the stores hold afterwards."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from bson import ObjectId

from crossfade import Phase
from scorekeeper.wire import now

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
            await accounts.settler.eraser.join()
            look = await accounts.board.refresh()
            if not look.owed and not look.deliveries:
                await accounts.reconciler.link()  # what met another's lock is left to the sweep
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
    if Phase(phase).rules.dual:
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
    if Phase(phase).rules.dual:
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


def names_of(people: list[dict[str, Any]]) -> list[str]:
    return [each["username"] for each in people]


async def everything(someone: Person) -> dict[str, Any]:
    answer = await someone.call("GET", "friends/batch-check")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    for path, name in (("received", "receivedRequests"), ("sent", "sentRequests")):
        one = await someone.call("GET", f"friend-requests/{path}")
        assert one.json() == {"requests": body[name]}
    assert (await someone.call("GET", "friends")).json() == {"friends": body["friends"]}
    return body


@pytest.mark.parametrize("phase", PHASES)
async def test_lists_show_friends_and_open_requests_of_both_sides(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    ann, bob, eve, tom = [await person(service, name) for name in ("Ann", "Bob", "Eve", "Tom")]
    assert await everything(ann) == {"friends": [], "receivedRequests": [], "sentRequests": []}
    for path in ("friends", "friends/batch-check", "friend-requests/sent", "friend-requests/received"):
        assert_problem(await bob.call("GET", path, of=ann.id), 403)
    added = await ann.call("POST", f"friends/{bob.id}")
    assert (added.status_code, added.json()["friend"]["username"]) == (200, "Bob")
    assert (await ann.call("POST", f"friends/{bob.id}")).status_code == 200, "a friend stays one"
    assert_problem(await ann.call("POST", f"friends/{ann.id}"), 400)
    assert_problem(await ann.call("POST", f"friends/{ObjectId()}"), 404)
    assert_problem(await ann.call("POST", "friends/nobody"), 400)
    await ann.ask(eve)
    await tom.ask(ann)
    body = await everything(ann)
    assert names_of(body["friends"]) == ["Bob"]
    [sent], [received] = body["sentRequests"], body["receivedRequests"]
    assert (sent["receiver"]["username"], sent["status"], "sender" in sent) == ("Eve", "pending", False)
    assert received["sender"].keys() == {"id", "username", "createdAt", "profilePicture"}
    assert names_of((await everything(bob))["friends"]) == ["Ann"]
    assert (await ann.call("POST", f"friends/{tom.id}")).status_code == 200, "answers what Tom has asked"
    body = await everything(ann)
    assert (names_of(body["friends"]), body["receivedRequests"]) == (["Bob", "Tom"], [])
    if Phase(phase).rules.dual:
        await settled(service)
        assert_stores_agree(service)


@pytest.mark.parametrize("phase", PHASES)
async def test_partners_that_are_gone_and_other_dirt_are_in_no_list(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    ann, bob = await two(service)
    own, gone, moment = ObjectId(ann.id), ObjectId(), now()
    accounts = service.app.state.accounts
    dirty = [gone, ObjectId(bob.id), own, ObjectId(bob.id), gone]
    await accounts["users"].update(own, {"friends": dirty})
    for sender, receiver in ((own, gone), (gone, own)):
        await accounts["friend_requests"].insert(
            {"sender": sender, "receiver": receiver, "status": "pending", "createdAt": moment}
        )
    body = await everything(ann)
    assert (names_of(body["friends"]), body["receivedRequests"], body["sentRequests"]) == (["Bob"], [], [])
    assert (await ann.call("DELETE", f"friends/{gone}")).status_code == 200
    assert (await ann.call("DELETE", f"friends/{bob.id}")).status_code == 200
    assert await friends(ann) == [ann.id], "parting removes whom one parts from, however often they are there"
    if Phase(phase).rules.dual:
        await settled(service)
        assert service.rows("SELECT friend_id, friend_ref FROM user_friends") == [(ann.id, ann.id)]


async def assert_one_consistent_result(service: Service, ann: Person, bob: Person) -> None:
    """Both are friends or neither is; nothing is half done; both stores say the same."""
    await settled(service)
    assert_stores_agree(service)
    ofann, ofbob = await friends(ann), await friends(bob)
    assert (ofann, ofbob) in (([bob.id], [ann.id]), ([], []))
    rows = service.documents["friendrequests"].find().to_list()
    assert len(rows) <= 1
    if ofann:
        assert [row["status"] for row in rows] == ["accepted"]
    else:
        assert all(row["status"] != "accepted" for row in rows)


@pytest.mark.parametrize("phase", ["dual_write", "postgres_read", "postgres_primary"])
async def test_whatever_two_do_at_the_same_time_has_one_result(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    ann, bob = await two(service)
    for turn in range(3):
        crossing = await asyncio.gather(ann.ask(bob), bob.ask(ann))
        statuses = [answer.status_code for answer in crossing]
        assert sorted(statuses) == [201, 400], "two who ask each other at once: one has asked"
        await assert_one_consistent_result(service, ann, bob)
        asker, asked = (ann, bob) if statuses[0] == 201 else (bob, ann)
        request = next(a.json()["friendRequest"]["id"] for a in crossing if a.status_code == 201)
        answers = await asyncio.gather(
            asked.call("POST", f"friend-requests/{request}/accept"),
            asker.call("DELETE", f"friend-requests/{request}"),
            asked.call("POST", f"friend-requests/{request}/accept"),
            asked.call("POST", f"friend-requests/{request}/reject"),
        )
        assert sorted(answer.status_code for answer in answers) == [200, 400, 400, 400]
        await assert_one_consistent_result(service, ann, bob)
        await asyncio.gather(
            ann.call("POST", f"friends/{bob.id}"),
            bob.call("DELETE", f"friends/{ann.id}"),
            bob.call("POST", f"friends/{ann.id}") if turn else ann.call("DELETE", f"friends/{bob.id}"),
        )
        await assert_one_consistent_result(service, ann, bob)
        await asyncio.gather(ann.call("DELETE", f"friends/{bob.id}"), bob.call("DELETE", f"friends/{ann.id}"))
        await assert_one_consistent_result(service, ann, bob)
        assert await friends(ann) == []


@pytest.mark.parametrize("phase", ["dual_write", "postgres_primary"])
async def test_parting_while_the_other_accepts_leaves_both_or_neither(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    ann, bob = await two(service)
    for _ in range(4):
        request = (await ann.ask(bob)).json()["friendRequest"]["id"]
        accepted, parted = await asyncio.gather(
            bob.call("POST", f"friend-requests/{request}/accept"), ann.call("DELETE", f"friends/{bob.id}")
        )
        assert (accepted.status_code, parted.status_code) == (200, 200)
        await assert_one_consistent_result(service, ann, bob)
        await ann.call("DELETE", f"friends/{bob.id}")


@pytest.mark.parametrize("phase", ["dual_write", "postgres_primary"])
async def test_two_rows_of_one_pair_in_old_data_are_lived_with(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    ann, bob = await two(service)
    one, other = ObjectId(ann.id), ObjectId(bob.id)
    handle = service.app.state.accounts["friend_requests"]
    for sender, receiver in ((one, other), (other, one)):
        await handle.insert({"sender": sender, "receiver": receiver, "status": "pending", "createdAt": now()})
    [request] = (await everything(bob))["receivedRequests"]
    assert (await bob.call("POST", f"friend-requests/{request['id']}/accept")).status_code == 200
    assert (await everything(ann))["receivedRequests"] == [], "what crossed it is answered with it"
    assert (await ann.call("DELETE", f"friends/{bob.id}")).status_code == 200
    oneself = await handle.insert({"sender": other, "receiver": other, "status": "pending"})
    assert_problem(await bob.call("POST", f"friend-requests/{oneself.id}/accept"), 404)
    await handle.delete(oneself.id)
    answers = await asyncio.gather(ann.ask(bob), bob.ask(ann))
    assert [answer.status_code for answer in answers].count(201) <= 1
    pending = [row for row in service.documents["friendrequests"].find() if row["status"] == "pending"]
    assert len(pending) <= 1
    assert (await ann.call("POST", f"friends/{bob.id}")).status_code == 200
    body = await everything(bob)
    assert (names_of(body["friends"]), body["receivedRequests"], body["sentRequests"]) == (["Ann"], [], [])
    assert (await bob.call("DELETE", f"friends/{ann.id}")).status_code == 200
    await settled(service)
    assert_stores_agree(service)
    assert (await friends(ann), await friends(bob)) == ([], [])
