"""Player identities: users and guests as games know them, with ratings, former names and what was merged in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
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
from scorekeeper.legacy.population import AS_OF, BLOCK, Population, later, sub_id
from scorekeeper.legacy.rates import DEFAULT_RATES, DirtRates

#: Game types as keys of the ELO map, with their shares.
_GAME_TYPES = ("wizard", "skat", "phase-10", "rummy", "doppelkopf", "qwixx")
#: The application keeps that many entries of a rating's history.
_HISTORY = 50
# ELO came with a later version; identities older than this share have none unless they played since.
_BEFORE_ELO = 0.15


def player_identities(
    seed: int, n: int, rates: DirtRates = DEFAULT_RATES, *, users: int | None = None
) -> Iterator[Document]:
    """The `n` documents of collection `playeridentities` of a population of `users` (default `n` / 1.1)."""
    population = Population(seed, round(n / 1.1) if users is None else users, rates)
    return documents(labelled_identities(population, n))


def labelled_identities(population: Population, n: int) -> Iterator[Labelled]:
    """The first `n` identities: one for each user in order, then players without any user."""
    return (_labelled_identity(population, n, index) for index in range(n))


def identity_id(population: Population, index: int) -> ObjectId:
    """What other documents call identity `index`."""
    return population.object_id("playeridentities", index, _created_at(population, index))


def identity_name(population: Population, index: int) -> str:
    """The display name of identity `index` before any dirt; that of its user, where it has one."""
    return population.base_name(index)


def _created_at(population: Population, index: int) -> datetime:
    # The first games with a player come soon after the player's account; players without one are strewn in.
    if index < population.users:
        return population.created_at(index)
    return population.moment(index * 7919 % max(population.users, 1), population.users)


def _is_guest(population: Population, index: int) -> bool:
    return index >= population.users or population.role(index) == "guest"


@dataclass(frozen=True, slots=True)
class _Merges:
    """What was merged within a block, by index.

    Attributes:
        into: identity -> the one that it was merged into.
        sources: identity -> those merged into it.
        in_cycle: identities that lead back to themselves.
        by_admin: identities merged by an admin, which deletes them.
    """

    into: dict[int, int]
    sources: dict[int, list[int]]
    in_cycle: frozenset[int]
    by_admin: frozenset[int]


@lru_cache(maxsize=4)
def _merges_of_block(population: Population, n: int, block: int) -> _Merges:
    first, last = block * BLOCK, min((block + 1) * BLOCK, n)
    random, dirt = population.random("merges", block), population.random("cycles", block)
    into: dict[int, int] = {}
    by_admin: set[int] = set()
    in_cycle: set[int] = set()
    # Half the rate: each cycle has two identities.
    for index in range(first, last - 1):
        strikes = dirt.random() < population.rates.merge_cycle / 2
        if strikes and index not in in_cycle and index + 1 not in in_cycle:
            into[index], into[index + 1] = index + 1, index
            in_cycle |= {index, index + 1}
    for index in range(first + 1, last):
        wants, target, is_admins = (
            random.random() < 0.12,
            random.randrange(first, index),
            random.random() < 0.2,
        )
        # Also into identities that were merged themselves: chains happen, always towards the older one.
        if wants and _is_guest(population, index) and index not in into:
            into[index] = target
            if is_admins:
                by_admin.add(index)
    sources: dict[int, list[int]] = {}
    for source, target in into.items():
        sources.setdefault(target, []).append(source)
    return _Merges(into, sources, frozenset(in_cycle), frozenset(by_admin))


def _labelled_identity(population: Population, n: int, index: int) -> Labelled:
    random = population.random("identity", index)
    pen = pen_for(population, "playeridentities", index)
    created = _created_at(population, index)
    merges = _merges_of_block(population, n, index // BLOCK)
    is_guest = _is_guest(population, index)
    admin = population.user_oid(0)
    user = _user_of(population, index, random, pen)
    name = odd_name(identity_name(population, index), pen)
    games = 0 if random.random() < 0.2 else min(2000, 1 + int(random.paretovariate(1.2)))
    last_game = later(random, created, within=timedelta(days=1400)) if games else None
    stats = {"totalGames": games, "totalWins": _wins(random, games), "lastGameAt": last_game}
    merged_into = merges.into.get(index)
    is_deleted = index in merges.by_admin or (merged_into is None and is_guest and random.random() < 0.02)
    former = _former_names(random, population, index, created, user or admin)
    document: dict[str, Any] = {
        "_id": identity_id(population, index),
        "displayName": name,
        "normalizedName": name.lower().strip(),
        "userId": user,
        "type": "imported" if merged_into is not None else "guest" if is_guest else "user",
        "nameHistory": former,
        "aliases": _aliases(random, name, index, created, user or admin),
        "stats": stats,
    }
    if games and created >= _elo_begins(population):
        document["eloByGameType"] = _elo(random, population, games, created)
    document |= {
        "linkedIdentities": _linked(random, population, merges.sources.get(index, ()), admin, pen),
        "mergedInto": None if merged_into is None else identity_id(population, merged_into),
        "createdBy": user or admin,
        "isDeleted": is_deleted,
        "deletedAt": later(random, created) if is_deleted else None,
        "createdAt": created,
        "updatedAt": later(random, last_game or created, within=timedelta(days=30)),
        "__v": len(former) + len(merges.sources.get(index, ())),
    }
    if index in merges.in_cycle:
        pen.note("merge_cycle")
    other_id(document, pen)
    stain(
        document,
        pen,
        dates=[(stats, "lastGameAt")],
        free=lambda: document.setdefault("metadata", {}),
        numbers=[(stats, "totalGames"), (stats, "totalWins")],
    )
    return finish(document, pen)


def _elo_begins(population: Population) -> datetime:
    return population.created_at(int(population.users * _BEFORE_ELO)) if population.users else AS_OF


def _user_of(population: Population, index: int, random: Random, pen: Pen) -> ObjectId | None:
    """The user whom identity `index` names; dirt makes it one that is gone, or one who has an identity already."""
    has_none = random.random() < 0.1
    if pen.strikes("dangling_reference"):
        return population.gone(pen.random)
    if pen.strikes("second_identity") and population.users > 1:
        # Of a neighbour, whose own identity is live in most cases.
        return population.user_oid((index - 1) % population.users)
    if index >= population.users or (has_none and _is_guest(population, index)):
        return None
    return population.user_oid(index)


def _wins(random: Random, games: int) -> int:
    return min(games, int(games * random.betavariate(2, 5) + 0.5))


def _former_names(
    random: Random, population: Population, index: int, created: datetime, by: ObjectId
) -> list[dict[str, Any]]:
    history = []
    for lap in range(0 if random.random() < 0.92 else random.randint(1, 4)):
        at = later(random, created)
        # Names past the last user's are nobody's: a former name that somebody took since would be another matter.
        name = population.base_name(population.users * (lap + 2) + index)
        entry = {"name": name, "normalizedName": name.lower(), "changedAt": at, "changedBy": by}
        history.append(entry | {"_id": sub_id(random, at)})
    return sorted(history, key=lambda entry: entry["changedAt"])


def _aliases(random: Random, name: str, index: int, created: datetime, by: ObjectId) -> list[dict[str, Any]]:
    if random.random() < 0.95:
        return []
    # The index keeps it from being a live identity's name, which an alias may not be.
    alias, at = f"{name[:8].strip()} aka {index}", later(random, created)
    entry = {"name": alias, "normalizedName": alias.lower(), "addedAt": at, "addedBy": by}
    return [entry | {"_id": sub_id(random, at)}]


def _linked(
    random: Random, population: Population, sources: tuple[int, ...] | list[int], admin: ObjectId, pen: Pen
) -> list[dict[str, Any]]:
    linked = []
    twice = pen.random.random() < pen.rates.linked_twice
    for source in sources:
        at = later(random, _created_at(population, source))
        entry = {
            "identityId": identity_id(population, source),
            "linkedAt": at,
            "linkedBy": admin,
            "originalDisplayName": identity_name(population, source),
        }
        linked.append(entry | {"_id": sub_id(random, at)})
    if twice:
        if not linked:
            ghost = {"identityId": population.gone(pen.random), "linkedAt": AS_OF, "linkedBy": admin}
            linked.append(ghost | {"originalDisplayName": "Ghost", "_id": sub_id(pen.random, AS_OF)})
        linked.append(linked[0] | {"_id": sub_id(pen.random, AS_OF)})
        pen.note("linked_twice")
    return linked


def _elo(random: Random, population: Population, games: int, created: datetime) -> dict[str, Any]:
    ratings = {}
    kinds = random.sample(_GAME_TYPES, k=1 if games < 5 else random.randint(1, 3))
    for game_type in kinds:
        ratings[game_type] = _rating(random, population, max(1, games // len(kinds)), created)
    return ratings


def _rating(random: Random, population: Population, games: int, created: datetime) -> dict[str, Any]:
    kept = min(games, _HISTORY)
    # What lies before the history that was kept is known only by where it ended.
    rating = 1000 + (0 if games == kept else random.randint(-150, 250))
    peak, floor, streak = max(1000, rating), min(1000, rating), 0
    at = later(random, created)
    history = []
    for _ in range(kept):
        change = random.randint(-24, 28)
        rating += change
        peak, floor = max(peak, rating), min(floor, rating)
        streak = max(streak, 0) + 1 if change > 0 else min(streak, 0) - 1
        at = later(random, at, within=timedelta(days=40))
        others = random.randint(2, 5)
        history.append(
            {
                "rating": rating,
                "change": change,
                "gameId": str(sub_id(random, at)),
                "opponents": [
                    population.base_name(random.randrange(max(population.users, 1))) for _ in range(others)
                ],
                "placement": 1 if change > 14 else random.randint(1, others + 1),
                "date": at,
                "_id": sub_id(random, at),
            }
        )
    return {
        "rating": rating,
        "peak": peak,
        "floor": floor,
        "gamesPlayed": games,
        "lastUpdated": at,
        "streak": streak,
        "history": history[::-1],
        "_id": sub_id(random, created),
    }
