# `make help` lists the targets. Everything runs inside .venv, which `make setup` makes; nothing is installed elsewhere.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SEED ?=
OUT ?= runs/demo
FAISS_GPU ?= faiss-gpu-cu12
# the first of these that is new enough; PYTHON=/path/to/python overrides
PYTHON ?=
PYTHONS := $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11)

.DEFAULT_GOAL := help
.PHONY: help setup test test-pages docs lint demo bench soak faiss-gpu

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## make .venv and install the project with its checks (again after setup.cfg changed)

$(BIN)/python:
	@for python in $(PYTHONS); do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "error: Python 3.11 or newer is needed; none of '$(PYTHONS)' is. Say which: make setup PYTHON=/path/to/python" >&2; \
	    exit 1; \
	fi; \
	echo "making $(VENV) with $$($$found --version)"; \
	$$found -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "error: 'python -m venv' failed; on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }

# A faiss-gpu that was chosen earlier is put back, because the plain requirement is faiss-cpu (see setup.cfg).
$(STAMP): setup.cfg pyproject.toml | $(BIN)/python
	@gpu=$$($(BIN)/python -m pip list --format=freeze 2>/dev/null | sed -n 's/^\(faiss-gpu[^=]*\)==.*/\1/p'); \
	echo "installing personssl (the first time: PyTorch too, several GB)"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' || exit 1; \
	if [ -n "$$gpu" ]; then $(MAKE) --no-print-directory faiss-gpu FAISS_GPU=$$gpu || exit 1; fi; \
	touch $(STAMP)

faiss-gpu: | $(BIN)/python  ## put FAISS for NVIDIA GPUs in the place of faiss-cpu (FAISS_GPU=faiss-gpu-cu12)
	$(BIN)/python -m pip uninstall --quiet -y faiss-cpu faiss-gpu faiss-gpu-cu12
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(FAISS_GPU)

lint: setup  ## style and the import law
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

# One thread: the tests use tiny tensors, some start two processes, and equal thread counts give equal bits. A file is
# tested by one process, because its tests share what they made; more than four processes would only take memory.
test: lint  ## lint and the quick tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile

# Debian's and Ubuntu's Chromium; elsewhere install one and say where it is: CHROMIUM=/path/to/chromium make test
test-pages: setup  ## Chromium for the tests of the pages (asks for sudo), and these tests; `make test` then runs them too
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,pages]'
	@if [ -z "$$CHROMIUM" ] && ! command -v chromium chromium-browser google-chrome > /dev/null; then \
	    $$([ "$$(id -u)" = 0 ] || echo sudo) apt-get install --quiet --yes chromium || { \
	        echo "error: no Chromium could be installed; install one, and give CHROMIUM=/path/to/it" >&2; exit 1; }; \
	fi
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/pages

docs: setup  ## the documentation as a site, in site/ (to read while you write: .venv/bin/mkdocs serve)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

soak: setup  ## the long tests, and the table of faults of docs/reliability.md
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'soak or row' --rows-json=runs/soak.json

demo: setup  ## the whole pipeline on drawn people, on a CPU (SEED=1 OUT=runs/demo1 for another one)
	$(BIN)/python finetune/demo.py --out $(OUT) $(if $(SEED),--seed $(SEED))

bench: setup  ## every comparison under bench/; each ends with one line of JSON
	@failed=; for script in bench/*.py; do \
	    [ -e "$$script" ] || { echo "error: there is no bench/*.py" >&2; exit 1; }; \
	    echo "== $$script"; $(BIN)/python $$script || failed="$$failed $$script"; \
	done; \
	if [ -n "$$failed" ]; then echo "error: failed:$$failed" >&2; exit 1; fi
