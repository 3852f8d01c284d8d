# `make demo` and `make test` set up what they need; everything lives in .venv.

PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.11 python3.10,$(shell $(p) -c \
	'import sys; (3, 10) <= sys.version_info[:2] <= (3, 12) and print("$(p)")' 2>/dev/null)))
BIN := .venv/bin
READY := .venv/.ready
# On two cores two workers with one thread each are faster than one with two.
WORKERS ?= 2

.PHONY: setup demo test lint bench readme clean

setup: $(READY)

$(READY): pyproject.toml .ci/constraints.txt
	@test -n "$(PYTHON)" || { echo "slimbridge needs Python 3.10, 3.11 or 3.12; name one: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[all,dev]'
	@touch $(READY)

demo: setup
	@# The net is small: one thread is as fast as two, and stays so on a busy machine.
	OMP_NUM_THREADS=1 $(BIN)/slimbridge run digits --backend torch --backend paddle --output runs/demo --resume

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks

readme: setup
	$(BIN)/python -m slimbridge.support README.md

clean:
	rm -rf .venv runs build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
