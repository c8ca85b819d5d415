"""What a client sends as ``gameData``: judged, and written as the old back end writes it (pure).

The data stays free in form. Judged is what both stores and both back ends need of it: a size that a document can have,
text that is text, and the few fields that make a game of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from scorekeeper import names

#: Levels of nesting; MongoDB takes 100, and the document around the data is one.
DEEPEST: Final = 90

#: The format that games of Wizard are sent in.
VERSION: Final = "3.0"

#: Players of one game of Wizard at least, and of any game at most: each may be given an identity.
FEWEST_PLAYERS: Final = 3
MOST_PLAYERS: Final = 50

#: As many faults as a person reads.
_MOST_FAULTS: Final = 20

_INT32: Final = 2**31


class NotStorable(ValueError):
    """The data cannot be stored as it is; the message is a sentence for a person."""


def as_stored(value: Any, depth: int = 1) -> Any:
    """JSON as the old back end stores it: a whole number is an integer of 32 bits where it is one, else a double.

    Raises:
        NotStorable: text that is not Unicode, a number that JSON does not have, too deep.
    """
    if depth > DEEPEST:
        raise NotStorable(f"gameData is nested more than {DEEPEST} levels deep")
    if isinstance(value, str):
        if not names.is_unicode(value):
            raise NotStorable("gameData holds text that is not valid Unicode")
        return value
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, Mapping):
        for key in value:
            if "\0" in key or not names.is_unicode(key):
                raise NotStorable("gameData has a field whose name cannot be stored")
        return {key: as_stored(item, depth + 1) for key, item in value.items()}
    return [as_stored(item, depth + 1) for item in value]


def _number(value: int | float) -> int | float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise NotStorable("gameData holds a number that is out of range")
    whole = number.is_integer() and -_INT32 <= number < _INT32 and not (number == 0 and _is_negative(number))
    return int(number) if whole else number


def _is_negative(number: float) -> bool:
    return math.copysign(1.0, number) < 0


def faults_of_wizard_game(data: Mapping[str, Any]) -> list[str]:
    """Why this is no game of Wizard in format 3.0, a sentence for each fault; none: it is one."""
    faults: list[str] = []
    if data.get("version") != VERSION:
        faults.append(f'version must be "{VERSION}"')
    players = data.get("players")
    if not isinstance(players, list):
        faults.append("players must be a list")
    elif len(players) < FEWEST_PLAYERS:
        faults.append(f"At least {FEWEST_PLAYERS} players are required")
    faults += faults_of_players(data)
    if isinstance(players, list):
        faults += [
            f"Player {place}: id is required"
            for place, player in enumerate(players, 1)
            if not isinstance(player, Mapping) or not _is_id(player.get("id"))
        ]
    rounds = data.get("round_data")
    if isinstance(rounds, list):
        faults += [fault for place, each in enumerate(rounds, 1) for fault in _faults_of_round(place, each)]
    else:
        faults.append("round_data must be a list")
    if not isinstance(data.get("final_scores"), Mapping | None):
        faults.append("final_scores must be an object")
    return faults[:_MOST_FAULTS]


def faults_of_players(data: Mapping[str, Any]) -> list[str]:
    """Why the players of any game cannot be players; a game may have none."""
    players = players_of(data)
    faults = [f"At most {MOST_PLAYERS} players are possible"] if len(players) > MOST_PLAYERS else []
    for place, player in enumerate(players[:MOST_PLAYERS], 1):
        name = player.get("name") if isinstance(player, Mapping) else None
        if not isinstance(name, str) or not names.trimmed(name):
            faults.append(f"Player {place}: name is required")
        elif names.fault(names.trimmed(name)) is not None:
            faults.append(f"Player {place}: name cannot be anybody's")
    return faults[:_MOST_FAULTS]


def _faults_of_round(place: int, each: Any) -> Iterator[str]:
    entries = each.get("players") if isinstance(each, Mapping) else None
    if not isinstance(entries, list):
        yield f"Round {place}: players must be a list"
        return
    for number, entry in enumerate(entries, 1):
        where = f"Round {place}, player {number}"
        held = entry if isinstance(entry, Mapping) else {}
        if not _is_id(held.get("id")):
            yield f"{where}: id is required"
        for field in ("made", "score"):
            if field not in held:
                yield f"{where}: {field} is required"
            elif not _is_number(held[field]) and held[field] is not None:
                yield f"{where}: {field} must be a number"


def _is_id(value: Any) -> bool:
    return (isinstance(value, str) and value != "") or _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def innermost(data: Any) -> Mapping[str, Any]:
    """The data itself where it is sent as ``{"gameData": {…}}`` once more, as one version of the client does."""
    if isinstance(data, Mapping) and isinstance(data.get("gameData"), Mapping):
        return data["gameData"]  # type: ignore[no-any-return]
    return data if isinstance(data, Mapping) else {}


def players_of(data: Any) -> list[Any]:
    """The players as the data has them, whatever they are; none where it has no list of them."""
    players = innermost(data).get("players")
    return players if isinstance(players, list) else []


def names_of_players(data: Any) -> list[str]:
    """Their names, for showing; format 1.0 kept players by name alone."""
    found = []
    for player in players_of(data):
        name = player.get("name") if isinstance(player, Mapping) else player
        found.append(name if isinstance(name, str) and name else "Unknown")
    return found


def winner_of_table_game(data: Any, *, low_is_better: bool) -> str:
    """The name of the player with the best sum of points, the first of several."""
    scores = [
        _points(player.get("points")) if isinstance(player, Mapping) else 0.0 for player in players_of(data)
    ]
    if not scores:
        return "Not determined"
    best = min(scores) if low_is_better else max(scores)
    return names_of_players(data)[scores.index(best)]


def _points(points: Any) -> float:
    if not isinstance(points, Sequence) or isinstance(points, str):
        return 0.0
    return math.fsum(_value(each) for each in points)


def _value(each: Any) -> float:
    """A cell of the score sheet as a number; clients send what was typed. What is none counts nothing."""
    try:
        number = float(each)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return number if math.isfinite(number) else 0.0
