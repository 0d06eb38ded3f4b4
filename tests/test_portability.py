# SPDX-License-Identifier: Apache-2.0
"""Another processor: the library and its C++ tests compiled for aarch64 and run by an emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.slow
def test_the_kernels_on_aarch64(tmp_path):
    for tool in ("cmake", COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian: apt install g++-aarch64-linux-gnu qemu-user)")
    settings = {
        "REVK_PYTHON": "OFF",
        "REVK_CUDA": "OFF",
        "REVK_TESTS": "ON",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_CROSSCOMPILING_EMULATOR": f"{EMULATOR};-L;/usr/aarch64-linux-gnu",
    }
    for command in (
        ["cmake", "-S", ROOT, "-B", tmp_path, *(f"-D{name}={value}" for name, value in settings.items())],
        ["cmake", "--build", tmp_path, "--parallel", "2"],
        ["ctest", "--test-dir", tmp_path, "--output-on-failure"],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "100% tests passed, 0 tests failed out of 2" in done.stdout
