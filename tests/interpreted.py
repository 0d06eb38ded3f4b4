# SPDX-License-Identifier: Apache-2.0
"""A test file's tests in a process of its own, under Triton's interpreter: it counts when a kernel is decorated."""

import os
import subprocess
import sys

import pytest

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"  # this is that process

both = pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])


def run(file, which, *options):
    """Run those that are marked ``which``."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-m", which, *options]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
