# The front door: `make help`. Settings: PYTHON (to build .venv on), PORT, BASE_URL, VERSION, JOBS, ARGS.

PYTHON   ?= python3
PORT     ?= 8000
JOBS     ?= 2
BASE_URL ?= http://127.0.0.1:$(PORT)
VENV     := .venv/bin
export PORT BASE_URL

# handed on only if it was asked for: setup_env then keeps the interpreter .venv was made with
ifneq ($(origin PYTHON),file)
export PYTHON
endif

# ruff finds the scripts without suffix through pyproject.toml
SHELL_SCRIPTS := .ci/run

.DEFAULT_GOAL := help
.PHONY: help demo down smoke-test test lint fmt setup setup-dev patches-check train-demo clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: setup  ## serve the demo model on the CPU at 127.0.0.1:PORT, in the background
	@$(PYTHON) scripts/demo_server start --port $(PORT)

down:  ## stop the demo server
	@$(PYTHON) scripts/demo_server stop

smoke-test:  ## check the server at BASE_URL; ARGS go to scripts/smoke_test
	@$(PYTHON) scripts/smoke_test --base-url $(BASE_URL) $(ARGS)

test: setup-dev  ## run the tests, JOBS at a time (5 GB each); ARGS go to pytest
	@$(VENV)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

lint: setup-dev  ## check style, shell, patches and layers; changes nothing
	@$(VENV)/ruff check . && $(VENV)/ruff format --check .
	@$(VENV)/shellcheck $(SHELL_SCRIPTS)
	@$(VENV)/python scripts/lint_patches && $(VENV)/python scripts/lint_layering

fmt: setup-dev  ## rewrite what ruff can
	@$(VENV)/ruff check --fix . ; $(VENV)/ruff format .

setup:  ## make or refresh .venv: torch, vLLM, this project, its patches
	@$(PYTHON) scripts/setup_env

setup-dev:
	@$(PYTHON) scripts/setup_env --dev

patches-check: setup  ## try the patches on another vLLM: make patches-check VERSION=0.33.0
	@$(if $(VERSION),,$(error name the vLLM release: make patches-check VERSION=0.33.0))
	@$(VENV)/python scripts/check_patches --version $(VERSION) $(ARGS)

train-demo: setup-dev  ## train demo/ again from its recipe
	@$(VENV)/python scripts/train_demo $(ARGS)

clean: down  ## stop the server and delete .venv, .demo and .cache
	@rm -rf .venv .demo .cache .pytest_cache .ruff_cache .hypothesis
