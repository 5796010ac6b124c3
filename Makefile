# Everything a person needs, each from a bare checkout: `make demo`, `make test`. The rest is for those who change code.
# Needs: GNU make, Python 3.11 or newer with venv, and a package index that pip can reach. No compiler: all that is not
# ours is installed from wheels.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))

# The demo's choices: make demo STEPS=100 SEED=1
MODEL ?= smollm2
TASK ?=
STEPS ?=
SEED ?= 0
DEMO_OPTIONS = --model $(MODEL) --seed $(SEED) $(if $(TASK),--task $(TASK)) $(if $(STEPS),--steps $(STEPS))

# More options for pytest: make test ARGS="-k discovery -x"; WORKERS=0 runs the tests in this process, one by one.
ARGS ?=
WORKERS ?= 2
# Tests never reach for the network, and give the same result each time.
TEST_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONHASHSEED=0

.PHONY: help demo docs docs-serve test test-fast test-slow lint format venv clean

help:  ## Show the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: $(STAMP)  ## Train a real model on a real task (MODEL, TASK, STEPS and SEED can be set).
	@TOKENIZERS_PARALLELISM=false $(BIN)/python examples/demo/run.py $(DEMO_OPTIONS)

test: $(STAMP)  ## Run the tests of the core and of every plugin, except the slow ones.
	@$(TEST_ENV) $(BIN)/python -m pytest -m "not slow" --numprocesses $(WORKERS) --dist loadfile $(ARGS)

test-fast: $(STAMP)  ## The same, the last failures first, and stop at the first failure.
	@$(MAKE) --no-print-directory test ARGS='--failed-first --exitfirst $(ARGS)'

test-slow: $(STAMP)  ## Run only the slow tests.
	@$(TEST_ENV) $(BIN)/python -m pytest -m slow --numprocesses $(WORKERS) --dist loadfile $(ARGS) || [ $$? = 5 ]  # 5: there is none

lint: $(STAMP)  ## Check style, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Rewrite the files in the project's style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The variable silences a notice of the theme about a later mkdocs.
docs: $(STAMP)  ## Build the documentation as a site, into site/; a warning is an error.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean

docs-serve: $(STAMP)  ## Show the documentation at http://127.0.0.1:8000, and build it anew when a page changes.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --livereload

venv: $(STAMP)  ## Only set up .venv; the other targets do it themselves.

# Done again when a declared dependency changes, or when it was cut off. PYTHON names the Python to make it with.
$(STAMP): pyproject.toml constraints.txt tools/set_up.py $(PLUGINS:%=%/pyproject.toml)
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        exec "$$python" -I tools/set_up.py --venv "$(VENV)" --python "$(PYTHON)"; \
	    fi; \
	done; \
	echo "trl-core needs Python 3.11 or newer, and none was found." >&2; \
	echo "  To mend: install one, and name it if it is not called python3: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; \
	exit 1

clean:  ## Remove .venv, caches and build products.
	rm -rf $(VENV) .cache build dist .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
