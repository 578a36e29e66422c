# Every target that needs Python sets up .venv by itself; .venv/.stamp says when that was last done.

PYTHON ?= python3
# Threads of a CPU run. More than the machine has cores makes everything slower.
THREADS ?= 2
# Processes that share the tests, each with one thread: one per core.
WORKERS ?= $(THREADS)
VENV := .venv
STAMP := $(VENV)/.stamp
BIN := $(VENV)/bin
LIMIT_THREADS := OMP_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS)
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup test test-quick lint demo docs vbench-env teacher benchmark clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install fewstep with the tested versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "fewstep needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; say which: make setup PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

test: $(STAMP) ## run all tests (CPU is enough)
	$(PYTEST)

test-quick: $(STAMP) ## run the tests that are quick, in under three minutes
	$(PYTEST) -m "not slow and not gpu"

lint: $(STAMP) ## ruff check, ruff format --check, pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright -p .typing

demo: $(STAMP) ## distil the embedded teacher on this machine and open the result with stock diffusers
	$(LIMIT_THREADS) $(BIN)/python scripts/demo.py

docs: $(STAMP) ## build/site: README, docs and a reference of all public names, with every link checked
	$(BIN)/python scripts/build_site.py

vbench-env: ## make .venv-vbench, VBench's own environment for scripts/evaluate_video.py score
	@test -x .venv-vbench/bin/python || $(PYTHON) -m venv .venv-vbench
	.venv-vbench/bin/python -m pip install --quiet -r evaluation/vbench/requirements.txt
	@.venv-vbench/bin/python -c 'import importlib.util as u, pathlib; print("--vbench_root", pathlib.Path(u.find_spec("vbench").origin).parent)'

teacher: $(STAMP) ## train the embedded digits teacher again
	$(LIMIT_THREADS) $(BIN)/python scripts/make_digits_teacher.py

benchmark: $(STAMP) ## measure the cost of a training step and write the record
	$(LIMIT_THREADS) $(BIN)/python scripts/benchmark_training_step.py --threads $(THREADS)

clean: ## remove build products and caches; .venv and runs/ stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -print | xargs rm -rf
