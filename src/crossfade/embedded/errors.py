"""The one error of the embedded servers."""

from __future__ import annotations

from crossfade.errors import CrossfadeError


class EmbeddedError(CrossfadeError):
    """An embedded server cannot be set up, started or controlled.

    The message is one line: the thing, the cause, and the next step.
    """


#: The ways around the MongoDB-compatible server, for messages.
OWN_MONGO = "Or use a MongoDB of your own: set MONGO_URI, or run `docker compose up -d` (compose.yaml)."
