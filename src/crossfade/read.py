"""The read side: found, absent and failed kept apart, and no row older than an acknowledged write.

PostgreSQL is asked first only where it cannot be older than what was acknowledged: the debt board is fresh, the
record is not on it, and the secondary is not marked unreadable. Otherwise the primary is asked. A record that
PostgreSQL lacks is asked of MongoDB too, unless absence is final: falling back on errors alone would lock out
everyone who has not been copied yet.

Promised: an acknowledged write is seen by every later read, on every worker. Not promised: monotonic reads of
writes that nobody acknowledged; anything marked `Record.stale`; ``mode="async"`` writes before PostgreSQL has
them; a foreign writer's change before the sweep has found it (`Options.sweep`).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from crossfade import errors, observe
from crossfade.board import Look, Pair
from crossfade.clock import boot_clock
from crossfade.control import Control
from crossfade.entity import Entity, UniqueRule
from crossfade.fields import key_of
from crossfade.phase import Phase
from crossfade.query import Query
from crossfade.record import CF, Image, Record
from crossfade.shadow import Shadow
from crossfade.stores.errors import Fenced
from crossfade.values import Unmappable, can_be_id, id_texts, is_unicode

_T = TypeVar("_T")
_FAILED = (errors.StoreUnavailable, Fenced)
#: Times in a row after which PostgreSQL is not asked for what it is going to lack, and the reason that is counted then.
_LACKED_FOR_LONG, _LACKED = 8, "lacked in postgres so far"


@dataclass
class Reader:
    """Reads records of one migration."""

    pair: Pair
    shadow: Shadow
    #: How often in a row PostgreSQL lacked what was asked for, by (entity, how it was asked for). Many are not there
    #: before a backfill, and who registers looks for a name that nobody has: MongoDB, which is the primary and would be
    #: asked then, is asked for the next at the same time, and in the end alone, until it has one.
    _lacked: Counter[tuple[str, str]] = field(default_factory=Counter)
    _unwanted: set[asyncio.Task[Any]] = field(default_factory=set)

    async def get(self, entity: Entity, id_: Any, *, parts: bool = True) -> Record | None:
        """The record with this id, or None; without its ``parts`` where they are not asked for.

        Raises:
            crossfade.errors.StoreUnavailable: no store that may answer did.
        """
        if not can_be_id(id_):
            return None
        options = self.pair.options
        without = () if parts else entity.parts

        async def mongo(timeout: float) -> Image | None:
            found = await self.pair.mongo.read(entity, id_, timeout=timeout, without=without)
            if found is None or found.deleted:
                return None
            return next(iter(await self.pair.mongo.standing(entity, [found], timeout=timeout)), None)

        async def postgres(timeout: float) -> Image | None:
            if len(id_texts(id_)) == 1:
                return await self.pair.postgres.read(entity, id_, timeout=timeout, small=bool(without))
            found = await self.pair.postgres.read_many(entity, [id_], timeout=timeout, small=bool(without))
            return next(iter(found), None)

        found, source, stale = await self._first(
            entity, "by id", mongo, postgres, options.primary_deadline,
            ids=(id_,), missing=lambda image: image is None, without=without,
        )  # fmt: skip
        if found is None:
            return None
        return self.pair.seen.record(entity, found, source, stale=stale, without=without)

    async def get_many(self, entity: Entity, ids: Iterable[Any], *, parts: bool = True) -> list[Record]:
        """The records of these ids that there are, in the order of the ids, none twice."""
        try:
            places = {_place(id_): id_ for id_ in ids if can_be_id(id_)}
        except Unmappable as cause:
            raise errors.Quarantined(f"a document of {entity.name} cannot be read: {cause}") from cause
        if not places:
            return []
        wanted = list(places.values())
        without = () if parts else entity.parts

        async def mongo(timeout: float) -> list[Image]:
            found = await self.pair.mongo.read_many(entity, wanted, timeout=timeout, without=without)
            return await self.pair.mongo.standing(entity, found, timeout=timeout)

        async def postgres(timeout: float) -> list[Image]:
            return await self.pair.postgres.read_many(entity, wanted, timeout=timeout, small=bool(without))

        found, source, stale = await self._first(
            entity, "by ids", mongo, postgres, self.pair.options.primary_deadline, ids=wanted,
            missing=lambda images: len(images) < len(wanted), without=without,
        )  # fmt: skip
        images = {_place(image.id): image for image in found}
        return [
            self.pair.seen.record(entity, images[place], source, stale=stale, without=without)
            for place in places
            if place in images
        ]

    async def find_by_key(
        self, entity: Entity, rule_name: str, value: str, *, parts: bool = True
    ) -> Record | None:
        """The record that holds ``value`` under a unique rule: exactly as spelt, else normalised; or None."""
        without = () if parts else entity.parts
        rule = _rule(entity, rule_name)
        key = key_of(rule, value) if is_unicode(value) else None
        if key is None:
            return None
        phase = self.pair.board.control.phase

        async def mongo(timeout: float) -> Image | None:
            return await self._mongo_by_key(entity, rule, value, key, phase, timeout, without)

        async def postgres(timeout: float) -> Image | None:
            if "\0" in value:
                # PostgreSQL's text cannot hold it, so no row does; MongoDB is asked where it may be.
                return None
            columns = {column.field: column.to for column in entity.columns}
            return await self.pair.postgres.look_up(
                entity, columns[rule.field], value, rule.to, key, timeout=timeout,
                small=bool(without),
            )  # fmt: skip

        def holder(image: Image | None) -> Any | None:
            exact = image is not None and image.document.get(rule.field) == value
            return image.id if image is not None and exact else None

        found, source, stale = await self._first(
            entity, f"by {rule.rule}", mongo, postgres, self.pair.options.primary_deadline,
            missing=lambda image: image is None, without=without, holder=holder,
        )  # fmt: skip
        if found is None:
            return None
        return self.pair.seen.record(entity, found, source, stale=stale, without=without)

    async def _mongo_by_key(
        self,
        entity: Entity,
        rule: UniqueRule,
        value: str,
        key: str,
        phase: Phase,
        timeout: float,
        without: Collection[str],
    ) -> Image | None:
        spellings: list[dict[str, Any]] = [
            {rule.field: value},
            {f"{CF}.keys.{rule.rule}": key},
        ]
        found = await self.pair.mongo.look_up(entity, spellings, timeout=timeout, without=without)
        if not found and phase is Phase.MONGO_ONLY:
            # Before `crossfade init` has stamped them, old documents have no normalised key.
            likeness = {"$regex": f"^\\s*{re.escape(value.strip())}\\s*$", "$options": "i"}
            found = await self.pair.mongo.look_up(
                entity, [{rule.field: likeness}], timeout=timeout, without=without
            )
        found = await self.pair.mongo.standing(entity, found, timeout=timeout)
        exact = [image for image in found if image.document.get(rule.field) == value]
        return next(iter(exact or found), None)

    async def find(self, entity: Entity, query: Query, *, parts: bool = True) -> list[Record]:
        """The records that a query asks for, in its order."""
        without = () if parts else entity.parts

        async def mongo(timeout: float) -> list[Image]:
            fallen: list[Any] = []
            while True:
                found = await self.pair.mongo.find(
                    entity, query, timeout=timeout, without=without, but=fallen
                )
                standing = await self.pair.mongo.standing(entity, found, timeout=timeout)
                if len(standing) == len(found) or len(found) < query.limit:
                    return standing
                # They took the places of others that match.
                there = {_place(image.id) for image in standing}
                fallen += [image.id for image in found if _place(image.id) not in there]

        async def postgres(timeout: float) -> list[Image]:
            return await self.pair.postgres.find(entity, query, timeout=timeout, small=bool(without))

        found, source, stale = await self._first(
            entity,
            f"list by {_names(query)}",
            mongo,
            postgres,
            self.pair.options.primary_deadline,
            query=query,
            without=without,
        )
        return [self.pair.seen.record(entity, image, source, stale=stale, without=without) for image in found]

    async def count(self, entity: Entity, query: Query) -> int:
        """How many records match a query's conditions."""

        async def mongo(timeout: float) -> int:
            return await self.pair.mongo.count(entity, query.where, timeout=timeout)

        async def postgres(timeout: float) -> int:
            return await self.pair.postgres.count(entity, query.where, timeout=timeout)

        number, _, _ = await self._first(
            entity,
            f"count by {_names(query)}",
            mongo,
            postgres,
            self.pair.options.primary_deadline,
            query=query,
        )
        return number

    async def _first(
        self,
        entity: Entity,
        question: str,
        mongo: Callable[[float], Awaitable[_T]],
        postgres: Callable[[float], Awaitable[_T]],
        deadline: float,
        *,
        ids: Sequence[Any] = (),
        query: Query | None = None,
        missing: Callable[[_T], bool] | None = None,
        without: Collection[str] = (),
        holder: Callable[[_T], Any | None] | None = None,
    ) -> tuple[_T, str, bool]:
        """Ask the stores in the order that the phase and the board allow: (answer, source, stale).

        ``question``: how the records are asked for, without values. ``holder``: the id of the one record that an answer
        hangs on, as only one can hold what was asked for; None: of others, too.
        """
        began, board = time.perf_counter(), self.pair.board
        self.pair.asked = boot_clock()
        try:
            while True:
                control = board.control
                primary = control.phase.rules.primary
                if primary == "postgres":
                    found = await self._postgres_primary(entity, control, mongo, postgres, deadline, ids)
                else:
                    found = await self._mongo_primary(
                        entity, control, question, mongo, postgres, deadline, ids, query, missing, holder
                    )
                    if self.shadow.is_on(control) and self._has_columns(entity, query):
                        limit = 0 if query is None else query.limit
                        self.shadow.offer(
                            entity, question, found[0], found[1], mongo, postgres, limit, without
                        )
                if found[1] != primary or board.vouches_for(control):
                    return found
                # It may have answered as the primary that it was: others may be writing to the new one already. It was
                # not yet if the record, which is changed in its store, is the one that is known; every read of a pause
                # asks that, so no more is asked.
                if board.control.phase_epoch != control.phase_epoch or not await board.is_unchanged():
                    await board.refresh()
                # Not its name: it may have become the primary again, and have been none when it answered.
                if board.control.phase_epoch == control.phase_epoch:
                    return found
        except Unmappable as cause:
            raise errors.Quarantined(f"a document of {entity.name} cannot be read: {cause}") from cause
        finally:
            observe.of(observe.READ_SECONDS, self.pair.name).observe(time.perf_counter() - began)

    async def _mongo_primary(
        self,
        entity: Entity,
        control: Control,
        question: str,
        mongo: Callable[[float], Awaitable[_T]],
        postgres: Callable[[float], Awaitable[_T]],
        deadline: float,
        ids: Sequence[Any],
        query: Query | None,
        missing: Callable[[_T], bool] | None,
        holder: Callable[[_T], Any | None] | None,
    ) -> tuple[_T, str, bool]:
        look = self.pair.board.look
        reason = self._not_postgres(entity, control, ids, query, one=holder is not None)
        kind = (entity.name, question)
        final = self._absence_is_final(entity, control)
        lacked = 0 if final else self._lacked[kind]
        if reason is None and lacked >= _LACKED_FOR_LONG:
            reason = _LACKED
        asked: asyncio.Task[_T] | None = None
        try:
            if reason is None:
                if lacked:
                    asked = asyncio.ensure_future(mongo(deadline))
                    await asyncio.sleep(0)  # MongoDB first: it is what takes longer
                try:
                    answer = await self._guarded(postgres, query)
                except _FAILED:
                    reason = "postgres failed"
                else:
                    if missing is None or not missing(answer) or final:
                        del self._lacked[kind]
                        if holder is None or self._stands(entity, look, holder(answer), final=final):
                            self._count(entity, "postgres", "first")
                            return answer, "postgres", False
                        reason = "another may be meant"
                    else:
                        self._lacked[kind] += 1
                        reason = "absent in postgres"
            answer = await (asked or mongo(deadline))
        except _FAILED:
            in_order = False
            if reason == _LACKED:
                # PostgreSQL was left out, not doubted: what it has is the answer, if it may still be asked first.
                del self._lacked[kind]
                in_order = self._not_postgres(entity, self.pair.board.control, ids, query) is None
            if not control.postgres_first or control.unreadable or self._on_board(entity, ids):
                raise
            if not self._has_columns(entity, query) or self._lacks_some(control, query):
                raise
            answer = await self._guarded(postgres, query)
            if in_order and missing is not None and not missing(answer):
                self._count(entity, "postgres", "first")
                return answer, "postgres", False
            if not _can_be_marked(answer):
                raise
            self._count(entity, "postgres", "mongo failed")
            return answer, "postgres", True
        finally:
            if asked is not None:
                self._nobody_waits_for(asked)
        if reason == _LACKED and missing is not None and not missing(answer):
            del self._lacked[kind]
        self._count(entity, "mongo", reason)
        return answer, "mongo", False

    async def _postgres_primary(
        self,
        entity: Entity,
        control: Control,
        mongo: Callable[[float], Awaitable[_T]],
        postgres: Callable[[float], Awaitable[_T]],
        deadline: float,
        ids: Sequence[Any],
    ) -> tuple[_T, str, bool]:
        try:
            with self.pair.postgres_breaker.hears():
                answer = await postgres(deadline if self.pair.postgres_breaker.allows() else 0.25)
        except _FAILED as cause:
            if not control.phase.rules.dual or self._on_board(entity, ids):
                # MongoDB is known to lack an acknowledged write of this record.
                raise
            try:
                answer = await mongo(self.pair.options.secondary_deadline * 4)
            except _FAILED:
                raise cause from None
            if not _can_be_marked(answer):
                # Without a mark it would pass for the truth, and MongoDB may not have heard of it yet.
                raise
            self._count(entity, "mongo", "postgres failed")
            return answer, "mongo", True
        self._count(entity, "postgres", "primary")
        return answer, "postgres", False

    def _not_postgres(
        self,
        entity: Entity,
        control: Control,
        ids: Sequence[Any],
        query: Query | None,
        *,
        one: bool = False,
    ) -> str | None:
        """Why PostgreSQL may not be asked first; None: it may. ``one``: its answer is judged by `_stands`."""
        board = self.pair.board
        look = board.look
        if not control.postgres_first:
            return "phase"
        if look is None or board.age > self.pair.options.board_age:
            return "board too old"
        if control.unreadable is not None:
            return "secondary unreadable"
        if not ids:
            if entity.name in look.owed_entities and not (one and self._owes_what_is_known(entity, look)):
                return "entity in debt"
            if not self._has_columns(entity, query):
                return "no column"
            if self._lacks_some(control, query):
                return "not all in postgres so far"
        elif self._on_board(entity, ids):
            return "in debt"
        return None if self.pair.postgres_breaker.allows() else "postgres down"

    @staticmethod
    def _owes_what_is_known(entity: Entity, look: Look) -> bool:
        return entity.name not in look.overflown and entity.name not in look.quarantined

    @staticmethod
    def _stands(entity: Entity, look: Look | None, id_: Any | None, *, final: bool) -> bool:
        """Whether PostgreSQL's answer holds whatever is owed; ``id_``: the one record that it hangs on, or None.

        Who holds a name alone gives it up before another takes it. So where the holder owes nothing its row says what
        was acknowledged, the name included, and nobody who is in debt can have it. ``final``: PostgreSQL lacks nobody,
        so nobody else can be spelt just so.
        """
        if id_ is None or look is None:
            return final
        return not any((entity.name, text) in look.ids for text in id_texts(id_))

    @staticmethod
    def _lacks_some(control: Control, query: Query | None) -> bool:
        """Whether this is a list or a count that PostgreSQL cannot give: it may have been empty, and MongoDB full."""
        return query is not None and control.phase is Phase.DUAL_WRITE

    def _has_columns(self, entity: Entity, query: Query | None) -> bool:
        return query is None or self.pair.postgres.can_find(entity, query.where, query.order)

    def _on_board(self, entity: Entity, ids: Sequence[Any]) -> bool:
        look = self.pair.board.look
        if look is None or entity.name in look.overflown:
            return True
        if not ids:
            return entity.name in look.owed_entities
        return any((entity.name, text) in look.ids for id_ in ids for text in id_texts(id_))

    def _absence_is_final(self, entity: Entity, control: Control) -> bool:
        """Backfilled (phase 3 wants that), nobody writes to MongoDB alone, and nothing is owed."""
        look = self.pair.board.look
        return (
            control.phase is Phase.POSTGRES_READ
            and not control.foreign_writers
            and look is not None
            and entity.name not in look.owed_entities
        )

    async def _guarded(self, postgres: Callable[[float], Awaitable[_T]], query: Query | None) -> _T:
        # A list may take longer than that in a store that is well, and writes go there.
        with self.pair.postgres_breaker.hears(bounded=query is None):
            return await postgres(self.pair.options.secondary_deadline)

    def _nobody_waits_for(self, asked: asyncio.Task[Any]) -> None:
        """Let a question to MongoDB end by itself, within its deadline: to cancel it would cost its connection."""

        def ended(task: asyncio.Task[Any]) -> None:
            self._unwanted.discard(task)
            if not task.cancelled():
                task.exception()  # seen here, so that asyncio does not complain

        self._unwanted.add(asked)
        asked.add_done_callback(ended)

    def _count(self, entity: Entity, source: str, reason: str | None) -> None:
        observe.of(observe.READS, self.pair.name, entity.name, source, reason or "first").inc()


def _can_be_marked(answer: object) -> bool:
    """Whether it can say that it may be old: a record can; that there is none, and a number, cannot."""
    return isinstance(answer, Image) or (isinstance(answer, list) and bool(answer))


def _place(id_: Any) -> str:
    """One text for all ids that MongoDB takes for this one."""
    return min(id_texts(id_))


def _names(query: Query) -> str:
    return ", ".join(sorted({key for each in query.where for key in each})) or "nothing"


def _rule(entity: Entity, name: str) -> UniqueRule:
    for rule in entity.unique:
        if rule.rule == name:
            return rule
    known = ", ".join(rule.rule for rule in entity.unique) or "none"
    raise errors.ConfigurationError(f"entity {entity.name!r} has no unique rule {name!r}; it has: {known}")
