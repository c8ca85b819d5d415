"""Clients of the service while the data moves. What was acknowledged to them is kept, to be looked for afterwards.

A closed loop: a fixed number of clients, each with one request at a time and a fixed pace, so that every stage is
asked for the same load. What an answer says is checked, not its status alone.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import httpx

from scorekeeper.legacy import Login

#: Kind of request -> the status that the contract has for it. Refusals are asked for on purpose.
EXPECTED: Mapping[str, int] = MappingProxyType(
    {
        "register": 201,
        "register, name taken": 400,
        "read back elsewhere": 200,
        "log in": 200,
        "log in, old account": 200,
        "log in, wrong password": 401,
        "/me": 200,
        "/profile": 200,
        "look up": 200,
        "look up, nobody": 404,
        "role": 200,
    }
)

#: What the clients do, in parts of the whole.
_MIX = {
    "register": 10,
    "register, name taken": 4,
    "log in": 8,
    "log in, wrong password": 3,
    "/me": 30,
    "/profile": 15,
    "look up": 20,
    "look up, nobody": 4,
    "role": 6,
}
#: A bound on the whole, whatever the clock says.
_MOST_REQUESTS = 40_000
#: Seconds until a client gives up; the service's own deadlines are far below.
_PATIENCE = 20.0


@dataclass
class Account:
    """A user whom the clients know: what was told to them.

    ``old``: from the legacy database, with its password's hash of cost 12.
    """

    id: str
    name: str
    password: str
    token: str
    old: bool = False


@dataclass
class RoleChange:
    """A role that the old application gave a user whose token the clients hold.

    Attributes:
        role: the new one.
        at: when it was acknowledged, by `time.monotonic`.
        stage: in which stage.
        seen: seconds until the service said so; None: not yet.
    """

    role: str
    at: float
    stage: str
    seen: float | None = None


@dataclass
class Traffic:
    """The clients.

    Attributes:
        addresses: of the workers.
        known: names of legacy users that nobody changes, with their ids.
        logins: legacy users who log in through the service.
        rate: requests per second, of all clients together.
        old_logins: seconds between two log-ins with an old password: bcrypt at cost 12 is 0.25 s of a core.
        stage: what is going on; latencies are kept by stage and kind, in seconds.
        failures: what the contract does not allow, by kind and what it was.
        unavailable: answers 503, which are among the failures: MongoDB answers all the time.
        accounts: acknowledged registrations.
        roles: by user id, the roles that the old application gave, in order.
    """

    addresses: list[str]
    known: Sequence[tuple[str, str]]
    logins: Sequence[Login]
    rate: float = 30.0
    clients: int = 8
    old_logins: float = 2.0
    seed: int = 1
    stage: str = "starting"
    requests: Counter[str] = field(default_factory=Counter)
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    unavailable: int = 0
    latencies: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    accounts: list[Account] = field(default_factory=list)
    old_accounts: list[Account] = field(default_factory=list)
    roles: dict[str, list[RoleChange]] = field(default_factory=dict)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _number: int = 0

    @property
    def total(self) -> int:
        """Requests that were answered, or given up."""
        return self.requests.total()

    @property
    def failed(self) -> int:
        """Requests that failed as the contract does not allow."""
        return self.failures.total()

    async def sign_in_old_accounts(self, number: int) -> None:
        """Log in some legacy users, for the pool of tokens."""
        async with self._client() as http:
            for login in self.logins[:number]:
                answer = await self._log_in(http, self.addresses[0], login.username, login.password, old=True)
                if answer is not None:
                    user = answer["user"]
                    account = Account(user["id"], user["username"], login.password, answer["token"], old=True)
                    self.old_accounts.append(account)

    async def run(self) -> None:
        """Until `stop`, or until the bound on all requests is reached."""
        async with self._client() as http, asyncio.TaskGroup() as group:
            for number in range(self.clients):
                group.create_task(self._be_a_client(http, number))
            group.create_task(self._be_old_users(http))

    def stop(self) -> None:
        """Let every client finish its request, and no more."""
        self._stopping.set()

    def _client(self) -> httpx.AsyncClient:
        # Idle connections are given up before the server does: else it may close one while a request is on it.
        limits = httpx.Limits(max_connections=self.clients * 2, keepalive_expiry=3.0)
        return httpx.AsyncClient(timeout=_PATIENCE, limits=limits, trust_env=False)

    async def _be_a_client(self, http: httpx.AsyncClient, number: int) -> None:
        chance = random.Random(self.seed * 1000 + number)
        pace = self.clients / self.rate
        kinds, weights = list(_MIX), list(_MIX.values())
        upcoming = time.monotonic() + pace * number / self.clients
        while not self._stopping.is_set() and self.total < _MOST_REQUESTS:
            await asyncio.sleep(max(upcoming - time.monotonic(), 0.0))
            # A client that fell behind does not catch up: that would be another load.
            upcoming = max(upcoming, time.monotonic() - pace) + pace * (0.8 + 0.4 * chance.random())
            kind = "register" if len(self.accounts) < 5 else chance.choices(kinds, weights)[0]
            await self._ask(http, kind, chance)

    async def _be_old_users(self, http: httpx.AsyncClient) -> None:
        chance = random.Random(self.seed)
        while not self._stopping.is_set():
            began = time.monotonic()
            if self.stage != "starting" and self.logins:
                login = chance.choice(self.logins)
                address = chance.choice(self.addresses)
                await self._log_in(http, address, login.username, login.password, old=True)
            pause = self.old_logins - (time.monotonic() - began)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), max(pause, 0.0))

    async def _ask(self, http: httpx.AsyncClient, kind: str, chance: random.Random) -> None:
        address = chance.choice(self.addresses)
        if kind == "register":
            await self._register(http, address, chance)
        elif kind == "register, name taken":
            taken = chance.choice(self.accounts).name.upper()
            await self._send(
                http, kind, "POST", address, "/register", {"username": taken, "password": "secret-x"}
            )
        elif kind == "log in":
            account = chance.choice(self.accounts)
            answer = await self._log_in(http, address, account.name.upper(), account.password, old=False)
            if answer is not None and self._is(answer["user"]["id"] == account.id, kind, "somebody else"):
                account.token = answer["token"]
        elif kind == "log in, wrong password":
            wrong = {"username": chance.choice(self.accounts).name, "password": "not-the-one"}
            await self._send(http, kind, "POST", address, "/login", wrong)
        elif kind in ("/me", "/profile"):
            account = chance.choice(self._signed_in(chance))
            answer = await self._send(http, kind, "GET", address, kind, token=account.token)
            if answer is not None:
                self._is(answer["user"]["id"] == account.id, kind, "somebody else")
        elif kind == "look up":
            name, id_ = chance.choice(self.known) if self.known else self._any(chance)
            answer = await self._send(http, kind, "GET", address, f"/lookup/{name}")
            if answer is not None:
                self._is(answer["user"]["id"] == id_, kind, "somebody else")
        elif kind == "look up, nobody":
            await self._send(http, kind, "GET", address, f"/lookup/nobody{chance.randrange(10**9)}")
        elif kind == "role":
            await self._read_role(http, address, chance)

    def _signed_in(self, chance: random.Random) -> list[Account]:
        return self.old_accounts if self.old_accounts and chance.random() < 0.3 else self.accounts

    def _any(self, chance: random.Random) -> tuple[str, str]:
        account = chance.choice(self.accounts)
        return account.name, account.id

    async def _register(self, http: httpx.AsyncClient, address: str, chance: random.Random) -> None:
        self._number += 1
        name, password = f"New{self._number:06}", f"secret-{chance.randrange(10**9)}"
        answer = await self._send(
            http, "register", "POST", address, "/register", {"username": name, "password": password}
        )
        if answer is None:
            return
        user = answer["user"]
        account = Account(user["id"], user["username"], password, answer["token"])
        self.accounts.append(account)
        self._is(account.name == name, "register", "another name")
        # What was acknowledged is seen by the very next read, on the other worker too.
        other = next((a for a in self.addresses if a != address), address)
        kind = "read back elsewhere"
        if chance.random() < 0.5:
            seen = await self._send(http, kind, "GET", other, f"/lookup/{name.lower()}")
        else:
            seen = await self._send(http, kind, "GET", other, "/me", token=account.token)
        if seen is not None:
            self._is(seen["user"]["id"] == account.id, kind, "somebody else")

    async def _read_role(self, http: httpx.AsyncClient, address: str, chance: random.Random) -> None:
        """`/me` of somebody whose role the old application may just have changed."""
        waiting = [a for a in self.old_accounts if any(c.seen is None for c in self.roles.get(a.id, [])[-1:])]
        accounts = waiting or self.old_accounts or self.accounts
        account = chance.choice(accounts)
        answer = await self._send(http, "role", "GET", address, "/me", token=account.token)
        if answer is None:
            return
        user = answer["user"]
        self._is(user["id"] == account.id, "role", "somebody else")
        for change in self.roles.get(account.id, [])[-1:]:
            if change.seen is None and user["role"] == change.role:
                change.seen = time.monotonic() - change.at

    async def _log_in(
        self, http: httpx.AsyncClient, address: str, name: str, password: str, *, old: bool
    ) -> dict[str, Any] | None:
        return await self._send(
            http, "log in, old account" if old else "log in", "POST", address, "/login",
            {"username": name, "password": password},
        )  # fmt: skip

    def _is(self, right: bool, kind: str, what: str) -> bool:
        if not right:
            self.failures[kind, what] += 1
        return right

    async def _send(
        self,
        http: httpx.AsyncClient,
        kind: str,
        method: str,
        address: str,
        path: str,
        body: dict[str, str] | None = None,
        token: str | None = None,
    ) -> dict[str, Any] | None:
        """The answer where it is the one that the contract has; a success's body, else None."""
        stage, began = self.stage, time.perf_counter()
        self.requests[kind] += 1
        try:
            answer = await http.request(
                method, f"{address}/api/users{path}", json=body,
                headers={"Authorization": f"Bearer {token}"} if token else {},
            )  # fmt: skip
        except httpx.HTTPError as error:
            self.failures[kind, f"{stage}: {type(error).__name__}"] += 1
            return None
        self.latencies[stage, kind].append(time.perf_counter() - began)
        if answer.status_code != EXPECTED[kind]:
            self.unavailable += answer.status_code == 503
            self.failures[kind, f"{stage}: {answer.status_code} {answer.text[:160]}"] += 1
            return None
        return dict(answer.json()) if answer.is_success else None
