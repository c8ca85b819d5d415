"""How often something may be done: counts in Redis for all workers, in this process while Redis is away.

The algorithm is the library's (`limits`, a moving window). What is decided here is what happens without Redis: the
limit holds per worker instead of for all together, which is counted and logged. It is never lifted, and nobody is
refused because Redis is down.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Awaitable, Callable
from hashlib import sha256
from typing import Final, TypeVar

import structlog
from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from scorekeeper.metrics import DEGRADED

T = TypeVar("T")

log = structlog.get_logger("scorekeeper")

#: Seconds that Redis has to answer.
COMMAND_DEADLINE: Final = 0.25

#: Seconds for which Redis is left aside after it failed.
SILENCE: Final = 1.0

_FAILURES = (RedisError, OSError, TimeoutError)


class RateLimits:
    """Counts of what was done, by rule and by whom. Safe without Redis."""

    def __init__(self, redis_url: str, *, prefix: str, enabled: bool = True) -> None:
        """Prepare; nothing is sent yet.

        Args:
            redis_url: REDIS_URL.
            prefix: of every key; tells deployments apart that share one Redis.
            enabled: False lets everything pass (a load test from one address).
        """
        address = redis_url.replace("unix://", "redis+unix://", 1)
        self._pool = BlockingConnectionPool.from_url(
            redis_url,
            max_connections=16,
            timeout=COMMAND_DEADLINE,
            socket_timeout=COMMAND_DEADLINE,
            socket_connect_timeout=COMMAND_DEADLINE,
            retry=Retry(NoBackoff(), 1),
        )
        storage = RedisStorage(
            f"async+{address}",
            implementation="redispy",
            key_prefix=f"{prefix}:limit",
            connection_pool=self._pool,  # type: ignore[arg-type]
        )
        self._shared = MovingWindowRateLimiter(storage)
        self._local = MovingWindowRateLimiter(MemoryStorage())
        self._enabled = enabled
        self._silent_until = 0.0

    async def wait(self, rule: RateLimitItem, *whose: str) -> float:
        """Seconds until one more is within the rule; 0: it is now. Counts nothing."""
        if not self._enabled:
            return 0.0

        async def ask(limiter: MovingWindowRateLimiter) -> float:
            if await limiter.test(rule, *whose):
                return 0.0
            return max(1.0, (await limiter.get_window_stats(rule, *whose)).reset_time - time.time())

        return await self._ask(ask)

    async def count(self, rule: RateLimitItem, *whose: str) -> bool:
        """Count one more; whether it was within the rule."""
        return not self._enabled or await self._ask(lambda limiter: limiter.hit(rule, *whose))

    async def forget(self, rule: RateLimitItem, *whose: str) -> None:
        """Begin to count anew."""
        if self._enabled:
            await self._ask(lambda limiter: limiter.clear(rule, *whose))

    async def close(self) -> None:
        """Let go of the connections."""
        await self._pool.aclose()

    async def _ask(self, question: Callable[[MovingWindowRateLimiter], Awaitable[T]]) -> T:
        if time.monotonic() >= self._silent_until:
            try:
                return await question(self._shared)
            except _FAILURES as error:
                self._silent_until = time.monotonic() + SILENCE
                log.warning("Redis does not answer, limits hold per worker", cause=type(error).__name__)
        DEGRADED.labels("rate_limit").inc()
        return await question(self._local)


def network_of(address: str | None) -> str:
    """Whom an address stands for: itself, or its /64 (a household's, in IPv6); "local" for none."""
    try:
        known = ipaddress.ip_address(address or "")
    except ValueError:
        return "local"
    if isinstance(known, ipaddress.IPv6Address):
        if known.ipv4_mapped is not None:
            return str(known.ipv4_mapped)
        return str(ipaddress.ip_network((known, 64), strict=False).network_address)
    return str(known)


def account_key(name: str) -> str:
    """A name as part of a key in Redis: of bounded length, and not to be read by who looks into it."""
    return sha256(name.encode(errors="surrogatepass")).hexdigest()[:24]


__all__ = ["RateLimitItem", "RateLimits", "account_key", "network_of", "parse"]
