# What people type and what CI runs. `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A process for each core, up to four: each takes a gigabyte and more.
WORKERS := --numprocesses auto --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-all matrix soak check format clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

install: $(STAMP)  ## make the virtual environment .venv with everything

demo: $(STAMP)  ## digits: float baseline, QAT, int8, and a table (under 90 s)
	$(BIN)/python examples/demo.py

test: $(STAMP) check  ## lint, types and the fast tests
	$(BIN)/python -m pytest $(WORKERS)

test-slow: $(STAMP)  ## the slow tests
	$(BIN)/python -m pytest $(WORKERS) -m "slow and not gpu"

test-all: test test-slow  ## every test that needs no GPU

matrix: $(STAMP)  ## the fast tests on other versions of Python and PyTorch (6 GB each, hours)
	$(BIN)/python -m tests.matrix

soak: $(STAMP)  ## kill runs at a hundred moments, and compare what resume=auto ends with (15 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak

check: $(STAMP)  ## ruff, the layers of imports, and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the commands above made
	rm -rf $(VENV) build dist outputs multirun *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
