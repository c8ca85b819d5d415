"""Move a running application from MongoDB to PostgreSQL, and back.

The public surface is what this module exports; everything else may be imported, and is not promised.
"""

from crossfade.board import Options
from crossfade.entity import (
    DocumentId,
    Entity,
    column,
    list_child,
    normalised,
    record_columns,
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
    Quarantined,
    SchemaNotReady,
    StaleRevision,
    StoreUnavailable,
    Undone,
    UndoPending,
)
from crossfade.migration import Crossfade, EntityHandle, Migration, Operation
from crossfade.phase import Phase
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
    "Phase",
    "Quarantined",
    "Record",
    "SchemaNotReady",
    "StaleRevision",
    "StoreUnavailable",
    "UndoPending",
    "Undone",
    "column",
    "list_child",
    "normalised",
    "record_columns",
    "single_child",
]
