# `make run` and `make test` are all that a newcomer needs; `make help` lists the rest.
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
PORT ?= 8080
STATE ?= .charter
# Left empty, `charter run` takes its defaults: the shipped model and constitution, the embedded bus, loopback.
HOST ?=
BUS ?=
MODEL ?=
CRITIC_MODEL ?=
CONSTITUTION ?=
GUARD ?=
ARGS ?=
UV := .tools/bin/uv
PY := $(VENV)/bin/python
CHARTER := $(VENV)/bin/charter
STAMP := $(VENV)/.installed

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: run
run: $(STAMP) ## the whole system; PORT=8080 STATE=.charter, and MODEL=, CONSTITUTION=, GUARD=, BUS=, HOST=
	@$(CHARTER) run --port '$(PORT)' --state '$(STATE)' $(if $(HOST),--host '$(HOST)') $(if $(BUS),--bus '$(BUS)') \
	  $(if $(MODEL),--model '$(MODEL)') $(if $(CRITIC_MODEL),--critic-model '$(CRITIC_MODEL)') \
	  $(if $(CONSTITUTION),--constitution '$(CONSTITUTION)') $(if $(GUARD),--guard '$(GUARD)') $(ARGS)

.PHONY: chat
chat: $(STAMP) ## talk to a running system from this terminal
	@$(CHARTER) chat --url 'http://127.0.0.1:$(PORT)' $(ARGS)

.PHONY: test
test: $(STAMP) ## all tests that need nothing but Python; ARGS= goes to pytest
	@$(PY) -m pytest $(ARGS)

.PHONY: lint
lint: $(STAMP) node_modules/.bin/buf buf-breaking ## formatting, ruff, mypy (strict) and buf
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@node_modules/.bin/buf lint protos

.PHONY: format
format: $(STAMP) ## formats and repairs what ruff can repair
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

.tools/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Charter needs Python 3.11 or newer as '$(PYTHON)'; install it, or name one: make run PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "Charter needs Python's venv module; on Debian: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -m venv .tools && .tools/bin/python -m pip install -q 'uv>=0.9,<1' || \
	  { echo "Charter could not install uv with pip; look above for the reason (most often: no package index within reach)"; exit 1; }

# A virtual environment whose Python has gone (another machine, an upgrade) is made anew. What is slowest to import
# is compiled at once: it saves several seconds at the first start, and at every start where Python may not write.
$(STAMP): requirements.lock pyproject.toml | .tools/bin/uv
	@echo "Installing into $(VENV) (once; about 6 GB, mostly torch) ..."
	@$(PY) -c '' 2>/dev/null || $(UV) venv -q --clear --python $(PYTHON) $(VENV)
	@$(UV) pip install -q --python $(PY) --require-hashes -r requirements.lock && \
	  $(UV) pip install -q --python $(PY) --no-deps -e . || \
	  { echo "Charter could not install its packages; look above for the reason (most often: no package index, or less than 8 GB of disk)"; exit 1; }
	@$(PY) -m compileall -q -j 0 -x '/(tests|models)/' \
	  $(foreach p,torch sympy transformers numpy,$(VENV)/lib/python*/site-packages/$(p)) >/dev/null || true
	@touch $@

.PHONY: install
install: $(STAMP) ## the virtual environment, from requirements.lock

.PHONY: lock
lock: .tools/bin/uv ## requirements.lock anew from pyproject.toml
	$(UV) pip compile -q --universal --generate-hashes --python-version 3.11 --all-extras --upgrade \
	  --no-annotate --no-header --no-emit-index-url --no-emit-find-links -o requirements.lock pyproject.toml

node_modules/.bin/buf: package.json package-lock.json
	@command -v npm >/dev/null || { echo "make lint needs npm for buf; on Debian: apt-get install npm"; exit 1; }
	@npm install --silent --no-save --ignore-scripts && touch $@

.PHONY: protos
protos: $(STAMP) ## services/charter/v1 anew from protos/
	@$(MAKE) --no-print-directory protos-into OUT=services
	@touch services/charter/v1/__init__.py

.PHONY: protos-into
protos-into: # OUT= the folder that charter/v1 is generated in
	@mkdir -p '$(OUT)/charter/v1'
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m grpc_tools.protoc -Iprotos --python_out='$(OUT)' \
	  --grpc_python_out='$(OUT)' --mypy_out=quiet:'$(OUT)' --mypy_grpc_out=quiet:'$(OUT)' protos/charter/v1/*.proto

include $(wildcard mk/*.mk)
