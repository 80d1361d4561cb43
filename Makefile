# Every target sets up first if needed. TORCH_INDEX=<url> make setup takes torch from another index (a CUDA build, say).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check
SOURCES := opencoder kernels tools tests setup.py

.PHONY: setup setup-dev lint check format test test-all demo bench clean
.DEFAULT_GOAL := help

help:
	@echo "make setup | demo | lint | check | test | test-all | bench | clean   (see README.md)"

setup: $(VENV)/.done
setup-dev: $(VENV)/.dev-done

$(VENV)/.done: requirements.txt pyproject.toml setup.py $(wildcard csrc/*/*.cpp csrc/*/*.h)
	@$(PYTHON) -c 'import sys; sys.exit("opencoder needs Python 3.11 or newer; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -U pip "setuptools>=77" wheel pybind11
	$(PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' requirements.txt)"
	$(PIP) install -q -r requirements.txt
	$(PIP) install -q --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.dev-done: $(VENV)/.done requirements-dev.txt
	$(PIP) install -q -r requirements-dev.txt
	@# Not to build: a test reads in its source which arguments our adapter may pass. The variable keeps it from asking for CUDA.
	FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE $(PIP) download -q --no-deps --no-build-isolation --no-binary flash-attn \
		-d $(VENV)/sdists flash-attn==2.8.3.post2
	@touch $@

lint: setup-dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest -m "fast and not slow"

format: setup-dev
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

test: setup-dev
	$(BIN)/python -m pytest

test-all: setup-dev
	$(BIN)/python -m pytest -m "slow or not slow"

demo: setup
	$(BIN)/opencoder demo --output demo

bench: setup-dev
	$(BIN)/opencoder bench-kernels
	$(BIN)/opencoder bench-train
	$(BIN)/opencoder bench-corpus
	$(BIN)/opencoder bench-preprocess
	$(BIN)/opencoder bench-dataset

clean:
	rm -rf build demo *.egg-info opencoder/_*.so $(VENV)
