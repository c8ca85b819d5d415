"""The collections of a deployment: how large each is, its indexes, and who writes its documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from pymongo import ASCENDING, TEXT, IndexModel

from scorekeeper.legacy.dirt import Labelled
from scorekeeper.legacy.friendrequest import labelled_requests
from scorekeeper.legacy.game import labelled_games, labelled_table_games, labelled_wizard_games
from scorekeeper.legacy.identity import labelled_identities
from scorekeeper.legacy.population import AS_OF, Population
from scorekeeper.legacy.user import labelled_users

#: Collection -> documents per user, as the deployments that were looked at had them.
RATIOS: Mapping[str, float] = MappingProxyType(
    {
        "users": 1.0,
        "playeridentities": 1.1,
        "friendrequests": 0.6,
        "games": 0.03,
        "wizard": 0.1,
        "tablegames": 0.08,
    }
)

#: Collections that stay with the old back end. They get a few documents, which nobody may ever change.
OTHERS = (
    "gameevents",
    "gamesnapshots",
    "playeraliases",
    "usergametemplates",
    "systemgametemplates",
    "templatesuggestions",
    "migrations",
)
_FEW = 5

#: Collection -> its indexes.
INDEXES: Mapping[str, tuple[IndexModel, ...]] = MappingProxyType(
    {
        "users": (
            IndexModel([("username", ASCENDING)], name="username_1", unique=True),
            IndexModel([("username", TEXT)], name="username_text"),
            IndexModel([("friends", ASCENDING)], name="friends_1"),
            IndexModel([("role", ASCENDING)], name="role_1"),
        ),
        "playeridentities": (
            IndexModel([("normalizedName", ASCENDING)], name="normalizedName_1"),
            IndexModel([("userId", ASCENDING)], name="userId_1"),
        ),
        "friendrequests": (
            IndexModel(
                [("sender", ASCENDING), ("receiver", ASCENDING)], name="sender_1_receiver_1", unique=True
            ),
        ),
        **{
            collection: (
                IndexModel([("localId", ASCENDING)], name="localId_1", unique=True),
                IndexModel([("userId", ASCENDING)], name="userId_1"),
                IndexModel([("shareId", ASCENDING)], name="shareId_1", sparse=True),
            )
            for collection in ("games", "wizard")
        },
        "tablegames": (
            IndexModel([("localId", ASCENDING)], name="localId_1", unique=True),
            IndexModel([("userId", ASCENDING)], name="userId_1"),
        ),
    }
)

#: Collection -> how many documents are sent at once: some 1 to 4 MiB in each case.
BATCH: Mapping[str, int] = MappingProxyType(
    {
        "users": 1000,
        "playeridentities": 500,
        "friendrequests": 2000,
        "games": 200,
        "wizard": 200,
        "tablegames": 200,
    }
)


def sizes_for(users: int, overrides: Mapping[str, int] | None = None) -> dict[str, int]:
    """Documents per collection for that many `users`, in the order they are written.

    Args:
        users: documents of `users`.
        overrides: collection -> documents, in place of what the ratio gives; any collection but `users`.

    Raises:
        ValueError: an unknown collection, `users` among the overrides, or a negative size.
    """
    sizes = {name: round(users * ratio) for name, ratio in RATIOS.items()} | dict.fromkeys(OTHERS, _FEW)
    for name, size in (overrides or {}).items():
        if name == "users" or name not in sizes:
            raise ValueError(f"no collection {name!r} to size; there are {', '.join(list(sizes)[1:])}")
        sizes[name] = size
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"{name} cannot have {size} documents")
    return sizes


def documents_of(collection: str, population: Population, n: int) -> Iterator[Labelled]:
    """The `n` documents of `collection`; fewer of `friendrequests` where the users make no more pairs."""
    match collection:
        case "users":
            return labelled_users(population)
        case "playeridentities":
            return labelled_identities(population, n)
        case "friendrequests":
            return labelled_requests(population, n)
        case "games":
            return labelled_games(population, n)
        case "wizard":
            return labelled_wizard_games(population, n)
        case "tablegames":
            return labelled_table_games(population, n)
        case _:
            return _others(collection, population, n)


def _others(collection: str, population: Population, n: int) -> Iterator[Labelled]:
    for index in range(n):
        at = population.moment(index, n)
        document = {
            "_id": population.object_id(collection, index, at),
            "name": f"{collection} {index + 1}",
            "userId": population.user_oid(index % max(population.users, 1)),
            "data": {"note": "stays with the old back end", "until": AS_OF, "values": [1, 2.5, None]},
            "createdAt": at,
            "updatedAt": at,
            "__v": 0,
        }
        yield Labelled(document, ())
