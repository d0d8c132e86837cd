# `make demo` and `make test` need nothing but Python 3.11 or newer (with venv) and make.
# `make PYTHON=/path/to/python ...` chooses another interpreter, VENV=... another environment, WORKERS=... how many
# processes run the tests.

VENV ?= .venv
WORKERS ?= 2
CANDIDATES := python3 python3.13 python3.12 python3.11
PYTHON ?= $(shell for candidate in $(CANDIDATES); do \
	if $$candidate -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	then echo $$candidate; break; fi; done)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --prefer-binary --no-compile

# What the demo asks its three checkpoints.
QUESTIONS := "What is laksa?" "Apa nama danau terbesar di Sumatra?" "Apa ibu kota provinsi Bali?"

# The tests of a file share what they compile, so a file stays in one process; tests/conftest.py orders the files.
SIDE_BY_SIDE := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint format clean

help:
	@echo "make demo       pre-train, tune and align a tiny model, and ask all three: some three minutes on two cores"
	@echo "make test       every test, slow ones too"
	@echo "make test-fast  the tests that take no more than a few seconds each"
	@echo "make lint       ruff, pyright, and the layers of the package"
	@echo "make format     rewrite the code in the project's style"
	@echo "make clean      remove the environment and what was built"

demo: $(VENV)/installed
	$(BIN)/python -m sealion_jax.train cpt_tiny
	$(BIN)/python -m sealion_jax.train sft_tiny
	$(BIN)/python -m sealion_jax.train dpo_tiny
	@echo
	@echo "The three side by side (four million parameters and three minutes of training babble):"
	@echo
	$(BIN)/python -m sealion_jax.generate runs/cpt_tiny runs/sft_tiny runs/dpo_tiny --format chat \
		--max-new-tokens 40 --prompt $(QUESTIONS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-fast: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

lint: $(VENV)/installed-dev build/import_names
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { \
		echo "error: no Python 3.11 or newer with venv found (tried: $(CANDIDATES)); give one: make PYTHON=..." >&2; \
		exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[dev,hf,peers]'
	@touch $@ $(VENV)/installed

# The folders under the names that they are imported by, for tools that only read files.
build/import_names:
	mkdir -p $@
	ln -sfn ../../kernels $@/sealion_kernels
	ln -sfn ../../configs $@/sealion_configs
