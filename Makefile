# Two commands for a clean machine with python3, make and git. All they do is put nox into .venv and call it;
# noxfile.py has the rest.
#
#   make test                   style, types, and the tests on every interpreter found
#   make demo                   the demo on this repository
#   make demo REPO=path         ... on another one
#   make demo CACHE_BACKEND=redis REDIS_URL=redis://localhost:6379/0

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

.PHONY: demo help nox test

test: nox
	@$(VENV)/bin/nox

demo: nox
	@$(VENV)/bin/nox --session demo -- $(ARGS)

help:
	@sed -n 's/^#   //p' Makefile

nox:
	@if $(VENV)/bin/nox --version >/dev/null 2>&1; then exit 0; fi; \
	if ! command -v $(PYTHON) >/dev/null; then echo "make: $(PYTHON) was not found" >&2; exit 1; fi; \
	if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo "make: $$($(PYTHON) --version) is too old, 3.11 is needed; name a newer one: make PYTHON=python3.12" >&2; exit 1; fi; \
	if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "make: $(PYTHON) can't make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; fi; \
	echo "Installing nox into $(VENV)"; \
	$(PYTHON) -m venv --clear $(VENV) && $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check nox
