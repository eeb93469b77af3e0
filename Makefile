# The Edge of Stability companion. `make` lists what there is; CONTRIBUTING.md says when to use it.
# Nothing here installs system packages: it needs a Python (3.11 unless PYTHON= says otherwise), its venv, make.

PYTHON ?= python3.11
TORCH_INDEX ?=
# Notebooks executed at a time, each with one thread.
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Marks a complete build; it lies inside of what it vouches for, so that both are deleted together.
BOOK := _build/html/.complete

# All that the pages are made of. `eos book` looks again, by content, and skips what is up to date.
SOURCES := _config.yml _toc.yml pyproject.toml $(shell find book notebooks eos_utils experiments results bench/results -type f \
	-not -path '*/.*' -not -path '*/__pycache__/*' 2>/dev/null)

# Notebooks are executed two at a time, and a book page takes no heavy arithmetic: one thread each.
ONE_THREAD := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
# What pyproject.toml pins outside of the lock: $(call pinned,torch), $(call pinned,uv)
pinned = $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["tool"]["eos"]["$(1)"])')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help book test setup lint types unit smoke claims check browser pdf format record verify status faults lock clean distclean

help:  ## this list
	@echo "make book     the book, from nothing to _build/html/index.html"
	@echo "make test     everything that CI checks, the book included"
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / && $$1 !~ /^(book|test)$$/ { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "PYTHON=python3.12        another Python (3.11 to 3.13), for a new .venv"
	@echo "JOBS=4                   notebooks executed at a time (2)"
	@echo "TORCH_INDEX=<index>      also look for torch wheels there, such as CPU-only ones"

book: $(BOOK)  ## the book: set up, execute every notebook, build the pages
	@echo "The book: $(CURDIR)/_build/html/index.html"

test: lint types unit smoke $(BOOK) claims check browser  ## lint, types, unit tests, live notebooks, the book and its pages

setup: $(READY)  ## .venv with everything in it

# The stamp is the last thing written, so an interrupted set-up is taken up again.
$(READY): pyproject.toml requirements.lock
	@rm -f $@
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not installed." \
	  "Install it with its venv module (Debian, Ubuntu: apt install python3.11 python3.11-venv)," \
	  "or name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "make: $(PYTHON) is not a Python 3.11, 3.12 or 3.13; name one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) has no venv module." \
	  "Debian and Ubuntu have it apart: apt install python3.11-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements.lock
	$(BIN)/pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(call pinned,torch)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/pip check
	@touch $@

lint: $(READY)  ## ruff: style, likely bugs, format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy
	$(BIN)/mypy

unit: $(READY)  ## pytest: unit tests and doctests, on two cores
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2

smoke: $(READY)  ## a short live run of every notebook (CIFAR-10 where it is found, else digits)
	$(ONE_THREAD) $(BIN)/eos smoke --jobs $(JOBS)

$(BOOK): $(READY) $(SOURCES)
	$(ONE_THREAD) $(BIN)/eos book --jobs $(JOBS)
	@touch $@

claims: $(READY)  ## the recorded verdicts are those that the rules give
	$(BIN)/eos claims --check

check: $(BOOK)  ## links, anchors and alt text of the built pages
	$(BIN)/eos check

browser: $(BOOK)  ## the built pages in chromium, where there is one (EOS_REQUIRE_BROWSER=1: where there must be)
	$(BIN)/python -m pytest -n 2 tests/browser

pdf: $(BOOK)  ## the whole book as one PDF, printed by chromium
	$(BIN)/eos pdf

format: $(READY)  ## put source and notebooks in order: ruff, nbstripout
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbstripout notebooks/*.ipynb
	$(BIN)/python -m eos_utils.launch

status: $(READY)  ## which recorded runs are fresh, unverified, stale or missing, and why
	$(BIN)/eos status

record: $(READY)  ## compute the catalogue runs that have no record yet
	$(BIN)/eos record --missing

verify: $(READY)  ## replay the recorded runs where it matters
	$(BIN)/eos verify

faults: $(READY)  ## break things on purpose, hundreds of times, and record what happened (half an hour on two cores)
	$(ONE_THREAD) $(BIN)/eos faults

# uv, since it resolves for every platform and Python at once and does not read pip's configuration.
lock:  ## compile requirements.lock anew from pyproject.toml
	$(PYTHON) -m venv _build/uv
	_build/uv/bin/pip install --quiet $(call pinned,uv)
	_build/uv/bin/uv pip compile pyproject.toml --extra book --extra test --extra cluster --upgrade --quiet \
	  --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url \
	  --output-file requirements.lock

clean:  ## remove what was built and the caches; keeps .venv and results
	rm -rf _build .mypy_cache .pytest_cache .ruff_cache .hypothesis

distclean: clean  ## ... and .venv
	rm -rf $(VENV) *.egg-info
