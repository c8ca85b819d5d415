"""The stories of accounts: registering, logging in, being signed in."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import structlog

from crossfade import CrossfadeError, DuplicateKey, NotFound, Record, StaleRevision
from scorekeeper import names
from scorekeeper.audit.log import AuditLog
from scorekeeper.auth.attempts import LoginAttempts
from scorekeeper.auth.passwords import Passwords
from scorekeeper.auth.tokens import Tokens
from scorekeeper.cache import Kind, Loaded, UserCache
from scorekeeper.caller import caller
from scorekeeper.errors import Problem, invalid, name_taken, unauthorized
from scorekeeper.identities.service import IdentityService
from scorekeeper.metrics import AUTH, DEGRADED
from scorekeeper.users.repository import UserRepository
from scorekeeper.users.shown import user_of
from scorekeeper.wire import document_id, plain

log = structlog.get_logger("scorekeeper")

#: Shortest password of a new account, in UTF-16 units as JavaScript counts them.
SHORTEST_PASSWORD = 6


class UserService:
    """Accounts. Knows no HTTP and no store."""

    def __init__(
        self,
        users: UserRepository,
        identities: IdentityService,
        passwords: Passwords,
        tokens: Tokens,
        cache: UserCache,
        attempts: LoginAttempts,
        audit: AuditLog,
    ) -> None:
        self._attempts = attempts
        self._audit = audit
        self._users = users
        self._identities = identities
        self._passwords = passwords
        self._tokens = tokens
        self._cache = cache

    async def register(self, username: str, password: str) -> dict[str, Any]:
        """A new account, and a token for it.

        A guest of that name whose identity nobody has claimed becomes the account, with its games.

        Raises:
            Problem: 400, the name or the password cannot be, or the name is taken in any letter case; 429, too many
                new accounts from one address.
        """
        name = names.trimmed(username)
        if problem := names.fault_of_new(name):
            raise invalid(problem)
        if not names.is_unicode(password) or names.length(password) < SHORTEST_PASSWORD:
            raise invalid(f"The password must be at least {SHORTEST_PASSWORD} characters long")
        await self._attempts.register(caller.get().address)
        # Only to spare the hash: who gets the name is decided by the rule in the store.
        holder = await self._users.find_by_case_insensitive_username(name, picture=False)
        if holder is not None and not await self._is_unclaimed_guest(holder):
            AUTH.labels("register", "name_taken").inc()
            raise name_taken()
        hashed = await self._passwords.hash(password)
        try:
            if holder is None:
                record = await self._users.create(name, hashed)
            else:
                record = await self._take_over(holder, name, hashed)
        except (DuplicateKey, StaleRevision, NotFound):
            AUTH.labels("register", "name_taken").inc()
            raise name_taken() from None
        await self._identities.claim_or_create(record.id, name)
        AUTH.labels("register", "accepted").inc()
        await self._audit.note("account.registered", record.id, claimed=holder is not None)
        return {
            "message": "User registered successfully",
            "token": self._tokens.issue(str(plain(record.id)), name),
            "user": user_of(record),
        }

    async def _is_unclaimed_guest(self, holder: Record) -> bool:
        if holder.get("role") != "guest" or holder.get("passwordHash") is not None:
            return False
        return await self._identities.is_claimable(str(holder.get("username", "")), holder.id)

    async def _take_over(self, guest: Record, name: str, hashed: str) -> Record:
        """Make a guest a user; of two who try, the revision lets one."""
        try:
            claimed = await self._users.update(
                guest.id,
                {"username": name, "passwordHash": hashed, "role": "user"},
                if_revision=guest.rev,
                context="Guest Claim",
            )
        finally:
            await self._cache.forget(str(plain(guest.id)))
        record = await self._users.with_picture(claimed)
        if record is None:
            raise NotFound("the account was deleted in the moment in which it was claimed")
        return record

    async def log_in(self, username: str, password: str) -> dict[str, Any]:
        """A token for the account of this name and password.

        Raises:
            Problem: 401, the same answer after the same work whether the name or the password is wrong; 429, there
                were too many failures (`scorekeeper.auth.attempts`).
        """
        address = caller.get().address
        try:
            await self._attempts.check(username, address)
        except Problem:
            AUTH.labels("login", "limited").inc()
            await self._audit.note_refusal("login.limited")
            raise
        known = await self._users.find_by_case_insensitive_username(username, picture=False)
        held = None if known is None else known.get("passwordHash")
        right = names.is_unicode(password) and await self._passwords.verify(password, held)
        # The megabytes of a picture are for those who have shown who they are.
        record = await self._users.with_picture(known) if known is not None and right else None
        if record is None:
            AUTH.labels("login", "refused").inc()
            await self._attempts.failed(username, address)
            await self._audit.note_refusal("login.refused", None if known is None else known.id)
            raise unauthorized("Invalid username or password")
        await self._attempts.succeeded(username, address)
        await self._replace_outdated(record, password)
        await self._stamp_login(record)
        user = user_of(record)
        user["identities"] = await self._identities.of_user(record.id)
        if not user["identities"]:
            await self._identities.claim_or_create(record.id, str(user["username"]))
            await self._cache.forget(str(user["id"]))
            user["identities"] = await self._identities.of_user(record.id)
        AUTH.labels("login", "accepted").inc()
        await self._audit.note("login.accepted", record.id)
        return {
            "message": "Login successful",
            "token": self._tokens.issue(str(user["id"]), str(user["username"])),
            "user": user,
        }

    async def _replace_outdated(self, record: Record, password: str) -> None:
        """Hash a password, just found right, anew where its hash is of yesterday's kind."""
        if not self._passwords.is_outdated(record.get("passwordHash")):
            return
        try:
            hashed = await self._passwords.hash(password)
            await self._users.update(
                record.id, {"passwordHash": hashed}, if_revision=record.rev, context="Password Rehash"
            )
        except (CrossfadeError, Problem) as error:
            # The next log-in makes up for it; a password that was changed meanwhile stays as it is.
            DEGRADED.labels("rehash").inc()
            log.warning("password not hashed anew", cause=type(error).__name__)
        else:
            await self._audit.note("password.rehashed", record.id)

    async def _stamp_login(self, record: Record) -> None:
        try:
            await self._users.stamp_login(record.id)
        except CrossfadeError as error:
            # Nobody is kept out because the time of a log-in could not be noted.
            DEGRADED.labels("last_login").inc()
            log.warning("time of log-in not noted", cause=type(error).__name__)

    async def me(self, user_id: str) -> bytes | None:
        """What the user of this id is shown of themselves, identities included, as JSON; None if they are gone."""
        id_ = document_id(user_id)

        async def load() -> Loaded:
            record, identities = await asyncio.gather(
                self._users.find_by_id(id_), self._identities.of_user(id_)
            )
            if record is None:
                return Loaded(None)
            shown = {"user": {**user_of(record), "identities": identities}}
            return Loaded(orjson.dumps(shown), cacheable=not record.stale)

        return await self._cache.get(user_id, load, Kind.SELF)
