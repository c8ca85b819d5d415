"""How much of each kind of dirt a legacy database holds.

The kinds are those that real migrations found. A rate is the share of the documents of a collection that the kind
occurs in (`KINDS` says which collections it can occur in), so 0.002 of 20,000 users is about 40 documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

#: Two thousandths: some 40 users of 20,000, enough to meet every kind and few enough to read the list.
_USUAL = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class DirtRates:
    """One rate per kind of dirt: shares from 0 to 1, but for `near_limit_documents`, which is a count.

    The kinds of a username exclude each other; where their rates add up to more than 1 they are scaled down together.

    Attributes:
        colliding_case: a username equal to another one but for letter case (`Bob`, `bob`).
        trailing_space: a username with blanks at its end; about half of them equal another one but for the blanks.
        long_name: a username of 21 to 50 characters, which was allowed until a year ago.
        nul_in_name: U+0000 in a name.
        lone_surrogate: the bytes ED A0 80 in a string, half of a UTF-16 pair; such documents are `RawBSONDocument`.
        missing_role: no `role`, which means `user`; the share of those who have that role.
        missing_created_at: no `createdAt`.
        missing_updated_at: no `updatedAt`.
        missing_later_fields: none of `lastLogin`, `profilePicture`, `friends`, `guestMetadata`, as in the oldest users.
        foreign_hash: a password hash of another tool, `$2b$10$`; the share of those who have a password.
        unknown_field: fields of a former version of the application, which no schema names.
        string_or_object: a field that is sometimes a string and sometimes an object.
        mixed_number: a whole number stored as int64 or double where other documents have int32.
        big_integer: an integer past 2^53.
        not_a_number: NaN or an infinity.
        decimal128: a Decimal128, some beyond what a double can hold, some with trailing zeros that count.
        date_before_1970: a date before 1970, some before the year 1.
        date_after_9999: a date past the year 9999, which Python's datetime cannot hold.
        date_as_string: a date stored as text, ISO 8601 or as a browser prints it.
        empty_key: a nested key that is the empty string.
        dotted_key: a nested key with `.` in it.
        dollar_key: a nested key that begins with `$`.
        top_level_key: the same three at the top level of the document.
        string_id: an `_id` that is a string. References to it keep the ObjectId that it should have been.
        dangling_reference: a reference to a document that is gone.
        duplicate_friend: the same friend twice in one list.
        self_friend: a friend list that names its owner.
        one_sided_friend: a friend who does not name one back; the share of the *friendships*, not of the users.
        second_identity: a second live identity of one user.
        merge_cycle: two identities, each merged into the other.
        linked_twice: an identity that stands twice among those linked to another.
        near_limit_documents: how many users are close to 16 MiB of BSON (32 KiB below it). At most one per user.
    """

    colliding_case: float = _USUAL
    trailing_space: float = _USUAL
    long_name: float = 0.01
    nul_in_name: float = _USUAL
    lone_surrogate: float = _USUAL
    missing_role: float = 0.01
    missing_created_at: float = _USUAL
    missing_updated_at: float = _USUAL
    missing_later_fields: float = 0.01
    foreign_hash: float = 0.005
    unknown_field: float = 0.02
    string_or_object: float = _USUAL
    mixed_number: float = 0.01
    big_integer: float = _USUAL
    not_a_number: float = _USUAL
    decimal128: float = _USUAL
    date_before_1970: float = _USUAL
    date_after_9999: float = _USUAL
    date_as_string: float = _USUAL
    empty_key: float = _USUAL
    dotted_key: float = _USUAL
    dollar_key: float = _USUAL
    top_level_key: float = _USUAL
    string_id: float = _USUAL
    dangling_reference: float = 0.005
    duplicate_friend: float = _USUAL
    self_friend: float = _USUAL
    one_sided_friend: float = 0.03
    second_identity: float = _USUAL
    merge_cycle: float = 0.001
    linked_twice: float = 0.001
    near_limit_documents: int = 1

    def __post_init__(self) -> None:
        """Raise `ValueError` for a rate outside 0 to 1 or a negative count."""
        for kind in RATED_KINDS:
            if not 0 <= getattr(self, kind) <= 1:
                raise ValueError(f"the rate {kind} is {getattr(self, kind)}, not a share from 0 to 1")
        if self.near_limit_documents < 0:
            raise ValueError(f"near_limit_documents is {self.near_limit_documents}, not a count")

    @classmethod
    def none(cls) -> DirtRates:
        """A database as its schema wished it to be."""
        return cls.all(0, near_limit_documents=0)

    @classmethod
    def all(cls, rate: float, *, near_limit_documents: int = 1) -> DirtRates:
        """Every kind at the same `rate`, a share from 0 to 1; `near_limit_documents` stays a count."""
        return cls(**dict.fromkeys(RATED_KINDS, rate), near_limit_documents=near_limit_documents)


#: Every kind that has a rate, in the order of the fields.
RATED_KINDS: tuple[str, ...] = tuple(f.name for f in fields(DirtRates) if f.name != "near_limit_documents")

#: The kinds of which a username has at most one.
NAME_KINDS = ("colliding_case", "trailing_space", "long_name", "nul_in_name", "lone_surrogate")

#: The rates that a call without any gets.
DEFAULT_RATES = DirtRates()

_ANYWHERE = (
    "lone_surrogate",
    "nul_in_name",
    "missing_created_at",
    "missing_updated_at",
    "unknown_field",
    "string_or_object",
    "mixed_number",
    "big_integer",
    "not_a_number",
    "decimal128",
    "date_before_1970",
    "date_after_9999",
    "date_as_string",
    "empty_key",
    "dotted_key",
    "dollar_key",
    "top_level_key",
    "string_id",
    "dangling_reference",
)

#: The collection -> the kinds that occur in it.
KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "users": tuple(
            kind for kind in RATED_KINDS if kind not in {"second_identity", "merge_cycle", "linked_twice"}
        ),
        "playeridentities": (*_ANYWHERE, "second_identity", "merge_cycle", "linked_twice"),
        # A request names nobody: it has no string that could hold what a name can.
        "friendrequests": tuple(kind for kind in _ANYWHERE if kind not in {"nul_in_name", "lone_surrogate"}),
        "games": _ANYWHERE,
        "wizard": _ANYWHERE,
        "tablegames": _ANYWHERE,
    }
)
