"""Requests made up from the service's own description of itself (Schemathesis), by a user and by an administrator.

Whatever they are, no answer is an error of the server's, and every answer is one that the description allows. A sample
of them here; ``make schemathesis`` has ten thousand and more, in three phases.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId

from .conftest import SECRET, Serve, Service
from .test_games import table_game, wizard_game
from .test_serving import running
from .test_start import free_port

#: Of each operation, in the fuzzing phase and in the stateful one; 0: the sample.
EXAMPLES = int(os.environ.get("SCHEMATHESIS", "0"))
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance"
)
SPARE_ACCOUNTS = 50


async def known(service: Service, role: str) -> dict[str, Any]:
    """Accounts of this role, friends, games and identities, for requests that are not answered by 404 alone."""
    accounts, ids, tokens = service.app.state.accounts, [], []
    for number in range(SPARE_ACCOUNTS if EXAMPLES else 8):
        made = (await service.register(f"Spare {number}")).json()
        if role == "admin":
            await accounts["users"].update(ObjectId(made["user"]["id"]), {"role": "admin"})
            await service.app.state.cache.forget(made["user"]["id"])
        tokens.append(made["token"])
        ids.append(made["user"]["id"])
    headers = {"Authorization": f"Bearer {tokens[0]}"}
    for number in range(4):
        wizard = {"gameData": wizard_game("Spare 0", "Bob", f"Guest {number}"), "localId": f"w{number}"}
        made = (await service.http.post("/api/wizard-games", json=wizard, headers=headers)).json()
        ids.append(made["game"]["id"])
        table = {"gameData": table_game(), "localId": f"t{number}"}
        made = (await service.http.post("/api/table-games", json=table, headers=headers)).json()
        ids.append(made["game"]["_id"])
    ids += [id_ for (id_,) in service.rows("SELECT id FROM player_identities LIMIT 40")]
    return {"role": role, "tokens": tokens, "ids": ids}


def sampled() -> list[Any]:
    if not EXAMPLES:
        return [("postgres_primary", "admin")]
    return list(itertools.product(("dual_write", "postgres_read", "postgres_primary"), ("user", "admin")))


@pytest.mark.long
@pytest.mark.timeout(7200 if EXAMPLES else 180)
@pytest.mark.parametrize(("phase", "role"), sampled())
async def test_every_answer_is_one_that_the_description_allows(
    serve: Serve, mongo_uri: str, database_url: str, redis_url: str, tmp_path: Path, phase: str, role: str
) -> None:
    service = await serve(phase, rate_limits=False)
    environ = {
        "MONGO_URI": mongo_uri, "DATABASE_URL": database_url, "REDIS_URL": redis_url, "JWT_SECRET": SECRET,
        "BCRYPT_ROUNDS": "4", "RATE_LIMITS": "false", "PORT": str(free_port()),
    }  # fmt: skip
    base = f"http://127.0.0.1:{environ['PORT']}"
    facts = tmp_path / "known.json"
    facts.write_text(json.dumps({"base": base, **await known(service, role)}))
    complete = ["--phases", "examples,coverage,fuzzing,stateful", "--max-examples", str(EXAMPLES)]
    # Always the same, so that what is green stays green.
    sample = ["--phases", "fuzzing", "--max-examples", "2", "--seed", "1"]
    async with running(tmp_path, environ, 1):
        found = await asyncio.to_thread(
            subprocess.run,
            [
                Path(sys.executable).with_name("schemathesis"), "run", f"{base}/openapi.json",
                "--checks", CHECKS, "--no-color", "--warnings", "off", "--generation-database", "none",
                "--continue-on-failure", "--suppress-health-check", "all",
                *(complete if EXAMPLES else sample),
            ],
            cwd=tmp_path, capture_output=True, text=True, check=False,
            env={
                "PATH": os.environ["PATH"], "SCHEMA_KNOWN": str(facts),
                "SCHEMATHESIS_HOOKS": str(Path(__file__).with_name("schema_hooks.py")),
            },
        )  # fmt: skip
    counted = re.search(r"(\d[\d,]*) generated", found.stdout)
    print(f"{phase}, {role}: {counted.group(0) if counted else 'nothing'}")  # noqa: T201 - the figure
    assert found.returncode == 0, found.stdout[-20_000:] + found.stderr[-2000:]
    assert counted
