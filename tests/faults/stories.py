"""What an application does, as a story with two possible ends: nothing of it has happened, or all of it.

A story makes the records it needs by a healthy worker, is told by one that fails, and says what both stores may hold
afterwards. Every telling has records of its own, so that thousands share a database.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bson import ObjectId

from crossfade import FailureStrategy

PICTURE = b"old" * 100
#: A document without ``_id`` and ``_cf``, or None for no record.
State = Mapping[str, Any] | None


@dataclass(frozen=True)
class Telling:
    """One telling of a story.

    Attributes:
        records: (entity, id, or the username by which a record is found whose id nobody was told).
        before, after: the two possible ends, a state per record.
        tell: the operation, of the worker's migration.
        names: by end ("before", "after"), user names that are taken; all others of the story are free.
    """

    records: Sequence[tuple[str, Any]]
    before: Sequence[State]
    after: Sequence[State]
    tell: Callable[[Any], Awaitable[Any]]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


Story = Callable[[Any, str, FailureStrategy | None], Awaitable[Telling]]


async def insert(m: Any, name: str, strategy: FailureStrategy | None) -> Telling:
    """A user registers."""
    new = {"username": name, "n": 1, "friends": [ObjectId()]}
    return Telling(
        [("users", name)], [None], [new],
        lambda worker: worker.users.insert(new, strategy=strategy),
        {"before": (), "after": (name,)},
    )  # fmt: skip


async def insert_again(m: Any, name: str, strategy: FailureStrategy | None) -> Telling:
    """A record is made under an id that had been deleted."""
    old = await m.users.insert({"username": name, "n": 0})
    await m.users.delete(old.id)
    new = {"username": name, "n": 1, "friends": []}
    return Telling(
        [("users", old.id)], [None], [new],
        lambda worker: worker.users.insert({"_id": old.id, **new}, strategy=strategy),
        {"before": (), "after": (name,)},
    )  # fmt: skip


async def update(m: Any, name: str, strategy: FailureStrategy | None) -> Telling:
    """Fields are set and removed, child rows among them."""
    friend = ObjectId()
    old = {"username": name, "n": 1, "friends": [friend], "note": "x"}
    made = await m.users.insert(old)
    return Telling(
        [("users", made.id)], [old], [{"username": name, "n": 2, "friends": [friend, made.id]}],
        lambda worker: worker.users.update(
            made.id, {"n": 2, "friends": [friend, made.id]}, unset=["note"], strategy=strategy
        ),
        {"before": (name,), "after": (name,)},
    )  # fmt: skip


async def rename(m: Any, name: str, strategy: FailureStrategy | None) -> Telling:
    """A user takes another name: one that a unique rule looks at."""
    old = {"username": name, "n": 1, "friends": []}
    made = await m.users.insert(old)
    return Telling(
        [("users", made.id)], [old], [{**old, "username": name + "-new"}],
        lambda worker: worker.users.update(made.id, {"username": name + "-new"}, strategy=strategy),
        {"before": (name,), "after": (name + "-new",)},
    )  # fmt: skip


async def log_in(m: Any, name: str, strategy: FailureStrategy | None) -> Telling:
    """A field is set of a user whose picture both stores hold, and which stays where it is."""
    old = {"username": name, "n": 1, "picture": PICTURE, "friends": []}
    made = await m.users.insert(old)
    await m.settler.eraser.join()  # only a part that is confirmed is left out
    return Telling(
        [("users", made.id)], [old], [{**old, "n": 2}],
        lambda worker: worker.users.update(made.id, {"n": 2}, strategy=strategy),
        {"before": (name,), "after": (name,)},
    )  # fmt: skip


async def new_picture(m: Any, name: str, strategy: FailureStrategy | None) -> Telling:
    """A user whose picture both stores hold gets another one."""
    old = {"username": name, "n": 1, "picture": PICTURE, "friends": []}
    made = await m.users.insert(old)
    await m.settler.eraser.join()
    return Telling(
        [("users", made.id)], [old], [{**old, "n": 2, "picture": b"new" * 100}],
        lambda worker: worker.users.update(made.id, {"n": 2, "picture": b"new" * 100}, strategy=strategy),
        {"before": (name,), "after": (name,)},
    )  # fmt: skip


async def delete(m: Any, name: str, strategy: FailureStrategy | None) -> Telling:
    """An account is deleted for good."""
    old = {"username": name, "n": 1, "friends": [ObjectId()]}
    made = await m.users.insert(old)
    return Telling(
        [("users", made.id)], [old], [None],
        lambda worker: worker.users.delete(made.id, strategy=strategy),
        {"before": (name,), "after": ()},
    )  # fmt: skip


async def _asked(m: Any, name: str, friends: bool) -> tuple[list[Any], list[dict[str, Any]]]:
    """A request, Ann, Bob; who may be friends already."""
    ann, bob, other = ObjectId(), ObjectId(), ObjectId()
    states: list[dict[str, Any]] = [
        {"sender": ann, "receiver": bob, "status": "accepted" if friends else "pending"},
        {"username": f"ann-{name}", "friends": [bob] if friends else [], "picture": PICTURE},
        {"username": f"bob-{name}", "friends": [other, ann] if friends else [other], "__v": 3},
    ]
    made = await m["friend_requests"].insert(states[0])
    await m.users.insert({"_id": ann, **states[1]})
    await m.users.insert({"_id": bob, **states[2]})
    return [made.id, ann, bob], states


async def accept(m: Any, name: str, strategy: FailureStrategy | None) -> Telling:
    """A friend request is accepted: one request, two users."""
    (request, ann, bob), before = await _asked(m, name, friends=False)

    async def tell(worker: Any) -> None:
        async with worker.operation("Friend Accept", strategy=strategy) as op:
            op.update("friend_requests", request, {"status": "accepted"}, where={"status": "pending"})
            op.also("users", ann, {"n": 1}, add={"friends": [bob]})
            op.also("users", bob, add={"friends": [ann]})

    after = [
        {**before[0], "status": "accepted"},
        {**before[1], "friends": [bob], "n": 1},
        {**before[2], "friends": [*before[2]["friends"], ann], "__v": 4},
    ]
    names = (before[1]["username"], before[2]["username"])
    return Telling(
        [("friend_requests", request), ("users", ann), ("users", bob)], before, after, tell,
        {"before": names, "after": names},
    )  # fmt: skip


async def part(m: Any, name: str, strategy: FailureStrategy | None) -> Telling:
    """Two friends part: the request is deleted, and that decides for both."""
    (request, ann, bob), before = await _asked(m, name, friends=True)

    async def tell(worker: Any) -> None:
        async with worker.operation("Friend Remove", strategy=strategy) as op:
            op.delete("friend_requests", request)
            op.also("users", ann, remove={"friends": [bob]})
            op.also("users", bob, {"n": 2}, remove={"friends": [ann]})

    after: list[State] = [
        None,
        {**before[1], "friends": []},
        {**before[2], "friends": before[2]["friends"][:1], "__v": 4, "n": 2},
    ]
    names = (before[1]["username"], before[2]["username"])
    return Telling(
        [("friend_requests", request), ("users", ann), ("users", bob)], before, after, tell,
        {"before": names, "after": names},
    )  # fmt: skip


STORIES: dict[str, Story] = {
    story.__name__: story
    for story in (insert, insert_again, update, rename, log_in, new_picture, delete, accept, part)
}
