# SPDX-License-Identifier: Apache-2.0
"""Random exporters of DLPack in a process of their own (tests/dlpack_fuzz.py), so that a crash is a failed test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from revkernels import native

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
if native.missing() is not None:
    pytest.skip(str(native.missing()), allow_module_level=True)
if native.missing("cuda") is None:
    pytest.skip("an export that claims the device for host memory would be launched on", allow_module_level=True)

SCRIPT = Path(__file__).resolve().parent / "dlpack_fuzz.py"


def fuzz(seconds, tmp_path, first_seed):
    """Try cases for that long; what was refused and accepted, or the case that failed or crashed."""
    log = tmp_path / "case"
    command = [sys.executable, "-X", "faulthandler", SCRIPT, str(seconds), log, str(first_seed)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=seconds + 120)
    last = log.read_text() if log.exists() else "none"
    assert done.returncode == 0, f"exit status {done.returncode}; the last case was\n{last}\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def test_ten_seconds(tmp_path):
    tally = fuzz(6, tmp_path, first_seed=0)
    assert min(tally[what] for what in ("accepted", "refused", "right")) > 100


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_five_minutes(tmp_path):
    tally = fuzz(300, tmp_path, first_seed=1_000_000)
    assert min(tally[what] for what in ("accepted", "refused", "right")) > 3000
