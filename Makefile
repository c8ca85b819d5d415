# Every target does its own set-up: uv is fetched where it is missing, the environment is built from uv.lock.
# Nothing here needs root.
.DEFAULT_GOAL := help
SHELL := /bin/sh
PY := .venv/bin/python
READY := .venv/.ready
NAME ?=
ARGS ?=

.PHONY: help demo test check format bench serve backfill-users backfill-users-dry clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-20s %s\n", $$1, $$2}'

$(READY): pyproject.toml uv.lock scripts/bootstrap-uv.sh
	@uv=$$(sh scripts/bootstrap-uv.sh) && echo "setting up .venv ..." && "$$uv" sync --frozen --quiet && touch $(READY)

demo: $(READY) ## a live migration under traffic, on private real servers
	@.venv/bin/crossfade demo $(ARGS)

test: $(READY) ## all tests, on private real servers
	@$(PY) -m pytest -n 2 --dist worksteal -q $(ARGS)

check: $(READY) ## format, lint, types, layers
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports

format: $(READY) ## format and mend what can be mended
	@.venv/bin/ruff format .
	@.venv/bin/ruff check --fix .

bench: $(READY) ## figures, each a ratio of one run: make bench NAME=backfill
	@for name in $(or $(NAME),$(patsubst bench/%.py,%,$(filter-out bench/__init__.py bench/_%,$(wildcard bench/*.py)))); do \
		$(PY) -m bench.$$name $(ARGS) || exit $$?; \
	done

serve: $(READY) ## the reference service, on private servers unless MONGO_URI, DATABASE_URL, REDIS_URL are set
	@sh scripts/serve.sh $(ARGS)

backfill-users: $(READY) ## copy the users to PostgreSQL
	@.venv/bin/crossfade backfill --entity users $(ARGS)

backfill-users-dry: $(READY) ## convert every user, write nothing
	@.venv/bin/crossfade backfill --entity users --dry-run $(ARGS)

clean: ## remove the environment and the tools fetched for it
	@rm -rf .venv .tools
