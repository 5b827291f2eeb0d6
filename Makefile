# `make run` and `make test` are all that a newcomer needs; `make help` lists the rest.
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
PORT ?= 8080
STATE ?= .charter
UV := .tools/bin/uv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.tools/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Charter needs Python 3.11 or newer as '$(PYTHON)'; install it, or name one: make run PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "Charter needs Python's venv module; on Debian: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -m venv .tools && .tools/bin/python -m pip install -q 'uv>=0.9,<1'

$(STAMP): requirements.lock pyproject.toml | .tools/bin/uv
	@echo "Installing into $(VENV) (once; about 6 GB, mostly torch) ..."
	@test -x $(PY) || $(UV) venv -q --python $(PYTHON) $(VENV)
	@$(UV) pip install -q --python $(PY) --require-hashes -r requirements.lock
	@$(UV) pip install -q --python $(PY) --no-deps -e .
	@touch $@

.PHONY: install
install: $(STAMP) ## the virtual environment, from requirements.lock

.PHONY: lock
lock: .tools/bin/uv ## requirements.lock anew from pyproject.toml
	$(UV) pip compile -q --universal --generate-hashes --python-version 3.11 --all-extras --upgrade \
	  --no-annotate --no-header --no-emit-index-url --no-emit-find-links -o requirements.lock pyproject.toml

.PHONY: protos
protos: $(STAMP) ## services/charter/v1 anew from protos/
	@mkdir -p services/charter/v1
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m grpc_tools.protoc -Iprotos --python_out=services \
	  --grpc_python_out=services --mypy_out=quiet:services --mypy_grpc_out=quiet:services protos/charter/v1/*.proto
	@touch services/charter/v1/__init__.py
