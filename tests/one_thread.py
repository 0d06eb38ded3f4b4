# SPDX-License-Identifier: Apache-2.0
"""For tests whose tensors are tiny: on a busy machine a second thread costs its waiting, and gains nothing."""

import pytest


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """One thread for torch in the folder whose conftest imports this."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def one_thread_here():
    """The same for one file that imports this."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
