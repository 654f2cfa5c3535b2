# Everything a newcomer needs: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help debs demo test check lint types unit kube images up down status install uninstall components e2e bench crds lock clean

CLUSTER ?= local
VENV := .local/venv
PY := $(VENV)/bin/python
READY := $(VENV)/ready-$(shell sha256sum requirements/dev.txt | cut -c1-12)
KUBE := PYTHONPATH=e2e python3 -m localkube
IMAGES := operator trainer server router registry prometheus
export CLUSTER
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
export ORT_DISABLE_TELEMETRY := 1

help: ## this list
	@grep -hE '^[a-z0-9]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 14

demo: $(READY) ## from a bare machine to a served, canary-promoted int4 model (CLUSTER=current: your kube context)
ifneq ($(CLUSTER),current)
	@$(MAKE) --no-print-directory up images
endif
	@PYTHONPATH=e2e $(PY) -m kit.chart install
	@PYTHONPATH=e2e $(PY) -m demo.run

test: check components e2e ## all tests: check, the images' own, and the scenarios on a real node

check: lint types unit kube ## lint, types, unit tests, tests against a real API server

lint: $(READY) ## ruff, import-linter
	@$(VENV)/bin/ruff check .
	@PYTHONPATH=operator $(VENV)/bin/lint-imports
	@test ! -e operator/__init__.py

types: $(READY) ## mypy --strict
	@$(VENV)/bin/mypy -p slmops
	@$(VENV)/bin/mypy -p slmops_artifacts -p slmops_server -p slmops_router -p slmops_trainer
	@$(VENV)/bin/mypy -p localkube -p kit -p demo

unit: $(READY) ## pure tests, milliseconds each
	@$(PY) -m pytest -q tests/unit

kube: $(READY) ## the operator against a real API server
	@$(PY) -m pytest -q tests/kube

DEBS := docker-registry apache2-utils skopeo haproxy
debs:
	@dpkg -s $(DEBS) >/dev/null 2>&1 || (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(DEBS) >/dev/null)

components: $(READY) debs ## artifacts, server, router, chart on this machine; the trainer inside its image
	@$(PY) -m pytest -q tests/artifacts
	@$(PY) -m pytest -q tests/server
	@$(PY) -m pytest -q tests/router
	@$(MAKE) --no-print-directory up images
	@$(PY) -m pytest -q tests/chart
	@PYTHONPATH=e2e $(PY) -m kit.trainertests

e2e: $(READY) ## the scenarios on a real node with real pods
	@$(MAKE) --no-print-directory up images
	@$(PY) -m pytest -q -x --timeout=1500 e2e/scenarios

bench: $(READY) ## what the operator costs, on the local node
	@$(MAKE) --no-print-directory up images
	@PYTHONPATH=e2e $(PY) -m kit.chart install
	@PYTHONPATH=e2e $(PY) -m kit.bench

up: ## the local Kubernetes node
	@$(KUBE) up

down: ## remove it and all it left
	@$(KUBE) down

status: ## what runs
	@$(KUBE) status

images: ## build what changed and load it into the local node
	@$(KUBE) build $(IMAGES)

install: $(READY) ## the chart into the cluster
	@PYTHONPATH=e2e $(PY) -m kit.chart install

uninstall: $(READY) ## remove the chart; objects, CRDs and artifacts stay
	@PYTHONPATH=e2e $(PY) -m kit.chart uninstall

crds: $(READY) ## generate crds/ and the chart's copy from the models
	@PYTHONPATH=operator $(PY) -m slmops.crdgen
	@mkdir -p charts/slmops/files/crds && rm -f charts/slmops/files/crds/*.yaml && cp crds/*.yaml charts/slmops/files/crds/
	@PYTHONPATH=operator $(PY) -m slmops.docgen

lock: $(READY) ## pin the requirements again
	@cd requirements && ../$(VENV)/bin/uv pip compile -q --generate-hashes --no-header --python-version 3.11 dev.in -o dev.txt
	@cd requirements && ../$(VENV)/bin/uv pip compile -q --generate-hashes --no-header --python-version 3.13 operator.in -o operator.txt
	@cd requirements && ../$(VENV)/bin/uv pip compile -q --generate-hashes --no-header --python-version 3.13 server.in -o server.txt
	@cd requirements && ../$(VENV)/bin/uv pip compile -q --generate-hashes --no-header --python-version 3.13 pytest.in -o pytest.txt

clean: down ## down, and the virtual environment
	@rm -rf .local

$(READY): requirements/dev.txt
	@echo "Setting up $(VENV)"
	@python3 -c 'import ensurepip, venv' 2>/dev/null || (apt-get update -qq && apt-get install -y -qq python3-venv)
	@rm -rf $(VENV) && mkdir -p .local && python3 -m venv $(VENV)
	@$(PY) -m pip install -q --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@touch $@
