# SPDX-License-Identifier: Apache-2.0
"""The two processes that every test here sends its case to."""

import pytest

from distributed.processes import Processes


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    dist = pytest.importorskip("torch.distributed")
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch is built without gloo")
    started = Processes(tmp_path_factory.mktemp("processes"))
    yield started
    started.close()


@pytest.fixture
def passes(request, processes, available):
    """passes(case): the file's case comes to a good end in every process, or the test fails with their tracebacks."""

    import torch

    def check(case):
        available(request.module.cases[case].backend)
        error = processes.run(request.module.__name__, case)
        if error is not None:
            lacking = "'Stream' object has no attribute 'record_event'"  # in torch 2.6
            if lacking in error and not hasattr(torch.cpu.Stream, "record_event"):
                pytest.skip(f"this torch's FSDP2 does not run on CPUs: {lacking}")
            pytest.fail(error, pytrace=False)

    return check
