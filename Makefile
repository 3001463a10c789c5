# kvfs. `make demo` shows it, `make test` checks it; both set up what they need first.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# pip writes into one virtual environment: recipes must not run side by side.
.NOTPARALLEL:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRACE ?=
PYTEST_ARGS ?=
SEEDS ?= 1000
FIRST ?= 0

# Tests start some thousand processes: no one is to compile all modules again.
export PYTHONDONTWRITEBYTECODE :=

# Tests wait more than they compute: two workers a core, up to eight.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 4 ? 2 * n : 8)))

# torch has a CPU wheel for Python 3.11 in the pinned version; on other versions pip would fetch a
# CUDA build of several GB, so there the tests that need torch skip.
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
comma := ,
TEST_EXTRAS := fuse,test$(if $(filter 3.11,$(PYTHON_VERSION)),$(comma)llm)

.PHONY: help setup demo demo-llm sim test test-mount test-only test-gpu sanitize-gpu lint format bench docs clean

help: ## Show these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(VENV)/.stamp-base ## Install missing system packages, create .venv

demo: setup ## Replay conversations through a real kvfs [TRACE=file.jsonl]
	$(BIN)/kvfs demo $(if $(TRACE),--trace "$(TRACE)")

demo-llm: $(VENV)/.stamp-llm ## A language model continues from a cache that another process filled
	$(BIN)/kvfs demo-llm

test: $(VENV)/.stamp-test lint test-only ## Lint, type check and run the tests

test-only: $(VENV)/.stamp-test ## Run the tests alone [WORKERS=4 PYTEST_ARGS=...]
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(PYTEST_ARGS)

sim: setup ## The cluster in virtual time, with faults, under many seeds [SEEDS=1000 FIRST=0]
	$(BIN)/python -m tests.sim --seeds $(SEEDS) --first $(FIRST) --keep-going

test-mount: $(VENV)/.stamp-test ## The mount for long: a million operations on files [SEED=1]
	KVFS_FILE_OPERATIONS=1000000 KVFS_FILE_SEED=$(or $(SEED),1) KVFS_MOUNT_EXAMPLES=500 \
		KVFS_MOUNT_LONG=1 $(BIN)/python -m pytest --timeout 0 \
		tests/t4_mount/test_file_checker.py tests/t4_mount/test_mount_model.py tests/t4_mount/test_mount_locks.py

lint: setup ## Style, format, types, import order
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: setup ## Rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-gpu: $(VENV)/.stamp-gpu ## Tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

sanitize-gpu: $(VENV)/.stamp-gpu ## The kernels under compute-sanitizer (of the CUDA toolkit)
	for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool --report-api-errors no --error-exitcode 9 \
	    $(BIN)/python -m pytest -m gpu tests/t7_gpu/test_cuda_copy.py $(PYTEST_ARGS) || exit 1; \
	done

bench: setup ## Measure against the machine's own limits
	$(BIN)/kvfs bench

docs: $(VENV)/.stamp-docs ## Build the documentation into site/
	$(BIN)/mkdocs build --strict --quiet

clean: ## Remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	scripts/system-packages.sh
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	    "kvfs needs Python 3.11 or newer, this is %d.%d: make PYTHON=/path/to/python3" % v[:2])'
	$(PYTHON) -m venv $(VENV)

# One stamp a set of extras: a second run costs nothing, a changed pyproject.toml installs again.
define install
scripts/system-packages.sh
$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[$(1)]'
touch $@
endef

$(VENV)/.stamp-base: pyproject.toml scripts/system-packages.sh | $(BIN)/python
	$(call install,fuse$(comma)test)

$(VENV)/.stamp-llm: $(VENV)/.stamp-base
	$(call install,fuse$(comma)test$(comma)llm)

$(VENV)/.stamp-test: $(VENV)/.stamp-base
	$(call install,$(TEST_EXTRAS))

$(VENV)/.stamp-docs: $(VENV)/.stamp-base
	$(call install,fuse$(comma)test$(comma)docs)

$(VENV)/.stamp-gpu: $(VENV)/.stamp-base
	$(call install,fuse$(comma)test$(comma)gpu)
