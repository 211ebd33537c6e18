# Every target sets up what it needs: the environment in .venv, the packages of constraints.txt in
# it, the compiled library beside the Python sources. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TEST_ARGS ?=
# Processes that share the tests, each at least a file; 0 runs them in pytest's own.
TEST_WORKERS ?= auto
BENCH_ARGS ?=
# A selection of one's own is no result to keep.
BENCH_JSON ?= $(if $(BENCH_ARGS),,benchmarks/results/cpu-$(shell date +%F).json)
DEMO_ARGS ?=
WHEEL_ARCHITECTURES ?= 8.0 8.6 8.9 9.0a 10.0 12.0+PTX
SANITIZE_TESTS ?= $(wildcard tests/test_depthwise_conv2d*.py tests/test_large_kernel_adapter*.py)

LIBRARY := lka_kernels/_C.abi3.so
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu')
HEADERS := $(shell find csrc -name '*.h' -o -name '*.cuh')
TEST_SOURCES := $(shell find tests -name '*.cpp' -o -name '*.h')

.PHONY: help demo test lint format bench wheel gpu gpu-sanitize sanitize install clean distclean
.DEFAULT_GOAL := help

help:
	@echo "make demo      generated cells: linear probe and adapters on a frozen backbone (DEMO_ARGS)"
	@echo "make test      the tests that need no GPU (TEST_ARGS, TEST_WORKERS)"
	@echo "make lint      ruff, and clang-format on C++ and CUDA"
	@echo "make format    apply both formatters"
	@echo "make bench     the CPU benchmarks, up to ten minutes (BENCH_ARGS, BENCH_JSON)"
	@echo "make wheel     dist/*.whl with CUDA code for $(WHEEL_ARCHITECTURES)"
	@echo "make gpu       the tests and benchmarks that need a GPU"
	@echo "make gpu-sanitize  small calls of the CUDA kernels under compute-sanitizer, on a GPU"
	@echo "make sanitize  the operator tests under AddressSanitizer and UBSan (SANITIZE_TESTS)"
	@echo "make install   .venv and the compiled library, which every target above makes itself"
	@echo "make clean     remove builds and caches; make distclean removes .venv too"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) LKA_NO_EXTENSION=1 FORCE_CUDA=0|1"

# --- environment ------------------------------------------------------------------------------

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"$(PYTHON) is Python {v[0]}.{v[1]};" \
	  " 3.10 or newer is needed: make PYTHON=...") if v < (3, 10) else None'
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# The editable install comes without the compiled library, which has a rule of its own.
$(VENV)/.packages: $(VENV)/.created pyproject.toml constraints.txt
	@echo "installing packages into $(VENV): some GB the first time"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  setuptools wheel
	@LKA_NO_EXTENSION=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt --no-build-isolation --editable '.[train,test,dev]'
	@touch $@

# build/ stays, so that ninja compiles only what changed.
$(LIBRARY): $(VENV)/.packages setup.py $(SOURCES) $(HEADERS)
	@command -v $${CXX:-c++} > /dev/null || { echo "no C++ compiler ($${CXX:-c++}): install one," \
	  "or set LKA_NO_EXTENSION=1 to run through plain PyTorch" >&2; exit 1; }
	@mkdir -p build
	@echo "compiling $(LIBRARY); log in build/compile.log"
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py build_ext --inplace \
	  > build/compile.log 2>&1 || { tail -n 60 build/compile.log >&2; exit 1; }
	@touch $@

ifeq ($(LKA_NO_EXTENSION),1)
install: $(VENV)/.packages
else
install: $(LIBRARY)
endif

# --- what to do with it -----------------------------------------------------------------------

demo: install
	@$(BIN)/python -m lka_kernels.train.demo $(DEMO_ARGS)

test: install
	@$(BIN)/python -m pytest -m "not gpu" -n $(TEST_WORKERS) --maxprocesses 4 --dist loadfile \
	  $(TEST_ARGS)

lint: $(VENV)/.packages
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(SOURCES) $(HEADERS) $(TEST_SOURCES)

format: $(VENV)/.packages
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(SOURCES) $(HEADERS) $(TEST_SOURCES)

# glibc gives large tensors back to the system when they are freed, and new pages cost as much as
# the convolution of a small kernel: keep them, to measure the latter. Its cache of small pieces
# (tcache) keeps blocks from growing together again: without it every call gets the same block.
bench: install
	@mkdir -p benchmarks/results
	@MALLOC_TRIM_THRESHOLD_=16000000000 MALLOC_MMAP_THRESHOLD_=8000000000 \
	  GLIBC_TUNABLES=glibc.malloc.tcache_count=0 \
	  $(BIN)/python -m pytest benchmarks/ --benchmark-only --bench-device cpu \
	  $(if $(BENCH_JSON),--benchmark-json $(BENCH_JSON)) $(BENCH_ARGS)

# By way of the source distribution, so that the wheel holds nothing that happens to lie around.
wheel: $(VENV)/.packages
	@mkdir -p build
	@echo "compiling for $(WHEEL_ARCHITECTURES); log in build/wheel.log"
	@FORCE_CUDA=$${FORCE_CUDA:-1} TORCH_CUDA_ARCH_LIST="$(WHEEL_ARCHITECTURES)" \
	  PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m build --no-isolation --outdir dist \
	  > build/wheel.log 2>&1 || { tail -n 60 build/wheel.log >&2; exit 1; }
	@ls -l dist/

# Compiling Triton's kernels takes most of the tests' time, and each process its own core; a process
# may take 20 GB of the GPU's memory for a while.
GPU_TEST_WORKERS ?= 6
gpu: install
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu: torch" \
	  " finds no CUDA device on this machine (torch " + torch.__version__ + "); make test needs none")'
	@$(BIN)/python -m pytest -m gpu tests -n $(GPU_TEST_WORKERS) $(TEST_ARGS)
	@mkdir -p benchmarks/results
	@name=$$($(BIN)/python -c 'import re, torch; \
	    print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))'); \
	  $(BIN)/python -m pytest benchmarks/ --benchmark-only --bench-device cuda \
	  --benchmark-json benchmarks/results/$$name-$(shell date +%F).json $(BENCH_ARGS)

# Without torch's cache of memory, in which what lies beyond a tensor is mostly another's.
GPU_SANITIZE_TESTS ?= tests/test_gpu_depthwise_small.py \
  tests/test_gpu_adapter.py::test_defined_cases
gpu-sanitize: install
	@for tool in memcheck initcheck racecheck synccheck; do \
	  echo "compute-sanitizer --tool $$tool"; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 \
	    $(BIN)/python -m pytest -m gpu $(GPU_SANITIZE_TESTS) -k "float16 or defined" $(TEST_ARGS) \
	    || exit 1; \
	done

# A second build beside the first, for the CPU. Python is not instrumented, so the sanitizer's
# library (and the C++ one, whose exceptions it intercepts) must be loaded before it.
SANITIZE_DIR := $(abspath build/sanitize)
sanitize: $(VENV)/.packages
	@test -n "$(SANITIZE_TESTS)" || { echo "make sanitize: no operator tests" >&2; exit 1; }
	@mkdir -p $(SANITIZE_DIR); rm -rf $(SANITIZE_DIR)/lib
	@echo "compiling into build/sanitize; log in build/sanitize/compile.log"
	@LKA_SANITIZE=1 FORCE_CUDA=0 PATH="$(abspath $(BIN)):$$PATH" \
	  $(BIN)/python setup.py build --build-base $(SANITIZE_DIR) --build-lib $(SANITIZE_DIR)/lib \
	  > $(SANITIZE_DIR)/compile.log 2>&1 || { tail -n 60 $(SANITIZE_DIR)/compile.log >&2; exit 1; }
	@nm -D $(SANITIZE_DIR)/lib/$(LIBRARY) | grep __asan_init > /dev/null
	@export LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  PYTHONPATH=$(SANITIZE_DIR)/lib; \
	  (cd build && $(abspath $(BIN))/python -c 'import sys, lka_kernels._C as c; \
	    sys.exit(not c.__file__.startswith(sys.argv[1]))' $(SANITIZE_DIR)); \
	  $(BIN)/pytest -p no:cacheprovider -m "not gpu" $(SANITIZE_TESTS) $(TEST_ARGS)

clean:
	rm -rf build dist $(LIBRARY) lka_kernels.egg-info .pytest_cache .ruff_cache \
	  .hypothesis .benchmarks
	find lka_kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
