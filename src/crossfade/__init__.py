"""Move a running application from MongoDB to PostgreSQL, and back.

The public surface is what this module exports; everything else may be imported, and is not promised.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossfade.board import Options
    from crossfade.entity import (
        DocumentId,
        Entity,
        column,
        ids_at,
        list_child,
        normalised,
        part_columns,
        record_columns,
        reference,
        single_child,
    )
    from crossfade.errors import (
        Busy,
        ConditionNotMet,
        ConfigurationError,
        CrossfadeError,
        DuplicateKey,
        NotAllowedInPhase,
        NotFound,
        OutcomeUnknown,
        PartLeftOut,
        Quarantined,
        SchemaNotReady,
        StaleRevision,
        StoreUnavailable,
        Undone,
        UndoPending,
    )
    from crossfade.migration import Crossfade, EntityHandle, Migration, Operation
    from crossfade.phase import Phase
    from crossfade.query import any_of, contains, is_set
    from crossfade.record import Record
    from crossfade.strategy import FailureStrategy

__all__ = [
    "Busy",
    "ConditionNotMet",
    "ConfigurationError",
    "Crossfade",
    "CrossfadeError",
    "DocumentId",
    "DuplicateKey",
    "Entity",
    "EntityHandle",
    "FailureStrategy",
    "Migration",
    "NotAllowedInPhase",
    "NotFound",
    "Operation",
    "Options",
    "OutcomeUnknown",
    "PartLeftOut",
    "Phase",
    "Quarantined",
    "Record",
    "SchemaNotReady",
    "StaleRevision",
    "StoreUnavailable",
    "UndoPending",
    "Undone",
    "any_of",
    "column",
    "contains",
    "ids_at",
    "is_set",
    "list_child",
    "normalised",
    "part_columns",
    "record_columns",
    "reference",
    "single_child",
]

#: Where each name is. Loaded when it is first asked for: the commands and processes that only look after embedded
#: servers need no driver, and start in half the time.
_HOMES = {
    "crossfade.board": ("Options",),
    "crossfade.entity": (
        "DocumentId",
        "Entity",
        "column",
        "ids_at",
        "list_child",
        "normalised",
        "part_columns",
        "record_columns",
        "reference",
        "single_child",
    ),
    "crossfade.errors": (
        "Busy",
        "ConditionNotMet",
        "ConfigurationError",
        "CrossfadeError",
        "DuplicateKey",
        "NotAllowedInPhase",
        "NotFound",
        "OutcomeUnknown",
        "PartLeftOut",
        "Quarantined",
        "SchemaNotReady",
        "StaleRevision",
        "StoreUnavailable",
        "UndoPending",
        "Undone",
    ),
    "crossfade.migration": ("Crossfade", "EntityHandle", "Migration", "Operation"),
    "crossfade.phase": ("Phase",),
    "crossfade.query": ("any_of", "contains", "is_set"),
    "crossfade.record": ("Record",),
    "crossfade.strategy": ("FailureStrategy",),
}


def __getattr__(name: str) -> Any:
    """A public name, from the module that it lives in."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
