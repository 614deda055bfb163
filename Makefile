# `make demo` and `make test` prepare all they need: a virtual environment in .venv, then the package.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# What a processor without AVX-512, or without AVX2, computes; and with how many threads.
PORTABLE ?= avx2-1 avx2-2 default-1 default-2
PORTABLE_TESTS ?= tests
isa.avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
isa.default := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2

.PHONY: demo test portable lint clean

demo: $(VENV)/.installed
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no recipes/drlx.py

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest

portable: $(PORTABLE:%=portable-%)

portable-%: $(VENV)/.installed-dev
	$(isa.$(firstword $(subst -, ,$*))) $(BIN)/python -m pytest --threads $(lastword $(subst -, ,$*)) $(PORTABLE_TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
