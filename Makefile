# Every target works on a machine with Python 3.11, make and pip, and reuses what is there.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
OUT ?= demo_out
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types unit bench format clean

help:  ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: .venv/user  ## create .venv and install what a user needs

demo: .venv/user  ## the whole pipeline on real text: about 5 minutes, report in demo_out/
	$(BIN)/colossal-llama demo --out $(OUT)

test: lint types unit  ## lint, types and all tests

lint: .venv/developer  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/developer  ## mypy
	$(BIN)/mypy

unit: .venv/developer  ## pytest
	$(BIN)/pytest -q --durations=10

bench: .venv/user  ## the benchmarks that need no data; each prints a table
	for script in benchmarks/cpu_*.py; do $(BIN)/python $$script || exit 1; done

format: .venv/developer  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and what the demo left
	rm -rf .venv $(OUT)

# The venv is made without pip and filled by the pip outside it, so that a Python without
# ensurepip (Debian's without python3-venv) is enough.
.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv --without-pip .venv
	$(PYTHON) -m pip --python .venv/bin/python install pip

.venv/user: .venv/bin/python requirements.txt requirements-no-deps.txt pyproject.toml
	@echo 'installing into .venv: about 1.7 GB on disk, one to five minutes'
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps -r requirements-no-deps.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	touch $@

.venv/developer: .venv/user requirements-dev.txt
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@
