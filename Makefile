# Every command a user or a developer needs; `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
CACHE ?= $(HOME)/.cache/qlora-operator
export UV_CACHE_DIR ?= $(CACHE)/uv
# Where this is set and no bytecode lies beside the libraries, every process of the tests compiles torch anew: 20 seconds.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
BIN := .venv/bin
LOCKS := requirements/operator.txt requirements/trainer.txt requirements/cli.txt requirements/build.txt
# One file at a time on every core, and one thread for torch: more would only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --dist loadfile
UNIT := tests/unit tests/golden tests/contract
# Tests on clusters wait more than they compute: two processes more than cores. tests/lanes.py has what stays together.
LANES := $(shell echo $$(( $$(nproc) < 8 ? $$(nproc) + 2 : 10 )))

.PHONY: help setup lock audit generate check test unit integration e2e chaos fuzz mutants bench-trainer bench-plan bench-memory bench-checkpoints bench-families bench-preparation bench-short-answers bench-scale bench-fleet gpu docs demo cluster cluster-down

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: .venv/.installed ## make .venv from the hashed requirement files

.venv/.installed: requirements/dev.txt requirements/build.txt pyproject.toml
	@test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet --require-hashes -r requirements/build.txt; }
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements/dev.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --build-constraints requirements/build.txt --editable .
	@touch $@

lock: ## compile the hashed requirement files anew; UPGRADE=--upgrade takes newer releases
	@test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet --require-hashes -r requirements/build.txt; }
	$(BIN)/python requirements/compile.py $(UPGRADE)

audit: setup ## look up known vulnerabilities of every locked package outside development (asks a database on the network)
	$(BIN)/pip-audit --strict --disable-pip $(LOCKS:%=--requirement=%)

generate: setup ## write the CRD, its copy in the chart, the RBAC rules and the references from the code
	$(BIN)/python -m qlora_codegen

check: setup ## lint, types, import rules, generated files (a minute the first time, then seconds)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/python -m qlora_codegen --check

test: export QLORA_TESTS_BEGAN := $(shell date +%s)
test: setup ## every test: unit, browser (Chromium), integration (real control plane), e2e (real node)
	$(BIN)/python -m tests.cluster build --node --controllers
	$(PYTEST) --numprocesses $(LANES) $(UNIT) tests/browser tests/integration tests/chaos tests/e2e

unit: setup ## the tests that need no cluster (about 5 minutes on 2 cores)
	$(PYTEST) --numprocesses auto --maxprocesses 8 $(UNIT)

integration: setup ## the tests on a real control plane
	$(BIN)/python -m tests.cluster build --controllers
	$(BIN)/pytest tests/integration

e2e: setup ## the tests on a real node (root on Debian, or QLORA_TEST_KUBECONFIG)
	$(BIN)/python -m tests.cluster build --node
	$(BIN)/pytest tests/e2e

chaos: setup ## every fault of docs/reliability.md in full, and the page's table from it (up to an hour)
	$(BIN)/python -m tests.cluster build --node --controllers
	$(BIN)/pytest -m promise tests/chaos tests/integration --chaos full --durations=0 --durations-min=5

FUZZ_MINUTES ?= 60
fuzz: setup ## readers of foreign data with random files and messages, until FUZZ_MINUTES (60) are over
	end=$$(( $$(date +%s) + 60 * $(FUZZ_MINUTES) )); while (( $$(date +%s) < end )); do \
	  $(PYTEST) --numprocesses auto --hypothesis-profile fuzz tests/unit/security/test_fuzz_*.py || exit 1; done

mutants: setup ## take out the fix of every trap in turn and show that its test fails (minutes); TRAPS="8 29" chooses
	$(BIN)/python -m tests.mutants $(TRAPS)

bench-plan: setup ## how long `qlora plan` takes on 20 public models (10 seconds)
	$(BIN)/python -m benchmarks.plan

bench-trainer: setup ## the trainer against TRL and a common tutorial on this CPU (about 8 minutes; nothing else should run)
	$(BIN)/python -m benchmarks.trainer

bench-memory: setup ## predicted against measured memory of training steps on this CPU (5 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.memory

bench-checkpoints: setup ## how long a training waits for its checkpoints in S3 (3 minutes)
	$(BIN)/python -m benchmarks.checkpoints

bench-families: setup ## every causal architecture of transformers as a tiny model through a whole run (hours; continues where it was stopped)
	$(BIN)/python -W ignore -m benchmarks.families

bench-preparation: setup ## how many rows a second a preparation reads, renders and tokenizes (2 minutes)
	$(BIN)/python -m benchmarks.preparation

bench-short-answers: setup ## 320 runs with answers of one to three words, each of which must be published (20 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.short_answers

bench-scale: setup ## 10,000 QLoRAJobs and JobSet beside them on a real control plane (26 minutes; nothing else should run)
	$(BIN)/python -m benchmarks.scale

bench-fleet: setup ## what broken nodes cost a simulated fleet, in virtual time (a minute)
	$(BIN)/python -m benchmarks.fleet

bench-progress: setup ## what a flood of the progress endpoint costs the operator's own calls (half a minute)
	$(BIN)/python -m benchmarks.progress_flood

gpu: setup ## bench-trainer on a GPU, with the shapes of Llama-3.2-3B and Llama-3.1-8B and random weights
	$(BIN)/python -m benchmarks.trainer --device cuda

docs: setup ## build the site of docs/ into out/site, without a warning (seconds)
	$(BIN)/python -m docs.site

demo: setup ## train, evaluate and publish the quickstart's adapter on this computer
	$(BIN)/python -m examples.quickstart.demo

cluster: setup ## start a real cluster on this machine and print its KUBECONFIG
	$(BIN)/python -m tests.cluster up --node

cluster-down: setup ## remove everything that `make cluster` made
	$(BIN)/python -m tests.cluster down
