# Every target does its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -qq
BASE := $(VENV)/.base
DEV := $(VENV)/.dev
TRAIN := $(VENV)/.train
DOCS := $(VENV)/.docs

SECONDS ?= 60
SEED ?= 0

.PHONY: demo test test-serving check dist docs fuzz format clean

demo: $(BASE)  ## five policies compared on real workers, in a minute and a half
	$(BIN)/evenkeel demo --report evenkeel-demo.html

test: $(TRAIN)  ## the whole test suite, torch included, two tests at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-serving: $(DEV)  ## the light one: without torch, what needs it is skipped
	$(BIN)/python -m pytest

check: $(DEV)  ## lint, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

dist: $(DEV)  ## wheel and sdist in dist/, installed into an empty folder as the container image is, and started there
	rm -rf dist
	$(BIN)/python -m hatchling build -d dist
	$(BIN)/python scripts/check_dist.py dist

docs: $(DOCS)  ## the documentation, strictly, as a site in build/site; needs no network once it is set up
	$(BIN)/python scripts/build_docs.py build/site

fuzz: $(DEV)  ## broken requests, worker frames and remote replies, for SECONDS=60; SEED=n begins elsewhere
	OMP_NUM_THREADS=1 $(BIN)/python scripts/fuzz.py --seconds $(SECONDS) --seed $(SEED)

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist evenkeel-demo.html

# Debian's python3 cannot make a venv until python3-venv is installed: root gets it installed, others are told.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "evenkeel needs Python 3.11 or newer; say which with: make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); \
	  echo "Python cannot make a venv yet; installing python3-venv" >&2; \
	  { test "$$(id -u)" = 0 && apt-get -qq update && apt-get -qq install -y python3-venv >/dev/null \
	    && $(PYTHON) -m venv $(VENV); } \
	  || { rm -rf $(VENV); echo "that needs root: apt-get install python3-venv" >&2; exit 2; }; }

ifdef LOCKED  # make test LOCKED=1: every file that is installed has a hash that requirements.lock knows
$(BASE): pyproject.toml requirements.lock | $(VENV)/bin/python
	$(PIP) install --require-hashes -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(DEV) $(DOCS) $(TRAIN): $(BASE)
	@touch $@
else
$(BASE): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(DEV): $(BASE)
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

$(TRAIN): $(DEV)
	$(PIP) install -c constraints.txt -e '.[train]'
	@touch $@

$(DOCS): $(TRAIN)
	$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@
endif
