# Every target creates or updates .venv when pyproject.toml or constraints.txt is newer than the last installation.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed
WORKERS := -n 2 --dist loadfile

.PHONY: help demo test check bench
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' Makefile

demo: $(STAMP)  ## upsample features of a photograph and draw outputs/demo.png
	$(PY) -m anyup_jax demo

test: $(STAMP)  ## run the whole test suite
	$(PY) -m pytest $(WORKERS)

check: $(STAMP)  ## lint, format check and the fast tests
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -m "not slow" -q $(WORKERS)

bench: $(STAMP)  ## print the benchmarks' tables
	$(PY) -m benchmarks.run

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[torch,train,viz,lite,tpu,dev]'
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation natten
	@touch $@
