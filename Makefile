# The only entry point: CI calls these targets too. A fresh machine needs Python 3.11 or newer and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 8000
FIXTURES ?= tests/fixtures
STAMP := $(VENV)/.installed

.PHONY: help install check format test test-full demo serve bench bench-models bench-judge bench-wait bench-rl hacking-demo parity shapes-weights judge-weights policy-weights k8s-check clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*?## ' $(MAKEFILE_LIST) | awk -F ':.*?## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml trainer_client/pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev,demo,policy]' --editable './trainer_client[train]'
	@touch $@

install: $(STAMP)  ## create .venv with everything

check: $(STAMP)  ## ruff and strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff format and mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(STAMP)  ## the tests (minutes); GPU, Docker and long ones are skipped with a reason
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu and not docker" $(ARGS)

test-full: $(STAMP)  ## all tests that this machine can run
	$(BIN)/python -m pytest $(ARGS)

demo: $(STAMP)  ## score and compare real pictures over HTTP; leaves demo/report.html
	$(BIN)/python -m benchmarks.demo

serve: $(STAMP)  ## start the service with the embedded models (PORT=8000)
	$(BIN)/reward-service serve --port $(PORT)

bench: $(STAMP)  ## throughput over the offline limit, overload, exactness: ratios in one run
	$(BIN)/python -m benchmarks.bench $(ARGS)

bench-models: $(STAMP)  ## images per second of every reward model at its true size (random weights; half an hour)
	$(BIN)/python -m benchmarks.reward_models $(ARGS)

bench-judge: $(STAMP)  ## comparisons cached and adaptive, against one by one (a quiet machine; minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.judge $(ARGS)

bench-wait: $(STAMP)  ## what a remote reward costs a training step (minutes)
	$(BIN)/python -m benchmarks.training.reward_wait $(ARGS)

bench-rl: $(STAMP)  ## Flow-GRPO, DiffusionNFT, Pref-GRPO and ReFL from one start, three seeds (half an hour on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.training.rl $(ARGS)

hacking-demo: $(STAMP)  ## two flawed rewards, trained on without the guard and with it; leaves demo/hacking.html
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.hacking $(ARGS)

parity: $(STAMP)  ## put a folder of oracle numbers through the product (FIXTURES=DIR; FULL=1: true-size models too)
	$(BIN)/python -m benchmarks.parity $(FIXTURES) $(if $(FULL),--full)

shapes-weights: $(STAMP)  ## train shapes-clip again (deterministic, under 45 minutes on 2 cores)
	$(BIN)/python -m models.shapes.train_clip

judge-weights: $(STAMP)  ## train shapes-judge again (deterministic, under 90 minutes on 2 cores)
	$(BIN)/python -m models.shapes.train_judge

policy-weights: $(STAMP)  ## train the shapes policy again (deterministic, under 90 minutes on 2 cores; resumes)
	$(BIN)/python -m pip install --quiet --editable '.[policy]'
	$(BIN)/python -m models.shapes.train_policy

k8s-check: $(STAMP)  ## render every overlay and validate it against the Kubernetes schemas
	$(BIN)/python -m k8s.check

clean:  ## remove what the other targets made
	rm -rf $(VENV) build demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
