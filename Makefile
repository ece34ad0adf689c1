# `make demo` and `make test` set themselves up: they need Python 3.11 and make, nothing else.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Freed memory is kept for the next step instead of going back page by page: a tenth to a third of a CPU step.
export MALLOC_TRIM_THRESHOLD_ := 1000000000
export MALLOC_MMAP_THRESHOLD_ := 1000000000

.PHONY: demo test test-slow test-browser lint clean
demo: $(VENV)/installed
	$(BIN)/stepdistill run configs/letters.yaml $(DEMO_ARGS)

# A process a core, a thread each: the tests' models are too small for threads.
TOGETHER := -n logical --dist loadfile
test test-slow: export OMP_NUM_THREADS := 1

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow" $(TOGETHER)

# With what the optional sources need: scikit-image's and scikit-learn's photographs, parquet through datasets.
test-slow: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,lint,worlds,data,quantize,onnx]"
	$(BIN)/python -m pytest -m slow $(TOGETHER)

# The report in headless Chromium: needs chromium and chromium-driver (Debian's packages); skips itself without them.
test-browser: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,lint,browser]"
	$(BIN)/python -m pytest tests/browser

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,lint]"
	touch $@

clean:
	rm -rf $(VENV) runs
