"""One write on its way, whichever store decides it: what was asked, what is known of it, and what it may be told as."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import bson

from crossfade import errors, observe
from crossfade.clock import boot_clock
from crossfade.control import Control
from crossfade.entity import Entity
from crossfade.record import CF, Step
from crossfade.stores.errors import Fenced
from crossfade.strategy import FailureStrategy
from crossfade.values import CODEC_OPTIONS, Unmappable, can_be_id, id_texts, id_to_text

#: What a store raises that could not be asked, or is at another epoch.
FAILED = (errors.StoreUnavailable, Fenced)
#: What is raised of a write that may stand; and what only a primary that has answered decides: it was not made.
_SAY_WHAT_BECAME = (errors.OutcomeUnknown, errors.Undone, errors.UndoPending)
_DECIDED = (errors.NotFound, errors.DuplicateKey, errors.StaleRevision, errors.ConditionNotMet)
#: Seconds for the answer of a ``mode="async"`` write to leave the process before its other half takes the processor.
_ANSWER_FIRST = 0.005


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller asks of any write.

    Attributes:
        context: names the operation in log lines.
        strategy: None for the phase's default.
        asynchronous: acknowledge once the primary has it.
        where: an update only: fields that must equal these values, or nothing is written.
        steps: what the operation does to other records, once this one has decided it.
    """

    context: str
    strategy: FailureStrategy | None = None
    asynchronous: bool = False
    where: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()


@dataclass(slots=True)
class Fate:
    """What is known of a write.

    Attributes:
        unanswered: it was sent, and the primary has not answered: it may have been made.
        made: it is in the primary.
    """

    unanswered: bool = False
    made: bool = False

    def leaves_open(self, cause: errors.CrossfadeError) -> bool:
        """Whether this error says less than there is to say: no write that may stand is told as one that failed."""
        says = _SAY_WHAT_BECAME if self.made else (*_SAY_WHAT_BECAME, *_DECIDED)
        return (self.made or self.unanswered) and not isinstance(cause, says)


@dataclass(frozen=True, slots=True)
class Operation:
    """One write on its way.

    Attributes:
        kind: "insert", "update" or "delete".
        control: the control record it was admitted under.
        ends: when the primary must have answered, by `boot_clock`.
        decider: (entity, id text) of the record.
        fate: what is known of it, in whatever attempt.
    """

    kind: str
    context: str
    strategy: FailureStrategy
    asynchronous: bool
    control: Control
    op: str
    ends: float
    request: Request
    decider: tuple[str, str]
    fate: Fate

    @property
    def rollback(self) -> bool:
        """Success may only be told once both stores hold it."""
        return self.strategy is FailureStrategy.ROLLBACK_BOTH

    @property
    def everybody(self) -> list[tuple[str, str]]:
        """(entity, id text) of every record of an operation of several."""
        return [self.decider, *((step.entity, id_to_text(step.id)) for step in self.request.steps)]

    def left(self) -> float:
        """Seconds until the deadline; never less than a hundredth."""
        return max(0.01, self.ends - boot_clock())

    def say(self, text: str, *, warn: bool = False) -> None:
        """Log it, with what the operation is called."""
        logger = observe.log()
        (logger.warning if warn else logger.info)(text, context=self.context)


@dataclass
class Background:
    """What writes of ``mode="async"`` still do behind their answers.

    Attributes:
        most: so many at once; the debts of others are left to the reconciler.
    """

    most: int
    running: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def has_room(self) -> bool:
        """Whether one more may be started."""
        return len(self.running) < self.most

    def start(self, work: Callable[[], Awaitable[object]]) -> None:
        """Do it once the answer has left; if it fails, the debt stands."""
        task = asyncio.create_task(_behind_the_answer(work))
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def close(self) -> None:
        """Wait at most a second for what is under way."""
        if self.running:
            await asyncio.wait(self.running, timeout=1.0)
        cancelled = set(self.running)
        for task in cancelled:
            task.cancel()
        if cancelled:
            await asyncio.wait(cancelled)


async def _behind_the_answer(work: Callable[[], Awaitable[object]]) -> None:
    await asyncio.sleep(_ANSWER_FIRST)
    with contextlib.suppress(errors.CrossfadeError):
        await work()


class NotAdmitted(Exception):
    """PostgreSQL is at another epoch than the write was admitted under; nothing was written."""


def written_since(entity: Entity, o: Operation) -> errors.OutcomeUnknown:
    """What is told of a write that was not answered, when what stands there does not tell either."""
    return errors.OutcomeUnknown(
        f"[{o.context}] the write was not answered, and this record of {entity.name}, or a value of it, was written "
        "by others since"
    )


def confirmed_or_not(entity: Entity, o: Operation) -> errors.OutcomeUnknown:
    """What is told of a ``ROLLBACK_BOTH`` write whose confirmation was not answered, and that others wrote upon."""
    return errors.OutcomeUnknown(
        f"[{o.context}] whether the write was confirmed was not answered, and this record of {entity.name} was "
        "written again since"
    )


def assert_writable(entity: Entity, *ways: Iterable[str]) -> None:
    """That these are fields that an update can name, each written in one of these ways.

    Raises:
        crossfade.errors.ConfigurationError: one is not.
    """
    seen: set[str] = set()
    for names in map(set, ways):
        for name in names:
            if not name or "." in name or name.startswith("$") or "\0" in name or name in ("_id", CF):
                raise errors.ConfigurationError(f"field {name!r} cannot be set by an update of {entity.name}")
            if name in seen:
                raise errors.ConfigurationError(
                    f"field {name!r} of {entity.name} is written in two ways at once"
                )
        seen |= names


def assert_id(entity: Entity, id_: Any) -> None:
    """That both stores can hold a record under this id.

    Raises:
        crossfade.errors.ConfigurationError: one of them cannot.
    """
    try:
        if can_be_id(id_):
            id_to_text(id_)
            return
        why = "an array, a regular expression, a reference (DBRef) or a condition cannot be an _id"
    except Unmappable as cause:
        why = str(cause)
    raise errors.ConfigurationError(f"no record of {entity.name} can be written with this _id: {why}")


def is_same_id(one: Any, other: Any) -> bool:
    """Whether MongoDB takes them for one id: a number is, in whatever type."""
    with contextlib.suppress(Unmappable):
        return not set(id_texts(one)).isdisjoint(id_texts(other))
    return False  # it can be nobody's: `assert_id`


def as_stored(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document as a store gives it back (dates in milliseconds, UTC; integers by size).

    Raises:
        crossfade.errors.ConfigurationError: a value that BSON has no type for, or ``_cf``.
    """
    if CF in document:
        raise errors.ConfigurationError(f"the field {CF!r} belongs to Crossfade")
    try:
        return bson.decode(bson.encode(dict(document)), CODEC_OPTIONS)
    except (bson.errors.BSONError, OverflowError, TypeError, ValueError) as cause:
        raise errors.ConfigurationError(f"this document cannot be stored: {cause}") from cause
