# make serve [ARGS="MODEL --option value ..."]   serve a model (default: the bundled demo) on port 8000
# make test  [ARGS="-k name ..."]                run the tests
# make chaos [ARGS="-k name ..."]                the slow tests of deaths: nodes, frozen processes, network namespaces (those as root)
# make bench [ARGS="--trace FILE --model DIR"]   techniques against their baselines, tables, JSON and PNG in build/bench
# make check                                     ruff, mypy --strict, import-linter
# make grid                                      every family on every tp x pp, in process and over HTTP
# make proto                                     the gRPC code in router/ anew, after a change of router/inference.proto
# make fuzz                                      the property tests with new and many more examples

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(if $(shell $(p) -c "print(1)" 2>/dev/null),$(p))))
VENV := .venv
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: serve test grid chaos bench check proto fuzz clean

serve: $(VENV)/.serve
	@exec $(VENV)/bin/rayline serve $(ARGS)

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n 2 $(ARGS)

chaos: $(VENV)/.test
	$(VENV)/bin/python -m pytest -m chaos --timeout=900 -rP tests/serve $(ARGS)

bench: $(VENV)/.test
	$(VENV)/bin/python -m bench $(ARGS)

check: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

grid: $(VENV)/.test
	$(VENV)/bin/python -m pytest -m grid $(ARGS)

proto: $(VENV)/.test
	$(VENV)/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. router/inference.proto

fuzz: $(VENV)/.test
	$(VENV)/bin/python -m pytest --hypothesis-profile=fuzz --timeout=3600 tests/cluster tests/kv tests/router $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Rayline needs Python 3.11 or newer" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version, so that a CPU build that lies at hand is taken before a larger one
$(VENV)/.serve: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.serve
	$(PIP) --editable ".[test,bench]"
	@touch $@
