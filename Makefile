# Each target makes its own environment and can be run again at any time.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
TITAN  := .venv-torchtitan
READY  := $(VENV)/.ready

.PHONY: demo test smoke test-all test-torchtitan lint docs screenshots site bench wheel dist clean

demo: $(READY)
	$(BIN)/foreshock demo

# Files run side by side, each in one process with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: $(READY)
	$(PYTEST)

# The fault zoo's smallest tier: kernels that are broken on purpose are heard, and healthy ones are not.
smoke: $(READY)
	$(BIN)/python -m pytest -m slow tests/benchmarks

test-all: $(READY)
	$(PYTEST) -m ""

# torchtitan wants packages of its own, and so an environment of its own.
test-torchtitan:
	test -x $(TITAN)/bin/python || $(PYTHON) -m venv $(TITAN)
	$(TITAN)/bin/python -m pip install -c constraints.txt torch
	$(TITAN)/bin/python -m pip install -c constraints.txt -e . torchtitan==0.3.0 triton pytest pytest-timeout
	OMP_NUM_THREADS=1 $(TITAN)/bin/python -m pytest tests/integrations/test_torchtitan.py

# mypy does not see an editable install, so it is shown a plain copy of the packages.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/python -m pip install -q --no-deps --target build/typecheck .
	MYPYPATH=build/typecheck $(BIN)/mypy

# docs/metrics.md and the table in README.md, from the registry of metrics.
docs: $(READY)
	$(BIN)/python docs/generate.py

# The pictures of docs/report.md, from the run that `make demo` leaves, or RUN=folder; it takes chromium.
RUN ?= runs/demo/attention
screenshots: $(READY)
	$(BIN)/python docs/screenshots.py $(RUN)

# docs/ as a web site in build/site, which opens from the disk; a link that leads nowhere is an error. Without --quiet, under
# which mkdocs counts no warnings and --strict lets everything pass.
site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The tables of docs/log.md that say what watching costs, one after the other; each with JSON in build/bench.
bench: $(READY)
	$(BIN)/python benchmarks/matching.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/overhead.py --rounds 3 --json build/bench
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/scaling.py --json build/bench
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/spectra.py --json build/bench

IMPORTS := import foreshock, foreshock.demo, foreshock.integrations, foreshock.patterns, foreshock.passes, foreshock.monitors, \
	foreshock.monitors.detectors, foreshock.monitors.sinks; print(foreshock.__file__)

# The wheel, installed alone, must hold every subpackage and register the backend.
wheel: $(READY)
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist .
	$(BIN)/python -m pip install -q --no-deps --target build/wheel dist/*.whl
	cd build/wheel && PYTHONPATH=. ../../$(BIN)/python -P -c "$(IMPORTS)"

# What a release is made of: sdist and wheel, each installed in an environment of its own that is thrown away.
dist: $(READY)
	rm -rf build dist
	$(BIN)/python -m pip install -q -c constraints.txt twine
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	for file in dist/*; do \
		$(PYTHON) -m venv --clear build/alone && build/alone/bin/python -m pip install -q -c constraints.txt torch $$file && \
		(cd build && alone/bin/python -P -c "$(IMPORTS)" && alone/bin/foreshock --version) || exit 1; \
	done

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,docs]'
	touch $@

clean:
	rm -rf build dist $(VENV) $(TITAN)
