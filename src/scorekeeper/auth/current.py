"""Who is asking: from the bearer token to one normalised user, on every request.

The token says only which user; existence and role come from the stores, through the cache. What this service
changes takes effect on the very next request of every worker (`UserCache`); what another application writes
to MongoDB, after the cache's life and, where PostgreSQL serves reads, Crossfade's sweep period.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request

from crossfade import EntityHandle, Record
from scorekeeper.auth.tokens import InvalidToken, Tokens
from scorekeeper.cache import Loaded, UserCache
from scorekeeper.errors import forbidden, unauthorized
from scorekeeper.wire import document_id, plain


@dataclass(frozen=True, slots=True)
class CurrentUser:
    """The user of this request, whichever store served it.

    Attributes:
        id: id as text on the wire.
        username: today's, not the token's.
        role: "user", "admin" or "guest"; a document without one means "user".
    """

    id: str
    username: str
    role: str


class Authenticator:
    """Reads tokens and finds their users."""

    def __init__(self, users: EntityHandle, tokens: Tokens, cache: UserCache) -> None:
        self._users = users
        self._tokens = tokens
        self._cache = cache

    async def user_of(self, authorization: str | None) -> CurrentUser:
        """The user of an ``Authorization`` header.

        Raises:
            Problem: 401, there is no token that counts, or its user is gone.
            crossfade.StoreUnavailable: neither cache nor stores can say.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise unauthorized()
        try:
            claims = self._tokens.read(token.strip())
        except InvalidToken:
            raise unauthorized("Invalid or expired token") from None
        user_id = document_id(claims.user_id)

        async def load() -> Loaded:
            record = await self._users.get(user_id, parts=False)
            if record is None:
                return Loaded(None)
            return Loaded(normalised(record), cacheable=not record.stale)

        found = await self._cache.get(claims.user_id, load)
        if found is None:
            raise unauthorized("Invalid or expired token")
        return CurrentUser(**found)


def normalised(record: Record) -> dict[str, Any]:
    """One shape for a user, whether it is as old as the first documents or came from PostgreSQL."""
    role = record.get("role")
    return {
        "id": str(plain(record.id)),
        "username": str(record.get("username", "")),
        "role": role if role in ("user", "admin", "guest") else "user",
    }


async def _current_user(request: Request) -> CurrentUser:
    authenticator: Authenticator = request.app.state.authenticator
    return await authenticator.user_of(request.headers.get("authorization"))


#: A route's parameter of this type makes it one for signed-in users.
SignedIn = Annotated[CurrentUser, Depends(_current_user)]


def _administrator(current: SignedIn) -> CurrentUser:
    if current.role != "admin":
        raise forbidden("Only an administrator may do this")
    return current


#: The same for administrators.
Administrator = Annotated[CurrentUser, Depends(_administrator)]
