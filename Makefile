# What a person types. `make demo` and `make test` set up whatever they need.
#
#   PYTHON=python3.12        the Python (3.10 to 3.13) that .venv is made of
#   JOBS=4                   how many processes run the tests, 2 by default
#   TORCH_INDEX=URL          where else pip looks for torch; on Linux PyPI's torch brings CUDA with it,
#                            https://download.pytorch.org/whl/cpu has it without

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
JOBS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test lint docs wheel reference schema clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		--constraint constraints.txt --editable '.[dev,docs]'
	touch $@

demo: $(READY)
	$(BIN)/python -m tools.demo

# Idle OpenMP threads sleep instead of spinning: on cores that others use as well, threads that spin
# keep those with work from running.
test: export OMP_WAIT_POLICY ?= PASSIVE
test: $(READY)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without any network; needs Python 3.11. `$(BIN)/python -m mkdocs serve` shows them while they are written.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(READY)
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "the docs are in site/: open site/index.html"

wheel: $(READY)
	$(BIN)/python -m tools.check_wheel $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

reference: $(READY)
	$(BIN)/python -m tools.reference --out references/results.md

schema: $(READY)
	$(BIN)/python -m tools.schema

clean:
	rm -rf $(VENV) build dist demo site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
