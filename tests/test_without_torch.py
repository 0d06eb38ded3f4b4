# SPDX-License-Identifier: Apache-2.0
"""The package in an environment that has NumPy and no torch: a real one, into which the built package is linked."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import revkernels
from revkernels import native

ROOT = Path(__file__).resolve().parent.parent
BESIDE_NUMPY = ("numpy", "numpy.libs", "numpy-*.dist-info", "ml_dtypes")
FOR_TESTS = (
    *("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py.py"),
    *("exceptiongroup", "tomli", "typing_extensions.py"),  # in Python 3.10
)

if native.missing() is not None:
    pytest.skip(str(native.missing()), allow_module_level=True)


def make_environment(folder, package, more=()):
    """A virtual environment that holds ``package`` and NumPy, by links, and nothing else. Returns run(*words)."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    here = Path(sysconfig.get_paths()["platlib"])
    for found in (found for name in (*BESIDE_NUMPY, *more) for found in here.glob(name)):
        (site / found.name).symlink_to(found)
    (site / "revkernels").symlink_to(package)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "COV", "REVKERNELS"))}

    def run(*words):
        command = [folder / "bin" / "python", "-I", *map(str, words)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.folder = folder
    assert run("-c", "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('sklearn'))") == "None None\n"
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_environment(tmp_path_factory.mktemp("plain"), Path(revkernels.__file__).parent, FOR_TESTS)


def test_training(run):
    """The example learns, and keeps the same few bytes at any depth."""
    said = run(ROOT / "examples" / "numpy_train.py", "--epochs", "8", "--blocks", "4")
    accuracy = float(re.search(r"ten noisy patterns: test accuracy ([\d.]+)%", said)[1])
    assert accuracy > 80, said
    kept = [tuple(map(float, pair)) for pair in re.findall(r"reversible +([\d.]+) +stored +([\d.]+)", said)]
    (shallow, stored_shallow), _, (deep, stored_deep) = kept
    assert deep < 1.2 * shallow and stored_deep > 10 * stored_shallow, said


def test_the_command_line(run):
    """info says what is missing; bench numpy runs, and its result lines name NumPy's version and no torch."""
    assert "torch is not installed" in run("-m", "revkernels", "info")
    words = ["--rounds", "2", "--megabytes", "1", "--threads", "1", "--matching", "call", "--save", "results"]
    assert "kernels against NumPy" in run("-m", "revkernels", "bench", "numpy", *words)
    (results,) = (Path(run.folder) / "results").glob("*.jsonl")
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert {row["variant"] for row in rows} == {"numpy", "cpu"} and rows[0]["environment"]["threads"] == 1
    assert rows[0]["environment"]["torch"] is None and rows[0]["environment"]["numpy"] is not None
    assert rows[0]["command"].startswith("revkernels bench numpy")


def test_the_tests_themselves(run):
    """Adapter, DLPack and buffers, as in any other environment."""
    files = [ROOT / "tests" / f"test_{name}.py" for name in ("numpy_adapter", "dlpack_refusals", "buffers")]
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT / 'tests'}", "-c", "/dev/null", *files)
    assert re.search(r"\d+ passed", said) and "failed" not in said, said


@pytest.mark.slow
def test_an_installed_wheel(tmp_path):
    """The same of a wheel, which is what people without torch install."""
    pytest.importorskip("pybind11")
    command = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, ROOT)
    made = subprocess.run(
        list(map(str, command)), env={**os.environ, "REVK_CUDA": "OFF"}, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("revkernels-*.whl")
    unpacked = tmp_path / "unpacked"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(unpacked)], check=True)
    run = make_environment(tmp_path / "environment", unpacked / "revkernels", FOR_TESTS)
    assert run("-c", "from revkernels import native; print(native.missing())") == "None\n"
    test_training(run)
    test_the_tests_themselves(run)
