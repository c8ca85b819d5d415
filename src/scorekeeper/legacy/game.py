"""Played games: `games` (formats 1.0 and 2.0), `wizard` (3.0) and `tablegames`, with their free-form `gameData`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import datetime, timedelta
from random import Random
from typing import Any

from bson import ObjectId

from scorekeeper.legacy.dirt import (
    Document,
    Labelled,
    Pen,
    documents,
    finish,
    odd_name,
    other_id,
    pen_for,
    stain,
)
from scorekeeper.legacy.identity import identity_id, identity_name
from scorekeeper.legacy.population import AS_OF, BEGIN, Population, later
from scorekeeper.legacy.rates import DEFAULT_RATES, DirtRates

# Few games carry the log of every tap that one version of the client wrote; it makes them hundreds of KiB.
_WITH_LOG = 0.004
_TABLE_GAMES = ("Skat", "Phase 10", "Rummy", "Doppelkopf", "Qwixx", "Uno")


def games(seed: int, n: int, rates: DirtRates = DEFAULT_RATES, *, users: int = 20_000) -> Iterator[Document]:
    """The `n` documents of collection `games`, formats 1.0 and 2.0, played by a population of `users`."""
    return documents(labelled_games(Population(seed, users, rates), n))


def wizard_games(
    seed: int, n: int, rates: DirtRates = DEFAULT_RATES, *, users: int = 20_000
) -> Iterator[Document]:
    """The `n` documents of collection `wizard`, format 3.0, played by a population of `users`."""
    return documents(labelled_wizard_games(Population(seed, users, rates), n))


def table_games(
    seed: int, n: int, rates: DirtRates = DEFAULT_RATES, *, users: int = 20_000
) -> Iterator[Document]:
    """The `n` documents of collection `tablegames`, played by a population of `users`."""
    return documents(labelled_table_games(Population(seed, users, rates), n))


def labelled_games(population: Population, n: int) -> Iterator[Labelled]:
    """The documents of `games` with the kinds of dirt in them."""
    return (_labelled_card_game(population, "games", n, index) for index in range(n))


def labelled_wizard_games(population: Population, n: int) -> Iterator[Labelled]:
    """The documents of `wizard` with the kinds of dirt in them."""
    return (_labelled_card_game(population, "wizard", n, index) for index in range(n))


def labelled_table_games(population: Population, n: int) -> Iterator[Labelled]:
    """The documents of `tablegames` with the kinds of dirt in them."""
    return (_labelled_table_game(population, n, index) for index in range(n))


def _labelled_card_game(population: Population, collection: str, n: int, index: int) -> Labelled:
    random = population.random(collection, index)
    pen = pen_for(population, collection, index)
    created = population.moment(index, n)
    players = _players(random, population, created, pen)
    data = (
        _wizard_data(random, players, created)
        if collection == "wizard"
        else _old_data(random, players, created)
    )
    is_shared = random.random() < 0.08
    document: dict[str, Any] = {
        "_id": population.object_id(collection, index, created),
        "userId": _owner(random, population, pen, accounts_only=False),
        "localId": f"game_{int(created.timestamp() * 1000)}_{index:x}",
        "gameData": data,
    }
    if is_shared:
        # Sparse and not unique: a copied game carried its share id along.
        document["shareId"] = f"share-{max(0, index - (random.random() < 0.05)):06x}"
    document |= {"isShared": is_shared, "sharedAt": later(random, created) if is_shared else None}
    if collection == "wizard" and random.random() < 0.25:
        document |= {
            "migratedFrom": random.choice(("1.0", "2.0")),
            "migratedAt": later(random, created),
            "originalGameId": population.object_id("games", index, created),
        }
    document |= {
        "createdAt": created,
        "updatedAt": later(random, created, within=timedelta(days=60)),
        "__v": 0,
    }
    return _stained(
        document, pen, data, dates=[(document, "sharedAt"), (data, "created_at")], number="total_rounds"
    )


def _labelled_table_game(population: Population, n: int, index: int) -> Labelled:
    random = population.random("tablegames", index)
    pen = pen_for(population, "tablegames", index)
    created = population.moment(index, n)
    players = _players(random, population, created, pen)
    rounds = random.randint(1, 14)
    game_type = random.choice(_TABLE_GAMES)
    finished = random.random() < 0.8
    low_is_better = game_type in {"Phase 10", "Rummy", "Uno"}
    for player in players:
        player["points"] = [random.randint(0, 60) for _ in range(rounds)]
    data: dict[str, Any] = {
        "players": players,
        "rows": rounds,
        "gameName": game_type,
        "gameFinished": finished,
    }
    _log(random, data, created)
    document: dict[str, Any] = {
        "_id": population.object_id("tablegames", index, created),
        "userId": _owner(random, population, pen, accounts_only=True),
        "name": f"{game_type} {created:%d.%m.%Y}",
        "gameType": "table",
        "gameTypeName": game_type,
        "gameData": {"gameData": data, "version": "1.0"} if random.random() < 0.15 else data,
        "gameFinished": finished,
        "playerCount": len(players),
        "totalRounds": rounds,
        "targetNumber": random.choice((None, 100, 500)),
        "lowIsBetter": low_is_better,
        "localId": f"table_{int(created.timestamp() * 1000)}_{index:x}",
        "createdAt": created,
        "updatedAt": later(random, created, within=timedelta(days=60)),
        "__v": 0,
    }
    # Mongoose leaves an empty object out; what is dirty in one keeps it.
    if random.random() < 0.02 and not pen.kinds:
        del document["gameData"]
        data = {}
    return _stained(document, pen, data, dates=[], number="totalRounds", holder=document)


def _stained(
    document: dict[str, Any],
    pen: Pen,
    data: dict[str, Any],
    *,
    dates: list[tuple[dict[str, Any], str]],
    number: str,
    holder: dict[str, Any] | None = None,
) -> Labelled:
    def free() -> dict[str, Any]:
        document.setdefault("gameData", data)
        return data

    other_id(document, pen)
    stain(document, pen, dates=dates, free=free, numbers=[(data if holder is None else holder, number)])
    return finish(document, pen)


def _owner(random: Random, population: Population, pen: Pen, *, accounts_only: bool) -> ObjectId | str:
    has_no_account, index = random.random() < 0.08, random.randrange(max(population.users, 1))
    if pen.strikes("dangling_reference"):
        return population.gone(pen.random)
    if has_no_account and not accounts_only:
        return f"guest_{index}"
    return population.user_oid(index)


def _players(random: Random, population: Population, created: datetime, pen: Pen) -> list[dict[str, Any]]:
    """Three to six players who were there at the time, each with their identity as it is named in that game."""
    # Of the users by index, those made before this game are the first ones; see `Population.moment`.
    there = max(6, math.ceil(population.users * _share_of_users(created)))
    players: list[dict[str, Any]] = []
    for place, index in enumerate(random.sample(range(there), random.randint(3, 6))):
        identity, shape = identity_id(population, index), random.random()
        name = identity_name(population, index)
        player: dict[str, Any] = {
            "id": f"player_{place + 1}",
            "name": odd_name(name, pen) if place == 0 else name,
            "isDealer": place == 0,
        }
        if shape < 0.9:
            player["identityId"] = identity if shape < 0.6 else str(identity)
        if shape < 0.04:
            player["previousIdentityId"] = identity_id(population, random.randrange(there))
        players.append(player)
    return players


def _share_of_users(at: datetime) -> float:
    return float(((at - BEGIN) / (AS_OF - BEGIN)) ** (1 / 0.6))


def _wizard_data(random: Random, players: list[dict[str, Any]], created: datetime) -> dict[str, Any]:
    count = 60 // len(players) if random.random() < 0.5 else random.randint(3, 12)
    totals = {player["id"]: 0 for player in players}
    round_data = []
    for number in range(1, count + 1):
        entries = []
        for player in players:
            call, made = random.randint(0, min(number, 4)), random.randint(0, min(number, 4))
            score = 20 + 10 * made if call == made else -10 * abs(call - made)
            totals[player["id"]] += score
            entries.append({"id": player["id"], "call": call, "made": made, "score": score})
        round_data.append({"round": number, "cards": number, "players": entries})
    best = max(totals.values())
    seconds = random.randint(600, 7200)
    data: dict[str, Any] = {
        "version": "3.0",
        "created_at": created,
        "finished_at": min(AS_OF, created + timedelta(seconds=seconds)),
        "duration_seconds": seconds,
        "total_rounds": count,
        "gameFinished": True,
        "players": players,
        "round_data": round_data,
        "final_scores": totals,
        "winner_ids": [player for player, score in totals.items() if score == best],
    }
    data["winner_id"] = data["winner_ids"][0]
    _log(random, data, created)
    return data


def _old_data(random: Random, players: list[dict[str, Any]], created: datetime) -> dict[str, Any]:
    version = random.choice(("1.0", "2.0"))
    rounds = [
        {"round": number + 1, "scores": {player["id"]: random.randint(-40, 70) for player in players}}
        for number in range(random.randint(3, 20))
    ]
    data: dict[str, Any] = {"version": version, "created_at": created, "total_rounds": len(rounds)}
    # Format 1.0 kept players by name alone.
    data["players"] = [player["name"] for player in players] if version == "1.0" else players
    data["rounds"] = rounds
    _log(random, data, created)
    return data


def _log(random: Random, data: dict[str, Any], created: datetime) -> None:
    if random.random() < _WITH_LOG:
        entries = random.randint(300, 3000)
        data["log"] = [
            f"{number:05d} {created.isoformat()} tap on row {random.randrange(20)} by player_{random.randint(1, 6)}"
            + " undone and entered again" * random.randint(0, 4)
            for number in range(entries)
        ]
