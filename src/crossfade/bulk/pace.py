"""How much at a time, and how fast: chunks by time, and what a person or the throttle asks for (pure)."""

from __future__ import annotations

from crossfade.stores.runs import Steering

#: Seconds that a chunk should take: as long as locks are held, and a stop takes to be heard.
CHUNK_SECONDS = 1.0
#: Documents in a chunk: to begin with, at least, and at most (larger ones were not faster, smaller ones were).
FIRST, FEWEST, MOST = 2_000, 100, 5_000
#: At most while workers are to rest: what holds locks is to be short, too.
SMALL = 500
#: Seconds of one rest, at most: then it is asked again what is wanted.
LONGEST_REST = 2.0


class Pace:
    """The size of the next chunk, and the rest after the last one.

    Args:
        size: documents in a chunk, always; None: as many as take `CHUNK_SECONDS`.
    """

    def __init__(self, size: int | None = None) -> None:
        self._fixed = size
        self._by_time = float(FIRST)
        self._steering = Steering()
        self._owed = 0.0

    @property
    def count(self) -> int:
        """Documents in the next chunk."""
        own = self._fixed or int(self._by_time)
        return self._steering.chunk_size or (own if self._steering.duty == 1.0 else min(own, SMALL))

    def took(self, documents: int, seconds: float, steering: Steering) -> None:
        """Learn from a chunk: how long it took, and what is asked of its worker since."""
        self._steering = steering
        if documents and seconds > 0:
            wanted = CHUNK_SECONDS * documents / seconds
            # Half way: one slow chunk is no reason for small ones.
            self._by_time = min(max((self._by_time + wanted) / 2, FEWEST), MOST)
        rest = seconds * (1 / min(max(steering.duty, 0.01), 1.0) - 1)
        if steering.rate:
            rest = max(rest, documents * steering.workers / steering.rate - seconds)
        self._owed = max(rest, 0.0)

    def asked(self, steering: Steering) -> None:
        """Learn what is asked while resting."""
        if steering != self._steering and steering.rate != self._steering.rate:
            self._owed = 0.0
        self._steering = steering

    @property
    def stopped(self) -> bool:
        """Whether the worker is to end."""
        return self._steering.stopped

    def rest(self) -> float:
        """Seconds to rest now, before it is asked again what is wanted; 0: go on."""
        if self._steering.paused:
            return LONGEST_REST / 4
        part = min(self._owed, LONGEST_REST)
        self._owed -= part
        return part
