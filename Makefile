# SPDX-License-Identifier: Apache-2.0
# make demo | test | test-all | lint | docs | clean      needs python3 (venv, headers), make, g++; nvcc is optional.
#
# PYTHON=python3.12      another interpreter       VENV=.venv        another environment
# DEMO_ARGS=--quick      options of the demo       TEST_ARGS="-k coupling"    options of pytest
# REVK_CUDA=OFF          leave CUDA out of the build      TEST_WORKERS=2    processes that tests run in
#
# On a machine without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu fetches the small torch.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TEST_WORKERS ?= 2
# An extension that does not load would have its tests skipped: that is an error here. A process that dies, or hangs in
# compiled code (pyproject.toml), is replaced, twice at most.
LOADS = $(BIN)/python -c 'import sys; from revkernels import native; sys.exit(native.missing())'
PYTEST = $(LOADS) && \
    $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 2
REVK_CUDA ?= AUTO
export REVK_CUDA

# Each step leaves a stamp, so that a second run repeats only what its inputs changed. The build's stamp carries the
# CUDA choice: asking for another one builds again.
CREATED := $(VENV)/.made-venv
TOOLS := $(VENV)/.made-tools
BUILT := $(VENV)/.made-build-cuda-$(REVK_CUDA)
PEERS := $(VENV)/.made-peers
SOURCES := $(shell find csrc cmake -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml

.PHONY: all demo test test-all lint docs clean
.DELETE_ON_ERROR:

all: $(BUILT)

$(CREATED):
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) found; install Python 3.10 or later"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "make: $(PYTHON) is too old; Python 3.10 or later is needed (make PYTHON=python3.12)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo "make: $(PYTHON) has no venv; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; p = sysconfig.get_paths(); \
	    sys.exit(not any(os.path.isfile(os.path.join(p[k], "Python.h")) for k in ("include", "platinclude")))' || \
	    { echo "make: Python.h is missing; on Debian or Ubuntu: apt-get install python3-dev"; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || \
	    { echo "make: no C++ compiler found; on Debian or Ubuntu: apt-get install g++"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(TOOLS): $(CREATED) constraints.txt
	$(PIP) install --quiet --constraint constraints.txt setuptools pybind11 ninja cmake
	@touch $@

# The build, and in the versions of constraints.txt what testing, the demo and linting use. Without build isolation, for
# the build tools are here already; pip finds everything in place when only a source has changed, and ninja compiles what
# depends on that source alone (build/editable).
$(BUILT): $(TOOLS) $(SOURCES)
	@rm -f $(VENV)/.made-build-*
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(BUILT)
	$(BIN)/python -m revkernels demo $(DEMO_ARGS)

test: $(BUILT)
	$(PYTEST) -m "not slow" $(TEST_ARGS)

test-all: $(BUILT) $(PEERS)
	$(PYTEST) $(TEST_ARGS)

# Other reversible libraries, for the tests that compare ours with them, and the packages whose models the integrations
# change. The second command installs what PyTorch Geometric and transformers require, and networks for JAX. timm needs
# torchvision, whose build on PyPI is for CUDA: it goes into a folder of its own, where only timm's tests look
# (tests/integrations/torchvision.py).
$(PEERS): $(TOOLS) tests/compat/peers.txt tests/integrations/packages.txt
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --no-deps \
	    -r tests/compat/peers.txt -r tests/integrations/packages.txt
	$(PIP) install --quiet --constraint constraints.txt \
	    aiohttp click fsspec httpx2 jinja2 psutil pyparsing pyyaml requests tqdm typer xxhash equinox flax
	@rm -rf $(VENV)/beside
	$(PIP) install --quiet --no-deps --target $(VENV)/beside torchvision==0.28.0 || \
	    echo "make: there is no torchvision 0.28.0 for this Python and machine: the tests of timm are skipped"
	@touch $@

CXX_FILES = $(shell find csrc tests examples revkernels/adapters -name '*.h' -o -name '*.cpp' -o -name '*.c' -o -name '*.cu' -o -name '*.cuh')

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

# In site/; a warning is an error. Not --quiet, which would keep warnings from being counted.
docs: $(BUILT)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)/.made-build-*
	rm -f revkernels/*.so revkernels/*.so.*
	rm -rf revkernels/include revkernels/cmake revkernels/pkgconfig
	find revkernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
