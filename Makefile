# `make train` and `make test` set everything up in .venv first; see README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/.installed

SERVICES := $(VENV)/.services-installed
# Tests of one file stay together: they share what its fixtures trained.
WORKERS ?= 2
PYTEST := $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: setup data train reasoning faults test test-full test-services test-install test-matrix test-clients lint format check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with make PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing; this takes some minutes the first time"
	# torch first, in the pinned version: a newer one brings CUDA packages to machines without a GPU.
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[dev]'
	touch $(STAMP)

data: $(STAMP)
	$(BIN)/python -m examples.stdlib_data --out data/stdlib

# The main job: real data, a small Llama pre-trained, then fine-tuned with LoRA, both on two
# processes with sequence parallelism over ZeRO-2. Replaces what an earlier `make train` left.
train: data
	$(BIN)/ulysses train examples/pt.yaml overwrite_output_dir=true
	$(BIN)/ulysses train examples/sft.yaml val_size=0 eval_dataset=stdlib_qa_heldout \
		output_dir=runs/sft overwrite_output_dir=true

# The road of a reasoning model, three seeds; docs/reasoning.md has what comes out.
reasoning: $(STAMP)
	$(BIN)/python -m examples.reasoning.run

# A few training faults and healthy runs, asserted; the whole benchmark: without --short.
faults: $(STAMP)
	$(BIN)/python -m benchmarks.faults --short

test: $(STAMP)
	$(PYTEST)

test-full: $(STAMP)
	$(PYTEST) --full

# Builds the sdist and the wheel, checks that they can be published, and installs each extra alone.
test-install: $(STAMP)
	$(BIN)/pytest --install -m install tests/install

# The Trainer with and without the monitor, under the oldest and the newest supported versions.
# For others: .venv/bin/python -m tests.install.matrix 5.6.* 1.11.*
test-matrix: $(STAMP)
	$(BIN)/python -m tests.install.matrix

# LLaMA-Factory, ms-swift, TRL, ... with and without the monitor; writes docs/clients.md. For one
# of them: .venv/bin/pytest --clients -m clients tests/clients/test_llamafactory.py
test-clients: $(STAMP)
	$(BIN)/pytest --clients -m clients tests/clients

# Real servers, all on this machine: MLflow, Prometheus, an OTLP receiver, W&B's own files.
test-services: $(SERVICES)
	$(BIN)/pytest --services -m services tests/monitor/sinks

$(SERVICES): $(STAMP)
	command -v prometheus >/dev/null || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends prometheus; } || \
		{ echo "The prometheus server is needed, and could not be installed; on Debian, as root:" \
			"apt-get install prometheus" >&2; exit 1; }
	$(PIP) --editable '.[dev,services]'
	touch $(SERVICES)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What CI runs.
check: lint test

clean:
	rm -rf $(VENV) build dist *.egg-info
