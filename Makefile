# `make demo` and `make test` set themselves up: they need make and Python 3.11 or newer, nothing else. The newest Python that
# every package has a wheel for is taken; PYTHON=python3.12 names another one.
PYTHONS := $(or $(PYTHON),python3.14 python3.13 python3.12 python3.11 python3)
VENV := .venv
BIN := $(VENV)/bin
# Keep freed memory for the next step: giving it back and taking it again costs a tenth to a third of a step on the CPU.
export MALLOC_TRIM_THRESHOLD_ := 1000000000
export MALLOC_MMAP_THRESHOLD_ := 1000000000

.PHONY: demo test test-slow test-browser lint clean
demo: $(VENV)/installed
	$(BIN)/stepdistill run configs/letters.yaml $(DEMO_ARGS)

# One test process per core with one thread each: the tests' models are too small for several threads.
# The files go to the processes in their order, not by their number of tests: the longest have few tests and would come last.
TOGETHER := -n logical --dist loadfile --no-loadscope-reorder
test test-slow: export OMP_NUM_THREADS := 1

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow" $(TOGETHER)

# With what the optional sources need: scikit-image's and scikit-learn's photographs, parquet through datasets.
test-slow: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,lint,worlds,data,quantize,onnx,prodigy,trackers]"
	$(BIN)/python -m pytest -m slow $(TOGETHER)

# The report in headless Chromium: needs chromium and chromium-driver (Debian's packages); skips itself without them.
test-browser: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,lint,browser]"
	$(BIN)/python -m pytest tests/browser

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Updates an existing environment, or makes a new one with the first Python that everything installs on. After a change of
# PYTHON, `make clean` comes first.
INSTALL := -m pip install --quiet --constraint constraints.txt --only-binary :all:
$(VENV)/installed: pyproject.toml constraints.txt setup.py
	@for python in $(if $(PYTHON),,$(wildcard $(BIN)/python)) $(PYTHONS); do \
	  case $$python in $(BIN)/*) ;; *) \
	    command -v $$python >/dev/null && $$python -m venv --clear $(VENV) || continue ;; \
	  esac; \
	  if $(BIN)/python $(INSTALL) torch && $(BIN)/python $(INSTALL) --editable ".[test,lint]"; then \
	    $(BIN)/python --version; touch $@; exit 0; \
	  fi; \
	  echo "$$python: not every package could be installed; trying the next Python"; \
	done; \
	echo "no Python of $(PYTHONS) has a wheel of every package; name another: make $(or $(MAKECMDGOALS),test) PYTHON=..."; exit 1

clean:
	rm -rf $(VENV) runs
