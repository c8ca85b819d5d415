"""Which portion of a list is asked for, and what is said about it (pure).

The client counts pages or skips games. What it sends is read as the old back end reads it, leniently: a text that
begins with a number is that number, any other one is the default.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

#: PostgreSQL and MongoDB count so far.
_FARTHEST: Final = 2**31 - 1

_NUMBER = re.compile(r"\s*([+-]?[0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class Portion:
    """``limit`` games at most, after the first ``skip``."""

    skip: int
    limit: int


def number_in(text: str | None, default: int, *, low: int, high: int) -> int:
    """The number that a text begins with, within bounds; zero and what is none are the default."""
    found = _NUMBER.match(text or "")
    return min(max((int(found[1]) if found else 0) or default, low), high)


def portion(page: str | None, skip: str | None, limit: str | None, *, usual: int, most: int) -> Portion:
    """The portion that query parameters ask for; a page, counted from 1, goes before a skip."""
    size = number_in(limit, usual, low=1, high=most)
    if page:
        number = number_in(page, 1, low=1, high=_FARTHEST // size)
        return Portion((number - 1) * size, size)
    return Portion(number_in(skip, 0, low=0, high=_FARTHEST), size)


def pages(asked: Portion, total: int) -> dict[str, Any]:
    """What the client is told about a portion of a list of ``total`` games."""
    current, last = asked.skip // asked.limit + 1, -(-total // asked.limit)
    return {
        "total": total,
        "limit": asked.limit,
        "skip": asked.skip,
        "pagination": {
            "currentPage": current,
            "totalPages": last,
            "hasNextPage": current < last,
            "hasPrevPage": current > 1,
        },
    }
