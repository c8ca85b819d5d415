# Everything sets itself up: `make demo` on a fresh clone needs python3, make, git and a network, nothing else.
# What is fetched stays in .tools/ and .venv/ here, and in the user's cache (uv's packages, the embedded servers).

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: demo test test-faults schemathesis soak soak-bulk check format bench model mutants serve crossfade backfill-users backfill-users-dry setup servers-ready clean help

# A test run as a whole ends after this, with pytest's summary, whatever hangs; every failure takes longer.
TEST_LIMIT ?= 35m
FAULTS_LIMIT ?= 90m
# One more than there are processors, because a test often waits; more than four wait for the same three servers.
TEST_WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -lt 3 ] && echo $$((n + 1)) || echo 4)
# Failures are mostly waited for, until a deadline, so there may be more; but with seven on two processors a write
# without any failure has been late.
FAULTS_WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -lt 3 ] && echo $$((n * 2 + 1)) || echo 8)
BENCHES := $(filter-out __init__,$(basename $(notdir $(wildcard bench/*.py))))

# Settings of the caller's that would move the virtual environment or what is in it.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME
export UV_PROJECT_ENVIRONMENT := .venv
export PYTHONUNBUFFERED := 1

BIN := .venv/bin
SYNCED := .venv/.synced
LOCATED := $(BIN)/python scripts/on_servers.py

# Scripts in .venv name their folder: a moved or copied clone makes a new one.
ifneq ($(wildcard $(SYNCED)),)
ifneq ($(shell cat $(SYNCED)),$(CURDIR))
$(shell rm -rf .venv)
endif
endif

$(SYNCED): pyproject.toml uv.lock scripts/bootstrap-uv.sh
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		echo "python3 here is older than 3.11: uv looks for another one, and fetches one if there is none" >&2
	@# The system's certificates, where it has any: a network with a proxy of its own adds its authority there.
	@certificates=/etc/ssl/certs/ca-certificates.crt; \
	if [ -z "$$SSL_CERT_FILE" ] && [ -s $$certificates ]; then export SSL_CERT_FILE=$$certificates; fi; \
	uv=$$(sh scripts/bootstrap-uv.sh) && echo "setting up .venv" >&2 && "$$uv" sync --frozen --quiet
	@printf '%s\n' '$(CURDIR)' > $@

setup: $(SYNCED)

# Apart from the tests: building the servers' programs takes minutes the first time, and a test has a time limit.
servers-ready: $(SYNCED)
	@$(LOCATED) --prepare

demo: $(SYNCED) ## migrate 20,000 users under traffic, on servers of its own (ARGS="--keep" leaves it running)
	@$(BIN)/crossfade demo $(ARGS)

test: servers-ready ## all tests, on servers of their own (ARGS="-k name" picks)
	@status=0; timeout --foreground -s INT -k 60 $(TEST_LIMIT) \
		$(BIN)/python -m pytest -n $(TEST_WORKERS) $(ARGS) || status=$$?; \
	echo $$status > .venv/.tested; exit $$status

test-faults: servers-ready ## every failure at every await on a store (make test has a sample; FAULTS_SEED=1 repeats)
	@timeout --foreground -s INT -k 60 $(FAULTS_LIMIT) \
		$(BIN)/python -m pytest -n $(FAULTS_WORKERS) -m faults $(ARGS)

schemathesis: servers-ready ## requests made up from the OpenAPI document, ten thousand and more, in three phases (CASES=40)
	@SCHEMATHESIS=$(or $(CASES),40) $(BIN)/python -m pytest -n 0 -s --show-capture=no tests/service/test_schema.py $(ARGS)

soak: servers-ready ## histories of workers in trouble, then rounds of the phases, SOAK=1800 seconds each (HISTORY_SEED=1)
	@SOAK=$(or $(SOAK),1800) $(BIN)/python -m pytest -n 0 -s tests/histories tests/protocol/test_round.py $(ARGS)

soak-bulk: servers-ready ## backfill and verify killed at fifty instants, and among writers over twenty seeds: half an hour
	@SOAK=1 $(BIN)/python -m pytest -n 0 -o timeout=1800 tests/bulk/test_workers.py tests/bulk/test_under_writers.py $(ARGS)

check: $(SYNCED) ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@sh scripts/test-bootstrap-uv.sh

format: $(SYNCED) ## rewrite the code in the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: servers-ready ## benchmarks, all or NAME=backfill (ARGS= are its arguments)
	@# The peers of the bench with this name are not among what everything else needs.
	@$(if $(filter-out peers,$(NAME)),,"$$(sh scripts/bootstrap-uv.sh)" sync --frozen --quiet --group peers)
	@$(if $(NAME),$(if $(filter $(NAME),$(BENCHES)),,echo "no benchmark $(NAME); there are: $(BENCHES)" >&2; exit 2;)) \
	status=0; for name in $(or $(NAME),$(BENCHES)); do $(BIN)/python -m bench.$$name $(ARGS) || status=1; done; \
	exit $$status

model: $(SYNCED) ## the formal model, and that broken variants are found (ARGS="--deep", ARGS=undo_by_key)
	@$(BIN)/python -m model.check $(ARGS)

mutants: servers-ready ## break the protocol on purpose: do the tests notice? (ARGS="--drawn 10", ARGS=undo_by_key)
	@$(BIN)/python -m mutants.check $(ARGS)

serve: $(SYNCED) ## the reference service on port 5000, on one's own servers (.env) or embedded ones
	@$(LOCATED) alembic upgrade head
	@$(LOCATED) --serve python -m scorekeeper $(ARGS)

crossfade: $(SYNCED) ## any command on the same servers: make crossfade ARGS="phase set dual_write"
	@$(LOCATED) crossfade $(ARGS)

backfill-users: $(SYNCED) ## copy the users to PostgreSQL (resumes; ARGS="--batch-size 1000")
	@$(LOCATED) crossfade backfill --entity users $(ARGS)

backfill-users-dry: $(SYNCED) ## the same without writing: converts every user and reports
	@$(LOCATED) crossfade backfill --entity users --dry-run $(ARGS)

clean: ## remove what make put into this folder; the servers' programs in the user's cache stay
	rm -rf .venv .tools .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
