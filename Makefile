# Everything runs inside .venv; `make help` lists the targets.
SHELL := /bin/bash
VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.stamp

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check lint format types imports drift proto man bench study soak setup-lab kernel vm check-vm clean

KERNEL ?= 6.12-precise
CMD    ?= uname -r
VMTEST  = PYTHONPATH=kernel-shim $(PY) -m vmtest

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## make .venv and install what tests and demo need

$(STAMP): pyproject.toml tools/setup
	@tools/setup
	@touch $@

demo: $(STAMP) ## dump, change, dump incrementally, kill and restore a real redis
	$(PY) -m demo $(ARGS)

test: $(STAMP) ## the everyday tests (a few minutes)
	@tools/apt-install chromium || true # a report is looked at in a real browser; without one that is skipped by name
	$(PY) -m pytest -m "not slow" $(ARGS)

test-slow: $(STAMP) ## the long tests too
	@tools/apt-install chromium || true
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

man: $(STAMP) ## build the man pages into build/man
	@mkdir -p build/man
	@for page in cli/man/*.rst; do \
	    name=$$(basename $$page .rst); \
	    $(PY) -m docutils --writer=manpage $$page build/man/$$name && echo build/man/$$name; \
	done

bench: $(STAMP) ## measure against physical limits and peers (long)
	$(PY) -m benchmarks $(ARGS)

study: $(STAMP) ## measure real programs not measured yet, write docs/savings.md (hours; ARGS=--render-only)
	PYTHONPATH=kernel-shim $(PY) -m benchmarks.study $(ARGS)

soak: $(STAMP) ## kill agents and services 10,000 times (long; goes on where it was interrupted)
	$(PY) -m tests.soak.run --kills 10000 $(ARGS)

KERNELS = 6.12-precise 6.1-precise 6.12-stock 6.1-stock

setup-lab: ## install what the kernel lab needs (kernel sources, QEMU, ...)
	@tools/setup-lab

kernel: $(STAMP) setup-lab ## build the stock and the patched kernels (cached; 5 minutes each)
	$(VMTEST) build $(KERNELS)

vm: $(STAMP) setup-lab ## run CMD in a kernel of ours: make vm KERNEL=6.12-precise CMD="uname -r"
	$(VMTEST) run $(KERNEL) --timeout 600 -- sh -c '$(CMD)'

check-vm: $(STAMP) setup-lab ## the tests that need these kernels (built on the way), each in a guest of its own
	$(PY) -m tests.vm $(KERNELS) $(ARGS)

clean: ## remove what was built
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
