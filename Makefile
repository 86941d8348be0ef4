# The front door: `make help`. Settings: PYTHON (to build .venv on), PORT, BASE_URL, VERSION, TARGET, IMAGE, JOBS, MODEL,
# GPUS, RECIPE, CHECK, SPECULATE, ARGS.

PYTHON   ?= python3
PORT     ?= 8000
JOBS     ?= 2
# how many tokens the demo's draft head drafts
SPECULATE ?= 0
BASE_URL ?= http://127.0.0.1:$(PORT)
VENV     := .venv/bin

# handed on only if it was asked for: setup_env then keeps the interpreter .venv was made with
ifneq ($(origin PYTHON),file)
export PYTHON
endif

SHELL_SCRIPTS := .ci/run .ci/container .ci/engine .ci/standin_base devtools/image/write_sbom.sh

# the name compose reads from .env too
IMAGE ?= $(or $(shell sed -n 's/^IMAGE=//p' .env 2>/dev/null),vllm-cutedsl-nvfp4)
SBOM  ?= sbom.spdx.json
SYFT  ?= syft
TARGET ?= gpu
CHECK  ?= 1
# the shell's settings outrank .env, .env outranks the recipe
ENV_FILES = $(if $(RECIPE),$(addprefix --env-file ,recipes/$(RECIPE).env $(wildcard .env)))
# PORT and IMAGE are exported to compose only if they were asked for: the environment outranks .env
COMPOSE := arguments=$$($(PYTHON) devtools/image/arguments.py) && env $$arguments docker compose

# reads checkpoints on the hub: .venv has huggingface-hub, the system's Python need not
READER = $(or $(wildcard $(VENV)/python),$(PYTHON))

.DEFAULT_GOAL := help
.PHONY: help demo down smoke-test test lint fmt setup setup-dev patches-check bench-check plots train-demo clean
.PHONY: build up up-cpu logs pin sbom plan

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: setup  ## serve the demo model on the CPU at 127.0.0.1:PORT, in the background; SPECULATE=1: with its draft head
	@$(PYTHON) devtools/setup/demo_server.py start --port $(PORT) --speculate $(SPECULATE)

build:  ## build the image IMAGE:TARGET, TARGET being gpu (default) or cpu; ARGS go to docker buildx bake
	@arguments=$$($(PYTHON) devtools/image/arguments.py) && env $$arguments IMAGE=$(IMAGE) docker buildx bake -f docker-bake.hcl $(ARGS) $(TARGET)

up:  ## serve from the image until `make down`: settings are in .env and in RECIPE (of recipes/); CHECK=0 takes any GPU
	@$(PYTHON) devtools/image/fit.py --recipe '$(RECIPE)' --check '$(CHECK)' $(ENV_FILES)
	@$(COMPOSE) $(ENV_FILES) up --wait $(ARGS)

up-cpu:  ## serve the demo model on the CPU from the image
	@$(COMPOSE) -f compose.yaml -f compose.cpu.yaml up --wait $(ARGS)

logs:  ## follow the log of the image's server
	@docker compose logs --follow --tail 200 vllm

down:  ## stop the demo server, and the image's services where Docker runs
	@$(PYTHON) devtools/setup/demo_server.py stop
	@if docker info >/dev/null 2>&1; then docker compose --profile '*' down; fi

pin:  ## ask the registry for the digests of the base images and write them to versions.env
	@$(PYTHON) devtools/image/pin.py

sbom:  ## write what IMAGE:TARGET contains to SBOM (SPDX); needs syft
	@SYFT=$(SYFT) devtools/image/write_sbom.sh $(IMAGE):$(TARGET) $(SBOM)

smoke-test:  ## check the server at BASE_URL; ARGS go to scripts/smoke_test.py
	@$(PYTHON) scripts/smoke_test.py --base-url $(BASE_URL) $(ARGS)

plan:  ## fit a model on GPUs, with flags: make plan MODEL=pro GPUS=8xH200; ARGS go to scripts/plan_memory.py
	@$(READER) scripts/plan_memory.py '$(or $(MODEL),pro)' '$(or $(GPUS),8xH200)' $(ARGS)

test: setup-dev  ## run the tests, JOBS at a time (5 GB each); ARGS go to pytest
	@$(VENV)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

lint: setup-dev  ## check style, shell, Dockerfile, patches and layers; changes nothing
	@$(VENV)/ruff check . && $(VENV)/ruff format --check .
	@$(VENV)/shellcheck $(SHELL_SCRIPTS) && $(VENV)/hadolint Dockerfile
	@$(VENV)/python devtools/patches/lint.py && $(VENV)/python devtools/kernels/lint_layering.py

fmt: setup-dev  ## rewrite what ruff can
	@$(VENV)/ruff check --fix . ; $(VENV)/ruff format .

setup:  ## make or refresh .venv: torch, vLLM, this project, its patches
	@$(PYTHON) devtools/setup/setup_env.py

setup-dev:
	@$(PYTHON) devtools/setup/setup_env.py --dev

patches-check: setup  ## try the patches on another vLLM: make patches-check VERSION=0.33.0
	@$(if $(VERSION),,$(error name the vLLM release: make patches-check VERSION=0.33.0))
	@$(VENV)/python devtools/patches/check.py --version $(VERSION) $(ARGS)

bench-check:  ## every speed bar of the GPU kernels with its measured figure; fails where a miss is new or worse than recorded
	@$(PYTHON) -m bench.report docs/results/h200_linear.json docs/results/h200_experts.json --bars \
		--expected docs/results/expected_misses.json

plots: setup-dev  ## draw docs/results/plots from the committed rows
	@PYTHONPATH=kernels $(VENV)/python -m bench.plots $(ARGS)

train-demo: setup-dev  ## train demo/ again from its recipe
	@$(VENV)/python devtools/demo/train.py $(ARGS)

clean: down  ## stop the server and delete .venv, .demo and .cache
	@rm -rf .venv .demo .cache .pytest_cache .ruff_cache .hypothesis
