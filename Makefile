# Two commands are enough: `make repro` and `make test`. Each makes the environment it needs.
VENV ?= .venv
PYTHON ?= python3
PRESET ?=
ONLY ?=
BASE ?= main
HEAD ?=
# What a caller names, such as a branch of somebody else, reaches the shell through the environment, as one quoted
# word: neither make nor the shell expands anything in it.
override PRESET := $(value PRESET)
override ONLY := $(value ONLY)
override BASE := $(value BASE)
override HEAD := $(value HEAD)
export PRESET ONLY BASE HEAD

BIN := $(VENV)/bin
STAMP := $(VENV)/installed-$(shell cat pyproject.toml .ci/constraints.txt | sha256sum | cut -c1-16)
# Stages and tests find the environment's programs first.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: venv repro test lint bench compat report clean
.DEFAULT_GOAL := repro

$(STAMP):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "StreetVision needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[dev]'
	rm -f $(VENV)/installed-*
	touch $@

venv: $(STAMP)  ## only the environment

repro: $(STAMP)  ## run the pipeline, optionally with a preset: make repro PRESET=smoke
	python -m streetvision repro $${PRESET:+--preset="$$PRESET"}

test: lint  ## lint, types and all tests
	OMP_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadgroup

lint: $(STAMP)
	ruff check .
	ruff format --check .
	mypy

bench: $(STAMP)  ## ratios against what one would pick instead: make bench ONLY=sweep
	python -m tests.benchmarks -- $${ONLY:+"$$ONLY"}

compat: $(STAMP)  ## the miner's detector in the subnet's environments, made once (6 GB of downloads): make compat ONLY=v0.4.1
	python -m tests.compat $${ONLY:+"$$ONLY"}

report: $(STAMP)  ## report/report.md, what a change does: make report BASE=main [HEAD=…]
	python -m streetvision report --plots -- "$$BASE" $${HEAD:+"$$HEAD"}

clean:  ## remove what can be made again; the DVC cache stays
	rm -rf data/raw data/splits data/embeddings data/quarantine.csv data/params.checked models/explora models/probe.manifest.json models/classifier models/cvfm models/policy models/bundle models/evaluate.manifest.json models/challenge.manifest.json models/headline.manifest.json metrics/plots/threshold_sweep.csv metrics/plots/mistakes.png
	rm -rf .streetvision .dvc/tmp/streetvision report .mypy_cache .ruff_cache .pytest_cache
