# make demo   from nothing to a finished run on the bundled sample
# make test   everything a change must pass
# make clean  removes the virtual environment
#
# The default torch of PyPI for Linux is a CUDA build of several GB. For the small CPU build:
#   make demo TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
BUDGET ?= 8000

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
SOURCES := pyproject.toml .ci/constraints.txt

.PHONY: demo test clean

demo: $(VENV)/.installed
	$(BIN)/bbprompt tune --task lcqmc --budget $(BUDGET)

test: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

clean:
	rm -rf $(VENV)

$(VENV)/.torch: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_ARGS) "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch
	$(PIP) --constraint .ci/constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch
	$(PIP) --constraint .ci/constraints.txt --editable ".[dev]"
	touch $@
