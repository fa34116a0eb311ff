# Every target makes what it needs; a second run is quick.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# torch, and its CPU build, which is much smaller, where the index has one under that name.
TORCH ?= torch==2.13.0
TORCH_CPU ?= torch==2.13.0+cpu
# What works together on Python 3.11; on another, `make PIN= …` takes what pyproject.toml admits.
PIN ?= -c tests/upstream-constraints.txt

.PHONY: quickstart test test-upstream lint fingerprints docs clean

# The main job on any machine: a small trainer of our own, no slime, with routing replay; two minutes on two cores.
quickstart: $(VENV)/embedded
	$(BIN)/slime-train --embedded --plugins r3

# Files of tests are shared out among two processes; `make test JOBS=1` for one.
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# The tests that need no checkout of slime.
test: $(VENV)/test
	$(PYTEST) -m "not upstream"
	@echo "not run: the tests of the real stack; clone slime and Megatron-LM (CONTRIBUTING.md), then: make test-upstream"

# All tests, the real stack included (CONTRIBUTING.md says where the checkouts go).
test-upstream: $(VENV)/upstream
	$(PYTEST)

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What upstream's releases are known by (docs/verify.md): from the clones, and wheels of the package index.
fingerprints: $(VENV)/test
	$(BIN)/python -m tests.fingerprints

# The generated pages: hook reference, patch ledger and supported stacks.
docs: $(VENV)/test
	$(BIN)/python -m miles_plugins.entrypoints.docs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/embedded: pyproject.toml tests/upstream-constraints.txt | $(VENV)/bin/python
	@echo "installing torch and what the embedded host needs into $(VENV), once"
	@$(BIN)/pip install --quiet $(PIN) "$(TORCH_CPU)" 2>/dev/null || { \
		echo "the package index has no $(TORCH_CPU); taking $(TORCH), which may be some GB larger"; \
		$(BIN)/pip install --quiet $(PIN) "$(TORCH)"; }
	@$(BIN)/pip install --quiet $(PIN) -e ".[embedded]"
	@touch $@

$(VENV)/test: $(VENV)/embedded
	@echo "installing what the tests need into $(VENV), once"
	@$(BIN)/pip install --quiet $(PIN) -e ".[embedded,cpu,test,dev]"
	@touch $@

$(VENV)/upstream: tests/upstream-requirements.txt tests/upstream-requirements-no-deps.txt $(VENV)/test
	$(BIN)/pip install --quiet $(PIN) -r tests/upstream-requirements.txt
	$(BIN)/pip install --quiet $(PIN) --no-deps -r tests/upstream-requirements-no-deps.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
