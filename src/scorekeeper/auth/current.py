"""Who is asking: from the bearer token to one normalised user, on every request.

The token says only which user; existence and role come from the stores, through the cache. What this service
changes takes effect on the very next request of every worker (`UserCache`); what another application writes
to MongoDB, after the cache's life and, where PostgreSQL serves reads, Crossfade's sweep period.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final

import orjson
from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from crossfade import EntityHandle, Record
from scorekeeper.audit.log import AuditLog
from scorekeeper.auth.tokens import Claims, InvalidToken, Tokens
from scorekeeper.cache import Loaded, UserCache
from scorekeeper.errors import Problem, forbidden, unauthorized
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

    def __init__(self, users: EntityHandle, tokens: Tokens, cache: UserCache, audit: AuditLog) -> None:
        self._audit = audit
        self._users = users
        self._tokens = tokens
        self._cache = cache

    async def user_of(self, authorization: str | None) -> CurrentUser:
        """The user of an ``Authorization`` header.

        Raises:
            Problem: 401, there is no token that counts, or its user is gone.
            crossfade.StoreUnavailable: neither cache nor stores can say.
        """
        claims = await self.claims_of(authorization)
        user_id = document_id(claims.user_id)

        async def load() -> Loaded:
            record = await self._users.get(user_id, parts=False)
            if record is None:
                return Loaded(None)
            return Loaded(orjson.dumps(normalised(record)), cacheable=not record.stale)

        found = await self._cache.get(claims.user_id, load)
        if found is None:
            raise await self.nobody()
        return CurrentUser(**orjson.loads(found))

    async def claims_of(self, authorization: str | None) -> Claims:
        """What the token of an ``Authorization`` header says. Whether its user exists is not asked.

        Raises:
            Problem: 401, there is no token that counts.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise unauthorized()
        try:
            return self._tokens.read(token.strip())
        except InvalidToken as refused:
            await self._audit.note_refusal("token.refused", why=refused.args[0])
            raise unauthorized("Invalid or expired token") from None

    async def nobody(self) -> Problem:
        """401: the token is good and its user is gone."""
        await self._audit.note_refusal("token.refused", why="no such user")
        return unauthorized("Invalid or expired token")


def normalised(record: Record) -> dict[str, Any]:
    """One shape for a user, whether it is as old as the first documents or came from PostgreSQL."""
    role = record.get("role")
    return {
        "id": str(plain(record.id)),
        "username": str(record.get("username", "")),
        "role": role if role in ("user", "admin", "guest") else "user",
    }


_BEARER: Final = {
    "auto_error": False,
    "bearerFormat": "JWT",
    "description": "From `/register` or `/login`.",
    "scheme_name": "HTTPBearer",
}

#: The description of a route that reads the token itself.
BEARER: Final = Depends(HTTPBearer(**_BEARER))  # type: ignore[arg-type]


class _SignedIn(HTTPBearer):
    """What a route wants, for the OpenAPI document, and who asks: in one dependency, since each takes its time."""

    async def __call__(self, request: Request) -> CurrentUser:  # type: ignore[override]
        """The user of a request, see `Authenticator.user_of`; the answer to one without a token is the service's."""
        authenticator: Authenticator = request.app.state.authenticator
        return await authenticator.user_of(request.headers.get("authorization"))


#: A route's parameter of this type makes it one for signed-in users.
SignedIn = Annotated[CurrentUser, Depends(_SignedIn(**_BEARER))]


async def _administrator(request: Request, current: SignedIn) -> CurrentUser:
    if current.role != "admin":
        audit: AuditLog = request.app.state.audit
        await audit.note_refusal("admin.refused", document_id(current.id))
        raise forbidden("Only an administrator may do this")
    return current


#: The same for administrators.
Administrator = Annotated[CurrentUser, Depends(_administrator)]
