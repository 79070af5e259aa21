# make train   virtual environment, dependencies, data, then a two-rank training job (under torchx)
# make test    the same environment, then the whole test suite
# make test-gpu   the tests that need a GPU (make test skips them where there is none)
# make lint    ruff, mypy, shellcheck  make data    the generated data set of the quick start
# make docs    the documentation site in build/site; a warning is an error
# make env     the environment alone
#
# Settings, as in `make train NPROC=4`:
#   PYTHON    the interpreter the environment is made from (3.11 or newer)
#   VENV      where the environment goes
#   DEVICE    cpu or cuda; found by asking nvidia-smi
#   TORCH     2.13.0 or 2.11.0: which of the supported version sets (launch/version_set.py)
#   PIP_ARGS  passed to every `pip install`, for an index or a wheel folder of your own
#   RECIPE, NPROC, ROWS  of `make train` and `make data` (ranks: one a GPU, or 2)
#   TEST_WORKERS, PYTEST_ARGS  of `make test`: files of tests run side by side, as many as workers
PYTHON ?= python3
VENV ?= .venv
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
TORCH ?= 2.13.0
PIP_ARGS ?=
RECIPE ?= launch/recipes/quickstart.toml
NPROC ?= $(if $(filter cuda,$(DEVICE)),$(shell nvidia-smi -L | grep -c ^GPU),2)
ROWS ?= 1000000
# Tests of killed ranks and lost hosts mostly wait, so two workers pay even on two cores.
TEST_WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
DATA := datasets/quickstart
# The stamp's name holds all that the environment depends on, so any change of it asks for a new installation.
KEY := $(DEVICE)-$(TORCH)-$(shell cat setup.cfg launch/version_set.py | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.papilio-stamp-$(KEY)
MADE_HERE := $(VENV)/.papilio-made-here

.PHONY: train test test-gpu lint env data docs
.DEFAULT_GOAL := train
.DELETE_ON_ERROR:

train: env data
	PATH="$(abspath $(BIN)):$$PATH" torchx --log_level WARNING run -s local_cwd launch/components.py:train --recipe $(RECIPE) --nproc $(NPROC)

test: env
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# One after the other: they share the GPU.
test-gpu: $(if $(filter cuda,$(DEVICE)),env)
	@$(if $(filter cuda,$(DEVICE)),$(BIN)/python -m pytest -m gpu -rs $(PYTEST_ARGS),\
	  echo "make: test-gpu needs a GPU: nvidia-smi lists none here, so nothing was tested (DEVICE=cuda tries all the same)")

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/schedulers/slurm/job.sh launch/schedulers/slurm/host.sh

docs: env
	$(BIN)/mkdocs build --quiet --strict

data: env $(DATA)/manifest.json

# The manifest is written last: without it the data set is not complete and generating goes on.
$(DATA)/manifest.json: | $(STAMP)
	$(BIN)/papilio generate --shape criteo_small --rows $(ROWS) --output $(DATA)

env: $(STAMP)

# An environment that was begun here and not finished, or made here for another device or version set, is made anew; any other
# is brought up to date in place.
$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make: $(PYTHON) is not Python 3.11 or newer; name one that is: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@if [ -e $(MADE_HERE) ] && ! ls $(VENV)/.papilio-stamp-$(DEVICE)-$(TORCH)-* >/dev/null 2>&1; then rm -rf $(VENV); fi
	@if [ ! -e $(VENV)/pyvenv.cfg ]; then mkdir -p $(VENV) && touch $(MADE_HERE); fi
	@rm -f $(VENV)/.papilio-stamp-*
	@echo "make: installing torch $(TORCH) for $(DEVICE) and the rest into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) $$($(PYTHON) launch/version_set.py $(DEVICE) --torch $(TORCH))
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --editable ".[dev]"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps $$($(PYTHON) launch/version_set.py $(DEVICE) --torch $(TORCH) --no-deps)
	PATH="$(abspath $(BIN)):$$PATH" papilio doctor
	@touch $@
