"""The service, put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from fastapi import FastAPI

from crossfade import Crossfade, Migration, Options, SchemaNotReady, StoreUnavailable, observe
from crossfade.control import Control
from crossfade.phase import Phase
from scorekeeper import errors, openapi, operations
from scorekeeper.audit.log import AuditLog
from scorekeeper.auth.attempts import AttemptRules, LoginAttempts
from scorekeeper.auth.current import Authenticator
from scorekeeper.auth.passwords import Passwords
from scorekeeper.auth.tokens import Tokens
from scorekeeper.cache import UserCache
from scorekeeper.forwarding import Forwarding, LegacyBackEnd
from scorekeeper.friends import routes as friend_routes
from scorekeeper.friends.repository import FriendRequestRepository
from scorekeeper.friends.service import FriendService
from scorekeeper.games import routes as game_routes
from scorekeeper.games.everybodys import PublicGames
from scorekeeper.games.guests import Players
from scorekeeper.games.played import ProfileGames
from scorekeeper.games.repository import GameRepository
from scorekeeper.games.table import TableGameService
from scorekeeper.games.wizard import WizardGameService
from scorekeeper.http import Front, Turns
from scorekeeper.identities import routes as identity_routes
from scorekeeper.identities.accounts import AccountIdentities
from scorekeeper.identities.admin import IdentityAdministration
from scorekeeper.identities.aliases import AliasService
from scorekeeper.identities.games import PlayedGames
from scorekeeper.identities.linking import LinkingService
from scorekeeper.identities.lists import IdentityLists
from scorekeeper.identities.repository import IdentityRepository
from scorekeeper.identities.service import IdentityService
from scorekeeper.limits import RateLimits, parse
from scorekeeper.migration import accounts as account_entities
from scorekeeper.migration import name as migration_name
from scorekeeper.serving import keep_what_is_loaded
from scorekeeper.settings import Settings, load_settings
from scorekeeper.users import routes as user_routes
from scorekeeper.users.changes import AccountChanges
from scorekeeper.users.profiles import ProfileService
from scorekeeper.users.repository import UserRepository
from scorekeeper.users.service import UserService

log = structlog.get_logger("scorekeeper")


def create_app(
    settings: Settings, *, initial_phase: Phase | str | None = None, options: Options | None = None
) -> FastAPI:
    """The ASGI application; stores are opened when it starts.

    Args:
        settings: see `load_settings`.
        initial_phase: where a migration without a control record begins, instead of what USE_POSTGRES says.
        options: times and limits of Crossfade.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        cf = crossfade_of(settings, initial_phase=initial_phase, options=options)
        accounts = cf.migration(migration_name, account_entities())
        cache = UserCache.connect(
            settings.redis_url.get_secret_value(),
            prefix=f"scorekeeper:{settings.mongo_database}",
            ttl=settings.cache_ttl,
        )
        limits = RateLimits(
            settings.redis_url.get_secret_value(),
            prefix=f"scorekeeper:{settings.mongo_database}",
            enabled=settings.rate_limits,
        )
        passwords = Passwords(
            settings.bcrypt_rounds,
            settings.password_threads,
            modern=lambda: hashes_are_argon2(settings, accounts.control),
        )
        tokens = Tokens(
            settings.jwt_secret.get_secret_value(),
            former=[secret.get_secret_value() for secret in settings.jwt_former_secrets],
        )
        async with cf, passwords:
            await check_schema(accounts)
            identities = IdentityService(accounts["identities"])
            app.state.crossfade = cf
            app.state.accounts = accounts
            app.state.cache = cache
            app.state.passwords = passwords
            audit = AuditLog(accounts["audit_events"], limits)
            attempts = LoginAttempts(limits, attempt_rules(settings))
            app.state.audit = audit
            app.state.authenticator = Authenticator(accounts["users"], tokens, cache, audit)
            users = UserRepository(accounts)
            app.state.friends = FriendService(users, FriendRequestRepository(accounts))
            players = IdentityRepository(accounts)
            of_accounts = AccountIdentities(players)
            app.state.users = UserService(users, identities, passwords, tokens, cache, attempts, audit)
            wizard, table, older = (
                GameRepository(accounts[name]) for name in ("wizard_games", "table_games", "games")
            )
            app.state.profiles = ProfileService(users, of_accounts, ProfileGames((wizard, older), table))
            app.state.account_changes = AccountChanges(
                users, of_accounts, accounts["friend_requests"], tokens, cache, audit
            )
            played = PlayedGames(accounts)
            linking = LinkingService(players, identities, users, played)
            app.state.identity_lists = IdentityLists(players, users, played)
            app.state.aliases = AliasService(players)
            app.state.linking = linking
            app.state.identity_administration = IdentityAdministration(players, linking, users)
            named = Players(users, players, identities)
            app.state.wizard_games = WizardGameService(wizard, named)
            app.state.table_games = TableGameService(table, named)
            app.state.public_games = PublicGames(wizard, older, table)
            log.info("scorekeeper serves", phase=accounts.phase.value)
            try:
                yield
            finally:
                await cache.close()
                await limits.close()
                if legacy is not None:
                    await legacy.close()

    legacy = LegacyBackEnd(settings.legacy_url, settings.legacy_patience) if settings.legacy_url else None
    app = FastAPI(
        title="scorekeeper",
        description="Users and authentication of a card-game score keeper.",
        version="1.0.0",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    errors.install(app)
    openapi.install(app)

    app.include_router(user_routes.direct)
    app.include_router(user_routes.router)
    app.include_router(friend_routes.router)
    app.include_router(identity_routes.router)
    app.include_router(game_routes.router)
    app.include_router(operations.router)
    app.add_middleware(Turns)
    if legacy is not None:
        app.add_middleware(Forwarding, routes=app.routes, legacy=legacy)
    app.add_middleware(Front, origins=settings.cors_origins)
    return app


def crossfade_of(
    settings: Settings,
    *,
    initial_phase: Phase | str | None = None,
    options: Options | None = None,
    background: bool = True,
) -> Crossfade:
    """Crossfade on the settings' stores.

    Raises:
        crossfade.ConfigurationError: an address cannot be used.
    """
    return Crossfade(
        mongo_uri=settings.mongo_uri.get_secret_value(),
        database_url=settings.database_url.get_secret_value(),
        use_postgres=settings.use_postgres,
        initial_phase=initial_phase,
        options=options
        or Options(
            mongo_pool=settings.mongo_pool,
            postgres_pool=settings.postgres_pool,
            shadow_sample=settings.crossfade_shadow_sample,
            shadow_postgres_read=settings.crossfade_shadow_postgres_read,
        ),
        background=background,
    )


def hashes_are_argon2(settings: Settings, control: Control) -> bool:
    """Whether new password hashes are argon2id by now: nobody who can only read bcrypt has to read them."""
    if settings.hash_scheme == "bcrypt" or control.foreign_writers:
        return False
    if settings.hash_scheme == "argon2id":
        return True
    return control.phase.rules.primary == "postgres" and settings.legacy_url is None


def attempt_rules(settings: Settings) -> AttemptRules:
    """The limits of log-ins and registrations, as they are set."""
    return AttemptRules(
        account_and_address=parse(settings.limit_login_account_address),
        address=parse(settings.limit_login_address),
        account=parse(settings.limit_login_account),
        registrations=parse(settings.limit_register_address),
    )


async def check_schema(accounts: Migration) -> None:
    """Refuse to serve on tables that are not at head, in the phases that use them.

    A PostgreSQL that does not answer is no reason not to start while MongoDB decides.

    Raises:
        crossfade.SchemaNotReady: what is missing, and how to get it.
    """
    rules = accounts.phase.rules
    if not rules.dual and rules.primary == "mongo":
        return
    try:
        missing = await accounts.pair.postgres.missing(accounts.entities.values(), timeout=5.0)
    except StoreUnavailable:
        if rules.primary == "postgres":
            raise
        log.warning("PostgreSQL does not answer; serving from MongoDB until it does")
        return
    if missing:
        raise SchemaNotReady(
            f"DATABASE_URL: the schema is not at head (missing: {'; '.join(missing)}); run alembic upgrade head"
        )


async def check_start(settings: Settings) -> None:
    """Open everything once and close it again, to learn in one line why the service cannot start.

    Raises:
        crossfade.CrossfadeError: names the setting and the cause.
    """
    cf = crossfade_of(settings, background=False)
    accounts = cf.migration(migration_name, account_entities())
    try:
        await cf.postgres.connect_once()
    except StoreUnavailable as cause:
        # The server answered and refused: that is a wrong setting. One that is down may come back.
        if "FATAL" in str(cause) and "starting up" not in str(cause):
            raise
    health, look = await asyncio.gather(cf.health(timeout=3.0), accounts.record.look(timeout=3.0))
    if not health["mongo"][0] and look.control is None:
        # Nothing says that MongoDB is no longer the one that decides: most likely the address is wrong.
        raise StoreUnavailable(
            "mongo", "cannot reach MongoDB. Is it running? MONGO_URI sets the address, user and password."
        )
    async with cf:
        await check_schema(accounts)


def from_environment() -> FastAPI:
    """The application of a worker process: settings from the environment.

    Raises:
        scorekeeper.settings.SettingsError: names the setting.
    """
    settings = load_settings()
    observe.configure_logging(settings.log_level)
    app = create_app(settings)
    keep_what_is_loaded()
    return app
