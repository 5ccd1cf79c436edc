# Two commands do everything on a fresh machine with Python >= 3.11 and make:
#   make pretrain    install into .venv and train MIMIR on real digits
#   make test        the tests, in the same .venv
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
PYTEST_ARGS ?=

.PHONY: help setup pretrain demo test test-processors lint format bench docs info clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(STAMP) ## make .venv and install everything into it

$(STAMP): pyproject.toml setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# Bytecode is written when a module is imported: of 18,000 files that takes a minute, and few are.
	$(BIN)/python -m pip install --quiet --no-compile --upgrade-strategy only-if-needed --editable '.[all,dev,docs]'
	touch $@

pretrain: setup ## MIMIR pre-training on real digits, about a minute on two CPU cores
	$(BIN)/torchrun --standalone -m mimir_fast.pretrain --recipe digits/mimir_vit_nano $(ARGS)

demo: setup ## pre-train, fine-tune, evaluate, report, about four minutes on two CPU cores
	$(BIN)/python -m mimir_fast.reproduce digits_demo $(ARGS)

test: setup ## the tests
	$(BIN)/python -m pytest -n auto --dist loadgroup $(PYTEST_ARGS)

test-processors: setup ## the tests of ops, layers and models as other processors and PyTorch versions run them
	$(BIN)/python tests/processors.py --torches $(PYTEST_ARGS)

lint: setup ## ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## let ruff rewrite the files
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## kernel microbenchmarks
	$(BIN)/python -m benchmarks $(ARGS)

docs: setup ## build the documentation into site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

info: setup ## which backends run here
	$(BIN)/python -m mimir_fast.info

clean: ## delete .venv and build leftovers; runs/ stays
	rm -rf $(VENV) build dist *.egg-info mimir_fast/*.so
