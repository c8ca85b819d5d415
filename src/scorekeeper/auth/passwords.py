"""Passwords: hashed and verified with bcrypt, off the event loop, at a cost that tells nobody who exists.

The promise: a refused log-in costs the same work whether the name is unknown, has no password (a guest), has
a hash that nobody can read, or has a hash of a lower cost than ours. bcrypt of cost c does 2^c rounds. After
a refusal at a cost c below ours, C, verifications of a dummy at c, c+1, ... C-1 follow:
2^c + (2^c + ... + 2^(C-1)) = 2^C.

As the old back end (bcryptjs) does it: only the first 72 bytes of a password count, cut even inside a
character; a NUL is a byte like any other.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Final, TypeVar

import bcrypt

from scorekeeper.errors import unavailable

T = TypeVar("T")

#: bcrypt's own limit. bcrypt 5 raises above it, the old back end ignores the rest.
SIGNIFICANT_BYTES: Final = 72

#: A hash of a higher cost is not ours nor the old back end's: verifying it would hold a thread for minutes.
HIGHEST_COST: Final = 16

#: Verifications that may wait. At cost 12 and two threads that is some minutes of work; more is refused with
#: 503.
LONGEST_QUEUE: Final = 2000

_HASH = re.compile(r"\$2[aby]\$(\d\d)\$[./A-Za-z0-9]{53}")


def cost_of(password_hash: object) -> int | None:
    """The cost of a bcrypt hash (``$2a$``, ``$2b$``, ``$2y$``); None for anything else, or above
    `HIGHEST_COST`.
    """
    match = _HASH.fullmatch(password_hash) if isinstance(password_hash, str) else None
    if match is None or not 4 <= (cost := int(match[1])) <= HIGHEST_COST:
        return None
    return cost


def significant(password: str) -> bytes:
    """The bytes of a password that count."""
    return password.encode()[:SIGNIFICANT_BYTES]


@cache
def _dummy(cost: int) -> bytes:
    # Nobody's password: it is longer than bcrypt reads, and nothing is done with the answer.
    return bcrypt.hashpw(b"\xff" * SIGNIFICANT_BYTES, bcrypt.gensalt(cost))


class Passwords:
    """Hashing in a bounded pool of threads (bcrypt gives up the interpreter's lock while it works)."""

    def __init__(
        self, cost: int, threads: int, check: Callable[[bytes, bytes], bool] = bcrypt.checkpw
    ) -> None:
        """Prepare; no thread is started yet.

        Args:
            cost: of new hashes, 4 to 16.
            threads: that hash at one time.
            check: verifies one password against one hash; tests count its calls.
        """
        self.cost = cost
        self._check = check
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bcrypt")
        self._waiting = 0

    async def hash(self, password: str) -> str:
        """A new hash, ``$2b$`` with this cost.

        Raises:
            Problem: 503, too many are waiting.
        """
        secret = significant(password)
        return await self._run(lambda: bcrypt.hashpw(secret, bcrypt.gensalt(self.cost)).decode("ascii"))

    async def verify(self, password: str, password_hash: object) -> bool:
        """Whether the password belongs to the hash; False for a hash that is none (see the module's promise).

        Args:
            password: as it was sent.
            password_hash: as stored; None for an unknown name or a guest.

        Raises:
            Problem: 503, too many are waiting.
        """
        secret = significant(password)
        return await self._run(lambda: self._verify(secret, password_hash))

    def _verify(self, secret: bytes, password_hash: object) -> bool:
        cost = cost_of(password_hash)
        if cost is None:
            self._check(secret, _dummy(self.cost))
            return False
        assert isinstance(password_hash, str)
        if self._check(secret, password_hash.encode("ascii")):
            return True
        for lower in range(cost, self.cost):
            self._check(secret, _dummy(lower))
        return False

    async def _run(self, work: Callable[[], T]) -> T:
        if self._waiting >= LONGEST_QUEUE:
            raise unavailable("Too many people are logging in at the moment, please try again", "overloaded")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._waiting -= 1

    def warm_up(self) -> None:
        """Make the dummies that a refusal may need, so that the first one takes no longer than the next."""
        for cost in range(4, self.cost + 1):
            _dummy(cost)

    def close(self) -> None:
        """Let go of the threads; what waits is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> Passwords:
        await asyncio.get_running_loop().run_in_executor(self._pool, self.warm_up)
        return self

    async def __aexit__(self, *_exc: Any) -> None:
        self.close()
