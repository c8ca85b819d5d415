"""Games over HTTP, the same in every phase."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from bson import Int64, ObjectId
from hypothesis import given
from hypothesis import strategies as st

from scorekeeper.games.data import as_stored, faults_of_wizard_game, winner_of_table_game
from scorekeeper.games.paging import Portion, number_in, pages, portion

from .conftest import PHASES, Serve, Service, assert_problem

NOBODYS_ID = "6" * 24


def wizard_game(*names: str, **changes: Any) -> dict[str, Any]:
    players = [{"id": f"p{n}", "name": name} for n, name in enumerate(names or ("Ann", "Cid", "Dee"), 1)]
    entries = [{"id": player["id"], "call": 1, "made": 1, "score": 30} for player in players]
    return {
        "version": "3.0",
        "created_at": "2026-01-31T10:30:00.000Z",
        "total_rounds": 1,
        "players": players,
        "round_data": [{"round": 1, "cards": 1, "players": entries}],
        "final_scores": {player["id"]: 30 for player in players},
        "winner_ids": [players[0]["id"]],
        "gameFinished": True,
        **changes,
    }


def table_game(**changes: Any) -> dict[str, Any]:
    players = [{"name": "Ann", "points": ["18", 20]}, {"name": "Zed", "points": [0, 24.5, "x"]}]
    return {"gameName": "Skat", "rows": 2, "gameFinished": True, "players": players, **changes}


class Client:
    """Somebody who is signed in."""

    def __init__(self, service: Service, user: dict[str, Any], token: str) -> None:
        self.service = service
        self.id = user["id"]
        self._headers = {"Authorization": f"Bearer {token}"}

    async def get(self, path: str) -> httpx.Response:
        return await self.service.http.get(path, headers=self._headers)

    async def send(self, method: str, path: str, body: Any = None) -> httpx.Response:
        return await self.service.http.request(method, path, json=body, headers=self._headers)

    async def keep(self, kind: str, local_id: str, data: Any) -> httpx.Response:
        return await self.send("POST", f"/api/{kind}-games", {"gameData": data, "localId": local_id})


async def signed_in(service: Service, name: str) -> Client:
    body = (await service.register(name)).json()
    return Client(service, body["user"], body["token"])


@pytest.fixture(params=PHASES)
async def service(request: pytest.FixtureRequest, serve: Serve) -> Service:
    return await serve(request.param)


@pytest.fixture
async def ann(service: Service) -> Client:
    return await signed_in(service, "Ann")


async def test_a_game_of_wizard_is_kept_once_and_shown_as_it_was_sent(service: Service, ann: Client) -> None:
    sent = wizard_game(note="né 2^53", big=2**53, half=0.5, nothing=None, deep={"z": [1, {"a": True}]})
    kept = await ann.keep("wizard", "game_1", sent)
    assert kept.status_code == 201, kept.text
    game = kept.json()["game"]
    assert set(kept.json()) == {"message", "game"}
    assert (set(game), game["localId"]) == ({"id", "localId", "version", "createdAt"}, "game_1")
    assert (game["version"], game["createdAt"][-1]) == ("3.0", "Z")

    again = assert_problem(await ann.keep("wizard", "game_1", wizard_game()), 409)
    assert again["existingGame"] == {"id": game["id"], "localId": "game_1"}

    document = (await ann.get(f"/api/wizard-games/{game['id']}")).json()
    assert (document["_id"], document["userId"], document["__v"]) == (game["id"], ann.id, 0)
    assert document["createdAt"] == game["createdAt"]
    for player in document["gameData"]["players"]:
        assert ObjectId.is_valid(player.pop("identityId"))
    assert document["gameData"] == sent
    assert list(document["gameData"]) == list(sent)
    assert (await service.get(f"/api/wizard-games/public/{game['id']}")).json().keys() == document.keys()

    found = await ann.send(
        "POST", "/api/wizard-games/batch-check", {"gameIds": [game["id"], NOBODYS_ID, "x"]}
    )
    assert found.json() == {"results": {game["id"]: True, NOBODYS_ID: False, "x": False}}

    bob = await signed_in(service, "Bob")
    assert (await bob.get(f"/api/wizard-games/{game['id']}")).status_code == 200
    assert_problem(await bob.send("DELETE", f"/api/wizard-games/{game['id']}"), 403)
    assert (await ann.send("DELETE", f"/api/wizard-games/{game['id']}")).json().keys() == {"message"}
    for path in (f"/api/wizard-games/{game['id']}", f"/api/wizard-games/public/{game['id']}"):
        assert_problem(await ann.get(path), 404)
    assert_problem(await ann.send("DELETE", f"/api/wizard-games/{game['id']}"), 404)


async def test_two_who_send_one_local_id_at_once_make_one_game(service: Service, ann: Client) -> None:
    answers = await asyncio.gather(*(ann.keep("wizard", "same", wizard_game()) for _ in range(3)))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409]
    ids = {(answer.json().get("game") or answer.json()["existingGame"])["id"] for answer in answers}
    assert len(ids) == 1
    tables = await asyncio.gather(*(ann.keep("table", "same", table_game()) for _ in range(3)))
    assert sorted(answer.status_code for answer in tables) == [200, 200, 201]
    assert len({answer.json()["game"]["_id"] for answer in tables}) == 1
    assert (await ann.get("/api/table-games")).json()["total"] == 1
    # Of its kind: a table game may have the local id of a game of Wizard.
    assert (await ann.get("/api/wizard-games")).json()["total"] == 1


async def test_players_without_an_account_become_guests_whom_a_registration_takes_over(
    service: Service, ann: Client
) -> None:
    await ann.keep("wizard", "one", wizard_game("Ann", "Cid", "  DEE "))
    await ann.keep("table", "two", table_game(players=[{"name": "cid"}, {"name": "Dee"}, {"name": "Al"}]))
    first = (await ann.get("/api/wizard-games")).json()["games"][0]["gameData"]["players"]
    second = (await ann.get("/api/table-games")).json()["games"][0]["gameData"]["players"]
    own = (await ann.get("/api/users/me")).json()["user"]["identities"]
    assert [first[0]["identityId"]] == [identity["_id"] for identity in own]
    assert [first[1]["identityId"], first[2]["identityId"]] == [player["identityId"] for player in second[:2]]
    assert len({player["identityId"] for player in (*first, *second)}) == 4

    accounts = service.app.state.accounts
    guest = await accounts["users"].find_one({"username": "Cid"})
    assert (guest.get("role"), guest.get("passwordHash")) == ("guest", None)
    assert guest.get("guestMetadata") == {"createdByUserId": ObjectId(ann.id), "originalGuestId": None}
    identity = await accounts["identities"].get(ObjectId(first[1]["identityId"]))
    assert (identity.get("type"), identity.get("userId")) == ("guest", guest.id)
    # Too short for a user's name: a player all the same.
    assert await accounts["users"].find_one({"username": "Al"}) is None

    cid = await signed_in(service, "Cid")
    assert cid.id == str(guest.id)
    mine = (await cid.get("/api/users/me")).json()["user"]["identities"]
    assert [each["_id"] for each in mine] == [first[1]["identityId"]]
    third = wizard_game("Cid", "Dee", "Ann")
    await cid.keep("wizard", "three", third)
    players = (await cid.get("/api/wizard-games")).json()["games"][0]["gameData"]["players"]
    assert [player["identityId"] for player in players] == [first[n]["identityId"] for n in (1, 2, 0)]


async def test_lists_are_newest_first_and_their_portions_join(service: Service, ann: Client) -> None:
    bob = await signed_in(service, "Bob")
    start = datetime(2025, 1, 1, tzinfo=UTC)
    for n in range(7):
        owner = ObjectId((bob if n == 3 else ann).id)
        document = {"userId": owner, "localId": f"g{n}", "gameData": {"n": n}, "__v": 0}
        # The oldest documents have no date; some have one date.
        stamps = {} if n == 0 else {"createdAt": start + timedelta(days=n // 2), "updatedAt": start}
        await service.app.state.accounts["wizard_games"].insert({**document, **stamps})

    async def listed(query: str) -> tuple[list[int], dict[str, Any]]:
        answer = await ann.get(f"/api/wizard-games?{query}")
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert all("__v" not in game for game in body["games"])
        return [game["gameData"]["n"] for game in body["games"]], body

    everything, body = await listed("")
    assert everything == [6, 5, 4, 2, 1, 0]
    assert (body["total"], body["limit"], body["skip"]) == (6, 50, 0)
    assert body["pagination"] == {
        "currentPage": 1, "totalPages": 1, "hasNextPage": False, "hasPrevPage": False,
    }  # fmt: skip
    pages_ = [await listed(f"page={page}&limit=4") for page in (1, 2, 3)]
    assert [page for page, _ in pages_] == [[6, 5, 4, 2], [1, 0], []]
    assert pages_[1][1]["skip"] == 4
    assert pages_[1][1]["pagination"] == {
        "currentPage": 2, "totalPages": 2, "hasNextPage": False, "hasPrevPage": True,
    }  # fmt: skip
    assert (await listed("skip=5&limit=abc"))[0] == [0]
    assert (await listed("sortOrder=asc&limit=2"))[0] == [0, 1]
    assert (await listed("allGames=true&limit=1000"))[0] == [6, 5, 4, 3, 2, 1, 0]
    assert (await listed("allGames=true&limit=1000"))[1]["limit"] == 200
    for path in ("/api/wizard-games", "/api/table-games"):
        assert_problem(await service.get(path), 401)


async def test_a_table_game_is_for_its_owner_and_those_who_played(service: Service, ann: Client) -> None:
    zed = await signed_in(service, "Zed")
    kept = await ann.keep("table", "t1", table_game())
    assert kept.status_code == 201, kept.text
    game = kept.json()["game"]
    assert kept.json()["duplicate"] is False
    expected = {
        "userId": ann.id, "localId": "t1", "name": "Skat", "gameType": "table", "gameTypeName": "Skat",
        "gameFinished": True, "playerCount": 2, "totalRounds": 2, "targetNumber": None, "lowIsBetter": False,
    }  # fmt: skip
    assert {name: game[name] for name in expected} == expected
    duplicate = await zed.keep("table", "t1", table_game(rows=9))
    assert duplicate.status_code == 200
    assert (duplicate.json()["game"], duplicate.json()["duplicate"]) == (game, True)
    assert duplicate.json()["message"]

    path = f"/api/table-games/{game['_id']}"
    assert (await ann.get(path)).json() == {"game": game}
    assert (await zed.get(path)).json() == {"game": game}
    eve = await signed_in(service, "Eve")
    assert_problem(await eve.get(path), 403)
    shown = (await service.get(f"/api/table-games/public/{game['_id']}")).json()["game"]
    assert shown["gameData"] == game["gameData"]
    assert "userId" not in shown
    assert_problem(await zed.send("DELETE", path), 403)
    assert (await eve.get("/api/table-games?allGames=true")).json()["total"] == 1
    assert (await eve.get("/api/table-games")).json() == {"games": [], "total": 0}

    # Nested once more, as one version of the client sends it; without any data that describes it.
    nested = await ann.keep("table", "t2", {"gameData": {"players": [{"name": "Eve"}]}, "version": "1.0"})
    assert nested.json()["game"]["playerCount"] == 1
    assert (await eve.get(f"/api/table-games/{nested.json()['game']['_id']}")).status_code == 200
    assert (await ann.send("DELETE", path)).status_code == 200
    assert_problem(await ann.get(path), 404)


async def test_everybody_sees_the_newest_games_and_the_shared_ones(service: Service, ann: Client) -> None:
    kept = (await ann.keep("wizard", "w1", wizard_game(winner_id="p1"))).json()["game"]
    await ann.keep("table", "t1", table_game(lowIsBetter=True))
    await ann.keep("table", "t2", table_game(gameFinished=False))
    recent = (await service.get("/api/games/recent")).json()
    assert recent["totalGames"] == 2
    table, wizard = recent["games"]
    assert wizard == {
        "id": kept["id"], "cloudId": kept["id"], "localId": "w1", "winner_id": "p1", "gameFinished": True,
        "players": [{"name": name, "id": f"p{n}"} for n, name in enumerate(("Ann", "Cid", "Dee"), 1)],
        "final_scores": {"p1": 30, "p2": 30, "p3": 30}, "total_rounds": 1, "gameType": "wizard",
        "created_at": kept["createdAt"],
    }  # fmt: skip
    del table["id"], table["cloudId"], table["created_at"]
    assert table == {
        "localId": "t1", "name": "Skat", "players": ["Ann", "Zed"], "totalRounds": 2, "gameFinished": True,
        "gameType": "table", "winner_name": "Zed",
    }  # fmt: skip
    assert len((await service.get("/api/games/recent?limit=1")).json()["games"]) == 1

    share = f"/api/games/{kept['id']}/share"
    shared = (await ann.send("PUT", share, {"shareId": "s-1"})).json()
    assert shared["game"] == {**shared["game"], "id": kept["id"], "shareId": "s-1", "isShared": True}
    found = (await service.get("/api/games/shared/s-1")).json()["game"]
    assert set(found) == {"id", "gameData", "shareId", "sharedAt", "createdAt"}
    assert (found["id"], found["sharedAt"]) == (kept["id"], shared["game"]["sharedAt"])
    assert (await ann.send("PUT", share, {"shareId": "s-1"})).status_code == 200
    other = (await ann.keep("wizard", "w2", wizard_game())).json()["game"]
    assert_problem(await ann.send("PUT", f"/api/games/{other['id']}/share", {"shareId": "s-1"}), 409)
    assert_problem(await (await signed_in(service, "Bob")).send("PUT", share, {"shareId": "s-2"}), 403)
    assert_problem(await ann.send("PUT", f"/api/games/{NOBODYS_ID}/share", {"shareId": "s-2"}), 404)
    assert_problem(await ann.send("PUT", share, {"shareId": ""}), 400)
    for unknown in ("s-2", "%00", "x" * 3000):
        assert_problem(await service.get(f"/api/games/shared/{unknown}"), 404)


async def test_a_profile_shows_the_newest_games_of_its_player(service: Service, ann: Client) -> None:
    bob = await signed_in(service, "Bob")
    kept = (await bob.keep("wizard", "w1", wizard_game("Ann", "Bob", "Cid"))).json()["game"]
    table = (await bob.keep("table", "t1", {"gameData": table_game()})).json()["game"]
    await bob.keep("wizard", "w2", wizard_game("Bob", "Cid", "Dee"))
    accounts = service.app.state.accounts
    [identity] = await accounts["identities"].find({"userId": ObjectId(ann.id)})
    entry = {"rating": 1016, "change": 16, "placement": 1, "gameId": kept["id"]}
    await accounts["identities"].update(identity.id, {"eloByGameType": {"wizard": {"history": [entry]}}})

    games = (await service.get("/api/users/ann/profile")).json()["games"]
    assert [(game["id"], game["gameType"]) for game in games] == [
        (table["_id"], "table"),
        (kept["id"], "wizard"),
    ]
    shown = games[1]
    data = shown.pop("gameData")
    assert shown == {
        "id": kept["id"], "gameType": "wizard", "created_at": kept["createdAt"], "winner_ids": ["p1"],
        "winner_id": "p1", "eloChange": 16, "eloRating": 1016, "eloPlacement": 1,
    }  # fmt: skip
    assert set(data) == {"players", "total_rounds", "final_scores", "round_data", "winner_ids"}
    assert games[0]["gameTypeName"] == games[0]["name"] == "Skat"
    assert (games[0]["lowIsBetter"], games[0]["eloChange"]) == (False, None)


async def test_old_games_are_shown_whatever_is_in_them(service: Service, ann: Client) -> None:
    odd = [
        {"gameData": {"version": "1.0", "players": ["Ann", 5, None], "final_scores": [], "x": float("nan")}},
        {"gameData": None, "createdAt": "31.1.2026"},
        {"createdAt": datetime(2026, 1, 1, tzinfo=UTC), "gameData": {"players": {}, "n": Int64(2**60)}},
        {"gameFinished": True, "gameData": {"gameData": {"players": [{"points": 7}, {"name": None}]}}},
    ]
    for entity in ("wizard_games", "table_games", "games"):
        for n, document in enumerate(odd):
            ids = {"_id": str(ObjectId())} if n == 1 else {}
            await service.app.state.accounts[entity].insert(
                {**ids, "userId": "guest_7" if n else ann.id, "localId": f"{entity} {n}", **document}
            )
    for path in ("/api/games/recent", "/api/wizard-games?allGames=true", "/api/table-games?allGames=true"):
        answer = await ann.get(path)
        assert answer.status_code == 200, answer.text
    listed = (await ann.get("/api/wizard-games?allGames=true")).json()["games"]
    assert len(listed) == 4
    for game in listed:
        assert (await ann.get(f"/api/wizard-games/{game['_id']}")).json()["localId"] == game["localId"]
    # An owner whose id was written as text.
    assert (await ann.get("/api/wizard-games")).json()["total"] == 1


@pytest.fixture
async def dual(serve: Serve) -> Client:
    return await signed_in(await serve("dual_write"), "Ann")


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (None, "gameData must be an object"),
        ([], "gameData must be an object"),
        ({}, 'version must be "3.0"'),
        (wizard_game(version="2.0"), 'version must be "3.0"'),
        (wizard_game("Ann", "Cid"), "At least 3 players are required"),
        (wizard_game("Ann", "Cid", " "), "Player 3: name is required"),
        (wizard_game("Ann", "Cid", "a\0b"), "Player 3: name cannot be anybody's"),
        (wizard_game(players=[{"name": "A"}, 5, {"id": "p3", "name": "C"}]), "Player 1: id is required"),
        (wizard_game(players="none"), "players must be a list"),
        (wizard_game(*(f"p{n}" for n in range(51))), "At most 50 players are possible"),
        (wizard_game(round_data=None), "round_data must be a list"),
        (wizard_game(round_data=[5]), "Round 1: players must be a list"),
        (
            wizard_game(round_data=[{"players": [{"id": "p1", "score": 1}]}]),
            "Round 1, player 1: made is required",
        ),
        (
            wizard_game(round_data=[{"players": [{"id": "p1", "score": "1", "made": 0}]}]),
            "Round 1, player 1: score must be a number",
        ),
        (wizard_game(final_scores=[1]), "final_scores must be an object"),
        (wizard_game(**{"a\0b": 1}), "gameData has a field whose name cannot be stored"),
        (wizard_game(note="\ud800"), "gameData holds text that is not valid Unicode"),
        (wizard_game(much=10**400), "gameData holds a number that is out of range"),
    ],
)
async def test_what_is_no_game_is_refused_with_every_reason(dual: Client, data: Any, fault: str) -> None:
    answer = await dual.service.http.post(
        "/api/wizard-games",
        content=_escaped({"gameData": data, "localId": "x"}),
        headers={**dual._headers, "Content-Type": "application/json"},
    )
    assert fault in assert_problem(answer, 400)["validationErrors"]


def _escaped(body: Any) -> bytes:
    import json

    return json.dumps(body).encode()


async def test_odd_requests_are_refused_in_the_contracts_way(dual: Client) -> None:
    for local_id in (None, "", 5, "x" * 201, "a\0"):
        faults = assert_problem(await dual.keep("wizard", local_id, {}), 400)["validationErrors"]  # type: ignore[arg-type]
        assert len(faults) > 1
        assert_problem(await dual.keep("table", local_id, {}), 400)  # type: ignore[arg-type]
    deep: Any = {}
    for _ in range(100):
        deep = {"d": deep}
    assert_problem(await dual.keep("table", "deep", deep), 400)
    assert_problem(await dual.keep("table", "wide", {"x": [0.5] * 2_000_000}), 413)
    for bad in ("x", "6" * 23, "%00", "g" * 24, "me"):
        for path in ("wizard-games/{}", "wizard-games/public/{}", "table-games/{}", "table-games/public/{}"):
            assert_problem(await dual.get(f"/api/{path.format(bad)}"), 400)
    for ids in (None, [], "x", ["6" * 24] * 101):
        assert_problem(await dual.send("POST", "/api/wizard-games/batch-check", {"gameIds": ids}), 400)
    strange = {"$where": 1, "a.b": {"$set": {"": 2}}, "players": [{"name": "Ann", "$x": 1}]}
    kept = (await dual.keep("table", "strange", strange)).json()["game"]
    assert (await dual.get(f"/api/table-games/{kept['_id']}")).json()["game"] == kept
    assert kept["gameData"]["a.b"] == {"$set": {"": 2}}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(value=json_values)
def test_data_is_stored_with_the_numbers_of_javascript(value: Any) -> None:
    try:
        stored = as_stored(value)
    except ValueError:
        return
    if isinstance(value, int | float) and not isinstance(value, bool):
        assert stored == float(value)
        assert (type(stored) is int) <= (-(2**31) <= stored < 2**31)
    elif not isinstance(value, list | dict):
        assert stored == value
    assert as_stored(stored) == stored


@given(
    value=st.dictionaries(st.sampled_from(["version", "players", "round_data", "final_scores"]), json_values)
)
def test_any_json_has_faults_or_is_a_game(value: dict[str, Any]) -> None:
    assert all(isinstance(fault, str) for fault in faults_of_wizard_game(value))


@given(
    data=json_values
    | st.fixed_dictionaries({"players": st.lists(st.fixed_dictionaries({"points": json_values}))})
)
def test_any_table_game_has_a_winner_in_words(data: Any) -> None:
    assert isinstance(winner_of_table_game(data, low_is_better=True), str)


@given(skip=st.integers(0, 1000), limit=st.integers(1, 200), total=st.integers(0, 1000))
def test_there_is_a_next_page_while_games_are_left(skip: int, limit: int, total: int) -> None:
    skip -= skip % limit
    told = pages(Portion(skip, limit), total)["pagination"]
    assert told["hasNextPage"] == (skip + limit < total)
    assert told["hasPrevPage"] == (skip > 0)


def test_numbers_in_queries_are_read_as_javascript_reads_them() -> None:
    for text, number in (
        (None, 50),
        ("", 50),
        ("abc", 50),
        ("0", 50),
        (" 7.9", 7),
        ("20x", 20),
        ("-3", 1),
        ("9e9", 9),
    ):
        assert number_in(text, 50, low=1, high=200) == number, text
    assert portion("3", "7", "10", usual=50, most=200) == Portion(20, 10)
    assert portion(None, "7", None, usual=50, most=200) == Portion(7, 50)
    assert portion("9" * 18, None, "200", usual=50, most=200).skip < 2**31
