"""Accounts to try the service with, on servers of its own: ``make serve`` makes them, and says how to log in.

Their passwords stand here for anybody to read. So they are made only where the embedded servers hold the data.
"""

from __future__ import annotations

import sys
from typing import Final

from crossfade import Crossfade, DuplicateKey
from scorekeeper.auth.passwords import Passwords
from scorekeeper.identities.service import IdentityService
from scorekeeper.migration import accounts as account_entities
from scorekeeper.migration import name as migration_name
from scorekeeper.users.repository import UserRepository

#: Name, password, role.
ACCOUNTS: Final = (
    ("demo", "password123", "user"),
    ("friend", "password123", "user"),
    ("admin", "password123", "admin"),
)


async def make(cf: Crossfade, passwords: Passwords) -> None:
    """Make those that are not there; running again changes nothing.

    Args:
        cf: not opened yet.
        passwords: hashes them; opened.
    """
    accounts = cf.migration(migration_name, account_entities())
    async with cf:
        users, identities = UserRepository(accounts), IdentityService(accounts["identities"])
        for username, password, role in ACCOUNTS:
            if await users.find_by_case_insensitive_username(username) is not None:
                continue
            try:
                made = await users.create(
                    username, await passwords.hash(password), role=role, context="Demo Account"
                )
            except DuplicateKey:
                continue
            await identities.claim_or_create(made.id, username)


def say_how_to_log_in(base: str) -> None:
    """On standard error, for a person: the accounts, and the commands that use them."""
    rows = "\n".join(f"  {username:10} {password:14} {role}" for username, password, role in ACCOUNTS)
    body = f'{{"username":"{ACCOUNTS[0][0]}","password":"{ACCOUNTS[0][1]}"}}'
    sys.stderr.write(
        f"""
scorekeeper listens on {base}   (OpenAPI: {base}/docs, health: {base}/api/health)

  name       password       role
{rows}

Log in, then ask who you are (TOKEN is the answer's "token"):
  curl -X POST {base}/api/users/login -H "Content-Type: application/json" -d '{body}'
  curl {base}/api/users/profile -H "Authorization: Bearer TOKEN"

"""
    )
