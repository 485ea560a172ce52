# Everything a user does starts here; `make` alone lists it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

CORPUS ?= out/corpus
PIPELINE ?= pipelines/quickstart.yaml
SOURCES ?=
DEMO ?= out/demo
NUM_VIDEOS ?= 40
RECIPE ?= viclip_tiny
NUM_WORKERS ?= 1
EXTRAS ?= --extra ingest --extra train
Q ?=
ARGS ?=

PY := .venv/bin/python
READY := .venv/.ready
# A uv on the PATH, else one of our own in .tools: nothing is installed outside this folder.
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)

# Handed to the shell through the environment, so that quotes, spaces and dollars stay what they are.
# `value` keeps Make from expanding a dollar in them itself.
override CORPUS := $(value CORPUS)
override SOURCES := $(value SOURCES)
override Q := $(value Q)
export CORPUS PIPELINE SOURCES DEMO RECIPE Q

# Ray would rebuild the environment of `uv run` for every worker, and hang.
export RAY_ENABLE_UV_RUN_RUNTIME_ENV ?= 0

.PHONY: help setup ingest doctor prefetch plan annotate query verify pretrain test test-slow lint fix bench tiny-clip clean

help: ## list what can be made
	@echo "dataengine: from a list of videos to a captioned, queryable, trainable corpus"
	@echo
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14 | sed 's/^/  make /'
	@echo
	@echo "  settings: SOURCES=folder|file|glob|URL|list  CORPUS=$(CORPUS)  PIPELINE=$(PIPELINE)"
	@echo "            RECIPE=$(RECIPE)  Q='clip_score > 0.2'  ARGS='--limit 5'  RAY_ADDRESS=host:port"

setup: $(READY) ## install everything into .venv, from the lock

$(READY): pyproject.toml uv.lock
	@if [ ! -x "$(UV)" ]; then \
	  echo "uv is not here: installing it into .tools"; \
	  { python3 -m venv .tools && .tools/bin/python -m pip install -q uv; } \
	  || { rm -rf .tools && mkdir -p .tools/bin && python3 -m pip install -q --target .tools uv; } \
	  || curl -LsSf https://astral.sh/uv/install.sh | env UV_UNMANAGED_INSTALL=.tools/bin sh; \
	fi
	$(UV) sync -q --locked $(EXTRAS)
	@touch $(READY)

ingest: $(READY) ## bring SOURCES into CORPUS; without SOURCES, procedural demo videos
ifeq ($(strip $(value SOURCES)),)
	@$(PY) -m dataengine demo "$$DEMO" --num-videos $(NUM_VIDEOS)
	@$(PY) -m dataengine ingest "$$PIPELINE" --sources "$$DEMO/videos" --corpus "$$CORPUS" $(ARGS)
else
	@$(PY) -m dataengine ingest "$$PIPELINE" --sources "$$SOURCES" --corpus "$$CORPUS" $(ARGS)
endif

doctor: $(READY) ## say what PIPELINE needs that is not here, and what brings it
	@$(PY) -m dataengine doctor "$$PIPELINE" $(ARGS)

prefetch: $(READY) ## fetch all weights of PIPELINE
	@$(PY) -m dataengine prefetch "$$PIPELINE" $(ARGS)

plan: $(READY) ## run a sample of SOURCES, say what all of them would cost
	@$(PY) -m dataengine plan "$$PIPELINE" --sources "$$SOURCES" $(ARGS)

annotate: $(READY) ## run stages of PIPELINE again over CORPUS: make annotate ARGS="--stage score"
	@$(PY) -m dataengine annotate "$$CORPUS" --pipeline "$$PIPELINE" $(ARGS)

query: $(READY) ## look at clips: make query Q="language = 'en'" ARGS="--limit 5"
	@$(PY) -m dataengine query "$$CORPUS" "$$Q" $(ARGS)

verify: $(READY) ## check that CORPUS keeps its contract
	@$(PY) -m dataengine verify "$$CORPUS" $(ARGS)

pretrain: $(READY) ## train RECIPE on CORPUS; with RAY_ADDRESS, on NUM_WORKERS of its workers
	@$(PY) -m training "$$RECIPE" --data "$$CORPUS" $(if $(RAY_ADDRESS),--ray "$$RAY_ADDRESS" --num-workers $(NUM_WORKERS)) $(ARGS)

test: $(READY) ## the default tests
	@$(PY) -m pytest $(ARGS)

test-slow: $(READY) ## all tests, also those that take minutes
	@$(PY) -m pytest -m 'not gpu' $(ARGS)

lint: $(READY) ## ruff, pyright, yamllint and hadolint, as CI runs them
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/pyright
	@.venv/bin/yamllint .
	@.venv/bin/hadolint docker/Dockerfile docker/Dockerfile.gpu

fix: $(READY) ## let ruff mend what it can
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

bench: $(READY) ## the measurements behind docs/performance.md
	@$(PY) benchmarks/driver_memory.py
	@$(PY) benchmarks/clip_auc.py "$$CORPUS"

tiny-clip: $(READY) ## train the shipped tiny CLIP model again, from nothing
	@bash training/tiny_clip.sh

clean: ## remove what was made, also .venv
	rm -rf out .venv .tools .pytest_cache .ruff_cache
