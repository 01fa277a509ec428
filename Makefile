# Every target creates or updates .venv when pyproject.toml or constraints.txt is newer than the last installation.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed
WORKERS := -n 2 --dist loadfile

# The TPU's compiler is installed too, and writes warnings where it finds no TPU.
ifeq ($(wildcard /dev/accel* /dev/vfio/* /dev/nvidia*),)
demo: export JAX_PLATFORMS ?= cpu
endif

.PHONY: help demo test slow check bench page browser
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' Makefile

demo: $(STAMP)  ## upsample features of a photograph in both frameworks and draw outputs/demo.png
	$(PY) -m anyup_jax demo --torch

test: check  ## run the checks and the test suite
	$(PY) -m pytest -m "not slow" $(WORKERS)

slow: $(STAMP)  ## run the tests that are left out of it: minutes each, of what others cover in small
	$(PY) -m pytest -m slow $(WORKERS)

check: $(STAMP)  ## lint, format and type check, and build the API reference in outputs/reference
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m basedpyright
	$(PY) -m tools.reference

bench: $(STAMP)  ## print the benchmarks' tables
	$(PY) -m benchmarks.run

page: $(STAMP)  ## write the browser page to web/ and serve it on http://127.0.0.1:8000/
	$(PY) -m tools.page

browser:  ## install Chromium from Debian's packages, with which the page is tested
	apt-get update
	apt-get install --yes --no-install-recommends chromium chromium-driver

# Where constraints.txt was made, it names everything that is needed: it is installed as it stands, and pip resolves nothing.
HERE := $(shell $(PYTHON) -c 'import platform, sys; print(*sys.version_info[:2], platform.system(), platform.machine())')
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
ifeq ($(HERE),3 11 Linux x86_64)
	grep -v -e '^natten=' -e '^#' constraints.txt > .venv/locked.txt
	$(PIP) --no-deps --requirement .venv/locked.txt
endif
	$(PIP) --editable '.[torch,train,viz,lite,tpu,dev]'
	$(PIP) --no-build-isolation natten
	@touch $@
