"""Private servers for the demo and the tests: MongoDB-compatible, PostgreSQL and Redis, without Docker.

    with EmbeddedServers() as servers:
        servers.mongo_uri, servers.database_url, servers.redis_url

The user's own servers come first: a store named by MONGO_URI, DATABASE_URL or REDIS_URL is not started, and
`mongod` on PATH is preferred to the bundle. The first start on a machine sets up the bundle in the user's
cache (a few minutes); later starts take seconds. No server outlives its owner, however the owner ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crossfade.embedded.errors import EmbeddedError

if TYPE_CHECKING:
    from crossfade.embedded.servers import EmbeddedServers, Server

__all__ = ["EmbeddedError", "EmbeddedServers", "Server"]


def __getattr__(name: str) -> object:
    # Imported on first use: it needs crossfade[embedded], and half a second.
    if name in ("EmbeddedServers", "Server"):
        from crossfade.embedded import servers

        return getattr(servers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
