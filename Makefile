# make setup | demo | test | test-fast | lint | docs
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: setup demo test test-fast lint docs

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# pip is silent for minutes or prints hundreds of lines; this shows one line a package, and whatever else it has to say
COUNT = awk '/^Collecting|^Requirement already/ { n++; printf "  [%3d] %s\n", n, $$1 == "Collecting" ? $$2 : $$3 == "satisfied:" ? $$4 : $$0; fflush(); next } \
	/^Installing collected/ { print "  installing ..."; fflush(); next } \
	/^(Looking in|WARNING: Location)/ { next } \
	/^ *(Downloading|Using cached|Preparing|Building|Created wheel|Stored in|Found existing|Attempting|Uninstalling|Successfully)/ { next } \
	{ print; fflush() }'

DEMO := $(BIN)/ftrun train recipe=qlora_sft data=needle data.heldout=0.35 select=superfiltering budget=0.5 \
	'eval=[heldout,generation]' eval.generation.rows=96 eval.generation.max_new_tokens=12 eval.generation.batch_size=32 \
	train.max_steps=30 train.batch_size=4 train.gradient_checkpointing=false adapter.r=16 optim.learning_rate=1e-3

setup: $(STAMP)

# made anew only when the lock or the project file changed
$(STAMP): requirements.lock pyproject.toml
	@echo "Setting up $(VENV) with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --progress-bar off "$$(grep '^torch==' requirements.lock)" 2>&1 | $(COUNT)
	@$(PIP) install --progress-bar off --no-deps -r requirements.lock 2>&1 | $(COUNT)
	@$(PIP) install --progress-bar off --no-deps --quiet --editable . 2>&1 | $(COUNT)
	@touch $@

demo: setup
	$(DEMO)

# two processes with one thread each beat one process with two on small models; a process that is done takes work from
# the other
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: setup
	$(PYTEST) $(ARGS)

# while working: without the real model, the recipe matrix, kills and several processes
test-fast: setup
	$(PYTEST) -m "not slow" $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache --no-logo

docs: setup
	$(BIN)/python scripts/make_docs.py
