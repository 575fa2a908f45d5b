# Everything runs inside .venv; `make help` lists the targets.
SHELL := /bin/bash
VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.stamp

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow check lint format types imports drift proto clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## make .venv and install what tests and demo need

$(STAMP): pyproject.toml tools/setup
	@tools/setup
	@touch $@

test: $(STAMP) ## the everyday tests (a few minutes)
	$(PY) -m pytest -m "not slow" $(ARGS)

test-slow: $(STAMP) ## the long tests too
	$(PY) -m pytest $(ARGS)

check: lint types imports drift test ## everything a change must pass

lint: $(STAMP) ## ruff
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(STAMP) ## rewrite in the project's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(STAMP) ## mypy, strict
	$(VENV)/bin/mypy

imports: $(STAMP) ## who may import whom
	$(VENV)/bin/lint-imports

proto: $(STAMP) ## regenerate checkpointd/api from proto/
	$(PY) -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. --grpc_python_out=. \
	    $$(cd proto && find . -name '*.proto' | sed 's,^\./,,')

drift: $(STAMP) ## does the committed generated code match proto/?
	$(PY) tools/proto_drift.py

clean: ## remove what was built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
