# Every target does all the set-up it needs: a machine with python3 (3.11 to 3.13), make and a package index is enough.
PYTHON  ?= python3
VENV    ?= .venv
PROFILE ?= quick
BIN     := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup reproduce test test-full report readme lab

setup: $(VENV)/.installed

# torch comes first, in the version that constraints.txt names: a later resolver must find it there. With setuptools there too, no build needs an environment of its own.
$(VENV)/.installed: constraints.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), once (a minute or more)"
	@$(BIN)/python -m pip install -qq -c constraints.txt torch setuptools
	@$(BIN)/python -m pip install -qq -c constraints.txt --no-build-isolation -e ".[fast,arviz,report,dev]"
	@touch $@

reproduce: setup
	@normflow-vi reproduce --profile $(PROFILE)

report: setup
	@normflow-vi report

# pytest runs everything: the notebooks that explain, the tests, and the experiments' notebooks with the smoke profile.
test: setup
	@python -m pytest -q -n 2

test-full: test
	@python -m pytest -q -n 2 -m full

readme: setup
	@python -c "from normflow_vi.reproduce.readme import write; print(write())"

lab: setup
	jupyter lab nbs
