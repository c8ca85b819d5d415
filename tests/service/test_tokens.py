"""Tokens: plain base64 whatever the name; and every way to forge one ends in 401."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import jwt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scorekeeper.auth import tokens as tokens_module
from scorekeeper.auth.tokens import LIFETIME, InvalidToken, Tokens

from .conftest import SECRET, Serve, assert_problem

USER = "64b000000000000000000001"
names = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("?>~\x7fÿ߿\U0010ffff"), max_size=60
)


@given(names)
@example("???>>>~~~")
@example("Zoë \U0001f600 ÿÿÿ")
def test_no_payload_holds_a_character_that_plain_base64_lacks(name: str) -> None:
    # Three alignments: the name starts at every place within a group of three bytes.
    for shift in range(3):
        token = Tokens(SECRET).issue(USER + "0" * shift, name)
        payload = token.split(".")[1]
        assert not set(payload) & set("-_")
        claims = json.loads(base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True))
        assert claims["username"] == name


def test_claims_are_the_old_back_ends_in_seconds() -> None:
    claims = jwt.decode(
        Tokens(SECRET, clock=lambda: 1_700_000_000.9).issue(USER, "Ann"), options={"verify_signature": False}
    )
    assert claims == {
        "userId": USER,
        "username": "Ann",
        "iat": 1_700_000_000,
        "exp": 1_700_000_000 + 7 * 24 * 3600,
    }


def part(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def signed(payload: Any, header: Any = None, secret: str = SECRET, digest: str = "sha256") -> str:
    """A token made by hand, as an attacker (or the old back end) would."""
    text = f"{part(header or {'alg': 'HS256', 'typ': 'JWT'})}.{part(payload)}"
    return f"{text}.{part(hmac.new(secret.encode(), text.encode(), getattr(hashlib, digest)).digest())}"


def claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    full = {"userId": USER, "username": "Ann", "iat": now, "exp": now + LIFETIME, **changes}
    return {name: value for name, value in full.items() if value is not ...}


def test_a_token_of_the_old_back_end_is_read() -> None:
    assert Tokens(SECRET).read(signed(claims())).user_id == USER


def test_further_claims_and_a_clock_ahead_do_no_harm() -> None:
    token = signed(claims(iat=int(time.time()) + 120, aud="web", sub=7, jti=1, role="admin"))
    assert Tokens(SECRET).read(token).user_id == USER


def test_a_short_secret_chosen_long_ago_works() -> None:
    assert Tokens("short").read(Tokens("short").issue(USER, "Ann")).user_id == USER


NOW = int(time.time())
FORGED = {
    "alg none": f"{part({'alg': 'none', 'typ': 'JWT'})}.{part(claims())}.",
    "alg None, signed": signed(claims(), {"alg": "None", "typ": "JWT"}),
    "no alg": signed(claims(), {"typ": "JWT"}),
    "HS512": signed(claims(), {"alg": "HS512", "typ": "JWT"}, digest="sha512"),
    "RS256": signed(claims(), {"alg": "RS256", "typ": "JWT"}),
    "another secret": signed(claims(), secret="another"),
    "empty secret": signed(claims(), secret=""),
    "no signature": ".".join(signed(claims()).split(".")[:2]) + ".",
    "two parts": ".".join(signed(claims()).split(".")[:2]),
    "no exp": signed(claims(exp=...)),
    "expired": signed(claims(exp=NOW - 1)),
    "exp text": signed(claims(exp=str(NOW + 999))),
    "exp true": signed(claims(exp=True)),
    "exp null": signed(claims(exp=None)),
    "exp infinite": signed(b'{"userId":"%s","exp":1e999}' % USER.encode()),
    "exp NaN": signed(b'{"userId":"%s","exp":NaN}' % USER.encode()),
    "exp list": signed(claims(exp=[NOW + 999])),
    "iat text": signed(claims(iat="now")),
    "not yet": signed(claims(nbf=NOW + 86_400)),
    "no user": signed(claims(userId=...)),
    "user number": signed(claims(userId=5)),
    "user object": signed(claims(userId={"$gt": ""})),
    "user empty": signed(claims(userId="")),
    "user lone surrogate": signed(claims(userId="\ud800")),
    "user too long": signed(claims(userId="a" * 257)),
    "user NUL": signed(claims(userId="a\0b")),
    "name number": signed(claims(username=5)),
    "payload list": signed([1]),
    "payload no JSON": signed(b"\xff\xfe"),
    "deep": signed(b"[" * 3000),
    "too long": signed(claims(pad="x" * 9000)),
    "garbage": "a.b.c",
    "empty": "",
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_token_proves_nothing(kind: str) -> None:
    with pytest.raises(InvalidToken):
        Tokens(SECRET).read(FORGED[kind])


class TestRemembered:
    """A token is verified once; what was found holds for this text alone, and for as long as its times allow."""

    def test_it_is_read_again_and_expires_all_the_same(self) -> None:
        clock = [1_700_000_000.0]
        tokens = Tokens(SECRET, lambda: clock[0])
        token = tokens.issue(USER, "Ann")
        assert tokens.read(token) == tokens.read(token)
        clock[0] += LIFETIME - 1
        tokens.read(token)
        clock[0] += 1
        for _ in range(2):
            with pytest.raises(InvalidToken, match="expired"):
                tokens.read(token)

    def test_one_that_was_read_too_early_is_good_later_and_not_before(self) -> None:
        clock = [1_700_000_000.0]
        tokens = Tokens(SECRET, lambda: clock[0])
        token = signed({"userId": USER, "nbf": 1_700_000_010, "exp": 1_700_000_020})
        for moment, good in ((0, False), (9, False), (10, True), (0, False), (20, False)):
            clock[0] = 1_700_000_000.0 + moment
            if good:
                tokens.read(token)
            else:
                with pytest.raises(InvalidToken):
                    tokens.read(token)

    def test_another_signature_or_payload_is_another_token(self) -> None:
        tokens, other = Tokens(SECRET), Tokens("another secret")
        token = tokens.issue(USER, "Ann")
        tokens.read(token)
        head, payload, signature = token.split(".")
        for forged in (
            f"{head}.{payload}.{signature[::-1]}",
            f"{head}.{part(claims(userId='0' * 24))}.{signature}",
            other.issue(USER, "Ann"),
        ):
            with pytest.raises(InvalidToken):
                tokens.read(forged)
        with pytest.raises(InvalidToken, match="signature"):
            other.read(token)

    def test_only_so_many_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokens_module, "REMEMBERED", 3)
        tokens = Tokens(SECRET)
        issued = [tokens.issue(USER, f"Ann {n}") for n in range(5)]
        for _ in range(2):
            for token in (*issued, signed(claims(pad="x" * 2000))):
                assert tokens.read(token).user_id == USER
        assert set(tokens._proven) == set(issued[2:])


async def test_forged_tokens_are_401_on_the_wire(serve: Serve) -> None:
    service = await serve("dual_write")
    for forged in FORGED.values():
        answer = await service.get("/api/users/me", forged)
        assert_problem(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    for header in ("", "Bearer", "Basic abc", "Bearer  ", "bearer"):
        assert_problem(await service.http.get("/api/users/me", headers={"Authorization": header}), 401)
    assert_problem(await service.get("/api/users/me"), 401)


async def test_a_good_token_of_nobody_is_401(serve: Serve) -> None:
    service = await serve("dual_write")
    for user in (USER, "no-object-id", "\U0001f600"):
        assert_problem(await service.get("/api/users/me", signed(claims(userId=user))), 401)


async def test_a_token_of_the_old_back_end_opens_the_door(serve: Serve) -> None:
    service = await serve("dual_write")
    id_ = (await service.register("Ann")).json()["user"]["id"]
    answer = await service.get("/api/users/me", signed(claims(userId=id_, username="name of before")))
    assert answer.json()["user"]["username"] == "Ann"
