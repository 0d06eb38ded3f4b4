# SPDX-License-Identifier: Apache-2.0
"""Runs CMake for the C library and the Python module. Everything else is in pyproject.toml."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
PARALLEL = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)

if int(setuptools.__version__.partition(".")[0]) < 77:  # without build isolation nobody else looks
    sys.exit(f"error: setuptools is {setuptools.__version__}; 77 or later is needed: pip install 'setuptools>=77'")


def find_tool(name: str, folder_attribute: str) -> str:
    """The tool from its Python package (build isolation puts it there), else from PATH."""
    try:
        folder = Path(getattr(importlib.import_module(name), folder_attribute))
    except (ImportError, AttributeError):
        folder = None
    path = shutil.which(name, path=folder and str(folder)) or shutil.which(name)
    if path is None:
        raise SetupError(
            f"{name} not found. Get it with `pip install {name}` or `apt install "
            f"{'ninja-build' if name == 'ninja' else name}`."
        )
    return path


def find_pybind11() -> str:
    try:
        import pybind11
    except ImportError:
        raise SetupError("pybind11 not found. Get it with `pip install pybind11`.") from None
    return str(pybind11.get_cmake_dir())


def run(command: list[str], what: str) -> None:
    """Shows the tool's output as it comes; on failure the reason is printed last, and no traceback."""
    lines: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            sys.stdout.write(line)
            lines.append(line)
    if process.returncode:
        raise SetupError(f"{what} failed.\n\n{reason(lines)}")


def reason(lines: list[str]) -> str:
    """What CMake, the compiler or the linker complained about: CMake's last error block, or the others' first error."""
    starts = [i for i, line in enumerate(lines) if line.startswith("CMake Error")]
    if starts:
        block = [line.strip() for line in lines[starts[-1] + 1 :]]
        ends = [i for i, line in enumerate(block) if line.startswith(("Call Stack", "-- Configuring incomplete"))]
        return " ".join(word for word in block[: ends[0] if ends else None] if word)
    errors = [line for line in lines if "error" in line.lower() or "undefined reference" in line]
    return "".join(errors[:3]) or "".join(lines[-5:])


def forget_findings(build: Path) -> None:
    """Leaves object files and ninja's logs alone, so that compilers, Python and packages are all looked for again."""
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    for path in (build / "CMakeFiles").glob("*"):
        if path.suffix != ".dir":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def clean_after_another_compiler(cmake: str, build: Path) -> None:
    """Removes object files of other compilers than CMake has just found: ninja looks at their paths alone."""
    found = {path.name: path.read_text() for path in (build / "CMakeFiles").glob("[0-9]*/CMake*Compiler.cmake")}
    record = build / "compilers.json"
    before: dict[str, str] = {}
    if record.exists():
        try:
            before = json.loads(record.read_text())
        except ValueError:  # its writing was interrupted
            before = dict.fromkeys(found, "")
    if any(before.get(name, text) != text for name, text in found.items()):
        run([cmake, "--build", str(build), "--target", "clean"], "Removing the last build")
    # A language that is left out for once keeps its entry, for its object files may be kept too.
    record.write_text(json.dumps({**before, **found}))


class CMakeBuild(build_ext):
    """Installs what CMake builds into the package folder: the wheel's, or the source's when editable.

    setuptools' folder for an editable build is new every time; ours stays, and ninja compiles what has changed.
    """

    def run(self) -> None:
        editable = getattr(self, "editable_mode", False)
        in_source = self.inplace or editable
        package = ROOT / "revkernels" if in_source else Path(self.build_lib).resolve() / "revkernels"
        build = ROOT / "build" / "editable" / "cmake" if editable else Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        forget_findings(build)
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-Wno-dev",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'BIN_DIR')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_INSTALL_PREFIX={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={find_pybind11()}",
            f"-DREVK_CUDA={os.environ.get('REVK_CUDA', 'AUTO')}",
        ]  # fmt: skip
        run(configure, "The configure step")
        clean_after_another_compiler(cmake, build)
        run([cmake, "--build", str(build), "--parallel", PARALLEL], "The build")
        run([cmake, "--install", str(build)], "Copying the built files")


setup(ext_modules=[Extension("revkernels._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
