"""The pieces of a run, for one of its workers: which one next, when to rest, when to end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from crossfade import errors, observe
from crossfade.bulk.pace import Pace
from crossfade.bulk.plan import Range, choose_bounds, decode_position, encode_position, ranges_between
from crossfade.entity import Entity
from crossfade.stores.bulk_mongo import BulkMongo
from crossfade.stores.references import references_of
from crossfade.stores.runs import LeaseLost, Piece, Run, Runs

#: Documents in a piece, about, and pieces at most. Several workers have at least so many each, down to so few
#: documents: who is done early must find something.
PIECE, MOST_PIECES = 25_000, 1_000
EACH, SMALLEST = 4, 500
#: Ids drawn for each bound: a piece is then seldom twice as large as another.
_DRAWN = 20
#: Seconds between two questions whether what others are at is done, or free.
_PATIENCE = 0.25


async def plan(source: BulkMongo, entity: Entity, workers: int) -> list[tuple[bytes | None, bytes | None]]:
    """Bounds of about equal pieces of a collection for so many workers, as `Runs.begin` takes them."""
    documents = await asyncio.to_thread(source.count, entity)
    shared = min(workers * EACH, documents // SMALLEST) if workers > 1 else 1
    pieces = min(max(documents // PIECE, shared, 1), MOST_PIECES)
    drawn = await asyncio.to_thread(source.draw_ids, entity, pieces * _DRAWN) if pieces > 1 else []
    return [
        (
            None if one.after is None else encode_position(one.after["_id"]),
            None if one.last is None else encode_position(one.last["_id"]),
        )
        for one in ranges_between(choose_bounds(drawn, pieces))
    ]


def in_dependency_order(entities: Sequence[Entity]) -> list[Entity]:
    """Those that others refer to first, so that links are set as rows arrive; else as they are given.

    A circle is entered where it was given first: the links that are missing then are set when the last one arrives.
    """
    needs = {one.name: {link.target.fullname for link in references_of(one)} for one in entities}
    left, ordered = list(entities), list[Entity]()
    while left:
        names = {one.table.fullname: one.name for one in left}
        ready = [one for one in left if not {names[n] for n in needs[one.name] & names.keys()} - {one.name}]
        ordered.append((ready or left)[0])
        left.remove(ordered[-1])
    return ordered


def at(piece: Piece) -> Range:
    """Which ids a piece has."""
    return Range(decode_position(piece.after), decode_position(piece.last))


class Pieces:
    """What one worker does of a run.

    Args:
        stop: once set, it ends after the chunk under way.
    """

    def __init__(self, runs: Runs, run: Run, pace: Pace, stop: asyncio.Event | None) -> None:
        self._runs = runs
        self._run = run
        self._pace = pace
        self._stop = stop
        self._complete = False

    @property
    def is_to_stop(self) -> bool:
        """Whether it was asked to end."""
        return self._pace.stopped or (self._stop is not None and self._stop.is_set())

    async def next(self, *, alone: bool) -> Piece | None:
        """A piece that nobody is at; ``alone``: wait for those that others have now, and may leave behind.

        None: nothing is left, or this worker is to end.
        """
        while not self.is_to_stop:
            piece = await self._runs.claim(self._run)
            if piece is not None or not alone or not await self._runs.is_busy(self._run):
                return piece
            await asyncio.sleep(_PATIENCE)
            self._pace.asked(await self._runs.steering(self._run))
        return None

    @asynccontextmanager
    async def hold(self, piece: Piece) -> AsyncIterator[None]:
        """Work on a piece. One whose lease has gone meanwhile is somebody else's; what is not completed is free."""
        self._complete = False
        try:
            yield
        except LeaseLost as lost:
            observe.log().info("[Bulk] Another worker has taken over", what=str(lost))
        finally:
            if not self._complete:
                with suppress(errors.CrossfadeError):
                    await self._runs.release(piece)

    async def complete(self, piece: Piece, counts: Mapping[str, Any]) -> None:
        """Note that nothing is left of a piece.

        Raises:
            LeaseLost: somebody else has it.
        """
        steering = await self._runs.finish_piece(piece, counts)
        self._pace.asked(steering)
        self._complete = True

    async def rest(self, piece: Piece) -> None:
        """Rest as long as is asked for, and keep the lease meanwhile."""
        while not self.is_to_stop and (seconds := self._pace.rest()):
            await asyncio.sleep(seconds)
            self._pace.asked(await self._runs.keep(piece))
