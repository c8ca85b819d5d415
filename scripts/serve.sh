#!/bin/sh
# Starts the reference service; private servers stand in for addresses that are not set.
set -eu
cd "$(dirname "$0")/.."
if [ -f .env ]; then set -a; . ./.env; set +a; fi
if [ -z "${MONGO_URI:-}" ] || [ -z "${DATABASE_URL:-}" ] || [ -z "${REDIS_URL:-}" ]; then
    .venv/bin/crossfade servers up
    mongo=${MONGO_URI:-} postgres=${DATABASE_URL:-} redis=${REDIS_URL:-}
    eval "$(.venv/bin/crossfade servers env)"
    MONGO_URI=${mongo:-$MONGO_URI} DATABASE_URL=${postgres:-$DATABASE_URL} REDIS_URL=${redis:-$REDIS_URL}
    export MONGO_URI DATABASE_URL REDIS_URL
fi
if [ -z "${JWT_SECRET:-}" ]; then
    JWT_SECRET=$(.venv/bin/python -c 'import secrets; print(secrets.token_urlsafe(48))')
    export JWT_SECRET
    echo "JWT_SECRET is not set: tokens of this run are signed with a fresh secret and end with it." >&2
fi
.venv/bin/alembic upgrade head
exec .venv/bin/python -m scorekeeper "$@"
