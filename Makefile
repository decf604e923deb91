# Everything runs from a fresh clone with git, make and Python 3.11 or later.
PYTHON ?= $(shell for p in python3.14 python3.13 python3.12 python3.11 python3 python; do \
	command -v $$p >/dev/null 2>&1 && \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# Python compiles what it loads when it first loads it: much of what is installed is never loaded.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
# What the tests have from npm: an OpenID provider, axe-core, OpenAI's client, an EVM chain, wallets.
NPM := $(patsubst %,tests/%/node_modules/.package-lock.json,openid axe openai x402 wallets)
# And llama.cpp's server, where it comes ready built.
LLAMA := .venv/llama-installed
# And those who pay with x402 and settle it, with what Farebox itself needs for that.
PAYERS := .venv/payers-installed

.PHONY: run test check bench bench-pages torture lock clean

# Only an instance that takes payments needs what that takes.
HAS_X402 := $(BIN)/python -c 'import os, pathlib, sys, tomllib; \
	file = pathlib.Path(os.environ.get("FAREBOX_INSTANCE") or "instance", "farebox.toml"); \
	sys.exit(not file.exists() \
		or "x402" not in tomllib.loads(file.read_text("utf-8")))' 2>/dev/null

run: .venv/installed ## install, set up and serve in the foreground
	@if $(HAS_X402); then $(MAKE) --no-print-directory .venv/x402-installed; fi
	@exec $(BIN)/gunicorn -c gunicorn.conf.py

# A file's tests share instances, so it stays in one process. Tests wait as much as they work.
AT_ONCE := -n 3 --dist loadfile --no-loadscope-reorder

# Hundreds of processes are started: they share what Python has compiled.
test torture: export PYTHONDONTWRITEBYTECODE :=

test: .venv/dev-installed $(NPM) $(LLAMA) $(PAYERS) ## every test that can run here
	@$(BIN)/python -m pytest $(AT_ONCE)

check: .venv/dev-installed .venv/x402-installed ## format, lint, types, as CI does
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: .venv/dev-installed ## Farebox beside a bare pass-through
	@$(BIN)/python bench/run.py
	@$(BIN)/python bench/streams.py
	@$(BIN)/python bench/ledger.py

bench-pages: .venv/dev-installed ## the dashboard over a million calls, beside an empty one
	@$(BIN)/python bench/pages.py

torture: .venv/dev-installed $(NPM) $(LLAMA) $(PAYERS) ## the long sizes of the race and crash tests
	@FAREBOX_TORTURE=1 $(BIN)/python -m pytest

lock: .venv/uv ## pin what runs and all it needs, by hash
	@for name in requirements requirements-x402; do \
		$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-header \
			--no-annotate --no-emit-index-url --quiet -o $$name.lock $$name.txt || exit; done

.venv/uv: requirements-dev.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) $$(grep '^uv==' requirements-dev.txt)
	@touch $@

.venv/installed: requirements.lock
	@test -n "$(PYTHON)" || { echo "Farebox needs Python 3.11 or later."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) --require-hashes -r requirements.lock
	@touch $@

.venv/x402-installed: requirements-x402.lock .venv/installed
	@$(PIP) --require-hashes -r requirements-x402.lock
	@touch $@

.venv/dev-installed: requirements-dev.txt .venv/installed
	@$(PIP) -r requirements-dev.txt
	@touch $@

# What cannot be installed here, the tests that need it are skipped.
tests/%/node_modules/.package-lock.json: tests/%/package.json tests/%/package-lock.json
	@if ! command -v npm >/dev/null; then \
		echo "npm is missing: the tests that need what is in tests/$* will be skipped."; \
	elif (cd tests/$* && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error \
		>/dev/null); then touch $@; \
	else echo "npm ci failed: the tests that need what is in tests/$* will be skipped."; fi

$(LLAMA): tests/llama/requirements.txt .venv/dev-installed
	@if $(PIP) --only-binary :all: \
		-r $< >/dev/null; then touch $@; \
	else echo "There is no llama.cpp for this machine: the tests that need it will be skipped."; fi

$(PAYERS): tests/x402/requirements.txt $(wildcard requirements-x402.txt) .venv/dev-installed
	@if $(PIP) --only-binary :all: \
		$(patsubst %,-r %,$(filter %.txt,$^)) >/dev/null; then touch $@; \
	else echo "The x402 client is not for this machine: the tests that need it will be skipped."; fi

clean: ## remove what make built; the instance folder stays
	@rm -rf .venv tests/*/node_modules .pytest_cache .mypy_cache .ruff_cache .hypothesis
