"""Starting: whatever is wrong is named in one line, with an exit status, and no secret is shown."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import httpx
import psycopg
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from scorekeeper.schema import HEAD
from scorekeeper.settings import Settings, SettingsError, load_settings

from .conftest import ROOT, SECRET

pytestmark = pytest.mark.long

GOOD = {
    "MONGO_URI": "mongodb://ann:pass-word@127.0.0.1:27017/scores",
    "DATABASE_URL": "postgresql://ann:pass-word@127.0.0.1:5432/scores",
    "REDIS_URL": "redis://:pass-word@127.0.0.1:6379/0",
    "JWT_SECRET": SECRET,
}


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)


def run(cwd: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scorekeeper", *arguments],
        capture_output=True, text=True, timeout=60, cwd=cwd, env={"PATH": os.environ["PATH"], **environ},
    )  # fmt: skip


def assert_one_line(
    ended: subprocess.CompletedProcess[str], *words: str, statuses: tuple[int, ...] = (2,)
) -> None:
    said = [line for line in ended.stderr.splitlines() if line.startswith("scorekeeper: ")]
    assert ended.returncode in statuses, ended.stderr
    assert len(said) == 1, ended.stderr
    for word in words:
        assert word in said[0]
    for never in ("Traceback", "pass-word", SECRET):
        assert never not in ended.stderr + ended.stdout


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_setting_is_named(tmp_path: Path, name: str) -> None:
    ended = run(tmp_path, **{n: v for n, v in GOOD.items() if n != name})
    assert_one_line(ended, f"{name} is not set")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MONGO_URI", "mongodb://ann:pass-word@127.0.0.1:27017", "names no database"),
        ("MONGO_URI", "mongodb://ann:pass-word@127.0.0.1:27017/?w=1", "names no database"),
        ("MONGO_URI", "http://ann:pass-word@x/y", "not a MongoDB address"),
        ("DATABASE_URL", "mysql://ann:pass-word@x/y", "not a PostgreSQL address"),
        ("REDIS_URL", "pass-word", "not a Redis address"),
        ("REDIS_URL", "redis://:pass-word@x:abc/0", "port"),
        ("JWT_SECRET", "   ", "is empty"),
        ("PORT", "99999", "PORT"),
        ("PORT", "pass-word", "PORT"),
        ("BCRYPT_ROUNDS", "40", "BCRYPT_ROUNDS"),
        ("USE_POSTGRES", "pass-word", "USE_POSTGRES"),
        ("LOG_LEVEL", "pass-word", "LOG_LEVEL"),
    ],
)
def test_an_unusable_setting_is_named_without_its_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    for key, good in {**GOOD, name: value}.items():
        monkeypatch.setenv(key, good)
    with pytest.raises(SettingsError) as refused:
        load_settings()
    message = str(refused.value)
    assert message.startswith(name)
    assert said in message
    assert "pass-word" not in message
    assert "\n" not in message


def test_settings_come_from_a_env_file_too_and_the_environment_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("".join(f"{k}={v}\n" for k, v in GOOD.items()) + "PORT=5001\nOTHER=1\n")
    assert load_settings().port == 5001
    monkeypatch.setenv("PORT", "5002")
    settings = load_settings()
    assert (settings.port, settings.mongo_database) == (5002, "scores")
    assert "pass-word" not in repr(settings)


@pytest.mark.parametrize(
    ("given", "driver_free"),
    [("postgres://u@h/d", "postgresql://u@h/d"), ("postgresql+psycopg://u@h/d", "postgresql://u@h/d")],
)
def test_database_urls_of_other_tools_are_understood(
    monkeypatch: pytest.MonkeyPatch, given: str, driver_free: str
) -> None:
    for key, value in {**GOOD, "DATABASE_URL": given}.items():
        monkeypatch.setenv(key, value)
    assert load_settings().database_url.get_secret_value() == driver_free


def test_the_code_and_the_migrations_agree_on_the_head() -> None:
    assert ScriptDirectory.from_config(Config(ROOT / "alembic.ini")).get_current_head() == HEAD


# -- with servers ---------------------------------------------------------------------------------------


@pytest.fixture
def environ(mongo_uri: str, database_url: str, redis_url: str) -> dict[str, str]:
    return {
        "MONGO_URI": mongo_uri, "DATABASE_URL": database_url, "REDIS_URL": redis_url,
        "JWT_SECRET": SECRET, "BCRYPT_ROUNDS": "4", "USE_POSTGRES": "true", "PORT": str(free_port()),
    }  # fmt: skip


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_wrong_password_is_said_so(tmp_path: Path, environ: dict[str, str]) -> None:
    parts = urlsplit(environ["DATABASE_URL"])
    wrong = urlunsplit(parts._replace(netloc=f"crossfade:pass-word@{parts.hostname}:{parts.port}"))
    assert_one_line(run(tmp_path, **{**environ, "DATABASE_URL": wrong}), "PostgreSQL", statuses=(2, 3))


def test_an_unreachable_mongo_is_said_so(tmp_path: Path, environ: dict[str, str]) -> None:
    gone = f"mongodb://ann:pass-word@127.0.0.1:{free_port()}/scores"
    assert_one_line(run(tmp_path, **{**environ, "MONGO_URI": gone}), "MongoDB", "MONGO_URI", statuses=(3,))


def test_a_schema_that_is_not_at_head_is_said_so(tmp_path: Path, environ: dict[str, str]) -> None:
    with psycopg.connect(environ["DATABASE_URL"], autocommit=True) as connection:
        connection.execute("DROP TABLE user_pictures")
    assert_one_line(run(tmp_path, **environ), "alembic upgrade head")


@pytest.mark.parametrize(
    ("revision", "why"),
    [
        ("0099", "revision 0099, which this version does not have"),
        (
            "0004",
            'revision 0004, and are not those of this version: column "cf_rev" of relation "user_pictures"',
        ),
    ],
)
def test_tables_of_a_version_that_numbered_its_revisions_otherwise_are_said_so(
    tmp_path: Path, environ: dict[str, str], revision: str, why: str
) -> None:
    with psycopg.connect(environ["DATABASE_URL"], autocommit=True) as connection:
        connection.execute("UPDATE alembic_version SET version_num = %s", [revision])
    ended = subprocess.run(
        [sys.executable, "-m", "alembic", "-c", ROOT / "alembic.ini", "upgrade", "head"],
        capture_output=True, text=True, timeout=60, cwd=tmp_path, env={"PATH": os.environ["PATH"], **environ},
    )  # fmt: skip
    assert ended.returncode == 1
    [line] = (ended.stderr + ended.stdout).splitlines()
    assert line.startswith("error: the tables in PostgreSQL at 127.0.0.1:")
    assert why in line
    assert "set DATABASE_URL to an empty database" in line
    with psycopg.connect(environ["DATABASE_URL"]) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(revision,)]


def test_a_port_in_use_is_said_so(tmp_path: Path, environ: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_line(run(tmp_path, **{**environ, "PORT": str(port)}), "PORT", str(port))


@pytest.fixture(params=[1, 2], ids=["one worker", "two workers"])
def address(request: pytest.FixtureRequest, environ: dict[str, str], tmp_path: Path) -> Iterator[str]:
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "scorekeeper", "--workers", str(request.param)],
        cwd=tmp_path, env={"PATH": os.environ["PATH"], **environ}, stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip
    base = f"http://127.0.0.1:{environ['PORT']}"
    try:
        until = time.monotonic() + 40
        while True:
            try:
                httpx.get(f"{base}/api/health/live", timeout=2)
                break
            except httpx.TransportError:
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    pytest.fail(log.read())
                time.sleep(0.2)
        yield base
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_real_server_serves_logs_json_and_counts_all_workers(address: str, tmp_path: Path) -> None:
    with httpx.Client(base_url=address, timeout=20) as http:
        body = {"username": "Ann", "password": "secret1"}
        token = http.post("/api/users/register", json=body).json()["token"]
    for _ in range(8):
        # A connection each, so that both workers get some.
        answer = httpx.get(
            f"{address}/api/users/me", headers={"Authorization": f"Bearer {token}"}, timeout=20
        )
        assert answer.json()["user"]["username"] == "Ann"
    text = httpx.get(f"{address}/metrics", timeout=20).text
    (count,) = re.findall(r'scorekeeper_auth_total\{outcome="accepted",step="token"\} (\S+)', text)
    assert float(count) == 8
    logged = (tmp_path / "log").read_text()
    assert '"context": "User Registration"' in logged
    for never in ("secret1", SECRET, token):
        assert never not in logged
