# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compiled ahead of time, without a GPU, exactly as a launch would: what the machine code must have.

A stub takes the place of Triton's driver and names the target; the launcher then builds its arguments from real
tensors, and Triton specialises on their alignment and divisibility as it does on the device.
"""

import os
import re
import subprocess
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton", minversion="3.6")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from revkernels.coupling import Coupling  # noqa: E402
from revkernels.triton_kernels import accumulate, backend, launch  # noqa: E402
from revkernels.triton_kernels.coupling import couple_kernel  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {
    "float32": (F32, F32),
    "bfloat16": (BF16, BF16),
    "float32+bfloat16": (F32, BF16),
    "float16": (F16, F16),
    "float64": (F64, F64),
    "bfloat16+float32": (BF16, F32),
    "float64+bfloat16": (F64, BF16),
}


def matrix():
    """Every target and dtypes; `make test` takes those of mixed training on sm_90."""
    quick = {("sm_90", "bfloat16"), ("sm_90", "float32+bfloat16")}
    return [
        pytest.param(*case, id="-".join(case), marks=[] if case in quick else [pytest.mark.slow])
        for case in product(TARGETS, DTYPES)
    ]


class Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, name):
        self.target = TARGETS[name]
        self.device = 1000 + list(TARGETS).index(name)  # kernels are cached by device

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0


class Recorder:
    """Compiles where a kernel would be launched."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.compiled = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.compiled.append(self.kernel.run(*args, grid=grid, warmup=True, **options))


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """compiler(target, arrays, coupling, **options) -> the compiled couple_kernel of that call."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def aim(target):
        driver.set_active(Driver(target))
        monkeypatch.setattr(launch, "warp_width", lambda: TARGETS[target].warp_size)
        monkeypatch.setattr(backend, "warp_width", lambda: TARGETS[target].warp_size)

    def couple(target, arrays, coupling=None, **options):
        aim(target)
        recorder = Recorder(couple_kernel)
        monkeypatch.setattr(launch, "_couple_kernel", lambda: recorder)
        prepared = launch.prepare(arrays, coupling, subtract=len(arrays) == 4)
        replace(prepared, options=prepared.options | options).launch(arrays, coupling)
        return recorder.compiled[-1]

    def accumulate_list(target, pairs):
        aim(target)
        recorder = Recorder(KERNEL_OF_LISTS)
        monkeypatch.setattr(accumulate, "accumulate_kernel", recorder)
        backend._accumulate_listed(pairs)
        return recorder.compiled[-1]

    couple.list = accumulate_list
    yield couple
    driver.set_active(None)  # found anew when next asked for


KERNEL_OF_LISTS = accumulate.accumulate_kernel


def tool(name, *arguments):
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def faults(compiled, tmp_path, stream, branch, masked=False, value=None):
    """What is wrong with a kernel: spills, local memory, a multiply-add, other roundings, narrow loads or stores.

    The widest type must move 16 bytes at a time. Where another is smaller, a thread holds as many elements of it, in
    fewer bytes. A masked tile goes element by element, so that with one in the kernel only the widest access counts.
    """
    read, written = (stream.itemsize, branch.itemsize), (stream.itemsize, (value or stream).itemsize)
    wide = max(*read, *written)
    widest = {"load": 16 * max(read) // wide, "store": 16 * max(written) // wide}
    narrowest = {"load": 16 * min(read) // wide, "store": 16 * min(written) // wide}
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        held = re.findall(r"\.((?:[sv]gpr_spill_count|private_segment_fixed_size):\s*[1-9]\d*)", code)
        flushes = "float_denorm_mode_32 3" not in code or "float_denorm_mode_16_64 3" not in code
        cuts_off = False  # a bfloat16 is made by a sequence of integer operations here
        fused = re.findall(r"v_(?:pk_)?(?:fma|fmac|mad|mac)_\w*f(?:16|32|64)", code)
        words = {
            "_dwordx4": 16,
            "_dwordx3": 12,
            "_dwordx2": 8,
            "_dword": 4,
            "_ushort": 2,
            "_short": 2,
            "_short_d16_hi": 2,
        }
        found = re.findall(r"\b(?:global|buffer|flat)_(load|store)(_\w+)", code)
        accesses = [(kind, words[width]) for kind, width in found]
    else:
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        code = tool("cuobjdump", "-res-usage", "-sass", cubin)
        assert "STACK:" in code and "LOCAL:" in code and "EXIT" in code
        held = re.findall(r"\b(?:STACK|LOCAL):[1-9]\d*", code) + re.findall(r"\b(?:LDL|STL)\b", code)
        fused = re.findall(r"\b[FD]FMA\b", code)
        flushes = ".ftz" in compiled.asm["ptx"]
        # A sum of two bfloat16s may be made in bfloat16 itself: rounding it from float32 gives the same bits.
        cuts_off = BF16 in (stream, value) and not re.search(r"(?:cvt|add|sub|fma)\.rn\.bf16", compiled.asm["ptx"])
        found = re.findall(r"\b(LDG|STG)\.E([.\w]*)", code)
        accesses = [({"LDG": "load", "STG": "store"}[kind], sass_bytes(rest)) for kind, rest in found]
        in_ptx = re.findall(r"\b(ld|st)\.global(?:\.[\w:]+)*?\.(v4\.b32|v2\.b64)", compiled.asm["ptx"])
        assert {kind for kind, size in accesses if size == 16} == {
            {"ld": "load", "st": "store"}[kind] for kind, _ in in_ptx
        }, "PTX and SASS disagree"
    wrong = [f"holds {what}" for what in held] + [f"fuses {what}" for what in fused]
    wrong += ["flushes subnormal numbers"] * flushes + ["does not round to the nearest bfloat16"] * cuts_off
    for kind in ("load", "store"):
        sizes = sorted({size for way, size in accesses if way == kind})
        if not sizes or sizes[-1] < widest[kind]:
            wrong.append(f"no {kind} of {widest[kind]} bytes, only {sizes}")
        elif not masked and sizes[0] < narrowest[kind]:
            wrong.append(f"a {kind} of {sizes[0]} bytes")
    return wrong


def sass_bytes(suffix):
    """LDG.E.128.CONSTANT -> 16"""
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1}
    return next((widths[part] for part in suffix.split(".") if part in widths), 4)


def zeros(dtype, *shape):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(("target", "dtypes"), matrix())
def test_dense(compiler, tmp_path, target, dtypes):
    stream, branch = DTYPES[dtypes]
    for arrays in (
        (zeros(stream, 64, 128), zeros(branch, 64, 128)),
        (zeros(stream, 64, 128), zeros(stream, 64, 128), zeros(branch, 64, 128)),
        (*[zeros(stream, 64, 128)] * 2, *[zeros(branch, 64, 128)] * 2),
    ):
        assert faults(compiler(target, arrays), tmp_path, stream, branch) == []


@pytest.mark.parametrize(("target", "dtypes"), matrix())
def test_any_number_of_elements_moves_16_bytes(compiler, tmp_path, target, dtypes):
    """All tiles but the last go without a mask. The last one goes element by element."""
    stream, branch = DTYPES[dtypes]
    assert (
        faults(compiler(target, (zeros(stream, 4999), zeros(branch, 4999))), tmp_path, stream, branch, masked=True)
        == []
    )


@pytest.mark.parametrize(("target", "dtypes"), matrix())
def test_channel_halves(compiler, tmp_path, target, dtypes):
    stream, branch = DTYPES[dtypes]
    for order in (torch.contiguous_format, torch.channels_last):
        whole = zeros(stream, 8, 64, 16, 16).contiguous(memory_format=order)
        part = zeros(branch, 8, 32, 16, 16).contiguous(memory_format=order)
        compiled = compiler(target, (whole[:, :32], part))
        assert faults(compiled, tmp_path, stream, branch) == []


@pytest.mark.parametrize(("target", "dtypes"), matrix())
def test_all_options(compiler, tmp_path, target, dtypes):
    stream, branch = DTYPES[dtypes]
    wide = F64 if F64 in (stream, branch) else F32
    coupling = Coupling(
        channel_scale=zeros(wide, 64),
        sample_scale=zeros(wide, 8),
        grid_exponent=14,
        checksum=torch.zeros(1, dtype=torch.int64),
        amax=torch.zeros(1),
    )
    for order in (torch.contiguous_format, torch.channels_last):
        x, f = (zeros(dtype, 8, 64, 16, 16).contiguous(memory_format=order) for dtype in (stream, branch))
        assert faults(compiler(target, (x, f), coupling), tmp_path, stream, branch, masked=True) == []


@pytest.mark.parametrize(
    ("target", "branch"),
    [
        pytest.param(*case, marks=[] if case == ("sm_90", BF16) else [pytest.mark.slow])
        for case in product(TARGETS, (F32, BF16, F16, F64))
    ],
    ids=str,
)
def test_int16_streams(compiler, tmp_path, target, branch):
    """Both signs, plain and with everything, a value in each type."""
    q, f, wide = zeros(torch.int16, 8, 64, 16, 16), zeros(branch, 8, 64, 16, 16), F64 if branch == F64 else F32
    options = {
        "channel_scale": zeros(wide, 64),
        "sample_scale": zeros(wide, 8),
        "checksum": torch.zeros(1, dtype=torch.int64),
        "amax": torch.zeros(1),
    }
    for number in (None, BF16, F32, F64):
        value = None if number is None else zeros(number, *q.shape)
        plain = compiler(target, (q, f), Coupling(grid_exponent=9, value=value))
        assert faults(plain, tmp_path, torch.int16, branch, value=number) == []
        everything = compiler(target, (q, q.clone(), f), Coupling(grid_exponent=9, value=value, **options))
        assert faults(everything, tmp_path, torch.int16, branch, masked=True, value=number) == []


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", [F32, BF16, torch.int16], ids=str)
def test_no_warp_does_anothers_elements_again(compiler, rows, dtype):
    """In place it might read what the other has stored already, and its sum goes into checksum and amax."""
    coupling = Coupling(grid_exponent=9, checksum=torch.zeros(1, dtype=torch.int64), amax=torch.zeros(1))
    half, turned = zeros(dtype, rows, 100)[:, 50:], zeros(F32, 50, rows).t()
    image, last = zeros(dtype, 2, rows, 3, 3), zeros(F32, 2, 3, 3, rows).movedim(3, 1)
    for arrays in ((half, zeros(F32, rows, 50)), (half, turned), (image, last)):
        compiled = compiler("sm_90", arrays, coupling)
        tile = launch.prepare(arrays, coupling, subtract=False).walk.tile
        sizes = [re.findall(rf"{name} = \[(\d+), (\d+)\]", compiled.asm["ttgir"]) for name in LAYOUT]
        assert rows == 1 or sizes[0]
        for of_thread, of_warp, warps in zip(*sizes, strict=True):
            for side, *steps in zip(tile, of_thread, of_warp, warps, strict=True):
                elements, lanes, beside = map(int, steps)
                assert beside <= max(1, side // (elements * lanes)), f"{steps} of {tile}"


LAYOUT = ("sizePerThread", "threadsPerWarp", "warpsPerCTA")  # of a block, in Triton's intermediate language


@pytest.mark.parametrize(("target", "dtypes"), matrix())
def test_accumulate_lists(compiler, tmp_path, target, dtypes):
    stream, branch = DTYPES[dtypes]
    sizes = [4096, 1, 17, 999, 0]
    compiled = compiler.list(target, [(zeros(stream, size), zeros(branch, size)) for size in sizes])
    assert faults(compiled, tmp_path, stream, branch, masked=True) == []


@pytest.mark.parametrize("dtypes", [(F16, BF16), (BF16, F16)], ids=["float16+bfloat16", "bfloat16+float16"])
def test_two_half_types_meet_in_float32(compiler, dtypes):
    """Neither holds the other's numbers, so that no sum may be one of a half type, as LLVM once made it."""
    total, part = (torch.zeros(64, 1000, dtype=dtype) for dtype in dtypes)
    for compiled in (compiler("sm_90", [total, total, part, part]), compiler.list("sm_90", [(total, part)] * 2)):
        sums = re.findall(r"\b(?:add|sub)\.[\w.]*f(?:16|32)\w*", compiled.asm["ptx"])
        assert sums and all("f32" in one for one in sums), sums


def test_lists_of_other_sizes_reuse_the_kernel(compiler):
    pairs = [(zeros(F32, 4096), zeros(F32, 4096)), (zeros(F32, 16), zeros(F32, 16))]
    others = [(zeros(F32, 1), zeros(F32, 1)), (zeros(F32, 77), zeros(F32, 77)), (zeros(F32, 32), zeros(F32, 32))]
    assert compiler.list("sm_90", pairs) is compiler.list("sm_90", others)


class TestTheChecksCanFail:
    """Planted faults, each found by the check that the tests above rely on."""

    @pytest.mark.parametrize("target", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
    def test_strided_access(self, compiler, tmp_path, target):
        x, f = zeros(F32, 8192)[::2], zeros(F32, 4096)
        found = faults(compiler(target, (x, f)), tmp_path, F32, F32)
        assert "a load of 4 bytes" in found and "no store of 16 bytes, only [4]" in found

    @pytest.mark.parametrize("target", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
    def test_fused_multiply_add(self, compiler, tmp_path, target):
        arrays, coupling = (
            (zeros(F32, 8, 64, 16, 16), zeros(F32, 8, 64, 16, 16)),
            Coupling(channel_scale=zeros(F32, 64)),
        )
        assert not any(
            "fuses" in fault for fault in faults(compiler(target, arrays, coupling), tmp_path, F32, F32, masked=True)
        )
        fused = compiler(target, arrays, coupling, enable_fp_fusion=True)
        assert any("fuses" in fault for fault in faults(fused, tmp_path, F32, F32, masked=True))

    @pytest.mark.parametrize(
        ("target", "squeezed"),
        [("sm_90", {"maxnreg": 16}), pytest.param("gfx942", {"waves_per_eu": 8}, marks=pytest.mark.slow)],
        ids=["sm_90", "gfx942"],
    )
    def test_spills(self, compiler, tmp_path, target, squeezed):
        arrays = (*[zeros(F64, 2**16)] * 2, *[zeros(BF16, 2**16)] * 2)
        spilt = compiler(target, arrays, COLS=2**12, num_warps=2, **squeezed)
        assert any("holds" in fault for fault in faults(spilt, tmp_path, F64, BF16, masked=True))
