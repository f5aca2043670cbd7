VENV ?= .venv
PY := $(VENV)/bin/python
export VENV

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit test-processes test-faults test-slurm test-serving test-gpu lint fmt bench clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup:  ## a virtual environment in .venv with everything in it
	@scripts/setup.sh

demo: setup  ## the whole loop on this CPU: a model learns while vLLM serves it
	$(PY) -m bridge.launch demo

test: setup  ## all rungs, cheapest first
	scripts/ladder.sh

test-unit: setup  ## pure logic, seconds
	scripts/ladder.sh unit

test-processes: setup  ## real processes, real Gloo, real signals
	scripts/ladder.sh process

test-faults: setup  ## kill, stall, corrupt
	scripts/ladder.sh faults

test-slurm: setup  ## batch scripts on a SLURM of four nodes, each a namespace
	scripts/ladder.sh slurm

test-gpu: setup  ## on a machine with a GPU and its vLLM
	scripts/ladder.sh gpu

test-serving: setup  ## a real vLLM with tiny models
	scripts/ladder.sh serving

lint: setup  ## ruff, mypy --strict, import rules, shellcheck
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/shellcheck slurm/*.sh slurm/*.sbatch scripts/*.sh .ci/run

fmt: setup  ## format and fix what can be fixed
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: setup  ## the benchmarks that need no GPU, one after the other (two hours)
	@set -e; for name in stall equality; do echo "=== $$name"; \
	  PYTHONPATH=tests $(PY) benchmarks/$$name.py --out benchmarks/results/$$name.json; done

clean:  ## remove caches and the virtual environment
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
