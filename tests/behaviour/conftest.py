# SPDX-License-Identifier: Apache-2.0
"""Every situation is tried on the unfused and on the compiled backend, rebuilding and storing activations."""

import pytest


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Tensors here are tiny: on a busy machine a second thread costs its waiting, and gains nothing."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["eager", "cpu"])
def backend(request, available):
    return available(request.param)


@pytest.fixture
def compiled(available):
    """The compiled backend alone."""
    return available("cpu")


@pytest.fixture(params=["reconstruct", "store"])
def activations(request):
    return request.param


@pytest.fixture
def options(backend, activations):
    return {"backend": backend, "activations": activations}
