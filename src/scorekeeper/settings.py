"""Settings of the service: environment and ``.env``, checked before anything is opened.

Each mistake is named in one line with the next step, and never with a value: addresses hold passwords.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from limits import parse
from pydantic import AfterValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class SettingsError(Exception):
    """A setting is missing or cannot be used; the message is one line for a person, without secrets."""


def _mongo(uri: SecretStr) -> SecretStr:
    value = uri.get_secret_value().strip()
    if not re.match(r"mongodb(\+srv)?://[^/]", value):
        raise ValueError("is not a MongoDB address; write mongodb://HOST:27017/DATABASE")
    if not _mongo_database(value):
        raise ValueError("names no database; add it as the path: mongodb://HOST:27017/DATABASE")
    return SecretStr(value)


def _mongo_database(uri: str) -> str:
    # Not urlsplit: a replica set's list of hosts is no valid netloc, nor is a password with brackets.
    _, _, path = uri.split("://", 1)[1].partition("/")
    return unquote(path.partition("?")[0])


def _postgres(url: SecretStr) -> SecretStr:
    value = url.get_secret_value().strip()
    if not re.match(r"postgres(ql)?(\+\w+)?://", value):
        raise ValueError("is not a PostgreSQL address; write postgresql://USER:PASSWORD@HOST:5432/DATABASE")
    # SQLAlchemy's way to name a driver, and Heroku's short scheme, mean nothing to libpq.
    return SecretStr("postgresql://" + value.split("://", 1)[1])


def _redis(url: SecretStr) -> SecretStr:
    value = url.get_secret_value().strip()
    if not re.match(r"(rediss?|unix)://", value):
        raise ValueError("is not a Redis address; write redis://HOST:6379/0")
    try:
        port = urlsplit(value).port
    except ValueError:
        port = -1
    if port == -1:
        raise ValueError("has a port that is no number; write redis://HOST:6379/0")
    return SecretStr(value)


def _legacy(url: str | None) -> str | None:
    value = (url or "").strip().rstrip("/").removesuffix("/api")
    if not value:
        return None
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment:
        raise ValueError("is not the address of a back end; write http://HOST:5000")
    return value


def _limit(text: str) -> str:
    try:
        parse(text)
    except ValueError:
        raise ValueError('is not a limit; write for example "10 per 5 minutes"') from None
    return text


def _secret(secret: SecretStr) -> SecretStr:
    if not secret.get_secret_value().strip():
        raise ValueError("is empty; set the secret that the old back end signs its tokens with")
    return secret


class Settings(BaseSettings):
    """All settings. Environment variables first, then ``.env`` in the working directory.

    Attributes:
        mongo_uri: MONGO_URI. Its path names the database.
        database_url: DATABASE_URL, PostgreSQL, always with the scheme ``postgresql://``.
        redis_url: REDIS_URL, for the cache of authenticated users.
        jwt_secret: JWT_SECRET, the one that the old back end has.
        use_postgres: USE_POSTGRES. Whether a migration that has no control record begins in ``dual_write``.
        host: HOST to listen on.
        port: PORT to listen on.
        cors_origins: CORS_ORIGINS, separated by commas; ``*`` is any.
        bcrypt_rounds: BCRYPT_ROUNDS, cost of new password hashes, a power of two. 12 is what the old back end
            uses.
        password_threads: PASSWORD_THREADS that hash at one time; hashing leaves the interpreter's lock.
        cache_ttl: CACHE_TTL in seconds. How late a role or a deletion written by *another* application takes
            effect here; what this service writes takes effect at once. 0: no cache.
        jwt_former_secrets: JWT_FORMER_SECRETS, separated by commas: they sign nothing any more, and what they signed
            stays good until it expires. To replace JWT_SECRET, move its value here.
        hash_scheme: HASH_SCHEME. What new hashes are: ``bcrypt``, which the old back end can read;
            ``argon2id``; or ``auto``: argon2id once PostgreSQL decides, nobody else writes to MongoDB and there is no
            LEGACY_URL. argon2id waits for the end of foreign writers in any case.
        rate_limits: RATE_LIMITS. False: none of those that follow, for a load test from one address.
        limit_login_account_address, limit_login_address, limit_login_account: LIMIT_LOGIN_..., failed log-ins by
            account and address, by address, by account; see `scorekeeper.auth.attempts`.
        limit_register_address: LIMIT_REGISTER_ADDRESS, new accounts by address.
        demo_accounts: DEMO_ACCOUNTS. Make accounts with well-known passwords and say how to log in. Set by `make serve`
            on the embedded servers, never to be set elsewhere.
        mongo_pool, postgres_pool: MONGO_POOL, POSTGRES_POOL, connections of one worker at most.
        legacy_url: LEGACY_URL, address of the old back end, always without ``/api``: requests under ``/api`` that
            this service does not know are sent on to it. None: they are 404.
        legacy_patience: LEGACY_PATIENCE in seconds that the old back end may be silent before it is 504.
        log_level: LOG_LEVEL.
        crossfade_shadow_sample: CROSSFADE_SHADOW_SAMPLE, the part of the reads that is compared in phase
            ``shadow_read``.
        crossfade_shadow_postgres_read: CROSSFADE_SHADOW_POSTGRES_READ: and in phase ``postgres_read``.
    """

    model_config = SettingsConfigDict(
        env_file=".env", env_file_encoding="utf-8", extra="ignore", hide_input_in_errors=True
    )

    mongo_uri: Annotated[SecretStr, AfterValidator(_mongo)]
    database_url: Annotated[SecretStr, AfterValidator(_postgres)]
    redis_url: Annotated[SecretStr, AfterValidator(_redis)]
    jwt_secret: Annotated[SecretStr, AfterValidator(_secret)]
    use_postgres: bool = False
    host: str = "127.0.0.1"
    port: int = Field(5000, ge=0, le=65535)
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ("*",)
    # 4 is bcrypt's least; at 16 one log-in takes 6 s of a core.
    bcrypt_rounds: int = Field(12, ge=4, le=16)
    password_threads: int = Field(2, ge=1, le=64)
    cache_ttl: float = Field(5.0, ge=0.0, le=60.0)
    jwt_former_secrets: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    hash_scheme: Literal["auto", "bcrypt", "argon2id"] = "auto"
    rate_limits: bool = True
    limit_login_account_address: Annotated[str, AfterValidator(_limit)] = "10 per 5 minutes"
    limit_login_address: Annotated[str, AfterValidator(_limit)] = "100 per 5 minutes"
    limit_login_account: Annotated[str, AfterValidator(_limit)] = "50 per 1 hour"
    limit_register_address: Annotated[str, AfterValidator(_limit)] = "5000 per 1 hour"
    demo_accounts: bool = False
    mongo_pool: int = Field(50, ge=1, le=1000)
    postgres_pool: int = Field(20, ge=1, le=1000)
    legacy_url: Annotated[str | None, AfterValidator(_legacy)] = None
    legacy_patience: float = Field(30.0, ge=0.1, le=600.0)
    log_level: str = "INFO"
    crossfade_shadow_sample: float = Field(0.1, ge=0, le=1)
    crossfade_shadow_postgres_read: bool = False

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(origin.strip() for origin in value.split(",") if origin.strip())
        return value

    @field_validator("jwt_former_secrets", mode="before")
    @classmethod
    def _split_secrets(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(SecretStr(secret.strip()) for secret in value.split(",") if secret.strip())
        return value

    @field_validator("log_level")
    @classmethod
    def _known_level(cls, value: str) -> str:
        if value.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
            raise ValueError("is not a level; write DEBUG, INFO, WARNING, ERROR or CRITICAL")
        return value.upper()

    @property
    def mongo_database(self) -> str:
        """Name of the MongoDB database: the path of MONGO_URI."""
        return _mongo_database(self.mongo_uri.get_secret_value())


_MEANINGS = {
    "mongo_uri": "the address of the MongoDB database, mongodb://HOST:27017/DATABASE",
    "database_url": "the address of the PostgreSQL database, postgresql://USER:PASSWORD@HOST:5432/DATABASE",
    "redis_url": "the address of Redis, redis://HOST:6379/0",
    "jwt_secret": "the secret that the old back end signs its tokens with",
}


def load_settings(**overrides: Any) -> Settings:
    """The settings of this process.

    Args:
        overrides: win over environment and ``.env`` (command-line arguments).

    Raises:
        SettingsError: names every setting that is missing or cannot be used, in one line, without values.
    """
    try:
        return Settings(**overrides)
    except ValidationError as error:
        raise SettingsError(_in_one_line(error)) from None
    except UnicodeDecodeError:
        raise SettingsError(".env is not a UTF-8 text file") from None


def _in_one_line(error: ValidationError) -> str:
    faults = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        field = str(item["loc"][0]) if item["loc"] else "settings"
        if item["type"] == "missing":
            faults.append(f"{field.upper()} is not set; set it, or add it to .env: {_MEANINGS[field]}")
        elif item["type"] == "value_error":
            faults.append(f"{field.upper()} {item['msg'].removeprefix('Value error, ')}")
        else:
            faults.append(f"{field.upper()} cannot be used: {item['msg'][:1].lower()}{item['msg'][1:]}")
    return ". ".join(faults)


class _OnlyDatabase(BaseSettings):
    model_config = SettingsConfigDict(
        env_file=".env", env_file_encoding="utf-8", extra="ignore", hide_input_in_errors=True
    )

    database_url: Annotated[SecretStr, AfterValidator(_postgres)]


def database_url() -> str:
    """DATABASE_URL alone, for Alembic, which needs no other setting.

    Raises:
        SystemExit: with one line, when it is missing or cannot be used.
    """
    try:
        return _OnlyDatabase.model_validate({}).database_url.get_secret_value()
    except ValidationError as error:
        raise SystemExit(_in_one_line(error)) from None


def sqlalchemy_url(url: str) -> str:
    """The same address for SQLAlchemy with psycopg 3."""
    return "postgresql+psycopg://" + url.split("://", 1)[1]
