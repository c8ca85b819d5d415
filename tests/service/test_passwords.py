"""A refusal costs the same work, whyever; counted in rounds of bcrypt, not in seconds."""

from __future__ import annotations

import asyncio
import threading

import bcrypt
import pytest

from scorekeeper.auth import passwords as module
from scorekeeper.auth.passwords import Passwords, cost_of
from scorekeeper.errors import Problem

COST = 7


class Counting:
    """bcrypt that counts its rounds."""

    def __init__(self) -> None:
        self.rounds = 0
        self.threads: set[int] = set()

    def __call__(self, password: bytes, hashed: bytes) -> bool:
        cost = cost_of(hashed.decode())
        assert cost is not None
        self.rounds += 2**cost
        self.threads.add(threading.get_ident())
        return bcrypt.checkpw(password, hashed)


def hashed(password: bytes, cost: int = COST) -> str:
    return bcrypt.hashpw(password[:72], bcrypt.gensalt(cost)).decode()


@pytest.mark.parametrize(
    "held",
    [
        None,
        hashed(b"other"),
        hashed(b"other", 4),
        hashed(b"other", 6),
        "",
        "no hash",
        "$2b$31$" + "a" * 53,
        5,
        {},
    ],
    # Named, because salts are random and every worker must collect the same tests.
    ids=[
        "none",
        "own cost",
        "least cost",
        "lower cost",
        "empty",
        "no hash",
        "too costly",
        "number",
        "object",
    ],
)
async def test_every_refusal_costs_the_same(held: object) -> None:
    count = Counting()
    async with Passwords(COST, 2, count) as passwords:
        assert not await passwords.verify("secret1", held)
    assert count.rounds == 2**COST


async def test_hashing_leaves_the_event_loop_alone() -> None:
    count = Counting()
    async with Passwords(COST, 2, count) as passwords:
        await asyncio.gather(*(passwords.verify("secret1", None) for _ in range(20)))
    assert threading.get_ident() not in count.threads
    assert len(count.threads) <= 2


async def test_only_72_bytes_count_as_in_the_old_back_end() -> None:
    async with Passwords(4, 1) as passwords:
        held = await passwords.hash("é" * 40)
        assert await passwords.verify("é" * 36 + "something else", held)
        assert not await passwords.verify("é" * 35, held)
        assert await passwords.verify("x" * 71 + "é", await passwords.hash("x" * 71 + "é"))


async def test_a_nul_is_a_character_like_any_other() -> None:
    async with Passwords(4, 1) as passwords:
        assert not await passwords.verify("abc\0x", await passwords.hash("abc\0y"))


async def test_too_many_waiting_are_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_QUEUE", 3)
    async with Passwords(8, 1) as passwords:
        answers = await asyncio.gather(
            *(passwords.verify("secret1", None) for _ in range(10)), return_exceptions=True
        )
    refused = [answer for answer in answers if isinstance(answer, Problem)]
    assert len(refused) == 7
    assert refused[0].status == 503
    assert "Retry-After" in refused[0].headers
