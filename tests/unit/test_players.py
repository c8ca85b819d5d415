"""Games follow merges of their players' identities, and every merge can be undone, whatever old data holds."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

from bson import ObjectId
from hypothesis import assume, given
from hypothesis import strategies as st

from scorekeeper.identities.players import given_back, handed_over

IDS = [ObjectId(f"{n:024x}") for n in range(1, 6)]
ANY_ID = st.sampled_from([*IDS, *map(str, IDS), "an old tool's", None, 7, {"odd": 1}])

named = {"name": st.text(max_size=3)}
players = st.one_of(
    st.fixed_dictionaries(named, optional={"identityId": ANY_ID, "previousIdentityId": ANY_ID}),
    st.fixed_dictionaries(
        named
        | {
            "previousIdentityId": ANY_ID,
            "earlierIdentityIds": st.lists(ANY_ID, min_size=1, max_size=2),
            "identityId": ANY_ID,
        }
    ),
    st.text(max_size=3),
    st.none(),
)
lists = st.one_of(st.lists(players, max_size=4), st.none(), st.just({"odd": 1}))
inner = st.fixed_dictionaries({}, optional={"players": lists, "rounds": st.just([1])})
game_data = st.one_of(
    st.fixed_dictionaries({}, optional={"players": lists, "gameData": inner, "version": st.just("3.0")}),
    st.none(),
    st.just("odd"),
)


def names(data: Any) -> list[Any]:
    found = data.get("players") if isinstance(data, dict) else None
    here = [p.get("identityId") for p in found if isinstance(p, dict)] if isinstance(found, list) else []
    return here + (names(data.get("gameData")) if isinstance(data, dict) else [])


@given(game_data, st.lists(st.sampled_from(IDS), min_size=2, max_size=5, unique=True))
def test_merges_that_follow_each_other_are_undone_one_by_one(data: Any, chain: list[ObjectId]) -> None:
    """A into B, B into C ...: undone from the last, each step gives back what was there before it."""
    stages = [data]
    for merged, target in pairwise(chain):
        before = copy.deepcopy(stages[-1])
        # Data that says of a player that this very merge was made before says that it is undone with it.
        assume(given_back(before, merged, {target}) is None)
        moved = handed_over(stages[-1], merged, target)
        assert stages[-1] == before, "what was given is not changed"
        assert (moved is None) == (
            not {merged, str(merged)} & {n for n in names(before) if not isinstance(n, dict)}
        )
        stages.append(before if moved is None else moved)
        assert not {merged, str(merged)} & {n for n in names(stages[-1]) if not isinstance(n, dict)}
    for merged, target in reversed(list(pairwise(chain))):
        after = stages.pop()
        if stages[-1] == after:
            continue
        assert encoded(given_back(after, merged, {target})) == encoded(stages[-1])


def encoded(data: Any) -> str:
    """With the order of fields."""
    return repr(data)


def test_undoing_the_first_of_two_merges_frees_its_games_alone() -> None:
    guest, middle, end = IDS[:3]
    data = {"players": [{"name": "g", "identityId": str(guest)}, {"name": "m", "identityId": middle}]}
    merged = handed_over(handed_over(data, guest, middle), middle, end)
    assert [p["identityId"] for p in merged["players"]] == [str(end), end]
    freed = given_back(merged, guest, {middle, end})
    assert freed["players"] == [
        {"name": "g", "identityId": str(guest)},
        {"name": "m", "identityId": end, "previousIdentityId": middle},
    ]
    assert given_back(merged, guest, {ObjectId()}) is None, "a game that somebody else has is left alone"
