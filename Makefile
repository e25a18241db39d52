# The README's commands. Each sets itself up: a virtual environment in .venv, then the work.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= $(if $(filter Linux,$(shell uname -s)),triton>=3.6)
VENV ?= .venv
BIN := $(VENV)/bin
# Test processes side by side; they share the cores (tests/conftest.py). JOBS=0: all in one, for a debugger.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n > 8 ? 8 : n)))
# A worker begins with one stretch of the files, so what a file compiles once is seldom compiled twice, and takes tests
# over from the others when it is done: some files hold minutes.
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml Makefile | cksum | tr ' ' '-')

# Where torch 2.11 and 2.13 differ: Inductor's private API, Dynamo's graphs, Triton 3.6.
SEAM := tests/lowering tests/triton_templates tests/ops tests/passes tests/test_backend.py tests/test_backend_code.py \
	tests/test_backend_options.py tests/test_release.py tests/test_weights_state.py

.PHONY: help demo test test-quick test-browser test-torch211 test-seam assemble lint bench clean

help:
	@echo "make demo        quantize a trained digits DiT, compare pictures, speed and memory (viditq-demo/)"
	@echo "make test        the whole test suite, in as many processes as there are cores, 8 at most (JOBS=n for n)"
	@echo "make test-quick  the part without long compilations"
	@echo "make test-browser  the explain page in headless Chromium (needs chromium and chromedriver)"
	@echo "make test-torch211  the tests of the seam with torch, on torch 2.11 and Triton 3.6"
	@echo "make assemble    every Triton kernel for sm_80, 89, 90, 100: registers, spills, matrix instructions (no GPU)"
	@echo "make lint        ruff, pyright, import contracts"
	@echo "make bench       benchmarks/cpu.py: int8 against fp32 and the CPU peers"

# torch first and pinned: left to itself, pip takes the newest build, which may bring gigabytes of CUDA.
$(STAMP): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)" $(if $(TRITON),"$(TRITON)")
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	rm -f $(VENV)/.installed-*
	touch $@

demo: $(STAMP)
	$(BIN)/viditq demo

test: $(STAMP)
	$(PYTEST)

test-quick: $(STAMP)
	$(PYTEST) -m "not slow"

test-browser: $(STAMP)
	$(BIN)/python -m pip install --quiet -e ".[browser]"
	$(BIN)/python -m pytest -m browser -rs tests/browser

test-torch211:
	$(MAKE) VENV=.venv-torch211 TORCH=torch==2.11.0 TRITON="triton==3.6.*" test-seam

test-seam: $(STAMP)
	$(PYTEST) $(SEAM)

assemble: $(STAMP)
	PYTHONPATH=tests:. $(BIN)/python -W ignore -m nogpu.table

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet -e ".[bench]"
	$(BIN)/python benchmarks/cpu.py

clean:
	rm -rf $(VENV) .venv-torch211 viditq-demo build dist
