# SPDX-License-Identifier: Apache-2.0
"""Programs that tests call: compilers and the like, and what to do where one is missing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from revkernels import native

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "csrc" / "include"
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]


def need(*tools):
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def need_extension():
    if native.missing() is not None:
        pytest.skip(str(native.missing()))


def run(*command, variables=None, **options):
    """Run a program that must succeed, with ``variables`` on top of the environment; return its standard output."""
    if variables is not None:
        options["env"] = {**os.environ, **variables}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command[0]}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout
