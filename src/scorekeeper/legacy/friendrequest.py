"""Friend requests: what led to the friendships, what is pending, and what was turned down."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from bson import ObjectId

from scorekeeper.legacy.dirt import Document, Labelled, documents, finish, other_id, pen_for, stain
from scorekeeper.legacy.population import BLOCK, Population, later
from scorekeeper.legacy.rates import DEFAULT_RATES, DirtRates


def friend_requests(
    seed: int, n: int, rates: DirtRates = DEFAULT_RATES, *, users: int | None = None
) -> Iterator[Document]:
    """At most `n` documents of collection `friendrequests` among `users` (default `n` / 0.6).

    No pair (sender, receiver) comes twice, so fewer than `n` come where the users do not make that many pairs.
    """
    population = Population(seed, round(n / 0.6) if users is None else users, rates)
    return documents(labelled_requests(population, n))


def labelled_requests(population: Population, n: int) -> Iterator[Labelled]:
    """At most `n` requests, block by block of users."""
    blocks = -(-population.users // BLOCK)
    index = 0
    for block in range(blocks):
        # Shares that add up to n exactly, whatever the rounding.
        share = n * (block + 1) // blocks - n * block // blocks
        for sender, receiver, status in _pairs_of_block(population, block, share):
            yield _labelled_request(population, index, sender, receiver, status)
            index += 1


@lru_cache(maxsize=2)
def _pairs_of_block(population: Population, block: int, wanted: int) -> list[tuple[int, int, str]]:
    first, last = block * BLOCK, min((block + 1) * BLOCK, population.users)
    random = population.random("requests", block)
    members = [user for user in range(first, last) if population.role(user) != "guest"]
    friends = [
        (owner, friend) for owner in members for friend in population.friends(owner)[0] if owner < friend
    ]
    random.shuffle(friends)
    pairs = {
        (pair if random.random() < 0.5 else pair[::-1]): "accepted" for pair in friends[: int(wanted * 0.6)]
    }
    most = min(wanted, len(members) * (len(members) - 1) // 2)
    befriended = set(friends)
    # Random pairs collide the more, the fuller the block is; the bound keeps a tiny block from being searched for long.
    for _ in range(4 * most):
        if len(pairs) >= most:
            break
        sender, receiver = random.sample(members, 2)
        taken = (receiver, sender) in pairs or (min(sender, receiver), max(sender, receiver)) in befriended
        if not taken:
            pairs.setdefault((sender, receiver), random.choice(("pending", "pending", "rejected")))
    return [(sender, receiver, status) for (sender, receiver), status in pairs.items()]


def _labelled_request(
    population: Population, index: int, sender: int, receiver: int, status: str
) -> Labelled:
    random = population.random("request", index)
    pen = pen_for(population, "friendrequests", index)
    created = later(random, max(population.created_at(sender), population.created_at(receiver)))
    sender_id: ObjectId = population.user_oid(sender)
    if pen.strikes("dangling_reference"):
        sender_id = population.gone(pen.random)
    document = {
        "_id": population.object_id("friendrequests", index, created),
        "sender": sender_id,
        "receiver": population.user_oid(receiver),
        "status": status,
        "createdAt": created,
        "updatedAt": created if status == "pending" else later(random, created),
        "__v": 0,
    }
    other_id(document, pen)
    stain(document, pen, dates=[], free=lambda: document.setdefault("metadata", {}))  # type: ignore[arg-type, return-value]
    return finish(document, pen)
