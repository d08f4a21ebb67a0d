# Everything a user or a continuous-integration job needs; `make help` lists it.
# Paths are relative, so that a checkout whose path has spaces works.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

VENV   := .venv
PYTHON := $(VENV)/bin/python
SOURCES := $(shell find coordinator/contract coordinator/migrate vcpu blockd -name '*.[ch]' -o -name '*.inc' -o -name '*.tab' \
             -o -name 'build_*.py' -o -name 'optable*.py')

# Options for the demo, the benchmark and pytest, e.g. make demo ARGS="--keep folder"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup pieces demo test bench lint fast boots models differential clean
.NOTPARALLEL:

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.built pieces ## virtual environment, C extensions, guest pieces from Debian

$(VENV)/.installed: pyproject.toml setup.py .ci/prepare
	@python=$$(.ci/prepare) && echo "[setup] virtual environment with $$python" && \
	  "$$python" -m venv $(VENV)
	@echo "[setup] Python packages and the C parts"
	@$(PYTHON) -m pip install --disable-pip-version-check -q --progress-bar off "setuptools>=77" "cffi>=1.15" wheel
	@$(PYTHON) -m pip install --disable-pip-version-check --progress-bar off --no-build-isolation \
	  -e '.[test]' | sed -n 's/^\(Collecting\|Building\|Successfully installed\) */[setup]   &/p'
	@$(PYTHON) -c 'import importlib.metadata as m; m.version("atoll")'
	@touch $@ $(VENV)/.fresh  # the installation has just compiled everything

$(VENV)/.built: $(SOURCES) | $(VENV)/.installed
	@if [ -e $(VENV)/.fresh ]; then rm $(VENV)/.fresh; else \
	  echo "[setup] compiling the C parts" && $(PYTHON) setup.py -q build_ext --inplace --force; fi
	@touch $@

pieces: | $(VENV)/.installed
	@$(PYTHON) -m coordinator.pieces >/dev/null

demo: setup ## boot Linux from an emulated CD-ROM with every part of the PC in its own process
	@$(PYTHON) -m tests.system.demo $(ARGS)

bench: setup ## native, QEMU TCG (where installed) and Atoll side by side
	@$(PYTHON) -m tests.system.bench $(ARGS)

test: setup ## linters, fast tests, then whole boots
	@$(MAKE) --no-print-directory lint fast boots

lint: setup ## ruff and mypy
	@echo "[test] ruff" && $(PYTHON) -m ruff check .
	@echo "[test] mypy" && $(PYTHON) -m mypy

fast: setup ## the fast tests alone
	@echo "[test] fast tests" && $(PYTHON) -m pytest -m "not boot" $(ARGS)

boots: setup ## the tests that boot whole guests
	@echo "[test] boots" && $(PYTHON) -m pytest -m boot $(ARGS)

models: ## model-check the arguments of docs/models (needs spin)
	@command -v spin >/dev/null || { echo "models: spin is missing: apt-get install spin" >&2; exit 1; }
	@for model in docs/models/*.pml; do \
	  folder=$$(mktemp -d) && cp "$$model" "$$folder/model.pml" && \
	  (cd "$$folder" && spin -a model.pml >/dev/null && gcc -O2 -w -o pan pan.c && ./pan -m100000 >out) && \
	  { grep -q 'errors: 0' "$$folder/out" || { cat "$$folder/out"; exit 1; }; } && \
	  echo "[models] $$model: $$(awk '/states, stored/ { print $$1 }' "$$folder/out") states, no errors" && rm -r "$$folder"; done

differential: setup ## instructions against the host's CPU, a million by default (ARGS="--cases 9000000 --seed 7")
	@$(PYTHON) -m tests.vcpu.differential $(ARGS)

clean: ## remove what was built (the cache of guest pieces stays)
	rm -rf $(VENV) build *.egg-info
	find coordinator vcpu devhost blockd -name '*.so' -delete
