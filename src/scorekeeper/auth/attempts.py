"""Failed log-ins, and when there have been too many: guessing is slowed down, nobody is locked out by somebody else.

Only failures count, each of them three times:

- by account and address: the usual limit, and the one a person who has forgotten a password meets;
- by address: who tries many accounts from one place;
- by account: who tries one account from many places.

Counters of an account alone, or of an address alone, could be filled by anybody to keep others out. So neither refuses
an address from which the account has been logged into lately (within `REMEMBERED`). And when an account has too many
failures, a place that is new to it is not refused either, but gets `FEW` instead of the usual attempts: whoever knows
the password is in at the first of them. What an attacker can do to somebody else is to share an address with them: then
those two cannot be told apart.

A name that nobody has is treated like any other, so a limit tells nobody who exists. Attempts that are verified at the
same moment may exceed a limit by as many as a worker serves at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from scorekeeper import names
from scorekeeper.errors import too_many
from scorekeeper.limits import RateLimitItem, RateLimits, account_key, network_of, parse

#: How long an address is known to an account after a log-in.
REMEMBERED: Final = parse("1 per 30 days")

#: Attempts of an address that is new to an account under attack.
FEW: Final = parse("1 per 5 minutes")


@dataclass(frozen=True, slots=True)
class AttemptRules:
    """How many failures are too many.

    Attributes:
        account_and_address, address, account: see the module.
        registrations: new accounts by address, whatever becomes of them.
    """

    account_and_address: RateLimitItem
    address: RateLimitItem
    account: RateLimitItem
    registrations: RateLimitItem


class LoginAttempts:
    """Counts failures, and refuses who has had too many."""

    def __init__(self, limits: RateLimits, rules: AttemptRules) -> None:
        self._limits = limits
        self._rules = rules

    async def check(self, username: str, address: str | None) -> None:
        """Before the password is looked at.

        Raises:
            Problem: 429 with the seconds to wait.
        """
        account, place = _keys(username, address)
        wait = await self._limits.wait(self._rules.account_and_address, "pair", account, place)
        if not wait and not await self._is_known(account, place):
            wait = await self._limits.wait(self._rules.address, "address", place)
            if not wait and await self._limits.wait(self._rules.account, "account", account):
                wait = await self._limits.wait(FEW, "few", account, place)
        if wait:
            raise too_many(wait)

    async def failed(self, username: str, address: str | None) -> None:
        """A name or a password was wrong."""
        account, place = _keys(username, address)
        await self._limits.count(self._rules.account_and_address, "pair", account, place)
        await self._limits.count(self._rules.address, "address", place)
        await self._limits.count(self._rules.account, "account", account)
        await self._limits.count(FEW, "few", account, place)

    async def succeeded(self, username: str, address: str | None) -> None:
        """The password was right: this place is known to the account from now on."""
        account, place = _keys(username, address)
        await self._limits.forget(self._rules.account_and_address, "pair", account, place)
        await self._limits.forget(REMEMBERED, "known", account, place)
        await self._limits.count(REMEMBERED, "known", account, place)

    async def register(self, address: str | None) -> None:
        """One more account is asked for.

        Raises:
            Problem: 429 with the seconds to wait.
        """
        rule, place = self._rules.registrations, network_of(address)
        if not await self._limits.count(rule, "register", place):
            raise too_many(await self._limits.wait(rule, "register", place))

    async def _is_known(self, account: str, place: str) -> bool:
        return bool(await self._limits.wait(REMEMBERED, "known", account, place))


def _keys(username: str, address: str | None) -> tuple[str, str]:
    return account_key(names.normal_form(username)), network_of(address)
