"""The cache of authenticated users, in Redis: never older than the last acknowledged change.

What it promises
    A look-up that begins after a change was acknowledged, on whichever worker, sees that change. What another
    application writes is seen after at most ``ttl`` + ``LEASE`` seconds. When many ask for one missing user,
    one of them asks the stores. Redis failing makes look-ups slower (they go to the stores), never wrong.

How
    Leases, after Nishtala et al., "Scaling Memcache at Facebook" (NSDI 2013). Who misses takes a lease (a
    random word under a second key), asks the stores, and fills the entry only if the lease is still its own,
    in one script. A change deletes entry and lease in one command, after the stores have it and before it is
    acknowledged. So a fill that began before the change finds its lease gone. Nobody is handed another's
    answer: who waits for a fill only waits, and then looks again, because an answer that was under way before
    it came may be older than a change that it must see. Losing keys (eviction, restart) is a miss, nothing
    else.

    An entry that nears its end is refreshed in the background under a lease, while it still serves.

    What somebody is shown of themselves (`Kind.SELF`) holds their identities, which others may change too, many at a
    time. So such an entry is stamped with a word that every change of identities replaces (`forget_identities`): the
    one that was read before the stores were asked. An entry of an older word is a miss.

    Look-ups that are asked for in one turn of the event loop go to Redis as one command. It leaves after the last of
    them was asked, so each sees every change that was acknowledged before.

    A value is JSON, written once, when the stores were asked: the cache hands on the bytes and never reads them.

What breaks it, and what is done
    A change that cannot reach Redis cannot delete the entry. It is acknowledged only after every entry from
    before it has run out (``ttl`` + ``LEASE``): a slow answer while Redis is away, counted, and no stale
    role.
    A Redis that fails over to an older copy of itself: an entry from before lives at most ``ttl`` +
    ``LEASE``.
"""

from __future__ import annotations

import asyncio
import secrets
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import structlog
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from scorekeeper.metrics import CACHE, INVALIDATIONS

log = structlog.get_logger("scorekeeper")

#: Seconds that a lease lasts: who has not filled by then may not.
LEASE: Final = 2.0

#: Seconds that Redis has to answer one command: it is to be faster than the stores, or left aside.
COMMAND_DEADLINE: Final = 0.25

#: Seconds between two questions to a Redis that has failed; look-ups leave it aside meanwhile, and never wait to find
#: out whether it is back.
SILENCE: Final = 1.0

#: Bytes of an entry: a picture of megabytes is read from the stores.
LARGEST: Final = 65_536

_HIT, _WAITED = CACHE.labels("hit"), CACHE.labels("waited")

#: What stands before the value in an entry: which layout it is, when it ends (seconds since 1970), and the word that it
#: is stamped with. Another layout (another release beside this one) is a miss.
_HEAD: Final = struct.Struct("<4sd16s")
_LAYOUT: Final = b"sk2\n"
_NO_STAMP: Final = bytes(16)

#: Seconds that a look-up waits for another's fill before it asks the stores itself.
PATIENCE: Final = 0.5

#: An entry is refreshed when this part of its life is left.
REFRESH_AT: Final = 0.3

# KEYS entry, lease; ARGV word, value, milliseconds.
_FILL: Final = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
"""

# KEYS entry, lease; ARGV word, milliseconds, the entry as it was seen. Who saw none must not get the lease that was
# let go after a fill meanwhile.
_LEASE: Final = """
local entry = redis.call('GET', KEYS[1])
if entry and entry ~= ARGV[3] then return 0 end
return redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2]) and 1 or 0
"""

_FAILURES = (RedisError, OSError, TimeoutError)


class Kind(StrEnum):
    """What is kept of a user.

    Attributes:
        WHO: id, name and role: who is asking.
        SELF: what they are shown of themselves, identities included.
    """

    WHO = "user"
    SELF = "self"


Load = Callable[[], Awaitable["Loaded"]]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the stores said.

    Attributes:
        value: JSON, or None when there is no such user. Absence is not cached.
        cacheable: False for an answer that may be old (the primary could not be asked).
    """

    value: bytes | None
    cacheable: bool = True


class UserCache:
    """Users by id, shared by all workers. Safe without Redis."""

    def __init__(self, redis: Redis, *, prefix: str, ttl: float) -> None:
        """Use a client; nothing is sent yet.

        Args:
            redis: see `connect`.
            prefix: of every key; tells deployments apart that share one Redis.
            ttl: seconds that an entry lives, counted from before the stores were asked; 0: nothing is kept.
        """
        self._redis = redis
        self._fill = redis.register_script(_FILL)
        self._lend = redis.register_script(_LEASE)
        self._prefix = prefix
        self._ttl = ttl
        self._silence: asyncio.Task[None] | None = None
        self._loading: dict[str, asyncio.Event] = {}
        self._asked: dict[str, list[asyncio.Future[tuple[bytes | None, bytes | None]]]] = {}
        self._asking: set[asyncio.Task[None]] = set()
        self._refreshes: dict[str, asyncio.Task[None]] = {}

    @classmethod
    def connect(cls, url: str, *, prefix: str, ttl: float) -> UserCache:
        """A cache on a pool of its own.

        Args:
            url: REDIS_URL.
            prefix, ttl: as in the constructor.
        """
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=32,
            timeout=COMMAND_DEADLINE,
            socket_timeout=COMMAND_DEADLINE,
            socket_connect_timeout=COMMAND_DEADLINE,
            # One immediate retry: a connection that Redis closed while it was idle is not a failure.
            retry=Retry(NoBackoff(), 1),
        )
        return cls(Redis.from_pool(pool), prefix=prefix, ttl=ttl)

    async def get(self, user_id: str, load: Load, kind: Kind = Kind.WHO) -> bytes | None:
        """The user as JSON, from Redis or else from the stores; None: there is no such user.

        Args:
            user_id: id as text.
            load: asks the stores. Its errors are the caller's.
            kind: what of the user; each with a ``load`` of its own.
        """
        slot = f"{kind}:{user_id}"
        until = 0.0
        while self._ttl and self._silence is None:
            if slot in self._loading:
                until = until or time.monotonic() + PATIENCE
                await self._wait_for_local(slot, until)
            try:
                entry, stamp = await self._read(slot, kind)
                if entry is not None and (value := self._opened(slot, entry, stamp, load)) is not None:
                    (_WAITED if until else _HIT).inc()
                    return value
                if until and time.monotonic() >= until:
                    break
                if slot in self._loading:
                    continue
                word = await self._take_lease(slot, entry)
            except _FAILURES as error:
                self._failed(error)
                break
            if word is not None:
                CACHE.labels("miss").inc()
                done = self._loading.setdefault(slot, asyncio.Event())
                try:
                    return await self._load_and_fill(slot, word, stamp, load)
                finally:
                    self._loading.pop(slot, None)
                    done.set()
            # Another process is filling; 10 ms is a few times what a look-up in the stores takes.
            until = until or time.monotonic() + PATIENCE
            await asyncio.sleep(0.01)
        CACHE.labels("bypass").inc()
        return (await load()).value

    async def forget(self, user_id: str) -> None:
        """A change of this user is in the stores: let no look-up from now on see what was before.

        Call it before acknowledging the change, also when its outcome is unknown. Returns at once when Redis
        has dropped the entry; while Redis does not answer, after ``ttl`` + `LEASE` seconds at most (see the
        module).
        """
        slots = [f"{kind}:{user_id}" for kind in Kind]
        keys = [key for slot in slots for key in (self._entry(slot), self._lease(slot))]
        await self._tell(lambda: self._redis.delete(*keys))

    async def forget_identities(self) -> None:
        """A change of some identities is in the stores: the same, for what anybody is shown of their own."""
        await self._tell(lambda: self._redis.set(self._stamp, secrets.token_hex(8)))

    async def _tell(self, command: Callable[[], Awaitable[Any]]) -> None:
        if not self._ttl:
            return
        until = time.monotonic() + self._ttl + LEASE
        waited = False
        while True:
            try:
                await self._command(command())
            except _FAILURES as error:
                self._failed(error)
            else:
                break
            if not waited:
                waited = True
                log.warning("Redis cannot be told of a change", waiting_at_most=self._ttl + LEASE)
            left = until - time.monotonic()
            if left <= 0:
                break
            await asyncio.sleep(min(COMMAND_DEADLINE, left))
        INVALIDATIONS.labels("waited_out" if waited else "done").inc()

    async def answers(self) -> bool:
        """Whether Redis answers now."""
        try:
            return bool(await self._command(self._redis.ping()))
        except _FAILURES:
            return False

    async def close(self) -> None:
        """Stop refreshing and let go of the connections."""
        tasks = [
            *self._refreshes.values(),
            *self._asking,
            *([] if self._silence is None else [self._silence]),
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._redis.aclose(close_connection_pool=True)

    # -- one fill at a time ------------------------------------------------------------------------

    async def _wait_for_local(self, slot: str, until: float) -> None:
        """Wait for a fill of this process."""
        try:
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                await self._loading[slot].wait()
        except TimeoutError:
            pass

    async def _take_lease(self, slot: str, seen: bytes | None) -> str | None:
        """The word to fill with, if the entry is still what was seen and nobody else is filling."""
        word = secrets.token_hex(8)
        keys = [self._entry(slot), self._lease(slot)]
        taken = await self._command(self._lend(keys=keys, args=[word, int(LEASE * 1000), seen or b""]))
        return word if taken else None

    async def _load_and_fill(self, slot: str, word: str, stamp: bytes | None, load: Load) -> bytes | None:
        began = time.monotonic()
        try:
            loaded = await load()
        except Exception:
            # The next one is to find out for itself at once, not when the lease has run out.
            await self._store(slot, word, None, Loaded(None), began)
            raise
        await self._store(slot, word, stamp, loaded, began)
        return loaded.value

    async def _store(self, slot: str, word: str, stamp: bytes | None, loaded: Loaded, began: float) -> None:
        left = self._ttl - (time.monotonic() - began)
        try:
            if stamp is None and loaded.value is not None:
                # No change of identities was ever told, or Redis has lost its word: begin with one.
                await self._command(self._redis.set(self._stamp, secrets.token_hex(8), nx=True))
            if (
                loaded.value is None
                or not loaded.cacheable
                or left <= 0
                or stamp is None
                or len(loaded.value) > LARGEST
            ):
                # Not to be filled: the next one need not wait for the lease to run out. If it is another's by
                # now, that one loses a fill, nothing else.
                await self._command(self._redis.delete(self._lease(slot)))
                return
            entry = _HEAD.pack(_LAYOUT, time.time() + left, stamp) + loaded.value
            keys = [self._entry(slot), self._lease(slot)]
            await self._command(self._fill(keys=keys, args=[word, entry, int(left * 1000) or 1]))
        except _FAILURES as error:
            self._failed(error)

    def _opened(self, slot: str, entry: bytes, stamp: bytes | None, load: Load) -> bytes | None:
        try:
            layout, until, stamped = _HEAD.unpack_from(entry)
        except struct.error:
            return None
        if layout != _LAYOUT or stamped != stamp:
            return None
        # Only *when* to refresh hangs on the wall clock; how long an entry lives is Redis's own count.
        is_due = until - time.time() < self._ttl * REFRESH_AT
        if is_due and slot not in self._loading and slot not in self._refreshes:
            task = asyncio.create_task(self._refresh(slot, entry, stamp, load))
            self._refreshes[slot] = task
            task.add_done_callback(lambda _: self._refreshes.pop(slot, None))
        return entry[_HEAD.size :]

    async def _refresh(self, slot: str, seen: bytes, stamp: bytes | None, load: Load) -> None:
        try:
            word = await self._take_lease(slot, seen)
            if word is not None:
                await self._load_and_fill(slot, word, stamp, load)
                CACHE.labels("refreshed").inc()
        except Exception as error:  # nobody waits for it; the entry simply runs out
            log.debug("refresh failed", cause=type(error).__name__)

    # -- Redis -------------------------------------------------------------------------------------

    async def _read(self, slot: str, kind: Kind) -> tuple[bytes | None, bytes | None]:
        """The entry, and the word that it must be stamped with; where identities have no part in it, always the same.

        By the command that leaves at the end of this turn of the loop.
        """
        if not self._asked:
            task = asyncio.create_task(self._ask())
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        # One for each who asks: when one goes away, nobody else is to be left without an answer.
        answer = asyncio.get_running_loop().create_future()
        self._asked.setdefault(self._entry(slot), []).append(answer)
        entry, stamp = await answer
        return entry, _NO_STAMP if kind is Kind.WHO else stamp

    async def _ask(self) -> None:
        asked, self._asked = self._asked, {}
        try:
            *entries, stamp = await self._command(self._redis.mget([*asked, self._stamp]))
        except BaseException as error:
            for answer in (each for answers in asked.values() for each in answers if not each.done()):
                answer.set_exception(error if isinstance(error, Exception) else TimeoutError("closing"))
                # Who asked may be gone; then nobody else is to be told of it.
                answer.exception()
            if not isinstance(error, Exception):
                raise
            return
        for answers, entry in zip(asked.values(), entries, strict=True):
            for answer in answers:
                if not answer.done():
                    answer.set_result((entry, stamp))

    async def _command(self, command: Awaitable[Any]) -> Any:
        # The pool may make a command wait for a connection besides: twice the deadline bounds both.
        async with asyncio.timeout(2 * COMMAND_DEADLINE):
            return await command

    def _failed(self, error: BaseException) -> None:
        if self._silence is None:
            log.warning("Redis does not answer, asking the stores instead", cause=type(error).__name__)
            self._silence = asyncio.create_task(self._until_it_answers())

    async def _until_it_answers(self) -> None:
        while True:
            await asyncio.sleep(SILENCE)
            if await self.answers():
                self._silence = None
                return

    @property
    def _stamp(self) -> str:
        return f"{self._prefix}:identities"

    def _entry(self, slot: str) -> str:
        return f"{self._prefix}:{slot}"

    def _lease(self, slot: str) -> str:
        return f"{self._prefix}:lease:{slot}"
