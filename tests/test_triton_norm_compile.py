# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of norm_act compiled ahead of time for every target, as test_triton_compile.py does it: no spills,
no multiply-add where bits are promised, 16-byte accesses in every pass over the arrays, and few variants."""

import importlib
import os
import re
from itertools import product

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton", minversion="3.6")

import test_triton_compile as ahead  # noqa: E402
from triton.runtime import driver  # noqa: E402

from revkernels.norm import SUMS_COMPUTED, Norm  # noqa: E402
from revkernels.triton_kernels import launch, norm_launch  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

_PARKED = 16  # bytes
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = {  # of the stream and its gradient, of everything else
    "bfloat16": (BF16, BF16),
    "float32": (F32, F32),
    "float32+bfloat16": (F32, BF16),
    "float16": (F16, F16),
    "float64": (F64, F64),
    "float64+bfloat16": (F64, BF16),
}
IMAGE, ROW = (torch.contiguous_format, torch.channels_last), (torch.contiguous_format,)
CASES = {  # kind, activation, shape, memory formats, channels
    "batch": ("batch", "relu", (100, 32, 16, 16), IMAGE, 1),
    "batch of 56 channels": ("batch", "none", (100, 56, 8, 8), IMAGE, 1),
    "group": ("group", "gelu_tanh", (100, 32, 16, 16), IMAGE, 1),
    "layer": ("layer", "gelu", (64, 197, 384), ROW, 2),
    "layer of images": ("layer", "none", (64, 64, 16, 16), IMAGE, 1),
    "rms": ("rms", "silu", (64, 64, 1024), ROW, 2),
    "widest rows": ("layer", "relu", (8, 16, 8192), ROW, 2),
    "wide rows": ("rms", "gelu", (8, 16, 16384), ROW, 2),
}


def matrix():
    """Every target, dtypes and case; `make test` takes the two that a ResNet and a transformer live on."""
    quick = [("sm_90", "bfloat16", "batch"), ("sm_90", "bfloat16", "layer")]
    return [
        pytest.param(*case, id="-".join(case), marks=[] if case in quick else [pytest.mark.slow])
        for case in product(ahead.TARGETS, DTYPES, CASES)
    ]


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """compiler(target, call) -> {kernel name: compiled} of what ``call`` would launch."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile_all(target, call):
        driver.set_active(ahead.Driver(target))
        monkeypatch.setattr(launch, "warp_width", lambda: ahead.TARGETS[target].warp_size)
        found = {}

        def recorder(module, name):
            kernel = getattr(importlib.import_module(f"revkernels.triton_kernels.{module}"), name)

            class Named(ahead.Recorder):
                def __getitem__(self, grid):
                    run = super().__getitem__(grid)

                    def compiled(*args, **options):
                        run(*args, **options)
                        found[name] = self.compiled[-1]

                    return compiled

            return Named(kernel)

        monkeypatch.setattr(norm_launch, "_kernel", recorder)
        call()
        return found

    yield compile_all
    driver.set_active(None)


def calls(case, dtypes):
    """Coupling and norm with statistics computed, and given; and the backward, that accumulates."""
    kind, activation, shape, formats, axis = CASES[case]
    stream, branch = DTYPES[dtypes]
    wide = F64 if stream == F64 else F32
    for memory in formats:
        x, f, h = (torch.zeros(shape, dtype=d).contiguous(memory_format=memory) for d in (stream, branch, branch))
        weight, bias, *running = (torch.zeros(shape[axis]) for _ in range(4))
        norm = Norm(
            kind,
            weight,
            None if kind == "rms" else bias,
            activation=activation,
            groups=4 if kind == "group" else 1,
            channel_dim=axis,
            running_mean=running[0] if kind == "batch" else None,
            running_var=running[1] if kind == "batch" else None,
        )
        mean, rstd = (torch.zeros(norm.statistics_shape(shape), dtype=wide) for _ in range(2))
        mean = None if kind == "rms" else mean
        sums = [torch.zeros(shape[axis], dtype=wide) for _ in range(2)]

        def forward(given, x=x, f=f, h=h, norm=norm, mean=mean, rstd=rstd):
            prepared = norm_launch.prepare(norm, (x, x, f, h), (), rstd.dtype, backward=False)
            prepared.norm_act(h, x, x, f, False, norm, mean, rstd, given)

        def backward(x=x, f=f, h=h, norm=norm, mean=mean, rstd=rstd, sums=sums):
            dx = torch.empty_like(x)
            prepared = norm_launch.prepare(norm, (x, dx, dx, h), (), rstd.dtype, backward=True)
            prepared.norm_act_backward(dx, dx, h, x, norm, mean, rstd, *sums, SUMS_COMPUTED, 0, False)

        yield lambda forward=forward: forward(False)
        yield lambda forward=forward: forward(True)
        yield backward


def faults(name, compiled, tmp_path, activation, mixed=False):
    """What is wrong with a kernel. Where operands of two sizes meet, the smaller one's accesses are smaller."""
    exact = activation in ("none", "relu")  # exp and Phi say fma where they mean it
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        # A constant parked in a vector register is no access to memory.
        held = re.findall(r"\.((?:vgpr_spill_count|private_segment_fixed_size):\s*[1-9]\d*)", code)
        exact = exact and "v_div_scale" not in code  # a division is made of multiply-adds
        fused = re.findall(r"v_(?:pk_)?(?:fma|fmac|mad|mac)_\w*f(?:16|32|64)", code) if exact else []
        words = {"x4": 16, "x3": 12, "x2": 8, "": 4}
        found = re.findall(r"\b(?:global|buffer|flat)_(load|store)_(?:dword(x[234]|)\b|[us]?short)", code)
        accesses = [(kind, words.get(width, 2)) for kind, width in found]
    else:
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        code = ahead.tool("cuobjdump", "-res-usage", "-sass", cubin)
        assert "STACK:" in code and "LOCAL:" in code and "EXIT" in code
        # The assembler may park a word or two that a loop does not change, where that lets another block run beside.
        held = [what for what, size in re.findall(r"\b((?:STACK|LOCAL):(\d+))", code) if int(size) > _PARKED]
        # In PTX, because a division is made of multiply-adds further on. A sum of two bfloat16s is 1 * x + f on sm_80.
        fused = re.findall(r"\bfma\.rn\.f(?:32|64)", compiled.asm["ptx"]) if exact else []
        found = re.findall(r"\b(LDG|STG)\.E([.\w]*)", code)
        accesses = [({"LDG": "load", "STG": "store"}[kind], ahead.sass_bytes(rest)) for kind, rest in found]
    wrong = [f"holds {what}" for what in held] + [f"fuses {what}" for what in fused]
    if name.startswith("merge"):  # of partial results, which are few
        return wrong
    widest = {kind: max(size for way, size in accesses if way == kind) for kind in ("load", "store")}
    if widest["load"] < 16:
        wrong.append(f"no load of 16 bytes, only {widest['load']}")
    if widest["store"] < (8 if mixed else 16) and name not in ("sums_kernel", "wide_rows_moments_kernel"):
        wrong.append(f"no wide store, only {widest['store']}")
    return wrong + ["an access of 2 bytes"] * any(size == 2 for _, size in accesses)


@pytest.mark.parametrize(("target", "dtypes", "case"), matrix())
def test_machine_code(compiler, tmp_path, target, dtypes, case):
    seen = set()
    for call in calls(case, dtypes):
        for name, compiled in compiler(target, call).items():
            seen.add(name)
            assert faults(name, compiled, tmp_path, CASES[case][1], len(set(DTYPES[dtypes])) > 1) == [], name
    # A tile of float64 does not hold them.
    by_rows = {
        "wide rows": "wide_rows_kernel",
        "widest rows": "wide_rows_kernel" if "float64" in dtypes else "rows_kernel",
    }
    expected = {"batch": "statistics_kernel", "group": "merge_moments_kernel"}
    assert by_rows.get(case, expected.get(CASES[case][0], "rows_gradient_kernel")) in seen


def test_other_sizes_reuse_the_kernels(compiler):
    """Nothing is compiled anew for another batch, image size or number of channels of the same tile."""
    found = []
    for shape in ((100, 32, 16, 16), (3, 24, 40, 8), (16, 32, 1, 8)):
        x, h = (torch.zeros(shape, dtype=BF16).contiguous(memory_format=torch.channels_last) for _ in range(2))
        norm = Norm("batch", torch.zeros(shape[1]), torch.zeros(shape[1]), activation="relu")
        mean, rstd = torch.zeros(shape[1]), torch.zeros(shape[1])
        prepared = norm_launch.prepare(norm, (x, None, None, h), (), F32, backward=False)
        found.append(
            compiler("sm_90", lambda p=prepared, a=(h, None, x, None, False, norm, mean, rstd, False): p.norm_act(*a))
        )
    assert all(one[name] is found[0][name] for one in found for name in found[0])


def test_the_checks_can_fail(compiler, tmp_path):
    """Planted faults: rows that lie two elements apart, a fused multiply-add, and too few registers."""
    x = torch.zeros(4096, 64)
    norm = Norm("batch", torch.zeros(32), torch.zeros(32))
    mean, rstd = torch.zeros(32), torch.zeros(32)

    def apply(x, **options):
        prepared = norm_launch.prepare(norm, (x, None, None, x), (), F32, backward=False)
        prepared.applied.options.update(options)
        found = compiler("sm_90", lambda: prepared.norm_act(x, None, x, None, False, norm, mean, rstd, True))
        return faults("apply_kernel", found["apply_kernel"], tmp_path, "none")

    assert apply(x[:, :32]) == []
    assert "no wide store, only 4" in apply(x[:, ::2])
    assert any("fuses" in fault for fault in apply(x[:, :32], enable_fp_fusion=True))
    assert any("holds" in fault for fault in apply(x[:, :32].double(), maxnreg=24, num_warps=1))
