# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' own source, compiled by g++ with tests/csrc/cuda_shim and run on the host: no nvcc, no GPU.

The C++ tests compare bit for bit with an oracle, under the address and alignment sanitizers. In `make test-all` there
are more of them, under the one for undefined behaviour too; and they are run on copies of the kernels with one fault
each, and must find every one.
"""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_faults import FAULTS, NORM_FAULTS

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
TESTS = sorted(path.stem.removeprefix("cuda_") for path in (ROOT / "tests" / "csrc").glob("cuda_*_test.cpp"))
SANITIZERS = "-fsanitize=address,undefined"
FEW = "-fsanitize=address,alignment"  # two thirds of the time to compile
COMMON = [
    *("-std=c++17", "-O0", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-ffp-contract=off", "-fno-strict-aliasing", "-fno-sanitize-recover=all", '-DREVK_CUDA_ARCHS="host"'),
    f"-I{ROOT / 'tests' / 'csrc' / 'cuda_shim'}",
    f"-I{ROOT / 'tests' / 'csrc'}",
]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def gxx(*arguments):
    """Run g++, and show what it says if it fails."""
    done = subprocess.run(["g++", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def compile_part(part, csrc, folder, sanitizers):
    """Compile one kernel file of `csrc`, or one file of tests against it; return the object file."""
    source = csrc / "cuda" / f"{part}.cu" if part in KERNELS else ROOT / "tests" / "csrc" / f"cuda_{part}.cpp"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{part}.o"
    gxx(*COMMON, sanitizers, f"-I{csrc}", f"-I{csrc / 'include'}", "-x", "c++", "-c", source, "-o", made)
    return made


def build_all(csrc, folder, sanitizers):
    """Compile everything; return {part: object file}."""
    parts = [*KERNELS, *TESTS, "test_main"]
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda part: compile_part(part, csrc, folder, sanitizers), parts)
        return dict(zip(parts, made, strict=True))


def link(objects, program, sanitizers):
    gxx(sanitizers, *objects, "-o", program)
    return program


def run(program, *tests):
    return subprocess.run([program, *tests], capture_output=True, text=True, timeout=250, check=False)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_host")
    return link(build_all(ROOT / "csrc", folder, FEW).values(), folder / "all", FEW)


def test_kernels_give_the_oracles_bits(sanitized):
    done = run(sanitized)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    ran = dict(re.findall(r"^(.+?) +(\d+) checks, 0 failed$", done.stdout, re.MULTILINE))
    assert {"couple", "reverse_step", "many blocks", "far apart", "reductions"} <= ran.keys()
    assert {"couple, int16", "reverse_step, int16", "many blocks, int16"} <= ran.keys()
    assert all(int(checks) > 0 for checks in ran.values())


SPECIAL = [f"norm_act, {what}" for what in ("mean 1e4", "NaN", "one line", "the same everywhere")]


@pytest.mark.parametrize("name", ["norm_act, briefly", "norm_act_backward, briefly", *SPECIAL])
def test_norms_give_the_oracles_results(sanitized, name):
    done = run(sanitized, name)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_of_it_under_more_sanitizers(tmp_path):
    program = link(build_all(ROOT / "csrc", tmp_path, SANITIZERS).values(), tmp_path / "all", SANITIZERS)
    for names in ([], ["norm_act"], ["norm_act_backward"], SPECIAL):
        done = run(program, *names)
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]


@pytest.mark.parametrize("situation", ["no driver", "old driver", "no device", "old device"])
def test_why_cuda_is_missing(sanitized, situation):
    done = run(sanitized, f"missing: {situation}")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


ALIGNMENT = "-fsanitize=alignment"  # the cheapest sanitizer, and needed: on a GPU a misaligned word is an error


def source_with(fault, folder):
    """Copy the sources, with one fault or none, and with two of the four types only: a quarter to compile."""
    csrc = shutil.copytree(ROOT / "csrc", folder / "csrc")
    if fault is not None:
        fault.plant(csrc)
    launch = csrc / "cuda" / "launch.cuh"
    text, removed = re.subn(r" +case REVK_FLOAT(64|16):\n +return body\(\w+\{\}\);\n", "", launch.read_text())
    assert removed == 2, "with_type has changed"
    launch.write_text(text)
    return csrc


def findings_on(fault, faultless, folder):
    """Build the kernels with one fault and run the tests that must notice."""
    faulty = compile_part(fault.part, source_with(fault, folder), folder, ALIGNMENT)
    # Where two objects hold the same template, the linker keeps the first: the faulty one.
    others = [made for part, made in faultless.items() if part != fault.part]
    return run(link([faulty, *others], folder / "all", ALIGNMENT), *fault.tests)


@pytest.fixture(scope="module")
def faultless(tmp_path_factory):
    """The folder and the object files of the same source without a fault."""
    folder = tmp_path_factory.mktemp("cuda_faultless")
    return folder, build_all(source_with(None, folder), folder, ALIGNMENT)


def find(faults, faultless, folder):
    """What the tests say of every fault, and under None of the source without one."""
    clean, objects = faultless
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda fault: findings_on(fault, objects, folder / re.sub(r"\W+", "_", fault.name)), faults)
        found = dict(zip(faults, done, strict=True))
    found[None] = run(link(objects.values(), clean / "all", ALIGNMENT), *{test for f in faults for test in f.tests})
    return found


@pytest.fixture(scope="module")
def findings(faultless, tmp_path_factory):
    return find(FAULTS, faultless, tmp_path_factory.mktemp("cuda_faults"))


@pytest.fixture(scope="module")
def norm_findings(faultless, tmp_path_factory):
    return find(NORM_FAULTS, faultless, tmp_path_factory.mktemp("cuda_norm_faults"))


@pytest.mark.slow
@pytest.mark.timeout(2400)  # the first of them compiles the kernels with every fault
@pytest.mark.parametrize("which", ["findings", "norm_findings"])
def test_without_a_fault_the_same_tests_pass(which, request):
    """The control: what the faults are built with fails nothing by itself."""
    done = request.getfixturevalue(which)[None]
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("fault", [*FAULTS, *NORM_FAULTS], ids=lambda fault: fault.name)
def test_planted_fault_is_found(fault, request):
    done = request.getfixturevalue("norm_findings" if fault in NORM_FAULTS else "findings")[fault]
    assert done.returncode != 0, f"nothing noticed:\n{done.stdout}"
    # A fault that writes past an array may end in the C library's own "corruption", before anything is compared.
    assert any(word in done.stderr for word in ("FAILED", "runtime error", "never comes", "corruption")), done.stderr
