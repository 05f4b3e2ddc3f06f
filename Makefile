# make demo, make test: on a fresh machine with python 3.11 or newer and make. VENV=DIR uses another environment.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
TOOLS ?= $(VENV)
CONSTRAINTS ?= $(CURDIR)/constraints.txt
ARGS ?=
BIN := $(abspath $(VENV))/bin
TOOLS_BIN := $(abspath $(TOOLS))/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint schemas bench constraints clean

help:
	@echo "make demo      install into $(VENV) and run the demo (results in runs/demo)"
	@echo "make test      install with the test extra and run the tests (ARGS='-k sll' is passed on to pytest)"
	@echo "make lint      ruff, the layers of the packages, and pyright"
	@echo "make schemas   write schemas/*.schema.json"
	@echo "make bench     run the benchmarks"
	@echo "make constraints   write constraints.txt: the newest versions, to be tested before they are committed"
	@echo "make clean     remove what was built (make clean-all: also $(VENV) and runs/)"

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "python 3.11 or newer is needed (make PYTHON=/path/to/python)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp for each set of extras: installed again when pyproject.toml or constraints.txt changes, and only then. Of versions
# known to be good: CONSTRAINTS=/dev/null takes the newest.
define install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e "$(1)"
	@touch $@
endef

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,.)

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,.[test])

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,.[dev])

demo: $(VENV)/.installed
	$(BIN)/lipconvert demo --out runs/demo $(ARGS)

# Run from tests/ and with a safe path, here and in processes the tests start: what is imported is what is installed.
test: $(VENV)/.installed-test
	@cd tests && PYTHONSAFEPATH=1 $(BIN)/python -m pytest -n auto $(ARGS)

lint: $(TOOLS)/.installed-dev
	$(TOOLS_BIN)/ruff check .
	$(TOOLS_BIN)/ruff format --check .
	PYTHONPATH=$(CURDIR):$(CURDIR)/plugins $(TOOLS_BIN)/lint-imports --no-cache
	$(TOOLS_BIN)/pyright --pythonpath $(BIN)/python

schemas: $(VENV)/.installed
	$(BIN)/python -P -c "from lipconvert.schema import main; main('schemas')"

bench: $(VENV)/.installed-test
	$(BIN)/python -P benchmarks/forward.py
	$(BIN)/python -P benchmarks/against_reference.py $(ARGS)
	$(BIN)/python -P benchmarks/scaling.py --quick

# All extras into an environment of its own, where nothing else is; comments at the top stay.
constraints:
	rm -rf build/constraints
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install --quiet --disable-pip-version-check ".[dev,attack,tensorboard]"
	sed -n '/^#/p' constraints.txt > build/constraints.txt
	build/constraints/bin/python -m pip freeze --all --exclude pip --exclude lipconvert >> build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/constraints

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis tests/.hypothesis
	rm -rf examples/*/build examples/*/*.egg-info
	find lipconvert plugins tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: clean-all
clean-all: clean
	rm -rf $(VENV) runs
