"""Population: every fact about a user that other documents need, as a function of the user's index.

The promise: a generated database is a function of (seed, users, rates), and takes memory for one batch only. It holds
because nothing is remembered: the identity of user 17 asks for the name of user 17 and it is computed again. Facts
that tie users to each other (friendships, merged identities) are drawn within a *block* of neighbours, which is
computed as a whole and kept only while its documents are written.

Dirt is drawn from streams of its own, so that a document which no dirt befell is the same at any rate.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from random import Random

from bson import ObjectId

from scorekeeper.legacy.names import POOL, case_variant, name_of
from scorekeeper.legacy.rates import NAME_KINDS, DirtRates

#: The moment at which the generated database was "found"; nothing in it is younger. UTC.
AS_OF = datetime(2026, 1, 31, 12, tzinfo=UTC)
#: When the old application went live. UTC.
BEGIN = datetime(2022, 3, 1, tzinfo=UTC)

#: Documents whose ties to each other are drawn together. Small enough to be cheap, large enough for 20 friends.
BLOCK = 512

#: Stands for a lone surrogate until the document is encoded: U+E000 is three bytes long in UTF-8, as ED A0 80 is.
SURROGATE_STAND_IN = "\ue000"

# A rival further away than this is not looked for; three bits of letter case tell the variants of one name apart.
_RIVAL_REACH = 7
_MASK = (1 << 64) - 1

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BEGIN_MS = int(BEGIN.timestamp() * 1000)
_SPAN_MS = int((AS_OF - BEGIN).total_seconds() * 1000)


@lru_cache(maxsize=256)
def _salt(name: str) -> int:
    return zlib.crc32(name.encode())


def _mix(seed: int, salt: int, index: int) -> int:
    # splitmix64 (Steele, Lea, Flood 2014): a draw for any index without drawing those before it.
    z = (seed * 0x9E3779B97F4A7C15 + salt * 0xD1B54A32D192ED03 + index * 0x8CB92BA72F3D8DD7) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@lru_cache(maxsize=64)
def _process(seed: int, collection: str) -> bytes:
    """The five bytes in the middle of an ObjectId, which tell apart who made it."""
    return (_mix(seed, _salt(collection), -1) & ((1 << 40) - 1)).to_bytes(5, "big")


@lru_cache(maxsize=8)
def _shift_of_names(seed: int) -> int:
    return _mix(seed, _salt("names"), 0) % len(POOL)


def _rates_of_names(rates: DirtRates) -> tuple[float, ...]:
    return tuple(getattr(rates, kind) for kind in NAME_KINDS)


@dataclass(frozen=True, slots=True)
class Population:
    """The users of a deployment, by index from 0 (the oldest) to `users` - 1.

    Attributes:
        seed: any integer; another one gives another database.
        users: how many there are.
        rates: the dirt among them.
    """

    seed: int
    users: int
    rates: DirtRates

    def draw(self, what: str, index: int) -> float:
        """A number from 0 to 1, the same for the same `what` and `index`."""
        return _mix(self.seed, _salt(what), index) / 2**64

    def random(self, what: str, index: int) -> Random:
        """A stream of random numbers of its own for `what` and `index`."""
        return Random(_mix(self.seed, _salt(what), index))

    def moment(self, index: int, of: int) -> datetime:
        """When the `index`-th of `of` documents was made: in order, and ever more of them as the years go by. UTC."""
        return _EPOCH + timedelta(milliseconds=self._moment_ms(index, of))

    def _moment_ms(self, index: int, of: int) -> int:
        share = (index + self.draw("moment", index)) / max(of, 1)
        return _BEGIN_MS + int(_SPAN_MS * share**0.6)

    def object_id(self, collection: str, index: int, at: datetime) -> ObjectId:
        """The id of the `index`-th document of `collection`, made `at`; unique up to 2^24 documents."""
        return self._object_id(collection, index, int(at.timestamp()))

    def _object_id(self, collection: str, index: int, seconds: int) -> ObjectId:
        counter = (index & 0xFFFFFF).to_bytes(3, "big")
        return ObjectId(seconds.to_bytes(4, "big") + _process(self.seed, collection) + counter)

    def gone(self, random: Random) -> ObjectId:
        """The id of a document that does not exist."""
        return ObjectId(b"\x61\x00\x00\x00" + b"gone!" + random.randbytes(3))

    def created_at(self, index: int) -> datetime:
        """When user `index` was made. UTC, whole milliseconds."""
        return self.moment(index, self.users)

    def user_oid(self, index: int) -> ObjectId:
        """What other documents call user `index`, also where the user's own `_id` is a string."""
        return self._object_id("users", index, self._moment_ms(index, self.users) // 1000)

    def has_string_id(self, index: int) -> bool:
        """Whether the `_id` of user `index` is a string."""
        return self.draw("string_id", index) < self.rates.string_id

    def user_id(self, index: int) -> ObjectId | str:
        """The `_id` of user `index`. Strings are 24 hex characters, or a name where another tool made it."""
        oid = self.user_oid(index)
        if not self.has_string_id(index):
            return oid
        return str(oid) if self.draw("hex_id", index) < 0.7 else f"imported-{index:07d}"

    def role(self, index: int) -> str:
        """`admin` for the first user and some 0.2 % more, `guest` for 22 %, else `user`."""
        if index == 0:
            return "admin"
        draw = self.draw("role", index)
        return "guest" if draw < 0.22 else "admin" if draw < 0.222 else "user"

    def base_name(self, index: int) -> str:
        """The username of user `index` before any dirt; unique whatever the letter case."""
        return name_of(index, _shift_of_names(self.seed))

    def _name_kind(self, index: int) -> str | None:
        rates = _rates_of_names(self.rates)
        total = sum(rates)
        draw = self.draw("name_kind", index) * max(1.0, total)
        if draw >= total:
            return None
        for kind, rate in zip(NAME_KINDS, rates, strict=True):
            if draw < rate:
                return kind
            draw -= rate
        return None

    def _rival(self, index: int, kind: str) -> str | None:
        """The name that user `index` takes so that it collides with that of an older neighbour; None without one."""
        for distance in range(1, min(_RIVAL_REACH, index) + 1):
            if self._name_kind(index - distance) is None:
                name = self.base_name(index - distance)
                other = case_variant(name, distance) if kind == "colliding_case" else name + " " * distance
                if other is not None:
                    return other
        return None

    def username(self, index: int) -> tuple[str, str | None]:
        """The username of user `index`, and the kind of dirt in it, if any."""
        name, kind = self.base_name(index), self._name_kind(index)
        if kind == "colliding_case":
            rival = self._rival(index, kind)
            return (name, None) if rival is None else (rival, kind)
        if kind == "trailing_space":
            rival = self._rival(index, kind) if self.draw("rival", index) < 0.5 else None
            return (f"{name} " if rival is None else rival, kind)
        if kind == "long_name":
            # At least 21 characters for the shortest of names, and at most 50.
            tail = " the undefeated champion of the card table"
            return ((name + tail)[: 24 + int(self.draw("tail", index) * 27)].rstrip(), kind)
        if kind in {"nul_in_name", "lone_surrogate"}:
            odd = "\0" if kind == "nul_in_name" else SURROGATE_STAND_IN
            cut = 1 + int(self.draw("cut", index) * len(name))
            return (name[:cut] + odd + name[cut:], kind)
        return (name, None)

    def has_rivals(self, index: int) -> bool:
        """Whether some younger user took the name of user `index` in another case or with blanks."""
        plain = self.base_name(index).casefold()
        younger = range(index + 1, min(index + _RIVAL_REACH + 1, self.users))
        return any(
            self._name_kind(other) in {"colliding_case", "trailing_space"}
            and self.username(other)[0].strip().casefold() == plain
            for other in younger
        )

    def is_near_limit(self, index: int) -> bool:
        """Whether user `index` is one of the documents near 16 MiB; they stand evenly among the users."""
        count = min(self.rates.near_limit_documents, self.users)
        return count > 0 and (index * count) // self.users != ((index + 1) * count) // self.users

    def friends(self, index: int) -> tuple[list[int], int]:
        """The friends of user `index` as indexes, at most 20, and how many of them do not name this user back."""
        lists, unanswered = _friends_of_block(self, index // BLOCK)
        return lists[index % BLOCK], unanswered[index % BLOCK]


@lru_cache(maxsize=8)
def _friends_of_block(population: Population, block: int) -> tuple[list[list[int]], list[int]]:
    """Friend lists of a block: as many ends as everybody wants friends, shuffled and joined in pairs."""
    first = block * BLOCK
    last = min(first + BLOCK, population.users)
    random = population.random("friends", block)
    ends: list[int] = []
    for user in range(first, last):
        # A third has none, most have a few, the tail ends at 20. Guests cannot log in, so they have none.
        wanted = 0 if random.random() < 0.35 else min(20, 1 + int(random.expovariate(1 / 4)))
        if population.role(user) != "guest":
            ends += [user] * wanted
    random.shuffle(ends)
    pairs = {(min(a, b), max(a, b)) for a, b in zip(ends[::2], ends[1::2], strict=False) if a != b}
    dirt = population.random("one_sided", block)
    lists: list[list[int]] = [[] for _ in range(last - first)]
    unanswered = [0] * (last - first)
    for a, b in sorted(pairs):
        sides = [(a, b), (b, a)]
        one_sided, side = dirt.random() < population.rates.one_sided_friend, dirt.randrange(2)
        if one_sided:
            sides = [sides[side]]
        for owner, friend in sides:
            lists[owner - first].append(friend)
            unanswered[owner - first] += one_sided
    for friends in lists:
        random.shuffle(friends)
    return lists, unanswered


def whole_ms(at: datetime) -> datetime:
    """`at` cut to whole milliseconds, as BSON holds dates."""
    return at.replace(microsecond=at.microsecond // 1000 * 1000)


def later(random: Random, at: datetime, *, within: timedelta = timedelta(days=400)) -> datetime:
    """A moment after `at`, not after `AS_OF`, more often soon than late. UTC, whole milliseconds."""
    room = min(max(AS_OF - at, timedelta(0)), within)
    return whole_ms(at + room * random.random() ** 3)


def sub_id(random: Random, at: datetime) -> ObjectId:
    """The `_id` that Mongoose gives a sub-document made `at`."""
    return ObjectId(int(at.timestamp()).to_bytes(4, "big") + random.getrandbits(64).to_bytes(8, "big"))
