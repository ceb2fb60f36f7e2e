# Every command sets itself up: the first one on a fresh machine makes .venv here and installs the pinned
# packages, and a later one does so again only when pyproject.toml or constraints.txt has changed.

PYTHON  ?= python3
JOBS    ?= 2
PROFILE ?= default
TIMEOUT := $(if $(filter nightly,$(PROFILE)),3600,300)
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo demo-ranks test check format golden bench docs vendor clean

help:  ## Print this list
	@echo "usage: make <command>"
	@sed -n 's/^\([a-z-]*\):.*  ## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(READY)  ## The main job: compile a GPT into a PR-MoE, train it, sample from it (about 5 minutes)
	$(BIN)/python -m examples.demo

demo-ranks: $(READY)  ## The same PR-MoE on 2 and 4 ranks of this machine: progress, loads, traffic (about 2 minutes)
	$(BIN)/python -m examples.demo_ranks

test: $(READY)  ## All tests that need no GPU (PROFILE=nightly: many more examples; JOBS=2 processes)
	$(BIN)/python -m pytest -n $(JOBS) --hypothesis-profile=$(PROFILE) --timeout=$(TIMEOUT)

check: $(READY)  ## Lint, format, types, and the layer test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

format: $(READY)  ## Put the sources into the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(READY)  ## Rewrite tests/golden and pages from what is printed now; read the diff before committing it
	MOEC_GOLDEN=1 $(BIN)/python -m pytest -q -m golden
	@git --no-pager diff --stat -- tests/golden docs README.md

bench: $(READY)  ## Run the benchmarks and record them in benchmarks/results
	$(BIN)/python -m benchmarks.layer
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.paper_contrast
	$(BIN)/python -m benchmarks.ranks

docs: $(READY)  ## Build the documents as static pages: site/index.html (two minutes: their programs are compiled)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

vendor: $(READY)  ## Fetch the libraries that the page carries, as moec/view/page/vendor/vendored.json lists them (npm)
	$(BIN)/python -m moec.view.vendored

clean:  ## Remove build outputs and caches; .venv and runs/ stay
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find moec passes runtime tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: asked for by its pinned version, pip takes a CPU build where it can see one.
$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "moec needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
