# make test: every Python found; the newest one also runs oracles and peers.
# make check: order, contents, sizes of the file.   make startup: start-up times.
SHELL := /bin/bash
PYTHON ?= python3
PY := .venv/bin/python
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' tracecraft.py)
TOOLS := pytest moto boto3 botocore requests tracecraft-ai==0.2.5

test: .venv/.ready
	$(PY) -m pytest -q test_tracecraft.py
	@bash .ci/run --other-pythons

test-all: test

soak: .venv/.ready
	TRACECRAFT_SOAK=$${SOAK:-300} $(PY) -m pytest -q test_tracecraft.py -k soak

check startup:
	$(PYTHON) test_tracecraft.py $@

bench demo:
	$(PYTHON) tracecraft.py $@

.venv/.ready: Makefile
	$(PYTHON) -m venv .venv
	$(PY) -m pip -q install --disable-pip-version-check $(TOOLS)
	touch $@

dist: check
	mkdir -p dist && cp tracecraft.py dist/tracecraft-$(VERSION).py
	cd dist && sha256sum tracecraft-$(VERSION).py > SHA256SUMS

clean:
	rm -rf .venv dist .pytest_cache __pycache__

.PHONY: test test-all soak check startup bench demo dist clean
