# SPDX-License-Identifier: Apache-2.0
"""The build: the header in C99 and C++, the C++ tests, what the files need, and what failures say."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import HEADER, ROOT, STRICT, need, need_extension, run

from revkernels import native


@pytest.mark.parametrize(
    "command", [["gcc", "-x", "c", "-std=c99"], ["g++", "-x", "c++", "-std=c++11"]], ids=["c", "c++"]
)
def test_header_stands_alone(command):
    need(command[0])
    run(*command, *STRICT, "-fsyntax-only", HEADER / "revkernels" / "revkernels.h")


@pytest.mark.parametrize("name", ["core", "norm_act"])
def test_host_side_in_cpp(tmp_path, name):
    """The same file that ctest runs (REVK_TESTS=ON), linked to the library as installed."""
    need("g++")
    need_extension()
    program = tmp_path / f"test_{name}"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", f"-I{ROOT / 'csrc'}", f"-I{HEADER}"]
    run(
        "g++",
        *flags,
        ROOT / "tests" / "csrc" / f"test_{name}.cpp",
        native.library(),
        f"-Wl,-rpath,{Path(native.library()).parent}",
        "-o",
        program,
    )
    assert run(program) == "all passed\n"


def test_the_module_needs_no_torch_and_no_driver():
    need("readelf")
    need_extension()
    for file in (native.library(), *Path(native.__file__).parent.glob("_native*.so")):
        needed = [line for line in run("readelf", "-d", file).splitlines() if "NEEDED" in line]
        assert needed and not any(word in line for line in needed for word in ("torch", "c10", "libcuda", "cudart"))


FAILURES = {
    "no nvcc": (["-DREVK_CUDA=ON"], {"CUDACXX": "/nowhere/nvcc"}, ["REVK_CUDA=ON, but no working nvcc", "CUDACXX"]),
    "bad choice": (["-DREVK_CUDA=MAYBE"], {}, ['REVK_CUDA is "MAYBE"', "AUTO, ON or OFF"]),
    "no compiler": ([], {"CXX": "/nowhere/g++"}, ["No C++ compiler found", "apt install g++"]),
    "no header": (["-DREVK_PYTHON=ON", "-DPython_INCLUDE_DIR=/nowhere"], {}, ["Python.h of", "python3-dev"]),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_configure_says_what_is_missing(case, tmp_path):
    need("cmake")
    options, environment, words = FAILURES[case]
    command = [
        "cmake",
        "-S",
        ROOT,
        "-B",
        tmp_path,
        "-DREVK_PYTHON=OFF",
        f"-DPython_EXECUTABLE={sys.executable}",
        *options,
    ]
    done = subprocess.run(list(map(str, command)), env={**os.environ, **environment}, capture_output=True, text=True)
    said = " ".join(done.stderr.split())
    assert done.returncode != 0 and all(word in said for word in words), said


def test_a_failed_install_ends_with_the_reason(tmp_path):
    """setup.py repeats CMake's reason as its last words, without a traceback."""
    need("cmake")
    pytest.importorskip("pybind11")
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "REVK_CUDA": "MAYBE"}, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == 'REVK_CUDA is "MAYBE"; AUTO, ON or OFF is needed.'


def test_old_setuptools_are_named():
    """`pip install --no-build-isolation` takes what is there; what older ones say is about project.license."""
    pytest.importorskip("setuptools")
    code = "import runpy, setuptools; setuptools.__version__ = '65.5.0'; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr == "error: setuptools is 65.5.0; 77 or later is needed: pip install 'setuptools>=77'\n"


SMALL = """
cmake_minimum_required(VERSION 3.20...4.0)
project(small LANGUAGES CXX)
add_library(small SHARED a.cpp b.cpp)
install(TARGETS small LIBRARY DESTINATION .)
"""


@pytest.fixture
def editable(tmp_path, monkeypatch, capfd):
    """What an editable build of a small project by our setup.py compiles, as a function."""
    need("g++")
    for name in ("pybind11", "cmake", "ninja"):
        if importlib.util.find_spec(name) is None and (name == "pybind11" or shutil.which(name) is None):
            pytest.skip(f"{name} is not installed")
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "CMakeLists.txt").write_text(SMALL)
    for name in "ab":
        (tmp_path / f"{name}.cpp").write_text(f"int {name}() {{ return 1; }}\n")

    def build():
        command = script.CMakeBuild(setuptools.Distribution())
        command.ensure_finalized()
        command.editable_mode = True
        command.run()
        return sorted(re.findall(r"Building CXX object \S+/(\w)\.cpp", capfd.readouterr().out))

    return build


def test_an_editable_build_compiles_what_changed(editable, tmp_path, monkeypatch):
    """Nothing the second time; one file; all of them with another compiler, at another path or at the same."""
    monkeypatch.delenv("CXX", raising=False)
    assert editable() == ["a", "b"]
    assert (tmp_path / "revkernels" / "libsmall.so").exists()
    assert editable() == []
    (tmp_path / "b.cpp").touch()
    assert editable() == ["b"]
    compiler = tmp_path / "c++"
    monkeypatch.setenv("CXX", str(compiler))
    for version in (98, 99):
        redefined = f"-U__GNUC_PATCHLEVEL__ -D__GNUC_PATCHLEVEL__={version}"
        compiler.write_text(f'#!/bin/sh\nexec g++ {redefined} "$@"\n')
        compiler.chmod(0o755)
        assert editable() == ["a", "b"]
        assert editable() == []


def test_an_editable_build_forgets_what_it_found(editable, tmp_path, monkeypatch):
    """A compiler that went is missed, not taken from the cache; when it is back, its object files are still good."""
    assert editable() == ["a", "b"]
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "/nowhere/c++")
        with pytest.raises(Exception, match="The configure step failed"):
            editable()
    assert editable() == []
    (tmp_path / "build" / "editable" / "cmake" / "compilers.json").write_text("{")  # interrupted while it was written
    assert editable() == ["a", "b"]
    assert editable() == []


@pytest.mark.skipif(sys.platform != "linux", reason="the linker's words are those of Linux")
def test_a_file_that_is_not_in_the_list_fails_the_build(editable, tmp_path):
    """With the function that it would have defined as the last words."""
    without = SMALL.replace(" b.cpp", "") + "target_link_options(small PRIVATE -Wl,--no-undefined)\n"
    assert "-Wl,--no-undefined" in (ROOT / "CMakeLists.txt").read_text()
    (tmp_path / "CMakeLists.txt").write_text(without)
    (tmp_path / "a.cpp").write_text("int b();\nint a() { return b(); }\n")
    with pytest.raises(Exception, match=r"The build failed\.\s+.*undefined reference to `b\(\)'"):
        editable()
