"""A circuit breaker per store: after failures in a row, spare callers the wait for a store that is down.

Nobody waits to find out whether it is back: an open breaker asks the store itself, now and then, in a task of its own.

A caller that gives up before the store had its time says nothing of it, neither that it answers nor that it does not.
So a closed breaker asks then, too: no store is taken for one that is down because clients go away, and one that is down
is found to be even by those who never wait as long as a deadline. The same holds of a list that takes longer than
anybody waits, in a store that is well.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from crossfade.errors import CrossfadeError, StoreUnavailable
from crossfade.values import Unmappable


@dataclass
class Breaker:
    """Closed (calls pass) or open (none does, until the store has answered the breaker).

    Attributes:
        probe: asks the store whether it is there; raises `crossfade.errors.CrossfadeError` where it is not, within a
            time of its own.
        failures_to_open: failures in a row that open it.
        rest: seconds between two questions of an open one.
        failures: in a row, until now.
    """

    probe: Callable[[], Awaitable[Any]]
    failures_to_open: int = 3
    rest: float = 1.0
    failures: int = 0
    is_open: bool = False
    _probing: asyncio.Task[None] | None = field(default=None, repr=False)
    _doubting: asyncio.Task[None] | None = field(default=None, repr=False)

    def allows(self) -> bool:
        """Whether a call may go to the store now; a call that was allowed must report its end (`hears`)."""
        return not self.is_open

    @contextlib.contextmanager
    def hears(self, *, bounded: bool = True) -> Iterator[None]:
        """Report how the call within ends: answered (a refusal by rules is), not answered, or given up.

        ``bounded``: a store that is well answers it in time. What ends by another error says nothing of the store.
        """
        try:
            yield
        except (StoreUnavailable, TimeoutError):
            if bounded:
                self.failed()
            else:
                self.given_up()
            raise
        except (CrossfadeError, Unmappable):
            self.succeeded()
            raise
        except (asyncio.CancelledError, Exception):
            self.given_up()
            raise
        self.succeeded()

    def succeeded(self) -> None:
        """The store answered (a refusal by its rules is an answer)."""
        self.failures = 0
        self.is_open = False

    def failed(self) -> None:
        """The store did not answer."""
        self.failures += 1
        if self.failures < self.failures_to_open:
            return
        self.is_open = True
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._ask(), name="asking a store that is down")

    def given_up(self) -> None:
        """The caller left before the store had the time that it may need to answer: the store is asked."""
        if not self.is_open and (self._doubting is None or self._doubting.done()):
            self._doubting = asyncio.create_task(self._doubt(), name="asking a store that nobody waited for")

    async def close(self) -> None:
        """Ask no more."""
        asking = {task for task in (self._probing, self._doubting) if task is not None}
        # Once is not enough, as in `board.end`: a driver makes a failure of its own of a cancellation.
        while asking := {task for task in asking if not task.done()}:
            for task in asking:
                task.cancel()
            await asyncio.wait(asking, timeout=0.1)

    async def _doubt(self) -> None:
        try:
            await self.probe()
        except Exception:  # as below: whatever it ends by, the store did not answer
            self.failed()

    async def _ask(self) -> None:
        while True:
            await asyncio.sleep(self.rest)
            # Whatever it ends by: nobody else would ever close the breaker.
            with contextlib.suppress(Exception):
                if self.is_open:
                    await self.probe()
                if self.is_open:
                    # It may answer this and nothing else: the next failure opens it again.
                    self.failures = self.failures_to_open - 1
                    self.is_open = False
                return
