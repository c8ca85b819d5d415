"""Player identities over HTTP, in every phase, and what both stores hold afterwards."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from bson import ObjectId

from scorekeeper.wire import now

from .conftest import ADMINISTRATOR, PHASES, Serve, Service, assert_problem
from .test_friends import Person, person, settled


async def call(someone: Person, method: str, path: str, body: Any = None, **query: Any) -> httpx.Response:
    return await someone.service.http.request(
        method,
        f"/api/identities/{path}",
        json=body,
        params=query,
        headers={"Authorization": f"Bearer {someone.token}"},
    )


async def ok(someone: Person, method: str, path: str, body: Any = None, **query: Any) -> Any:
    answer = await call(someone, method, path, body, **query)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def administrator(service: Service, name: str = "Root") -> Person:
    root = await person(service, name)
    await service.app.state.account_changes.set_role(ADMINISTRATOR, root.id, "admin")
    return root


async def identity(service: Service, name: str, **fields: Any) -> ObjectId:
    """An identity as the old back end leaves it, written through whichever store decides."""
    moment = now()
    made = await service.app.state.accounts["identities"].insert(
        {
            "displayName": name,
            "normalizedName": name.lower(),
            "userId": None,
            "type": "guest",
            "nameHistory": [],
            "aliases": [],
            "stats": {"totalGames": 3, "totalWins": 1, "lastGameAt": moment},
            "eloByGameType": {},
            "linkedIdentities": [],
            "mergedInto": None,
            "createdBy": None,
            "isDeleted": False,
            "deletedAt": None,
            "createdAt": moment,
            "updatedAt": moment,
            "__v": 0,
            **fields,
        }
    )
    return made.id


async def stored(service: Service) -> dict[Any, dict[str, Any]]:
    """Every identity, as the worker reads it."""
    found = await service.app.state.accounts["identities"].find(limit=1000)
    return {record.id: record.document for record in found}


async def own_identity(someone: Person) -> str:
    return str((await ok(someone, "GET", "me"))["identities"][0]["_id"])


async def assert_both_stores_hold_the_same(service: Service) -> None:
    await settled(service)
    pair = service.app.state.accounts.pair
    entity = service.app.state.accounts.entities["identities"]
    documents = {each["_id"]: each for each in service.documents["playeridentities"].find()}
    rows = await pair.postgres.read_many(entity, list(documents), timeout=5.0)
    assert {row.id: row.document for row in rows} == {
        id_: {name: value for name, value in each.items() if name != "_cf"} for id_, each in documents.items()
    }


@pytest.mark.parametrize("phase", PHASES)
async def test_a_link_and_its_undoing_leave_both_identities_as_they_were(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    ann = await person(service, "Ann")
    guest = await identity(service, "Annie", userId=ObjectId(), eloByGameType={"skat": {"rating": 1100}})
    own = await own_identity(ann)
    before = await stored(service)

    linked = await ok(ann, "POST", "link", {"guestIdentityId": str(guest)})
    assert linked["gamesUpdated"] == {"tableGames": 0, "wizardGames": 0}
    assert (linked["guestIdentity"]["mergedInto"], linked["guestIdentity"]["type"]) == (own, "imported")
    [link] = linked["userIdentity"]["linkedIdentities"]
    assert link.keys() == {"_id", "identityId", "linkedAt", "linkedBy", "originalDisplayName"}
    assert (link["identityId"], link["linkedBy"], link["originalDisplayName"]) == (
        str(guest),
        ann.id,
        "Annie",
    )
    after_link = await stored(service)
    again = await ok(ann, "POST", "link", {"guestIdentityId": str(guest)})
    assert again["userIdentity"] == linked["userIdentity"]
    assert await stored(service) == after_link, "a link that stands changes nothing when it is made again"

    unlinked = await ok(ann, "POST", "unlink", {"guestIdentityId": str(guest)})
    assert (unlinked["guestIdentity"]["mergedInto"], unlinked["guestIdentity"]["type"]) == (None, "guest")
    assert await stored(service) == before
    assert_problem(await call(ann, "POST", "unlink", {"guestIdentityId": str(guest)}), 400)
    if phase != "mongo_only":
        await assert_both_stores_hold_the_same(service)


async def game(service: Service, kind: str, number: int, players: list[Any], *, nested: bool = False) -> Any:
    """A game as the old back end leaves it."""
    data: dict[str, Any] = {"players": players, "rounds": [1, 2]}
    made = await service.app.state.accounts[kind].insert(
        {
            "userId": "guest_1",
            "localId": f"{kind}-{number}",
            "gameData": {"gameData": data} if nested else data,
            "createdAt": now(),
            "updatedAt": now(),
            "__v": 0,
        }
    )
    return made.id


async def game_data(service: Service) -> dict[Any, Any]:
    """The data of every game, as the worker reads it."""
    found = [
        record
        for kind in ("games", "wizard_games", "table_games")
        for record in await service.app.state.accounts[kind].find(limit=1000)
    ]
    return {record.id: record.document["gameData"] for record in found}


@pytest.mark.parametrize("phase", PHASES)
async def test_games_follow_a_link_and_its_undoing(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    ann = await person(service, "Ann")
    own = ObjectId(await own_identity(ann))
    guest, other = await identity(service, "Guest"), await identity(service, "Other")
    for number in range(25):
        players = [
            {"name": "g", "identityId": guest if number % 2 else str(guest)},
            {"name": "o", "identityId": other},
        ]
        await game(service, "wizard_games", number, players)
    await game(service, "games", 1, [{"name": "g", "identityId": guest, "previousIdentityId": other}])
    await game(service, "games", 2, ["by name alone"])
    await game(service, "table_games", 1, [{"name": "g", "identityId": guest}], nested=True)
    await game(
        service, "table_games", 2, [{"name": "a", "identityId": own, "previousIdentityId": ObjectId()}]
    )
    before = await game_data(service)

    linked = await ok(ann, "POST", "link", {"guestIdentityId": str(guest)})
    assert linked["gamesUpdated"] == {"tableGames": 1, "wizardGames": 26}
    assert (await ok(ann, "POST", "link", {"guestIdentityId": str(guest)}))["gamesUpdated"] == {
        "tableGames": 0, "wizardGames": 0,
    }  # fmt: skip
    after = await game_data(service)
    assert not [data for data in after.values() if f"'identityId': {guest!r}" in str(data)]
    recent = (await ok(ann, "GET", str(own)))["recentGames"]
    assert len(recent) == 10
    assert {each["gameType"] for each in recent} <= {"wizard", "table"}

    chained = await identity(service, "Chained")
    await ok(ann, "POST", "link", {"guestIdentityId": str(other)})
    assert (await ok(ann, "POST", "link", {"guestIdentityId": str(chained)}))["gamesUpdated"][
        "wizardGames"
    ] == 0
    await ok(ann, "POST", "unlink", {"guestIdentityId": str(guest)})
    unlinked = await ok(ann, "POST", "unlink", {"guestIdentityId": str(other)})
    assert unlinked["gamesUpdated"] == {"tableGames": 0, "wizardGames": 25}
    assert await game_data(service) == before
    if phase != "mongo_only":
        await assert_both_stores_hold_the_same(service)


@pytest.mark.parametrize("phase", PHASES)
async def test_many_are_linked_each_by_itself(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    ann, bob = await person(service, "Ann"), await person(service, "Bob")
    guests = [str(await identity(service, f"Guest {n}")) for n in range(3)]
    bobs = await own_identity(bob)
    nobody = str(ObjectId())
    answer = await ok(ann, "POST", "link/multiple", {"guestIdentityIds": [*guests, bobs, nobody, guests[0]]})
    assert answer["success"] is False
    assert [one["id"] for one in answer["linked"]] == guests
    assert [one["id"] for one in answer["failed"]] == [bobs, nobody]
    assert all(one["errors"] for one in answer["failed"])
    assert answer["totalGamesUpdated"] == 0
    assert_problem(await call(ann, "POST", "link/multiple", {"guestIdentityIds": guests * 7}), 400)
    assert_problem(await call(bob, "POST", "link", {"guestIdentityId": guests[0]}), 400)
    assert_problem(await call(bob, "POST", "unlink", {"guestIdentityId": guests[0]}), 403)
    mine = await ok(ann, "GET", "me")
    assert (mine["stats"]["identities"], mine["stats"]["totalGames"], mine["stats"]["totalWins"]) == (1, 9, 3)
    both = await ok(ann, "GET", "link/my-identities")
    assert {one["_id"] for one in both["linkedIdentities"]} == set(guests)
    if phase != "mongo_only":
        await assert_both_stores_hold_the_same(service)


@pytest.mark.parametrize("phase", ["dual_write", "postgres_primary"])
async def test_of_those_who_link_one_guest_at_once_one_does(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    people = [await person(service, f"Somebody {n}") for n in range(4)]
    guest = await identity(service, "Guest")
    answers = await asyncio.gather(
        *(call(each, "POST", "link", {"guestIdentityId": str(guest)}) for each in people)
    )
    assert sorted(answer.status_code for answer in answers) == [200, 400, 400, 400]
    [winner] = [each for each, answer in zip(people, answers, strict=True) if answer.status_code == 200]
    everything = await stored(service)
    holders = [each for each in everything.values() if each["linkedIdentities"]]
    assert [(str(each["userId"]), each["_id"]) for each in holders] == [
        (winner.id, everything[guest]["mergedInto"])
    ]
    await assert_both_stores_hold_the_same(service)


@pytest.mark.parametrize("phase", ["dual_write", "postgres_primary"])
async def test_a_link_one_way_and_a_merge_the_other_way_at_once_make_no_cycle(
    serve: Serve, phase: str
) -> None:
    service = await serve(phase)
    root, ann = await administrator(service), await person(service, "Ann")
    own = await own_identity(ann)
    for n in range(4):
        guest = str(await identity(service, f"Guest {n}"))
        answers = await asyncio.gather(
            call(ann, "POST", "link", {"guestIdentityId": guest}),
            call(root, "POST", "admin/merge", {"targetId": guest, "sourceIds": [own]}),
        )
        assert {answer.status_code for answer in answers} <= {200, 400, 404, 503}
        everything = {str(id_): document for id_, document in (await stored(service)).items()}
        assert not (everything[guest]["mergedInto"] and everything[own]["mergedInto"])
        if everything[own]["isDeleted"]:
            await ok(root, "POST", f"admin/{own}/restore")
    await assert_both_stores_hold_the_same(service)


@pytest.mark.parametrize("phase", PHASES)
async def test_an_administrators_merge_takes_all_or_none_and_is_undone_one_by_one(
    serve: Serve, phase: str
) -> None:
    service = await serve(phase)
    root, ann = await administrator(service), await person(service, "Ann")
    own = await own_identity(ann)
    guests = [str(await identity(service, f"Guest {n}")) for n in range(3)]
    before = await stored(service)
    merging = {"targetId": own, "sourceIds": guests}
    assert_problem(await call(ann, "POST", "admin/merge", merging), 403)
    for refused, status in (
        ({"targetId": own, "sourceIds": [*guests, str(ObjectId())]}, 404),
        ({"targetId": own, "sourceIds": [*guests, own]}, 400),
        ({"targetId": own, "sourceIds": []}, 400),
    ):
        assert_problem(await call(root, "POST", "admin/merge", refused), status)
    assert await stored(service) == before

    merged = await ok(root, "POST", "admin/merge", merging)
    assert [link["identityId"] for link in merged["identity"]["linkedIdentities"]] == guests
    for guest in guests:
        assert_problem(await call(ann, "GET", guest), 404)
    assert_problem(await call(root, "POST", "admin/merge", merging), 400)
    found = await ok(root, "GET", "admin/all", search="guest")
    assert {(one["isDeleted"], one["mergedInto"]) for one in found["identities"]} == {(True, own)}

    assert (await ok(root, "POST", f"admin/unlink/{guests[0]}"))["identity"]["isDeleted"] is False
    await ok(root, "POST", f"admin/{guests[1]}/restore")
    await ok(root, "POST", f"admin/unlink/{guests[2]}")
    after = await stored(service)
    assert after[ObjectId(own)]["linkedIdentities"] == []
    for guest in map(ObjectId, guests):
        assert after[guest] == before[guest]
    if phase != "mongo_only":
        await assert_both_stores_hold_the_same(service)


@pytest.mark.parametrize("phase", PHASES)
async def test_an_alias_is_nobody_elses_name(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    root, ann, bob = await administrator(service), await person(service, "Ann"), await person(service, "Bob")
    own, bobs = await own_identity(ann), await own_identity(bob)
    added = await ok(ann, "POST", f"{own}/alias", {"aliasName": " The Queen "})
    [alias] = added["identity"]["aliases"]
    assert (alias["name"], alias["normalizedName"], alias["addedBy"]) == ("The Queen", "the queen", ann.id)
    assert ObjectId.is_valid(alias["_id"])
    for taken in ("the QUEEN", "bob", "Ann"):
        assert_problem(await call(bob, "POST", f"{bobs}/alias", {"alias": taken}), 400)
    for bad in ("", "  ", "x" * 51, "a\0b"):
        assert_problem(await call(ann, "POST", f"{own}/alias", {"aliasName": bad}), 400)
    assert_problem(await call(bob, "POST", f"{own}/alias", {"aliasName": "Thief"}), 403)
    assert_problem(await call(bob, "DELETE", f"{own}/alias/the queen"), 403)
    found = await ok(bob, "GET", "search", q="QUEEN")
    assert [one["_id"] for one in found["identities"]] == [own]

    split = await ok(root, "POST", "admin/split", {"identityId": own, "aliasName": "the queen"})
    assert split["identity"]["aliases"] == []
    new = split["newIdentity"]
    assert (new["displayName"], new["type"], new["userId"]) == ("The Queen", "guest", None)
    assert_problem(
        await call(root, "POST", "admin/split", {"identityId": own, "aliasName": "the queen"}), 404
    )
    await ok(root, "POST", f"{own}/alias", {"name": "Duchess/2"})
    assert (await ok(ann, "DELETE", f"{own}/alias/duchess/2"))["identity"]["aliases"] == []
    assert_problem(await call(ann, "DELETE", f"{own}/alias/duchess"), 404)
    if phase != "mongo_only":
        await assert_both_stores_hold_the_same(service)


@pytest.mark.parametrize("phase", ["dual_write", "postgres_primary"])
async def test_of_two_who_take_one_alias_at_once_at_most_one_has_it(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    people = [await person(service, name) for name in ("Ann", "Bob", "Eve")]
    owns = [await own_identity(each) for each in people]
    answers = await asyncio.gather(
        *(
            call(each, "POST", f"{own}/alias", {"aliasName": "Ace"})
            for each, own in zip(people, owns, strict=True)
        )
    )
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses in ([200, 400, 400], [400, 400, 400])
    holders = [each for each in (await stored(service)).values() if each["aliases"]]
    assert len(holders) == statuses.count(200)


@pytest.mark.parametrize("phase", PHASES)
async def test_identities_are_assigned_deleted_and_restored(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    root, ann = await administrator(service), await person(service, "Ann")
    guest = str(await identity(service, "Guest"))
    for path, body in (
        ("admin/assign", {"identityId": guest, "userId": ann.id}),
        (f"admin/unlink/{guest}", None),
        (f"admin/{guest}/restore", None),
        ("admin/link", {"guestIdentityId": guest, "userId": ann.id}),
    ):
        assert_problem(await call(ann, "POST", path, body), 403)
    assert_problem(await call(ann, "DELETE", f"admin/{guest}"), 403)
    assert_problem(await call(ann, "GET", "admin/all"), 403)
    nobody = {"identityId": guest, "userId": str(ObjectId())}
    assert_problem(await call(root, "POST", "admin/assign", nobody), 404)

    assigned = await ok(root, "POST", "admin/assign", {"identityId": guest, "userId": ann.id})
    assert (assigned["identity"]["userId"], assigned["identity"]["type"]) == (ann.id, "user")
    assert (await ok(ann, "GET", "me"))["stats"]["identities"] == 2
    parted = await ok(root, "POST", f"admin/unlink/{guest}")
    assert (parted["identity"]["userId"], parted["identity"]["type"]) == (None, "guest")
    assert_problem(await call(root, "POST", f"admin/unlink/{guest}"), 400)

    linked = await ok(root, "POST", "admin/link", {"guestIdentityId": guest, "userId": ann.id})
    assert linked["userIdentity"]["userId"] == ann.id
    detail = await ok(ann, "GET", guest)
    assert (detail["standsFor"]["userId"], detail["recentGames"]) == (ann.id, [])
    guests = await ok(ann, "GET", "link/guest-identities", search="gue")
    [shown] = guests["identities"]
    assert (shown["gameCount"], shown["linkedToUser"]) == (3, {"_id": ann.id, "username": "Ann"})
    assert shown["linkedAt"] is not None
    await ok(root, "POST", "admin/unlink-guest", {"guestIdentityId": guest, "userId": ann.id})

    gone = await ok(root, "DELETE", f"admin/{guest}")
    assert (gone["identity"]["isDeleted"], gone["identity"]["deletedAt"] is None) == (True, False)
    assert_problem(await call(ann, "GET", guest), 404)
    assert_problem(await call(root, "DELETE", f"admin/{guest}"), 404)
    assert_problem(await call(ann, "POST", "link", {"guestIdentityId": guest}), 404)
    assert (await ok(ann, "GET", "search", q="guest"))["pagination"]["total"] == 0
    back = await ok(root, "POST", f"admin/{guest}/restore")
    assert (back["identity"]["isDeleted"], back["identity"]["deletedAt"]) == (False, None)
    assert_problem(await call(root, "POST", f"admin/{guest}/restore"), 400)
    if phase != "mongo_only":
        await assert_both_stores_hold_the_same(service)


@pytest.mark.parametrize("phase", PHASES)
async def test_lists_have_pages_and_filters(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    root, ann = await administrator(service), await person(service, "Ann")
    for n in range(7):
        await identity(service, f"Player {n}", type=("guest", "imported")[n % 2], isDeleted=n == 6)
    if phase != "mongo_only":
        await settled(service)
    first = await ok(ann, "GET", "search", q="PLAYER", limit=4)
    assert [one["displayName"] for one in first["identities"]] == [f"Player {n}" for n in range(4)]
    assert first["pagination"] == {"page": 1, "limit": 4, "total": 6, "pages": 2}
    second = await ok(ann, "GET", "search", q="player", limit=4, page=2)
    assert [one["displayName"] for one in second["identities"]] == ["Player 4", "Player 5"]
    beyond = await ok(ann, "GET", "search", q="player", limit=4, page=3)
    assert beyond == {"identities": [], "pagination": {"page": 3, "limit": 4, "total": 6, "pages": 2}}
    assert (await ok(ann, "GET", "search", limit=1000))["pagination"]["limit"] == 50
    assert (await ok(ann, "GET", "search"))["pagination"]["limit"] == 20
    assert (await ok(ann, "GET", "search", q="%_\\.*("))["pagination"]["total"] == 0
    for bad in ({"page": 0}, {"limit": 0}, {"page": "one"}, {"q": "a\0b"}):
        assert_problem(await call(ann, "GET", "search", **bad), 400)
    assert_problem(await service.get("/api/identities/search?q=a"), 401)

    everybody = await ok(root, "GET", "admin/all")
    assert everybody["pagination"] == {"page": 1, "limit": 50, "total": 9, "pages": 1}
    assert (await ok(root, "GET", "admin/all", linked="true"))["pagination"]["total"] == 2
    assert (await ok(root, "GET", "admin/all", linked="false"))["pagination"]["total"] == 7
    some = await ok(root, "GET", "admin/all", type="imported", search="player")
    assert [one["displayName"] for one in some["identities"]] == ["Player 1", "Player 3", "Player 5"]
    assert_problem(await call(root, "GET", "admin/all", type="emperor"), 400)


@pytest.mark.parametrize("phase", PHASES)
async def test_guests_are_suggested_by_the_names_that_one_has_or_had(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    ann = await person(service, "Ann")
    exact = await identity(service, "ann")
    part = await identity(service, "Annabel")
    await identity(service, "Bob")
    await identity(service, "Hannah", type="user", userId=ObjectId())
    if phase != "mongo_only":
        await settled(service)
    suggested = (await ok(ann, "GET", "link/suggestions"))["suggestions"]
    assert [(one["_id"], one["exact"]) for one in suggested] == [(str(exact), True), (str(part), False)]


@pytest.mark.parametrize("phase", PHASES)
async def test_ratings_are_shown_as_they_are_stored(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    ann = await person(service, "Ann")
    entries = [
        {"rating": 1200 - n, "change": 1, "placement": 1, "date": now(), "_id": ObjectId()} for n in range(50)
    ]
    rating = {"rating": 1200, "peak": 1210, "floor": 990, "gamesPlayed": 80, "streak": -2, "history": entries}
    player = str(
        await identity(service, "Player", eloByGameType={"phase-10": rating, "wizard": {"rating": 1000.5}})
    )
    shown = await ok(ann, "GET", f"elo/history/{player}", gameType="Phase 10")
    assert {name: shown[name] for name in ("currentRating", "peak", "floor", "gamesPlayed", "streak")} == {
        "currentRating": 1200, "peak": 1210, "floor": 990, "gamesPlayed": 80, "streak": -2,
    }  # fmt: skip
    assert (shown["gameType"], shown["allGameTypes"]) == ("phase-10", ["phase-10", "wizard"])
    assert [entry["rating"] for entry in shown["history"]] == [1200 - n for n in range(20)]
    assert (
        len((await ok(ann, "GET", f"elo/history/{player}", gameType="phase-10", limit=500))["history"]) == 50
    )
    assert (await ok(ann, "GET", f"elo/history/{player}"))["currentRating"] == 1000.5
    every = await ok(ann, "GET", f"elo/all/{player}")
    assert (every["gameTypes"], len(every["eloByGameType"]["phase-10"]["history"])) == (
        ["phase-10", "wizard"],
        50,
    )
    newcomer = await ok(ann, "GET", "elo/me", gameType="skat")
    assert (newcomer["hasIdentity"], newcomer["currentRating"], newcomer["history"]) == (True, 1000, [])
    assert await ok(ann, "GET", "elo/me/all") == {"hasIdentity": True, "eloByGameType": {}, "gameTypes": []}
    root = await administrator(service)
    await ok(root, "DELETE", f"admin/{await own_identity(ann)}")
    assert await ok(ann, "GET", "elo/me") == {"hasIdentity": False}
    assert await ok(ann, "GET", "elo/me/all") == {"hasIdentity": False}
    assert_problem(await call(ann, "GET", f"elo/history/{ObjectId()}"), 404)


@pytest.mark.parametrize("phase", PHASES)
async def test_chains_lead_to_their_end_and_cycles_of_old_data_nowhere(serve: Serve, phase: str) -> None:
    service = await serve(phase)
    root, ann = await administrator(service), await person(service, "Ann")
    own = ObjectId(await own_identity(ann))
    last = own
    for n in range(5):
        last = await identity(service, f"Link {n}", type="imported", mergedInto=last)
    one, other, alone = ObjectId(), ObjectId(), ObjectId()
    await identity(service, "Cycle 1", _id=one, type="imported", mergedInto=other)
    await identity(service, "Cycle 2", _id=other, type="imported", mergedInto=one)
    await identity(service, "Cycle 3", _id=alone, type="imported", mergedInto=alone)
    dangling = await identity(service, "Ghost", type="imported", mergedInto=ObjectId())
    assert (await ok(ann, "GET", str(last)))["standsFor"] == {
        "_id": str(own), "displayName": "Ann", "userId": ann.id,
    }  # fmt: skip
    for lost in (one, other, alone, dangling):
        assert (await ok(ann, "GET", str(lost)))["standsFor"] is None
        assert_problem(await call(ann, "POST", "link", {"guestIdentityId": str(lost)}), 400)
    guests = {
        each["displayName"]: each for each in (await ok(ann, "GET", "link/guest-identities"))["identities"]
    }
    assert guests["Link 4"]["linkedToUser"]["username"] == "Ann"
    assert {guests[name]["linkedToUser"] for name in ("Cycle 1", "Cycle 2", "Cycle 3", "Ghost")} == {None}
    # An administrator gets them out of it.
    assert (await ok(root, "POST", f"admin/unlink/{one}"))["identity"]["mergedInto"] is None
    assert (await ok(ann, "GET", str(other)))["standsFor"]["_id"] == str(one)
