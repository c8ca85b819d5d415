"""The old application: it goes on writing to MongoDB as it always did, with a plain driver, and knows of nothing.

Each of its writes is kept, to be looked for in both stores at the end; and how long each took to be in PostgreSQL
is measured, because that is how late a foreign password, name or role takes effect where PostgreSQL is read.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import psycopg
from bson import ObjectId
from pymongo.database import Database

from scorekeeper.demo.traffic import RoleChange
from scorekeeper.legacy import PASSWORDS, LegacyApplication

#: A document's field -> the column it is in.
COLUMNS = {"username": "username", "role": "role", "lastLogin": "last_login"}
#: A bound on the whole, whatever the clock says.
_MOST_WRITES = 5_000


@dataclass
class Write:
    """A write that was acknowledged and is waited for in PostgreSQL.

    Attributes:
        value: what the field holds since then.
        at: when it was acknowledged, by `time.monotonic`.
        stage: in which stage.
    """

    value: Any
    at: float
    stage: str


@dataclass
class OldApplication:
    """Writes at a bounded rate: registrations, renames, role changes, log-in stamps.

    Attributes:
        database: MongoDB, by a synchronous client.
        user_ids: users that nobody else writes to.
        signed_in: users whose tokens the clients hold; their roles change now and then.
        stage: what is going on.
        rate: writes per second.
        written: by user id, the fields that the latest acknowledged writes left.
        by_kind: acknowledged writes.
        lags: by stage, seconds from the acknowledgement until PostgreSQL had it, in steps of 0.1.
    """

    database: Database[Any]
    user_ids: Sequence[ObjectId]
    signed_in: Sequence[ObjectId]
    roles: dict[str, list[RoleChange]]
    stage: Callable[[], str]
    rate: float = 4.0
    seed: int = 1
    written: dict[ObjectId, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    by_kind: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    lags: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _waiting: dict[tuple[ObjectId, str], Write] = field(default_factory=dict)
    _stopping: bool = False

    @property
    def writes(self) -> int:
        """How many were acknowledged."""
        return sum(self.by_kind.values())

    async def run(self) -> None:
        """Write until `stop`, or until the bound is reached."""
        chance = random.Random(self.seed)
        stamps = [datetime.now(UTC)]
        application = LegacyApplication(self.database, now=lambda: stamps[0])
        pace = 1.0 / self.rate
        while not self._stopping and self.writes < _MOST_WRITES:
            await asyncio.sleep(pace * (0.5 + chance.random()))
            now = datetime.now(UTC)
            stamps[0] = now.replace(microsecond=now.microsecond // 1000 * 1000)
            user_id, fields = await asyncio.to_thread(self._write, application, chance, stamps[0])
            at, stage = time.monotonic(), self.stage()
            self.written[user_id] |= fields
            for name, value in fields.items():
                self._waiting[user_id, name] = Write(value, at, stage)
            if user_id in self.signed_in:
                self.roles.setdefault(str(user_id), []).append(RoleChange(fields["role"], at, stage))

    def stop(self) -> None:
        """Finish the write under way, and no more."""
        self._stopping = True

    def _write(
        self, application: LegacyApplication, chance: random.Random, now: datetime
    ) -> tuple[ObjectId, dict[str, Any]]:
        """One write; the user and the fields that it left."""
        draw = chance.random()
        user_id = chance.choice(self.user_ids)
        if draw < 0.2:
            name = f"Old{self.writes:06}"
            made = application.register(name, chance.choice(list(PASSWORDS.values())))
            self.by_kind["register"] += 1
            return made, {"username": name, "role": "user"}
        if draw < 0.45:
            name = f"Renamed{self.writes:06}"
            application.rename(user_id, name)
            self.by_kind["rename"] += 1
            return user_id, {"username": name}
        if draw < 0.7:
            application.touch_last_login(user_id)
            self.by_kind["stamp a log-in"] += 1
            return user_id, {"lastLogin": now}
        if self.signed_in and draw < 0.8:
            user_id = chance.choice(self.signed_in)
        before = self.written[user_id].get("role", "user")
        role = "admin" if before == "user" else "user"
        application.change_role(user_id, "admin" if role == "admin" else "user")
        self.by_kind["change a role"] += 1
        return user_id, {"role": role}

    # --- how late they are in PostgreSQL ---------------------------------------------------------------------

    async def watch(self, database_url: str) -> None:
        """Look in PostgreSQL for what was written, until cancelled."""
        connection: psycopg.AsyncConnection[Any] | None = None
        try:
            while True:
                await asyncio.sleep(0.1)
                try:
                    if connection is None or connection.closed:
                        connection = await psycopg.AsyncConnection.connect(
                            database_url, autocommit=True, connect_timeout=2
                        )
                    await self._look(connection)
                except psycopg.Error:
                    # Down, on purpose.
                    if connection is not None:
                        with suppress(psycopg.Error):
                            await connection.close()
                    connection = None
        finally:
            if connection is not None:
                await connection.close()

    async def _look(self, connection: psycopg.AsyncConnection[Any]) -> None:
        waiting = dict(self._waiting)
        if not waiting:
            return
        cursor = await connection.execute(
            "SELECT id, username, role, last_login FROM users WHERE id = ANY(%s)",
            [list({str(user_id) for user_id, _ in waiting})],
        )
        now = time.monotonic()
        rows = {row[0]: dict(zip(COLUMNS, row[1:], strict=True)) for row in await cursor.fetchall()}
        for key, write in waiting.items():
            user_id, name = key
            row = rows.get(str(user_id))
            if row is not None and row[name] == write.value and self._waiting.get(key) is write:
                self.lags[write.stage].append(now - write.at)
                del self._waiting[key]
