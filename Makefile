# Two commands for a stranger: `make demo` and `make test`. Each makes the environment it needs.
PYTHON ?= python3
TORCH := 2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := -c requirements/constraints.txt

.PHONY: env demo test test-deep check format bench conformance docs clean

env: $(VENV)/.dev

demo: $(VENV)/.core
	rm -rf runs/demo
	OMP_NUM_THREADS=1 $(BIN)/attar run examples/few_labels.yaml --run runs/demo

# One thread a process: tiny models gain nothing from more, and results then do not depend on it.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-deep: $(VENV)/.dev .venv-tensorflow/.done
	OMP_NUM_THREADS=1 ATTAR_DEEP=1 $(BIN)/python -m pytest -n 2 -m ""
	OMP_NUM_THREADS=1 .venv-tensorflow/bin/python -m pytest tests/teachers/test_tensorflow.py
	OMP_NUM_THREADS=1 KERAS_BACKEND=torch .venv-tensorflow/bin/python -m pytest tests/test_examples.py -k keras

check: $(VENV)/.dev
	$(BIN)/ruff format --check src tests benchmarks examples docs/make_losses.py
	$(BIN)/ruff check src tests benchmarks examples docs/make_losses.py
	$(BIN)/mypy
	$(BIN)/python docs/make_losses.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.dev
	$(BIN)/ruff format src tests benchmarks examples docs/make_losses.py
	$(BIN)/ruff check --fix src tests benchmarks examples docs/make_losses.py

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

bench: .venv-bench/.done
	OMP_NUM_THREADS=1 .venv-bench/bin/python benchmarks/loop.py --check
	OMP_NUM_THREADS=1 .venv-bench/bin/python benchmarks/features.py --check
	OMP_NUM_THREADS=1 .venv-bench/bin/python benchmarks/taps.py --check
	OMP_NUM_THREADS=1 .venv-bench/bin/python benchmarks/cached_steps.py --check
	OMP_NUM_THREADS=1 .venv-bench/bin/python benchmarks/cache.py --check
	OMP_NUM_THREADS=1 .venv-bench/bin/python benchmarks/vocabulary_loss.py --check

conformance: .venv-conformance/.done
	OMP_NUM_THREADS=1 .venv-conformance/bin/python benchmarks/conformance.py --check

clean:
	rm -rf $(VENV) .venv-bench .venv-conformance .venv-tensorflow site build dist src/*.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "attar needs Python 3.11 or newer; say which with PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The CPU build of torch where the package index has one; else the plain build.
$(VENV)/.core: pyproject.toml requirements/constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet $(CONSTRAINTS) "torch==$(TORCH)+cpu" || \
	    $(PIP) install $(CONSTRAINTS) "torch==$(TORCH)"
	$(PIP) install --quiet $(CONSTRAINTS) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) install --quiet $(CONSTRAINTS) --editable ".[dev]"
	touch $@

.venv-bench/.done: requirements/bench.txt pyproject.toml
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet "torch==$(TORCH)+cpu" || \
	    .venv-bench/bin/python -m pip install "torch==$(TORCH)"
	.venv-bench/bin/python -m pip install --quiet $(CONSTRAINTS) --requirement requirements/bench.txt --editable .
	.venv-bench/bin/python -m pip install --quiet --no-deps torchdistill==1.1.5 mlxtend==0.25.0 \
	    mosaicml-streaming==0.13.0 trl==1.16.0 liger-kernel==0.8.5 torchtune==0.6.1
	touch $@

# Nothing here may bring torchvision, torchaudio or another build of torch.
.venv-conformance/.done: requirements/conformance.txt pyproject.toml
	$(PYTHON) -m venv .venv-conformance
	.venv-conformance/bin/python -m pip install --quiet "torch==$(TORCH)+cpu" || \
	    .venv-conformance/bin/python -m pip install "torch==$(TORCH)"
	.venv-conformance/bin/python -m pip install --quiet $(CONSTRAINTS) \
	    --requirement requirements/conformance.txt --editable .
	.venv-conformance/bin/python -m pip install --quiet --no-deps torchdistill==1.1.5 keras==3.15.1 \
	    trl==1.16.0 torchtune==0.6.1 nvidia-modelopt==0.47.0
	touch $@

.venv-tensorflow/.done: requirements/tensorflow.txt pyproject.toml
	$(PYTHON) -m venv .venv-tensorflow
	.venv-tensorflow/bin/python -m pip install --quiet "torch==$(TORCH)+cpu" || \
	    .venv-tensorflow/bin/python -m pip install "torch==$(TORCH)"
	.venv-tensorflow/bin/python -m pip install --quiet --requirement requirements/tensorflow.txt --editable .
	touch $@
