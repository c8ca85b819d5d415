"""The error of the embedded servers, and the kind of it that they mend themselves."""

from __future__ import annotations

from crossfade.errors import CrossfadeError


class EmbeddedError(CrossfadeError):
    """An embedded server cannot be set up, started or controlled.

    The message is one line: the thing, the cause, and the next step.
    """


class PortInUse(EmbeddedError):
    """Another program listens on the port that a server was to have."""


#: The ways around the MongoDB-compatible server, for messages.
OWN_MONGO = "Or use a MongoDB of your own: set MONGO_URI, or run `docker compose up -d` (compose.yaml)."
