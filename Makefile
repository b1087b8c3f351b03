# make demo   from nothing: tokenise real clips, train a tiny model, compare with the official way, write demo/report.md
# make test   from nothing: every test but those marked slow
# also: test-all (slow ones too), sanitize (native code under ASan and UBSan, 10 minutes), bench (every op on this CPU
# against its rivals, 10 minutes), lint, clean,
# gpu-suite (on a machine with a GPU and a CUDA build of torch: everything it is needed for, into gpu-suite/)
PYTHON ?= python3
# What to give pip for torch, e.g. TORCH="torch triton --index-url ..." for a CPU build from torch's own index.
TORCH ?= torch triton
VENV := .venv
RUN := $(VENV)/bin/python
# Byte-compiling the whole of torch would take longer than downloading it.
PIP := $(RUN) -m pip install --quiet --no-compile --disable-pip-version-check --constraint .ci/constraints.txt
# The Triton of CUDA builds of torch 2.11. tests/test_triton_compile.py compiles the kernels with it too, where there is
# a wheel of it for this Python.
OLDER_TRITON := build/triton-3.6.0
SOURCES := $(wildcard setup.py CMakeLists.txt csrc/*.cpp csrc/*/*)

# Two processes of one thread each; a file's tests stay together and share its fixtures, in the order of conftest.py.
TEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

.PHONY: setup demo test test-all bench gpu-suite sanitize lint clean

setup: $(VENV)/ready $(OLDER_TRITON)

$(VENV)/ready: pyproject.toml .ci/constraints.txt $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) $(TORCH)
	$(PIP) setuptools pybind11 ninja
	$(PIP) --no-build-isolation --editable '.[test,demo,dev]'
	touch $@

$(OLDER_TRITON): | $(VENV)/ready
	rm -rf $@.partial
	-$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check --no-deps --target $@.partial \
		triton==3.6.0 && mv $@.partial $@

demo: setup
	$(RUN) -m bench.demo --out demo

test: setup
	$(TEST) tests

test-all: setup
	$(TEST) tests --all

bench: setup
	$(RUN) -m bench --seconds 3

# With the Python that has the CUDA build of torch: .venv need not.
gpu-suite:
	-$(PYTHON) -m bench.gpu_suite --call 1 --out gpu-suite/1
	$(PYTHON) -m bench.gpu_suite --call 2 --out gpu-suite/2 --with gpu-suite/1

sanitize: setup
	PYTHON=$(CURDIR)/$(RUN) tools/asan.sh

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) build demo gpu-suite lumos_kernels/*.so *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
