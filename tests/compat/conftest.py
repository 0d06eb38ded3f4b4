# SPDX-License-Identifier: Apache-2.0
"""Every shim is tried on the unfused and on the compiled backend, which their callers choose with `use_backend`."""

import pytest
from one_thread import one_thread  # noqa: F401


@pytest.fixture(params=["eager", "cpu"])
def backend(request, available):
    """The backend that every chain of the test runs on."""
    from revkernels import backends

    with backends.use_backend(available(request.param)):
        yield request.param
