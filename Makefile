# make demo · make test · make test-native · make lint · make docs · make compare · make ablate · make audit: each sets up
# what it needs.
# Another interpreter: make demo PYTHON=python3.12. What is installed already is not installed again.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo test test-native lint format docs compare ablate audit help

help:
	@grep -A1 '^# make' Makefile | sed 's/^# //'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps are as old as the requirements that were installed last.
$(VENV)/runtime.stamp: requirements.txt pyproject.toml | $(BIN)/python
	@echo "installing what requirements.txt lists into $(VENV)"
	$(INSTALL) -r requirements.txt
	@touch $@

$(VENV)/dev.stamp: requirements-dev.txt $(VENV)/runtime.stamp
	@echo "installing what requirements-dev.txt lists into $(VENV)"
	$(INSTALL) -r requirements-dev.txt
	@touch $@

$(VENV)/docs.stamp: requirements-docs.txt | $(BIN)/python
	@echo "installing what requirements-docs.txt lists into $(VENV)"
	$(INSTALL) -r requirements-docs.txt
	@touch $@

demo: $(VENV)/runtime.stamp
	$(BIN)/python launch.py train --config=demo --sample=300

compare: $(VENV)/runtime.stamp
	$(BIN)/python launch.py compare --config=experiments/configs/compare.py --systems=ultramem,dense,moe,pkm

ablate: $(VENV)/runtime.stamp
	$(BIN)/python launch.py ablate --scale=tiny --config=experiments/configs/ablate.py

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Native kernels under sanitizers, with narrower vectors, by clang++ and for arm64, as far as these are installed
# (on Debian: g++ clang g++-aarch64-linux-gnu qemu-user).
test-native: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m builds -rs tests/kernels

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site is in site/. A test opens it in headless Chromium, which must be installed. The variable turns off a
# notice of the theme's authors about later versions.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	$(BIN)/python -m pytest docs/website/test_site.py

# What GPUs and TPUs would run, by their compilers, in an environment of its own. A whole audit takes about two hours on one
# CPU core, and 10 GB; what is in the folder already, and has not changed, is not compiled again.
AUDIT := .venv-audit

$(AUDIT)/stamp: requirements-audit.txt requirements.txt
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install --quiet --disable-pip-version-check -r requirements-audit.txt
	@touch $@

audit: $(AUDIT)/stamp
	$(AUDIT)/bin/python launch.py audit --out=experiments/results/audit
