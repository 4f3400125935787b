# FedMKT's commands. `make` alone lists them. Every target that needs the environment builds it first.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# What a caller may set: make setup PYTHON=python3.12 TORCH_INDEX=<address of an index with CPU builds of torch>
PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_WORKERS ?= 2
MINUTES ?= 2
SEED ?=
SECONDS ?= 600

VENV := .venv
STAMP := $(VENV)/.setup-done
SETUP_LOG := $(VENV)/setup.log
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
PYTEST := $(VENV)/bin/python -m pytest
TORCH_FROM := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX) --no-deps)
COMPOSE_TESTS := tests/compose

# Several processes share the cores here: one thread each, or they fight.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

# One short line for each package, so that a long download is seen to move; the whole log stays beside the environment.
show_progress = 2>&1 | tee -a $(SETUP_LOG) | sed -nuE \
	-e 's|^ *(Downloading\|Using cached\|Processing) ([^ ]*/)?([^/ ]+)( \(.*\))?$$|  \3\4|p' \
	-e 's|^Installing collected packages.*|  installing ...|p' \
	|| { tail -n 20 $(SETUP_LOG); echo "setup: pip failed, the whole log is $(SETUP_LOG)"; exit 1; } >&2

.PHONY: help
help:  ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)$$/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do \
		printf '  make %-14s %s\n' "$$name" "$$text"; done

.PHONY: setup
setup: $(STAMP)  ## create .venv with everything in it (TORCH_INDEX= picks another index for torch)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "no $(PYTHON) here: install Python 3.11 or newer, or name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("$(PYTHON) is Python %d.%d; Python 3.11 or newer is needed: name one with PYTHON=..." % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo "$(PYTHON) has no venv module: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	@$(VENV)/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
		echo "setup: a new environment in $(VENV) ($$($(PYTHON) --version)), some minutes the first time"; \
		$(PYTHON) -m venv --clear $(VENV); }
	@echo "setup: torch"
	@$(PIP) install --constraint constraints.txt $(TORCH_FROM) torch $(show_progress)
	@echo "setup: everything else"
	@$(PIP) install --constraint constraints.txt --editable '.[dev]' $(show_progress)
	@touch $@
	@echo "setup: done"

.PHONY: demo
demo: $(STAMP)  ## run a whole federation on this machine; results in runs/demo/report.json (ARGS= for `fedmkt demo`)
	@$(VENV)/bin/fedmkt demo $(ARGS)

.PHONY: test
test: $(STAMP)  ## run every test: units and services side by side, then whole rounds with real processes
	@mkdir -p runs/test && rm -f runs/test/*
	@status=0; \
	echo "test: units and services, $(PYTEST_WORKERS) at a time"; \
	$(PYTEST) -m 'not e2e and not chaos and not long' -n $(PYTEST_WORKERS) --ignore $(COMPOSE_TESTS) 2>&1 | tee runs/test/1-units-and-services.log || status=$$?; \
	echo "test: whole rounds, one after the other"; \
	$(PYTEST) -m 'e2e and not chaos and not long' -p no:xdist --ignore $(COMPOSE_TESTS) 2>&1 | tee runs/test/2-rounds.log || status=$$?; \
	echo $$status > runs/test/exit-status; \
	echo "test: summary"; \
	tail -qn 1 runs/test/1-units-and-services.log runs/test/2-rounds.log; \
	exit $$status

.PHONY: load
load: $(STAMP)  ## 1,000 agents, 64 uploads at once, ingest and polls beside bare servers, a soak; PARTS="polls ingest crowd soak"
	@mkdir -p runs/load && $(VENV)/bin/python tests/load/run_load.py $(PARTS)

.PHONY: endurance
endurance: $(STAMP)  ## 20 rounds with agents killed at random beside 20 undisturbed ones; ARGS="--rounds 20 --seed 0"
	@$(VENV)/bin/python tests/endurance/run_endurance.py $(ARGS)

.PHONY: chaos
chaos: $(STAMP)  ## kill every process at every fault point, any at random for MINUTES=2 (SEED= again), and break lines
	@FEDMKT_CHAOS_REPORT=runs/chaos/report.json FEDMKT_CHAOS_MINUTES=$(MINUTES) FEDMKT_CHAOS_SEED=$(SEED) \
		$(PYTEST) -p no:xdist tests/chaos tests/network

.PHONY: bench
bench: export OMP_NUM_THREADS := $(shell nproc)
bench: $(STAMP)  ## measure the core beside plain contenders; results in benchmarks/results.json and docs/benchmarks.md
	@rm -f benchmarks/results.json
	@$(PYTEST) -c benchmarks/pytest.ini benchmarks
	@$(VENV)/bin/python -m benchmarks.coverage

.PHONY: experiments experiments-full
experiments: $(STAMP)  ## play the arms in three scenarios with five seeds (about 25 minutes on 2 cores); tables in docs/experiments.md
	@$(VENV)/bin/python -m experiments run experiments/quick/*.toml
	@$(VENV)/bin/python -m experiments report experiments/quick/*.toml

experiments-full: $(STAMP)  ## ablations, other teachers and other public sets with ten seeds: many hours; what is finished is kept
	@$(VENV)/bin/python -m experiments run experiments/full/*.toml
	@$(VENV)/bin/python -m experiments report experiments/full/*.toml

.PHONY: fuzz
fuzz: $(STAMP)  ## fuzz every reader of foreign bytes: SECONDS=600 on knowledge, a fifth each on maps, vocabularies, public sets
	@cd tests && ../$(VENV)/bin/python -m fuzz.run --seconds $(SECONDS)

.PHONY: fuzz-api
fuzz-api: $(STAMP)  ## fuzz the whole HTTP API as every role and as nobody, for MINUTES=2 together; reports in runs/fuzz-api
	@$(VENV)/bin/python tests/coordinator/api_fuzz.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

.PHONY: unit
unit: $(STAMP)  ## run the unit tests alone: no PostgreSQL, no Redis, no processes
	@$(PYTEST) -m 'not services and not e2e and not long' -n $(PYTEST_WORKERS) --ignore $(COMPOSE_TESTS)

.PHONY: lint
lint: $(STAMP)  ## format, lint and types
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

.PHONY: check
check: lint unit  ## lint and the unit tests: what to run before every commit

.PHONY: format
format: $(STAMP)  ## let ruff rewrite what it can
	@$(VENV)/bin/ruff check --fix-only --quiet .
	@$(VENV)/bin/ruff format .

.PHONY: compose-test
compose-test: $(STAMP)  ## build the images and run the demo federation in docker compose (needs a Docker engine)
	@FEDMKT_COMPOSE_TEST=1 TORCH_INDEX=$(TORCH_INDEX) $(PYTEST) -p no:xdist -rs --capture=no $(COMPOSE_TESTS)

.PHONY: lock
lock:  ## renew constraints.txt with the newest versions that pyproject.toml allows (torch keeps its pin)
	@$(PYTHON) -m venv --clear build/lock
	@grep '^torch==' constraints.txt > build/lock/torch.txt
	@build/lock/bin/pip install --quiet $(TORCH_FROM) --requirement build/lock/torch.txt
	@build/lock/bin/pip install --quiet --constraint build/lock/torch.txt --editable '.[dev]'
	@build/lock/bin/python deploy/lock.py > build/lock/constraints.txt
	@mv build/lock/constraints.txt constraints.txt && rm -r build/lock
	@git --no-pager diff --stat constraints.txt

.PHONY: troubleshooting
troubleshooting: $(STAMP)  ## renew docs/troubleshooting.md from the problems in the source
	@$(VENV)/bin/python -W ignore deploy/troubleshooting.py > docs/troubleshooting.md

.PHONY: sbom
sbom: $(STAMP)  ## what is installed in .venv: build/sbom/sbom.cdx.json (CycloneDX) and build/sbom/licences.md
	@$(PYTHON) -m venv --clear build/sbom/tools
	@build/sbom/tools/bin/pip install --quiet 'cyclonedx-bom==7.5.0' 'pip-licenses==5.5.5'
	@build/sbom/tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-format JSON \
		--output-file build/sbom/sbom.cdx.json $(VENV)/bin/python
	@build/sbom/tools/bin/pip-licenses --python $(VENV)/bin/python --from mixed --order license --format markdown \
		--output-file build/sbom/licences.md

.PHONY: clean
clean:  ## remove the environment, caches and build output; runs/ stays
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
