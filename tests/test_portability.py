# SPDX-License-Identifier: Apache-2.0
"""Another processor and another compiler: the library compiled for aarch64 and emulated, and compiled by clang."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from programs import ROOT, need, run

ARM_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def build(folder, settings):
    """Configure, compile and run the C++ tests; return what configuring and compiling said."""
    settings = {"REVK_CUDA": "OFF", "REVK_TESTS": "ON", **settings}
    said = run("cmake", "-S", ROOT, "-B", folder, *(f"-D{name}={value}" for name, value in settings.items()))
    said += run("cmake", "--build", folder, "--parallel", "2")
    tested = run("ctest", "--test-dir", folder, "--output-on-failure")
    assert "100% tests passed, 0 tests failed out of 2" in tested
    return said


@pytest.mark.slow
def test_the_kernels_on_aarch64(tmp_path):
    need("cmake", ARM_COMPILER, EMULATOR)  # Debian: g++-aarch64-linux-gnu qemu-user
    settings = {
        "REVK_PYTHON": "OFF",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": ARM_COMPILER,
        "CMAKE_CROSSCOMPILING_EMULATOR": f"{EMULATOR};-L;/usr/aarch64-linux-gnu",
    }
    build(tmp_path, settings)


def clang():
    """clang++, or the newest clang++-NN, with its OpenMP (Debian: clang-19 libomp-19-dev)."""
    names = ["clang++", *(f"clang++-{version}" for version in range(30, 13, -1))]
    for name in filter(shutil.which, names):
        try:
            run(name, "-fopenmp", "-x", "c++", "-fsyntax-only", "-", input="#include <omp.h>\n")
        except AssertionError:
            continue
        return name
    return pytest.skip("no clang++ with OpenMP is installed")


@pytest.mark.slow
def test_the_package_by_clang(tmp_path):
    """It links, compiles without a warning of our own, and computes what the oracle computes."""
    need("cmake")
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    settings = {
        "CMAKE_CXX_COMPILER": clang(),
        "CMAKE_INSTALL_PREFIX": tmp_path,
        "REVK_PACKAGE_DIR": "revkernels",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    said = build(tmp_path / "build", settings)
    assert not re.search(rf"{re.escape(str(ROOT))}\S*: warning:|unknown warning", said), said
    built = shutil.ignore_patterns("*.so*", "include", "cmake", "pkgconfig", "__pycache__")
    shutil.copytree(ROOT / "revkernels", tmp_path / "revkernels", ignore=built)
    run("cmake", "--install", tmp_path / "build")
    variables = {"PYTHONPATH": str(tmp_path)}
    command = "import revkernels.native; print(revkernels.native.library())"
    found = run(sys.executable, "-c", command, cwd=tmp_path, variables=variables)
    assert Path(found.strip()).parent == tmp_path / "revkernels"
    run(sys.executable, "-m", "revkernels", "check", "--backend", "cpu", cwd=tmp_path, variables=variables)
