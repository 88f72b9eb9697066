# make pretrain | test | lint | setup        (CONFIG=..., NPROC=..., ARGS="key=value ...")
SHELL := /bin/bash
PYTHON ?= python3
CONFIG ?= training/configs/grid.yaml
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
GPUS := $(shell nvidia-smi -L 2>/dev/null | wc -l)
# One rank per GPU, two on a machine without; the demos' packs_per_step allows 1 and 2.
NPROC ?= $(if $(filter 1,$(GPUS)),1,2)
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup remote extras latest pretrain test test-fast chaos gpu-record kernel-checks \
  cuda-trace pictures lint clean

help:
	@echo "make pretrain   set up, then train and evaluate the demo (CONFIG=training/configs/digits.yaml"
	@echo "                for handwriting; NPROC=2; ARGS=\"train.steps=200\"); again: continues"
	@echo "make test       set up, then run all tests"
	@echo "make test-fast  set up, then run the tests that need one process, no cluster and no GPU"
	@echo "make chaos      ten faults of different kinds on a small run, about 3 minutes"
	@echo "make kernel-checks  run compiled kernels on the CPU, compile them with other Tritons"
	@echo "make cuda-trace trace forward and update with a CUDA build of torch (3 GB), without a GPU"
	@echo "make gpu-record measure all that needs a GPU, on this one; again: goes on with what is missing"
	@echo "make pictures   draw the pictures of the README again"
	@echo "make lint       ruff and mypy"
	@echo "make setup      only the virtual environment (VENV=.venv-3.13 PYTHON=python3.13: one more)"
	@echo "make remote     also the stores that s3:// and gs:// are tested with"
	@echo "make extras     environments beside it: demo page, lmms-eval, TRL, loggers, Liger, other transformers"
	@echo "make latest     an exported model with the newest transformers there is"

setup: $(VENV)/installed

$(VENV)/installed: requirements.txt
	@# The versions for which all of requirements.txt has builds (triton has none for a later one).
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || { \
	  echo "error: Python 3.11 to 3.14 is needed, found $$($(PYTHON) --version 2>&1); give another with PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq python3-venv; \
	  else echo "error: Python's venv module is missing; run: sudo apt-get install python3-venv"; exit 1; fi; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

remote: $(VENV)/remote-installed

$(VENV)/remote-installed: tests/requirements-remote.txt $(VENV)/installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r $<
	touch $@

# What only some tests need, on top of the packages of $(VENV): gradio; lmms-eval's evaluator; TRL;
# W&B, MLflow and trackio; Liger's kernels; the oldest and the newest transformers that an exported
# model is for.
EXTRAS := $(VENV)-demo $(VENV)-lmms $(VENV)-trl $(VENV)-loggers $(VENV)-liger \
  $(VENV)-transformers-oldest $(VENV)-transformers-newest
extras: $(EXTRAS:=/installed)

# Other versions of Triton, and a tool that runs compiled kernels on a CPU: half a GB to download.
CHECKS := $(VENV)-ttsem $(VENV)-triton36
$(VENV)-ttsem/installed: PIP_OPTIONS := --ignore-requires-python
kernel-checks: $(CHECKS:=/installed)
	REQUIRE_KERNEL_CHECKS=1 $(PY) -m pytest -q tests/kernels/test_sanitized.py \
	  tests/kernels/test_other_tritons.py $(ARGS)

# A CUDA build of torch in place of the one of $(VENV), on a machine without a GPU: 3 GB installed.
$(VENV)-cuda/installed: PIP_OPTIONS := --ignore-installed
cuda-trace: $(VENV)-cuda/installed
	REQUIRE_CUDA_TRACE=1 $(PY) -m pytest -q tests/training/test_cuda_trace.py $(ARGS)

$(VENV)-%/installed: tests/environments/%.txt $(VENV)/installed
	$(PY) -m venv --clear $(VENV)-$*
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$(echo $(VENV)-$*/lib/python*/site-packages)/main.pth
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  $(PIP_OPTIONS) -r $<
	touch $@

# Whether an exported model works with the newest transformers there is, whatever was tested.
$(VENV)-transformers-latest/installed: PIP_OPTIONS := --ignore-installed
latest: setup
	rm -f $(VENV)-transformers-latest/installed
	@$(MAKE) --no-print-directory $(VENV)-transformers-latest/installed
	TRANSFORMERS_LATEST=1 REQUIRE_EXTRAS=1 $(PY) -m pytest -q tests/training/test_releases.py -k latest

pretrain: setup
	$(PY) -m torch.distributed.run --standalone --nproc-per-node $(NPROC) -m training.train $(CONFIG) $(ARGS)

test: setup
	@$(MAKE) --no-print-directory extras || [ "$$REQUIRE_EXTRAS" != 1 ]
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  bash tests/slurm/install.sh; bash tests/install_chromium.sh || true; fi
	@bash tests/run_all.sh $(PY) $(ARGS)

test-fast: setup
	$(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile \
	  -m "not (multiprocess or slurm or gpu)" $(ARGS)

chaos: setup
	$(PY) -m tests.training.chaos $(ARGS)

# Without set-up: an image for GPUs brings its own torch (PYTHON=python3.12 chooses).
gpu-record:
	$(or $(wildcard $(PY)),$(PYTHON)) -m training.gpu_record $(ARGS)

pictures: setup
	$(PY) -m docs.make_pictures

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(EXTRAS) $(CHECKS) $(VENV)-cuda $(VENV)-transformers-latest data runs logs
