# make demo   from nothing to a finished run on the bundled sample
# make test   everything a change must pass
# make promises, make promises-nightly, make promises-release
#             what is promised about kills, power cuts, budgets and foreign bytes, tested in three depths; a report of
#             each in reports/
# make planted  plants known bugs one by one and sees that the tests turn red
# make audit  asks the public advisories about every locked version
# make servers  brings NVIDIA Triton and MLServer for the tests that need them; without them these are skipped
# make clean  removes the virtual environment
#
# The default torch of PyPI for Linux is a CUDA build of several GB. For the small CPU build:
#   make demo TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
BUDGET ?= 8000
METHOD ?= mp2-proto
SEED ?= 1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
SOURCES := pyproject.toml .ci/run.lock .ci/dev.lock
# Nothing is built or run that the lock has no digest of; torch alone is taken by its version, its build being a choice.
LOCKED := --require-hashes --no-deps --requirement

.PHONY: demo test promises promises-nightly promises-release planted audit servers clean

demo: $(VENV)/.installed
	$(BIN)/bbprompt tune --task lcqmc --method $(METHOD) --budget $(BUDGET)

test: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -rs

promises: TIER := commit
promises-nightly: TIER := nightly
promises-release: TIER := release
promises promises-nightly promises-release: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/promises.py $(TIER) --seed $(SEED) --report reports/promises-$(TIER)-$(SEED).txt

planted: $(VENV)/.installed-dev
	$(BIN)/python -m tests.planted

audit:
	$(PYTHON) -m venv .audit
	.audit/bin/python -m pip --disable-pip-version-check install --quiet pip-audit
	.audit/bin/pip-audit --strict --disable-pip --require-hashes --requirement .ci/dev.lock

servers: $(VENV)/.installed-dev
	PYTHON=$(BIN)/python timeout 180 tests/servers/triton.sh || echo "no Triton: its tests are skipped"
	PYTHON=$(BIN)/python timeout 300 tests/servers/mlserver.sh || echo "no MLServer: its tests are skipped"

clean:
	rm -rf $(VENV) .servers .audit

$(VENV)/.torch: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_ARGS) "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch
	$(PIP) $(LOCKED) .ci/run.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch
	$(PIP) $(LOCKED) .ci/dev.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@
