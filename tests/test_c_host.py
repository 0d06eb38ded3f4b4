# SPDX-License-Identifier: Apache-2.0
"""The example of a C host, by CMake and by pkg-config, and the options that say where the package has its parts.

The package is copied to a folder of its own, with a space in its name, and built on from there: nothing in it may point
to where it was made. `test_wheel.py` does the same with a wheel.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT, STRICT, need, need_extension, run

from revkernels import native

EXAMPLE = ROOT / "examples" / "c_host"
OPTIONS = {
    "--cmake-dir": native.cmake_dir,
    "--pkgconfig-dir": native.pkgconfig_dir,
    "--include-dir": native.include_dir,
    "--library": native.library,
}


def build_by_cmake(cmake, folder, *options):
    """Build the example and run it. There is no C++ compiler: a project in C alone must not need one."""
    no_cxx = {"CXX": "/nowhere/g++", "CC": "gcc", "CMAKE_GENERATOR": "Unix Makefiles"}
    run(cmake, "-S", EXAMPLE, "-B", folder, *options, variables=no_cxx)
    assert "CMAKE_CXX_COMPILER" not in (folder / "CMakeCache.txt").read_text()
    run(cmake, "--build", folder)
    assert run(folder / "c_host").endswith("all as it should be\n")


def build_by_pkg_config(folder, where):
    """Build the example and run it, with a line for the shell."""
    line = 'gcc $STRICT -std=c99 "$1" -o "$2" $(pkg-config --cflags --libs revkernels) -lm'
    program = folder / "c_host"
    variables = {"PKG_CONFIG_PATH": str(where), "STRICT": " ".join(STRICT)}
    run("sh", "-ec", line, "sh", EXAMPLE / "main.c", program, variables=variables)
    assert run(program).endswith("all as it should be\n")
    return program


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """What of the package a C host uses, away from where it was made."""
    need_extension()
    package, made = tmp_path_factory.mktemp("a folder of its own"), Path(native.library()).parent
    for part in map(Path, (find() for find in OPTIONS.values())):
        (shutil.copytree if part.is_dir() else shutil.copy)(part, package / part.name)
    for file in (*package.glob("cmake/*"), *package.glob("pkgconfig/*")):
        assert str(made) not in file.read_text() and str(ROOT) not in file.read_text()
    return package


def test_by_cmake(elsewhere, tmp_path):
    need("cmake", "gcc", "make")
    build_by_cmake("cmake", tmp_path, f"-Drevkernels_DIR={elsewhere / 'cmake'}")
    needed = run("readelf", "-d", tmp_path / "c_host") if shutil.which("readelf") else ""
    assert "libstdc++" not in needed


def test_cmake_finds_it_by_a_prefix_and_refuses_another_version(elsewhere, tmp_path):
    need("cmake", "gcc", "make")
    project = tmp_path / "project"
    project.mkdir()
    asked = "cmake_minimum_required(VERSION 3.22)\nproject(asked LANGUAGES C)\n"
    asked += "find_package(revkernels {} CONFIG REQUIRED)\n"
    command = ["cmake", "-S", project, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={elsewhere}"]
    (project / "CMakeLists.txt").write_text(asked.format("0.1"))
    run(*command)
    (project / "CMakeLists.txt").write_text(asked.format("0.9"))
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode != 0 and f"version: {native.version()}" in done.stderr


def test_by_pkg_config(elsewhere, tmp_path):
    need("pkg-config", "gcc")
    folder = tmp_path / "package"  # no space: pkg-config and pkgconf do not agree on how to write one
    shutil.copytree(elsewhere, folder)
    build_by_pkg_config(tmp_path, folder / "pkgconfig")
    variables = {"PKG_CONFIG_PATH": str(folder / "pkgconfig")}
    assert run("pkg-config", "--modversion", "revkernels", variables=variables).strip() == native.version()


def test_the_example_fails_where_it_should(tmp_path):
    """A wrong derivative, and a coupling without its grid: the program says so and its status is 1."""
    need("gcc")
    need_extension()
    source = (EXAMPLE / "main.c").read_text()
    flags = [f"-I{native.include_dir()}", native.library(), f"-Wl,-rpath,{Path(native.library()).parent}", "-lm"]
    for right, wrong, word in (
        ("(1 - f[row][to] * f[row][to])", "(1 - f[row][to])", "gradients"),
        ("coupling.grid_exponent = kGridExponent", "coupling.grid_exponent = REVK_NO_GRID", "bit for bit"),
    ):
        assert right in source
        (tmp_path / "main.c").write_text(source.replace(right, wrong))
        run("gcc", "-std=c99", tmp_path / "main.c", *flags, "-o", tmp_path / "c_host")
        done = subprocess.run([tmp_path / "c_host"], capture_output=True, text=True)
        assert done.returncode == 1
        assert any("FAILED" in line and word in line for line in done.stdout.splitlines()), done.stdout


def ask(*words, **options):
    command = [sys.executable, "-m", "revkernels", *words]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_prints_one_absolute_path(option):
    need_extension()
    done = ask(option)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == OPTIONS[option]() + "\n" and done.stdout.count("\n") == 1
    path = Path(done.stdout.strip())
    assert path.is_absolute() and path.exists()


def test_the_options_import_no_framework():
    need_extension()
    code = "import sys; from revkernels.cli import main\n"
    code += "try: main(['--library'])\nexcept SystemExit as e: assert not e.code\n"
    code += "print(sorted(sys.modules.keys() & {'torch', 'triton', 'jax', 'rich', 'scipy'}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_says_that_nothing_is_built(option, tmp_path):
    built = shutil.ignore_patterns("*.so", "*.so.*", "cmake", "include", "pkgconfig", "__pycache__")
    shutil.copytree(Path(native.__file__).parent, tmp_path / "revkernels", ignore=built)
    done = ask(option, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"revkernels: there is no \S+: the compiled extension is not built; .*\n", done.stderr)
