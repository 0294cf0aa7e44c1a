# `make demo` and `make test` work by themselves with nothing but Python 3.10 or newer, pip and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := pyproject.toml constraints.txt
# Stamps: an extra is installed again only when the pins have changed since.
DEMO := $(VENV)/.installed-demo
DEV := $(VENV)/.installed-dev

.PHONY: help demo test coverage lint types bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    install into $(VENV) and run the demonstration"
	@echo "make test    install into $(VENV), check style and types, run the tests"
	@echo "make coverage  the tests again, and which lines they ran: takes twice as long"
	@echo "make bench   time joint networks against separate ones, in PyTorch and ONNX Runtime: twenty minutes"
	@echo "make lint    ruff only"
	@echo "make types   mypy only"
	@echo "make clean   remove builds and caches ($(VENV) and runs/ stay)"
	@echo "PYTHON=...   the Python to use, now $(PYTHON)"

demo: $(DEMO)
	$(BIN)/taskzip demo

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# By itself: torch.export calls so many functions that tracing them doubles the time of the tests.
coverage: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --cov --cov-report=term

# On one thread, so that other work on the machine disturbs less.
bench: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/joint_forward.py

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(DEV)
	$(BIN)/mypy

clean:
	rm -rf build dist htmlcov coverage.xml .coverage .coverage.* src/*.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Editable, so that the demonstration too runs the sources as they are now.
$(DEMO): $(PINS)
	$(make-venv)
	$(BIN)/python -m pip install -e '.[demo]' -c constraints.txt
	@touch $@

# dev contains demo, so both stamps are fresh afterwards.
$(DEV): $(PINS)
	$(make-venv)
	$(BIN)/python -m pip install -e '.[dev]' -c constraints.txt
	@touch $(DEMO) $@

# Tests for pip rather than for the folder: an interrupted `python -m venv` leaves a folder without pip.
define make-venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	echo "taskzip needs Python 3.10 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1): name another one, such as make PYTHON=python3.11" >&2; \
	exit 1; }
@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
endef
