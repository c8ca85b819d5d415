"""Players within a game's free-form data: whose they are, and whose they were before (pure).

A player names its identity in ``identityId``. When that identity is merged, the player is the target's from then on,
and ``previousIdentityId`` says whose it was; what was there before, of an earlier merge, goes to
``earlierIdentityIds``, oldest first. So merges can be undone one by one, whatever old data holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from bson import ObjectId

Player = dict[str, Any]


def spellings(id_: Any) -> tuple[Any, ...]:
    """How games spell an identity's id: as an ObjectId, or as its text."""
    return (id_, str(id_)) if isinstance(id_, ObjectId) else (id_,)


def handed_over(game_data: Any, merged: Any, target: Any) -> Any:
    """The same data with the players of ``merged`` as the target's; None where there are none."""

    def change(player: Player) -> Player | None:
        if player.get("identityId") not in spellings(merged):
            return None
        past = [*_past(player), player["identityId"]]
        return _with(player, str(target) if isinstance(player["identityId"], str) else target, past)

    return _changed(game_data, change)


def given_back(game_data: Any, merged: Any, holders: Collection[Any]) -> Any:
    """The same data with the players that ``holders`` have of ``merged`` as its own again; None for none."""
    held_by = {spelling for holder in holders for spelling in spellings(holder)}

    def change(player: Player) -> Player | None:
        past = _past(player)
        places = [place for place, id_ in enumerate(past) if id_ in spellings(merged)]
        current = player.get("identityId")
        if not places or not isinstance(current, ObjectId | str) or current not in held_by:
            return None
        return _with(player, past[places[-1]], past[: places[-1]])

    return _changed(game_data, change)


def _past(player: Player) -> list[Any]:
    earlier = player.get("earlierIdentityIds")
    past = list(earlier) if isinstance(earlier, list) else []
    return [*past, player["previousIdentityId"]] if "previousIdentityId" in player else past


def _with(player: Player, identity: Any, past: list[Any]) -> Player:
    after = {**player, "identityId": identity}
    for name, value in (("previousIdentityId", past[-1:]), ("earlierIdentityIds", past[:-1])):
        if value:
            after[name] = value[0] if name == "previousIdentityId" else value
        else:
            after.pop(name, None)
    return after


def _changed(data: Any, change: Callable[[Player], Player | None]) -> Any:
    if not isinstance(data, Mapping):
        return None
    after = dict(data)
    players = after.get("players")
    found = False
    if isinstance(players, list):
        changed = [change(player) if isinstance(player, dict) else None for player in players]
        found = any(player is not None for player in changed)
        after["players"] = [
            player if new is None else new for player, new in zip(players, changed, strict=True)
        ]
    nested = _changed(after.get("gameData"), change)
    if nested is not None:
        after["gameData"] = nested
    return after if found or nested is not None else None
