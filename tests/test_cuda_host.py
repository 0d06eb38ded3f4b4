# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' own source, compiled by g++ with tests/csrc/cuda_shim and run on the host: no nvcc, no GPU.

The C++ tests compare bit for bit with an oracle, under the address and undefined-behaviour sanitizers. They are then
run on copies of the kernels with one fault each, and must find every one.
"""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ("coupling", "accumulate", "device")
TESTS = ("coupling", "accumulate", "launch")
SANITIZERS = "-fsanitize=address,undefined"
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
    """Compile one kernel file of `csrc`, or one test against it; return the object file."""
    is_test = part.endswith("_test")
    source = ROOT / "tests" / "csrc" / f"cuda_{part}.cpp" if is_test else csrc / "cuda" / f"{part}.cu"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{part}.o"
    gxx(*COMMON, sanitizers, f"-I{csrc}", f"-I{csrc / 'include'}", "-x", "c++", "-c", source, "-o", made)
    return made


def build_all(csrc, folder, sanitizers):
    """Compile everything; return {part: object file}."""
    parts = [*KERNELS, *(f"{name}_test" for name in TESTS)]
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
    return link(build_all(ROOT / "csrc", folder, SANITIZERS).values(), folder / "all", SANITIZERS)


def test_kernels_give_the_oracles_bits(sanitized):
    done = run(sanitized)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    ran = dict(re.findall(r"^(.+?) +(\d+) checks, 0 failed$", done.stdout, re.MULTILINE))
    assert {"couple", "reverse_step", "many blocks", "far apart", "reductions"} <= ran.keys()
    assert all(int(checks) > 0 for checks in ran.values())


@pytest.mark.parametrize("situation", ["no driver", "old driver", "no device", "old device"])
def test_why_cuda_is_missing(sanitized, situation):
    done = run(sanitized, f"missing: {situation}")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


@dataclass(frozen=True)
class Fault:
    """One change to the kernels' source, what to compile with it, and the test that must notice."""

    name: str
    file: str
    old: str
    new: str
    part: str
    tests: tuple[str, ...]

    def plant(self, csrc):
        path = csrc / "cuda" / self.file
        text = path.read_text()
        assert text.count(self.old) == 1, f"{self.name}: {self.old!r} is in {self.file} {text.count(self.old)} times"
        path.write_text(text.replace(self.old, self.new))


MIXED = "couple, float32 += bfloat16"
FAULTS = [
    Fault("tail not stored", "packet.cuh", "if (e < count) to[e]", "if (false) to[e]", "coupling", (MIXED,)),
    Fault("tail stored whole", "packet.cuh", "if (e < count) to[e]", "to[e]", "coupling", (MIXED,)),
    Fault(
        "misaligned words",
        "layout.cuh",
        "!whole(operand.plane * size) || !whole(operand.row * size)",
        "false",
        "coupling",
        (MIXED,),
    ),
    Fault("plane stride for rows", "layout.cuh", "row * operand.row", "row * operand.plane", "coupling", (MIXED,)),
    Fault(
        "32-bit offsets",
        "layout.cuh",
        "return plane * operand.plane",
        "return int32_t(operand.row) * row + plane",
        "coupling",
        ("far apart",),
    ),
    Fault("loop too far", "launch.cuh", "item += span", "item += 2 * span", "coupling", ("many blocks",)),
    Fault("one block's loop", "launch.cuh", "int64_t(gridDim.x) * kThreads", "kThreads", "coupling", ("many blocks",)),
    Fault("checksum without position", "extras.cuh", "uint64_t(index_++)", "uint64_t(index_)", "coupling", (MIXED,)),
    Fault("no second channel", "extras.cuh", "channel_ = 0;\n", "channel_ = 1;\n", "coupling", (MIXED,)),
    Fault("no barrier", "reduce.cuh", "__syncthreads();", "", "launch_test", ("reductions",)),
    Fault("half a warp", "reduce.cuh", "away = kWarp / 2", "away = kWarp / 4", "launch_test", ("reductions",)),
    Fault("divider off by one", "divider.cuh", "uint64_t(by)) + 1;", "uint64_t(by));", "launch_test", ("divider",)),
    Fault("merges too much", "layout.cuh", "follows = follows &&", "follows = true ||", "launch_test", ("merging",)),
    Fault(
        "wrong array of a list",
        "accumulate.cu",
        "first_chunk[middle] <= chunk",
        "first_chunk[middle] < chunk",
        "accumulate",
        ("accumulate, long lists",),
    ),
    Fault(
        "lists of one launch",
        "accumulate.cu",
        "from += kShares",
        "from += flat.size()",
        "accumulate",
        ("accumulate, long lists",),
    ),
    Fault(
        "device not restored",
        "device.cu",
        "if (before_ >= 0) cudaSetDevice(before_);",
        "",
        "device",
        ("device and stream",),
    ),
]


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
def findings(tmp_path_factory):
    """What the tests say of every fault, and under None of the same source without one."""
    folder = tmp_path_factory.mktemp("cuda_faults")
    faultless = build_all(source_with(None, folder), folder, ALIGNMENT)
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda fault: findings_on(fault, faultless, folder / fault.name.replace(" ", "_")), FAULTS)
        found = dict(zip(FAULTS, done, strict=True))
    found[None] = run(link(faultless.values(), folder / "all", ALIGNMENT), *{test for f in FAULTS for test in f.tests})
    return found


def test_without_a_fault_the_same_tests_pass(findings):
    """The control: what the faults are built with fails nothing by itself."""
    assert findings[None].returncode == 0, findings[None].stdout + findings[None].stderr[-4000:]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_found(fault, findings):
    done = findings[fault]
    assert done.returncode != 0, f"nothing noticed:\n{done.stdout}"
    assert any(word in done.stderr for word in ("FAILED", "runtime error", "never comes")), done.stderr
