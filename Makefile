# Everything a newcomer needs: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv debs demo test check lint types unit kube images up down purge status install uninstall components e2e clients bench bench-serving crds lock
# One node, one build store, two cores: nothing here gains by -j.
.NOTPARALLEL:

# local: the node that `make up` starts. current: your kube context, whose nodes stay alone.
CLUSTER ?= local
ifneq ($(words $(CLUSTER)) $(filter-out local current,$(CLUSTER)),1 )
$(error CLUSTER is "local" or "current", not "$(CLUSTER)")
endif
ifeq ($(CLUSTER),current)
ifneq ($(filter test components clients bench bench-serving up images down purge status,$(MAKECMDGOALS)),)
$(error with CLUSTER=current there are: demo, e2e, install, uninstall. The rest is about the local node)
endif
endif
VENV := .local/venv
PY := $(VENV)/bin/python
KUBE := PYTHONPATH=e2e python3 -m localkube
IMAGES := operator trainer server router registry prometheus
export CLUSTER
# Loopback and the node's networks: kubectl goes by the one spelling and Python by the other, or they would ask a proxy.
comma := ,
space := $(subst ,, )
NEAR := localhost 127.0.0.1 10.244.0.0/24 10.96.0.0/16
export NO_PROXY := $(subst $(space),$(comma),$(sort $(subst $(comma),$(space),$(NO_PROXY) $(no_proxy)) $(NEAR)))
export no_proxy := $(NO_PROXY)
export VALUES
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
export ORT_DISABLE_TELEMETRY := 1

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 14

demo: venv ## from a bare machine to a served, canary-promoted int4 model (CLUSTER=current VALUES=FILE: on your cluster)
ifneq ($(CLUSTER),current)
	@PYTHONPATH=e2e $(PY) -m kit.alone
	@$(MAKE) --no-print-directory up images
endif
	@PYTHONPATH=e2e $(PY) -m kit.chart install
	@PYTHONPATH=e2e $(PY) -m demo.run

test: lint types components e2e ## all tests: of each part, and the scenarios on a real node

check: lint types unit kube ## lint, types, unit tests, tests against a real API server

lint: venv ## ruff, import-linter
	@$(VENV)/bin/ruff check .
	@PYTHONPATH=operator $(VENV)/bin/lint-imports
	@test ! -e operator/__init__.py

types: venv ## mypy --strict
	@$(VENV)/bin/mypy $(addprefix -p ,slmops slmops_artifacts slmops_server slmops_router slmops_trainer localkube kit demo)
	@$(VENV)/bin/mypy images/registry/keeper.py images/server/kernels/build.py

unit: venv ## pure tests, milliseconds each
	@$(PY) -m pytest -q tests/unit

kube: venv ## the operator against a real API server (minutes of outages, and a kill at every write: in components)
	@$(PY) -m pytest -q -m "not slow" tests/kube

debs:
	@$(KUBE) debs

components: venv debs ## all tests but the scenarios: unit, operator, artifacts, router, chart, clients; server and trainer in their images
	@PYTHONPATH=e2e $(PY) -m kit.alone
	@$(MAKE) --no-print-directory up images
	@PYTHONPATH=e2e $(PY) -m kit.lanes \
		$(PY) -m pytest -q tests/unit -- $(PY) -m pytest -q tests/kube -- $(PY) -m pytest -q tests/artifacts -- \
		$(PY) -m pytest -q tests/router -- $(PY) -m pytest -q tests/chart -- \
		$(PY) -m pytest -q tests/clients / \
		$(PY) -m kit.imagetests trainer -- $(PY) -m kit.imagetests server

SCENARIOS := $(PY) -m pytest -q -x --timeout=1500 e2e/scenarios
e2e: venv ## the scenarios on a real node with real pods
ifeq ($(CLUSTER),current)
	@$(SCENARIOS)
else
	@PYTHONPATH=e2e $(PY) -m kit.alone
	@$(MAKE) --no-print-directory up images
	@$(SCENARIOS) -m "not alone" -n 2 --dist loadscope
	@$(SCENARIOS) -m alone
	@$(PY) -m pytest -q -x --timeout=300 tests/node
endif

clients: venv ## slmops-server as a package, under lm-evaluation-harness, under locust (fetches them once; in components)
	@$(PY) -m pytest -q tests/clients

bench: venv ## what the operator costs, on the local node
	@PYTHONPATH=e2e $(PY) -m kit.alone
	@$(MAKE) --no-print-directory up images
	@PYTHONPATH=e2e $(PY) -m kit.chart install
	@PYTHONPATH=e2e $(PY) -m kit.bench

bench-serving: venv ## slmops-server beside others, on this machine; the model is made on the local node
	@test -f .local/bench-model/genai_config.json -a -d .local/bench-ir-128 || $(MAKE) --no-print-directory up images
	@PYTHONPATH=e2e $(PY) -m kit.bench_serving
	@PYTHONPATH=e2e $(PY) -m kit.bench_serving_front
	@PYTHONPATH=e2e $(PY) -m kit.bench_serving_memory

up: ## the local Kubernetes node
	@$(KUBE) up

down: ## remove the node and all it set up on the machine; caches and built images stay
	@$(KUBE) down

purge: ## down, and remove .local, the built images and binaries; stays: Debian packages, Go's and pip's own caches
	@$(KUBE) down --purge

status: ## what runs
	@$(KUBE) status

images: ## build what changed and load it into the local node
	@$(KUBE) build $(IMAGES)

install: venv ## the chart into the cluster
	@PYTHONPATH=e2e $(PY) -m kit.chart install

uninstall: venv ## remove the chart; objects, CRDs and artifacts stay
	@PYTHONPATH=e2e $(PY) -m kit.chart uninstall

crds: venv ## generate crds/ and the chart's copy from the models
	@PYTHONPATH=operator $(PY) -m slmops.crdgen
	@mkdir -p charts/slmops/files/crds && rm -f charts/slmops/files/crds/*.yaml && cp crds/*.yaml charts/slmops/files/crds/
	@PYTHONPATH=operator $(PY) -m slmops.docgen

COMPILE := $(VENV)/bin/uv pip compile -q --generate-hashes --no-header
lock: venv ## pin the requirements again
	@for name in dev clients; do $(COMPILE) --python-version 3.11 requirements/$$name.in -o requirements/$$name.txt; done
	@$(COMPILE) --python-version 3.13 requirements/operator.in -o requirements/operator.txt
	@$(COMPILE) --python-version 3.13 --constraints requirements/dev.txt requirements/pytest.in -o requirements/pytest.txt
	@for name in server trainer; do $(COMPILE) --python-version 3.13 --overrides requirements/$$name.overrides requirements/$$name.in -o requirements/$$name.txt; done
	@$(COMPILE) --python-version 3.11 --overrides requirements/server.overrides requirements/bench.in -o requirements/bench.txt
	@$(COMPILE) --python-version 3.11 --no-deps requirements/llama.in -o requirements/llama.txt
	@$(COMPILE) --python-version 3.13 --overrides requirements/export.overrides --constraints requirements/trainer.txt requirements/export.in -o requirements/export.txt

venv: ## the virtual environment below .local, when it is not there or its requirements changed
	@$(KUBE) venv
