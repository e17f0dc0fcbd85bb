# `make demo` and `make test` work on a fresh clone: they make .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_FLAGS ?=

.PHONY: demo test lint bench format clean

# The constraints name the versions this project was tested with; torch first, so that a CPU build that is at hand
# is taken instead of the newest CUDA one.
$(VENV)/.installed: pyproject.toml constraints.txt outrider/server/torch_engine/kernels.c
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,math,tensorboard]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/outrider demo $(DEMO_FLAGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python bench/staleness.py

clean:
	rm -rf $(VENV) build outrider.egg-info outrider-demo
