"""The phases of a migration, as a table (pure).

phases.md is the source. A migration is in one phase; every change is a new epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from crossfade.errors import ConfigurationError, NotAllowedInPhase


class Phase(StrEnum):
    """Where a migration stands; ``number`` orders them."""

    MONGO_ONLY = "mongo_only"
    DUAL_WRITE = "dual_write"
    SHADOW_READ = "shadow_read"
    POSTGRES_READ = "postgres_read"
    POSTGRES_PRIMARY = "postgres_primary"
    POSTGRES_ONLY = "postgres_only"

    @property
    def number(self) -> int:
        """0 for ``mongo_only`` to 5 for ``postgres_only``."""
        return list(Phase).index(self)

    @property
    def rules(self) -> PhaseRules:
        """What this phase means for writes and reads."""
        return _RULES[self]

    @classmethod
    def parse(cls, text: str) -> Phase:
        """A phase by its name or its number.

        Raises:
            ConfigurationError: unknown; the message lists what there is.
        """
        for phase in cls:
            if text in (phase.value, str(phase.number)):
                return phase
        known = ", ".join(f"{p.number} {p.value}" for p in cls)
        raise ConfigurationError(f"unknown phase {text!r}; the phases are: {known}")


@dataclass(frozen=True, slots=True)
class PhaseRules:
    """One line of the table.

    Attributes:
        primary: "mongo" or "postgres": the store whose answer decides.
        dual: whether the other store receives images.
        read: "mongo", "shadow" (MongoDB, compared with PostgreSQL) or "postgres" (falls back).
    """

    primary: str
    dual: bool
    read: str

    @property
    def secondary(self) -> str:
        """The store that receives images."""
        return "postgres" if self.primary == "mongo" else "mongo"


_RULES: dict[Phase, PhaseRules] = {
    Phase.MONGO_ONLY: PhaseRules("mongo", dual=False, read="mongo"),
    Phase.DUAL_WRITE: PhaseRules("mongo", dual=True, read="mongo"),
    Phase.SHADOW_READ: PhaseRules("mongo", dual=True, read="shadow"),
    Phase.POSTGRES_READ: PhaseRules("mongo", dual=True, read="postgres"),
    Phase.POSTGRES_PRIMARY: PhaseRules("postgres", dual=True, read="postgres"),
    Phase.POSTGRES_ONLY: PhaseRules("postgres", dual=False, read="postgres"),
}


def check_transition(here: Phase, there: Phase, *, feeding: bool = False) -> None:
    """Refuse a step that skips a phase.

    Forward goes one phase at a time, because each phase's guard rests on the one before. Back goes to any
    earlier phase of the same primary, and across the switch only between its two neighbours (3 and 4). From phase 5
    the way back is open while MongoDB is still fed (``feeding``).

    Raises:
        NotAllowedInPhase: names the next step that is allowed.
    """
    if there.number == here.number + 1:
        return
    if here is Phase.POSTGRES_ONLY and not feeding:
        # Since then writes leave no note for MongoDB.
        raise NotAllowedInPhase(
            "phase postgres_only is the last step: MongoDB is no longer fed, and lacks what was written since"
        )
    same_primary = there.rules.primary == here.rules.primary
    if there.number < here.number and same_primary:
        return
    if (here, there) == (Phase.POSTGRES_PRIMARY, Phase.POSTGRES_READ):
        return
    if here is there:
        raise NotAllowedInPhase(f"the migration is in phase {here.value} already")
    step = list(Phase)[here.number + (1 if there.number > here.number else -1)]
    raise NotAllowedInPhase(
        f"phase {here.value} cannot go to {there.value} in one step; set {step.value} first"
    )
