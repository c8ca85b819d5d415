"""Real bcrypt hashes of known passwords.

A `$2a$12$` hash takes a quarter of a second, so the generated users share these few, computed once. The passwords are
test data: they open nothing but generated accounts.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

#: Password -> its hash as the old back end makes them (`$2a$12$`). Generated users have one of these eight.
PASSWORDS: Mapping[str, str] = MappingProxyType(
    {
        "wizard-2019": "$2a$12$XRX5/BSCjAUy04dV8zGm3OS/UDrd1BzP.wCPl6TGqzvlBVXHgC6D.",
        "tarot-night": "$2a$12$B7AmFO/5pWa5NfY5rCc3K.6cGHMTA.uEOOKR2Zur4JpL7URnTxguO",
        "four-aces": "$2a$12$kmGKsvKbHUGNtW9NrCJRc.mmE1z2pSRPSdSAk3P1xyJPOSsHPRhPS",
        "blue-joker": "$2a$12$xNNw4ya3XMAEMd.1ODuYJO4cMPLU44sOQ6NUcI/4k/8GLGs8hVqLK",
        "last-trick": "$2a$12$B59aeQxJJE8owoiHyJe8ku7REymolemMkwolXAD9GIHLInwjoJhum",
        "high-score": "$2a$12$pZbGPixDYpUK.9.3Q8iSheczCUTA/Bc2gdg7xTkz31IhECXhYox3.",
        "shuffle-me": "$2a$12$JIYrdIZyho/qBsqxYABIKOkBpIuUFt.s3vZu9yWFCc/K6mTXXVLhC",
        "grandma-bids": "$2a$12$vMT4L572oXEJoF8CUiQ4k.691dNHAYlNPvMvCW4SM0SGmHeWMuDyq",
    }
)

#: Password -> its hash as other tools made some (`$2b$10$`); the dirt `foreign_hash`.
FOREIGN_PASSWORDS: Mapping[str, str] = MappingProxyType(
    {
        "imported-one": "$2b$10$BtwUy.PXeGrn1REbajCojOeszAR3NdUcS6T3dfqngNH.1TtCvLQtG",
        "imported-two": "$2b$10$cmvXtbOsLuviWuovYkp1ieLzT99XOJir5Ib9vOef40vfMqKA83shi",
    }
)
