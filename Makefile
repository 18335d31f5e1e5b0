# make demo   the whole main job on the embedded data set      make test   the fast tests
# Both create the environment first; a second run does not install again.
#   VENV=DIR         use or create this environment; one that was not made here is used as it is, nothing is installed
#   TORCH_INDEX=URL  index for torch alone, e.g. https://download.pytorch.org/whl/cu130 or .../whl/cpu
#   WHEELHOUSE=DIR   install from this folder of wheels, without network
#   PYTHON=python3.12

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
WHEELHOUSE ?=
TEST_MINUTES ?= 60
ARGS ?=

TORCH := torch==2.13.0
PY := $(VENV)/bin/python
STAMP := $(VENV)/.eventlens-installed
MADE := $(VENV)/.made-by-eventlens
PIP_FLAGS := $(if $(WHEELHOUSE),--no-index --find-links $(WHEELHOUSE))
TORCH_FLAGS := $(if $(WHEELHOUSE),,$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)))

export PATH := $(abspath $(VENV))/bin:$(PATH)
export DS_BUILD_OPS := 0
# The tests set TRITON_INTERPRET=1 unless told otherwise.
GPU := HF_HUB_OFFLINE=1 TRITON_INTERPRET=0 DS_ACCELERATOR=cuda
BENCH_GPU := --device cuda --compiled headline --case-seconds 1
RESULTS := eventlens_ds/bench/results
PYTEST := DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest

.PHONY: install csrc demo world-small ablation lion-demo lion-ablation lcl-demo test test-slow check gate gpu clean

install: $(STAMP)

# An environment with this file was made here; any other belongs to the user and is only checked.
$(STAMP): pyproject.toml setup.py constraints.txt
	@if [ -x "$(PY)" ] && [ ! -e "$(MADE)" ]; then \
	  "$(PY)" -c 'import eventlens_ds.config.load, deepspeed, transformers, pytest' >/dev/null 2>&1 || { \
	    echo 'make: $(VENV) was not made here and lacks packages; in it run: pip install -e ".[dev]" -c constraints.txt' >&2; exit 2; }; \
	else \
	  command -v "$(PYTHON)" >/dev/null || { echo "make: $(PYTHON) not found; Python >= 3.11 is needed (PYTHON=...)" >&2; exit 2; }; \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "make: $$("$(PYTHON)" --version) is too old; Python >= 3.11 is needed (PYTHON=python3.11)" >&2; exit 2; }; \
	  "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "make: $(PYTHON) has no venv module (Debian: apt-get install python3-venv)" >&2; exit 2; }; \
	  [ -x "$(PY)" ] || "$(PYTHON)" -m venv "$(VENV)"; \
	  touch "$(MADE)"; \
	  export PIP_CONSTRAINT="$(abspath constraints.txt)"; \
	  "$(PY)" -m pip install -q $(PIP_FLAGS) $(TORCH_FLAGS) "$(TORCH)"; \
	  "$(PY)" -m pip install -q $(PIP_FLAGS) "setuptools>=77" wheel; \
	  "$(PY)" -m pip install -q $(PIP_FLAGS) --no-build-isolation -e ".[dev]"; \
	fi
	@touch "$(STAMP)" 2>/dev/null || true  # a shared environment may be read-only

# The C++ and CUDA extension again, after a change in csrc/ (EVENTLENS_BUILD_CUDA=auto|0|1, see setup.py).
csrc: $(STAMP)
	$(PY) setup.py build_ext --inplace

demo: $(STAMP)
	$(PY) -m eventlens_ds.launch.demo $(ARGS)

# Larger and harder than the demo, 2 cores and about an hour; the same command goes on after an interruption.
world-small: $(STAMP)
	$(PY) -m eventlens_ds.launch.world_small $(ARGS)

ablation: $(STAMP)
	$(PY) -m eventlens_ds.launch.ablation $(ARGS)

# LION's four stages on the embedded world, against one stage and against no router; the same command goes on after an
# interruption. lion-ablation: three seeds, more steps.
lion-demo: $(STAMP)
	$(PY) -m eventlens_ds.launch.lion_demo $(ARGS)

lion-ablation: $(STAMP)
	$(PY) -m eventlens_ds.launch.lion_ablation $(ARGS)

# Link-Context Learning on creatures that training never shows; the same command goes on after an interruption.
lcl-demo: $(STAMP)
	$(PY) -m eventlens_ds.launch.lcl_demo $(ARGS)

test: $(STAMP)
	timeout --kill-after=30 $(TEST_MINUTES)m env $(PYTEST) -m "not slow and not gpu" $(ARGS)

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not gpu" $(ARGS)

# On a machine with a GPU: its tests, then every kernel table, in less than ten minutes.
gpu: $(STAMP)
	$(GPU) timeout 240 $(PY) -m pytest -m gpu $(ARGS)
	$(GPU) $(PY) -m eventlens_ds bench roi_align $(BENCH_GPU) --minutes 2.5 --out $(RESULTS)/roi_align.csv
	$(GPU) $(PY) -m eventlens_ds bench moa $(BENCH_GPU) --minutes 2 --out $(RESULTS)/moa.csv
	$(PY) -m eventlens_ds bench report

# Compiles every Triton kernel for sm_80 and sm_90 without a GPU; refuses spills; writes the table in docs/KERNELS.md.
gate: $(STAMP)
	$(PY) -m eventlens_ds.ops.aot --docs docs/KERNELS.md

check: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find eventlens_ds tests -name __pycache__ -prune -exec rm -rf {} +
