# VENV      where the environment lives          (make test VENV=/somewhere/else)
# PYTHON    the interpreter that creates it      (make install PYTHON=python3.12)
# PIP_ARGS  handed to pip, to name an index, say (make install PIP_ARGS='--index-url ...')
# ARGS      handed to `pairdr demo` or to pytest (make test ARGS='-k losses')
#
# constraints.txt is the lock. `make lock` renews it: edit a line to move that package, delete a line to let it move
# to the newest version that fits, and run it. Packages that only the CUDA build of torch pulls stay out of the lock.

VENV ?= .venv
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install demo test test-crash lint format types lock clean

STAMP := $(VENV)/.pairdr-installed
LOCK_VENV := build/lock-venv

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

install: $(STAMP) ## create the environment with the locked packages; nothing is done twice

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[demo,train,faiss,milvus,pgvector,ray,onnx,openvino,sources,serve,dev]'
	touch $@

demo: install ## run the whole way on the documentation of Python and its libraries
	$(VENV)/bin/pairdr demo $(ARGS)

test: install lint types ## run every check: lint, types, tests
	$(VENV)/bin/pytest $(ARGS)

test-crash: install ## kill training, encoding, upserts, compactions, index builds and database loads, 20 times each
	PAIRDR_KILLS=20 $(VENV)/bin/pytest tests/crash -s

lint: install ## check style and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: install ## rewrite the code in the house's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: install ## check the types
	$(VENV)/bin/mypy

# torch is resolved only through its line in the lock: left free, pip could take a build of several GB.
lock: ## write constraints.txt anew from an environment of its own
	grep -q '^torch==' constraints.txt
	rm -rf $(LOCK_VENV)
	$(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[demo,train,faiss,milvus,pgvector,ray,onnx,openvino,sources,serve,dev]'
	$(LOCK_VENV)/bin/python -m pip freeze --all --exclude pip --exclude-editable \
	  | sed -E -e 's/\+.*//' -e '/^(cuda|nvidia|triton)/d' | LC_ALL=C sort -f > constraints.txt.partial
	mv constraints.txt.partial constraints.txt
	rm -rf $(LOCK_VENV)

clean: ## remove .venv, builds and caches (not what demo and run wrote)
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
