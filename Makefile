# Two commands, each from a bare clone with Python 3.11 or newer, an internet connection and nothing else:
#   make demo    install, caption the example videos with the tiny demo pair, show the rows
#   make test    install with the development tools, and run every check
#   make test-all    the same with all combinations of parameters and the long runs
#   make docs        build the documentation as a site in build/site
# `make PYTHON=/path/to/python demo` chooses the interpreter.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: demo test test-all checks docs clean

demo: .venv/installed
	rm -rf demo-out
	$(BIN)/specvlm caption examples/videos --preset demo --baseline-sample 1.0 -o demo-out
	$(BIN)/python examples/read_captions.py demo-out

# Three processes keep two cores busy, as many tests wait. worksteal: each process gets one stretch of the tests, so a
# module's fixtures are rarely built twice.
test-all: export PYTEST_ADDOPTS = -m "not gpu"
test test-all: checks docs
	$(BIN)/python -m pytest -W error -n 3 --dist worksteal

checks: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "specvlm needs Python 3.11 or newer; try: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

clean:
	rm -rf .venv demo-out .mypy_cache .ruff_cache .pytest_cache
