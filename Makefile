# Everything runs in .venv, which is set up on first use. In ARGS, quote for the shell: ARGS="'sampling.stop=[a b]'".
VENV ?= .venv
READY := $(VENV)/.ready
comma := ,
DEMO := runs/demo
EXTRAS := dev$(if $(wildcard /proc/driver/nvidia/version /dev/nvidiactl),$(comma)cuda)
export PYTHON := $(abspath $(VENV))/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench preflight slurm lint docs clean pp2 pp4 dp2 tp2 pp2dp2 pp2tp2

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9 ]+:.*## / { printf "  %-30s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## make .venv with the pinned dependencies, FlashInfer where there is an NVIDIA GPU (needs Python 3.11 or later)

$(READY): constraints.txt pyproject.toml
	@for python in python3 python3.14 python3.13 python3.12 python3.11 none; do \
		$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	done; \
	if [ $$python = none ]; then echo "no Python 3.11 or later found on PATH" >&2; exit 1; fi; \
	$$python -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(READY)  ## two pipeline stages on the CPU answer 500 sums the shipped model never saw; prints how many are right
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	@$(PYTHON) -m spmd.demo.prompts write $(DEMO)/in.jsonl
	@set -f; launch/local.sh topology=pp2 model=demo device=cpu run_dir=$(DEMO) input=$(DEMO)/in.jsonl \
		output=$(DEMO)/out.jsonl sampling.max_tokens=8 sampling.temperature=0 $(value ARGS)
	@$(PYTHON) -m spmd.demo.prompts score $(DEMO)/in.jsonl $(DEMO)/out.jsonl

test: $(READY)  ## run the tests, on two cores; with ARGS those it tells pytest, on one
	@$(PYTHON) -m pytest $(if $(value ARGS),$(value ARGS),-n 2 --dist loadfile)

bench: $(READY)  ## measure a synthetic workload: make bench ARGS="workload=cpu topology=pp2 model.path=DIR"
	@set -f; launch/local.sh --prog bench $(value ARGS)

preflight: $(READY)  ## check a configuration and its files without starting it: make preflight ARGS="topology=pp4 model.path=DIR"
	@set -f; launch/local.sh --prog preflight $(value ARGS)

# What stands on the command line besides ARGS is an option of launch/submit.py.
slurm: $(READY)  ## submit to SLURM: make slurm NODES=2 GPUS=8 TIME=04:00:00 ARGS="topology.pp=16 …"; DRY_RUN=1 only prints
	@set -f; PYTHONPATH=. $(PYTHON) launch/submit.py $(JOB) $(value ARGS)
slurm: JOB = $(foreach v,$(filter-out ARGS VENV PYTHON,$(.VARIABLES)),$(if $(filter command,$(origin $v)),'$v=$(subst ','\'',$(value $v))'))

lint: $(READY)  ## format, lint, types, and that imports point downward
	@$(PYTHON) -m ruff format --check --quiet .
	@$(PYTHON) -m ruff check --quiet .
	@$(PYTHON) -m mypy
	@$(PYTHON) -m pytest tests/test_imports.py

docs: $(READY)  ## make docs/configuration.md from the schema
	@$(PYTHON) -m spmd.runtime.configuration_page > docs/configuration.md

pp2 pp4 dp2 tp2 pp2dp2 pp2tp2: $(READY)  ## run on such a topology: make pp2 ARGS="model.path=DIR input=in.jsonl output=out.jsonl"
	@set -f; launch/local.sh topology=$@ $(value ARGS)

clean:  ## remove .venv, caches and the demo's files; results of runs stay
	rm -rf .venv $(DEMO) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
