# Everything runs in .venv, which `setup` makes on a fresh machine and leaves alone while it is up to date.
# PYTHON is the interpreter it is made from: `make PYTHON=python3.12 test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test test-fast check format gpu clean

help:
	@echo "make demo    train a tiny GPT under every strategy and compare the books"
	@echo "make test    run the tests, in three processes"
	@echo "make test-fast  only those that take no ranks and no more than a few seconds"
	@echo "make check   lint, formatting, types"
	@echo "make format  rewrite the sources in ruff's format"
	@echo "make gpu     measure on a GPU, as long as 8 minutes allow (again: it goes on): kernels, books, step times."
	@echo "             Sets nothing up: .venv, or without one the machine's $(PYTHON) and its torch. ARGS='--minutes 15'"
	@echo "make setup   only make the environment in .venv"
	@echo "make clean   remove the environment, builds and caches (runs/ and data/ stay)"

setup:
	@command -v $(PYTHON) >/dev/null || { echo "There is no '$(PYTHON)' here: install Python 3.11, 3.12 or 3.13, or name it, e.g. make PYTHON=python3.12 test"; exit 1; }
	@$(PYTHON) scripts/setup.py

demo: setup
	$(BIN)/python -m shardrun compare

# Three processes on two cores: many tests wait, for a time limit or for one rank. What is left is shared out again.
test: setup
	$(BIN)/python -m pytest -n 3 --dist worksteal

test-fast: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not ranks and not slow"

check: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: setup
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# Not after `setup`: a rented machine has its own torch, and often no network.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
