# `make demo` and `make test` prepare all they need: a virtual environment in .venv, then the package.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL ?= $(BIN)/python -m pip install --quiet --disable-pip-version-check

# What a processor without AVX-512, or without AVX2, computes; and with how many threads.
PORTABLE ?= avx2-1 avx2-2 default-1 default-2
PORTABLE_TESTS ?= tests
# Not the slowest, nor the one that gives what annotations forbid.
TYPED_TESTS ?= tests/flow tests/f5 tests/speech tests/rewards tests/data -k "not (finite_differences or dopri5 or refuses_wrong_options)"
isa.avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
isa.default := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2

.PHONY: demo test pytest typed portable browser lint docs clean

demo: $(VENV)/.installed
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no recipes/drlx.py

test: lint pytest

# Tests compute with one thread; pytest-xdist gives each core tests of its own.
pytest: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n logical --maxprocesses 4

# Shapes and types of every annotated function, checked as it is called.
typed: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --typecheck $(TYPED_TESTS)

browser: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m browser tests/annotate

portable: $(PORTABLE:%=portable-%)

portable-%: $(VENV)/.installed-dev
	$(isa.$(firstword $(subst -, ,$*))) $(BIN)/python -m pytest --threads $(lastword $(subst -, ,$*)) $(PORTABLE_TESTS)

# The site in build/site. A public name without a docstring, or a link to nowhere, fails it.
docs: $(VENV)/.installed-docs
	$(BIN)/ruff check rlhf_mel reward_models
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/mkdocs.yml

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(INSTALL) -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
