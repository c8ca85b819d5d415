"""What Schemathesis is given for `test_schema`: accounts to be signed in as, and ids that exist.

Loaded by its command line, in a process of its own. SCHEMA_KNOWN names a JSON file: ``base`` the address of the
service, ``role`` whose tokens they are, ``tokens`` of spare accounts, ``ids`` that exist.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import strategies as st

KNOWN = json.loads(Path(os.environ["SCHEMA_KNOWN"]).read_text())


@schemathesis.auth(refresh_interval=1)
class SignedIn:
    """The next account when this one has been deleted, renamed or has lost its role: it is asked to do anything."""

    def __init__(self) -> None:
        self._tokens = list(KNOWN["tokens"])

    def get(self, case: Any, context: Any) -> str:
        while True:
            token: str = self._tokens[0]
            answer = httpx.get(
                f"{KNOWN['base']}/api/users/me", headers={"Authorization": f"Bearer {token}"}, timeout=30
            )
            if answer.status_code == 200 and answer.json()["user"]["role"] == KNOWN["role"]:
                return token
            self._tokens.pop(0)

    def set(self, case: Any, data: str, context: Any) -> None:
        case.headers["Authorization"] = f"Bearer {data}"


def _is_an_id(name: str) -> bool:
    return name == "id" or name.lower().endswith(("id", "ids"))


def _with_known_ids(given: Any) -> Any:
    """What was generated, or the same with ids that exist: random ones never meet a record."""
    if not isinstance(given, dict) or not any(_is_an_id(str(name)) for name in given):
        return st.just(given)
    known = st.sampled_from(KNOWN["ids"])
    known_ones = {
        name: st.lists(known, min_size=1, max_size=3) if isinstance(value, list) else known
        for name, value in given.items()
        if _is_an_id(str(name))
    }
    return st.just(given) | st.fixed_dictionaries(known_ones).map(lambda ids: {**given, **ids})


@schemathesis.hook
def flatmap_path_parameters(context: Any, path_parameters: Any) -> Any:
    return _with_known_ids(path_parameters)


@schemathesis.hook
def flatmap_body(context: Any, body: Any) -> Any:
    return _with_known_ids(body)
