# Every target makes what it needs; a second run is quick.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: test test-upstream lint docs clean

# The tests that need no checkout of slime.
test: $(VENV)/test
	$(BIN)/python -m pytest -m "not upstream"

# All tests, the real stack included (CONTRIBUTING.md says where the checkouts go).
test-upstream: $(VENV)/upstream
	$(BIN)/python -m pytest

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The generated pages: hook reference and patch ledger.
docs: $(VENV)/test
	$(BIN)/python -m miles_plugins.entrypoints.docs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/test: pyproject.toml tests/upstream-constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -c tests/upstream-constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c tests/upstream-constraints.txt -e ".[cpu,test,dev]"
	touch $@

$(VENV)/upstream: tests/upstream-requirements.txt tests/upstream-requirements-no-deps.txt $(VENV)/test
	$(BIN)/pip install --quiet -c tests/upstream-constraints.txt -r tests/upstream-requirements.txt
	$(BIN)/pip install --quiet -c tests/upstream-constraints.txt --no-deps -r tests/upstream-requirements-no-deps.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
