# Every target sets itself up: a fresh machine needs Python 3.11+, git and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test check clean docs docs/cli.md

setup: .venv/installed

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sidecache needs Python 3.11 or newer; this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/sidecache demo

# Tests alone; `make check` is what runs before anything lands.
test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# The documents as a site, in site/index.html.
docs: .venv/documented
	$(BIN)/mkdocs build --strict --quiet

.venv/documented: setup.cfg pyproject.toml | setup
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

docs/cli.md: setup
	$(BIN)/python -c 'import cli, pipeline.terminal.reference as r; print(r.reference(cli.main), end="")' > $@

clean:
	rm -rf .venv build site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
