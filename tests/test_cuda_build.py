# SPDX-License-Identifier: Apache-2.0
"""What nvcc made of the CUDA kernels, read from the machine code in the library that was built. No GPU needed.

Nothing spills, nothing lies in local memory, the packet kernels move their operands in 16-byte accesses, each once, and
no multiplication is contracted with an addition.
"""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from revkernels import native

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
# Pointwise kernels in packets: how many there are of each (pairs of types, times signs, times with options or without),
# and how many pairs of operands one goes over.
PACKETS = {"couple_packets": (16 * 2 * 2, 1), "reverse_packets": (16 * 2, 2), "accumulate_shares": (16, 1)}
# Kernels of the norms: how many there are of each. Those that go element by element have variants for packets of the
# types of training, which are float32 or a half type for the stream, and that or a half type for the branch; and for
# single elements, float64 and other pairs. The teams' have those for each number of packets that a thread keeps.
NORMS = {
    "norm_moments": 16,
    "norm_apply": 18,
    "norm_teams": 27,
    "norm_gradient_sums": 9,
    "norm_gradient": 9,
    "norm_gradient_teams": 20,
}
SIZES = {"double": 8, "float": 4, "bfloat16": 2, "float16": 2}
OPERATION = re.compile(r" +/\*[0-9a-f]{4,5}\*/ +(?:@!?\w+ )?([A-Z][A-Z0-9_.]*)")
ARCHS = [pytest.param("80", marks=pytest.mark.slow), "90", pytest.param("100", marks=pytest.mark.slow)]

pytestmark = pytest.mark.skipif(not native.cuda_architectures(), reason="this build has no CUDA kernels")


def cuobjdump():
    """From the toolkit, or from triton's wheel, which carries one."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(carried) if carried.exists() else None
    if found is None:
        pytest.skip("no cuobjdump, neither on PATH nor in triton")
    return found


def demangled(names):
    """`revk::cuda::(anonymous namespace)::couple_packets<...>(...)` as `couple_packets<...>`."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = re.sub(r"\(anonymous namespace\)::|revk::|cuda::|ops::|^void ", "", plain, flags=re.MULTILINE)
    return [line.partition("(")[0] for line in short.splitlines()]


@dataclass
class Kernel:
    """One kernel: registers a thread, bytes of its stack, which is where spilt ones go, and how often each instruction
    occurs in it."""

    name: str
    arch: str
    registers: int
    stack: int
    instructions: Counter = field(default_factory=Counter)

    def wide_accesses(self, access):
        """How many 16-byte accesses of global memory it has; `access` is LDG, STG or LDGSTS, which goes to shared."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(rf"{access}\.E\S*\.128\S*", name))

    def keeps_a_few_in_memory(self):
        """Whether three of its parameters may lie in local memory, which ptxas has no registers for in sm_100 alone:
        better than room for one block less."""
        return self.arch == "100" and re.match(r"norm_apply<float, 8, (?!.*None)", self.name) is not None

    def template(self):
        """("couple_packets", ["Couple", "float", "bfloat16", "Plain"])"""
        stem, _, arguments = self.name.partition("<")
        return stem, re.sub(r"<.*?>|>$", "", arguments).replace(" ", "").rstrip(">").split(",")


def listed(*what: str) -> Iterator[str]:
    """The lines of what cuobjdump says of the library."""
    command = [cuobjdump(), *what, native.library()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        last = ""
        for last in process.stdout:
            yield last
    assert process.returncode == 0, last


def read(arch):
    """{mangled name: Kernel} of one architecture."""
    names, resources = [], []
    for line in listed("-arch", f"sm_{arch}", "-res-usage"):
        if found := re.match(r" Function (\w+):", line):
            names.append(found[1])
        elif found := re.match(r"  REG:(\d+) STACK:(\d+) ", line):
            resources.append((int(found[1]), int(found[2])))
    found = {
        name: Kernel(short, arch, *numbers)
        for name, short, numbers in zip(names, demangled(names), resources, strict=True)
    }
    instructions = Counter()
    for line in listed("-arch", f"sm_{arch}", "-sass"):  # a hundred megabytes
        if operation := OPERATION.match(line):
            instructions[operation[1]] += 1
        elif "Function : " in line:
            instructions = found[line.split()[-1]].instructions
    return found


@pytest.fixture(scope="module", params=ARCHS, ids=lambda arch: f"sm_{arch}")
def kernels(request):
    if request.param not in native.cuda_architectures():
        pytest.skip(f"nvcc did not know sm_{request.param}")
    return list(read(request.param).values())


def test_every_kernel_is_compiled(kernels):
    """Strided ones are for two compute types; beside an int16 stream there are four types of branch."""
    count = Counter(kernel.template()[0] for kernel in kernels)
    assert count == {
        **{name: number for name, (number, _) in PACKETS.items()},
        "couple_strided": 2 * 2 * 2,
        "reverse_strided": 2 * 2,
        "couple_int16_packets": 4,
        "couple_int16_strided": 2,
        **NORMS,
        "norm_finish_statistics": 2,
        "norm_finish_sums": 2,
    }


def test_nothing_spills(kernels):
    for kernel in kernels:
        assert kernel.stack <= (16 if kernel.keeps_a_few_in_memory() else 0), kernel


def test_registers_leave_room(kernels):
    """Blocks of 256 threads: 64 registers let four run on a multiprocessor, 80 three, and 128 two.

    Three are for norms of packets whose types are known, two for float64, options and other norms. Where several
    packets of any types are kept for a gradient, there is one.
    """
    for kernel in kernels:
        stem, arguments = kernel.template()
        most = 128
        if not re.search("double|Extras|^norm_|^couple_int16_", kernel.name):
            most = 64
        elif stem in NORMS and arguments[1] == "8" and "Any" not in arguments:
            wide = stem in ("norm_gradient", "norm_gradient_sums") and arguments[2:] == ["float", "float"]
            most = 128 if wide or stem == "norm_gradient_teams" else 80
        elif stem == "norm_gradient_teams" and arguments[2] == "2":
            most = 255
        assert kernel.registers <= most, f"{kernel.name}: {kernel.registers}"


def test_no_local_memory_instructions(kernels):
    for kernel in kernels:
        local = [name for name in kernel.instructions if name.startswith(("LDL", "STL"))]
        assert not local or kernel.keeps_a_few_in_memory(), f"{kernel.name}: {local}"


def test_packets_move_in_16_byte_accesses(kernels):
    """As many as the packet has words: each operand is read once, each result written once."""
    checked = 0
    for kernel in kernels:
        stem, arguments = kernel.template()
        if stem not in PACKETS:
            continue
        stream, branch = [SIZES[name] for name in arguments if name in SIZES][:2]
        packet = 16 // min(stream, branch)
        pairs = PACKETS[stem][1]
        expected = pairs * packet * (stream + branch) // 16, pairs * packet * stream // 16
        counted = tuple(kernel.wide_accesses(access) for access in ("LDG", "STG"))
        copies = counted[0] // expected[0]  # of the body: ptxas may clone it
        assert copies >= 1, f"{kernel.name}: {counted}, needs {expected}"
        assert counted == (copies * expected[0], copies * expected[1]), f"{kernel.name}: {counted}, needs {expected}"
        checked += 1
    assert checked == sum(number for number, _ in PACKETS.values())


def test_int16_streams_move_in_16_byte_accesses(kernels):
    """A packet is 8 elements: one word of the stream, there and back, those of the branch, and a value of any type."""
    checked = 0
    for kernel in kernels:
        stem, arguments = kernel.template()
        if stem == "couple_int16_packets":
            counted = tuple(kernel.wide_accesses(access) for access in ("LDG", "STG"))
            value = sum(8 * size // 16 for size in SIZES.values())
            assert counted == (1 + 8 * SIZES[arguments[0]] // 16, 1 + value), f"{kernel.name}: {counted}"
            checked += 1
    assert checked == 4


def norm_accesses(stem, compute, *types):
    """16-byte loads, stores, and copies to shared memory of one kernel.

    Operands come through shared memory, where some packets are under way: their copies are in the code once for each
    of those that come first, and once in the loop. What does not fit there, or is read again, is loaded.
    """
    words = {"None": 0, "Any": 1 if compute == "double" else 2, "float": 2, "bfloat16": 1, "float16": 1}
    if stem.endswith("teams"):
        kept, x, y = int(types[0]), words[types[1]], words[types[2]]
        backward = "gradient" in stem
        if not kept:  # read in each of two or three sweeps, of which ptxas may join loads
            return (x, x, 0) if backward else (x, x + y, 0)
        if backward:
            return kept * x, kept * x, 2 * kept * (x + y)
        shared = kept * (x + y) <= 9
        return (0 if shared else kept * y), kept * (x + y), 2 * kept * (x + y if shared else x)
    x, y, h = (words[name] for name in (*types, "None")[:3])
    operands = 2 * x + y if stem == "norm_gradient" else x + y
    stages = {1: 4, 2: 3}.get(operands, 2)
    loaded = x if operands == 6 else 0  # the sum that the gradient is added to
    coupled = x if types[1] != "None" else 0
    written = {"norm_moments": coupled, "norm_apply": h + coupled, "norm_gradient_sums": 0, "norm_gradient": x}[stem]
    return loaded, written, stages * (operands - loaded)


def test_norms_move_in_16_byte_accesses(kernels):
    """Each operand is read once, each result written once."""
    checked = 0
    for kernel in kernels:
        stem, (compute, packet, *types) = kernel.template()[0], [*kernel.template()[1], "", ""][:5]
        if stem not in NORMS or packet == "1":
            continue
        counted = tuple(kernel.wide_accesses(access) for access in ("LDG", "STG", "LDGSTS"))
        expected = norm_accesses(stem, compute, *filter(None, types))
        # ptxas may clone an access whose width depends on a type that is not known,
        exact = counted == expected or ("Any" in types and all(c >= e for c, e in zip(counted, expected, strict=True)))
        # and for sm_100 the loads of what a gradient is added to, on either side of a branch.
        cloned = stem == "norm_gradient_teams" and counted == (2 * expected[0], *expected[1:])
        assert exact or cloned, f"{kernel.name}: {counted}, needs {expected}"
        checked += 1
    assert checked == 12 + 14 + 7 + 7 + 23 + 16


def test_nothing_is_contracted(kernels):
    """But for norms, whose divisions, square roots and exponentials are made of fused operations, as are their sums."""
    for kernel in kernels:
        if not kernel.name.startswith("norm_"):
            fused = [name for name in kernel.instructions if name.startswith(("FFMA", "DFMA"))]
            assert not fused, f"{kernel.name}: {fused}"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("part", SOURCES)
def test_nvcc_has_no_warning(part, tmp_path):
    flags = [
        "-std=c++17",
        "--fmad=false",
        '-DREVK_CUDA_ARCHS="90"',
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'csrc' / 'include'}",
        "-arch=sm_90",
    ]
    source = ROOT / "csrc" / "cuda" / f"{part}.cu"
    done = subprocess.run(["nvcc", *flags, "-cubin", source, "-o", tmp_path / "code"], capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr.lower(), done.stderr[-4000:]
