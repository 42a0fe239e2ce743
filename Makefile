# Every target does all the set-up it needs: a machine with python3 (3.11 to 3.13), make and a package index is enough.
PYTHON  ?= python3
VENV    ?= .venv
PROFILE ?= quick
BIN     := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup reproduce report readme export lint types test test-fast test-full lab

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(VENV)/.installed ## install everything into .venv, once

# torch comes first, in the version that constraints.txt names: a later resolver must find it there.
# With setuptools there too, no build needs an environment of its own.
$(VENV)/.installed: constraints.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), once (a minute or more)"
	@$(BIN)/python -m pip install -qq -c constraints.txt torch setuptools
	@$(BIN)/python -m pip install -qq -c constraints.txt --no-build-isolation -e ".[fast,arviz,report,dev]"
	@touch $@

reproduce: setup ## train what has no record, execute the notebooks, rebuild figures, tables and site (PROFILE=quick)
	@normflow-vi reproduce --profile $(PROFILE)

report: setup ## rebuild the site from the records there are, without training
	@normflow-vi report

export: setup ## after editing notebooks: format them, clean them, export the package
	@ruff check --select I --fix -q nbs tests benchmarks
	@ruff format -q nbs tests benchmarks
	@nbdev-clean
	@nbdev-export

lint: setup ## the form of notebooks, tests and benchmarks
	@ruff format --check -q nbs tests benchmarks
	@ruff check -q nbs tests benchmarks

types: setup ## what the annotations of the package promise
	@mypy

# pytest runs everything: the notebooks that explain, the tests, and the experiments' notebooks with the smoke profile.
test: lint types ## everything that can be checked in minutes
	@python -m pytest -q -n 2

test-fast: lint ## the quick tests alone: under a minute
	@python -m pytest -q -n 2 --fast

test-full: test ## the long forms of the tests, too
	@python -m pytest -q -n 2 -m full

readme: setup ## README.md from nbs/index.ipynb
	@python -c "from normflow_vi.reproduce.readme import write; print(write())"

lab: setup ## open the notebooks in Jupyter
	jupyter lab nbs
