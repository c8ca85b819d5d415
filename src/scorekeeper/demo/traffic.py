"""What goes on while the data moves: clients of the service, and an old application that writes to MongoDB.

Both keep their own list of what was acknowledged to them, so that the demo can look for it afterwards in both
stores without asking Crossfade.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
from bson import ObjectId
from pymongo.database import Database

from scorekeeper.legacy import LegacyApplication

#: Requests that a contract-abiding answer may refuse: status by kind of request.
EXPECTED = {
    "register": {201},
    "register taken name": {400},
    "login": {200},
    "wrong password": {401},
    "profile": {200},
    "look-up": {200},
}


@dataclass
class Account:
    """A user whom the clients know: what was told to them."""

    id: str
    name: str
    password: str
    token: str


@dataclass
class Traffic:
    """Clients in a closed loop, each waiting a little between two requests.

    Attributes:
        stage: where the migration stands; latencies are kept by stage and kind, in seconds.
        failures: what no contract allows, by kind and status.
        accounts: acknowledged registrations.
    """

    addresses: list[str]
    legacy_names: list[str]
    seed: int = 1
    clients: int = 6
    pause: float = 0.08
    stage: str = "mongo_only"
    requests: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    latencies: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    accounts: list[Account] = field(default_factory=list)
    _stopping: bool = False
    _number: int = 0

    async def run(self) -> None:
        """Until `stop`."""
        # Idle connections are given up before the server does: else it may close one while a request is on it.
        limits = httpx.Limits(max_connections=self.clients * 2, keepalive_expiry=3.0)
        async with httpx.AsyncClient(timeout=20.0, limits=limits) as http:
            await asyncio.gather(*(self._client(http, n) for n in range(self.clients)))

    def stop(self) -> None:
        """Let every client finish its request, and no more."""
        self._stopping = True

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        chance = random.Random(self.seed * 1000 + number)
        while not self._stopping:
            await asyncio.sleep(self.pause * (0.5 + chance.random()))
            address = chance.choice(self.addresses)
            draw = chance.random()
            if draw < 0.12 or len(self.accounts) < 3:
                await self._register(http, address, chance)
            elif draw < 0.16:
                await self._register_taken(http, address, chance)
            elif draw < 0.26:
                await self._log_in(http, address, chance)
            elif draw < 0.28:
                await self._wrong_password(http, address, chance)
            elif draw < 0.75:
                await self._profile(http, address, chance)
            else:
                await self._look_up(http, address, chance)

    async def _register(self, http: httpx.AsyncClient, address: str, chance: random.Random) -> None:
        self._number += 1
        name, password = f"player{self._number:06}", f"secret-{chance.randrange(10**9)}"
        answer = await self._send(http, "register", "POST", address, "/register", name, password)
        if answer is not None:
            user = answer["user"]
            self.accounts.append(Account(user["id"], user["username"], password, answer["token"]))

    async def _register_taken(self, http: httpx.AsyncClient, address: str, chance: random.Random) -> None:
        account = chance.choice(self.accounts)
        name = account.name.upper()
        await self._send(http, "register taken name", "POST", address, "/register", name, "secret-x")

    async def _log_in(self, http: httpx.AsyncClient, address: str, chance: random.Random) -> None:
        account = chance.choice(self.accounts)
        answer = await self._send(
            http, "login", "POST", address, "/login", account.name.upper(), account.password
        )
        if answer is not None:
            account.token = answer["token"]

    async def _wrong_password(self, http: httpx.AsyncClient, address: str, chance: random.Random) -> None:
        account = chance.choice(self.accounts)
        await self._send(http, "wrong password", "POST", address, "/login", account.name, "not-the-one")

    async def _profile(self, http: httpx.AsyncClient, address: str, chance: random.Random) -> None:
        account = chance.choice(self.accounts)
        answer = await self._send(http, "profile", "GET", address, "/me", token=account.token)
        if answer is not None and answer["user"]["id"] != account.id:
            self.failures["profile of somebody else"] += 1

    async def _look_up(self, http: httpx.AsyncClient, address: str, chance: random.Random) -> None:
        names = self.legacy_names if self.legacy_names and chance.random() < 0.7 else None
        name = chance.choice(names) if names else chance.choice(self.accounts).name
        await self._send(http, "look-up", "GET", address, f"/lookup/{name}")

    async def _send(
        self,
        http: httpx.AsyncClient,
        kind: str,
        method: str,
        address: str,
        path: str,
        name: str | None = None,
        password: str | None = None,
        token: str | None = None,
    ) -> dict[str, Any] | None:
        stage, began = self.stage, time.perf_counter()
        self.requests[kind] += 1
        try:
            answer = await http.request(
                method,
                f"{address}/api/users{path}",
                json=None if name is None else {"username": name, "password": password},
                headers={"Authorization": f"Bearer {token}"} if token else {},
            )
        except httpx.HTTPError as error:
            self.failures[f"{kind}: {type(error).__name__}"] += 1
            return None
        self.latencies[stage, kind].append(time.perf_counter() - began)
        if answer.status_code not in EXPECTED[kind]:
            self.failures[f"{kind}: {answer.status_code} {answer.text[:120]}"] += 1
            return None
        return answer.json() if answer.is_success else None


@dataclass
class OldApplication:
    """The old back end, still writing to MongoDB as it always did, knowing nothing of Crossfade.

    Attributes:
        written: by user id, the fields that its latest acknowledged writes left.
        writes: how many.
    """

    database: Database[Any]
    user_ids: list[ObjectId]
    seed: int = 1
    pause: float = 0.25
    written: dict[ObjectId, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    writes: int = 0
    _stopping: bool = False

    async def run(self) -> None:
        """Until `stop`."""
        chance = random.Random(self.seed)
        application = LegacyApplication(self.database)
        while not self._stopping:
            await asyncio.sleep(self.pause * (0.5 + chance.random()))
            await asyncio.to_thread(self._write, application, chance)

    def stop(self) -> None:
        """Finish the write under way, and no more."""
        self._stopping = True

    def _write(self, application: LegacyApplication, chance: random.Random) -> None:
        draw = chance.random()
        user_id = chance.choice(self.user_ids)
        if draw < 0.25:
            name = f"Old-{self.writes:05}"
            created = application.register(name, None)
            self.written[created]["username"] = name
        elif draw < 0.5:
            name = f"Renamed-{self.writes:05}"
            if application.rename(user_id, name):
                self.written[user_id]["username"] = name
        elif draw < 0.75:
            role: Literal["user", "admin"] = "user" if chance.random() < 0.5 else "admin"
            if application.change_role(user_id, role):
                self.written[user_id]["role"] = role
        else:
            application.touch_last_login(user_id)
        self.writes += 1
