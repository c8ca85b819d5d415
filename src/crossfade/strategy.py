"""Failure strategies: what becomes of a write when one of the two stores fails (pure).

The table is protocol.md's; which strategies a phase allows is stated here, because two writers that let
different stores decide would number revisions twice.
"""

from __future__ import annotations

from enum import StrEnum

from crossfade.errors import NotAllowedInPhase
from crossfade.phase import Phase


class FailureStrategy(StrEnum):
    """What the caller is told, and what both stores end up holding, when one store fails.

    Attributes:
        PRIORITIZE_MONGO: MongoDB decides; PostgreSQL catches up. Default while MongoDB is primary.
        ROLLBACK_BOTH: both or neither; the caller is told success only when both hold the write.
        PRIORITIZE_POSTGRES: PostgreSQL decides; MongoDB catches up. Default once PostgreSQL is primary.
    """

    PRIORITIZE_MONGO = "prioritize_mongo"
    ROLLBACK_BOTH = "rollback_both"
    PRIORITIZE_POSTGRES = "prioritize_postgres"


_ALLOWED: dict[Phase, tuple[FailureStrategy, ...]] = {
    # The first of each row is the default.
    Phase.MONGO_ONLY: (FailureStrategy.PRIORITIZE_MONGO,),
    Phase.DUAL_WRITE: (FailureStrategy.PRIORITIZE_MONGO, FailureStrategy.ROLLBACK_BOTH),
    Phase.SHADOW_READ: (FailureStrategy.PRIORITIZE_MONGO, FailureStrategy.ROLLBACK_BOTH),
    Phase.POSTGRES_READ: (FailureStrategy.PRIORITIZE_MONGO, FailureStrategy.ROLLBACK_BOTH),
    Phase.POSTGRES_PRIMARY: (FailureStrategy.PRIORITIZE_POSTGRES, FailureStrategy.ROLLBACK_BOTH),
    Phase.POSTGRES_ONLY: (FailureStrategy.PRIORITIZE_POSTGRES,),
}


def default_strategy(phase: Phase, chosen: str | None = None) -> FailureStrategy:
    """The strategy of a write that asks for none: the one ``chosen`` for the migration, where the phase allows it."""
    allowed = _ALLOWED[phase]
    return next((strategy for strategy in allowed if strategy.value == chosen), allowed[0])


def check_strategy(strategy: FailureStrategy, phase: Phase, *, asynchronous: bool = False) -> None:
    """Refuse a strategy that this phase does not allow.

    Raises:
        NotAllowedInPhase: names the phase and the phases that would allow it; also for ``mode="async"``
            with ``ROLLBACK_BOTH``: nobody waits for the outcome that the strategy promises.
    """
    if strategy not in _ALLOWED[phase]:
        phases = ", ".join(p.value for p in Phase if strategy in _ALLOWED[p])
        raise NotAllowedInPhase(
            f"strategy {strategy.name} is not allowed in phase {phase.value}; it is in: {phases} "
            f"(move there with `crossfade phase set`)"
        )
    if asynchronous and strategy is FailureStrategy.ROLLBACK_BOTH:
        raise NotAllowedInPhase('mode="async" cannot be combined with ROLLBACK_BOTH: use mode="sync"')
