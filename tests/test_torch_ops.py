# SPDX-License-Identifier: Apache-2.0
"""The operators of torch.library: torch's own checks of them, and `revkernels.ops` as compiled code calls it."""

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from torch.library import opcheck  # noqa: E402

from revkernels import Coupling, eager, ops, use_backend  # noqa: E402
from revkernels.autograd import torch_norm_ops, torch_ops  # noqa: F401, E402 (register them)

OPERATORS = torch.ops.revkernels
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {
    "dense": lambda: torch.randn(2, 4, 3, 5),
    "channels last": lambda: torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last),
    "half": lambda: torch.randn(2, 8, 3, 5)[:, 4:],
    "half of channels last": lambda: torch.randn(2, 8, 3, 5).to(memory_format=torch.channels_last)[:, :4],
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operands(layout, dtype, count, requires_grad=False):
    def one():
        made = LAYOUTS[layout]()
        wide = torch.empty_strided(made.shape, made.stride(), dtype=dtype).copy_(made)
        return wide.requires_grad_(requires_grad)

    return [one() for _ in range(count)]


def scales(dtype, requires_grad=False):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [torch.linspace(0.5, 1.25, size, dtype=wide).requires_grad_(requires_grad) for size in (4, 2)]


def cells():
    return {"checksum": torch.zeros(1, dtype=torch.int64), "amax": torch.zeros(1)}


def test_every_function_has_an_operator():
    """What is missing would end a graph where it is traced."""
    missing = [name for name in ops.__all__ if name.islower() and not hasattr(OPERATORS, name)]
    assert not missing, f"no operator in revkernels/autograd/torch_ops.py: {', '.join(missing)}"


# ---- torch's checks: schema, fake tensors, autograd registration, AOTAutograd with dynamic shapes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_couple(dtype, layout):
    opcheck(OPERATORS.couple.default, operands(layout, dtype, 2, requires_grad=layout != "half"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["couple", "uncouple"])
def test_opcheck_with_scales_and_a_grid(name, dtype):
    given = (*operands("half", dtype, 2, requires_grad=True), *scales(dtype, requires_grad=True))
    opcheck(getattr(OPERATORS, name).default, given, {"grid_exponent": 5})


@pytest.mark.parametrize("backend", ["", "eager", "reference"])
def test_opcheck_of_every_backend(backend):
    opcheck(OPERATORS.uncouple.default, operands("dense", torch.float32, 2, requires_grad=True), {"backend": backend})


IN_PLACE = [("couple_", 2), ("uncouple_", 2), ("reverse_step_", 4)]


@pytest.mark.parametrize(("name", "count"), IN_PLACE)
def test_opcheck_in_place(name, count):
    opcheck(getattr(OPERATORS, name).default, operands("channels last", torch.float32, count))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "count"), IN_PLACE)
def test_opcheck_in_place_with_options(name, count, dtype):
    given = operands("half of channels last", dtype, count) + scales(dtype)
    opcheck(getattr(OPERATORS, name).default, given, {"grid_exponent": 5, **cells()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_accumulate(dtype):
    total, part = operands("dense", dtype, 1) + operands("half", dtype, 1), operands("channels last", dtype, 2)
    opcheck(OPERATORS.accumulate_.default, (total, part))


# ---- called as operators


def test_second_derivatives():
    given = operands("half", torch.float64, 2, requires_grad=True) + scales(torch.float64, requires_grad=True)
    for name in ("couple", "uncouple"):
        operator = getattr(OPERATORS, name).default
        assert torch.autograd.gradcheck(operator, given)
        assert torch.autograd.gradgradcheck(operator, given)


def test_in_place_operators_count_versions():
    given = y, f, dy, df = operands("dense", torch.float32, 4)
    before = [t._version for t in given]
    OPERATORS.reverse_step_(y, f, dy, df)
    OPERATORS.accumulate_([y], [f])
    assert [t._version - version for t, version in zip(given, before, strict=True)] == [2, 0, 1, 0]


def test_in_place_operators_refuse_what_requires_grad():
    x, f = operands("dense", torch.float32, 2)
    with pytest.raises(ValueError, match="x requires grad"):
        OPERATORS.couple_((x.requires_grad_() * 2), f)


def test_errors_are_those_of_the_functions():
    x, f = operands("dense", torch.float32, 2)
    with pytest.raises(ValueError, match="f has shape"):
        OPERATORS.couple(x, f[:1])
    with pytest.raises(TypeError, match="channel_scale is float64"):
        OPERATORS.couple_(x, f, scales(torch.float64)[0])
    with pytest.raises(ValueError, match="backend is 'no such'"):
        OPERATORS.uncouple(x, f, backend="no such")


LAZY = """
import sys
import revkernels
assert "torch" not in sys.modules
import revkernels.nn, torch
assert "torch._dynamo" not in sys.modules
assert not torch._C._dispatch_has_kernel("revkernels::couple")
y = torch.compile(lambda x: revkernels.ops.couple(x, x), backend="aot_eager", fullgraph=True)(torch.ones(2))
assert torch.equal(y, torch.full((2,), 2.0))
assert torch._C._dispatch_has_kernel("revkernels::couple")
"""


def test_registered_when_first_traced():
    """`import revkernels` needs NumPy alone, `import revkernels.nn` does not pay for operators or for dynamo."""
    subprocess.run([sys.executable, "-c", LAZY], check=True, timeout=120)


# ---- the functions inside compiled code


def every_option():
    channel_scale, sample_scale = scales(torch.float32)
    return Coupling(channel_scale=channel_scale, sample_scale=sample_scale, grid_exponent=4)


def with_cells(function):
    def call(x, f, *rest):
        report = cells()
        result = function(x, f, *rest, coupling=Coupling(grid_exponent=4, **report))
        return result, report["checksum"], report["amax"]

    return call


CALLS = {
    "couple": ops.couple,
    "uncouple": ops.uncouple,
    "couple with options": lambda x, f: ops.couple(x, f, coupling=every_option()),
    "uncouple eager": lambda x, f: ops.uncouple(x, f, backend="eager"),
    "couple with cells": with_cells(ops.couple),
    "couple_": lambda x, f: (ops.couple_(x, f), x),
    "couple_ of a new tensor": lambda x, f: ops.couple_(x * 2, f) * 3,
    "couple_ of halves": lambda x, f: (ops.couple_(x[:, :2], f[:, 2:]), x),
    "uncouple_ with options": lambda x, f: ops.uncouple_(x, f, coupling=every_option()),
    "uncouple_ with cells": with_cells(ops.uncouple_),
    "reverse_step_": lambda x, f: (*ops.reverse_step_(x, f, f * 2, x * 3), x),
    "reverse_step_ with cells": lambda x, f: with_cells(ops.reverse_step_)(x, f, f * 2, x * 3),
    "accumulate_": lambda x, f: (ops.accumulate_(x, f), x),
    "accumulate_ of lists": lambda x, f: (*ops.accumulate_([x, f * 2], (f, x * 2)), x),
}


@pytest.mark.parametrize("call", CALLS)
def test_compiled_call(call):
    """The whole graph compiles, and every result has the bits and strides of the uncompiled call."""
    given, again = (operands("half of channels last", torch.float32, 2) for _ in range(2))
    for a, b in zip(again, given, strict=True):
        a.copy_(b)
    expected = CALLS[call](*given)
    got = torch.compile(lambda x, f: CALLS[call](x, f), backend="aot_eager", fullgraph=True)(*again)
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    for a, b in zip(again, given, strict=True):
        assert torch.equal(a, b), "an operand is not as the uncompiled call left it"


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else [t for item in value for t in flat(item)]


@pytest.mark.parametrize("name", ["couple", "uncouple"])
@pytest.mark.parametrize("reporting", [False, True], ids=["", "with cells"])
def test_gradients_of_compiled_calls(name, reporting):
    def loss(x, f, channel_scale, sample_scale):
        report = cells() if reporting else {}
        coupling = Coupling(channel_scale=channel_scale, sample_scale=sample_scale, **report)
        y = getattr(ops, name)(x, f, coupling=coupling)
        return (y * y).sum() + sum(cell.sum() for cell in report.values())

    given = operands("half", torch.float64, 2, requires_grad=True) + scales(torch.float64, requires_grad=True)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected, got = (torch.autograd.grad(function(*given), given) for function in (loss, compiled))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_compiled_calls_run_the_backend_that_is_chosen(monkeypatch):
    calls = []
    plain = eager.couple
    monkeypatch.setattr(eager, "couple", lambda *args: (calls.append("eager"), plain(*args))[1])
    compiled = torch.compile(ops.couple, backend="aot_eager", fullgraph=True)
    x, f = operands("dense", torch.float32, 2)
    compiled(x, f)
    assert not calls
    with use_backend("eager"):
        compiled(x, f)
    assert calls == ["eager"]
    torch.compile(lambda x, f: ops.couple(x, f, backend="eager"), backend="aot_eager", fullgraph=True)(x, f)
    assert calls == ["eager", "eager"]


def test_compiled_calls_raise_the_same_errors():
    x, f = operands("dense", torch.float32, 2)
    functional = torch.compile(ops.couple, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="f has shape"):
        functional(x, f[:1])
    with pytest.raises(TypeError, match=r"f is torch\.int32|f is int32"):
        functional(x, f.int())
    in_place = torch.compile(lambda x, f: ops.couple_(x * 2, f), backend="aot_eager")
    with pytest.raises(ValueError, match="x requires grad"):
        in_place(x.requires_grad_(), f)


def test_one_graph_for_every_batch_size():
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda x, f: ops.couple(x, f) * 2, backend=counter, fullgraph=True, dynamic=True)
    for size in (3, 5, 8):
        x, f = torch.randn(2, size, 4)
        assert torch.equal(compiled(x, f), (x + f) * 2)
    assert counter.frame_count == 1
