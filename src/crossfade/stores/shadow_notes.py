"""What shadow reads found, in PostgreSQL: how many were compared, and each record that differed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import orjson


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A record of which the two stores gave different answers.

    Attributes:
        entity: name of the entity.
        id: id text; of what is no record's own (two different counts), the question in brackets.
        cause: a `crossfade.shadow.Cause`.
        fields: names of the top-level fields that differ.
        question: how it was asked for.
        mongo, postgres: revision in each store when it was seen last.
        seen: how often.
        first_seen, last_seen: UTC.
        resolved_at: since when it is mended, or accepted; None: it is open.
        resolved_by, resolved_why: who says so, and why.
    """

    entity: str
    id: str
    cause: str
    fields: tuple[str, ...]
    question: str
    mongo: int | None
    postgres: int | None
    seen: int = 1
    first_seen: datetime | None = None
    last_seen: datetime | None = None
    resolved_at: datetime | None = None
    resolved_by: str | None = None
    resolved_why: str | None = None


@dataclass(frozen=True, slots=True)
class Compared:
    """What was compared since the phase was entered, under one mapping, by all workers.

    Attributes:
        equal, mismatch: comparisons by how they ended; the evidence is made of these.
        unsettled, dropped, failed: what came to no end, did not fit into a queue, or had no answer in time.
        open: records that differ and that nobody has resolved, whenever they were seen.
    """

    equal: int = 0
    mismatch: int = 0
    unsettled: int = 0
    dropped: int = 0
    failed: int = 0
    open: int = 0

    @property
    def comparisons(self) -> int:
        """Comparisons that came to an end."""
        return self.equal + self.mismatch


class ShadowNotes:
    """Keeps them.

    Args:
        ask: one named query, with a deadline in seconds and parameters; its rows.
    """

    def __init__(self, ask: Callable[..., Awaitable[list[tuple[Any, ...]]]]) -> None:
        self._ask = ask

    async def count(
        self, migration: str, mapping: str, entered: int, counted: Mapping[str, int], *, timeout: float
    ) -> None:
        """Add to what was compared since epoch ``entered``."""
        names = ("equal", "mismatch", "unsettled", "dropped", "failed")
        await self._ask(
            "shadow_count", timeout, migration=migration, mapping=mapping, entered=entered,
            **{name: counted.get(name, 0) for name in names},
        )  # fmt: skip

    async def compared(
        self, migration: str, mapping: str, entered: int, entities: Iterable[str], *, timeout: float
    ) -> Compared:
        """What was compared since epoch ``entered``, and what is open."""
        rows = await self._ask(
            "shadow_compared", timeout, migration=migration, mapping=mapping, entered=entered,
            entities=list(entities),
        )  # fmt: skip
        return Compared(*(int(number) for number in rows[0]))

    async def note(self, found: Iterable[Mismatch], *, timeout: float) -> None:
        """Keep these, by entity and id; one that was resolved is open again."""
        names = ("entity", "id", "cause", "fields", "question", "mongo", "postgres", "seen")
        rows = [{name: asdict(one)[name] for name in names} for one in found]
        await self._ask("mismatch_note", timeout, found=orjson.dumps(rows).decode())

    async def mismatches(
        self, entities: Iterable[str], *, limit: int, resolved: bool = False, timeout: float
    ) -> list[Mismatch]:
        """The latest seen first; ``resolved``: those that are no longer open, too."""
        rows = await self._ask(
            "mismatches", timeout, entities=list(entities), limit=limit, resolved=resolved, id=None
        )
        return [_mismatch(row) for row in rows]

    async def mismatch(self, entity: str, text: str, *, timeout: float) -> Mismatch | None:
        """One, open or not; None: there is none."""
        rows = await self._ask("mismatches", timeout, entities=[entity], limit=1, resolved=True, id=text)
        return _mismatch(rows[0]) if rows else None

    async def resolve(self, one: Mismatch, *, by: str, why: str, timeout: float) -> bool:
        """Close one, if it was not seen again since it was read."""
        rows = await self._ask(
            "mismatch_resolve", timeout, entity=one.entity, id=one.id, last_seen=one.last_seen, by=by, why=why
        )
        return bool(rows)


def _mismatch(row: tuple[Any, ...]) -> Mismatch:
    entity, id_, cause, fields, *rest = row
    return Mismatch(entity, id_, cause, tuple(fields), *rest)
