# SPDX-License-Identifier: Apache-2.0
"""The public kernels and autograd, and every bad input: named before anything is written."""

import os

import numpy as np
import pytest

import revkernels as rk
from revkernels import ops
from revkernels.backends import BACKENDS

torch = pytest.importorskip("torch")


@pytest.fixture(params=["cpu", "eager", "reference"])
def backend(request):
    reason = BACKENDS[request.param].missing()
    if reason is not None:
        if os.environ.get("CI"):
            pytest.fail(f"backend {request.param!r} must be there in CI: {reason}")
        pytest.skip(f"backend {request.param!r}: {reason}")
    return request.param


def ones(*shape, **options):
    return torch.ones(*(shape or (2, 3)), **options)


# ---- autograd

IN_PLACE = {
    "couple_": lambda a, b, c, d, **k: ops.couple_(a, b, **k),
    "uncouple_": lambda a, b, c, d, **k: ops.uncouple_(a, b, **k),
    "reverse_step_": lambda a, b, c, d, **k: ops.reverse_step_(a, b, c, d, **k),
    "accumulate_": lambda a, b, c, d, **k: ops.accumulate_(a, b, **k),
    "accumulate_ of lists": lambda a, b, c, d, **k: ops.accumulate_([a, c], [b, d], **k),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_calls_raise_the_version(name, backend):
    """Once for what is written, never for what is read; so autograd notices."""
    a, b, c, d = (ones() for _ in range(4))
    before = [t._version for t in (a, b, c, d)]
    IN_PLACE[name](a, b, c, d, backend=backend)
    assert a._version > before[0]
    assert (b._version, d._version) == (before[1], before[3])
    assert (c._version > before[2]) is (name in ("reverse_step_", "accumulate_ of lists"))


@pytest.mark.parametrize("name", IN_PLACE)
def test_autograd_notices_an_in_place_call(name, backend):
    """A tensor that a backward has saved and a kernel has written since: torch's own error."""
    w, a = ones(requires_grad=True), ones()
    loss = (w * a).sum()
    IN_PLACE[name](a, ones(), ones(), ones(), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_on_a_tensor_that_requires_grad_is_refused(name, backend):
    """With the argument's name; under no_grad it is done."""
    a, c = ones(requires_grad=True), ones()
    first = {"couple_": "x", "accumulate_": "total", "accumulate_ of lists": r"total\[0\]"}.get(name, "y")
    with pytest.raises(ValueError, match=f"^{first} requires grad.*no_grad"):
        IN_PLACE[name](a, ones(), c, ones(), backend=backend)
    assert torch.equal(a, ones())
    assert torch.equal(c, ones())
    with torch.no_grad():
        IN_PLACE[name](a, ones(), c, ones(), backend=backend)
    assert not torch.equal(a, ones())


def test_reverse_step_refuses_a_gradient_that_requires_grad(backend):
    """dy as well as y."""
    y, dy = ones(), ones(requires_grad=True)
    with pytest.raises(ValueError, match=r"^dy requires grad"):
        ops.reverse_step_(y, ones(), dy, ones(), backend=backend)
    assert torch.equal(y, ones())


def test_inference_tensors(backend):
    """They have no version to raise, and are written all the same."""
    with torch.inference_mode():
        x = ones()
        assert torch.equal(ops.couple_(x, ones(), backend=backend), 2 * ones())
        assert torch.equal(ops.couple(x, ones(), backend=backend), 3 * ones())


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("function", [ops.couple, ops.uncouple])
@pytest.mark.parametrize("scales", ["none", "channel", "sample", "both", "last dimension"])
def test_out_of_place_is_differentiable(function, scales, backend):
    """gradcheck and gradgradcheck in x, f and the scales."""
    x, f = rand(2, 3, 2), rand(2, 3, 2)
    dim = -1 if scales == "last dimension" else 1
    channels = rand(x.shape[dim]) if scales in ("channel", "both", "last dimension") else None
    samples = rand(2) if scales in ("sample", "both") else None
    given = [t for t in (x, f, channels, samples) if t is not None]

    def call(x, f, *more):
        more = list(more)
        channel_scale = more.pop(0) if channels is not None else None
        sample_scale = more.pop(0) if samples is not None else None
        coupling = rk.Coupling(channel_scale=channel_scale, sample_scale=sample_scale, channel_dim=dim)
        return function(x, f, coupling=None if scales == "none" else coupling, backend=backend)

    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)


@pytest.mark.parametrize("which", ["x", "f", "channel_scale", "sample_scale"])
def test_one_operand_that_requires_grad_is_enough(which, backend):
    """Whichever it is, it gets its gradient, and no other does."""
    operands = {"x": ones(2, 3), "f": ones(2, 3), "channel_scale": ones(3), "sample_scale": ones(2)}
    operands[which].requires_grad_()
    coupling = rk.Coupling(channel_scale=operands["channel_scale"], sample_scale=operands["sample_scale"])
    y = ops.couple(operands["x"], operands["f"], coupling=coupling, backend=backend)
    y.sum().backward()
    assert [name for name, t in operands.items() if t.grad is not None] == [which]


def test_gradients_of_mixed_dtypes(backend):
    """Each operand's gradient has its own dtype."""
    x, f = ones(dtype=torch.float32, requires_grad=True), ones(dtype=torch.bfloat16, requires_grad=True)
    scale = ones(3).requires_grad_()
    ops.couple(x, f, coupling=rk.Coupling(channel_scale=scale), backend=backend).sum().backward()
    assert (x.grad.dtype, f.grad.dtype, scale.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)


def test_the_gradient_of_the_grid_is_the_identity(backend):
    """Rounding f is not differentiated."""
    x, f = rand(2, 3), rand(2, 3)
    ops.couple(x, f, coupling=rk.Coupling(grid_exponent=2), backend=backend).sum().backward()
    assert torch.equal(f.grad, torch.ones_like(f))


def test_out_of_place_without_gradients_makes_no_graph(backend):
    """Under no_grad, and where nothing requires grad."""
    assert not ops.couple(ones(), ones(), backend=backend).requires_grad
    with torch.no_grad():
        assert not ops.uncouple(ones(requires_grad=True), ones(), backend=backend).requires_grad


def test_out_of_place_result_is_new_memory(backend):
    """Neither x nor f is written to or shared."""
    x, f = ones(), ones()
    y = ops.couple(x, f, backend=backend)
    y.zero_()
    assert torch.equal(x, ones())
    assert torch.equal(f, ones())


def test_one_tensor_as_both_operands(backend):
    """couple(x, x) reads it twice; couple_(x, x) would read what it writes."""
    x = ones()
    assert torch.equal(ops.couple(x, x, backend=backend), 2 * ones())
    with pytest.raises(ValueError, match="overlap"):
        ops.couple_(x, x, backend=backend)


# ---- bad input. Each case: the error, what its message says, and a call on fresh tensors.


def read_only():
    array = np.ones((2, 3))
    array.flags.writeable = False
    return array


base = torch.ones(4, 3)
BAD = {
    "f of another shape": (ValueError, ["f has shape (3, 2)", "x has (2, 3)", "equal"], lambda o: o(f=ones(3, 2))),
    "f that would broadcast": (ValueError, ["f has shape (3,)", "(2, 3)"], lambda o: o(f=ones(3))),
    "f of integers": (
        TypeError,
        ["f is ", "int64", "must be", "float64, float32"],
        lambda o: o(f=ones(dtype=torch.int64)),
    ),
    "x of integers": (
        TypeError,
        ["x is ", "int32", "must be", "float64, float32"],
        lambda o: o(x=ones(dtype=torch.int32)),
    ),
    "x of bool": (TypeError, ["x is ", "bool", "must be"], lambda o: o(x=ones(dtype=torch.bool))),
    "f complex": (TypeError, ["f is ", "complex64", "must be"], lambda o: o(f=ones(dtype=torch.complex64))),
    "x of float8": (TypeError, ["x is ", "float8_e4m3fn", "must be"], lambda o: o(x=ones().to(torch.float8_e4m3fn))),
    "f a list": (TypeError, ["f is a list", "torch.Tensor"], lambda o: o(f=[1.0])),
    "f None": (TypeError, ["f is a NoneType"], lambda o: o(f=None)),
    "x a float": (TypeError, ["x is a float"], lambda o: o(x=1.0)),
    "f from NumPy": (TypeError, ["f ", "numpy", "torch", "one library"], lambda o: o(f=np.ones((2, 3), np.float32))),
    "f on another device": (ValueError, ["f is on meta", "must"], lambda o: o(f=ones(device="meta"))),
}


def written_and_read():
    return torch.full((2, 3), 5.0), ones()


@pytest.mark.parametrize("operation", ["couple", "couple_", "uncouple", "uncouple_", "accumulate_"])
@pytest.mark.parametrize("case", BAD)
def test_bad_operands(case, operation, backend):
    """The message names the argument as the function does, what it got and what it needs; nothing is written."""
    error, parts, call = BAD[case]
    names = {"uncouple": ("y", "f"), "uncouple_": ("y", "f"), "accumulate_": ("total", "part")}.get(
        operation, ("x", "f")
    )
    x, f = written_and_read()
    kept = x.clone()

    def given(**changed):
        return getattr(ops, operation)(changed.get("x", x), changed.get("f", f), backend=backend)

    with pytest.raises(error) as raised:
        call(given)
    if (operation, case) == ("accumulate_", "f a list"):  # which would be right for a list of totals
        assert_says(raised, ["total and part must both be arrays, or both lists of arrays"])
    else:
        assert_says(raised, [renamed(part, names) for part in parts])
    assert torch.equal(x, kept)


def assert_says(raised, parts):
    for part in parts:
        assert part.lower() in str(raised.value).lower(), f"the message does not say {part!r}: {raised.value}"


def renamed(part, names):
    for old, new in zip(("x", "f"), names, strict=True):
        if part == old or part.startswith(f"{old} "):
            return new + part[1:]
    return part


OVERLAPS = {
    "couple_ of neighbours": lambda b: ops.couple_(base[:2], base[1:3], backend=b),
    "accumulate_ of neighbours": lambda b: ops.accumulate_(base[:2], base[1:3], backend=b),
    "reverse_step_, y and dy": lambda b: ops.reverse_step_(base[:2], ones(), base[1:3], ones(), backend=b),
    "reverse_step_, y and f": lambda b: ops.reverse_step_(base[:2], base[:2], ones(), ones(), backend=b),
    "reverse_step_, dy and f": lambda b: ops.reverse_step_(ones(), base[:2], base[:2], ones(), backend=b),
    "reverse_step_, y and df": lambda b: ops.reverse_step_(base[:2], ones(), ones(), base[1:3], backend=b),
    "accumulate_ of lists, two totals": lambda b: ops.accumulate_([base[:2], base[1:3]], [ones(), ones()], backend=b),
    "accumulate_ of lists, total and part": lambda b: ops.accumulate_([base[:2]], [base[1:3]], backend=b),
    "accumulate_ of lists, one's total and another's part": lambda b: ops.accumulate_(
        [base[:2], ones()], [ones(), base[1:3]], backend=b
    ),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_overlapping_memory(case, backend):
    """What is written shares no element with anything else."""
    with pytest.raises(ValueError, match="overlap"):
        OVERLAPS[case](backend)
    assert torch.equal(base, torch.ones(4, 3))


def test_interleaved_halves_do_not_overlap(backend):
    """Even and odd columns of one buffer share no element."""
    memory = torch.ones(4, 6)
    ops.couple_(memory[:, ::2], memory[:, 1::2], backend=backend)
    assert torch.equal(memory, torch.tensor([2.0, 1.0] * 3).expand(4, 6))


def test_expanded_tensor_cannot_be_written(backend):
    """Several elements in one place; reading such a tensor is fine."""
    x = torch.ones(1, 3).expand(2, 3)
    with pytest.raises(ValueError, match=r"^x .*own memory"):
        ops.couple_(x, ones(), backend=backend)
    assert torch.equal(ops.couple(ones(), x, backend=backend), 2 * ones())
    assert torch.equal(ops.couple_(ones(), x, backend=backend), 2 * ones())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_numpy_arrays(backend):
    """Read-only, byte-swapped, of objects."""
    with pytest.raises(ValueError, match=r"^x is read-only.*writable"):
        ops.couple_(read_only(), np.ones((2, 3)), backend=backend)
    with pytest.raises(TypeError, match=r"^f is byte-swapped"):
        ops.couple(np.ones((2, 3)), np.ones((2, 3), ">f8"), backend=backend)
    with pytest.raises(TypeError, match=r"^f is.* object"):
        ops.couple(np.ones((2, 3)), np.ones((2, 3), object), backend=backend)
    with pytest.raises(TypeError, match=r"^f is.* int64"):
        ops.couple(np.ones((2, 3)), np.ones((2, 3), np.int64), backend=backend)
    assert (ops.couple(read_only(), read_only(), backend=backend) == 2).all()


def test_bad_operands_of_reverse_step(backend):
    """Each of the four by its own name, and neither result half-written."""
    good = {"y": ones(), "f": ones(), "dy": ones(), "df": ones()}
    for name in ("f", "dy", "df"):
        for bad, error in ((ones(3, 2), ValueError), (ones(dtype=torch.int64), TypeError), ("text", TypeError)):
            with pytest.raises(error, match=f"^{name} "):
                ops.reverse_step_(**{**good, name: bad}, backend=backend)
    assert all(torch.equal(t, ones()) for t in good.values())


def test_bad_lists(backend):
    """Unequal lengths, an array and a list, and a bad pair at the end: nothing is written."""
    totals = [ones(), ones()]
    with pytest.raises(ValueError, match="part has 1 arrays, total has 2"):
        ops.accumulate_(totals, [ones()], backend=backend)
    with pytest.raises(TypeError, match="both be arrays, or both lists"):
        ops.accumulate_(totals, ones(), backend=backend)
    with pytest.raises(TypeError, match=r"^total\[1\] is a str"):
        ops.accumulate_([ones(), "text"], [ones(), ones()], backend=backend)
    for bad, error in ((ones(5), ValueError), (ones(dtype=torch.int64), TypeError), (None, TypeError)):
        with pytest.raises(error, match="part"):
            ops.accumulate_(totals, [ones(), bad], backend=backend)
    assert all(torch.equal(t, ones()) for t in totals)


BAD_COUPLINGS = {
    "not a coupling": (TypeError, ["coupling is a dict", "Coupling"], {}),
    "channel_scale too long": (
        ValueError,
        ["channel_scale has shape (4,)", "(3,)"],
        rk.Coupling(channel_scale=ones(4)),
    ),
    "channel_scale of two dimensions": (ValueError, ["channel_scale"], rk.Coupling(channel_scale=ones(3, 1))),
    "sample_scale too short": (ValueError, ["sample_scale has shape (1,)", "(2,)"], rk.Coupling(sample_scale=ones(1))),
    "channel_scale of another type": (
        *(TypeError, ["channel_scale is float64", "float32"]),
        rk.Coupling(channel_scale=ones(3, dtype=torch.float64)),
    ),
    "sample_scale a list": (TypeError, ["sample_scale is a list"], rk.Coupling(sample_scale=[1.0, 1.0])),
    "channel_scale from NumPy": (
        TypeError,
        ["channel_scale", "numpy"],
        rk.Coupling(channel_scale=np.ones(3, np.float32)),
    ),
    "channel_dim out of range": (
        *(ValueError, ["channel_dim is 2", "2 dimensions"]),
        rk.Coupling(channel_scale=ones(3), channel_dim=2),
    ),
    "grid_exponent too large": (ValueError, ["grid_exponent is 127", "-126 to 126"], rk.Coupling(grid_exponent=127)),
    "grid_exponent a float": (TypeError, ["grid_exponent is a float", "int"], rk.Coupling(grid_exponent=2.0)),
    "checksum of floats": (TypeError, ["checksum is float32", "int64"], rk.Coupling(checksum=ones(1))),
    "checksum of two": (ValueError, ["checksum", "one element"], rk.Coupling(checksum=ones(2, dtype=torch.int64))),
    "amax of float64": (TypeError, ["amax is float64", "float32"], rk.Coupling(amax=ones(1, dtype=torch.float64))),
    "amax elsewhere": (ValueError, ["amax is on meta"], rk.Coupling(amax=ones(1, device="meta"))),
}


@pytest.mark.parametrize("operation", ["couple", "couple_", "uncouple_", "reverse_step_"])
@pytest.mark.parametrize("case", BAD_COUPLINGS)
def test_bad_couplings(case, operation, backend):
    """Every option is checked against the operands before anything is written."""
    error, parts, coupling = BAD_COUPLINGS[case]
    arrays = [ones() for _ in range(4 if operation == "reverse_step_" else 2)]
    with pytest.raises(error) as raised:
        getattr(ops, operation)(*arrays, coupling=coupling, backend=backend)
    assert_says(raised, parts)
    assert all(torch.equal(a, ones()) for a in arrays)


def test_errors_have_their_documented_kinds():
    """BackendError is a ValueError, ReconstructionError a RuntimeError."""
    assert issubclass(rk.BackendError, ValueError)
    assert issubclass(rk.ReconstructionError, RuntimeError)
