"""Run a command with MONGO_URI, DATABASE_URL and REDIS_URL set: one's own servers, else embedded ones.

    python scripts/on_servers.py crossfade status
    python scripts/on_servers.py --prepare          set up the embedded servers' programs and stop there

The environment comes first, then ``.env``, then the embedded servers, which are started where they are needed and
run on (``crossfade servers down`` stops them). The command replaces this process.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from dotenv import dotenv_values

STORES = ("MONGO_URI", "DATABASE_URL", "REDIS_URL")


def say(text: str) -> None:
    """Tell a person; standard output belongs to the command."""
    sys.stderr.write(text + "\n")


def crossfade(*words: str, output: int | None = None) -> str:
    """Run a `crossfade` command; what it printed if `output` is a pipe. Ends this process if the command fails."""
    done = subprocess.run(["crossfade", *words], stdout=output, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def with_database(uri: str) -> str:
    """The address with a database: the server's own names none."""
    parts = urlsplit(uri)
    return uri if parts.path.strip("/") else urlunsplit(parts._replace(path="/scorekeeper"))


def prepare() -> None:
    """Have the programs of the embedded servers ready, so that no test waits for them under its own time limit."""
    from rich.console import Console

    from crossfade.embedded import EmbeddedError
    from crossfade.embedded.programs import Programs

    try:
        Programs(console=Console(stderr=True)).ensure(postgres=True, engine=shutil.which("mongod") is None)
    except EmbeddedError as error:
        if not all(os.environ.get(name) for name in STORES):
            sys.exit(str(error))
        say(f"{error}\nGoing on with the servers that the environment names.")


def main(words: list[str]) -> None:
    """Fill the environment and become the command."""
    beside = str(Path(sys.executable).parent)
    os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"
    if words[:1] == ["--prepare"]:
        prepare()
        return
    to_serve = words[:1] == ["--serve"]
    if to_serve:
        words = words[1:]
    if not words:
        sys.exit("usage: python scripts/on_servers.py [--prepare | [--serve] COMMAND...]")
    for name, value in dotenv_values(".env").items():
        if value is not None:
            os.environ.setdefault(name, value)
    if any(not os.environ.get(name) for name in STORES):
        crossfade("servers", "up", output=subprocess.PIPE)
        environment = json.loads(crossfade("servers", "env", "--json", output=subprocess.PIPE))
        # What the caller named stays as it is.
        mine = {name: value for name, value in environment.items() if not os.environ.get(name)}
        say(f"{', '.join(mine)}: embedded servers, which run on until `.venv/bin/crossfade servers down`.")
        if "MONGO_URI" in mine:
            mine["MONGO_URI"] = with_database(mine["MONGO_URI"])
        os.environ.update(mine)
        if to_serve and {"MONGO_URI", "DATABASE_URL"} <= mine.keys():
            # Never on anybody's own servers: the passwords of these accounts are known.
            os.environ["DEMO_ACCOUNTS"] = "true"
    if to_serve and not os.environ.get("JWT_SECRET"):
        os.environ["JWT_SECRET"] = secrets.token_hex(32)
        say("JWT_SECRET is not set: using one made for this session; tokens end with it.")
    os.execvp(words[0], words)  # noqa: S606 - it is what this script is for


if __name__ == "__main__":
    main(sys.argv[1:])
