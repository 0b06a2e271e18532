# make test: all on the newest Python, with oracles and peers; on every other from 3.9 to
# 3.13 found, stores, settings, form and transcripts.  make test-all: all on all of them,
# and the bucket suite on a real server, as .ci/run does on two.
# make check: the file's order, contents and sizes.  make startup: start-up times.
SHELL := /bin/bash
PYTHON ?= python3
PY := .venv/bin/python
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(PY) -m pytest -q -W ignore::pytest.PytestUnknownMarkWarning -n 3 test_tracecraft.py
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' tracecraft.py)
TOOLS := pytest pytest-xdist moto boto3 botocore requests huggingface_hub hf_xet tracecraft-ai==0.2.5

test: .venv/.ready
	$(PYTEST) -m "not soak and not bucket"
	@bash .ci/run --other-pythons brief

test-all: .venv/.ready
	$(PYTEST) -m "not soak"
	@bash .ci/run --other-pythons "not slow and not peers and not soak"

soak: .venv/.ready
	TRACECRAFT_SOAK=$${SOAK:-300} $(PYTEST) -m soak

check startup: .venv/.ready
	$(PY) test_tracecraft.py $@

bench demo:
	$(PYTHON) tracecraft.py $@

.venv/.ready: Makefile
	"$$(bash .ci/run --newest-python)" -m venv .venv
	$(PY) -m pip -q install --disable-pip-version-check $(TOOLS)
	touch $@

dist: check
	mkdir -p dist && cp tracecraft.py dist/tracecraft-$(VERSION).py
	cd dist && sha256sum tracecraft-$(VERSION).py > SHA256SUMS

clean:
	rm -rf .venv* dist .pytest_cache __pycache__

.PHONY: test test-all soak check startup bench demo dist clean
