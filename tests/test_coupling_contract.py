# SPDX-License-Identifier: Apache-2.0
"""The coupling and autograd, and its bad input: every one named before anything is written."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bad_operands import BAD, assert_says, check_refused, ones  # noqa: E402

import revkernels as rk  # noqa: E402
from revkernels import ops  # noqa: E402


@pytest.fixture(params=["cpu", "eager", "reference"])
def backend(request, available):
    return available(request.param)


# ---- autograd

IN_PLACE = {
    "couple_": lambda a, b, c, d, **k: ops.couple_(a, b, **k),
    "uncouple_": lambda a, b, c, d, **k: ops.uncouple_(a, b, **k),
    "reverse_step_": lambda a, b, c, d, **k: ops.reverse_step_(a, b, c, d, **k),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_calls_raise_the_version(name, backend):
    """Once for what is written, never for what is read; so autograd notices."""
    a, b, c, d = (ones() for _ in range(4))
    before = [t._version for t in (a, b, c, d)]
    IN_PLACE[name](a, b, c, d, backend=backend)
    assert a._version > before[0]
    assert (b._version, d._version) == (before[1], before[3])
    assert (c._version > before[2]) is (name == "reverse_step_")


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
    first = "x" if name == "couple_" else "y"
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


# ---- bad input


def read_only():
    array = np.ones((2, 3))
    array.flags.writeable = False
    return array


base = torch.ones(4, 3)


@pytest.mark.parametrize("operation", ["couple", "couple_", "uncouple", "uncouple_"])
@pytest.mark.parametrize("case", BAD)
def test_bad_operands(case, operation, backend):
    """Named before anything is written."""
    check_refused(operation, ("x" if operation.startswith("couple") else "y", "f"), case, backend)


OVERLAPS = {
    "couple_ of neighbours": lambda b: ops.couple_(base[:2], base[1:3], backend=b),
    "reverse_step_, y and dy": lambda b: ops.reverse_step_(base[:2], ones(), base[1:3], ones(), backend=b),
    "reverse_step_, y and f": lambda b: ops.reverse_step_(base[:2], base[:2], ones(), ones(), backend=b),
    "reverse_step_, dy and f": lambda b: ops.reverse_step_(ones(), base[:2], base[:2], ones(), backend=b),
    "reverse_step_, y and df": lambda b: ops.reverse_step_(base[:2], ones(), ones(), base[1:3], backend=b),
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


def test_rows_that_lie_within_each_other(backend):
    """Strides that no dense array has, and with which every element still has a place of its own; or has not."""
    memory = torch.ones(6)
    ops.couple_(memory.as_strided((2, 2), (2, 3)), ones(2, 2), backend=backend)
    assert memory.tolist() == [2, 1, 2, 2, 1, 2]
    with pytest.raises(ValueError, match=r"^x .*own memory"):
        ops.couple_(memory.as_strided((2, 3), (2, 1)), ones(), backend=backend)
    assert memory.tolist() == [2, 1, 2, 2, 1, 2]


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
    masked = np.ma.masked_array([1.0, 2.0], [False, True])
    for call in (lambda: ops.couple_(masked, np.ones(2), backend=backend), lambda: ops.couple(np.ones(2), masked)):
        with pytest.raises(TypeError, match=r"^[xf] is a MaskedArray; it must be a plain array"):
            call()
    assert masked.data.tolist() == [1.0, 2.0]
    assert (ops.couple(read_only(), read_only(), backend=backend) == 2).all()


def test_bad_operands_of_reverse_step(backend):
    """Each of the four by its own name, and neither result half-written."""
    good = {"y": ones(), "f": ones(), "dy": ones(), "df": ones()}
    for name in ("f", "dy", "df"):
        for bad, error in ((ones(3, 2), ValueError), (ones(dtype=torch.int64), TypeError), ("text", TypeError)):
            with pytest.raises(error, match=f"^{name} "):
                ops.reverse_step_(**{**good, name: bad}, backend=backend)
    assert all(torch.equal(t, ones()) for t in good.values())


BAD_COUPLINGS = {
    "not a coupling": (TypeError, ["coupling is a dict", "Coupling"], {}),
    "channel_scale too long": (
        ValueError,
        ["channel_scale has shape (4,)", "(3,), STREAM's dimension 1"],
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
        *(ValueError, ["channel_dim is 2", "STREAM has 2 dimensions"]),
        rk.Coupling(channel_scale=ones(3), channel_dim=2),
    ),
    "grid_exponent too large": (ValueError, ["grid_exponent is 127", "-126 to 126"], rk.Coupling(grid_exponent=127)),
    "grid_exponent a float": (TypeError, ["grid_exponent is a float", "int"], rk.Coupling(grid_exponent=2.0)),
    "checksum of floats": (TypeError, ["checksum is float32", "int64"], rk.Coupling(checksum=ones(1))),
    "checksum of two": (ValueError, ["checksum", "one element"], rk.Coupling(checksum=ones(2, dtype=torch.int64))),
    "amax of float64": (TypeError, ["amax is float64", "float32"], rk.Coupling(amax=ones(1, dtype=torch.float64))),
    "channel_scale with gaps": (
        *(ValueError, ["channel_scale has stride 2", "dense"]),
        rk.Coupling(channel_scale=ones(6)[::2]),
    ),
    "sample_scale expanded": (
        *(ValueError, ["sample_scale has stride 0", "dense"]),
        rk.Coupling(sample_scale=ones(1).expand(2)),
    ),
    "channel_dim a float": (
        *(TypeError, ["channel_dim is a float", "int"]),
        rk.Coupling(channel_scale=ones(3), channel_dim=1.0),
    ),
    "channel_dim a bool": (
        *(TypeError, ["channel_dim is a bool", "int"]),
        rk.Coupling(channel_scale=ones(3), channel_dim=True),
    ),
    "both scales along dimension 0": (
        *(ValueError, ["channel_dim is -2", "another dimension"]),
        rk.Coupling(channel_scale=ones(2), sample_scale=ones(2), channel_dim=-2),
    ),
    "amax that requires grad": (ValueError, ["amax requires grad"], rk.Coupling(amax=ones(1).requires_grad_())),
    "amax elsewhere": (ValueError, ["amax is on meta"], rk.Coupling(amax=ones(1, device="meta"))),
}


WITH_A_COUPLING = ["couple", "couple_", "uncouple", "uncouple_", "reverse_step_"]


@pytest.mark.parametrize("operation", WITH_A_COUPLING)
@pytest.mark.parametrize("case", BAD_COUPLINGS)
def test_bad_couplings(case, operation, backend):
    """Every option is checked against the operands before anything is written."""
    error, parts, coupling = BAD_COUPLINGS[case]
    arrays = [ones() for _ in range(4 if operation == "reverse_step_" else 2)]
    with pytest.raises(error) as raised:
        getattr(ops, operation)(*arrays, coupling=coupling, backend=backend)
    stream = "x" if operation.startswith("couple") else "y"
    assert_says(raised, [part.replace("STREAM", stream) for part in parts])
    assert all(torch.equal(a, ones()) for a in arrays)


def shared(operation, backend, **views):
    """Call with a coupling whose options lie in one of the operands' memory; that memory holds ones throughout."""
    arrays = [ones(2, 3) for _ in range(4 if operation == "reverse_step_" else 2)]
    coupling = rk.Coupling(**{name: view(arrays) for name, view in views.items()})
    with pytest.raises(ValueError, match="overlap in memory") as raised:
        getattr(ops, operation)(*arrays, coupling=coupling, backend=backend)
    assert all(torch.equal(a, ones()) for a in arrays)
    return raised


@pytest.mark.parametrize("operation", WITH_A_COUPLING)
def test_options_that_share_memory_with_what_is_written(operation, backend):
    """The order of the elements must not decide the result."""
    in_place = operation.endswith("_")
    if in_place:
        assert_says(shared(operation, backend, channel_scale=lambda a: a[0][1]), ["channel_scale"])
        assert_says(shared(operation, backend, sample_scale=lambda a: a[0].view(-1)[:2]), ["sample_scale"])
    if operation == "reverse_step_":
        assert_says(shared(operation, backend, channel_scale=lambda a: a[2][1]), ["dy", "channel_scale"])
        assert_says(shared(operation, backend, amax=lambda a: a[3][1, :1]), ["df", "amax"])
    assert_says(shared(operation, backend, amax=lambda a: a[0][1, :1]), ["amax"])
    assert_says(shared(operation, backend, amax=lambda a: a[1][1, :1]), ["f", "amax"])
    assert_says(shared(operation, backend, checksum=lambda a: a[1].view(-1)[:2].view(torch.int64)), ["f", "checksum"])
    scale = ones(3)
    assert_says(shared(operation, backend, channel_scale=lambda a: scale, amax=lambda a: scale[:1]), ["amax"])
    assert torch.equal(scale, ones(3))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("operation", WITH_A_COUPLING)
def test_bad_options_of_numpy_arrays(operation, backend, available):
    """Read-only or byte-swapped: refused by name, and the operands stay as they were."""
    available(backend)
    checksum, amax = np.zeros(1, np.int64), np.zeros(1, np.float32)
    checksum.flags.writeable = amax.flags.writeable = False
    cases = {
        "checksum is read-only": (ValueError, rk.Coupling(checksum=checksum)),
        "amax is read-only": (ValueError, rk.Coupling(amax=amax)),
        "checksum is byte-swapped": (TypeError, rk.Coupling(checksum=np.zeros(1, ">i8"))),
        "channel_scale is byte-swapped": (TypeError, rk.Coupling(channel_scale=np.ones(3, ">f4"))),
    }
    for message, (error, coupling) in cases.items():
        arrays = [np.ones((2, 3), np.float32) for _ in range(4 if operation == "reverse_step_" else 2)]
        with pytest.raises(error, match=f"^{message}"):
            getattr(ops, operation)(*arrays, coupling=coupling, backend=backend)
        assert all((a == 1).all() for a in arrays)


@pytest.mark.parametrize("case", BAD)
def test_bad_operands_beside_a_coupling(case, backend):
    """The options' checks come first and must not stumble over what the operands' refuse."""
    error, parts, call = BAD[case]
    x, coupling = ones(), rk.Coupling(channel_scale=ones(3), checksum=torch.zeros(1, dtype=torch.int64))
    with pytest.raises(error) as raised:
        call(lambda **k: ops.couple_(k.get("x", x), k.get("f", ones()), coupling=coupling, backend=backend))
    assert_says(raised, parts)
    assert torch.equal(x, ones())


def test_meta_tensors_have_shapes_and_no_memory():
    """Under ``with torch.device("meta")`` the default backend computes shapes."""
    x, f = (torch.empty(2, 3, 4, device="meta", dtype=torch.bfloat16) for _ in range(2))
    for function in (ops.couple, ops.uncouple, ops.couple_, ops.uncouple_):
        y = function(x, f)
        assert (y.is_meta, y.shape, y.dtype) == (True, x.shape, x.dtype)
    assert ops.reverse_step_(x, f, f.clone(), x.clone())[0] is x
    scale = torch.empty(3, device="meta")
    assert ops.couple(x, f, coupling=rk.Coupling(channel_scale=scale)).is_meta
    with pytest.raises(ValueError, match=r"^f has shape \(2, 3\)"):
        ops.couple(x, f[..., 0])


def test_errors_have_their_documented_kinds():
    """BackendError is a ValueError, ReconstructionError a RuntimeError."""
    assert issubclass(rk.BackendError, ValueError)
    assert issubclass(rk.ReconstructionError, RuntimeError)
