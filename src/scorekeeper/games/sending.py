"""What sending a game of any kind has in common: judging it, and answering for one that is there already."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import bson

from crossfade import Record
from scorekeeper import names
from scorekeeper.errors import Problem, invalid, unavailable
from scorekeeper.games.data import NotStorable, as_stored
from scorekeeper.games.repository import GameRepository

#: Characters of an id that a client makes up; what an index takes in both stores, whatever they are.
LONGEST_ID: Final = 200

#: Bytes of the data: a document of MongoDB is at most 16 MiB, and holds other things too.
LARGEST_DATA: Final = 15 * 2**20

_ID = re.compile(r"[0-9a-fA-F]{24}")


def judged(sent: Any, local_id: Any, faults_of: Callable[[Mapping[str, Any]], list[str]]) -> dict[str, Any]:
    """The data of a game as it is to be stored.

    Raises:
        Problem: 400, with ``validationErrors`` where the data is no such game; 413, too large for one document.
    """
    faults = [] if is_made_up_id(local_id) else [_bad_id("localId")]
    data: dict[str, Any] = {}
    try:
        if not isinstance(sent, Mapping):
            raise NotStorable("gameData must be an object")
        data = as_stored(sent)
    except NotStorable as fault:
        faults.append(str(fault))
    else:
        faults += faults_of(data)
    if faults:
        raise _not_valid(faults)
    if len(bson.encode(data)) > LARGEST_DATA:
        raise Problem(413, "body-too-large", f"gameData takes more than {LARGEST_DATA} bytes")
    return data


def check_made_up_id(text: Any, name: str) -> None:
    """Refuse an id of the client's own making that no document could have.

    Raises:
        Problem: 400.
    """
    if not is_made_up_id(text):
        raise invalid(_bad_id(name))


def is_made_up_id(text: Any) -> bool:
    """Whether a document can have this as an id of a client's own making."""
    return (
        isinstance(text, str) and 0 < len(text) <= LONGEST_ID and "\0" not in text and names.is_unicode(text)
    )


def _bad_id(name: str) -> str:
    return f"{name} must be text of 1 to {LONGEST_ID} characters"


def _not_valid(faults: list[str]) -> Problem:
    return Problem(400, "invalid", "Invalid game data structure", members={"validationErrors": faults})


async def of_local_id(games: GameRepository, local_id: str) -> Record:
    """The game that has taken a local id just now.

    Raises:
        Problem: 503, it is gone again; sending it once more succeeds.
    """
    game = await games.of_local_id(local_id)
    if game is None:
        raise unavailable("The game was changed by somebody else, please try again", "busy")
    return game


def is_id(text: str) -> bool:
    """Whether a text is an id of a game, as the client knows them."""
    return _ID.fullmatch(text) is not None


def wire_id(text: str) -> str:
    """An id of a game as it came in the path, in lower case.

    Raises:
        Problem: 400, it is none.
    """
    if not is_id(text):
        raise invalid("Invalid game ID format")
    return text.lower()


def no_such_game() -> Problem:
    """404."""
    return Problem(404, "not-found", "Game not found")
