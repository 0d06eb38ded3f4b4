# SPDX-License-Identifier: Apache-2.0
"""What every test shares: equal seeds, two threads, and a reason to skip where there is no GPU."""

import functools
import gc
import importlib.util
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

# JAX would take three quarters of a GPU that other processes test on as well.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Where two workers have two threads each on two cores, threads that spin while they wait take the other worker's core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# For `benchmarks`, which is not installed. Last, so that an installed revkernels is not hidden by its source folder.
sys.path.append(str(Path(__file__).resolve().parent.parent))

HAVE_TORCH = importlib.util.find_spec("torch") is not None
if not HAVE_TORCH:  # these import it first of all
    collect_ignore_glob = [f"{folder}/test_*.py" for folder in ("behaviour", "compat", "distributed", "integrations")]


def why_no_gpu() -> str | None:
    """Why tests marked gpu cannot run here, or None."""
    if not HAVE_TORCH:
        return "torch is not installed"
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built without CUDA"
    return None if torch.cuda.is_available() else "no CUDA device"


def pytest_configure(config):
    if HAVE_TORCH:
        import torch

        torch.set_num_threads(2)  # the results must not depend on it; the time does
        # For a device that is not there torch puts every seed into a queue, with the stack that it came from: a sixth
        # of the time of many tests here.
        for device in (torch.cuda, torch.xpu, torch.mtia):
            if not device.is_available():
                device.manual_seed_all = lambda seed: None


#: Files that go first: what asks for the host's bytes, which glibc tells at a cost that grows with the heap's age, and
#: what takes long in one piece, which would leave the other workers idle at the end.
FIRST = (
    *("behaviour/test_budget*", "behaviour/test_costs.py", "behaviour/test_soak.py", "test_measure.py"),
    *("test_cuda_host.py", "test_sanitizers.py", "documentation/*", "test_cuda_build.py", "test_coupling_int16.py"),
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    here = Path(__file__).parent

    @functools.cache
    def place(path):
        return next((n for n, pattern in enumerate(FIRST) if path.match(str(here / pattern))), len(FIRST))

    items.sort(key=lambda item: place(item.path))
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    reason = why_no_gpu()
    if reason is not None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter):
    """List the blocks of the documentation that were not run, each with its reason."""
    skipped = [report for report in terminalreporter.stats.get("skipped", ()) if "test_pages.py" in report.nodeid]
    if skipped:
        terminalreporter.section(f"{len(skipped)} blocks of the documentation were not run")
        for report in skipped:
            block = report.nodeid.partition("[")[2].rstrip("]")
            terminalreporter.line(f"{block:32} {report.longrepr[2].removeprefix('Skipped: ')}")


@pytest.fixture(scope="module", autouse=True)
def _older_objects_are_not_searched():
    """Measuring memory collects garbage, which takes seconds where a process holds what many files have imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def available():
    """available(name) -> the name of a backend that can run here; else the test is skipped, or fails if it may not be.

    It may not be where everything is built (CI=1), nor where the run is about that backend (REVKERNELS_BACKEND).
    """

    def check(name):
        from revkernels.backends import BACKENDS

        reason = BACKENDS[name].missing()
        if reason is not None:
            if os.environ.get("CI"):
                pytest.fail(f"backend {name!r} must be there in CI: {reason}")
            if os.environ.get("REVKERNELS_BACKEND") == name:
                pytest.fail(f"backend {name!r} is asked for by REVKERNELS_BACKEND: {reason}")
            pytest.skip(f"backend {name!r}: {reason}")
        return name

    return check


@pytest.fixture(autouse=True)
def seeds():
    """Start every test from the same random state, whichever ran before."""
    random.seed(0)
    np.random.seed(0)
    if HAVE_TORCH:
        import torch

        torch.manual_seed(0)


@pytest.fixture(params=[False, True], ids=["one call a half-step", "two"])
def half_step_calls(request, monkeypatch):
    """Both ways to undo a half-step under JAX, in how many calls; a machine takes one of them."""
    monkeypatch.setattr("revkernels.adapters.jax.streams._runs_calls_side_by_side", lambda: request.param)
    return 1 + request.param
