# Every target works on a fresh checkout: it creates .venv, installs what it needs once, and runs.
# PYTHON chooses the interpreter, for example `make test PYTHON=python3.12`.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

export ORT_DISABLE_TELEMETRY := 1

.PHONY: help demo test lint clean
.NOTPARALLEL:

help:
	@echo "make demo   compress the digits network and print a table of before and after"
	@echo "make test   run the test suite"
	@echo "make lint   ruff and mypy"
	@echo "make clean  remove .venv and everything built"

demo: $(VENV)/examples.stamp
	$(RUN) examples/digits/demo.py

# One BLAS thread: OpenBLAS waits actively, so its threads and ONNX Runtime's slow each other down where cores are few. The tests of a file
# share what they prepare, so they stay together.
test: $(VENV)/test.stamp
	OPENBLAS_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

lint: $(VENV)/dev.stamp
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

# One stamp per extra of pyproject.toml; a changed pyproject.toml installs again.
$(VENV)/%.stamp: pyproject.toml
	@echo "installing intaglio[$*] into $(VENV) ..."
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
