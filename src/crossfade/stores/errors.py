"""What a store can answer besides a result, in the words of the protocol.

The two modules beside this one translate their driver's exceptions into these; the protocol decides what they
mean for the caller.
"""

from __future__ import annotations

from crossfade.errors import CrossfadeError, StoreUnavailable


class Unanswered(StoreUnavailable):
    """The store was asked, and no answer came: it may or may not have acted."""


class RuleBroken(CrossfadeError):
    """The store refused a write: another record holds a value of a unique rule, a reference dangles, a check fails.

    Attributes:
        store: "mongo" or "postgres".
        constraint: the index or constraint that the store named, "" where it named none.
        taken: another record holds the value; else the rule is about this record alone.
    """

    def __init__(self, store: str, constraint: str, detail: str, *, taken: bool = True) -> None:
        super().__init__(detail)
        self.store = store
        self.constraint = constraint
        self.taken = taken


class Fenced(CrossfadeError):
    """PostgreSQL is at another epoch than the writer: the control record must be read again."""
