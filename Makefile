# All targets use .venv. The first one creates it.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo docs test test-all lint clean

demo: $(STAMP)
	$(BIN)/adflows demo

# the site, in build/site/index.html; it needs no server and no network
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# two processes, each with one module at a time; the slow tests of faults and kills need the machine for themselves
test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" --dist loadfile --tx "2*popen//python=$(BIN)/python -X warn_default_encoding"

test-all: $(STAMP)
	$(BIN)/python -X warn_default_encoding -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The target is the stamp, not the folder, so that an interrupted installation is repeated.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)
