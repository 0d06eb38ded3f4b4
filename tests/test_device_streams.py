# SPDX-License-Identifier: Apache-2.0
"""Streams, workspaces and results on a CUDA device, without one: the C library's device side is stood in for.

The Python code and the bindings are the real ones. What they ask of the C interface for a device is written down and
made on the host by tests/csrc/device_stand_in.c, which is preloaded; the cases are in tests/stand_in_cases.py.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from revkernels import native

HERE = Path(__file__).resolve().parent
CASES = re.findall(r"^def (case_\w+)", (HERE / "stand_in_cases.py").read_text(), re.MULTILINE)

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
    pytest.mark.skipif(native.missing() is not None, reason=str(native.missing())),
    pytest.mark.skipif(sys.platform != "linux", reason="a preloaded library is Linux's"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every case, run in one process: its name to "ok" or a traceback."""
    stand_in = tmp_path_factory.mktemp("stand_in") / "stand_in.so"
    flags = ["-std=gnu99", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    sources = [f"-I{HERE.parent / 'csrc' / 'include'}", HERE / "csrc" / "device_stand_in.c", "-ldl"]
    done = subprocess.run(["gcc", *flags, *sources, "-o", stand_in], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", HERE / "stand_in_cases.py"],
        env={**os.environ, "LD_PRELOAD": str(stand_in)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_on_a_device(case, results):
    assert results[case] == "ok", results[case]
