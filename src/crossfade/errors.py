"""The errors an application sees: one small tree, each saying what is now true in both stores.

Drivers' exceptions are translated in ``crossfade.stores`` and nowhere else, so nothing above the stores
catches a PyMongo or psycopg exception.
"""

from __future__ import annotations


class CrossfadeError(Exception):
    """The root of everything Crossfade raises on purpose."""


class ConfigurationError(CrossfadeError):
    """A setting, an entity or a command asks for something impossible; nothing was done."""


class SchemaNotReady(CrossfadeError):
    """A store lacks the tables, indexes or control record that Crossfade needs; nothing was done."""


class DuplicateKey(CrossfadeError):
    """Another record already holds this value of a unique rule; neither store was changed.

    Attributes:
        entity: the entity's name.
        rule: the unique rule's name, as declared in the entity ("_id" for the id itself).
    """

    def __init__(self, entity: str, rule: str) -> None:
        super().__init__(f"another record of {entity} already holds this value of the rule {rule!r}")
        self.entity = entity
        self.rule = rule


class NotFound(CrossfadeError):
    """The primary has no such record (any more); neither store was changed."""


class ConditionNotMet(CrossfadeError):
    """The record does not have the values that the write was to be made upon; neither store was changed."""


class StaleRevision(CrossfadeError):
    """The record changed since the revision that the caller named; neither store was changed."""


class StoreUnavailable(CrossfadeError):
    """The store that must answer did not, within the deadline; for a write: nothing was changed.

    Attributes:
        store: "mongo" or "postgres".
    """

    def __init__(self, store: str, message: str) -> None:
        super().__init__(message)
        self.store = store


class OutcomeUnknown(CrossfadeError):
    """The primary may or may not hold the write, and could not be asked within the deadline.

    The reconciler makes both stores equal, whichever it was. Repeating the operation is the caller's choice.
    """


class Undone(CrossfadeError):
    """``ROLLBACK_BOTH``: one store failed, and the other one's write was taken back.

    Neither store holds the change (the record's revision has gone up). ``__cause__`` is the failure.
    """


class UndoPending(CrossfadeError):
    """``ROLLBACK_BOTH``: one store failed and the undo could not be finished within the deadline.

    The undo is recorded in the primary and the reconciler carries it out; until then the record takes no
    other write.
    """


class Busy(CrossfadeError):
    """Another write held the record, or a switch held all writes, past the deadline; nothing was changed."""


class NotAllowedInPhase(CrossfadeError):
    """The phase of the migration does not allow this; the message names the step that would."""


class Quarantined(CrossfadeError):
    """The document cannot be carried to PostgreSQL unchanged; nothing was changed. Says which value and why."""


class PartLeftOut(CrossfadeError, LookupError):
    """This record was read, or written, without that part of it: whether it has one is not known here."""
