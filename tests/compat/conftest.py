# SPDX-License-Identifier: Apache-2.0
"""Every shim is tried on the unfused and on the compiled backend, which their callers choose with `use_backend`."""

import importlib.util

import pytest

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]  # they import it first of all


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["eager", "cpu"])
def backend(request, available):
    """The backend that every chain of the test runs on."""
    from revkernels import backends

    with backends.use_backend(available(request.param)):
        yield request.param
