"""Passwords: hashed and verified off the event loop, at a cost that tells nobody who exists.

Two kinds of hash: bcrypt while the old back end may have to read them, argon2id afterwards; a log-in with the right
password replaces a hash of the other kind, or of a lower cost (`Passwords.is_outdated`).

The promise: a refused log-in costs the same work whether the name is unknown, has no password (a guest), has a hash
that nobody can read, of either kind, or of a lower cost than ours. bcrypt of cost c does 2^c rounds. After a refusal at
a cost c below ours, C, verifications of a dummy at c, c+1, ... C-1 follow: 2^c + (2^c + ... + 2^(C-1)) = 2^C. And every
refusal includes one verification of each kind, of a dummy where it is not the one that is stored.

As the old back end (bcryptjs) does it: only the first 72 bytes of a password count, cut even inside a
character; a NUL is a byte like any other. So also under argon2id: who has always typed a longer password with
another end, and got in, still gets in.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Final, TypeVar

import bcrypt
from argon2 import PasswordHasher, Type, extract_parameters
from argon2.exceptions import InvalidHashError, VerificationError

from scorekeeper.errors import unavailable

T = TypeVar("T")

#: bcrypt's own limit. bcrypt 5 raises above it, the old back end ignores the rest.
SIGNIFICANT_BYTES: Final = 72

#: A hash of a higher cost is not ours nor the old back end's: verifying it would hold a thread for minutes.
HIGHEST_COST: Final = 16

#: Verifications that may wait. At cost 12 and two threads that is some minutes of work; more is refused with
#: 503.
LONGEST_QUEUE: Final = 2000

#: argon2id as OWASP recommends it: 19 MiB, two passes, one lane.
_ARGON2 = PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1, type=Type.ID)

_HASH = re.compile(r"\$2[aby]\$(\d\d)\$[./A-Za-z0-9]{53}")


def cost_of(password_hash: object) -> int | None:
    """The cost of a bcrypt hash (``$2a$``, ``$2b$``, ``$2y$``); None for anything else, or above
    `HIGHEST_COST`.
    """
    match = _HASH.fullmatch(password_hash) if isinstance(password_hash, str) else None
    if match is None or not 4 <= (cost := int(match[1])) <= HIGHEST_COST:
        return None
    return cost


def _needs_argon2(password_hash: str) -> bool:
    try:
        return _ARGON2.check_needs_rehash(password_hash)
    except InvalidHashError:
        return True


def significant(password: str) -> bytes:
    """The bytes of a password that count."""
    return password.encode()[:SIGNIFICANT_BYTES]


@cache
def _dummy(cost: int) -> bytes:
    # Nobody's password: it is longer than bcrypt reads, and nothing is done with the answer.
    return bcrypt.hashpw(b"\xff" * SIGNIFICANT_BYTES, bcrypt.gensalt(cost))


def is_argon2(password_hash: object) -> bool:
    """Whether it is an argon2id hash at a cost that we are ready to pay."""
    if not isinstance(password_hash, str) or not password_hash.startswith("$argon2id$"):
        return False
    try:
        parameters = extract_parameters(password_hash)
    except InvalidHashError:
        return False
    # A hash of another tool could ask for gigabytes.
    return parameters.memory_cost <= 4 * _ARGON2.memory_cost and parameters.time_cost <= 10


@cache
def _argon2_dummy() -> str:
    return _ARGON2.hash(b"\xff" * SIGNIFICANT_BYTES)


def _check_argon2(secret: bytes, password_hash: str) -> bool:
    try:
        return _ARGON2.verify(password_hash, secret)
    except (VerificationError, InvalidHashError):
        return False


class Passwords:
    """Hashing in a bounded pool of threads (both kinds give up the interpreter's lock while they work)."""

    def __init__(
        self,
        cost: int,
        threads: int,
        check: Callable[[bytes, bytes], bool] = bcrypt.checkpw,
        *,
        modern: Callable[[], bool] = lambda: False,
    ) -> None:
        """Prepare; no thread is started yet.

        Args:
            cost: of new bcrypt hashes, 4 to 16.
            threads: that hash at one time.
            check: verifies one password against one bcrypt hash; tests count its calls.
            modern: whether new hashes are argon2id by now; asked each time.
        """
        self._modern = modern
        self.cost = cost
        self._check = check
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bcrypt")
        self._waiting = 0

    async def hash(self, password: str) -> str:
        """A new hash: argon2id if the time has come, else ``$2b$`` with this cost.

        Raises:
            Problem: 503, too many are waiting.
        """
        secret = significant(password)
        if self._modern():
            return await self._run(lambda: _ARGON2.hash(secret))
        return await self._run(lambda: bcrypt.hashpw(secret, bcrypt.gensalt(self.cost)).decode("ascii"))

    def is_outdated(self, password_hash: object) -> bool:
        """Whether a hash that a password has just been right for should be replaced by one of `hash`.

        A bcrypt hash stays as it is while bcrypt is what new hashes are: the old back end made it.
        """
        if self._modern():
            return not isinstance(password_hash, str) or _needs_argon2(password_hash)
        return is_argon2(password_hash)

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
        if is_argon2(password_hash):
            assert isinstance(password_hash, str)
            if _check_argon2(secret, password_hash):
                return True
            self._check(secret, _dummy(self.cost))
            return False
        if self._verify_bcrypt(secret, password_hash):
            return True
        _check_argon2(secret, _argon2_dummy())
        return False

    def _verify_bcrypt(self, secret: bytes, password_hash: object) -> bool:
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
        _argon2_dummy()

    def close(self) -> None:
        """Let go of the threads; what waits is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> Passwords:
        await asyncio.get_running_loop().run_in_executor(self._pool, self.warm_up)
        return self

    async def __aexit__(self, *_exc: Any) -> None:
        self.close()
