"""Tokens: JWT, HS256 and nothing else, with the claims of the old back end; secrets that can be replaced.

The client decodes the payload with plain base64 and logs out when it meets base64url's own characters, ``-``
(62) and ``_`` (63). Why neither can arise here: in ASCII the top bit of every byte is 0. A group of three
bytes becomes four sextets, the first three of which each hold a top bit: 0xxxxx is below 32; xx0xxx is none of
11111x; xxxx0x is neither 111110 nor 111111. The fourth is the low six bits of the third byte: 62 for ``>``
and ``~``, 63 for ``?`` and DEL. So the payload is ASCII, and these four are written as \\u escapes.
"""

from __future__ import annotations

import hmac
import json
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

import jwt
from jwt.warnings import InsecureKeyLengthWarning

from scorekeeper.metrics import AUTH

_ACCEPTED = AUTH.labels("token", "accepted")

ALGORITHM: Final = "HS256"

#: Seconds that a token is good for: 7 days, as the old back end has it.
LIFETIME: Final = 7 * 24 * 3600

#: Longest token that is looked at; ours have some 300 characters.
LONGEST: Final = 8192

#: Tokens of which is remembered that a secret of ours signed them: all who use a worker within minutes, in 10 MB.
REMEMBERED: Final = 16_384

#: The longest of these: then it is 25 MB at most, whatever they are.
LONGEST_REMEMBERED: Final = 1024

#: An id as text: 24 hex characters, or a text of an old document; no control characters, no lone surrogates.
_USER_ID = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,256}")

_ESCAPES = str.maketrans({character: f"\\u{ord(character):04x}" for character in "><?~\x7f"})


#: PyJWT's own checks of times and names: done in `Tokens`, where a number is told from text.
_UNCHECKED: Any = dict.fromkeys(
    ("verify_exp", "verify_iat", "verify_nbf", "verify_aud", "verify_iss", "verify_sub", "verify_jti"), False
)


class PlainBase64Encoder(json.JSONEncoder):
    """JSON whose base64url is plain base64 without padding (see the module)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "ensure_ascii": True})

    def encode(self, o: Any) -> str:
        """The JSON text. The escaped characters stand inside strings only, where an escape means the same."""
        return super().encode(o).translate(_ESCAPES)


def key_id(secret: str) -> str:
    """The ``kid`` of a secret: which one it was, to who has it; nothing to who has not."""
    return hmac.new(secret.encode(), b"scorekeeper kid", sha256).hexdigest()[:16]


class InvalidToken(Exception):
    """The token proves nothing. ``args[0]`` is a word for the metrics: expired, malformed, signature,
    claims.
    """


@dataclass(frozen=True, slots=True)
class Claims:
    """What a valid token says.

    Attributes:
        user_id: the user's id as text.
        username: the name at the time of issue, or None. Only informative: it may have changed since.
        expires: seconds since 1970.
        begins: seconds since 1970 from which on it is good; None: always was.
    """

    user_id: str
    username: str | None
    expires: float
    begins: float | None = None


class Tokens:
    """Issues tokens with one secret; reads those of this and of former ones.

    A token names the secret that signed it (``kid``). One that names none is the old back end's, or from before the
    first rotation: every secret is tried.

    What a signature proves stays proven as long as the secrets are the same, and they are for the life of this object:
    a token is verified once, and remembered. Its times are compared with the clock whenever it is read. Only tokens
    that were proven are remembered, so nobody else can fill the memory.
    """

    def __init__(
        self, secret: str, clock: Callable[[], float] = time.time, *, former: Iterable[str] = ()
    ) -> None:
        """Keep the secrets.

        Args:
            secret: JWT_SECRET, shared with the old back end; of any length, because it was chosen there.
            clock: seconds since 1970.
            former: secrets that signed tokens which are still good (JWT_FORMER_SECRETS).
        """
        self._secrets = {key_id(each): each for each in (secret, *former)}
        self._kid = key_id(secret)
        self._clock = clock
        self._proven: dict[str, Claims] = {}

    def issue(self, user_id: str, username: str) -> str:
        """A token for 7 days from now."""
        issued = int(self._clock())
        claims = {"userId": user_id, "username": username, "iat": issued, "exp": issued + LIFETIME}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InsecureKeyLengthWarning)
            return jwt.encode(
                claims,
                self._secrets[self._kid],
                ALGORITHM,
                headers={"kid": self._kid},
                json_encoder=PlainBase64Encoder,
            )

    def read(self, token: str) -> Claims:
        """What the token says, if it is ours or the old back end's and still good.

        ``iat`` is not compared with the clock, as the old back end does not: its clock may be ahead of ours.

        Raises:
            InvalidToken: for everything else: another algorithm, ``none``, no ``exp``, claims of the wrong
                type.
        """
        try:
            claims = self._proven.get(token) or self._prove(token)
            self._check_times(claims)
        except InvalidToken as error:
            AUTH.labels("token", error.args[0]).inc()
            raise
        _ACCEPTED.inc()
        return claims

    def _prove(self, token: str) -> Claims:
        claims = self._decode(token)
        if len(token) > LONGEST_REMEMBERED:
            return claims
        if len(self._proven) >= REMEMBERED:
            # The one that has been remembered for longest; verifying it again is no loss worth more bookkeeping.
            del self._proven[next(iter(self._proven))]
        self._proven[token] = claims
        return claims

    def _decode(self, token: str) -> Claims:
        if len(token) > LONGEST:
            raise InvalidToken("malformed")
        *others, last = self._candidates(token)
        for secret in others:
            try:
                return self._checked(self._payload(token, secret))
            except InvalidToken as error:
                if error.args[0] != "signature":
                    raise
        return self._checked(self._payload(token, last))

    def _candidates(self, token: str) -> list[str]:
        """The secrets that may have signed it: the one it names, else all, this one first."""
        if len(self._secrets) == 1:
            return [self._secrets[self._kid]]
        try:
            kid = jwt.get_unverified_header(token).get("kid")
        except (jwt.PyJWTError, ValueError, RecursionError):
            kid = None
        return [self._secrets[kid]] if kid in self._secrets else list(self._secrets.values())

    @staticmethod
    def _payload(token: str, secret: str) -> dict[str, Any]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", InsecureKeyLengthWarning)
                return jwt.decode(token, secret, algorithms=[ALGORITHM], options=_UNCHECKED)
        except jwt.InvalidSignatureError as error:
            raise InvalidToken("signature") from error
        except jwt.InvalidAlgorithmError as error:
            raise InvalidToken("algorithm") from error
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            raise InvalidToken("malformed") from error

    @staticmethod
    def _checked(payload: dict[str, Any]) -> Claims:
        user_id, username = payload.get("userId"), payload.get("username")
        if not isinstance(user_id, str) or not _USER_ID.fullmatch(user_id):
            raise InvalidToken("claims")
        if username is not None and not isinstance(username, str):
            raise InvalidToken("claims")
        for claim in ("exp", "iat", "nbf"):
            if claim in payload and not _is_moment(payload[claim]):
                raise InvalidToken("claims")
        if "exp" not in payload:
            raise InvalidToken("claims")
        begins = float(payload["nbf"]) if "nbf" in payload else None
        return Claims(user_id, username, float(payload["exp"]), begins)

    def _check_times(self, claims: Claims) -> None:
        now = self._clock()
        if now >= claims.expires:
            raise InvalidToken("expired")
        if claims.begins is not None and now < claims.begins:
            raise InvalidToken("claims")


def _is_moment(value: object) -> bool:
    # 2**53: beyond it JavaScript has no exact seconds, and a float may overflow.
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and abs(value) < 2**53
    )
